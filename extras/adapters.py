"""Other kinds of adapters for --adapter, registered on import. Most train less than LoRA.

Each has the constructor, attributes and methods of heterolora.LoRA. `active` lists all that trains,
in an order that stays, as saved blocks are numbered by it. Its last parameter with values has a
gradient at the start, which the score `fisher` needs. `attach` also sees hosts on the meta device,
whose weights have no values (`uniform_costs`): assign new tensors there, and change none in place.
What is frozen is made again from the seed and the checkpoint, and is not saved.
W (d_out, d_in) is the weight of the frozen linear.
"""

import bisect
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import InputError
from extras.adalora import START
from extras.allocators import BY_LAYERS
from extras.flags import whole_number
from heterolora import ADAPTERS, cost, inject


class Adapter(nn.Module):
    """dW = scale * B' A', where a kind says in `factors` what A' and B' are.

    Raises ValueError for a bad rank.
    """

    def __init__(self, d_in, d_out, rank, alpha):
        super().__init__()
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(f"rank {rank} for {d_in} -> {d_out}: want 1 to {min(d_in, d_out)}")
        self.d_in = d_in
        self.d_out = d_out
        self.rank = rank
        self.max_rank = rank
        self.scale = alpha / rank

    def attach(self, name, host, adapters):
        """Read the host's weight, or share parameters of `adapters`; most kinds do neither."""

    def factors(self, rank):
        """Return A' (rank, d_in) and B' (d_out, rank)."""
        raise NotImplementedError

    def forward(self, x, rank=None):
        """x (..., d_in) -> dW x (..., d_out)"""
        A, B = self.factors(self.rank if rank is None else rank)
        return F.linear(F.linear(x, A.to(x.dtype)) * self.scale, B.to(x.dtype))


def uniform_draw(rows, columns, bound, generator):
    """Return a parameter (rows, columns) drawn from U(-bound, bound)."""
    values = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(values)


class TiedLoRA(Adapter):
    """dW = scale * diag(v) B diag(u) A, where layers share A (r, d_in) and B (d_out, r).

    Tied-LoRA (Renduchintala et al. 2024, arXiv 2311.09578). Linears of one type, such as all q,
    share; u (r,) and v (d_out,) are each module's own. `trained` says which of the four train.
    With A and B frozen it is a relative of VeRA (Kopiczko et al. 2024, arXiv 2310.11454). VeRA
    shares one A and one B among all types, starts u at 0.1, and has no factor alpha / r, so its
    learning rates do not carry over.

    Our choice, since the papers differ: A as in LoRA, u = 1. If B trains, B = 0 and v = 1; else B
    is drawn from U(-1/sqrt(r), 1/sqrt(r)), v = 0, and v must train. So dW starts at 0.
    """

    def __init__(self, d_in, d_out, rank, alpha, generator=None, trained=("A", "B", "u", "v")):
        super().__init__(d_in, d_out, rank, alpha)
        if "B" not in trained and "v" not in trained:
            raise ValueError(f"trained {trained}: B or v must train, or dW stays 0")
        self.A = uniform_draw(rank, d_in, 1 / math.sqrt(d_in), generator)
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.u = nn.Parameter(torch.ones(rank))
        self.v = nn.Parameter(torch.ones(d_out))
        if "B" not in trained:
            self.B = uniform_draw(d_out, rank, 1 / math.sqrt(rank), generator)
            nn.init.zeros_(self.v)
        self.trained = trained
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)

    def attach(self, name, host, adapters):
        """Take A and B from the first module of the same type and shape."""
        for other_name, other in adapters.items():
            is_same_type = other_name.split(".")[-1] == name.split(".")[-1]
            is_same_shape = (other.d_in, other.d_out) == (self.d_in, self.d_out)
            if is_same_type and is_same_shape:
                self.A = other.A
                self.B = other.B
                return

    def active(self, rank):
        """Return [(parameter, slices)] of what trains. v belongs to no rank: the first one pays."""
        first = slice(rank)
        every = slice(None)
        blocks = {"A": (self.A, (first, every)), "u": (self.u, (first,))}
        blocks["v"] = (self.v, (every,) if rank > 0 else (slice(0),))
        blocks["B"] = (self.B, (every, first))
        return [block for name, block in blocks.items() if name in self.trained]

    def factors(self, rank):
        return self.u[:rank, None] * self.A[:rank], self.v[:, None] * self.B[:, :rank]


