"""Draw a metric against the budget, a line for each method, from finished runs, as SVG.

    python -m extras.figure results.jsonl accuracy.svg --task TREC --where lr=0.003

Runs with the same values of the flags in --by are one line; a point is the mean of its seeds, and
the band is the 95 % interval of that mean. Runs without a budget (head, full) are a dashed level,
whatever learning rate --where gives. Bands may overlap although a paired difference is clear:
extras.evidence prints those.
"""

import argparse
import math
import statistics

from data import InputError
from extras.evidence import choose
from extras.files import write
from extras.flags import command
from extras.forest import LETTER, STEPS, opening, segment, text
from extras.intervals import mean_and_half_width
from extras.results import read_runs, select

COLOURS = ("#007a5a", "#d55e00", "#696969", "#0072b2", "#aa3377", "#8a6d00", "#000000")
LEFT, RIGHT, TOP, BOTTOM = 60, 540, 56, 356  # edges of the plot, in pixels
INSET = 20  # pixels from an edge to the smallest or largest budget
ROW = 16  # the height of a label, in pixels


def choose_runs(runs, task, where):
    """Return the runs of a task that meet the conditions, as extras.evidence.choose does.

    A learning rate in `where` is the adapters': it leaves out no head or full. Raises InputError.
    """
    rates = [text.removeprefix("lr=") for text in where if text.startswith("lr=")]
    runs = choose(runs, task, [text for text in where if not text.startswith("lr=")])
    with_budget = [run for run in runs if "budget" in run.flags]
    others = [run for run in runs if "budget" not in run.flags]
    if rates and with_budget:
        with_budget = select(with_budget, "lr", rates)
    return with_budget + others


def lines_of(runs, by):
    """Return {name of a line: {budget: [run of each seed]}}; the budget is None if a run has none.

    A line is named by its values of the flags in `by`. Failed runs are left out. Raises InputError
    if the runs of a point do not differ in their seed alone.
    """
    by = [flag.replace("-", "_") for flag in by]
    lines = {}
    for run in runs:
        if run.score is None:
            continue
        name = " ".join(run.flags[flag] for flag in by if flag in run.flags)
        budget = run.flags.get("budget")
        if budget is not None and not (budget.isdigit() and int(budget) > 0):
            raise InputError(f"budget {budget}: want a number of parameters above 0")
        point = lines.setdefault(name, {}).setdefault(int(budget) if budget else None, [])
        for other in point:
            check_seeds(run, other, f"{name}, budget {budget}")
        point.append(run)
    return lines


def check_seeds(run, other, point):
    """Raise InputError if two runs of a point have the same seed, or differ in a flag."""
    advice = "choose with --where, or add a flag to --by"
    if run.seed == other.seed:
        raise InputError(f"{point}: two runs have seed {run.seed}: {advice}")
    for flag in run.flags | other.flags:
        if run.flags.get(flag) != other.flags.get(flag):
            raise InputError(f"{point}: runs differ in {flag}: {advice}")


def chosen(lines, wanted):
    """Return the wanted lines under their new names. wanted: ["name" or "name=new name", ...]."""
    if not wanted:
        return lines
    renamed = {}
    for line in wanted:
        name, _, new_name = line.partition("=")
        if name not in lines:
            raise InputError(f"no line is called {name!r}; there are: {', '.join(lines)}")
        if (new_name or name) in renamed:
            raise InputError(f"two lines are called {new_name or name!r}: give each another name")
        renamed[new_name or name] = lines[name]
    return renamed


def points(line):
    """Return [(budget, mean, half the width of its interval)], smallest budget first.

    The half width is 0 for one seed, which has no interval, and without a budget.
    """
    if None in line:
        if len(line) > 1:
            raise InputError("a line has runs with and without a budget: add a flag to --by")
        return [(None, statistics.mean(run.score for run in line[None]), 0)]
    means = []
    for budget, runs in sorted(line.items()):
        mean, half = mean_and_half_width([run.score for run in runs])
        means.append((budget, mean, half if len(runs) > 1 else 0))
    return means


