"""HeteroLoRA: spend a fixed budget of trainable parameters where a cheap gradient score says so.

The method of "Unlocking the Global Synergies in Low-Rank Adapters" (Zhang et al. 2024, arXiv
2406.14956; below "the paper"). Official code: github.com/ZixiBenZhang/lora_global_synergies.

An adapter adds a low-rank map dW to a frozen linear map W. Of its r_max ranks the first r are on:

    y = W x + dW x,    dW = scale * B[:, :r] A[:r],    scale = alpha / r_max

Layer l of the encoder (input x[l], output of its attention half f[l]) has four connections that can
carry an adapter too: two residual connections R = I + dW, and two new shortcuts S = 0 + dW. They
are named after the half whose input they start from; the first layer has no S_ffn:

    f[l]   = LN1(R_attn x[l] + Attention(x[l])   + S_ffn f[l-1])
    x[l+1] = LN2(R_ffn f[l]  + FeedForward(f[l]) + S_attn x[l])

The algorithm:

    1. inject     put an adapter into every linear and connection, freeze everything else
    2. score      give every adapter a number from the gradients of a few batches (a proxy)
    3. allocate   buy the adapters with the best scores until the budget is spent (an allocator)
    4. switch     turn those on and all others off; what is off keeps its values
    5. train      what is on, and the task's head (the caller's part)

A static search does steps 2 to 4 once, before training; a dynamic one again and again during it.

    code                         meaning                                 official code
    ----                         -------                                 -------------
    LoRA: A, B, scale            low-rank update of a linear map         LoRALayer
    LoRALinear, LoRAShortcut     a frozen module + its adapter           LoraLinear, ShortcutFrom...
    residual_attn, residual_ffn  R_attn, R_ffn                           residual_1, residual_2
    shortcut_attn, shortcut_ffn  S_attn, S_ffn                           shortcut_sa, shortcut_ffn
    rank                         how many ranks are on, 0 to r_max       disable_adapters
    score                        higher = keep                           importance
    budget                       adapter PARAMETERS of an allocation     a count of modules
    ranks                        an allocation: {module name: rank}      alloc_modules
"""

import contextlib
import dataclasses
import functools
import math
import warnings
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F

TARGETS = ("q", "k", "v", "o", "fc1", "fc2")  # the linears of model.py; inject takes any names
SHORTCUTS = ("residual_attn", "residual_ffn", "shortcut_attn", "shortcut_ffn")

# ------------------------------------------------------------------------------------ adapters


