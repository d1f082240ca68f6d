"""Print a table from a file of finished runs, one JSON object a line, plain or gzipped.

    python -m extras.evidence docs/evidence-v0.1.jsonl.gz --task mrpc --budget 6144 --where lr=0.003

The file may be one of extras.compare. A row of the table is for runs that differ in their seed
only. Its label names the flags that differ between the rows.
"""

import argparse
import statistics

from data import InputError
from extras import forest
from extras.files import write
from extras.flags import command
from extras.intervals import detectable, holm, over_examples, p_value
from extras.results import gain_over, read_runs, select

# Usual values of flags: a label does not show them.
USUAL = {
    "allocator": "greedy",
    "adapter": "lora",
    "granularity": "module",
    "probe_batches": "8",
    "warmup_steps": "0",
}


def choose(runs, task, where):
    """Return the runs of a task that meet the conditions, ["flag=value", ...].

    A flag that comes twice may have either value. Unless a condition names holdout, runs with a
    held-out part are left out: they served to choose a flag's value. Raises InputError.
    """
    wanted = {"task": [task]}
    for condition in where:
        flag, equals, text = condition.partition("=")
        if not equals:
            raise InputError(f"--where {condition}: want FLAG=VALUE, such as lr=0.003")
        wanted.setdefault(flag.replace("-", "_"), []).append(text)
    wanted.setdefault("holdout", ["0"])
    for flag, texts in wanted.items():
        runs = select(runs, flag, texts)
    return runs


def group(runs):
    """Return {label: row}, in the order of the file; a row is {seed: run}.

    A label shows a flag if it has several values, or if some runs of a method have it and some not.
    A usual value is not shown. A run that lacks the flag has the same label as one with the usual
    value. Raises InputError for two runs with the same flags and seed.
    """
    values = {}  # {flag: its values}
    common = {}  # {method: the flags that all its runs have}
    for run in runs:
        method = run.flags["method"]
        common[method] = common.get(method, run.flags.keys()) & run.flags.keys()
        for flag, text in run.flags.items():
            values.setdefault(flag, set()).add(text)
    rows = {}
    for run in runs:
        method = run.flags["method"]
        label = method
        for flag, text in sorted(run.flags.items()):
            only_some_have_it = flag not in common[method]
            is_shown = only_some_have_it or len(values[flag]) > 1
            if flag != "method" and is_shown and text != USUAL.get(flag):
                label += f" {flag}={text}"
        row = rows.setdefault(label, {})
        if run.seed in row:
            raise InputError(f"two runs are {label} seed {run.seed}: choose with --where")
        row[run.seed] = run
    return rows


def lora_first(rows):
    """Return the rows in the order of the table: lora first, other kinds of adapters last."""
    labels = sorted(rows, key=lambda label: (label.split()[0] != "lora", "adapter=" in label))
    return {label: rows[label] for label in labels}


def gains_over(rows, baseline):
    """Return {label: Gain} of the rows that have one; the baseline, a label, has none.

    Runs with other data, metric or kind of processor than the baseline's are not compared with it.
    Raises InputError if there is no such label.
    """
    if baseline not in rows:
        raise InputError(f"--baseline {baseline!r} is not a row; leave it out to see the rows")
    gains = {}
    for label, row in rows.items():
        gain = gain_over(row, rows[baseline])
        if gain and label != baseline:
            gains[label] = gain
    return gains


def mean_and_sd(scores):
    """Return "mean ± standard deviation", or the score if there is one."""
    mean = f"{statistics.mean(scores):.2f}"
    return mean if len(scores) == 1 else f"{mean} ± {statistics.stdev(scores):.2f}"


def level_cells(row):
    """Return four cells: the number of runs, their score, parameters, and ever trained."""
    done = [run for run in row.values() if run.score is not None]
    n = str(len(done)) if len(done) == len(row) else f"{len(done)} of {len(row)}"
    if not done:
        return [n, "", "", ""]
    mean = mean_and_sd([run.score for run in done])
    parameters = max(run.parameters for run in done)
    ever_trained = max(run.ever_trained for run in done)
    return [n, mean, f"{parameters:,}", f"{ever_trained:,}"]


def gain_cell(gain):
    """Return a gain as a cell of the table."""
    low, high = gain.mean - gain.half, gain.mean + gain.half
    return f"{gain.mean:+.2f} [{low:+.2f}, {high:+.2f}], n = {len(gain.differences)}"


def p_by_holm(gains):
    """Return {label: p}, corrected for the number of gains by Holm's method."""
    p_values = [p_value(gain.differences) for gain in gains.values()]
    return dict(zip(gains, holm(p_values), strict=True))


def details(gains):
    """Return {label: four cells}: p, p corrected for all gains, over examples, detectable."""
    corrected = p_by_holm(gains)
    cells = {}
    for label, gain in gains.items():
        p = p_value(gain.differences)
        over = ""
        if gain.by_example is not None:
            low, high = over_examples(gain.by_example)
            over = f"[{low:+.2f}, {high:+.2f}]"
        needed = detectable(gain.differences)
        cells[label] = [p_cell(p), p_cell(corrected[label]), over, f"{needed:.2f}"]
    return cells


def p_cell(p):
    """Return p as a cell of the table."""
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def table(rows, baseline, has_details=False):
    """Return the rows as a Markdown table; baseline: the label of the row to compare with."""
    gains = gains_over(rows, baseline)
    head = ["method", "n", "mean ± sd", "parameters", "ever trained", f"minus `{baseline}` [95 %]"]
    if has_details:
        head += ["p", "p by Holm", "95 % over examples", "detectable"]
        more = details(gains)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, row in rows.items():
        cells = [f"`{label}`", *level_cells(row)]
        cells.append(gain_cell(gains[label]) if label in gains else "")
        if has_details:
            cells += more.get(label, [""] * 4)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(title, rows, baseline):
    """Return the gains of `table` as a forest plot in SVG. Raises InputError if there are none."""
    gains = gains_over(rows, baseline)
    if not gains:
        raise InputError(f"no row shares two seeds with {baseline!r}: there is nothing to draw")
    return forest.draw(title, baseline, gains)


@command
def main(argv=None):
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="extras.evidence", description=about)
    add = parser.add_argument
    add("file", help="FILE.jsonl or FILE.jsonl.gz")
    add("--task", required=True)
    add("--budget", help="adapter parameters that a run may use")
    add("--where", nargs="*", default=[], metavar="FLAG=VALUE",
        help="leave out runs with another value; name a flag twice to keep two values")  # fmt: skip
    add("--baseline", metavar="LABEL", help="row to compare with (the first)")
    add("--details", action="store_true",
        help="add p, p corrected by Holm's method for all rows, the interval over examples, and "
        "what true difference would be detected in four cases of five")  # fmt: skip
    add("--svg", metavar="PICTURE", help="draw the differences into this file too")
    args = parser.parse_args(argv)
    where = args.where
    title = [args.task, *where]
    if args.budget:
        budget = args.budget.replace(",", "")
        where = [f"budget={budget}", *where]
        title.insert(1, f"a budget of {budget} parameters")
    runs = choose(read_runs(args.file), args.task, where)
    rows = lora_first(group(runs))
    baseline = args.baseline or next(iter(rows))
    if args.svg:
        write(args.svg, picture(", ".join(title), rows, baseline))
    print(table(rows, baseline, args.details))


if __name__ == "__main__":
    main()