class Axes:
    """Where a budget, on a log scale, and a score are in the picture."""

    def __init__(self, points):
        """points: those of all lines."""
        self.budgets = sorted({budget for budget, _, _ in points if budget})
        if not self.budgets:
            raise InputError("no run that ended has a budget: there is nothing to draw")
        low = min(mean - half for _, mean, half in points)
        high = max(mean + half for _, mean, half in points)
        self.step = next((step for step in STEPS if 10 * step >= high - low), 100)
        self.lowest = math.floor(low / self.step)  # in steps
        self.highest = max(math.ceil(high / self.step), self.lowest + 1)

    def x(self, budget):
        first, last = self.budgets[0], self.budgets[-1]
        share = math.log(budget / first) / math.log(last / first) if last > first else 0.5
        return LEFT + INSET + share * (RIGHT - LEFT - 2 * INSET)

    def y(self, score):
        share = (score / self.step - self.lowest) / (self.highest - self.lowest)
        return BOTTOM - share * (BOTTOM - TOP)

    def draw(self):
        marks = []
        for number in range(self.lowest, self.highest + 1):
            score = number * self.step
            y = self.y(score)
            marks.append(segment(LEFT, y, RIGHT, y, "#dddddd", 1))
            marks.append(text(LEFT - 8, y + 4, f"{score:g}", 'text-anchor="end"'))
        for budget in self.budgets:
            x = self.x(budget)
            marks.append(text(x, BOTTOM + 18, f"{budget:,}", 'text-anchor="middle"'))
        return marks


def band(axes, means, colour):
    """Return the area between the ends of a line's intervals; for one budget, a bar."""
    if len(means) == 1:
        (budget, mean, half) = means[0]
        x = axes.x(budget)
        return segment(x, axes.y(mean - half), x, axes.y(mean + half), colour, 2)
    corners = [(budget, mean + half) for budget, mean, half in means]
    corners += [(budget, mean - half) for budget, mean, half in reversed(means)]
    path = " ".join(f"{axes.x(budget):.1f},{axes.y(score):.1f}" for budget, score in corners)
    return f'<polygon points="{path}" fill="{colour}" fill-opacity="0.12"/>'


def curve(axes, means, colour):
    """Return the marks of a line's means, joined."""
    places = [(axes.x(budget), axes.y(mean)) for budget, mean, _ in means]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    return marks


def level(axes, mean, colour):
    """Return a dashed line for runs without a budget."""
    y = axes.y(mean)
    more = 'stroke-width="1.5" stroke-dasharray="6 4"'
    return f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="{colour}" {more}/>'


def labels(ends):
    """Return the names of the lines beside their ends, apart. ends: [(y, name, colour)]."""
    marks = []
    lowest = -math.inf
    for y, name, colour in sorted(ends):
        y = max(y, lowest + ROW)
        marks.append(text(RIGHT + 6, y + 4, name, f'fill="{colour}"'))
        lowest = y
    return marks


def draw(title, lines):
    """Return the picture as SVG. lines: see `lines_of`. Raises InputError."""
    if len(lines) > len(COLOURS):
        raise InputError(f"{len(lines)} lines: choose at most {len(COLOURS)} with --lines")
    means = {name: points(line) for name, line in lines.items()}
    axes = Axes([point for of_line in means.values() for point in of_line])
    numbers = {len(runs) for line in lines.values() for runs in line.values()}
    seeds = " or ".join(map(str, sorted(numbers)))
    title = f"{title}: mean and 95 % interval over {seeds} seeds"
    beside = LETTER * max(map(len, lines))
    width = max(RIGHT + beside, 32 + LETTER * len(title))
    marks = [
        *opening(0, width, 410, title),
        text(16, 42, "the metric on dev, times 100"),
        text((LEFT + RIGHT) / 2, 398, "adapter parameters", 'text-anchor="middle"'),
        *axes.draw(),
    ]
    bands, curves, ends = [], [], []
    for number, (name, of_line) in enumerate(means.items()):
        colour = COLOURS[number]
        if of_line[0][0] is None:
            curves.append(level(axes, of_line[0][1], colour))
        else:
            bands.append(band(axes, of_line, colour))
            curves += curve(axes, of_line, colour)
        ends.append((axes.y(of_line[-1][1]), name, colour))
    return "\n".join([*marks, *bands, *curves, *labels(ends), "</svg>", ""])


@command
def main(argv=None):
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="extras.figure", description=about)
    add = parser.add_argument
    add("file", help="FILE.jsonl or FILE.jsonl.gz")
    add("svg", help="the picture to write")
    add("--task", required=True)
    add("--where", nargs="*", default=[], metavar="FLAG=VALUE",
        help="leave out runs with another value; name a flag twice to keep two values")  # fmt: skip
    add("--by", nargs="+", default=["method", "targets", "proxy", "allocator"], metavar="FLAG",
        help="flags that tell lines apart")  # fmt: skip
    add("--lines", nargs="+", metavar="NAME[=NEW NAME]", help="draw only these, in this order")
    args = parser.parse_args(argv)
    runs = choose_runs(read_runs(args.file), args.task, args.where)
    lines = chosen(lines_of(runs, args.by), args.lines)
    write(args.svg, draw(args.task, lines))


if __name__ == "__main__":
    main()
