"""HeteroLoRA: spend a fixed budget of trainable parameters where a cheap gradient score says that it pays.

The method of "Unlocking the Global Synergies in Low-Rank Adapters" (Zhang et al., ES-FoMo-II at ICML 2024, arXiv 2406.14956;
below "the paper"), written from scratch. "Official code" is github.com/ZixiBenZhang/lora_global_synergies at 43457120.

    code                           meaning                                                    official code
    ----                           -------                                                    -------------
    LoRA: A (r, d_in),             low-rank update dW = scale * B A of a linear map,          LoRALayer
      B (d_out, r), scale            scale = alpha / r_max whatever the active rank is
    LoRALinear                     frozen linear + LoRA                                       LoraLinear
    LoRAShortcut                   LoRA-adapted connection: identity + dW or zero + dW        ShortcutFromIdentity, ShortcutFromZeros
    residual_attn, residual_ffn    the layer's residual connections, start at identity        residual_1, residual_2
    shortcut_attn                  new connection layer input -> layer output, from zero      shortcut_sa
    shortcut_ffn                   new connection from the previous layer's FFN input to      shortcut_ffn
                                     this layer's FFN input, from zero; none in layer 0
    search space                   every module that inject put in: the dict `adapters`       --
    rank of a module               how many of its r_max ranks are on; 0 = off                disable_adapters
    allocation, ranks              {module name: active rank}, PEFT's rank_pattern            alloc_modules (on or off)
    score, proxy                   what a module is worth; higher = keep                      importance
    budget                         trainable adapter PARAMETERS that may be on at any         a count of modules
                                     moment; one rank of a module costs d_in + d_out
    HeteroLoRA                     score, allocate, switch; once (static) or again and        DynamicLoraReallocationCallback
                                     again during training (dynamic)

Read on in this order: adapters, search space, proxies, allocators, the search.
"""
import contextlib
import copy
import functools
import math
import time
import warnings
import weakref
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")  # the linears of model.py; inject takes any names
SHORTCUTS = ("residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn")


# -------------------------------------------------------------------------------------------------- adapters

