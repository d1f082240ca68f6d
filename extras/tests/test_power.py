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


def test_made_up_experiments_vary_and_go_together_as_the_real_ones(differences):
    experiments = power.made_up(differences, np.random.default_rng(1))
    assert experiments.shape == (power.EXPERIMENTS, 8, 2)
    seeds = experiments.reshape(-1, 2)
    np.testing.assert_allclose(seeds.mean(0), 0, atol=0.06)
    np.testing.assert_allclose(np.cov(seeds.T), np.cov(differences.T), rtol=0.06)


def test_a_gain_that_is_called_detectable_is_found_in_four_cases_of_five(differences):
    alone = differences[:, :1]
    experiments = power.made_up(alone, np.random.default_rng(1))
    gain = detectable(alone[:, 0].tolist())
    assert power.is_better(experiments + gain).mean() == pytest.approx(0.8, abs=0.04)
    assert power.is_better(experiments).mean() == pytest.approx(0.025, abs=0.015)


def test_a_task_is_won_if_the_rule_beats_both_baselines_by_p_corrected_for_a_family():
    # Two rules on one task; the first has the gain. t is 0 without it, and p tiny with it.
    signs = np.tile([-1.0, 1.0], 4)  # of 8 seeds
    noise = np.stack([signs] * 4, axis=1)[None]  # two baselines times two rules
    family = {("ours", "TREC"): None, ("other", "TREC"): None}
    won = power.tasks_won(noise, [family, family], "ours", 5.0)
    assert won.tolist() == [[True]]
    # With one baseline of a large spread the rule does not beat both.
    noise[..., 2] *= 100
    assert power.tasks_won(noise, [family, family], "ours", 5.0).tolist() == [[False]]
    # p is 0.045 for a gain of 0.92, and 0.09 corrected for two rules.
    noise[..., 2] /= 100
    assert power.tasks_won(noise[..., ::2], [{("ours", "TREC"): None}] * 2, "ours", 0.92).all()
    assert not power.tasks_won(noise, [family, family], "ours", 0.92).any()


def test_the_results_hold_what_the_command_prints(capsys):
    power.main([str(DOCS / "protocol.jsonl.gz")])
    assert f"\n\n{capsys.readouterr().out}\n" in (DOCS / "RESULTS.md").read_text(encoding="utf-8")