class PRoLoRA(Adapter):
    """dW = scale * B A, whose A and B repeat a small chunk along their width, rotated.

    PRoLoRA (Wang et al. 2024, arXiv 2402.16902). Row i of chunk k is row i + k * stride of the
    first chunk, counted round: the chunks differ in the order of their ranks. The stride is
    floor(shared ranks that are on / chunks), at least 1. So one rank more changes what the others
    do, and a search should buy whole modules. (A single shared rank cannot rotate.) A few ranks
    are `unshared`, and are as in LoRA. Initial values as in LoRA. Our choice: A and B have as many
    chunks each, where the paper lets them differ.
    """

    def __init__(self, d_in, d_out, rank, alpha, generator=None, chunks=4, unshared=1):
        super().__init__(d_in, d_out, rank, alpha)
        self.chunks = chunks
        self.unshared = min(unshared, rank)
        shared = rank - self.unshared
        bound = 1 / math.sqrt(d_in)
        self.own_A = uniform_draw(self.unshared, d_in, bound, generator)
        self.own_B = nn.Parameter(torch.zeros(d_out, self.unshared))
        self.chunk_A = uniform_draw(shared, math.ceil(d_in / chunks), bound, generator)
        self.chunk_B = nn.Parameter(torch.zeros(math.ceil(d_out / chunks), shared))

    def active(self, rank):
        """Return [(parameter, slices)]. The first ranks are the unshared ones."""
        own = slice(min(rank, self.unshared))
        shared = slice(rank - own.stop)
        every = slice(None)
        return [
            (self.own_A, (own, every)),
            (self.own_B, (every, own)),
            (self.chunk_A, (shared, every)),
            (self.chunk_B, (every, shared)),
        ]

    def unroll(self, chunk, width, rank_axis):
        """Return the chunk and its rotations side by side, cut to `width`."""
        stride = max(chunk.shape[rank_axis] // self.chunks, 1)
        rotated = [torch.roll(chunk, -k * stride, rank_axis) for k in range(self.chunks)]
        return torch.cat(rotated, 1 - rank_axis).narrow(1 - rank_axis, 0, width)

    def factors(self, rank):
        own_A, own_B, chunk_A, chunk_B = [part[slices] for part, slices in self.active(rank)]
        A = torch.cat([own_A, self.unroll(chunk_A, self.d_in, 0)])
        B = torch.cat([own_B, self.unroll(chunk_B, self.d_out, 1)], 1)
        return A, B


class LoRAXS(Adapter):
    """dW = scale * B R A with a core R (r, r) that trains, between frozen A and B.

    LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604). With W = U S V^T, A is the first r rows of S V^T
    and B the first r columns of U. (The paper writes x W^T, with x as a row: its U and V are those
    of W^T, its A is our A^T, its B our B^T.) R starts as N(0, 1e-5^2). Rank r costs r^2 parameters
    in all, so the r-th one adds 2r - 1.
    """

    def __init__(self, d_in, d_out, rank, alpha, generator=None):
        super().__init__(d_in, d_out, rank, alpha)
        self.R = nn.Parameter(1e-5 * torch.randn(rank, rank, generator=generator))
        # `attach` fills A and B. They are not saved, as they follow from the checkpoint.
        self.register_buffer("A", torch.zeros(rank, d_in), persistent=False)
        self.register_buffer("B", torch.zeros(d_out, rank), persistent=False)

    def attach(self, name, host, adapters):
        """Make A and B of the host's weight. Raises ValueError if it has none."""
        if not isinstance(host, nn.Linear):
            raise ValueError(f"LoRA-XS needs a weight, and {name} has none: use --shortcuts none")
        U, S, Vh = torch.linalg.svd(host.weight.detach().float(), full_matrices=False)
        largest = U.abs().argmax(0, keepdim=True)
        signs = U.gather(0, largest).sign()  # (1, d), as singular vectors have no sign of their own
        self.B = (U * signs)[:, : self.max_rank].contiguous()
        self.A = (S[:, None] * signs.T * Vh)[: self.max_rank].contiguous()

    def active(self, rank):
        """Return [(R, slices)]."""
        return [(self.R, (slice(rank), slice(rank)))]

    def factors(self, rank):
        return self.R[:rank, :rank] @ self.A[:rank], self.B[:, :rank]


class SVDLoRA(Adapter):
    """dW = scale * B diag(E) A: AdaLoRA's form (Zhang et al. 2023, arXiv 2303.10512).

    Its paper writes P Lambda Q. A and B start as N(0, 0.02^2), E (r,) at 0, and so does dW.
    """

    def __init__(self, d_in, d_out, rank, alpha, generator=None):
        super().__init__(d_in, d_out, rank, alpha)
        self.A = nn.Parameter(0.02 * torch.randn(rank, d_in, generator=generator))
        self.E = nn.Parameter(torch.zeros(rank))
        self.B = nn.Parameter(0.02 * torch.randn(d_out, rank, generator=generator))

    def active(self, rank):
        """Return [(parameter, slices)]."""
        first = slice(rank)
        every = slice(None)
        return [(self.A, (first, every)), (self.B, (every, first)), (self.E, (first,))]

    def factors(self, rank):
        return self.E[:rank, None] * self.A[:rank], self.B[:, :rank]


ADAPTERS["tied"] = TiedLoRA
ADAPTERS["tied-abu"] = functools.partial(TiedLoRA, trained=("A", "B", "u"))  # v costs d_out each
ADAPTERS["vera"] = functools.partial(TiedLoRA, trained=("u", "v"))
ADAPTERS["prolora"] = PRoLoRA
ADAPTERS["prolora-shared"] = functools.partial(PRoLoRA, unshared=0)  # for small budgets
ADAPTERS["xs"] = LoRAXS
ADAPTERS["svd"] = SVDLoRA
TIED = ("tied", "tied-abu")  # kinds whose modules share what trains


def uniform_costs(encoder, targets, shortcuts, kind):
    """Return [parameters of the whole search space with rank 1, with rank 2, ...].

    Parameters that modules share count once.
    """
    with torch.device("meta"):
        twin = type(encoder)(encoder.config)  # shapes without values
    most = min(encoder.config.hidden_size, encoder.config.intermediate_size)
    adapters = inject(twin, targets, shortcuts, most, 1.0, adapter=kind)
    return [cost(adapters, dict.fromkeys(adapters, rank)) for rank in range(1, most + 1)]


def choose_kind(args, encoder, targets, shortcuts):
    """Return the kind of --adapter, and fill in a --rank that was left out. Raises InputError."""
    settle_kind(args)
    kind = ADAPTERS[args.adapter]
    if args.rank is None:
        args.rank = usual_rank(args, encoder, targets, shortcuts, kind)
    return kind


def check_what_trains(adapters):
    """Raise InputError unless `active` lists what trains, and nothing for rank 0."""
    for name, adapter in adapters.items():
        kind = type(adapter).__name__
        listed = {parameter for parameter, _ in adapter.active(adapter.max_rank)}
        if listed != {parameter for parameter in adapter.parameters() if parameter.requires_grad}:
            raise InputError(f"{kind}: `active` has to list what trains, and nothing else")
        if cost({name: adapter}, {name: 0}) > 0:
            raise InputError(f"{kind}: `active(0)` has to leave all out, as rank 0 is off")


def settle_kind(args):
    """Fill in adalora's --adapter. Raises InputError if it does not go with the other flags."""
    if args.method == "adalora" and args.adapter == "lora":
        args.adapter = "svd"
    own_kind = {"alora": "lora", "adalora": "svd"}.get(args.method, args.adapter)
    if args.adapter != own_kind:
        raise InputError(f"--method {args.method} has its own adapters: leave --adapter out")
    is_bought = args.method in ("static", "dynamic") or args.allocator in BY_LAYERS
    if args.adapter in TIED and is_bought:
        reason = f"modules of {args.adapter} share A and B, and cannot be bought one by one"
        advice = "use --method lora without an --allocator"
        in_compare = f"in extras.compare the contender lora:adapter={args.adapter}"
        raise InputError(f"{reason}: {advice}; {in_compare}")
    if args.init == "gradient" and args.adapter != "lora":
        raise InputError(f"--init gradient is for LoRA, and not for --adapter {args.adapter}")


def usual_rank(args, encoder, targets, shortcuts, kind):
    """Return the rank if no --rank was given: 8, or what a budget in parameters allows.

    adalora: the first rank that costs at least START times the budget everywhere. lora with another
    kind than LoRA: the largest that fits everywhere; one more if the allocator goes by layers, as
    some layers can have it. A budget larger than the search space is lowered to that. A budget such
    as 25% cannot choose the rank, as it is a share of the space that the rank makes.
    """
    budget = whole_number(str(args.budget))
    if budget is not None and args.method == "adalora":
        costs = uniform_costs(encoder, targets, shortcuts, kind)
        return min(bisect.bisect_left(costs, START * budget) + 1, len(costs))
    if budget is not None and args.method == "lora" and args.adapter != "lora":
        costs = uniform_costs(encoder, targets, [], kind)
        rank = bisect.bisect_right(costs, budget)
        if args.allocator in BY_LAYERS:  # some layers can have one more
            rank = min(rank + 1, len(costs))
        if rank == 0:
            least = f"rank 1 of {args.adapter} costs {costs[0]:,}"
            raise InputError(f"--budget {budget:,} buys nothing: {least} on these --targets")
        args.budget = min(budget, costs[-1])
        return rank
    return 8
