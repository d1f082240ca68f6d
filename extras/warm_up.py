"""Warm up before the first score: gradients through a random head point nowhere in particular.

Either the head trains alone (--head-warmup), or together with every module at rank 1
(--warmup-steps), which also moves B away from 0, where some scores are 0.

A score depends on random draws: the head's start, its examples, the batches that are scored.
--score-repeats averages over several warm-ups.
"""

import contextlib
import copy

import torch
import torch.nn.functional as F

import heterolora

RANK = 1  # of every module in a joint warm-up
HEAD_BATCHES = 32  # the warm-up of the head cycles through so many
# Scores that do not see the head: --head-warmup is left out for them.
HEADLESS = ("constant", "alignment", "alignment-by-type", "misalignment")


def first_allocation(args, run, search, train_set):
    """Make the first allocation, from the mean score of at most --score-repeats warm-ups.

    It stops when one more warm-up does not change the allocation.
    """
    flags = copy.copy(args)
    if args.proxy in HEADLESS:
        flags.head_warmup = 0
    rounds = []
    ranks = None
    for repeat in range(args.score_repeats or 1):
        with warmed_up(flags, search.model, search.adapters, train_set, repeat):
            draws = draws_for(args, "first probing", repeat)
            batches = train_set.sample(args.probe_batches, args.batch_size, draws)
            rounds.append(search.score(batches))
        scores = mean_scores(rounds)
        before = ranks
        ranks = search.allocate(scores)
        search.generator.manual_seed(search.seed)  # ties are broken in the same way every time
        if ranks == before:
            break
    search.reallocate(scores=scores)
    if args.score_repeats:
        run.log(f"score   mean of {len(rounds)} warm-ups")


def mean_scores(rounds):
    """Return the mean of a list of scores, each {module name: score, or list of scores}.

    Before that, each is scaled to the mean size of rounds[0]. A head that fits better has smaller
    gradients, so without this the worst head would count most.
    """
    factors = [mean_size(rounds[0]) / mean_size(scores) for scores in rounds]
    means = {}
    for name in rounds[0]:
        values = [torch.tensor(scores[name], dtype=torch.double) for scores in rounds]
        scaled = [value * factor for value, factor in zip(values, factors, strict=True)]
        means[name] = (sum(scaled) / len(scaled)).tolist()
    return means


def mean_size(scores):
    """Return the mean absolute value of all scores, 1 if all are 0."""
    values = [torch.tensor(score, dtype=torch.double).flatten() for score in scores.values()]
    return torch.cat(values).abs().mean().item() or 1.0


def draws_for(args, purpose, repeat):
    """Return a torch.Generator for a purpose; every repeat has its own.

    Repeat 0 has the plain purpose: a run without --score-repeats draws what it would without that
    flag's code.
    """
    from train import generator  # here, as train imports this module

    return generator(args.seed, f"{purpose} {repeat}" if repeat else purpose)


@contextlib.contextmanager
def warmed_up(args, model, adapters, train_set, repeat=0):
    """Train as the flags say, for the body of the `with`; then put all trained values back.

    The first repeat (0) starts from the head as it is, a later one from a new head. The ranks that
    are on, training mode and torch's seed are the caller's to set again.
    """
    draws = draws_for(args, "warm-up", repeat)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if repeat:
        model.draw_head(draws_for(args, "head", repeat))
    try:
        heterolora.set_ranks(adapters, {})
        if args.warmup_steps:
            heterolora.set_ranks(adapters, dict.fromkeys(adapters, RANK))
            batches = train_set.sample(args.warmup_steps, args.batch_size, draws)
            train_together(args, model, adapters, batches, draws.initial_seed())
        elif args.head_warmup:
            n_batches = min(args.head_warmup, HEAD_BATCHES)
            train_head(model, train_set.sample(n_batches, args.batch_size, draws), args.head_warmup)
        yield
    finally:
        model.load_state_dict(start, strict=False)
        model.zero_grad()


def train_together(args, model, adapters, batches, dropout_seed):
    """Take a step on each of the batches, as in training. Raises FloatingPointError."""
    from train import loss_fn, make_optimizer, update

    model.train()
    torch.manual_seed(dropout_seed)  # each warm-up's own, and not that of training
    optimizer, schedule = make_optimizer(args, model, adapters, len(batches))
    total = 0.0
    for batch in batches:
        loss = loss_fn(model, batch)
        loss.backward()
        update(model, adapters, optimizer, schedule)
        total += loss.detach()
    if not total.isfinite():
        raise FloatingPointError("the loss is not finite in the warm-up: try a lower --lr")


def train_head(model, batches, steps):
    """Train the head alone on these batches, whose features the encoder computes once."""
    from train import HEAD_LR

    model.eval()
    features = []
    with torch.no_grad():
        for inputs, labels in batches:
            features.append((model.pool(model.encoder(*inputs), inputs[1]), labels))  # (B, D), (B,)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=HEAD_LR)
    for step in range(steps):
        x, labels = features[step % len(features)]
        optimizer.zero_grad()
        F.cross_entropy(model.head(x), labels).backward()
        optimizer.step()
