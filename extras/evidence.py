"""Print a table from a file of finished runs, one JSON object a line, plain or gzipped.

    python -m extras.evidence docs/evidence.jsonl.gz --task mrpc --budget 6144 --where lr=0.003

The file may be one of extras.compare. A row of the table is for runs that differ in their seed
only. Its label names the flags that differ between the rows.
"""

import argparse
import collections
import gzip
import json
import math
import statistics
import warnings
import zlib

import numpy as np

from data import InputError
from extras import forest
from extras.files import write
from extras.intervals import detectable, holm, mean_and_half_width, over_examples, p_value

# Usual values of flags: a label does not show them.
USUAL = {
    "allocator": "greedy",
    "adapter": "lora",
    "granularity": "module",
    "probe_batches": "8",
    "warmup_steps": "0",
}

# score: the metric after the last epoch, times 100. None: the run failed. right: whether it was
# right, for every example, or None where the run did not keep that.
Run = collections.namedtuple(
    "Run", "flags seed score parameters ever_trained right", defaults=[None]
)


def as_text(value):
    """Return the value of a flag as labels show it: q,v or 0.003."""
    if isinstance(value, list):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_runs(path):
    """Return the runs in a file, with the flags that were set.

    A line that was written in part is left out, with a warning. Raises InputError for anything
    else that is no run, or if there are no runs.
    """
    opener = gzip.open if path.endswith(".gz") else open
    runs = []
    number = 1
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    warnings.warn(f"{path}, line {number}, is not whole: left out", stacklevel=2)
                    continue
                runs.append(as_run(record))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}, is no finished run: {error!r}") from None
    if not runs:
        raise InputError(f"{path} holds no finished run")
    return runs


def as_run(record):
    """Return the Run of {"flags": {name: value}, "result": {name: value}}."""
    set_flags = {flag: value for flag, value in record["flags"].items() if value is not None}
    flags = {flag: as_text(value) for flag, value in set_flags.items()}
    seed = flags.pop("seed")
    flags.setdefault("holdout", "0")
    if "processor" in record:
        flags["processor"] = str(record["processor"])
    flags["method"], flags["task"]  # every run has them
    result = record["result"]
    if "failed" in result:
        return Run(flags, seed, None, 0, 0)
    score = 100 * float(result["last"])
    if not math.isfinite(score):
        raise ValueError(f"the metric is {score}")
    sizes = int(result["params_active"]), int(result["params_ever_trained"])
    return Run(flags, seed, score, *sizes, which_are_right(result.get("dev", {})))


def which_are_right(dev):
    """Return the bits that a run kept of its last evaluation (n,), as 0 and 1; None without."""
    if "right" not in dev or not dev.get("accuracy"):
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(dev["right"]), np.uint8))
    n = round(bits.sum() / dev["accuracy"])  # the last byte is filled up with zeros
    return bits[:n]


def select(runs, flag, text):
    """Return the runs with this flag and those that lack it. Raises InputError if none has it."""
    found = sorted({run.flags[flag] for run in runs if flag in run.flags})
    if text not in found:
        there = f"there are {', '.join(found)}" if found else "none has this flag"
        raise InputError(f"no run has {flag}={text}; with the flags before it {there}")
    return [run for run in runs if run.flags.get(flag, text) == text]


def group(runs):
    """Return {label: {seed: run}}, in the order of the file. Raises InputError for a run twice.

    A label shows a flag if it has several values, or if some runs of a method have it and some not.
    """
    values = {}  # of all runs that have the flag
    number_of = collections.Counter()  # runs of a method, and those that have a flag
    for run in runs:
        method = run.flags["method"]
        number_of[method] += 1
        for flag, text in run.flags.items():
            values.setdefault(flag, set()).add(text)
            number_of[method, flag] += 1
    groups = {}
    for run in runs:
        method = run.flags["method"]
        label = method
        for flag, text in sorted(run.flags.items()):
            differs = len(values[flag]) > 1 or number_of[method, flag] < number_of[method]
            if flag != "method" and differs and text != USUAL.get(flag):
                label += f" {flag}={text}"
        seeds = groups.setdefault(label, {})
        if run.seed in seeds:
            raise InputError(f"two runs are {label} seed {run.seed}: choose with --where")
        seeds[run.seed] = run
    return groups


def ended(runs):
    """Return {seed: score} of the runs of a row that did not fail."""
    return {seed: run.score for seed, run in runs.items() if run.score is not None}


def differences(runs, baseline):
    """Return {seed: difference of the scores}, for the seeds that ended in both rows."""
    scores, others = ended(runs), ended(baseline)
    return {seed: scores[seed] - others[seed] for seed in scores if seed in others}


def gain_over(runs, baseline):
    """Return (mean difference, half width of its interval, number of pairs).

    None for the baseline itself, or if there are fewer than two pairs.
    """
    pairs = differences(runs, baseline)
    if len(pairs) < 2 or runs is baseline:
        return None
    return *mean_and_half_width(pairs.values()), len(pairs)


