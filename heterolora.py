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
import math
import time
import warnings
import weakref
import zlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

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
        bound = 1 / math.sqrt(d_in)
        self.A = nn.Parameter(torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.scale, self.max_rank, self.rank = alpha / rank, rank, rank
        self.shortcut = False  # LoRAShortcut says otherwise; the separated pools ask
        self.merged = False
        self.ghost = False  # while scoring: ranks that are off give gradients, but no value
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
        return self.merged or (self.rank == 0 and not self.ghost)

    def _delta(self, x, ranks):
        return F.linear(F.linear(x, self.A[ranks]), self.B[:, ranks]) * self.scale  # (..., d_in) -> (..., r) -> (..., d_out)

    def forward(self, x):
        """x (..., d_in) -> dW x (..., d_out)"""
        if not self.ghost or self.rank == self.max_rank:
            return self._delta(x, slice(0, self.rank))
        ghost = self._delta(x.detach(), slice(self.rank, None))  # detached: else the layers below would get gradients through it
        ghost = ghost - ghost.detach()
        return self._delta(x, slice(0, self.rank)) + ghost if self.rank else ghost


class LoRALinear(nn.Module):
    """y = W x + b + dW x with W and b frozen"""

    def __init__(self, host, lora):
        super().__init__()
        self.host, self.lora = host, lora

    def forward(self, x):
        """x (..., d_in) -> (..., d_out)"""
        y = self.host(x)
        return y if self.lora.idle else y + self.lora(x)

    @torch.no_grad()
    def merge(self):
        """Fold dW into the host's weight: the same function without its cost. Raises RuntimeError if done already."""
        if self.lora.merged:
            raise RuntimeError("merged already; call unmerge first")
        self.original = self.host.weight.data  # kept, so that unmerge is exact
        ranks = slice(0, self.lora.rank)
        self.host.weight.data = self.original + self.lora.scale * self.lora.B[:, ranks] @ self.lora.A[ranks]
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
        return delta if not self.identity else x if delta is None else x + delta


# Why hooks: to an optimizer a rank is a slice of A and of B. Its gradient is zero while it is off, not None, and AdamW's
# momentum and weight decay move what has a zero gradient.
def _keep_off_ranks(*_):
    for lora in LoRA.everywhere:
        off = (lora.A.detach()[lora.rank:], lora.B.detach()[:, lora.rank:])
        # a module that is off as a whole has no gradient as a rule, and nothing would move it; a closure makes gradients later
        lora.kept = [(part, part.clone()) for part, whole in zip(off, (lora.A, lora.B)) if part.numel() and (lora.rank or whole.grad is not None)]


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
    points = {name: m for name, m in modules.items() if isinstance(m, nn.Identity) or not (type(m).__module__.startswith("torch.") or [*m.parameters()])}
    chosen = {}
    for wanted, among, what in ((targets, linears, "linear module"), (shortcuts, points, "connection point")):
        for last in wanted:
            matches = {name: m for name, m in among.items() if name.split(".")[-1] == last}
            if not matches:
                known = sorted({name.split(".")[-1] for name in among})
                raise ValueError(f"no {what} is called {last!r}; the model has: {', '.join(known)}")
            chosen |= matches
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapters = {}
    for name in (name for name in modules if name in chosen):  # the model's own order, not that of the arguments
        old, generator = modules[name], torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        if isinstance(old, nn.Linear):
            lora = LoRA(old.in_features, old.out_features, rank, alpha, generator).to(old.weight.device)
            new = LoRALinear(old, lora)
        else:
            width = model.config.hidden_size
            lora = LoRA(width, width, rank, alpha if shortcut_alpha is None else shortcut_alpha, generator)
            new = LoRAShortcut(lora.to(next(model.parameters()).device), identity=isinstance(old, nn.Identity))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)
        adapters[name] = lora
    return adapters


