"""Claims about the command that judges the confirming runs of docs/PROTOCOL.md."""

import argparse
import itertools
import json
import pathlib
import re
import shlex

import pytest

import train
from data import InputError
from extras import compare, confirm, evidence, results

DOCS = pathlib.Path(__file__).parents[2] / "docs"

# The rows as docs/PROTOCOL.md writes them, and the flags of its command.
CONTENDERS = {
    "LoRA on q and v": "lora:middle-layers:targets=q,v:rank=2:alpha=4",
    "random linears": "static:constant:random-linears",
    "LoRA on v": "lora:middle-layers:targets=v:rank=3:alpha=6",
    "alignment, within-layer": "static:alignment:within-layer",
    "alignment, greedy": "static:alignment:greedy",
}
PAPER = {"paper, static": "static:grad-norm", "paper, dynamic": "dynamic:grad-norm"}
COMMAND = "--budget 3072 --targets q,k,v,o --shortcuts none --rank 1 --alpha 2 --precision bfloat16"


def flags_of(contender):
    """Return the flags of a contender as extras.compare keeps them."""
    known = vars(train.parse_args([]))
    return vars(train.parse_args(COMMAND.split() + compare.contender_argv(contender, known)))


FLAGS = {name: flags_of(contender) for name, contender in (CONTENDERS | PAPER).items()}


def record(task, name, seed, accuracy, lr=0.003, holdout=None):
    """Return a finished run of a row."""
    flags = FLAGS[name] | {"task": task, "seed": seed, "lr": lr, "holdout": holdout}
    result = {"last": accuracy, "params_active": 3072, "params_ever_trained": 3072}
    return {"flags": flags, "result": result, "processor": "A"}


@pytest.fixture
def tuning():
    """Return the runs on held-out examples of all rows: 0.003 is best."""
    records = []
    for task, name in itertools.product(confirm.TASKS, CONTENDERS):
        for lr, seed in itertools.product((0.001, 0.003, 0.01), (200, 201, 202)):
            accuracy = 0.8 if lr == 0.003 else 0.7
            records.append(record(task, name, seed, accuracy, lr, holdout=0.2))
    return records


def on_dev(above, spread=0.01):
    """Return the runs on dev: 0.8 and above[task, name], which varies by `spread` over seeds."""
    records = []
    for task, name in itertools.product(confirm.TASKS, CONTENDERS):
        for seed in range(200, 208):
            accuracy = 0.8
            if (task, name) in above:
                accuracy += above[task, name] + spread * (seed % 2)
            records.append(record(task, name, seed, accuracy))
    return records


@pytest.fixture
def judge(tmp_path, capsys):
    """Give a function that writes records to a file and returns what the command prints."""

    def judge(records, *arguments):
        path = tmp_path / "runs.jsonl"
        path.write_text("".join(json.dumps(run) + "\n" for run in records))
        confirm.main([str(path), *arguments])
        return capsys.readouterr().out

    return judge


def test_a_rule_must_beat_both_baselines_on_the_same_three_tasks(tuning, judge):
    greedy = {(task, "alignment, greedy"): 0.03 for task in ("TREC", "SICK", "sst2")}
    assert "alignment, greedy beats both baselines on 3 of 5 tasks (TREC, SICK, sst2)" in judge(
        tuning + on_dev(greedy)
    )
    # The draw is as good on TREC, and LoRA on q and v on SICK.
    good = {("TREC", "random linears"): 0.03, ("SICK", "LoRA on q and v"): 0.03}
    text = judge(tuning + on_dev(greedy | good))
    assert (
        "alignment, greedy beats both baselines on 1 of 5 tasks (sst2): NO, 3 are needed." in text
    )
    assert "alignment, within-layer beats both baselines on 0 of 5 tasks: NO, 3 are needed." in text


def test_a_rule_that_passes_is_compared_with_lora_on_v(tuning, judge):
    rule = {(task, "alignment, greedy"): 0.03 for task in ("TREC", "SICK", "sst2")}
    assert "on 3 of 5 tasks (TREC, SICK, sst2), and LoRA on v on 3: YES." in judge(
        tuning + on_dev(rule)
    )
    on_v = {("TREC", "LoRA on v"): 0.03}
    assert "YES, but no better than LoRA on v, which it beats on 2." in judge(
        tuning + on_dev(rule | on_v)
    )


