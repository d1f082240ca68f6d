"""Draw paired differences to one method, with their 95 % intervals, as SVG: a forest plot.

    python -m extras.evidence docs/neighbours.jsonl.gz --task TREC --budget 6144 --svg forest.svg

A row is a row of the table that extras.evidence prints. A mark right of the line at 0 is better
than the baseline; an interval that crosses the line does not say which is better.
"""

import html
import math

REACH = 200  # pixels from the line at 0, which is x = 0, to either edge of the plot
LETTER = 7.5  # about the width of a letter, in pixels: the longest text makes the picture wide
TOP, ROW = 70, 26  # the first row, and the height of one
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # between two ticks, in points


def text(x, y, words, more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{html.escape(str(words))}</text>'


def segment(x1, y1, x2, y2, colour, width):
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"/>'


def opening(left, width, height, title):
    """Return the first marks of a picture: a white panel, legible on any page, and its title."""
    style = 'font-family="sans-serif" font-size="13" fill="#222222"'
    box = f'viewBox="{left} 0 {width:.0f} {height}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style}>',
        f'<rect x="{left}" width="{width:.0f}" height="{height}" rx="8" fill="#ffffff"/>',
        text(left + 16, 24, title, 'font-weight="bold"'),
    ]


def scale_of(gains):
    """Return (the largest number on the axis, the step between its ticks), in points."""
    widest = max(abs(gain.mean) + gain.half for gain in gains.values())
    step = next((step for step in STEPS if 4 * step >= widest), 100)  # 4 ticks on a side at most
    return step * math.ceil(widest / step) or step, step


def axis(limit, step, bottom):
    """Return vertical lines with their numbers, the one at 0 darker."""
    marks = []
    for i in range(-round(limit / step), round(limit / step) + 1):
        x = i * step / limit * REACH
        colour = "#444444" if i == 0 else "#dddddd"
        marks.append(segment(x, TOP - 14, x, bottom, colour, 1))
        marks.append(text(x, bottom + 18, f"{i * step:+g}" if i else "0", 'text-anchor="middle"'))
    return marks


def draw(title, baseline, gains):
    """Return the picture as SVG. gains: {label: extras.results.Gain}."""
    limit, step = scale_of(gains)
    unit = REACH / limit  # pixels for a point
    labels = [f"{label}, n = {len(gain.differences)}" for label, gain in gains.items()]
    subtitle = f"minus {baseline}: mean and uncorrected 95 % interval, in points"
    beside = LETTER * max(map(len, labels))  # pixels left of the plot
    over = LETTER * max(len(title), len(subtitle)) - 2 * REACH  # pixels that the title needs more
    left = -REACH - 30 - max(beside, over)
    width = REACH + 30 - left
    bottom = TOP + ROW * len(gains)
    marks = [
        *opening(left, width, bottom + 34, title),
        text(left + 16, 42, subtitle),
        *axis(limit, step, bottom),
    ]
    for number, gain in enumerate(gains.values()):
        y = TOP + ROW * number + 6
        low, high = unit * (gain.mean - gain.half), unit * (gain.mean + gain.half)
        marks.append(text(-REACH - 10, y + 4, labels[number], 'text-anchor="end"'))
        marks.append(segment(low, y, high, y, "#0072b2", 2))
        marks.append(f'<circle cx="{unit * gain.mean:.1f}" cy="{y}" r="4" fill="#0072b2"/>')
    return "\n".join([*marks, "</svg>", ""])
