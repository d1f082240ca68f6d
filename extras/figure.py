"""Draw accuracy against budget on MRPC, from a file of finished runs, as SVG.

python -m extras.figure docs/evidence.jsonl.gz docs/accuracy.svg
"""

import argparse
import math

from data import InputError
from extras.files import write
from extras.forest import segment, text
from extras.intervals import mean_and_half_width
from extras.results import read_runs, select

COMMON = {"task": "mrpc", "holdout": "0", "lr": "0.003", "epochs": "3"}
LINES = {  # label: (colour, flags)
    "LoRA on v, no search": ("#007a5a", {"method": "lora", "targets": "v"}),
    "paper: dynamic, grad-norm": ("#d55e00", {"method": "dynamic", "proxy": "grad-norm"}),
    "random choice": ("#696969", {"method": "static", "proxy": "constant"}),
    "LoRA on q and v, no search": ("#0072b2", {"method": "lora", "targets": "q,v"}),
}
LEFT, RIGHT, TOP, BOTTOM = 60, 540, 56, 356  # edges of the plot, in pixels
LOWEST, HIGHEST = 66, 84  # edges of the plot, in percent of accuracy
FIRST = 1536  # the smallest budget, in parameters


def across(budget):
    """Return the x of a budget, in pixels, on a log axis."""
    return LEFT + 20 + 88 * math.log2(budget / FIRST)


def up(accuracy):
    """Return the y of an accuracy, in pixels."""
    return BOTTOM - (accuracy - LOWEST) / (HIGHEST - LOWEST) * (BOTTOM - TOP)


def points(runs):
    """Return [(budget, mean accuracy, half width of its 95 % interval)], smallest budget first."""
    scores = {}
    for run in runs:
        scores.setdefault(int(run.flags["budget"]), []).append(run.score)
    return [(budget, *mean_and_half_width(scores[budget])) for budget in sorted(scores)]


def axes():
    """Return a white panel, which is legible on any page, with a title and both axes."""
    title = "MRPC: accuracy against budget (mean and 95 % interval over 5 or 10 seeds)"
    marks = [
        '<rect width="750" height="410" rx="8" fill="#ffffff"/>',
        text(LEFT, 28, title, 'font-weight="bold"'),
        text((LEFT + RIGHT) / 2, 398, "adapter parameters", 'text-anchor="middle"'),
        text(LEFT, 47, "accuracy on dev, %"),
    ]
    for accuracy in range(LOWEST, HIGHEST + 1, 2):
        y = up(accuracy)
        marks.append(segment(LEFT, y, RIGHT, y, "#dddddd", 1))
        marks.append(text(LEFT - 8, y + 4, accuracy, 'text-anchor="end"'))
    for budget in (FIRST, 3072, 6144, 12_288, 24_576, 49_152):
        marks.append(text(across(budget), BOTTOM + 18, f"{budget:,}", 'text-anchor="middle"'))
    return marks


def curve(label, colour, runs, shift):
    """Return the marks of one method, moved by `shift` pixels so that intervals stay apart."""
    marks = []
    path = []
    for budget, mean, half in points(runs):
        x = across(budget) + shift
        y = up(mean)
        path.append(f"{x:.1f},{y:.1f}")
        marks.append(segment(x, up(mean - half), x, up(mean + half), colour, 1.5))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    path = " ".join(path)
    marks.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    marks.append(text(RIGHT + 6, y + 4, label, f'fill="{colour}"'))
    return marks


def draw(runs):
    """Return the picture as SVG. Raises InputError if a method has no runs."""
    style = 'font-family="sans-serif" font-size="13" fill="#222222"'
    marks = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 750 410" {style}>', *axes()]
    for number, (label, (colour, flags)) in enumerate(LINES.items()):
        chosen = runs
        for flag, value in {**COMMON, **flags}.items():
            chosen = select(chosen, flag, value)
        marks += curve(label, colour, chosen, 5 * number - 7.5)
    return "\n".join([*marks, "</svg>", ""])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="extras.figure", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="FILE.jsonl or FILE.jsonl.gz")
    parser.add_argument("svg", help="the picture to write")
    args = parser.parse_args(argv)
    try:
        write(args.svg, draw(read_runs(args.file)))
    except (InputError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