def test_a_rule_that_is_worse_beats_nothing_however_small_p_is(tuning, judge):
    worse = {(task, "alignment, greedy"): -0.1 for task in confirm.TASKS}
    assert "alignment, greedy beats both baselines on 0 of 5" in judge(tuning + on_dev(worse))


def test_the_answer_is_by_p_that_is_corrected_for_two_rules_on_five_tasks(tuning, judge):
    # Differences of 0 and 1 points, four each: t = 0.5 / (0.5345 / sqrt 8) with 7 degrees.
    three = {(task, "alignment, greedy"): 0 for task in ("TREC", "SICK", "sst2")}
    text = judge(tuning + on_dev(three))
    assert "| alignment, greedy | SICK | +0.50 [+0.05, +0.95], n = 8 | 0.033 | 0.331 |" in text
    assert "alignment, greedy beats both baselines on 0 of 5 tasks" in text


def test_equal_differences_prove_nothing(tuning, judge):
    above = {(task, "alignment, greedy"): 0.002 for task in confirm.TASKS}
    text = judge(tuning + on_dev(above, spread=0))
    assert "| alignment, greedy | SICK | +0.20 [+0.20, +0.20], n = 8 | 1.000 | 1.000 |" in text


def test_each_row_takes_the_rate_that_was_best_on_held_out_examples():
    def at(lr, *accuracies):
        pairs = zip((200, 201, 202), accuracies, strict=True)
        return [record("TREC", "LoRA on v", *pair, lr, 0.2) for pair in pairs]

    def chosen(records):
        return confirm.chosen_lr([results.as_run(run) for run in records], "LoRA on v", "TREC")

    low = at(0.001, 0.1, 0.1, 0.1)
    assert chosen(low + at(0.003, 0.8, 0.8, 0.8) + at(0.01, 0.8, 0.8, 0.9)) == "0.01"
    # Ties go to the smaller. As floats, the sum of the second three is larger.
    right, same = [901 / 1090, 902 / 1090, 905 / 1090], [900 / 1090, 904 / 1090, 904 / 1090]
    assert sum(same) > sum(right)
    assert chosen(low + at(0.003, *right) + at(0.01, *same)) == "0.003"
    failed = at(0.01, 0.9, 0.9, 0.9)
    failed[1]["result"] = {"failed": "the loss is nan"}
    assert chosen(low + at(0.003, 0.5, 0.5, 0.5) + failed) == "0.003"
    for run in (everything := low + at(0.003, 0.5, 0.5, 0.5) + failed):
        run["result"] = {"failed": "the loss is nan"}
    with pytest.raises(InputError, match="a run failed at every learning rate"):
        chosen(everything)


def test_a_row_is_in_the_order_of_seeds_whatever_the_order_of_the_file():
    runs = [results.as_run(record("TREC", "LoRA on v", seed, 0.8)) for seed in range(207, 199, -1)]
    assert list(confirm.by_seed(runs, confirm.SEEDS, "")) == confirm.SEEDS


def test_compare_chooses_the_same_rate_of_two_that_tie(monkeypatch):
    accuracies = {0.003: [901, 902, 905], 0.01: [900, 904, 904]}

    def run(spec, flags, path):
        return {"last": accuracies[flags.lr][flags.seed] / 1090}

    monkeypatch.setattr(compare, "run", run)
    args = argparse.Namespace(lr=[0.01, 0.003], seeds=[0, 1, 2], tuning_seeds=3, results="")
    assert compare.choose_lr("lora", argparse.Namespace(), args) == 0.003


def test_runs_at_a_common_rate_are_shown_and_judge_nothing(tuning, judge, tmp_path):
    common = []
    for task, name, seed in itertools.product(confirm.TASKS, FLAGS, range(200, 208)):
        common.append(record(task, name, seed, 0.6, lr=0.01))
    runs = tuning + on_dev({}) + common
    text = judge(runs)
    assert "| 80.00 ± 0.00 (0.003) |" in text and "60.00" not in text and "beats both" in text
    text = judge(runs, "--lr", "0.01", "--svg", str(tmp_path / "forest.svg"))
    assert "| paper, static | 60.00 ± 0.00 (0.01) |" in text and "beats both" not in text
    assert "all rows at learning rate 0.01" in (tmp_path / "forest.svg").read_text()
    for task in (confirm.TASKS[0], confirm.TASKS[-1]):  # a search that lacks a task is left out
        some = [
            run
            for run in runs
            if run["flags"]["method"] != "dynamic" or run["flags"]["task"] != task
        ]
        text = judge(some, "--lr", "0.01")
        assert "| paper, static | 60.00" in text and "paper, dynamic" not in text