def details(runs, baseline):
    """Return two cells: an interval over examples (of accuracy), and what would have shown."""
    pairs = differences(runs, baseline)
    bits = [(runs[seed].right, baseline[seed].right) for seed in pairs]
    interval = ""
    if all(right is not None and other is not None for right, other in bits):
        by_example = np.mean([1.0 * right - other for right, other in bits], axis=0)  # over seeds
        low, high = over_examples(by_example)
        interval = f"[{100 * low:+.2f}, {100 * high:+.2f}]"
    return [interval, f"{detectable(pairs.values()):.2f}"]


def all_details(groups, baseline):
    """Return {label: four cells: p, p corrected for the rows of the table, and `details`}."""
    compared = [label for label in groups if gain_over(groups[label], groups[baseline])]
    p_values = []
    for label in compared:
        pairs = differences(groups[label], groups[baseline])
        p_values.append(p_value(list(pairs.values())))
    cells = dict.fromkeys(groups, [""] * 4)
    for label, p, corrected in zip(compared, p_values, holm(p_values), strict=True):
        more = details(groups[label], groups[baseline])
        cells[label] = [f"{p:.3f}", f"{corrected:.3f}", *more]
    return cells


def row(label, runs, baseline):
    """Return cells of the table: level, parameters, and the difference to the baseline."""
    scores = list(ended(runs).values())
    n = str(len(scores)) if len(scores) == len(runs) else f"{len(scores)} of {len(runs)}"
    level = f"{statistics.mean(scores):.2f}" if scores else ""
    if len(scores) > 1:
        level += f" ± {statistics.stdev(scores):.2f}"
    parameters = max(run.parameters for run in runs.values())
    ever = max(run.ever_trained for run in runs.values())
    told = ""
    if gain := gain_over(runs, baseline):
        mean, half, n_pairs = gain
        told = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], n = {n_pairs}"
    return [f"`{label}`", n, level, f"{parameters:,}", f"{ever:,}", told]


def in_order(groups, baseline=None):
    """Return the labels, LoRA first, and the one to compare with: the first, if none is given.

    Raises InputError if `baseline` is not a label.
    """
    labels = sorted(groups, key=lambda label: (not label.startswith("lora"), "adapter=" in label))
    baseline = baseline or labels[0]
    if baseline not in groups:
        raise InputError(f"--baseline {baseline!r} is not a row; leave it out to see the rows")
    return labels, baseline


def table(groups, baseline=None, has_details=False):
    """Return a Markdown table, LoRA first. Raises InputError if `baseline` is not a label."""
    labels, baseline = in_order(groups, baseline)
    head = ["method", "n", "mean ± sd", "parameters", "ever trained", f"minus `{baseline}` [95 %]"]
    if has_details:
        head += ["p", "Holm", "over examples [95 %]", "would have shown"]
        more = all_details(groups, baseline)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label in labels:
        cells = row(label, groups[label], groups[baseline])
        if has_details:
            cells += more[label]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(title, groups, baseline=None):
    """Return the last column of `table` as a forest plot in SVG.

    Raises InputError if `baseline` is not a label, or if there is no difference to draw.
    """
    labels, baseline = in_order(groups, baseline)
    gains = {label: gain_over(groups[label], groups[baseline]) for label in labels}
    gains = {label: gain for label, gain in gains.items() if gain}
    if not gains:
        raise InputError(f"no row shares two seeds with {baseline!r}: there is nothing to draw")
    return forest.draw(title, baseline, gains)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evidence.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="FILE.jsonl or FILE.jsonl.gz")
    parser.add_argument("--task", required=True)
    parser.add_argument("--budget", help="adapter parameters that a run may use")
    parser.add_argument(
        "--where",
        nargs="*",
        default=[],
        metavar="FLAG=VALUE",
        help="keep runs with this, or without the flag",
    )
    parser.add_argument("--baseline", metavar="LABEL", help="row to compare with (the first)")
    more = "add p, p by Holm's method for all rows, the interval over examples, and what true "
    parser.add_argument("--details", action="store_true", help=more + "difference would have shown")
    parser.add_argument("--svg", metavar="PICTURE", help="draw the differences into this file too")
    args = parser.parse_args(argv)
    for pair in args.where:
        if "=" not in pair:
            parser.error(f"--where {pair}: want FLAG=VALUE, such as lr=0.003")
    title = [args.task]
    pairs = [f"task={args.task}"]
    if args.budget:
        budget = args.budget.replace(",", "")
        pairs.append(f"budget={budget}")
        title.append(f"a budget of {budget} parameters")
    if not any(pair.startswith("holdout=") for pair in args.where):
        pairs.append("holdout=0")  # runs with a held-out part served to choose a flag's value
    try:
        runs = read_runs(args.file)
        for pair in pairs + args.where:
            runs = select(runs, *pair.split("=", 1))
        groups = group(runs)
        if args.svg:
            write(args.svg, picture(", ".join(title + args.where), groups, args.baseline))
        print(table(groups, args.baseline, args.details))
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