class LoRA(nn.Module):
    """dW = scale * B A (Hu et al. 2021, arXiv 2106.09685). Raises ValueError for a bad rank.

    A (r_max, d_in) starts as U(-1/sqrt(d_in), 1/sqrt(d_in)); B (d_out, r_max) at 0, so dW does too.
    Another kind of adapter has the same constructor, attributes and methods, and uses all that it
    trains in `forward`. Everything else (cost, scores, saving) follows from these.
    """

    def __init__(self, d_in, d_out, rank, alpha, generator=None):
        super().__init__()
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(f"rank {rank} for {d_in} -> {d_out}: want 1 to {min(d_in, d_out)}")
        bound = 1 / math.sqrt(d_in)
        self.A = nn.Parameter(torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.rank = rank  # how many ranks are on: the first ones; a state_dict does not have it
        self.max_rank = rank
        self.scale = alpha / rank  # fixed, so that switching a rank does not rescale the others

    def active(self, rank):
        """Return [(parameter, slices)]: of all that trains, what `rank` ranks use; 0: nothing."""
        return [(self.A, (slice(rank), slice(None))), (self.B, (slice(None), slice(rank)))]

    def attach(self, name, host, adapters):
        """For other kinds: read the host's weight, or share parameters of `adapters` before it."""

    def forward(self, x, rank=None):
        """x (..., d_in) -> dW x (..., d_out) with `rank` ranks; None: with those that are on"""
        rank = self.rank if rank is None else rank
        A = self.A[:rank].to(x.dtype)  # x may be in 16 bits; adapters are not
        B = self.B[:, :rank].to(x.dtype)
        return F.linear(F.linear(x, A) * self.scale, B)  # (..., d_in) -> (..., r) -> (..., d_out)


ADAPTERS = {"lora": LoRA}  # name -> kind; others can be added


class Adapted(nn.Module):
    """y = host(x) + dW x: the plain model's module, and an adapter beside it."""

    def __init__(self, host, adapter):
        super().__init__()
        self.host = host
        self.adapter = adapter

    def forward(self, x):
        """x (..., d_in) -> y (..., d_out), or None for nothing to add"""
        y = self.host(x)
        if self.adapter.rank == 0:
            return y
        dW_x = self.adapter(x)
        return dW_x if y is None else y + dW_x


class LoRALinear(Adapted):
    """y = W x + b + dW x with W and b frozen."""

    @property
    def weight(self):
        """Return W, whose dtype some models read (T5)."""
        return self.host.weight


class LoRAShortcut(Adapted):
    """A connection: y = x + dW x for a residual, dW x for a new shortcut, whose host gives None."""


# -------------------------------------------------------------------------------- search space


def inject(model, targets, shortcuts, rank, alpha, shortcut_alpha=None, seed=0, adapter=LoRA):
    """Put adapters into a model, in place, and freeze everything else: the paper's search space.

    targets are the last parts of the names of nn.Linear modules ("q", "v"), shortcuts those of the
    names of nn.Identity modules, as wide as model.config.hidden_size: residual connections, or new
    shortcuts if they return None. Initial values depend on seed, module's name and shape. Returns
    {module name: adapter}, all on; the optimizer needs them all. Raises ValueError for a name that
    matches nothing, a bad rank, or a second call.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, Adapted) for module in modules.values()):
        raise ValueError("this model has adapters already: inject once, then use set_ranks")
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    points = [name for name, module in modules.items() if isinstance(module, nn.Identity)]
    chosen = _find(targets, linears) + _find(shortcuts, points)
    shortcut_alpha = alpha if shortcut_alpha is None else shortcut_alpha
    adapters = {}
    for name in sorted(chosen, key=list(modules).index):  # the model's own order
        host = modules[name]
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if name in linears:
            new = adapter(host.in_features, host.out_features, rank, alpha, generator)
        else:
            D = model.config.hidden_size
            new = adapter(D, D, rank, shortcut_alpha, generator)
        new.attach(name, host, adapters)
        beside = next(host.parameters(), next(model.parameters()))  # devices may differ by module
        adapters[name] = new.to(beside.device)
    model.requires_grad_(False)
    for name, new in adapters.items():
        kind = LoRALinear if name in linears else LoRAShortcut
        model.set_submodule(name, kind(modules[name], new))
    return adapters


def _find(wanted, names):
    """Return the names whose last parts are wanted. Raises ValueError if one is not found."""
    known = {name.split(".")[-1] for name in names}
    for last in wanted:
        if last not in known:
            raise ValueError(f"the model has no {last!r}; it has: {', '.join(sorted(known))}")
    return [name for name in names if name.split(".")[-1] in wanted]


def set_ranks(adapters, ranks):
    """Switch an allocation {name: rank} on; names left out are off. Raises ValueError."""
    for name, rank in ranks.items():
        if name not in adapters:
            raise ValueError(f"no adapter is called {name!r}; there are: {', '.join(adapters)}")
        most = adapters[name].max_rank
        if type(rank) is not int or not 0 <= rank <= most:
            raise ValueError(f"rank {rank!r} for {name}: want a whole number from 0 to {most}")
    for name, adapter in adapters.items():
        adapter.rank = ranks.get(name, 0)


def active_blocks(adapters, ranks=None):
    """Return {parameter: slices}, what an allocation {name: rank} uses; None: what is on now."""
    blocks = {}
    for name, adapter in adapters.items():
        rank = adapter.rank if ranks is None else ranks.get(name, 0)
        for parameter, slices in adapter.active(rank):
            largest = blocks.get(parameter, slices)  # adapters may share it: it counts once
            if parameter[slices].numel() >= parameter[largest].numel():
                blocks[parameter] = slices
    return blocks


def cost(adapters, ranks=None):
    """Return the parameters of an allocation {name: rank}; None: of what is on now."""
    blocks = active_blocks(adapters, ranks)
    return sum(parameter[slices].numel() for parameter, slices in blocks.items())


def rank_costs(adapters):
    """Return {module name: [parameters that its first rank costs, its second, ...]}, each alone."""
    costs = {}
    for name, adapter in adapters.items():
        totals = [cost({name: adapter}, {name: rank}) for rank in range(adapter.max_rank + 1)]
        costs[name] = [totals[rank + 1] - totals[rank] for rank in range(adapter.max_rank)]
    return costs


# ------------------------------------------------------------------------------------- proxies


def adapter_gradients(adapter, x, d):
    """Return the gradients of an adapter's trainable parameters, as if all its ranks were on.

    x (..., d_in) is an adapted map's input, d = dL/dy (..., d_out) the gradient of its output. With
    G = dL/dW = d^T x (d_out, d_in), a sum over all tokens, a LoRA has the gradients
    dL/dA = scale B^T G (r_max, d_in) and dL/dB = scale G A^T (d_out, r_max).
    """
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    with torch.enable_grad():  # hooks run without
        output = adapter(x, adapter.max_rank)
    return torch.autograd.grad(output, parameters, d.to(output.dtype))


@contextlib.contextmanager
def recording(model, measure, sums):
    """Add measure(adapter, x, d), a list of tensors, to sums[adapter] in every backward pass.

    Gives a list that collects an autograd edge for every y, for autograd.grad. No value changes.
    """
    outputs = []

    def watch(module, inputs, y):
        """Keep an adapted map's input, and ask for the gradient of its output."""
        if not torch.is_grad_enabled():
            raise RuntimeError("an adapted module runs without gradients: no_grad, a checkpoint?")
        x = inputs[0].detach()
        version = x._version
        if y is None:  # a shortcut that is off: zeros change no sum, and have a gradient
            y = torch.zeros_like(x)
        if not y.requires_grad:  # nothing before y is trained: a leaf, so that backward gets here
            y = y.detach().requires_grad_()
        y = y.clone()  # y may be x itself, used elsewhere too; a leaf may not be changed in place

        def keep(d):
            """Add what x and d = dL/dy (..., d_out) give to the sums, in the backward pass."""
            if x._version != version:
                raise RuntimeError("the input of an adapted module was changed in place: no score")
            values = measure(module.adapter, x, d)
            before = sums.get(module.adapter, [0.0] * len(values))
            sums[module.adapter] = [old + new for old, new in zip(before, values, strict=True)]

        y.register_hook(keep)
        outputs.append(torch.autograd.graph.get_gradient_edge(y))
        return y

    hooks = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, Adapted)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


