"""What the tests of several commands use."""

import functools

import pytest

from extras import confirm, evidence, figure, power
from extras.results import read_runs

read_once = functools.cache(read_runs)


@pytest.fixture
def files_are_read_once(monkeypatch):
    """Let commands read every file of runs once, in all tests together: there are many commands."""
    for command in (confirm, evidence, figure, power):
        monkeypatch.setattr(command, "read_runs", read_once)
