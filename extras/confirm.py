"""Judge the confirming runs of docs/PROTOCOL.md: does a rule beat uniform LoRA and a random draw?

    python -m extras.confirm docs/protocol.jsonl.gz
    python -m extras.confirm docs/protocol.jsonl.gz --lr 0.003

Each row of a task has the learning rate that was best on held-out training examples; with --lr,
all rows have that one, which is shown and judges nothing.
"""

import argparse
import math
import statistics

from data import InputError
from extras import forest
from extras.evidence import details, interval
from extras.files import write
from extras.intervals import holm, p_value
from extras.results import gain_over, read_runs

BUDGET = "3072"
TASKS = ("TREC", "SUBJ", "SICK", "mrpc", "sst2")
SEEDS = [str(seed) for seed in range(200, 208)]
BASELINES = {  # name: the flags that tell its runs from others
    "LoRA on q and v": {"method": "lora", "targets": "q,v"},
    "random linears": {"method": "static", "proxy": "constant", "allocator": "random-linears"},
    "LoRA on v": {"method": "lora", "targets": "v"},
}
RULES = {
    "alignment, within-layer": {"proxy": "alignment", "allocator": "within-layer"},
    "alignment, greedy": {"proxy": "alignment", "allocator": "greedy"},
}
NEEDED = 3  # tasks on which a rule must beat a baseline


def chosen_lr(runs):
    """Return the learning rate with the best mean score, the smallest of equals (floats).

    A rate at which a run failed is out.
    """
    scores = {}
    for run in runs:
        score = -math.inf if run.score is None else run.score
        scores.setdefault(float(run.flags["lr"]), []).append(score)
    return max(sorted(scores), key=lambda lr: round(statistics.mean(scores[lr]), 6))


def row_of(runs, name, lr=None):
    """Return ({seed: run}, learning rate) of a row, from the runs of one task.

    lr: the rate to take; the chosen one if it is None. Raises InputError if a run is missing, was
    made twice or failed.
    """
    flags = (BASELINES | RULES)[name]
    runs = [run for run in runs if flags.items() <= run.flags.items()]
    if lr is None:
        tuning = [run for run in runs if run.flags["holdout"] != "0"]
        if not tuning:
            raise InputError(f"{name}: no runs on held-out examples")
        lr = chosen_lr(tuning)
    final = [run for run in runs if run.flags["holdout"] == "0" and float(run.flags["lr"]) == lr]
    if sorted(run.seed for run in final) != SEEDS:
        raise InputError(f"{name}, learning rate {lr:g}: want each seed of 200 to 207 once")
    for run in final:
        if run.score is None:
            raise InputError(f"{name} seed {run.seed} failed: PROTOCOL.md says how it counts")
    return {run.seed: run for run in final}, lr


def rows_of_tasks(runs, lr=None):
    """Return ({task: {name: row}}, {task: {name: learning rate}}). Raises InputError."""
    rows, rates = {}, {}
    for task in TASKS:
        wanted = {"task": task, "budget": BUDGET}
        mine = [run for run in runs if wanted.items() <= run.flags.items()]
        processors = {run.flags.get("processor", "?") for run in mine}
        if len(processors) > 1:
            raise InputError(f"{task}: runs of several processors: {', '.join(sorted(processors))}")
        rows[task], rates[task] = {}, {}
        for name in BASELINES | RULES:
            try:
                rows[task][name], rates[task][name] = row_of(mine, name, lr)
            except InputError as error:
                raise InputError(f"{task}: {error}") from None
    return rows, rates


def levels(rows, rates):
    """Return a Markdown table: the mean score of each row on each task, and its learning rate."""
    lines = [f"| | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for name in BASELINES | RULES:
        cells = []
        for task in TASKS:
            scores = [run.score for run in rows[task][name].values()]
            spread = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
            cells.append(f"{spread} ({rates[task][name]:g})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains_over(rows, baseline):
    """Return {"task, rule": Gain over the baseline}: a family of comparisons."""
    gains = {}
    for rule in RULES:
        for task in TASKS:
            gains[f"{task}, {rule}"] = gain_over(rows[task][rule], rows[task][baseline])
    return gains


def family(baseline, gains):
    """Return a Markdown table of the comparisons with a baseline."""
    head = f"| | minus {baseline} [95 %] | p | p by Holm | 95 % over examples | detectable |"
    lines = [head, "|---" * 6 + "|"]
    more = details(gains)
    for label, gain in gains.items():
        lines.append(f"| {' | '.join([label, interval(gain), *more[label]])} |")
    return "\n".join(lines)


def verdict(baseline, gains):
    """Return a line for each rule: on which tasks it beats the baseline."""
    corrected = holm([p_value(gain.differences) for gain in gains.values()])
    beaten = {rule: [] for rule in RULES}
    for (label, gain), p in zip(gains.items(), corrected, strict=True):
        task, rule = label.split(", ", 1)
        if gain.mean > 0 and p < 0.05:
            beaten[rule].append(task)
    lines = []
    for rule, tasks in beaten.items():
        passed = "passes" if len(tasks) >= NEEDED else "does not pass"
        where = f"on {', '.join(tasks)}" if tasks else "on no task"
        lines.append(f"{rule} beats {baseline} {where}: it {passed} (want {NEEDED} tasks).")
    return "\n".join(lines)


def main(argv=None):
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="extras.confirm", description=about)
    parser.add_argument("file", help="FILE.jsonl or FILE.jsonl.gz")
    parser.add_argument("--lr", type=float, help="take the runs at this rate, and judge nothing")
    parser.add_argument("--svg", metavar="PICTURE", help="draw the first family into this file")
    args = parser.parse_args(argv)
    try:
        rows, rates = rows_of_tasks(read_runs(args.file), args.lr)
        blocks = [levels(rows, rates)]
        for baseline in BASELINES:
            gains = gains_over(rows, baseline)
            blocks.append(family(baseline, gains))
            if args.lr is None:
                blocks.append(verdict(baseline, gains))
        if args.svg:
            baseline = next(iter(BASELINES))
            title = f"Confirmation at {int(BUDGET):,} parameters"
            write(args.svg, forest.draw(title, baseline, gains_over(rows, baseline)))
        print("\n\n".join(blocks))
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
