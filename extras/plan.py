"""Choose ranks before any training, for any torch model, as Hugging Face's PEFT takes them.

    plan = rank_pattern(model, batches, loss_fn, budget=200_000, targets=["q_proj", "v_proj"])
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=plan.target_modules,
        rank_pattern=plan.ranks,
        alpha_pattern=plan.alphas,
    )

This is the static search of heterolora.py on linears alone. The training is left to others, on as
many devices as they like. This file needs neither PEFT nor transformers.
"""

import contextlib
import dataclasses
import re

import torch

import extras.alignment  # they register what the paper does not have
import extras.allocators
import extras.proxies  # noqa: F401
from data import InputError
from heterolora import ALLOCATORS, PROXIES, HeteroLoRA, inject, rank_costs, set_ranks


@dataclasses.dataclass
class Plan:
    """Which modules get how many ranks. The first three are for PEFT's LoraConfig."""

    target_modules: list | str
    ranks: dict  # rank_pattern: {pattern of a module's name: rank}
    alphas: dict  # alpha_pattern, which keeps alpha / rank the same for all
    modules: dict  # {module name: rank}, without those of rank 0
    scores: dict  # {module name: score, or a list with one for each rank}, of all; see the proxy
    parameters: int  # that the ranks cost


def rank_pattern(
    model,
    batches,
    loss_fn,
    budget,
    targets,
    rank=8,
    alpha=16,
    proxy="grad-norm",
    allocator="greedy",
    seed=0,
):
    """Score the linears of a model and buy ranks for the best -> Plan. The model stays as it was.

    batches are a few of the training data; loss_fn(model, batch) returns a scalar; budget is in
    adapter parameters; targets are the last parts of the names of nn.Linear modules. rank is the
    most that a module can get: with `greedy` it gets all of it or nothing. For ranks in between
    take proxy="spectral" and allocator="greedy-ranks". `snip`, `synflow`, `ablation` and `path`
    are all 0 here, as B is 0: a random draw. Scores through a head that is not trained yet mean
    little: train it first, alone. By scores made of gradients, what the loss does not go through
    comes last. Raises ValueError for a budget that buys nothing and for names that do not exist,
    and what HeteroLoRA.score does.
    """
    if type(budget) is not int or budget < 1:
        raise InputError(f"budget {budget!r:.40}: want a whole number of adapter parameters")
    if isinstance(targets, str) or not targets:
        raise InputError(f'targets {targets!r:.40}: want a list of names, such as ["q_proj"]')
    for kind, name, known in (("proxy", proxy, PROXIES), ("allocator", allocator, ALLOCATORS)):
        if name not in known:
            raise InputError(f"{kind} {name!r:.40}: want one of {', '.join(known)}")

    with left_as_it_was(model):
        adapters = inject(model, targets, [], rank, alpha, seed=seed)
        set_ranks(adapters, {})  # scores do not need them on, and the passes are cheaper
        search = HeteroLoRA(model, adapters, budget, loss_fn, proxy, allocator, seed)
        try:
            entry = search.reallocate(list(batches))
        except AttributeError as error:
            if "LoRALinear" not in str(error):
                raise
            advice = "computes with its linears' weights itself: leave these out of targets"
            raise InputError(f"{error}: a part such as nn.MultiheadAttention {advice}") from None
    modules = {name: rank for name, rank in entry["ranks"].items() if rank > 0}
    if not modules:
        prices = list(rank_costs(adapters).values())
        cheapest = min(prices, key=sum)
        raise InputError(
            f"budget {budget:,} buys nothing with {allocator}: the cheapest module costs "
            f"{sum(cheapest):,} parameters, {cheapest[0]:,} with one rank; one rank of all modules "
            f"costs {sum(first for first, *_ in prices):,}"
        )
    on = {name: adapters[name] for name in modules}
    target_modules = exact_targets(model, list(modules))
    ranks, alphas = exact_patterns(on)
    return Plan(target_modules, ranks, alphas, modules, entry["scores"], entry["parameters"])


@contextlib.contextmanager
def left_as_it_was(model):
    """Put back, whatever happens, a model's modules, buffers and flags, and the random state.

    Parameters need no copy: `inject` froze them all, so no pass changes them or their .grad.
    """
    before = [(m, dict(m._modules), dict(m._buffers)) for m in model.modules()]
    values = {buffer: buffer.clone() for buffer in model.buffers()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count())):
            yield
    finally:
        for module, children, buffers in before:
            for now, then in ((module._modules, children), (module._buffers, buffers)):
                now.clear()  # of what a pass has added, too
                now.update(then)
        for buffer, value in values.items():
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)
        for parameter, requires_grad in flags.items():
            parameter.requires_grad_(requires_grad)


def exact_targets(model, names):
    """Return PEFT's target_modules for these modules of a model and no others.

    They are a list, if that is right. But PEFT adapts every module whose name ends with ".NAME": if
    there is another such module, they are a regular expression. (Not always, as that is wrong with
    mixtures of experts: PEFT 0.21 keeps only the last parts of its names, and adapts these in every
    layer.)
    """
    endings = tuple(f".{name}" for name in names)
    for other, _ in model.named_modules():
        if other.endswith(endings):
            return "|".join(re.escape(name) for name in names)
    return names


def exact_patterns(adapters):
    """Return PEFT's rank_pattern and alpha_pattern for {module name: adapter}, all on.

    PEFT scales by alpha / rank. Here scale does not depend on the rank, so alpha = scale * rank.
    """
    ranks = {}
    alphas = {}
    for name, adapter in adapters.items():
        # PEFT looks for "(.*\.)?(KEY)$": there "^" bars a prefix. Before 0.15 it looked for
        # ".*\.KEY$": there the half ".*\.^" never matches, and the half "^NAME$" is exact.
        key = "^|^" + re.escape(name)
        ranks[key] = adapter.rank
        alphas[key] = adapter.scale * adapter.rank
    return ranks, alphas