PROXIES = {}  # name -> function, see `proxy`; the paper's other one, SynFlow, is in extras/


def proxy(name, measure=adapter_gradients):
    """Register a function that scores modules: higher = keep: a number, or a list by rank.

    @proxy(name): function(adapter, *gradients), one for each of adapter.parameters() that trains,
    each a mean over batches or training steps. @proxy(name, measure): the same, but instead of
    gradients the tensors in the list that measure(adapter, x, d) returns.
    @proxy(name, None): function(model, adapters, batches, loss_fn) -> {name: score}.
    """

    def _register(function):
        PROXIES[name] = functools.partial(function)  # its own: a function may have several names
        PROXIES[name].measure = measure
        return function

    return _register


@proxy("constant", measure=None)
def constant(model, adapters, batches, loss_fn):
    """Score 1: every module ties, and ties are broken at random. The paper's control."""
    return dict.fromkeys(adapters, 1.0)


@proxy("grad-norm")
def grad_norm(adapter, *gradients):
    """|dL/dA| + |dL/dB|, Frobenius norms. The paper's GRAD_NORM; dL/dA is 0 while B = 0."""
    return sum(gradient.norm() for gradient in gradients)


@proxy("snip")
def snip(adapter, *gradients):
    """sum |A * dL/dA| + sum |B * dL/dB|. The paper's SNIP (Lee et al. 2019, arXiv 1810.02340).

    While B = 0 it is 0 for every module, since dL/dA = scale B^T G is 0 too: the first allocation
    is a random draw. Only the drawn modules train and leave B = 0, so they win ever after.
    """
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    return sum((p * g).abs().sum() for p, g in zip(parameters, gradients, strict=True))


# ---------------------------------------------------------------------------------- allocators

ALLOCATORS = {}  # name -> function(scores, costs, budget, generator) -> {name: rank}


def allocator(name):
    """Register an allocation rule: function(scores, costs, budget, generator) -> {name: rank}

    scores: {name: number, or a list with one for each rank}. costs: {name: [parameters of the first
    rank, of the second, ...]}. budget: parameters. generator: torch.Generator, for breaking ties.
    """

    def _register(function):
        ALLOCATORS[name] = function
        return function

    return _register


