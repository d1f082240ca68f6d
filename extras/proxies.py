"""Scores beside those of the paper: fisher, ablation, path, host-grad, host-snip and spectral.

Import this module to register them. As in heterolora.py, y = W x + dW x and d = dL/dy, and
G = dL/dW = d^T x (d_out, d_in) is the gradient of the full matrix.

    name        positive while B = 0    what it costs
    ----        --------------------    -------------
    fisher      yes                     a pass per batch, and a small one per example and module
    ablation    no, 0                   a forward pass per batch and module
    path        no, 0                   a pass per batch
    host-grad   yes                     a pass per batch, and memory for every G
    host-snip   yes, 0 for shortcuts    as host-grad
    spectral    yes                     as host-grad, and the eigenvalues of G G^T
"""

import torch

import extras.synflow  # noqa: F401  the other proxy of the paper
from heterolora import LoRALinear, proxy, recording


def at_least_float32(tensor):
    """Return the tensor, in float32 if it has fewer bits: sums over batches need them."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def host_gradient(adapter, x, d):
    """x (..., d_in), d (..., d_out) -> [G], the gradient (d_out, d_in) of the full matrix"""
    x = x.reshape(-1, x.shape[-1])  # (tokens, d_in)
    d = d.reshape(-1, d.shape[-1]).to(x.dtype)  # (tokens, d_out)
    return [at_least_float32(d.T @ x)]


def mean_over(batches, model, loss_fn, measure):
    """Return {adapter: mean over the batches of the tensor that measure gives in a list}."""
    sums = {}
    for batch in batches:
        with recording(model, measure, sums) as outputs:
            loss = loss_fn(model, batch)
            if outputs:  # some adapted module was reached
                torch.autograd.grad(loss, outputs, allow_unused=True)
    return {adapter: totals[0] / len(batches) for adapter, totals in sums.items()}


def squared_gradients(adapter, x, d):
    """x (n, ..., d_in), d (n, ..., d_out) -> [sum over the n examples of |dl_i/dB|^2]

    B is taken to be the last parameter with values that `active` names. In other kinds than LoRA
    too, that one must have a gradient at the start.
    """
    if x.dim() < 2:
        raise ValueError("fisher: the first dimension of inputs must count examples")
    parameters = [parameter for parameter, _ in adapter.active(adapter.max_rank)]
    last_parameter = [parameter for parameter in parameters if parameter.numel() > 0][-1]
    total = 0.0
    for x_i, d_i in zip(x, d, strict=True):
        with torch.enable_grad():
            output = adapter(x_i, adapter.max_rank)
        dl_i = len(x) * d_i.to(output.dtype)  # the batch's loss is the mean of the examples' l_i
        (gradient,) = torch.autograd.grad(output, last_parameter, dl_i)
        total += gradient.square().sum()
    return [total]


@proxy("fisher", squared_gradients)
def fisher(adapter, total):
    """sum over a batch's examples of |dl_i/dB|^2: gradients of opposite sign do not cancel.

    loss_fn must be a mean over examples, the first dimension of x must count them, and the module
    must run once in a pass. (The official code lists a FISHER without implementing it. The
    Fisher score of activations, Theis et al. 2018, arXiv 1801.05787, is 0 while B = 0.)
    """
    return total


@proxy("ablation", measure=None)
@torch.no_grad()
def ablation(model, adapters, batches, loss_fn):
    """Mean loss without the module minus mean loss with it, all others as they are.

    A module that is on is switched off. One that is off is switched on, with the values that it
    kept. Negative where the module does harm. (The official ALPHA_TEST scales the frozen map too.)
    """

    def mean_loss():
        return sum(loss_fn(model, batch).item() for batch in batches) / len(batches)

    now = mean_loss()
    scores = {}
    for name, adapter in adapters.items():
        rank = adapter.rank
        adapter.rank = 0 if rank > 0 else adapter.max_rank
        try:
            rise = mean_loss() - now
        finally:
            adapter.rank = rank
        scores[name] = rise if rank > 0 else -rise
    return scores


def first_order_change(adapter, x, d):
    """x (..., d_in), d (..., d_out) -> [<G, dW>], what dW changes in the loss to first order

    dW is of the ranks that are on; of all, if the module is off.
    """
    dW_x = adapter(x, adapter.rank or adapter.max_rank)
    return [(at_least_float32(d) * dW_x).sum()]


@proxy("path", measure=None)
def path(model, adapters, batches, loss_fn):
    """-<G, dW> with G taken half way: the module's part in the fall of the loss by all that is on.

    What is off is scored as if it were added. The midpoint rule for integrated gradients
    (Sundararajan et al. 2017, arXiv 1703.01365). At full scale <G, dW> says little, as training has
    brought it near 0.
    """
    for adapter in adapters.values():
        adapter.scale /= 2
    try:
        halves = mean_over(batches, model, loss_fn, first_order_change)
    finally:
        for adapter in adapters.values():
            adapter.scale *= 2
    # <G, dW> was of half of dW, hence 2.
    return {name: -2 * halves.get(adapter, 0.0) for name, adapter in adapters.items()}


@proxy("host-grad", host_gradient)
def host_grad(adapter, G):
    """scale^2 |G|^2. It knows neither the draw of A nor the width of the module."""
    return adapter.scale**2 * G.square().sum()


@proxy("host-snip", measure=None)
def host_snip(model, adapters, batches, loss_fn):
    """sum |W * G|: SNIP of the host's own weight (GoRA, arXiv 2502.12171, takes the mean).

    A shortcut has no such weight, scores 0 and is bought last.
    """
    means = mean_over(batches, model, loss_fn, host_gradient)
    hosts = {m.adapter: m.host for m in model.modules() if isinstance(m, LoRALinear)}
    scores = dict.fromkeys(adapters, 0.0)
    for name, adapter in adapters.items():
        if adapter in hosts and adapter in means:
            weight = hosts[adapter].weight.detach()
            scores[name] = (weight * means[adapter]).abs().sum()
    return scores


@proxy("spectral", host_gradient)
def spectral(adapter, G):
    """scale^2 [sigma_1(G)^2, ..., sigma_r_max(G)^2]: a score for every rank.

    The first k sum to the most of |G|^2 that k ranks can catch, so each is what its rank adds.
    """
    if G.shape[0] > G.shape[1]:  # G G^T and G^T G share what is not 0: take the smaller
        G = G.T
    gram = G @ G.T
    if not gram.isfinite().all():  # eigvalsh would fail; the search says what is wrong
        return torch.full((adapter.max_rank,), torch.nan)
    squares = torch.linalg.eigvalsh(gram)  # several times quicker than the singular values of G
    largest_first = squares.flip(0)[: adapter.max_rank]
    return adapter.scale**2 * largest_first.clamp(min=0)
