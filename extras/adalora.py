"""--method adalora: begin with too many ranks, and drop the least sensitive while training.

AdaLoRA (Zhang et al. 2023, arXiv 2303.10512). Every rank is a triplet: a number E_i, a row of A and
a column of B. dW = scale * B diag(E) A is kept close to a singular value decomposition by a term
of the loss. After every step the triplets are scored, and the worst get E_i = 0. They still have
a gradient, and can come back. How many parameters stay falls along a cubic curve to the budget,
and FINAL of the steps before the end the choice is final.

What differs from the paper: the schedule counts parameters, not ranks, so that modules of any
shape end within the budget; and the choice stays the same after its last step.
"""

import torch

from extras.part_ranks import move_ranks
from heterolora import HeteroLoRA, cost, rank_costs

START = 1.5  # times the budget, at least, is on at the start
INITIAL, FINAL = 0.17, 0.5  # shares of the steps: before the first choice, after the last one
BETA1 = BETA2 = 0.85  # how slowly the means of sensitivity and of its uncertainty change
ORTHOGONALITY = 0.1  # weight of that term (gamma)


class AdaLoRA(HeteroLoRA):
    """The search of AdaLoRA, over adapters of kind "svd". `follow` ties it to an optimizer.

    `recorded` holds for every adapter [mean sensitivity, uncertainty] of E, A and B in turn, and
    `recorded_steps` counts the steps, so that they are saved and resumed as those of a score are.
    """

    def follow(self, optimizer, total):
        """Work after every step of the optimizer, of which there will be `total` -> self"""
        self.first = round(INITIAL * total)
        self.last = total - round(FINAL * total)
        everything = {name: adapter.max_rank for name, adapter in self.adapters.items()}
        self.most = cost(self.adapters, everything)
        plain_loss = self.loss_fn
        self.loss_fn = lambda model, batch: plain_loss(model, batch) + self.penalty()
        optimizer.register_step_post_hook(self.after_step)
        return self

    def reallocate(self, batches=None, step=0):
        """Turn everything on -> the new entry of `history`"""
        ranks = {name: adapter.max_rank for name, adapter in self.adapters.items()}
        return self.note(ranks, dict.fromkeys(ranks, 0.0), step)

    def note(self, ranks, scores, step):
        """Switch an allocation on -> its entry of `history`"""
        self.switch(ranks)
        spent = cost(self.adapters, ranks)
        self.history.append({"step": step, "scores": scores, "ranks": ranks, "parameters": spent})
        return self.history[-1]

    def penalty(self):
        """Return the orthogonality term: the mean of |A A^T - I| and |B^T B - I|, times gamma."""
        distances = []
        for adapter in self.adapters.values():
            if adapter.rank > 0:
                A, _, B = [parameter[slices] for parameter, slices in adapter.active(adapter.rank)]
                identity = torch.eye(adapter.rank, device=A.device)
                distances += [(A @ A.T - identity).norm(), (B.T @ B - identity).norm()]
        return ORTHOGONALITY * torch.stack(distances).mean() if distances else 0.0

    def allowed(self, step):
        """Return how many parameters may be on after a step: all, then fewer, then the budget."""
        budget = min(self.budget, self.most)
        if step <= self.first:
            return self.most
        if step >= self.last:
            return budget
        left = 1 - (step - self.first) / (self.last - self.first)
        return int(budget + (self.most - budget) * left**3)

    @torch.no_grad()
    def after_step(self, optimizer, *_):
        """Count a step: update the means, mask triplets, and at the last choice switch them off."""
        if len(self.history) > 1:  # the last choice was made
            return
        self.recorded_steps += 1
        for adapter in self.adapters.values():
            self.recorded[adapter] = self.sensitivities(adapter)
        if self.recorded_steps <= self.first:
            return
        scores = self.score()
        kept = self.choose(scores, self.allowed(self.recorded_steps))
        for name, adapter in self.adapters.items():
            _, (E, _), _ = adapter.active(adapter.max_rank)
            dropped = [k for k in range(adapter.max_rank) if k not in kept[name]]
            E[dropped] = 0
            if self.recorded_steps >= self.last:
                move_ranks(adapter, kept[name] + dropped, optimizer)
        if self.recorded_steps >= self.last:
            ranks = {name: len(chosen) for name, chosen in kept.items()}
            self.note(ranks, scores, self.recorded_steps)

    def sensitivities(self, adapter):
        """Return the mean |p * dL/dp| over steps and its mean deviation, of A, E and B in turn."""
        before = self.recorded.get(adapter)
        after = []
        for i, (parameter, _) in enumerate(adapter.active(adapter.max_rank)):
            sensitivity = (parameter * parameter.grad).abs()
            mean, uncertainty = torch.zeros_like(sensitivity), torch.zeros_like(sensitivity)
            if before:
                mean, uncertainty = before[2 * i : 2 * i + 2]
            mean = BETA1 * mean + (1 - BETA1) * sensitivity
            deviation = (sensitivity - mean).abs()
            after += [mean, BETA2 * uncertainty + (1 - BETA2) * deviation]
        return after

    def score(self, batches=None):
        """Return {module name: [score of every triplet]}: s(E_i) + mean s(A_i) + mean s(B_i).

        s is the mean sensitivity times its uncertainty.
        """
        scores = {}
        for name, adapter in self.adapters.items():
            A_mean, A_dev, E_mean, E_dev, B_mean, B_dev = self.recorded[adapter]
            total = E_mean * E_dev + (A_mean * A_dev).mean(1) + (B_mean * B_dev).mean(0)
            scores[name] = total.tolist()
        return scores

    def choose(self, scores, allowed):
        """Return {module name: its best triplets}: the best of all that cost no more than allowed.

        With one that does not fit the choice goes on to cheaper ones.
        """
        costs = rank_costs(self.adapters)
        triplets = [(score, name, k) for name in scores for k, score in enumerate(scores[name])]
        kept = {name: [] for name in scores}
        for _, name, k in sorted(triplets, reverse=True):
            price = costs[name][k]
            if price <= allowed:
                kept[name].append(k)
                allowed -= price
        return kept