def test_another_budget_is_shown_at_the_rates_of_the_first_and_judges_nothing(tuning, judge):
    def at_6144(task):
        runs = []
        for name, seed in itertools.product(CONTENDERS, range(200, 208)):
            runs += [record(task, name, seed, 0.6), record(task, name, seed, 0.5, lr=0.01)]
        for run in runs:
            run["flags"] = run["flags"] | {"budget": "6144"}
        return runs

    runs = tuning + on_dev({}) + at_6144("SICK") + at_6144("TREC")
    text = judge(runs, "--budget", "6144")
    assert "| | TREC | SICK |" in text
    assert "| LoRA on v | 60.00 ± 0.00 (0.003) | 60.00 ± 0.00 (0.003) |" in text
    assert "beats both" not in text
    assert judge(runs) == judge(tuning + on_dev({}))


def test_the_searches_are_shown_at_a_budget_that_only_some_tasks_have(tuning, judge):
    runs = []
    for name, seed in itertools.product(FLAGS, range(200, 208)):
        runs.append(record("SICK", name, seed, 0.6, lr=0.01))
        runs[-1]["flags"]["budget"] = 6144
    text = judge(tuning + on_dev({}) + runs, "--budget", "6144", "--lr", "0.01")
    assert text.startswith("| | SICK |") and "| paper, static | 60.00" in text


def test_all_budgets_are_corrected_together_and_judge_nothing(tuning, judge):
    # Differences of 0 and 1 points, four each, at two budgets on five tasks for one of two rules.
    at_3072 = on_dev({(task, "alignment, greedy"): 0 for task in confirm.TASKS})
    at_6144 = [run | {"flags": run["flags"] | {"budget": "6144"}} for run in at_3072]
    text = judge(tuning + at_3072 + at_6144, "--budget", "all")
    for budget in ("3,072", "6,144"):
        row = f"| alignment, greedy | SICK, {budget} | +0.50 [+0.05, +0.95], n = 8 | 0.033 |"
        assert f"{row} 0.663 |" in text  # 0.0331 times the 20 differences
    assert "beats both" not in text


def test_tasks_of_your_own_are_shown_and_judge_nothing(tuning, judge):
    runs = tuning + on_dev({("TREC", "LoRA on v"): 0.05})
    for run in runs:
        if run["flags"]["task"] == "TREC":
            run["flags"] = run["flags"] | {"task": "mine"}
    text = judge(runs, "--tasks", "mine", "SUBJ")
    assert "| | mine | SUBJ |" in text and "| LoRA on v | 85.50 ± 0.53 (0.003) |" in text
    assert "SICK" not in text and "beats both" not in text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "TREC", "TERC"], "--tasks TERC: .* has no run of it"),
        (["--budget", "all", "--lr", "0.003"], "leave --lr out"),
    ],
)
def test_tasks_that_were_not_run_and_flags_that_exclude_each_other_are_refused(
    tuning, judge, capsys, flags, message
):
    with pytest.raises(SystemExit, match="2"):
        judge(tuning + on_dev({}), *flags)
    assert re.search(message, capsys.readouterr().err)


def test_all_budgets_of_some_tasks_are_those_that_were_run_on_them(tuning, judge):
    others = [run | {"flags": run["flags"] | {"budget": "6144"}} for run in on_dev({})]
    others = [run for run in others if run["flags"]["task"] == "TREC"]
    text = judge(tuning + on_dev({}) + others, "--tasks", "SICK", "--budget", "all")
    assert "SICK, 3,072" in text and "6,144" not in text


def test_the_picture_shows_the_differences_to_the_row_that_is_named(tuning, judge, tmp_path):
    picture = tmp_path / "forest.svg"
    runs = tuning + on_dev({("TREC", "random linears"): 0.15})
    judge(runs, "--svg", str(picture))
    assert "LoRA on q and v" in picture.read_text() and ">-10<" not in picture.read_text()
    judge(runs, "--svg", str(picture), "--minus", "random linears")
    assert "random linears" in picture.read_text() and ">-10<" in picture.read_text()