def set_ranks(adapters, ranks):
    """Switch an allocation {name: rank} on; names left out are off. Values of A and B stay. Raises ValueError."""
    unknown = [name for name in ranks if name not in adapters]
    if unknown:
        raise ValueError(f"no adapter is called {unknown[0]!r}; there are: {', '.join(adapters)}")
    for name, rank in ranks.items():
        if not 0 <= rank <= adapters[name].max_rank:
            raise ValueError(f"rank {rank} for {name}: it must be from 0 to {adapters[name].max_rank}")
        if adapters[name].merged:
            raise ValueError(f"{name} is merged into its host: unmerge it before its rank changes")
    for name, lora in adapters.items():
        lora.rank = ranks.get(name, 0)


def spent(adapters, ranks=None):
    """Parameters of an allocation, of what is on now if it is None"""
    return sum(lora.price * (lora.rank if ranks is None else ranks.get(name, 0)) for name, lora in adapters.items())


def size(adapters):
    """Parameters of the whole search space, all ranks on"""
    return sum(lora.price * lora.max_rank for lora in adapters.values())


def parse_budget(text, largest):
    """"25%" or "0.25": that share of `largest` parameters; a whole number over 1: that many -> int. Raises ValueError."""
    advice = f"give a share such as 25% or 0.25, or from 2 to {largest:,} parameters (all there are)"
    try:
        number = float(str(text).rstrip().removesuffix("%").replace(",", ""))
    except ValueError:
        raise ValueError(f"budget {text!r} is not a number: {advice}") from None
    share = number / 100 if str(text).rstrip().endswith("%") else number if number <= 1 else None
    if not 0 <= number < math.inf or (share or 0) > 1 or number > largest and share is None or share is None and number % 1:
        raise ValueError(f"budget {text!r} is out of range: {advice}")
    return int(number) if share is None else math.floor(share * largest + 1e-6)


def grid(adapters, ranks=None):
    """An allocation as text: layers down, module types across, ranks in the cells (. = off), parameters at the edges"""
    ranks = {name: lora.rank for name, lora in adapters.items()} if ranks is None else ranks
    rows = list(dict.fromkeys(name.rpartition(".")[0] for name in adapters))
    kinds = [*dict.fromkeys(name.rpartition(".")[2] for name in sorted(adapters, key=lambda n: adapters[n].shortcut))]

    def total(names):
        return f"{sum(adapters[n].price * ranks.get(n, 0) for n in names if n in adapters):,}"
    table = [["", *kinds, "parameters"]]
    for row in rows:
        names = [f"{row}.{kind}".lstrip(".") for kind in kinds]
        table.append([row, *("" if n not in adapters else str(ranks.get(n, 0) or ".") for n in names), total(names)])
    table.append(["parameters", *(total([f"{row}.{kind}".lstrip(".") for row in rows]) for kind in kinds), total(adapters)])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in table)


# -------------------------------------------------------------------------------------------------- proxies

PROXIES = {}  # name -> function(model, adapters, batches, loss_fn) -> {module name: score}


def proxy(name):
    """Register a score under a name: @proxy("mine") def mine(model, adapters, batches, loss_fn) -> {module name: score}.

    Higher = keep. loss_fn(model, batch) -> scalar tensor. The function finds the model in eval mode (no dropout), without
    gradients, and with ghosts: modules that are off get gradients but add nothing, so the model is scored as it is. Modes,
    gradients, requires_grad, ranks and random state are put back afterwards; parameters it must leave alone itself.
    """
    def register(function):
        if name in PROXIES:
            raise ValueError(f"there is a proxy {name!r} already")

        def pure(model, adapters, batches, loss_fn):
            with _scoring(model, adapters):
                return function(model, adapters, batches, loss_fn)
        pure.__doc__, pure.__name__ = function.__doc__, function.__name__
        PROXIES[name] = pure
        return pure
    return register


