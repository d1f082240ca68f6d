"""Allocation rules beside the paper's, registered on import: baselines and variants of greedy."""

import os
import warnings
from operator import itemgetter

import torch

from heterolora import ALLOCATORS, SHORTCUTS, allocator, greedy

BY_LAYERS = ("first-layers", "middle-layers", "last-layers")  # these need no scores
UNREACHED = -1e30  # the score of a linear that no input reached: below all others


def price_of(costs, ranks):
    """Return the parameters of an allocation {name: rank}, from prices alone."""
    return sum(sum(costs[name][:rank]) for name, rank in ranks.items())


def costs_once(adapters):
    """Return heterolora.rank_costs, but what modules share counts in the first of them only."""
    costs = {}
    seen = set()
    for name, adapter in adapters.items():
        totals = []
        for rank in range(adapter.max_rank + 1):
            own = [p[slices] for p, slices in adapter.active(rank) if p not in seen]
            totals.append(sum(part.numel() for part in own))
        costs[name] = [totals[rank + 1] - totals[rank] for rank in range(adapter.max_rank)]
        seen.update(parameter for parameter, _ in adapter.active(adapter.max_rank))
    return costs


def is_shortcut(name):
    """Tell whether a module is a connection, from its name."""
    return name.split(".")[-1] in SHORTCUTS


def total(score):
    """Return a module's score as one number: a list counts as its sum."""
    return sum(score) if isinstance(score, list) else score


def shuffled(items, generator):
    """Return the items, or the keys of a dict, as a list in random order."""
    items = list(items)
    return [items[i] for i in torch.randperm(len(items), generator=generator)]


@allocator("uniform")
def uniform(scores, costs, budget, generator):
    """Give every module the same rank, the largest that fits: plain LoRA."""
    most = max(map(len, costs.values()), default=0)
    for rank in range(most, 0, -1):
        ranks = {name: min(rank, len(prices)) for name, prices in costs.items()}
        if price_of(costs, ranks) <= budget:
            return ranks
    return dict.fromkeys(costs, 0)


def layers_of(costs):
    """Return the names of the modules as a list for every layer, in the model's order.

    The first number in a name tells the layer: "layers.3.q", or "layers.3.mlp.experts.7.up_proj".
    What all names begin with does not count, as "0" in "0.auto_model.encoder.layer.3.q". (So the
    experts of a single layer count as layers.)
    """
    names = {tuple(name.split(".")): name for name in costs}
    n_common = len(os.path.commonprefix(list(names)))  # in parts: names are tuples here
    layers = {}
    for parts, name in names.items():
        layers.setdefault(layer_of(parts, n_common), []).append(name)
    return list(layers.values())


def layer_of(parts, n_common):
    """Return the parts of a module's name up to its layer's number; without one, all but the last.

    The first n_common parts, which all names share, cannot be the number.
    """
    for i in range(n_common, len(parts)):
        if parts[i].isdecimal():
            return parts[: i + 1]
    return parts[:-1]


def in_rounds(costs, budget, groups):
    """Buy a rank for every module, group by group, then a second, and so on, while it fits."""
    ranks = dict.fromkeys(costs, 0)
    for rank in range(max(map(len, costs.values()), default=0)):
        for name in sum(groups, []):
            has_all_before = ranks[name] == rank  # else one of them was too dear
            if has_all_before and rank < len(costs[name]) and costs[name][rank] <= budget:
                ranks[name] += 1
                budget -= costs[name][rank]
    return ranks


@allocator("first-layers")
def first_layers(scores, costs, budget, generator):
    """Buy a rank for every module, first layers first, then a second, while the budget lasts."""
    return in_rounds(costs, budget, layers_of(costs))


@allocator("middle-layers")
def middle_layers(scores, costs, budget, generator):
    """The same, from the middle layers outwards."""
    layers = layers_of(costs)
    middle = (len(layers) - 1) / 2
    from_middle = sorted(layers, key=lambda names: abs(layers.index(names) - middle))
    return in_rounds(costs, budget, from_middle)


@allocator("last-layers")
def last_layers(scores, costs, budget, generator):
    """The same, from the last layer to the first."""
    return in_rounds(costs, budget, layers_of(costs)[::-1])


