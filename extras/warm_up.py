"""Warm up before the first score: gradients through a random head point nowhere in particular.

Either the head trains alone (--head-warmup), or together with every module at rank 1
(--warmup-steps), which also moves B away from 0, where some scores are 0.
"""

import contextlib

import torch
import torch.nn.functional as F

import heterolora

RANK = 1  # of every module in a joint warm-up
HEAD_BATCHES = 32  # that the head is trained on, again and again


@contextlib.contextmanager
def warmed_up(args, model, adapters, train_set):
    """Train as the flags say, for what is done inside, and put every value back afterwards."""
    from train import generator

    draws = generator(args.seed, "warm-up")
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    heterolora.set_ranks(adapters, {})
    if args.warmup_steps:
        heterolora.set_ranks(adapters, dict.fromkeys(adapters, RANK))
        batches = train_set.sample(args.warmup_steps, args.batch_size, draws)
        train_together(args, model, adapters, batches)
    elif args.head_warmup:
        n_batches = min(args.head_warmup, HEAD_BATCHES)
        train_head(model, train_set.sample(n_batches, args.batch_size, draws), args.head_warmup)
    yield
    model.load_state_dict(start, strict=False)
    model.zero_grad()


def train_together(args, model, adapters, batches):
    """Take a step on each of the batches, as in training."""
    from train import loss_fn, make_optimizer, update

    model.train()
    torch.manual_seed(args.seed)  # dropout
    optimizer, schedule = make_optimizer(args, model, adapters, len(batches))
    for batch in batches:
        loss_fn(model, batch).backward()
        update(model, adapters, optimizer, schedule)


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
