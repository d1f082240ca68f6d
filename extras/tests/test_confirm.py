"""Claims about the command that judges the confirming runs of docs/PROTOCOL.md."""

import itertools
import json

import pytest

from extras import confirm, results

RATES = (0.001, 0.003, 0.01)


def record(task, name, seed, accuracy, lr=0.003, holdout=None, processor="A"):
    """Return a finished run of a row as extras.compare keeps it."""
    row = (confirm.BASELINES | confirm.RULES)[name]
    flags = {"method": "static", "targets": "q,k,v,o"} | row
    flags |= {"targets": flags["targets"].split(","), "holdout": holdout, "budget": "3072"}
    flags |= {"task": task, "seed": seed, "lr": lr}
    result = {"last": accuracy, "params_active": 3072, "params_ever_trained": 3072}
    return {"flags": flags, "result": result, "processor": processor}


@pytest.fixture
def tuning():
    """Return the runs on held-out examples of all rows: 0.003 is best."""
    records = []
    for task, name in itertools.product(confirm.TASKS, confirm.BASELINES | confirm.RULES):
        for lr, seed in itertools.product(RATES, (200, 201, 202)):
            accuracy = 0.8 if lr == 0.003 else 0.7
            records.append(record(task, name, seed, accuracy, lr, holdout=0.2))
    return records


def final(gains):
    """Return the runs on dev; gains: {(task, rule): accuracy above all other rows}."""
    records = []
    for task, name in itertools.product(confirm.TASKS, confirm.BASELINES | confirm.RULES):
        for seed in range(200, 208):
            gain = gains.get((task, name), 0) and gains[task, name] + 0.01 * (seed % 2)
            records.append(record(task, name, seed, 0.8 + gain))
    return records


@pytest.fixture
def judge(tmp_path, capsys):
    """Give a function that writes records to a file and returns what the command says."""

    def judge(records, *arguments):
        path = tmp_path / "runs.jsonl"
        path.write_text("".join(json.dumps(run) + "\n" for run in records))
        try:
            confirm.main([str(path), *arguments])
        except SystemExit:
            return capsys.readouterr().err
        return capsys.readouterr().out

    return judge


def test_a_rule_passes_that_wins_on_three_tasks_and_not_one_that_wins_on_two(tuning, judge):
    gains = {(task, "alignment, greedy"): 0.03 for task in ("TREC", "SICK", "sst2")}
    gains |= {(task, "alignment, within-layer"): 0.03 for task in ("TREC", "mrpc")}
    text = judge(tuning + final(gains))
    for baseline in confirm.BASELINES:
        assert f"alignment, greedy beats {baseline} on TREC, SICK, sst2: it passes" in text
        assert f"alignment, within-layer beats {baseline} on TREC, mrpc: it does not pass" in text


def test_a_rule_that_is_worse_beats_nothing_however_small_p_is(tuning, judge):
    gains = {(task, "alignment, greedy"): -0.1 for task in confirm.TASKS}
    assert "alignment, greedy beats LoRA on v on no task" in judge(tuning + final(gains))


def test_p_is_corrected_for_two_rules_on_five_tasks(tuning, judge):
    # Differences of 1e-7 and 1 point, four each: t = 0.5 / (0.5345 / sqrt 8) with 7 degrees.
    text = judge(tuning + final({("SUBJ", "alignment, greedy"): 1e-9}))
    line = next(line for line in text.splitlines() if "| SUBJ, alignment, greedy |" in line)
    assert "| +0.50 [+0.05, +0.95], n = 8 | 0.033 | 0.331 |" in line


def test_each_row_takes_the_rate_that_was_best_on_held_out_examples():
    def mean(lr, *accuracies):
        return [record("TREC", "LoRA on v", i, a, lr, 0.2) for i, a in enumerate(accuracies)]

    def chosen(records):
        return confirm.chosen_lr([results.as_run(run) for run in records])

    assert chosen(mean(0.01, 0.8, 0.9) + mean(0.003, 0.8, 0.8)) == 0.01
    assert chosen(mean(0.01, 0.8, 0.9) + mean(0.003, 0.9, 0.8)) == 0.003  # ties to the smaller
    failed = mean(0.01, 0.9, 0.9)
    failed[1]["result"] = {"failed": "the loss is nan"}
    assert chosen(failed + mean(0.003, 0.5, 0.5)) == 0.003


def test_runs_at_a_common_rate_are_shown_and_judge_nothing(tuning, judge):
    chosen, common = final({}), final({})
    for run in common:
        run["flags"]["lr"] = 0.01
        run["result"]["last"] = 0.6
    runs = tuning + chosen + common
    assert "60.00" not in judge(runs)
    assert "| 60.00 ± 0.00 (0.01) |" in judge(runs, "--lr", "0.01")
    assert "beats" not in judge(runs, "--lr", "0.01")


def test_what_is_missing_mixed_or_failed_is_refused_in_one_line(tuning, judge):
    runs = final({})
    assert "TREC: LoRA on q and v, learning rate 0.003: want each seed" in judge(tuning + runs[1:])
    assert "TREC: LoRA on q and v: no runs on held-out examples" in judge(runs)
    runs[-1]["processor"] = "B"
    assert "sst2: runs of several processors: A, B" in judge(tuning + runs)
    runs[-1] |= {"processor": "A", "result": {"failed": "the loss is nan"}}
    assert "sst2: alignment, greedy seed 207 failed: PROTOCOL.md says" in judge(tuning + runs)
