"""The result of a run: what it reached, which ranks it bought, and what that cost."""

import os

import torch

import heterolora
from extras.devices import peak_memory_mb
from extras.warm_up import RANK


def summarise(args, model, adapters, search, progress, device):
    """Return the result of a run as result.json holds it. The last evaluation counts."""
    metric = next(iter(progress.evaluations[-1]))
    trained = sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)
    active = heterolora.cost(adapters) if adapters else trained
    ever = active
    if adapters:
        ever = heterolora.cost(adapters, highest_ranks(args, adapters, search))
    everything = {name: adapter.max_rank for name, adapter in adapters.items()}
    recording_seconds = extra_seconds(progress)
    train_seconds = progress.step_seconds - recording_seconds
    return {
        "task": os.path.basename(args.task),
        "method": args.method,
        "proxy": args.proxy if args.method in ("static", "dynamic") else None,
        "seed": args.seed,
        "metric": metric,
        "last": progress.evaluations[-1][metric],
        "best": max(evaluation[metric] for evaluation in progress.evaluations),
        "dev": progress.evaluations[-1],
        "steps": progress.step,
        "params_budget": int(args.budget) if adapters else None,
        "params_active": active,
        "params_ever_trained": ever,
        "params_search_space": heterolora.cost(adapters, everything),
        "params_head": sum(p.numel() for p in model.head.parameters()),
        "ranks": {name: adapter.rank for name, adapter in adapters.items()},
        "train_seconds": train_seconds,
        "search_seconds": progress.search_seconds + recording_seconds,
        "samples_per_second": progress.samples / train_seconds,
        "peak_memory_mb": peak_memory_mb(device),
        "threads": torch.get_num_threads(),
    }


def highest_ranks(args, adapters, search):
    """Return {module name: the most ranks that it ever had}, a joint warm-up included."""
    is_warmed = args.warmup_steps and (search or args.init == "gradient")
    highest = dict.fromkeys(adapters, RANK if is_warmed else 0)
    if search:
        allocations = [entry["ranks"] for entry in search.history]
    else:
        allocations = [{name: adapter.rank for name, adapter in adapters.items()}]
    for ranks in allocations:
        for name, rank in ranks.items():
            highest[name] = max(highest[name], rank)
    return highest


def extra_seconds(progress):
    """Return by how much recording made its steps longer, from what a token takes in plain steps.

    0 if that cannot be told: no step was plain, or the first step, which is slow, hides it.
    """
    plain_tokens = progress.tokens - progress.recorded_tokens
    if plain_tokens == 0:
        return 0.0
    per_token = (progress.step_seconds - progress.recorded_seconds) / plain_tokens
    return max(0.0, progress.recorded_seconds - progress.recorded_tokens * per_token)
