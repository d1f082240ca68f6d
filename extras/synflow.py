"""The proxy `synflow` of the paper, registered on import.

It needs a model that is linear and whose weights are positive. So it works on a copy, and calls of
torch's functions are replaced while the copy runs.
"""

import copy

import torch
from torch.overrides import TorchFunctionMode

from heterolora import HeteroLoRA, proxy


@proxy("synflow", measure=None)
def synflow(model, adapters, batches, loss_fn):
    """SNIP without data, sum |A * dR/dA| + sum |B * dR/dB| (Tanaka et al. 2020, arXiv 2006.05467).

    R is the sum of one example's logits, on a copy that is linear and whose parameters are absolute
    values; tokens are embedded as ones. While B = 0 it is 0 for every module, as SNIP is.
    """
    twin, twin_adapters = copy.deepcopy((model, adapters))
    tensors = list(twin.double().parameters())
    for adapter in twin_adapters.values():
        tensors += adapter.buffers()  # what is frozen, as A and B of LoRA-XS
    for tensor in tensors:
        tensor.data.abs_()

    def flow(twin, batch):
        """Return R, the sum of the first example's logits."""
        with _Linearised() as linearised:
            R = loss_fn(twin, batch)
        if not linearised.has_seen_the_logits:
            raise ValueError("synflow: loss_fn must call cross_entropy or mse_loss with the logits")
        return R

    return HeteroLoRA(twin, twin_adapters, 0, flow, "snip").score(batches[:1])


class _Linearised(TorchFunctionMode):
    """Replace the functions of encoders by linear ones, the loss by the first example's logits.

    loss_fn must call cross_entropy or mse_loss with the logits. What is not listed stays as it is.
    """

    has_seen_the_logits = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.__name__
        x = args[0] if args else None
        if name == "linear":  # inputs that are no tokens, such as images, come in 32 bits
            return function(x.to(args[1].dtype), *args[1:], **kwargs)
        if name == "embedding":
            return args[1].new_ones(*x.shape, args[1].shape[1])
        if name == "layer_norm":  # gain and bias, which torch hands on as keywords
            return x * kwargs["weight"] + kwargs["bias"]
        if name == "scaled_dot_product_attention":  # uniform: the mean of the values
            return args[2].mean(-2, keepdim=True).expand_as(args[2])
        if name == "softmax":
            return torch.full_like(x, 1 / x.shape[-1])
        if name in ("relu", "gelu", "silu", "tanh"):  # what ReLU does to positive numbers
            return x
        if name == "sigmoid":  # x * sigmoid(x) is another way to write silu
            return torch.ones_like(x)
        if name in ("cross_entropy", "mse_loss"):
            self.has_seen_the_logits = True
            return x[0].sum()
        return function(*args, **kwargs)