@contextlib.contextmanager
def _scoring(model, adapters):
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    state = [(lora, lora.rank, lora.ghost) for lora in adapters.values()]
    try:
        with torch.random.fork_rng():
            model.eval()
            for p, _, _ in parameters:
                p.grad = None
            for lora in adapters.values():
                lora.ghost = True
            yield
    finally:
        for p, requires_grad, grad in parameters:
            p.requires_grad_(requires_grad)
            p.grad = grad
        for m, training in modes:
            m.training = training
        for lora, rank, ghost in state:
            lora.rank, lora.ghost = rank, ghost


@proxy("constant")
def constant(model, adapters, batches, loss_fn):
    """1 for every module: ties, broken at random, so a random allocation. In the paper, as the control. Costs nothing."""
    return dict.fromkeys(adapters, 1.0)


@proxy("grad-norm")
def grad_norm(model, adapters, batches, loss_fn):
    """|dL/dA|_F + |dL/dB|_F of the mean gradient over the batches (the paper's GRAD_NORM; official importance_testing/grad_norm.py).

    With G = dL/dW (d_out, d_in) of the adapted map: dL/dA = scale B^T G (r, d_in), dL/dB = scale G A^T (d_out, r).
    At B = 0 only the second is left, and E_A |dL/dB|^2 = scale^2 r / (3 d_in) |G|^2: wide inputs (fc2) are marked down.
    Modules that are on and off are scored alike. Cost: one forward and backward pass a batch.
    """
    total = {name: (torch.zeros_like(lora.A), torch.zeros_like(lora.B)) for name, lora in adapters.items()}
    wanted = [p for lora in adapters.values() for p in (lora.A, lora.B)]
    for batch in batches:
        gradients = iter(torch.autograd.grad(loss_fn(model, batch), wanted))
        for sum_A, sum_B in total.values():
            sum_A += next(gradients) / len(batches)
            sum_B += next(gradients) / len(batches)
    return {name: (sum_A.norm() + sum_B.norm()).item() for name, (sum_A, sum_B) in total.items()}


# -------------------------------------------------------------------------------------------------- allocators

ALLOCATORS = {}  # name -> function(scores, costs, budget, generator) -> {module name: rank}


def allocator(name):
    """Register an allocation rule: @allocator("mine") def mine(scores, costs, budget, generator) -> {module name: rank}.

    scores: {name: score}. costs: {name: [parameters of the first rank, of the second, ...]}, as long as the module's
    r_max. budget: parameters. generator: torch.Generator, for ties. Pure: it sees no model.
    """
    def register(function):
        if name in ALLOCATORS:
            raise ValueError(f"there is an allocator {name!r} already")
        ALLOCATORS[name] = function
        return function
    return register


@allocator("greedy")
def greedy(scores, costs, budget, generator):
    """The paper's rule: best score first, each module whole (r_max) or not at all, going on past what no longer fits.

    Equal scores are taken in random order. The budget counts parameters; the official code counts modules.
    """
    names = list(scores)
    names = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    ranks = dict.fromkeys(scores, 0)
    for name in sorted(names, key=lambda n: -scores[n]):  # sorted is stable: ties stay shuffled
        price = sum(costs[name])
        if price <= budget:
            ranks[name], budget = len(costs[name]), budget - price
    return ranks


@allocator("uniform")
def uniform(scores, costs, budget, generator):
    """The baseline, plain LoRA: every module gets the same rank, the largest that fits; scores do not matter."""
    rank = max((len(c) for c in costs.values()), default=0)
    while rank and sum(sum(c[:rank]) for c in costs.values()) > budget:
        rank -= 1
    return {name: min(rank, len(c)) for name, c in costs.items()}


# -------------------------------------------------------------------------------------------------- the search

