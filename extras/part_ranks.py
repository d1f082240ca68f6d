"""Training modules that are partly on: some of their ranks train, and the others must not move.

`hold_off_ranks` is enough for ranks that stay off. A rank that comes on late needs `RankAdamW`:
torch.optim.AdamW corrects the bias of the moments by one step count for the whole parameter. The
rank would find a high count and moments near 0, hence no correction, and its first steps would be
about (1 - beta1) / sqrt(1 - beta2) = 3 times as long as those of a new parameter. With whole
modules this cannot happen: one that is off has no gradient, and waits.
"""

import contextlib

import torch

from heterolora import active_blocks


@contextlib.contextmanager
def hold_off_ranks(adapters):
    """Keep ranks that are off as they are, bit for bit: `with hold_off_ranks(adapters): step()`.

    It is needed where a module is partly on: ranks that were bought singly, plain LoRA below r_max,
    a joint warm-up. The gradient of the other ranks is 0, but momentum and weight decay would still
    move them. A module that is off as a whole has no gradient, if `zero_grad` sets it to None, and
    optimizers skip it.
    """
    before = {}
    for parameter, part in active_blocks(adapters).items():
        if parameter.grad is not None and parameter[part].numel() < parameter.numel():
            before[parameter] = part, parameter.detach().clone()
    yield
    for parameter, (part, values) in before.items():
        values[part] = parameter.detach()[part]
        parameter.data.copy_(values)


class RankAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that leaves ranks that are off alone.

    state["step"] has a count for every element. What is off keeps its value, moments and count.
    groups: as for torch.optim.AdamW, without amsgrad and maximize.
    """

    def __init__(self, groups, adapters):
        super().__init__(groups)
        self.adapters = adapters

    def load_state_dict(self, state_dict):
        """Put a state back; one of torch.optim.AdamW too, which has one count for a parameter."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if state:
                counts = state["step"].to(parameter.device, torch.float64)
                state["step"] = counts.expand_as(parameter).clone()

    @torch.no_grad()
    def step(self):
        """Take one step."""
        blocks = active_blocks(self.adapters)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # the head has no block: all of it is on
                    self._step_part(parameter, blocks.get(parameter, ...), group)

    def _step_part(self, parameter, part, group):
        """Take AdamW's step with a part of a parameter. All its tensors are changed in place."""
        state = self.state[parameter]
        if not state:
            # In 32 bits 1 - beta^step would lose digits.
            state["step"] = torch.zeros_like(parameter, dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        steps = state["step"][part]
        m = state["exp_avg"][part]
        v = state["exp_avg_sq"][part]
        gradient = parameter.grad[part]

        beta1, beta2 = group["betas"]
        steps += 1
        m.lerp_(gradient, 1 - beta1)
        v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        m_hat = m / (1 - beta1**steps).to(m.dtype)
        v_hat = v / (1 - beta2**steps).to(v.dtype)
        parameter[part] *= 1 - group["lr"] * group["weight_decay"]
        parameter[part] -= group["lr"] * m_hat / (v_hat.sqrt() + group["eps"])

    def forget(self, parameter, part):
        """Begin anew with a part of a parameter, as if it had never trained."""
        for values in self.state[parameter].values():
            values[part] = 0


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