def without_rises(scores):
    """Return the closest list that never rises (pool adjacent violators, by least squares).

    A rank needs those before it. One that is better than the one before is averaged with it.
    """
    blocks = []  # (mean score, ranks), each mean at most the one before
    for score in scores:
        mean = score
        size = 1
        while blocks and mean > blocks[-1][0]:
            mean_before, size_before = blocks.pop()
            mean = (mean * size + mean_before * size_before) / (size + size_before)
            size += size_before
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


@allocator("greedy-ranks")
def greedy_ranks(scores, costs, budget, generator):
    """Buy single ranks, best score first, while they fit, going on past one that does not.

    A single number is split equally among the ranks of its module. Ties come in random order.
    """
    items = []  # (score, name), one for each rank
    for name, score in scores.items():
        if not isinstance(score, list):
            score = [score / len(costs[name])] * len(costs[name])
        for mean in without_rises(score):
            items.append((mean, name))
    items = shuffled(items, generator)
    items.sort(key=itemgetter(0), reverse=True)  # stable: ties stay shuffled
    ranks = dict.fromkeys(scores, 0)
    for _, name in items:
        price = costs[name][ranks[name]]
        if price <= budget:
            ranks[name] += 1
            budget -= price
    return ranks


@allocator("breadth")
def breadth(scores, costs, budget, generator):
    """Buy a rank for every module, best score first, then a second one, and so on, while it fits.

    In each round linears come before shortcuts. Equal scores come in random order.
    """
    names = shuffled(scores, generator)
    names.sort(key=lambda name: total(scores[name]), reverse=True)
    linears = [name for name in names if not is_shortcut(name)]
    shortcuts = [name for name in names if is_shortcut(name)]
    return in_rounds(costs, budget, [linears, shortcuts])


@allocator("within-layer")
def within_layer(scores, costs, budget, generator):
    """Take whole modules as greedy does, by each score divided by the mean |score| in its layer.

    Where layers have one module each, all shares are 1 (or -1), and the choice is a random draw.
    Linears that no input reached count in no mean, and stay last.
    """
    shares = dict.fromkeys(scores, UNREACHED)
    for names in layers_of(scores):
        reached = {name: total(scores[name]) for name in names if scores[name] != UNREACHED}
        mean = sum(map(abs, reached.values())) / max(1, len(reached))
        for name, score in reached.items():
            shares[name] = score / mean if mean else 0.0
    return greedy(shares, costs, budget, generator)


@allocator("random-linears")
def random_linears(scores, costs, budget, generator):
    """Take whole linears at random, while they fit: a control that leaves shortcuts out."""
    ties = {name: 1.0 for name in scores if not is_shortcut(name)}
    return dict.fromkeys(scores, 0) | greedy(ties, costs, budget, generator)


@allocator("greedy-separated")
def greedy_separated(scores, costs, budget, generator):
    """Let linears and shortcuts compete apart, each for its share of the search space.

    A kind that is a third of the search space has a third of the budget. What rounding or prices
    leave over goes to the best of what is still off, of either kind.
    """
    linears = {name: score for name, score in scores.items() if not is_shortcut(name)}
    shortcuts = {name: score for name, score in scores.items() if is_shortcut(name)}
    search_space = sum(map(sum, costs.values()))
    ranks = {}
    for pool in (linears, shortcuts):
        if pool:
            size = sum(sum(costs[name]) for name in pool)
            ranks |= greedy(pool, costs, budget * size // search_space, generator)
    still_off = {name: scores[name] for name, rank in ranks.items() if rank == 0}
    if still_off:
        ranks |= greedy(still_off, costs, budget - price_of(costs, ranks), generator)
    return ranks


def plain_lora(adapters, allocator, budget):
    """Return the ranks of the baseline: the same everywhere, or by layers. Shortcuts stay off."""
    linears = {name: adapter for name, adapter in adapters.items() if not is_shortcut(name)}
    rule = ALLOCATORS["uniform" if allocator == "greedy" else allocator]  # greedy: none was given
    ranks = rule({}, costs_once(linears), budget, None)
    if not any(ranks.values()):
        advice = "raise --budget"
        if allocator not in BY_LAYERS:
            advice += ", or let --allocator middle-layers choose some layers"
        warnings.warn(f"{budget:,} parameters buy no rank: {advice}", stacklevel=2)
    return ranks