@allocator("greedy")
def greedy(scores, costs, budget, generator):
    """Take whole modules, best score first, and pass over what does not fit: the paper's rule."""
    totals = {}  # a list of scores counts as its sum
    for name, score in scores.items():
        totals[name] = sum(score) if isinstance(score, list) else score
    names = list(scores)
    names = [names[i] for i in torch.randperm(len(names), generator=generator)]
    ranks = dict.fromkeys(names, 0)
    for name in sorted(names, key=totals.get, reverse=True):  # stable: ties stay shuffled
        price = sum(costs[name])
        if price <= budget:
            ranks[name] = len(costs[name])
            budget -= price
    return ranks


# ---------------------------------------------------------------------------------- the search


@contextlib.contextmanager
def in_eval_mode(model):
    """Turn dropout off for a while, and leave the random state as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(range(torch.accelerator.device_count())):
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclasses.dataclass(eq=False)
class HeteroLoRA:
    """The paper's search. Each `reallocate` adds to `history`: step, scores, ranks, parameters."""

    model: nn.Module
    adapters: dict  # from `inject`
    budget: int  # parameters
    loss_fn: object  # loss_fn(model, batch) returns a scalar; batches must be training data
    proxy: str = "grad-norm"
    allocator: str = "greedy"
    seed: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.history = []
        self.recorded = {}  # sums over the training steps that were recorded since the last score
        self.recorded_steps = 0

    def record(self):
        """Record for `score` the forward and backward pass inside `with search.record():`."""
        measure = PROXIES[self.proxy].measure
        if measure is None:
            raise ValueError(f"{self.proxy} makes passes of its own: give batches to `score`")
        self.recorded_steps += 1
        return recording(self.model, measure, self.recorded)

    def score(self, batches=None):
        """Score on a list of batches, without dropout -> {module name: score}

        Without batches: score what training steps have recorded, and forget it. The model stays as
        it was. Raises FloatingPointError if a score is not finite, ValueError for nothing to score.
        """
        function = PROXIES[self.proxy]
        steps = self.recorded_steps if batches is None else len(batches)
        if steps == 0:
            raise ValueError("nothing to score: give batches, or record training steps first")
        if batches is None:
            scores = self._from_means(self.recorded, steps)
            self.recorded = {}
            self.recorded_steps = 0
        elif function.measure is None:
            with in_eval_mode(self.model):
                scores = function(self.model, self.adapters, batches, self.loss_fn)
        else:
            sums = {}
            with in_eval_mode(self.model):
                for batch in batches:
                    with recording(self.model, function.measure, sums) as outputs:
                        loss = self.loss_fn(self.model, batch)
                        if outputs:  # some adapted module was reached; this runs the hooks
                            torch.autograd.grad(loss, outputs, allow_unused=True)
            scores = self._from_means(sums, steps)
        for name, score in scores.items():
            score = torch.as_tensor(score, dtype=torch.double)
            if not score.isfinite().all():
                raise FloatingPointError(f"proxy {self.proxy} gives {score.tolist()} for {name}")
            scores[name] = score.tolist()
        if scores and not any(torch.as_tensor(score).any() for score in scores.values()):
            warnings.warn("all scores are 0: a random draw. B = 0? Use another proxy", stacklevel=1)
        return scores

    @torch.no_grad()
    def _from_means(self, sums, steps):
        scores = dict.fromkeys(self.adapters, 0.0)  # 0 stays where the loss does not reach
        for name, adapter in self.adapters.items():
            if adapter in sums:
                means = [total / steps for total in sums[adapter]]
                scores[name] = PROXIES[self.proxy](adapter, *means)
        return scores

    def allocate(self, scores):
        """Buy ranks with the budget -> {module name: rank}. Raises ValueError if it is exceeded."""
        allocate = ALLOCATORS[self.allocator]
        ranks = dict.fromkeys(self.adapters, 0)
        ranks |= allocate(scores, rank_costs(self.adapters), self.budget, self.generator)
        if cost(self.adapters, ranks) > self.budget:
            raise ValueError(f"allocator {self.allocator} spends more than {self.budget:,}")
        return ranks

    def switch(self, ranks):
        """Turn an allocation on, and everything else off."""
        set_ranks(self.adapters, ranks)

    def reallocate(self, batches=None, step=0, scores=None):
        """Score, if no scores are given, allocate and switch -> the new entry of `history`"""
        scores = scores or self.score(batches)
        ranks = self.allocate(scores)
        self.switch(ranks)
        spent = cost(self.adapters, ranks)
        self.history.append({"step": step, "scores": scores, "ranks": ranks, "parameters": spent})
        return self.history[-1]
