"""What the tests of several commands use."""

import functools

import pytest

from extras import confirm, evidence, figure, power
from extras.results import read_runs

read_once = functools.cache(read_runs)


@pytest.fixture
def files_are_read_once(monkeypatch):
    """Read each file of runs once for all tests that use this, as reading is slow."""
    for command in (confirm, evidence, figure, power):
        monkeypatch.setattr(command, "read_runs", read_once)
