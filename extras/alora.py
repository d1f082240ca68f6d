"""--method alora: ranks move from where they matter least, measured by leaving each one out.

ALoRA (Liu et al. 2024, arXiv 2403.16187). There is no public code; this follows the paper's text.

1. Buy a rank for every module, from the middle layers outwards, then a second, while the budget
   lasts, and train. --rank is the most that a module can grow to.
2. At every interval, score all ranks, drop the worst, and give what they cost to modules that lost
   none, as new ranks. After ROUNDS rounds the ranks stay.

The score of rank k is loss(without k) - loss(with k alone). The paper's is S(M) - S(M without k)
+ S(M with k alone). With S = -loss that is ours, but for S(M), which is the same for all ranks.

Here `ranks` says how many ranks of a module are on. A number k, as in `dropped`, says which one.

Our choices, where the paper is silent, or asks for more than short runs have:

- The interval is --realloc-every.
- The examples are SCORE_EXAMPLES new ones from the training set in every round, not one fixed
  validation batch.
- An eighth of the ranks at the start is dropped each time.
- A rank that is new stays for a round, as its B is still near 0.
- The scale does not depend on how many ranks are on.
- Modules grow in the order of their mean score.
- What no module can take in one round is offered again in the next one. The paper loses it.
"""

import contextlib
import math
import statistics

import torch

from extras.allocators import middle_layers
from extras.part_ranks import move_ranks
from heterolora import HeteroLoRA, cost, in_eval_mode, rank_costs, set_ranks

SCORE_EXAMPLES = 32  # rounded up to whole batches
SHARE = 1 / 8  # of the ranks of the start, dropped in a round
ROUNDS = 8


class ALoRA(HeteroLoRA):
    """The search of ALoRA. `follow` tells it the optimizer.

    history[0] is the start, and every round adds an entry. `allocate` sets `dropped`, {module name:
    [k, ...]}, and `switch` moves these ranks out of the way.
    """

    def follow(self, optimizer):
        """Remember a RankAdamW, whose state moves with the ranks -> self"""
        self.optimizer = optimizer
        return self

    def reallocate(self, batches=None, step=0, scores=None):
        """Make the start, or move ranks -> the new entry of `history`, None after all rounds."""
        if len(self.history) > ROUNDS:
            return None
        return super().reallocate(batches, step, scores)

    def score(self, batches=None):
        """Return {module name: [score of every rank that is on]}; before training 0 for each."""
        if not self.history:
            return dict.fromkeys(self.adapters, 0.0)
        scores = {}
        with in_eval_mode(self.model), torch.no_grad():
            for name, adapter in self.adapters.items():
                scores[name] = []
                for k in range(adapter.rank):
                    others = [other for other in range(adapter.rank) if other != k]
                    with muted(adapter, [k]):
                        without = self.loss(batches)
                    with alone(self.adapters, name), muted(adapter, others):
                        with_it_alone = self.loss(batches)
                    scores[name].append(without - with_it_alone)
                if not all(map(math.isfinite, scores[name])):
                    raise FloatingPointError(f"ALoRA gives {scores[name]} for {name}")
        return scores

    def loss(self, batches):
        """Return the mean loss."""
        return sum(self.loss_fn(self.model, batch).item() for batch in batches) / len(batches)

    def allocate(self, scores):
        """Drop the worst ranks, give new ones to modules that lost none -> {module name: rank}"""
        self.dropped = {}
        costs = rank_costs(self.adapters)
        if not self.history:
            return middle_layers(scores, costs, self.budget, None)
        ranks = dict(self.history[-1]["ranks"])
        n_dropped = max(1, round(SHARE * sum(self.history[0]["ranks"].values())))
        for _, name, k in sorted(self.candidates(scores))[:n_dropped]:
            self.dropped.setdefault(name, []).append(k)
            ranks[name] -= 1

        means = {}  # of the modules that may grow; one that is off comes last
        for name in self.adapters:
            if name not in self.dropped:
                means[name] = statistics.mean(scores[name]) if scores[name] else -math.inf
        best_first = sorted(means, key=means.get, reverse=True)
        left = self.budget - cost(self.adapters, ranks)
        has_grown = True
        while has_grown:  # in rounds: nobody gets a second rank before all have been offered one
            has_grown = False
            for name in best_first:
                rank = ranks[name]
                if rank < len(costs[name]) and costs[name][rank] <= left:
                    ranks[name] += 1
                    left -= costs[name][rank]
                    has_grown = True
        return ranks

    def candidates(self, scores):
        """Return [(score, module name, k)] of all ranks but those that the last round bought."""
        now = self.history[-1]["ranks"]
        before = self.history[-2]["ranks"] if len(self.history) > 1 else now
        found = []
        for name in self.adapters:
            n_old = min(now[name], before[name])  # new ranks stand behind these
            for k in range(n_old):
                found.append((scores[name][k], name, k))
        return found

    def switch(self, ranks):
        """Move dropped ranks behind those that stay, begin new ones afresh, and turn ranks on."""
        for name, adapter in self.adapters.items():
            dropped = self.dropped.get(name, [])
            kept = [k for k in range(adapter.max_rank) if k not in dropped]
            if dropped:
                move_ranks(adapter, kept + dropped, self.optimizer)
            if self.history:
                for k in range(adapter.rank, ranks[name]):
                    self.begin_rank(adapter, k)
        set_ranks(self.adapters, ranks)

    def begin_rank(self, adapter, k):
        """Give rank k new initial values, as LoRA's, and a state of the optimizer that is new."""
        (A, _), (B, _) = adapter.active(adapter.max_rank)
        bound = 1 / math.sqrt(A.shape[1])
        row = torch.empty(A.shape[1]).uniform_(-bound, bound, generator=self.generator)
        A.data[k] = row.to(A)
        B.data[:, k] = 0
        for parameter, part in ((A, k), (B, (slice(None), k))):
            self.optimizer.forget(parameter, part)


@contextlib.contextmanager
def muted(adapter, which):
    """Leave these ranks of a LoRA out: their columns of B are 0 for a while."""
    (_, _), (B, _) = adapter.active(adapter.max_rank)
    before = B.data.clone()
    B.data[:, which] = 0
    try:
        yield
    finally:
        B.data.copy_(before)


@contextlib.contextmanager
def alone(adapters, name):
    """Turn all modules off but one."""
    ranks = {other: adapter.rank for other, adapter in adapters.items()}
    set_ranks(adapters, {name: ranks[name]})
    try:
        yield
    finally:
        set_ranks(adapters, ranks)