@pytest.mark.usefixtures("files_are_read_once")
def test_the_results_hold_what_their_command_prints_and_draws(capsys, tmp_path):
    document = DOCS / "RESULTS.md"
    text = document.read_text(encoding="utf-8")
    commands = re.findall(r"^python -m extras\.confirm docs/(.*)$", text, re.M)
    assert len(commands) == 6
    for command in commands:
        arguments, _, picture = command.partition(" --svg docs/")
        file, *flags = shlex.split(arguments)
        confirm.main([str(DOCS / file), *flags, "--svg", str(tmp_path / "a.svg")])
        assert f"\n\n{capsys.readouterr().out}\n" in text
        if picture:
            assert (tmp_path / "a.svg").read_bytes() == (DOCS / picture).read_bytes()


@pytest.mark.usefixtures("files_are_read_once")
def test_the_results_name_every_difference_that_is_near_a_finding_over_all_budgets(
    capsys, monkeypatch
):
    monkeypatch.setattr(evidence, "over_examples", lambda differences: (0.0, 0.0))  # slow: left out
    confirm.main([str(DOCS / "protocol.jsonl.gz"), "--budget", "all"])
    corrected = []
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "[" in line and "n = 8" in line and float(cells[4].lstrip("<")) < 0.06:
            corrected.append(cells[4])
    text = (DOCS / "RESULTS.md").read_text(encoding="utf-8")
    paragraph = text.partition("- **All budgets together.**")[2].partition("\n\n")[0]
    assert len(corrected) > 4
    assert sorted(re.findall(r"0\.\d{3}", paragraph)) == sorted(corrected)


def test_the_table_of_the_readme_is_that_of_the_results():
    """The test above shows that the results hold what the commands print."""
    text = (DOCS / "RESULTS.md").read_text(encoding="utf-8")

    def rows(command):
        table = text.partition(command)[2].partition("|---")[2].partition("\n\n")[0]
        rows = table.splitlines()[1:]
        return [" | ".join(re.findall(r"\d+\.\d+ ± \d+\.\d+", row)) for row in rows]

    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    at_chosen_rates = rows("--svg docs/confirmation.svg")
    assert len(at_chosen_rates) == 5
    for row in at_chosen_rates:
        assert f"| {row} |\n" in readme
    paper_static = rows("--lr 0.003")[5]
    assert f"\n| paper, static | {paper_static} |\n" in readme


def test_other_runs_in_the_same_file_change_nothing(tuning, judge):
    runs = tuning + on_dev({})
    expected = judge(runs)
    others = []
    for flags in ({"init": "gradient"}, {"budget": "6144"}, {"rank": 8}):
        others += [run | {"flags": run["flags"] | flags} for run in on_dev({})]
        others += [run | {"flags": run["flags"] | flags} for run in tuning]
    for run in others:
        run["result"] = run["result"] | {"last": 0.9}
    assert judge(runs + others) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda runs: runs.pop(0), "TREC: LoRA on q and v, held out, learning rate 0.001: want"),
        (lambda runs: runs.pop(), "sst2: alignment, greedy, learning rate 0.003: want one run"),
        (lambda runs: runs.append(runs[-1]), "sst2: alignment, greedy, learning rate 0.003: want"),
        (
            lambda runs: runs[-1].update(processor="B"),
            "sst2: runs with several values of processor: A, B",
        ),
        (lambda runs: runs[-1]["flags"].update(epochs=9.0), "sst2: runs with several values of ep"),
        (lambda runs: runs[-1].update(result={"failed": ""}), "seed 207 failed: PROTOCOL.md says"),
    ],
)
def test_what_is_missing_mixed_or_failed_is_refused_in_one_line(
    tuning, judge, capsys, change, message
):
    runs = tuning + on_dev({})
    change(runs)
    with pytest.raises(SystemExit):
        judge(runs)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_budget_that_was_not_run_is_refused_in_one_line(tuning, judge, capsys):
    with pytest.raises(SystemExit):
        judge(tuning + on_dev({}), "--budget", "6,144")
    assert "no run of the protocol has --budget 6144" in capsys.readouterr().err.splitlines()[-1]
