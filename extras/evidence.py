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
from extras.files import write

# Flags that a label leaves out at these values: they are what the paper does.
USUAL = {
    "allocator": "greedy",
    "adapter": "lora",
    "granularity": "module",
    "probe_batches": "8",
    "warmup_steps": "0",
}

Run = collections.namedtuple("Run", "flags seed score parameters ever")  # score: metric times 100


def student_t(p, freedom):
    """Return the p-quantile of Student's t, 0.5 <= p < 1, with `freedom` degrees of freedom."""
    # With t = sqrt(freedom) tan(u) the density is proportional to cos(u)^(freedom - 1).
    u = np.linspace(0, math.pi / 2, 200_001)
    middles = (u[1:] + u[:-1]) / 2
    area = np.cumsum(np.cos(middles) ** (freedom - 1))
    quantile = np.interp((2 * p - 1) * area[-1], area, u[1:])
    return math.sqrt(freedom) * math.tan(quantile)


def paired_difference(differences):
    """Return (mean, half width of its 95 % interval), infinite where there is one difference."""
    mean = statistics.mean(differences)
    n = len(differences)
    if n == 1:
        return mean, math.inf
    error = statistics.stdev(differences) / math.sqrt(n)
    return mean, error * student_t(0.975, n - 1)


def as_text(value):
    """Return the value of a flag as labels show it and --where takes it: q,v or 0.003."""
    if isinstance(value, list):
        return ",".join(value)
    if value is None or isinstance(value, float):
        return f"{value or 0:g}"  # None is a flag that is off, as 0 is
    return str(value)


def read_runs(path):
    """Return the runs in a file. Raises InputError for a line that is no run."""
    opener = gzip.open if path.endswith(".gz") else open
    runs = []
    lines = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for lines, line in enumerate(file, 1):
                record = json.loads(line)  # {"flags": {name: value}, "result": {name: value}}
                result = record["result"]
                if "failed" in result:
                    reason = f"a run that failed, {result['failed']}; left out"
                    warnings.warn(f"{path}, line {lines}: {reason}", stacklevel=2)
                    continue
                flags = {flag: as_text(value) for flag, value in record["flags"].items()}
                seed = flags.pop("seed")
                score = 100 * result["last"]  # after the last epoch
                ever = result["params_ever_trained"]
                runs.append(Run(flags, seed, score, result["params_active"], ever))
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}, line {max(lines, 1)}, is no finished run: {error}") from None
    return runs


def select(runs, flag, text=""):
    """Return the runs with this flag and those that lack it. Raises InputError if none has it."""
    chosen = [run for run in runs if run.flags.get(flag, text) == text]
    if not any(flag in run.flags for run in chosen):
        raise InputError(f"no run has {flag}={text} and all flags before it")
    return chosen


def group(runs):
    """Return {label: {seed: run}}, in the order of the file."""
    values = {}
    for run in runs:
        for flag, text in run.flags.items():
            values.setdefault(flag, set()).add(text)
    groups = {}
    for run in runs:
        label = run.flags["method"]
        for flag, text in sorted(run.flags.items()):
            differs = flag != "method" and len(values[flag]) > 1
            if differs and text != USUAL.get(flag):
                label += f" {flag}={text}"
        groups.setdefault(label, {})[run.seed] = run
    return groups


def gain_over(baseline, seeds):
    """Return (mean difference, half width of its interval, n) over shared seeds, None for < 2."""
    shared = seeds.keys() & baseline.keys()
    if len(shared) < 2 or seeds is baseline:
        return None
    differences = [seeds[seed].score - baseline[seed].score for seed in shared]
    return *paired_difference(differences), len(shared)


def row(label, seeds, baseline):
    """Return a line of the table, with the difference over the seeds that both groups have."""
    scores = [run.score for run in seeds.values()]
    level = f"{statistics.mean(scores):.2f}"
    if len(scores) > 1:
        level += f" ± {statistics.stdev(scores):.2f}"
    parameters = max(run.parameters for run in seeds.values())
    ever = max(run.ever for run in seeds.values())
    told = ""
    if gain := gain_over(baseline, seeds):
        mean, half, n = gain
        told = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}], n = {n}"
    return f"| `{label}` | {len(scores)} | {level} | {parameters:,} | {ever:,} | {told} |"


def in_order(groups, baseline=None):
    """Return the labels, lora first, and the one to compare with. Raises InputError if unknown."""
    labels = sorted(groups, key=lambda label: not label.startswith("lora"))
    baseline = baseline or labels[0]
    if baseline not in groups:
        raise InputError(f"--baseline {baseline!r} is not a row; leave it out to see the rows")
    return labels, baseline


def table(groups, baseline=None):
    """Return a Markdown table, lora rows first. Raises InputError if `baseline` is not a label."""
    labels, baseline = in_order(groups, baseline)
    head = "method | n | mean ± sd | parameters | ever trained"
    lines = [f"| {head} | minus `{baseline}` [95 %] |", "|---|---|---|---|---|---|"]
    for label in labels:
        lines.append(row(label, groups[label], groups[baseline]))
    return "\n".join(lines)


def picture(title, groups, baseline=None):
    """Return the last column of `table` as a forest plot in SVG. Raises InputError."""
    from extras import forest

    labels, baseline = in_order(groups, baseline)
    gains = {label: gain_over(groups[baseline], groups[label]) for label in labels}
    gains = {label: gain for label, gain in gains.items() if gain}
    return forest.draw(title, baseline, gains)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="evidence.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="FILE.jsonl or FILE.jsonl.gz")
    parser.add_argument("--task", required=True)
    parser.add_argument("--budget", help="adapter parameters that a run may use")
    parser.add_argument("--where", nargs="*", default=[], metavar="FLAG=VALUE", help="other flags")
    parser.add_argument("--baseline", metavar="LABEL", help="row to compare with; else a lora row")
    parser.add_argument("--svg", metavar="PICTURE", help="draw the differences into this file too")
    args = parser.parse_args(argv)
    # Runs with a held-out part chose a learning rate or a placement. They are no results.
    pairs = ["holdout=0", f"task={args.task}", *args.where]
    if args.budget:
        pairs.append(f"budget={args.budget}")
    try:
        runs = read_runs(args.file)
        for pair in pairs:
            runs = select(runs, *pair.split("=", 1))
        groups = group(runs)
        print(table(groups, args.baseline))
        if args.svg:
            title = f"{args.task}, {args.budget} parameters" if args.budget else args.task
            write(args.svg, picture(title, groups, args.baseline))
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
