"""Show an allocation as text, and what the search of a run did, as text or as a picture.

    python -m extras.show runs/a --svg search.svg

Everywhere here, costs is {module name: [parameters that its first rank costs, its second, ...]},
and ranks is an allocation {module name: rank}. A module's name is its layer, a dot and its type.
"""

import argparse
import html
import itertools
import json
import os
import re

from data import InputError
from extras.files import write
from extras.flags import command
from extras.forest import text
from heterolora import SHORTCUTS

LEFT, WIDTH = 110, 600  # of the picture: where the allocations begin, and how wide they are
TOP = 26  # the height of the title


def layout(costs):
    """Return (layers, types of modules, {(layer, type): module name}); shortcut types come last."""
    names = {}
    for name in costs:
        layer, _, kind = name.rpartition(".")
        names[layer, kind] = name
    layers = dict.fromkeys(layer for layer, _ in names)
    kinds = dict.fromkeys(kind for _, kind in names)
    return list(layers), sorted(kinds, key=lambda kind: kind in SHORTCUTS), names


def prices(costs, ranks):
    """Return ({layer: its parameters in an allocation}, {type of module: its parameters})."""
    layers, kinds, names = layout(costs)
    by_layer = dict.fromkeys(layers, 0)
    by_kind = dict.fromkeys(kinds, 0)
    for (layer, kind), name in names.items():
        price = sum(costs[name][: ranks.get(name, 0)])
        by_layer[layer] += price
        by_kind[kind] += price
    return by_layer, by_kind


def cells(costs, cell):
    """Return a table: layers down, types of modules across, and cell(module name) in it."""
    layers, kinds, names = layout(costs)
    rows = [["", *kinds]]
    for layer in layers:
        row = [layer]
        for kind in kinds:
            row.append(cell(names[layer, kind]) if (layer, kind) in names else "")
        rows.append(row)
    return rows


def grid(costs, ranks):
    """Return an allocation as text: ranks in the cells, "." for off, parameters at the edges."""
    by_layer, by_kind = prices(costs, ranks)
    rows = cells(costs, lambda name: ranks.get(name, 0) or ".")
    rows[0].append("parameters")
    for row in rows[1:]:
        row.append(by_layer[row[0]])
    rows.append(["parameters", *by_kind.values(), sum(by_kind.values())])
    return align(rows)


def align(rows):
    """Return rows of words and numbers as text: first column to the left, others to the right."""
    texts = []
    for row in rows:
        texts.append([f"{word:,}" if isinstance(word, int) else word for word in row])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for first, *others in texts:
        line = first.ljust(widths[0])
        for word, width in zip(others, widths[1:], strict=True):
            line += "  " + word.rjust(width)
        lines.append(line.rstrip())
    return "\n".join(lines)


def modules_on(ranks):
    """Return the names of the modules that an allocation turns on."""
    return [name for name, rank in ranks.items() if rank > 0]


def jaccard(ranks, others):
    """Return the overlap of the modules that are on: in both / in either; 1 if none is on."""
    on = set(modules_on(ranks))
    others_on = set(modules_on(others))
    either = len(on | others_on)
    return len(on & others_on) / either if either else 1.0


def changes(ranks, before):
    """Return ([modules that came on], [modules that went off], Jaccard index with before)."""
    came = [name for name in modules_on(ranks) if not before.get(name)]
    went = [name for name in modules_on(before) if not ranks.get(name)]
    return came, went, jaccard(ranks, before)


