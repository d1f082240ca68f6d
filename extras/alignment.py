"""Scores from the inputs and weights of linears alone: no labels, no gradients. PLoP's measure.

PLoP (Hayou et al. 2025, arXiv 2506.20629) calls it the normalised feature norm. For an input z it
is |W z|, divided by the root mean square of |W z'| over Gaussian z' of the same norm:

    NFN(z) = sqrt(d_in) |W z| / (|W|_F |z|)

It is about 1 for random weights, and more where W magnifies its inputs. PLoP adapts the linears
with the lowest NFN. It averages over all linears of a type; a number for each is our change.
"""

import contextlib
import inspect

import torch
import torch.nn.functional as F

from extras.allocators import UNREACHED
from heterolora import LoRALinear, proxy


@contextlib.contextmanager
def real_tokens(model):
    """Give a function that returns the attention mask of the pass under way, (B, T), or None."""
    mask = None
    signature = inspect.signature(model.forward)

    def remember(module, args, kwargs):
        nonlocal mask
        given = signature.bind(*args, **kwargs).arguments
        mask = given.get("attention_mask", kwargs.get("attention_mask"))  # or in its **kwargs

    hook = model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield lambda: mask
    finally:
        hook.remove()


@torch.no_grad()
def feature_norms(model, batches, loss_fn):
    """Return {adapter: mean NFN over the real tokens of all batches}, of linears.

    Padding is told by the attention mask that the model is called with. Where a linear's inputs
    have another shape than (B, T, d_in), or no mask is given, padding counts too.
    """
    totals = {}
    counts = {}

    def measure(module, inputs, y):
        """Add the NFN of a linear's inputs."""
        x = inputs[0].float()  # (B, T, d_in)
        mask = mask_now()
        if mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.bool()]  # (tokens, d_in)
        W = module.weight.float()
        longest = (W.norm() * x.norm(dim=-1)).clamp(min=torch.finfo(W.dtype).tiny)  # not 0
        norms = F.linear(x, W).norm(dim=-1) / longest  # (tokens,)
        total = W.shape[1] ** 0.5 * norms.double().sum().item()
        totals[module.adapter] = totals.get(module.adapter, 0.0) + total
        counts[module.adapter] = counts.get(module.adapter, 0) + norms.numel()

    linears = [module for module in model.modules() if isinstance(module, LoRALinear)]
    hooks = [linear.register_forward_hook(measure) for linear in linears]
    try:
        with real_tokens(model) as mask_now:
            for batch in batches:
                loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {adapter: totals[adapter] / counts[adapter] for adapter in totals if counts[adapter]}


def signed_norms(model, adapters, batches, loss_fn, sign):
    """Return {name: sign * NFN}, without the linears that no input reaches.

    A connection has no W. Our choice is NFN 1, that of the identity, for new shortcuts too.
    """
    norms = feature_norms(model, batches, loss_fn)
    linears = {module.adapter for module in model.modules() if isinstance(module, LoRALinear)}
    scores = {}
    for name, adapter in adapters.items():
        if adapter in norms:
            scores[name] = sign * norms[adapter]
        elif adapter not in linears:
            scores[name] = float(sign)
    return scores


def fill_up(scores, adapters):
    """Return the scores of all modules. What has none comes last, where scores count."""
    return {name: scores.get(name, UNREACHED) for name in adapters}


@proxy("misalignment", measure=None)
def misalignment(model, adapters, batches, loss_fn):
    """NFN: a control, which buys what PLoP would buy last."""
    return fill_up(signed_norms(model, adapters, batches, loss_fn, sign=1), adapters)


@proxy("alignment", measure=None)
def alignment(model, adapters, batches, loss_fn):
    """-NFN of every module."""
    return fill_up(signed_norms(model, adapters, batches, loss_fn, sign=-1), adapters)


@proxy("alignment-by-type", measure=None)
def alignment_by_type(model, adapters, batches, loss_fn):
    """-NFN, the mean of all modules of a type: PLoP as published."""
    by_type = {}
    scores = signed_norms(model, adapters, batches, loss_fn, sign=-1)
    for name, score in scores.items():
        by_type.setdefault(name.split(".")[-1], []).append(score)
    means = {last: sum(values) / len(values) for last, values in by_type.items()}
    return fill_up({name: means[name.split(".")[-1]] for name in scores}, adapters)
