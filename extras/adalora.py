"""--method adalora: begin with too many ranks, and drop the least sensitive while training.

AdaLoRA (Zhang et al. 2023, arXiv 2303.10512). Every rank is a triplet: a number E_i, a row of A and
a column of B. dW = scale * B diag(E) A is kept close to a singular value decomposition by a term
of the loss. (So the logged loss is larger than that of other methods.) It starts with the whole
search space on. If the budget is a number and no --rank is given, the rank makes that START times
the budget, or a little more.

After the first INITIAL of the steps, the triplets are scored after every step, and the worst get
E_i = 0. They still have a gradient, and can come back. The number of parameters that stay falls
along a cubic curve to the budget. For the last FINAL of the steps the choice is final.

What differs from the paper: the schedule counts parameters, not ranks, so that modules of any
shape end within the budget; its ends are shares of the steps; a choice is made after every step,
and not after every Delta_T; what the last one drops is off from then on; the term of the loss is a
mean of norms, as in the authors' code, where the paper sums squares; sensitivities are taken after
the step, with the step's gradient, as in that code too.
"""

import torch

from extras.part_ranks import move_ranks
from heterolora import HeteroLoRA, cost, rank_costs, set_ranks

START = 1.5  # times the budget is on at the start, as in the paper, if no rank is given
INITIAL, FINAL = 0.17, 0.5  # shares of the steps: before the first choice, after the last one
BETA1 = BETA2 = 0.85  # how slowly the means of sensitivity and of its uncertainty change
ORTHOGONALITY = 0.1  # weight of that term (gamma)


class AdaLoRA(HeteroLoRA):
    """The search of AdaLoRA, over adapters of kind "svd". `follow` ties it to an optimizer.

    `history` has two entries at the end: everything on at the start, and the last choice.
    `recorded` holds for every adapter [mean sensitivity, uncertainty] of A, B and E in turn, and
    `recorded_steps` counts the steps, so that they are saved and resumed as those of a score are.
    """

    def follow(self, optimizer, total):
        """Work after each of the optimizer's `total` steps, and add a term to loss_fn -> self"""
        self.optimizer = optimizer
        self.first_choice = round(INITIAL * total)
        self.last_choice = total - round(FINAL * total)
        everything = {name: adapter.max_rank for name, adapter in self.adapters.items()}
        self.all_parameters = cost(self.adapters, everything)
        plain_loss = self.loss_fn
        self.loss_fn = lambda model, batch: plain_loss(model, batch) + self.penalty()
        optimizer.register_step_post_hook(self.after_step)
        return self

    def penalty(self):
        """Return the orthogonality term: the mean of |A A^T - I| and |B^T B - I|, times gamma."""
        distances = []
        for adapter in self.adapters.values():
            if adapter.rank > 0:
                A, B, _ = [parameter[slices] for parameter, slices in adapter.active(adapter.rank)]
                identity = torch.eye(adapter.rank, device=A.device)
                distances += [(A @ A.T - identity).norm(), (B.T @ B - identity).norm()]
        return ORTHOGONALITY * torch.stack(distances).mean() if distances else 0.0

    def allowed(self, step):
        """Return how many parameters may be on after a step: all, then fewer, then the budget."""
        if step <= self.first_choice:
            return self.all_parameters
        if step >= self.last_choice:
            return self.budget
        left = 1 - (step - self.first_choice) / (self.last_choice - self.first_choice)
        return int(self.budget + (self.all_parameters - self.budget) * left**3)

    @torch.no_grad()
    def after_step(self, optimizer, args, kwargs):
        """Count a step, update the means, and mask triplets; in the last step, switch them off."""
        is_final = len(self.history) > 1
        if is_final:
            return
        self.recorded_steps += 1
        for adapter in self.adapters.values():
            self.recorded[adapter] = self.sensitivities(adapter)
        if self.recorded_steps >= self.last_choice:
            # This runs inside hold_off_ranks, which holds nothing: all ranks have been on so far.
            self.reallocate(step=self.recorded_steps)
        elif self.recorded_steps > self.first_choice:
            kept = self.choose(self.score(), self.allowed(self.recorded_steps))
            for name, adapter in self.adapters.items():
                _, _, (E, _) = adapter.active(adapter.max_rank)
                E[all_but(adapter, kept[name])] = 0

    def sensitivities(self, adapter):
        """Return the mean |p * dL/dp| over steps and its mean deviation, of A, B and E in turn."""
        before = self.recorded.get(adapter)
        after = []
        for i, (parameter, _) in enumerate(adapter.active(adapter.max_rank)):
            sensitivity = torch.zeros_like(parameter)
            if parameter.grad is not None:  # it has none where the loss does not come by
                sensitivity = (parameter * parameter.grad).abs()
            mean, uncertainty = torch.zeros_like(sensitivity), torch.zeros_like(sensitivity)
            if before:
                mean, uncertainty = before[2 * i : 2 * i + 2]
            mean = BETA1 * mean + (1 - BETA1) * sensitivity
            deviation = (sensitivity - mean).abs()
            after += [mean, BETA2 * uncertainty + (1 - BETA2) * deviation]
        return after

    @torch.no_grad()
    def score(self, batches=None):
        """Return {module name: [score of every triplet]}: s(E_i) + mean s(A_i) + mean s(B_i).

        s is the mean sensitivity times its uncertainty. Before training it is 0 for each.
        """
        if not self.history:
            return dict.fromkeys(self.adapters, 0.0)
        scores = {}
        for name, adapter in self.adapters.items():
            A_mean, A_dev, B_mean, B_dev, E_mean, E_dev = self.recorded[adapter]
            total = E_mean * E_dev + (A_mean * A_dev).mean(1) + (B_mean * B_dev).mean(0)
            scores[name] = total.tolist()
        return scores

    def allocate(self, scores):
        """Return {module name: rank}: everything at first, then the best within the budget."""
        if not self.history:
            return {name: adapter.max_rank for name, adapter in self.adapters.items()}
        self.kept = self.choose(scores, self.budget)  # which ones: ranks only says how many
        return {name: len(triplets) for name, triplets in self.kept.items()}

    def switch(self, ranks):
        """Turn the triplets on that `allocate` kept, which come first now, and all others off."""
        if self.history:
            for name, adapter in self.adapters.items():
                kept = self.kept[name]
                move_ranks(adapter, kept + all_but(adapter, kept), self.optimizer)
        set_ranks(self.adapters, ranks)

    def choose(self, scores, allowed):
        """Return {module name: its best triplets}: the best of all that cost no more than allowed.

        With one that does not fit the choice goes on to cheaper ones. All triplets of a module
        cost the same.
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


def all_but(adapter, triplets):
    """Return all triplets of an adapter but these."""
    return [k for k in range(adapter.max_rank) if k not in triplets]