class HeteroLoRA:
    """The paper's search: score every module, give the budget to the best, switch. Static: call `reallocate` once before
    training; dynamic: again every fraction of an epoch. What came of every call is in `history`.

    pool "combined" (the paper): LoRA modules and shortcuts compete in one list; "separated": each pool gets the share of the
    budget that it has of the search space. loss_fn(model, batch) -> scalar; batches must come from training data.
    """

    def __init__(self, model, adapters, budget, loss_fn, proxy="grad-norm", allocator="greedy", pool="combined", seed=0):
        for what, name, known in (("proxy", proxy, PROXIES), ("allocator", allocator, ALLOCATORS), ("pool", pool, ("combined", "separated"))):
            if name not in known:
                raise ValueError(f"no {what} {name!r}; there are: {', '.join(known)}")
        if not 0 <= budget <= size(adapters):
            raise ValueError(f"budget {budget:,}: it must be from 0 to {size(adapters):,}, the size of the search space")
        self.model, self.adapters, self.budget, self.loss_fn = model, adapters, budget, loss_fn
        self.proxy, self.allocator, self.pool = proxy, allocator, pool
        self.generator = torch.Generator().manual_seed(seed)
        self.history, self.ever = [], dict.fromkeys(adapters, 0)  # ever: the highest rank that a module has had

    def allocate(self, scores):
        """{name: score} -> {name: rank}. Raises ValueError if the allocator spends more than the budget."""
        pools = [list(self.adapters)]
        if self.pool == "separated":
            pools = [[n for n, lora in self.adapters.items() if lora.shortcut == kind] for kind in (False, True)]
        ranks = {}
        for names in pools:
            pool = {name: self.adapters[name] for name in names}
            share = self.budget * size(pool) // max(size(self.adapters), 1)
            costs = {name: [lora.price] * lora.max_rank for name, lora in pool.items()}
            ranks |= ALLOCATORS[self.allocator]({name: scores[name] for name in names}, costs, share, self.generator)
        if spent(self.adapters, ranks) > self.budget:
            raise ValueError(f"allocator {self.allocator} spends {spent(self.adapters, ranks):,} of {self.budget:,} parameters")
        return {name: ranks.get(name, 0) for name in self.adapters}

    def reallocate(self, batches, step=0):
        """Score on these batches, allocate, switch -> the new entry of `history`: step, scores, ranks, parameters, on and
        off (names that came and went), changed (how many modules have another rank), jaccard (of the modules on now and before;
        None the first time), seconds. Raises FloatingPointError if a score is not finite."""
        start, last = time.perf_counter(), self.history[-1]["ranks"] if self.history else dict.fromkeys(self.adapters, 0)
        scores = PROXIES[self.proxy](self.model, self.adapters, batches, self.loss_fn)
        bad = [name for name in self.adapters if not math.isfinite(scores.get(name, math.nan))]
        if bad:
            raise FloatingPointError(f"proxy {self.proxy} gives {scores.get(bad[0])} for {bad[0]}: every module needs a finite score")
        if len(scores) > 1 and len(set(scores.values())) == 1 and self.proxy != "constant":
            warnings.warn(f"all {self.proxy} scores are {next(iter(scores.values()))}: the allocation is a random draw. A score made of "
                          "B is 0 while B = 0; use one that is not, such as grad-norm.")
        ranks = self.allocate(scores)
        set_ranks(self.adapters, ranks)
        self.ever = {name: max(ever, ranks[name]) for name, ever in self.ever.items()}
        now, before = ({name for name, rank in r.items() if rank} for r in (ranks, last))
        self.history.append({
            "step": step, "scores": scores, "ranks": ranks, "parameters": spent(self.adapters, ranks),
            "on": [n for n in ranks if n in now - before], "off": [n for n in ranks if n in before - now],
            "changed": sum(ranks[n] != last[n] for n in ranks),
            "jaccard": None if not self.history else len(now & before) / len(now | before) if now | before else 1.0, "seconds": time.perf_counter() - start})
        return self.history[-1]
