"""Claims about the chance that the test of docs/PROTOCOL.md had to answer yes."""

import pathlib

import numpy as np
import pytest

from extras import power
from extras.intervals import detectable

DOCS = pathlib.Path(__file__).parents[2] / "docs"


@pytest.fixture
def differences():
    """Return the differences (8 seeds, 2 comparisons) of two rules that go together."""
    generator = np.random.default_rng(0)
    first = generator.standard_normal(8)
    return np.stack([first + 5, 2 * first + generator.standard_normal(8)], axis=1)


def test_simulated_experiments_vary_and_go_together_as_the_real_ones(differences):
    experiments = power.simulate(differences, np.random.default_rng(1))
    assert experiments.shape == (power.EXPERIMENTS, 8, 2)
    seeds = experiments.reshape(-1, 2)
    np.testing.assert_allclose(seeds.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(seeds.T), np.cov(differences.T), rtol=0.06)


def test_a_gain_that_is_called_detectable_is_found_in_four_cases_of_five(differences):
    alone = differences[:, :1]
    experiments = power.simulate(alone, np.random.default_rng(1))
    gain = detectable(alone[:, 0].tolist())
    assert power.is_better(experiments + gain).mean() == pytest.approx(0.8, abs=0.04)
    assert power.is_better(experiments).mean() == pytest.approx(0.025, abs=0.015)


def won(gain, rules=("ours", "other"), spreads=(1, 1, 1, 1)):
    """Return if "ours" wins the task; the seeds of a difference are +-spread, with mean 0.

    spreads: of ours and the other rule over one baseline, and of both over the second.
    """
    noise = np.tile([-1.0, 1.0], 4)[:, None] * np.array(spreads)[: 2 * len(rules)]
    family = {(rule, "TREC"): None for rule in rules}
    return power.tasks_won(noise[None], [family, family], "ours", gain).item()


def test_differences_that_are_all_equal_show_nothing():
    assert not won(5.0, spreads=(0, 1, 1, 1))
    assert won(5.0, spreads=(1, 0, 1, 0))  # and they do not spoil the correction of the others


def test_a_task_is_won_if_the_rule_beats_both_baselines():
    assert won(5.0)
    assert not won(5.0, spreads=(100, 1, 1, 1))
    assert not won(5.0, spreads=(1, 1, 100, 1))


def test_p_is_corrected_for_the_rules_and_only_one_has_the_gain():
    # With spread 1, t is 2.65 times the gain: p is 0.059 for 0.85, and 0.045 for 0.92.
    assert not won(0.85, rules=["ours"])
    assert won(0.92, rules=["ours"])
    assert not won(0.92)
    assert not won(0.92, spreads=(1, 0.01, 1, 0.01))  # were the other better, p were not doubled


@pytest.mark.usefixtures("files_are_read_once")
def test_the_results_hold_what_the_command_prints(capsys):
    power.main([str(DOCS / "protocol.jsonl.gz")])
    assert f"\n\n{capsys.readouterr().out}\n" in (DOCS / "RESULTS.md").read_text(encoding="utf-8")