class LoRA(nn.Module):
    """dW = scale * B A (Hu et al. 2021, arXiv 2106.09685), of which the first `rank` ranks are on. The paper's unit of search.

    A (r_max, d_in) starts as U(-1/sqrt(d_in), 1/sqrt(d_in)), variance 1/(3 d_in), that is kaiming uniform with a = sqrt(5);
    B (d_out, r_max) starts at 0, so dW does. scale = alpha / r_max never changes: switching ranks on or off leaves the
    others as they are. Ranks that are off keep their values through any torch optimizer, momentum and weight decay included.
    """
    everywhere = weakref.WeakSet()  # all LoRA modules, for the optimizer hooks below

    def __init__(self, d_in, d_out, rank, alpha, generator=None):
        super().__init__()
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(f"rank {rank} for a {d_in} -> {d_out} module: it must be from 1 to {min(d_in, d_out)}")
        if not alpha > 0:
            raise ValueError(f"alpha {alpha}: it must be over 0")
        bound = 1 / math.sqrt(d_in)
        self.A = nn.Parameter(torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.scale, self.max_rank, self.rank = alpha / rank, rank, rank
        self.shortcut = False  # LoRAShortcut says otherwise; the separated pools ask
        self.merged = False
        self.ghost = False  # while scoring: ranks that are off get gradients, but add nothing
        self.tap = None  # while recording: is told x and dL/dy of the adapted map y(x)
        self.host = None  # the frozen linear beneath; a shortcut has none
        LoRA.everywhere.add(self)

    def __setstate__(self, state):  # copies and unpickled modules are alive too
        super().__setstate__(state)
        LoRA.everywhere.add(self)

    @property
    def price(self):
        """What one rank costs: d_in + d_out parameters"""
        return self.A.shape[1] + self.B.shape[0]

    @property
    def idle(self):
        """True if there is nothing to compute"""
        return self.merged or (self.rank == 0 and not (self.ghost and torch.is_grad_enabled()))

    def _delta(self, x, ranks):
        A, B = self.A[ranks].to(x.dtype), self.B[:, ranks].to(x.dtype)  # the model may be in bfloat16, LoRA is not
        return F.linear(F.linear(x, A) * self.scale, B)  # (..., d_in) -> (..., r) -> (..., d_out)

    def forward(self, x):
        """x (..., d_in) -> dW x (..., d_out)"""
        if not self.ghost or self.rank == self.max_rank:
            return self._delta(x, slice(0, self.rank))
        ghost = self._delta(x.detach(), slice(self.rank, None))  # detached: else the layers below would get gradients through it
        ghost = ghost - ghost.detach()
        return self._delta(x, slice(0, self.rank)) + ghost if self.rank else ghost

    def tapped(self, x, y):
        """y(x), the same values, whose gradient `tap` will be told"""
        if not torch.is_grad_enabled():
            return y
        if y is x or not y.requires_grad:  # it must have a gradient, and one of its own: what is not adapted uses x too
            y = (y if y.requires_grad else y.detach().requires_grad_()).clone()
        tap, version, kept = self.tap, x._version, x.detach()

        def hook(d):
            if x._version != version:
                raise RuntimeError("the input of an adapted module was changed in place after its use: no score can be made of it")
            tap(kept, d)
        y.register_hook(hook)
        return y


class LoRALinear(nn.Module):
    """y = W x + b + dW x with W and b frozen"""

    def __init__(self, host, lora):
        super().__init__()
        self.host, self.lora = host, lora
        lora.__dict__["host"] = host  # past nn.Module: the host is no part of its LoRA

    def forward(self, x):
        """x (..., d_in) -> (..., d_out)"""
        y = self.host(x)
        y = y if self.lora.idle else y + self.lora(x)
        return y if self.lora.tap is None else self.lora.tapped(x, y)

    @torch.no_grad()
    def merge(self):
        """Fold dW into the host's weight: the same function without its cost, but for the rounding of a host in 16 bits. Raises RuntimeError if done already."""
        if self.lora.merged:
            raise RuntimeError("merged already; call unmerge first")
        self.original = self.host.weight.data  # kept, so that unmerge is exact
        ranks = slice(0, self.lora.rank)
        self.host.weight.data = (self.original + self.lora.scale * self.lora.B[:, ranks] @ self.lora.A[ranks]).to(self.original.dtype)
        self.lora.merged = True

    def unmerge(self):
        """Undo merge, exactly. Raises RuntimeError if there is nothing to undo."""
        if not self.lora.merged:
            raise RuntimeError("not merged")
        self.host.weight.data, self.original, self.lora.merged = self.original, None, False


class LoRAShortcut(nn.Module):
    """A connection with LoRA: x + dW x in place of a residual, dW x (None while off) in place of a missing shortcut.

    The paper's shortcut modules. The official code multiplies by dense identity and zero matrices, and normalises once more
    behind every shortcut, on or off; here an off connection is what the plain model has. It cannot be merged.
    """

    def __init__(self, lora, identity):
        super().__init__()
        self.lora, self.identity = lora, identity
        lora.shortcut = True

    def forward(self, x):
        """x (B, T, D) -> (B, T, D) or None"""
        delta = None if self.lora.idle else self.lora(x)
        y = delta if not self.identity else x if delta is None else x + delta
        return y if self.lora.tap is None else self.lora.tapped(x, torch.zeros_like(x) if y is None else y)


# Why hooks: to an optimizer a rank is a slice of A and of B. Its gradient is zero while it is off, not None, and AdamW's
# momentum and weight decay move what has a zero gradient.
def _keep_off_ranks(*_):
    for lora in LoRA.everywhere:
        lora.kept = [(part, part.clone()) for part in (lora.A.detach()[lora.rank:], lora.B.detach()[:, lora.rank:])]


def _restore_off_ranks(*_):
    for lora in LoRA.everywhere:
        for part, value in lora.__dict__.pop("kept", ()):
            part.copy_(value)


register_optimizer_step_pre_hook(_keep_off_ranks)
register_optimizer_step_post_hook(_restore_off_ranks)


# -------------------------------------------------------------------------------------------------- search space

def inject(model, targets, shortcuts, rank, alpha, shortcut_alpha=None, seed=0):
    """Put the paper's search space into a model, in place, and freeze everything else -> {module name: LoRA}, all on.

    targets: last parts of the names of nn.Linear modules ("q", "v"). shortcuts: last parts of the names of connection
    points; where an nn.Identity stands the connection starts at identity, elsewhere at zero, and its width is
    model.config.hidden_size. alpha, shortcut_alpha (None: alpha): numerators of scale. A depends on seed and module name
    only, so that another choice of targets leaves it alone. Raises ValueError for a name that matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if any(isinstance(module, LoRA) for module in modules.values()):
        raise ValueError("this model has adapters already: inject once, then use set_ranks")
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    points = {name: m for name, m in modules.items() if isinstance(m, nn.Identity) or not (isinstance(m, nn.Dropout) or type(m).__module__.startswith("torch.") or [*m.parameters()])}
    chosen = {}
    for wanted, among, what in ((targets, linears, "linear module"), (shortcuts, points, "connection point")):
        for last in wanted:
            matches = {name: m for name, m in among.items() if name.split(".")[-1] == last}
            if not matches:
                known = sorted({name.split(".")[-1] for name in among})
                raise ValueError(f"no {what} is called {last!r}; the model has: {', '.join(known)}")
            chosen |= matches
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in modules and any(module is one for one in chosen.values()):
            raise ValueError(f"{name} is the same module as another: an adapter there would serve both; give each its own")
    if shortcuts and not hasattr(getattr(model, "config", None), "hidden_size"):
        raise ValueError("shortcuts take their width from model.config.hidden_size, and the model has none")
    adapters, replaced = {}, {}
    for name in (name for name in modules if name in chosen):  # the model's own order, not that of the arguments
        old, generator = modules[name], torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if isinstance(old, nn.Linear):
            adapters[name] = LoRA(old.in_features, old.out_features, rank, alpha, generator)
            replaced[name] = LoRALinear(old, adapters[name])
        else:
            width = model.config.hidden_size
            adapters[name] = LoRA(width, width, rank, alpha if shortcut_alpha is None else shortcut_alpha, generator)
            replaced[name] = LoRAShortcut(adapters[name], identity=isinstance(old, nn.Identity))
        frozen = old.weight if isinstance(old, nn.Linear) else next(model.parameters())
        adapters[name].to(frozen.device, torch.promote_types(frozen.dtype, torch.float32))  # in 16 bits small steps would be lost
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for lora in adapters.values():
        lora.requires_grad_(True)
    for name, module in replaced.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
    return adapters


def set_ranks(adapters, ranks):
    """Switch an allocation {name: rank} on; names left out are off. Values of A and B stay. Raises ValueError."""
    unknown = [name for name in ranks if name not in adapters]
    if unknown:
        raise ValueError(f"no adapter is called {unknown[0]!r}; there are: {', '.join(adapters)}")
    for name, rank in ranks.items():
        if not 0 <= rank <= adapters[name].max_rank:
            raise ValueError(f"rank {rank} for {name}: it must be from 0 to {adapters[name].max_rank}")
    merged = [name for name, lora in adapters.items() if lora.merged and ranks.get(name, 0) != lora.rank]
    if merged:
        raise ValueError(f"{merged[0]} is merged into its host: unmerge it before its rank changes")
    for name, lora in adapters.items():
        lora.rank = ranks.get(name, 0)


def spent(adapters, ranks=None):
    """Parameters of an allocation, of what is on now if it is None"""
    return sum(lora.price * (lora.rank if ranks is None else ranks.get(name, 0)) for name, lora in adapters.items())


def size(adapters):
    """Parameters of the whole search space, all ranks on"""
    return sum(lora.price * lora.max_rank for lora in adapters.values())


# -------------------------------------------------------------------------------------------------- proxies

# Notation: y = W x + dW x is the adapted map, for n examples of t tokens; d = dL/dy; G = dL/dW = d^T x (d_out, d_in) is the gradient
# in the full matrix (for a shortcut, in the identity or zero that it starts from). By the chain rule dL/dA = scale B^T G and
# dL/dB = scale G A^T. So x and d tell all of them, for modules that are off as for those that are on, and any backward
# pass will do, that of an ordinary training step too.

READINGS = {  # what a proxy can ask for: (scale A, scale B, x (n, t, d_in), d (n, t, d_out)) -> its value for this batch
    "dA": lambda sA, sB, x, d: (d @ sB).flatten(0, 1).T @ x.flatten(0, 1),  # (r_max, d_in)
    "dB": lambda sA, sB, x, d: d.flatten(0, 1).T @ (x @ sA.T).flatten(0, 1),  # (d_out, r_max)
    "G": lambda sA, sB, x, d: d.flatten(0, 1).T @ x.flatten(0, 1),  # (d_out, d_in)
    # a batch's loss is the mean of its examples' losses l_i, so n d_i belongs to l_i
    "fisher_B": lambda sA, sB, x, d: (len(x) * d.transpose(1, 2) @ (x @ sA.T)).square().sum(0),  # sum_i (dl_i/dB)^2 (d_out, r_max)
}


class Recording:
    """Readings of every module off the backward passes inside `with recording:`, one batch each, as a whole or in parts. The passes
    compute what they would without it, but that gradients may add up in another order.

    reads: keys of READINGS. A value is the mean over the batches, "fisher_B" the sum (of a module that is used once a pass). "G"
    takes the memory of the hosts' weights.
    """

    def __init__(self, adapters, reads):
        self.adapters, self.reads, self.batches, self.sums = adapters, reads, 0, {}
        self.share = 1.0  # of the batch's examples, in this backward pass, whose loss is multiplied by it
        for name, lora in adapters.items():  # zeros, for a module that the loss does not depend on
            self._add(name, *(lora.A.new_zeros(1, 0, width) for width in (lora.A.shape[1], lora.B.shape[0])))

    @torch.no_grad()
    def _add(self, name, x, d):
        lora = self.adapters[name]
        x, d = (t.reshape(len(t), math.prod(t.shape[1:-1]), t.shape[-1]) for t in (x, d))
        d, sA, sB = (t.to(x.dtype) for t in (d, lora.scale * lora.A, lora.scale * lora.B))  # under autocast they may differ
        for key in self.reads:
            if key == "dA" and (name, key) in self.sums and not lora.B.any():
                continue  # it is zero
            value = READINGS[key](sA, sB, x, d / self.share if key == "fisher_B" else d).to(lora.A.dtype)
            self.sums[name, key] = self.sums[name, key].add_(value) if (name, key) in self.sums else value

    def __enter__(self):
        for name, lora in self.adapters.items():
            lora.tap = functools.partial(self._add, name)
        return self

    def __exit__(self, *_):
        self.batches += 1
        for lora in self.adapters.values():
            lora.tap = None

    def read(self, name, key):
        """One reading of one module. Raises ValueError if nothing was recorded, or not that, FloatingPointError if it is not finite."""
        if not self.batches or key not in self.reads:
            raise ValueError(f"{key} of {name} was not recorded: {self.batches} batches, readings {', '.join(self.reads) or 'none'}")
        value = self.sums[name, key] / (1 if key == "fisher_B" else self.batches)
        if not value.isfinite().all():
            raise FloatingPointError(f"{key} of {name} is not finite")
        return value


@contextlib.contextmanager
def _scoring(model, adapters, ghosts=True):
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    kept = [(lora, {key: vars(lora)[key] for key in ("rank", "scale", "ghost")}) for lora in adapters.values()]
    try:
        with torch.random.fork_rng():
            model.eval()
            for p, _, _ in parameters:
                p.grad = None
            for lora in adapters.values():
                lora.ghost = ghosts
            yield
    finally:
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for module, training in modes:
            module.training = training
        for lora, values in kept:
            vars(lora).update(values)


def record(model, adapters, batches, loss_fn, reads):
    """One forward and backward pass a batch, in eval mode, with the model as it is -> Recording. Leaves the model as it was."""
    recording = Recording(adapters, reads)
    with _scoring(model, adapters, ghosts=False):
        model.requires_grad_(False)  # the taps alone ask for gradients
        for batch in batches:
            with recording:
                loss_fn(model, batch).backward()
    return recording


PROXIES = {}  # name -> function(model, adapters, batches, loss_fn) -> {module name: score, or list of r_max scores, one a rank}


def proxy(name, *reads, degree=0):
    """Register a score; higher = keep. Either a function of one module and readings, or one that does as it likes:

        @proxy("mine", "dA", "dB")           @proxy("mine")
        def mine(lora, dA, dB):              def mine(model, adapters, batches, loss_fn):
            return score                         return {module name: score}

    A score is a number, or a list with one for each of the module's r_max ranks. The second form finds the model in eval mode (no
    dropout), without gradients, and with ghosts: what is off gets gradients in A and B and adds nothing. loss_fn(model, batch)
    -> scalar. Modes, gradients, requires_grad, ranks, scales and random state are put back after it; parameters it must not
    change. degree: of a score that is a gradient's norm (1), or its square (2), for HeteroLoRA's `scale`. PROXIES[name] takes (model,
    adapters, batches, loss_fn) for both forms; for the first, `batches` may be a Recording of training steps.
    """
    unknown = [key for key in reads if key not in READINGS]
    if unknown:
        raise ValueError(f"no reading {unknown[0]!r}; there are: {', '.join(READINGS)}")

    def register(function):
        if name in PROXIES:
            raise ValueError(f"there is a proxy {name!r} already")

        @functools.wraps(function)
        def pure(model, adapters, batches, loss_fn):
            if reads:
                recording = batches if isinstance(batches, Recording) else record(model, adapters, batches, loss_fn, reads)
                with torch.no_grad():
                    scores = {n: function(lora, *(recording.read(n, key) for key in reads)) for n, lora in adapters.items()}
            elif isinstance(batches, Recording):
                raise ValueError(f"proxy {name} cannot be read off training batches: it needs passes of its own")
            else:
                with _scoring(model, adapters):
                    scores = function(model, adapters, [*batches], loss_fn)
            return {n: torch.as_tensor(score, dtype=torch.double).tolist() for n, score in scores.items()}
        pure.reads, pure.degree = reads, degree
        PROXIES[name] = pure
        return pure
    return register


@proxy("constant")
def constant(model, adapters, batches, loss_fn):
    """1. Every module ties, ties are broken at random: a random allocation. In the paper, as the control. Cost: nothing."""
    return dict.fromkeys(adapters, 1.0)


@proxy("grad-norm", "dA", "dB", degree=1)
def grad_norm(lora, dA, dB):
    """|dL/dA|_F + |dL/dB|_F of the mean gradient over the batches. The paper's GRAD_NORM (official importance_testing/grad_norm.py).

    At B = 0 only scale |G A^T| is left, and E_A |dL/dB|^2 = scale^2 r / (3 d_in) |G|^2: wide inputs (fc2) are marked down, and for
    G of rank 1 the square varies by sqrt(2/r) with the draw of A. Cost: one forward and backward pass a batch.
    """
    return dA.norm() + dB.norm()


@proxy("snip", "dA", "dB")
def snip(lora, dA, dB):
    """sum |A * dL/dA| + sum |B * dL/dB|. The paper's SNIP (Lee et al. 2019, arXiv 1810.02340; official importance_testing/snip.py).

    At B = 0 exactly 0 for every module: dL/dA = scale B^T G = 0, and B is. Then only modules that lots put on leave B = 0,
    and they win for ever. Use it after a joint warm-up, once (static). Cost: one forward and backward pass a batch.
    """
    return (lora.A * dA).abs().sum() + (lora.B * dB).abs().sum()


_LINEAR = {  # SynFlow's flow must get through: what stands for the functions that are not linear
    F.embedding: lambda ids, table, *_, **__: table.new_ones(*ids.shape, table.shape[-1]),
    F.layer_norm: lambda x, shape, weight=None, bias=None, eps=None: (x if weight is None else x * weight) + (0 if bias is None else bias),
    F.scaled_dot_product_attention: lambda query, key, value, *_, **__: value.mean(-2, keepdim=True).expand(*query.shape[:-1], value.shape[-1]),
    **dict.fromkeys((F.softmax, torch.softmax, torch.Tensor.softmax), lambda x, dim, *_, **__: torch.full_like(x, 1 / x.shape[dim])),
    **dict.fromkeys((F.relu, F.gelu, F.silu, F.tanh, torch.relu, torch.tanh, torch.Tensor.relu, torch.Tensor.tanh), lambda x, *_, **__: x)}


class _Linearised(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return _LINEAR.get(function, function)(*args, **(kwargs or {}))


@proxy("synflow")
def synflow(model, adapters, batches, loss_fn):
    """sum |A * dR/dA| + sum |B * dR/dB| with R the sum of the outputs for one example of ones, all parameters replaced by their
    absolute values, in double precision. SynFlow as in its own paper (Tanaka et al. 2020, arXiv 2006.05467); named in the paper,
    whose official importance_testing/synflow.py takes the labels' loss for R, and keeps softmax and LayerNorm.

    On a copy made linear: embeddings and floating-point inputs are ones, relu, gelu, silu and tanh the identity (as ReLU is on
    positive numbers), LayerNorm keeps gain and bias but does not normalise, attention is uniform. So q and k, which only shape the
    attention, always score 0. At B = 0 exactly 0 for every module, with snip's lock-in. No data: the first batch gives shapes.
    Cost: one forward and backward pass of one batch in double precision.
    """
    twin, loras = copy.deepcopy((model, adapters))
    for p in twin.double().requires_grad_(False).parameters():
        p.abs_()
    weights, outputs = [p.requires_grad_() for lora in loras.values() for p in (lora.A, lora.B)], []

    def ones(x):
        return torch.ones_like(x, dtype=torch.double) if torch.is_tensor(x) and x.is_floating_point() else x
    twin.register_forward_pre_hook(lambda _, args, kwargs: (tuple(map(ones, args)), {key: ones(x) for key, x in kwargs.items()}), with_kwargs=True)
    twin.register_forward_hook(lambda _, args, output: outputs.append(output))
    with _Linearised():
        loss_fn(twin, batches[0])
        R = outputs[0][0].sum()
    flow = torch.autograd.grad(R, weights, materialize_grads=True) if R.requires_grad else [torch.zeros_like(p) for p in weights]
    products = [(p * g).abs().sum().item() for p, g in zip(weights, flow)]
    return {name: a + b for name, a, b in zip(loras, products[::2], products[1::2])}


@proxy("fisher", "fisher_B", degree=2)
def fisher(lora, fisher_B):
    """sum over examples i of |dl_i/dB|^2, dl_i/dB = scale d_i^T (x_i A^T): gradients of opposite sign do not cancel. Not in the paper; the
    official code lists a FISHER without implementing it, and that of activations (Theis et al. 2018, arXiv 1801.05787) is 0 at B = 0.

    At B = 0 positive. loss_fn must be a mean over examples, the first dimension of x. Cost: one forward and backward pass a batch.
    """
    return fisher_B.sum()


@proxy("ablation")
@torch.no_grad()
def ablation(model, adapters, batches, loss_fn):
    """Mean loss without the module minus mean loss with it, all others as they are: one that is on is switched off, one that is
    off is switched on with the values it kept. Not in the paper; the sound form of the official ALPHA_TEST, which scales the frozen path
    too and reads validation data. Negative where the module does harm.

    At B = 0 exactly 0 for every module. Cost: one forward pass a batch for each module, and one more.
    """
    def loss():
        return sum(loss_fn(model, batch).item() for batch in batches) / len(batches)
    now, scores = loss(), {}
    for name, lora in adapters.items():
        rank = lora.rank
        lora.rank = 0 if rank else lora.max_rank
        scores[name] = loss() - now if rank else now - loss()
        lora.rank = rank
    return scores


@proxy("path")
def path(model, adapters, batches, loss_fn):
    """-<G, dW> with G taken half way, at half of every scale: the module's share in the fall of the loss on the way from no dW to all
    dW, by the midpoint rule (integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365); of a module that is off, what it would
    add. Not in the paper. At full scale it says little, since training has brought <G, dW> = sum B * dL/dB near 0.

    At B = 0 exactly 0 for every module. Cost: one forward and backward pass a batch.
    """
    for lora in adapters.values():
        lora.scale /= 2
    halfway = record(model, adapters, batches, loss_fn, ["dB"])
    return {name: -2 * (lora.B * halfway.read(name, "dB")).sum() for name, lora in adapters.items()}


@proxy("host-grad", "G", degree=2)
def host_grad(lora, G):
    """|G|_F^2, G = dL/dW (d_out, d_in). Not in the paper. It needs no adapter, and knows no alpha, no width of A, no draw of A.

    At B = 0 positive. Cost: one forward and backward pass a batch, and d^T x for every module.
    """
    return G.square().sum()


@proxy("host-snip", "G")
def host_snip(lora, G):
    """sum |W * G|: SNIP of the host's own weight W. Not in the paper (GoRA, arXiv 2502.12171, takes the mean). Linears only: a shortcut
    has no host weight and scores 0, so it is bought last.

    At B = 0 positive. Cost: one forward and backward pass a batch, and d^T x for every module.
    """
    return 0.0 if lora.host is None else (lora.host.weight * G).abs().sum()


@proxy("spectral", "G", degree=2)
def spectral(lora, G):
    """[sigma_1(G)^2, ..., sigma_r_max(G)^2], a score for every rank: the first k sum to the most of |G|_F^2 that k ranks can catch,
    so sigma_k^2 is what the k-th rank adds. Not in the paper. Module by module their sum counts.

    At B = 0 positive. Cost: one forward and backward pass a batch, d^T x and the eigenvalues of G G^T for every module.
    """
    G = G if G.shape[0] <= G.shape[1] else G.T
    return torch.linalg.eigvalsh((G @ G.T).to(torch.promote_types(G.dtype, torch.float32))).flip(0)[:lora.max_rank].clamp(min=0)


# -------------------------------------------------------------------------------------------------- allocators

ALLOCATORS = {}  # name -> function(scores, costs, budget, generator) -> {module name: rank}


def allocator(name):
    """Register an allocation rule: @allocator("mine") def mine(scores, costs, budget, generator) -> {module name: rank}.

    scores: {name: number} or, at granularity "rank", {name: [number for each rank]}. costs: {name: [parameters of the first
    rank, of the second, ...]}, as long as the module's r_max. budget: parameters. generator: torch.Generator, for ties.
    Pure: it sees no model.
    """
    def register(function):
        if name in ALLOCATORS:
            raise ValueError(f"there is an allocator {name!r} already")
        ALLOCATORS[name] = function
        return function
    return register


def _decreasing(gains):
    """A rank can be on only if those before it are: one that is better than the last shares its gain with it (pooled averages)."""
    blocks = []  # [mean gain, ranks]
    for gain in gains:
        blocks.append([gain, 1])
        while len(blocks) > 1 and blocks[-1][0] > blocks[-2][0]:
            (g, n), (h, m) = blocks.pop(), blocks.pop()
            blocks.append([(g * n + h * m) / (n + m), n + m])
    return [gain for gain, ranks in blocks for _ in range(ranks)]


@allocator("greedy")
def greedy(scores, costs, budget, generator):
    """The paper's rule: best score first, taken while it fits, going on past what does not. A number buys a module whole
    (r_max) or not at all, as in the paper; a list of numbers buys its ranks one by one, first to last.

    Equal scores are taken in random order. The budget counts parameters; the official code counts modules.
    """
    items = []  # (score, module name, ranks that it buys)
    for name, score in scores.items():
        items += [(gain, name, 1) for gain in _decreasing(score)] if isinstance(score, (list, tuple)) else [(score, name, len(costs[name]))]
    items = [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]
    ranks = dict.fromkeys(scores, 0)
    for _, name, more in sorted(items, key=lambda item: -item[0]):  # sorted is stable: ties stay shuffled
        price = sum(costs[name][ranks[name]:ranks[name] + more])
        if price <= budget:
            ranks[name], budget = ranks[name] + more, budget - price
    return ranks


@allocator("uniform")
def uniform(scores, costs, budget, generator):
    """The baseline, plain LoRA: every module gets the same rank, the largest that fits; scores do not matter."""
    rank = max((len(c) for c in costs.values()), default=0)
    while rank and sum(sum(c[:rank]) for c in costs.values()) > budget:
        rank -= 1
    return {name: min(rank, len(c)) for name, c in costs.items()}


def _one_rank_each(costs, budget, order):
    """One rank for every module, then a second, and so on while the budget lasts; within a round the layers take their turn by order(layer, last)"""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in costs))
    names = sorted(costs, key=lambda name: order(layers.index(name.rpartition(".")[0]), len(layers) - 1))
    ranks = dict.fromkeys(costs, 0)
    for rank in range(max(map(len, costs.values()), default=0)):
        for name in names:
            if ranks[name] == rank < len(costs[name]) and costs[name][rank] <= budget:
                ranks[name], budget = rank + 1, budget - costs[name][rank]
    return ranks


@allocator("first-layers")
def first_layers(scores, costs, budget, generator):
    """A baseline: uniform as far as the budget goes, and what is left of it, or all if it is short, from the first layer on"""
    return _one_rank_each(costs, budget, lambda i, last: i)


@allocator("middle-layers")
def middle_layers(scores, costs, budget, generator):
    """A baseline: the same from the middle on"""
    return _one_rank_each(costs, budget, lambda i, last: abs(2 * i - last))


@allocator("last-layers")
def last_layers(scores, costs, budget, generator):
    """A baseline: the same from the last layer on"""
    return _one_rank_each(costs, budget, lambda i, last: -i)


# -------------------------------------------------------------------------------------------------- the search

class HeteroLoRA:
    """The paper's search: score every module, give the budget to the best, switch. Static: call `reallocate` once before
    training; dynamic: again every fraction of an epoch. What came of every call is in `history`.

    loss_fn(model, batch) -> scalar; batches must come from training data.
    pool         "combined" (the paper): LoRA modules and shortcuts compete in one list; "separated": each pool gets the share
                 of the budget that it has of the search space
    granularity  "module" (the paper): 0 or r_max ranks, a list of scores counts as its sum; "rank": any number of ranks, a
                 single score counts alike for each rank, so that the last module bought may be partly on
    order        "score" (the paper) or "density", score per parameter
    scale        shortcuts may have another lora.scale than LoRA, and gradients in A and B grow with it. So that all can share a
                 list: "in" (the paper), a score is of what an optimizer's step on A and B does, scale and all, and scores made
                 of G are multiplied by scale^degree; "out", of what a change of dW does, and scores made of dA and dB are divided by it
    """

    def __init__(self, model, adapters, budget, loss_fn, proxy="grad-norm", allocator="greedy", pool="combined", seed=0,
                 granularity="module", order="score", scale="in"):
        for what, name, known in (("proxy", proxy, PROXIES), ("allocator", allocator, ALLOCATORS), ("pool", pool, ("combined", "separated")),
                                  ("granularity", granularity, ("module", "rank")), ("order", order, ("score", "density")), ("scale", scale, ("in", "out"))):
            if name not in known:
                raise ValueError(f"no {what} {name!r}; there are: {', '.join(known)}")
        if not (0 <= budget <= size(adapters) and budget == int(budget)):
            raise ValueError(f"budget {budget:,}: it must be a whole number of parameters from 0 to {size(adapters):,}, the size of the search space")
        self.model, self.adapters, self.budget, self.loss_fn = model, adapters, budget, loss_fn
        self.proxy, self.allocator, self.pool = proxy, allocator, pool
        self.granularity, self.order, self.scale = granularity, order, scale
        self.generator = torch.Generator().manual_seed(seed)
        self.history, self.ever = [], dict.fromkeys(adapters, 0)  # ever: the highest rank that a module has had
        self.agree = lambda scores: scores  # several processes must agree on the scores; train.py averages them

    def gains(self, scores):
        """{name: score} -> what the allocator sees: one number a module, or one a rank, by granularity, order and scale"""
        gains, by_rank, proxy = {}, self.granularity == "rank", PROXIES[self.proxy]
        power = proxy.degree * ((self.scale == "in") - ("G" not in proxy.reads))
        for name, lora in self.adapters.items():
            score, unit = scores[name], lora.scale ** -power
            unit *= 1 if self.order == "score" else lora.price if by_rank else lora.price * lora.max_rank
            if by_rank:
                gains[name] = [part / unit for part in (score if isinstance(score, list) else [score / lora.max_rank] * lora.max_rank)]
            else:
                gains[name] = (sum(score) if isinstance(score, list) else score) / unit
        return gains

    def allocate(self, scores):
        """{name: score} -> {name: rank}. Raises ValueError if the allocator spends more than the budget."""
        gains = self.gains(scores)
        pools = [list(self.adapters)]
        if self.pool == "separated":
            pools = [[n for n, lora in self.adapters.items() if lora.shortcut == kind] for kind in (False, True)]
        ranks = {}
        for names in filter(None, pools):
            pool = {name: self.adapters[name] for name in names}
            share = self.budget * size(pool) // max(size(self.adapters), 1)
            costs = {name: [lora.price] * lora.max_rank for name, lora in pool.items()}
            if len(names) > 1 and self.proxy != "constant" and all(scores[name] == scores[names[0]] for name in names):
                advice = ". A score made of B is 0 while B = 0: use one that is not (grad-norm, fisher, host-grad, spectral), or train every module first (--warmup-steps)"
                warnings.warn(f"all {self.proxy} scores are {scores[names[0]]}: the allocation is a random draw" + advice * (scores[names[0]] == 0 and "G" not in PROXIES[self.proxy].reads))
            ranks |= ALLOCATORS[self.allocator]({name: gains[name] for name in names}, costs, share, self.generator)
        if spent(self.adapters, ranks) > self.budget:
            raise ValueError(f"allocator {self.allocator} spends {spent(self.adapters, ranks):,} of {self.budget:,} parameters")
        return dict.fromkeys(self.adapters, 0) | ranks

    def reallocate(self, batches, step=0):
        """Score on these batches (or a Recording), allocate, switch -> the new entry of `history`: step, scores (as the proxy gives
        them), ranks, parameters, on and off (names that came and went), changed (how many modules have another rank), jaccard and
        jaccard_first (overlap of the modules on now with those before and with the first; None the first time), seconds. Raises
        FloatingPointError if a score is not finite, ValueError if scores are missing or there are not r_max in a list."""
        start, last = time.perf_counter(), self.history[-1]["ranks"] if self.history else dict.fromkeys(self.adapters, 0)
        scores = self.agree(PROXIES[self.proxy](self.model, self.adapters, batches, self.loss_fn))
        for name, lora in self.adapters.items():
            parts = scores.get(name, ())
            parts = parts if isinstance(parts, (list, tuple)) else [parts] * lora.max_rank
            if len(parts) != lora.max_rank:
                raise ValueError(f"proxy {self.proxy} gives {len(parts)} scores for {name}: one is wanted, or {lora.max_rank}, one for each rank")
            if not all(map(math.isfinite, parts)):
                raise FloatingPointError(f"proxy {self.proxy} gives {scores[name]} for {name}: every score must be finite")
        ranks = self.allocate(scores)
        set_ranks(self.adapters, ranks)
        self.ever = {name: max(ever, ranks[name]) for name, ever in self.ever.items()}
        now, before, first = ({name for name, rank in r.items() if rank} for r in (ranks, last, self.history[0]["ranks"] if self.history else {}))
        self.history.append({
            "step": step, "scores": scores, "ranks": ranks, "parameters": spent(self.adapters, ranks),
            "on": [n for n in ranks if n in now - before], "off": [n for n in ranks if n in before - now],
            "changed": sum(ranks[n] != last[n] for n in ranks),
            **{key: None if not self.history else len(now & then) / len(now | then) if now | then else 1.0 for key, then in (("jaccard", before), ("jaccard_first", first))},
            "seconds": time.perf_counter() - start})
        return self.history[-1]