def read_history(folder):
    """Return (costs, [allocation, ...]) of the run in a folder. Raises InputError."""
    path = os.path.join(folder, "history.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            space, *history = [json.loads(line) for line in file]
        costs = {name: module["costs"] for name, module in space["modules"].items()}
        if not history or not costs:
            raise ValueError("there is no allocation in it")
        for name, prices_of_ranks in costs.items():
            if not re.fullmatch(r"([\w.]+\.)?\d{1,6}\.\w+", name, re.ASCII):
                raise ValueError(f"{name!r:.40} where a name such as layers.3.q is wanted")
            check_numbers(prices_of_ranks, f"costs of {name}")
        for entry in history:
            if entry["ranks"].keys() != costs.keys():
                raise ValueError("an allocation has other modules than the search space")
            check_numbers([entry["step"], entry["parameters"], *entry["ranks"].values()], "entry")
            for name, rank in entry["ranks"].items():
                if rank > len(costs[name]):
                    raise ValueError(f"rank {rank} of {name}, which has {len(costs[name])}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not the history of a search: {error}") from None
    return costs, history


def check_numbers(values, name):
    """Raise ValueError if values is not a list of whole numbers that a run can have."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"{name}: want a list of numbers")
    for value in values:
        if type(value) is not int or not 0 <= value < 2**60:
            raise ValueError(f"{name}: {value!r:.40} where a whole number is wanted")


def describe(costs, history):
    """Return text: final ranks, how often every module was on, and a line for each allocation."""

    def how_often(name):
        count = sum(entry["ranks"][name] > 0 for entry in history)
        return f"{count / len(history):.0%}" if count else "."

    parts = ["ranks at the end", grid(costs, history[-1]["ranks"])]
    parts += [f"\nhow often on, of {len(history)} allocations", align(cells(costs, how_often))]
    parts += ["\nallocations, with the share of the parameters that each type has"]
    return "\n".join([*parts, align(timeline(costs, history))])


def number_of(layer):
    """Return 3 of "layers.3"."""
    return int(layer.rpartition(".")[2])


def timeline(costs, history):
    """Return a table with a row for each allocation. The mean layer is weighted by parameters."""
    head = ["step", "on", "parameters", "came", "went", "jaccard", "with first", "mean layer"]
    rows = [head + layout(costs)[1]]
    before = first = history[0]["ranks"]
    for entry in history:
        ranks = entry["ranks"]
        came, went, overlap = changes(ranks, before)
        by_layer, by_kind = prices(costs, ranks)
        total = max(sum(by_kind.values()), 1)
        depth = sum(number_of(layer) * price for layer, price in by_layer.items()) / total
        row = [entry["step"], len(modules_on(ranks)), entry["parameters"], len(came), len(went)]
        row += [f"{value:.2f}" for value in (overlap, jaccard(ranks, first), depth)]
        rows.append(row + [f"{price / total:.0%}" for price in by_kind.values()])
        before = ranks
    return rows


def draw(costs, history):
    """Return SVG: for every type its layers down, allocations across; darker means more ranks."""
    layers, kinds, names = layout(costs)
    row = max(3, 60 / len(layers))  # height of a layer
    strip = row * len(layers) + 10  # height of a type
    step = WIDTH / len(history)  # width of an allocation
    title = f"{len(layers)} layers down ({layers[0]} on top), {len(history)} allocations across"
    parts = [text(LEFT, 16, title)]
    for i, kind in enumerate(kinds):
        parts.append(text(LEFT - 8, TOP + (i + 0.5) * strip, kind, 'text-anchor="end"'))
    for (layer, kind), name in names.items():
        y = TOP + kinds.index(kind) * strip + layers.index(layer) * row
        parts.append(svg_box((LEFT, y, WIDTH, 0.9 * row), 0.05, name))
        # Allocations in a row that give the module the same rank are one box.
        start = 0
        for rank, same in itertools.groupby(entry["ranks"][name] for entry in history):
            count = len(list(same))
            if rank > 0:
                box = (LEFT + start * step, y, count * step, 0.9 * row)
                words = f"{name}, allocations {start + 1} to {start + count}: rank {rank}"
                parts.append(svg_box(box, 0.3 + 0.7 * rank / len(costs[name]), words))
            start += count
    size = f'viewBox="0 0 {LEFT + WIDTH + 20} {TOP + strip * len(kinds):.0f}"'
    style = 'font-family="sans-serif" font-size="11" fill="#4a86d8"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([start, *parts, "</svg>\n"])


def svg_box(box, opacity, words):
    """Return an SVG rectangle (x, y, width, height) that shows words when pointed at."""
    place = 'x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"'.format(*box)
    title = f"<title>{html.escape(words)}</title>"
    return f'<rect {place} fill-opacity="{opacity:.2f}">{title}</rect>'


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="extras.show", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder that train.py --out wrote")
    parser.add_argument("--svg", metavar="FILE", help="draw it too")
    args = parser.parse_args(argv)
    costs, history = read_history(args.run)
    print(describe(costs, history))
    if args.svg:
        write(args.svg, draw(costs, history))


if __name__ == "__main__":
    main()
