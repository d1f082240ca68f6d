"""Training modules that are partly on: some of their ranks train, and the others must not move.

`hold_off_ranks` is enough for ranks that stay off. A rank that comes on late needs `RankAdamW`:
torch.optim.AdamW has one step count for a parameter, and divides the moments by what they lack
while the count is small. The rank would find a high count and moments near 0, and its first steps
would be about 3 times as long as those of a new parameter. With whole modules this cannot happen:
one that is off has no gradient, and waits.
"""

import contextlib

import torch

from heterolora import active_blocks


def partly_on(adapters):
    """Return {parameter: slices} for parameters that have a gradient and are not wholly on."""
    blocks = active_blocks(adapters)
    with_gradient = {p: part for p, part in blocks.items() if p.grad is not None}
    return {p: part for p, part in with_gradient.items() if p[part].numel() < p.numel()}


@contextlib.contextmanager
def hold_off_ranks(adapters):
    """Keep ranks that are off as they are, bit for bit: `with hold_off_ranks(adapters): step()`.

    This is for allocators that buy single ranks. Where a part is on, the gradient of the rest is 0,
    and momentum and weight decay would still move it. A module that is off as a whole has no
    gradient, if `zero_grad` sets it to None, and optimizers skip it.
    """
    partly = partly_on(adapters)
    before = {parameter: parameter.detach().clone() for parameter in partly}
    yield
    for parameter, part in partly.items():
        before[parameter][part] = parameter.detach()[part]
        parameter.data.copy_(before[parameter])


class RankAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that leaves ranks that are off alone.

    A parameter of which only a part is on, or ever was, has a count for every element in
    state["step"]. What is off keeps its value, moments and count. All other parameters are left to
    torch. groups: as for torch.optim.AdamW, without amsgrad and maximize.
    """

    def __init__(self, groups, adapters):
        super().__init__(groups)
        self.adapters = adapters

    @torch.no_grad()
    def step(self):
        """Take one step."""
        partly = partly_on(self.adapters)
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter in partly or self._counts_elements(parameter):
                    is_on = torch.zeros_like(parameter, dtype=torch.bool)
                    is_on[partly.get(parameter, ...)] = True
                    self._step_elements(parameter, is_on, group)
                    gradients[parameter] = parameter.grad
                    parameter.grad = None  # hides it from torch
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient

    def forget(self, parameter, part):
        """Begin anew with a part of a parameter, as if it had never trained."""
        state = self.state[parameter]
        if state:
            steps = state["step"].to(parameter.device, torch.float64)
            state["step"] = steps.expand_as(parameter).clone()
            for values in state.values():
                values[part] = 0

    def _counts_elements(self, parameter):
        state = self.state.get(parameter, {})
        return "step" in state and state["step"].dim() > 0

    def _step_elements(self, parameter, is_on, group):
        """Take AdamW's step with the elements in the mask is_on, of the parameter's shape."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        # In 32 bits 1 - beta^step would lose digits.
        steps = state["step"].to(parameter.device, torch.float64).expand_as(parameter).clone()
        steps[is_on] += 1
        state["step"] = steps

        beta1, beta2 = group["betas"]
        gradient = parameter.grad[is_on]
        m = state["exp_avg"][is_on].lerp(gradient, 1 - beta1)
        v = state["exp_avg_sq"][is_on] * beta2 + gradient.square() * (1 - beta2)
        state["exp_avg"][is_on] = m
        state["exp_avg_sq"][is_on] = v

        m_hat = m / (1 - beta1 ** steps[is_on]).to(m.dtype)
        v_hat = v / (1 - beta2 ** steps[is_on]).to(v.dtype)
        decayed = parameter[is_on] * (1 - group["lr"] * group["weight_decay"])
        parameter[is_on] = decayed - group["lr"] * m_hat / (v_hat.sqrt() + group["eps"])


def move_ranks(adapter, order, optimizer):
    """Put an adapter's ranks into another order, with the optimizer's state: rank order[0] first.

    For kinds of adapters whose parameters have one axis for ranks.
    """
    for parameter, slices in adapter.active(1):  # cuts the axis of the ranks alone
        axis = slices.index(slice(1))
        moments = [m for m in optimizer.state.get(parameter, {}).values() if m.dim() > 0]
        for tensor in [parameter.data, *moments]:
            index = torch.tensor(order, device=tensor.device)
            tensor.copy_(tensor.index_select(axis, index))
