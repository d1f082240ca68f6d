"""Faster arithmetic for the encoder on a CPU: the same model, swapped in place by `accelerate`.

model.py says what is computed, this file computes it faster. Three things are slow there on a CPU:
attention, whose fused kernel knows no dropout and is slow on short sequences; random numbers for
dropout; and nn.Linear on AMD processors with AVX-512. With precision "int8" frozen weights are
multiplied in 8 bits: faster where there is no bfloat16, but rounded. On other devices than a CPU
nothing changes.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import Attention

SHORT = 128  # tokens up to which attention written out is faster than the fused kernel
LARGEST_INPUT = 127  # in 8 bits: an input becomes a whole number from -127 to 127
LARGEST_WEIGHT = 63  # in 7 bits: AVX2 adds two products in 16 bits, and more would overflow
ZERO = 128  # added to every rounded input, as oneDNN wants them without a sign


def processor_name():
    """Return the name that the processor gives itself, such as "AMD EPYC"."""
    return str(torch.cpu.get_capabilities().get("cpu_name"))


def has_slow_linears():
    """Tell whether nn.Linear leaves half of what the processor can do.

    It calls MKL, which uses AVX-512 on Intel processors alone. On AMD processors without it, MKL
    reaches 85 % of what they can do, and nothing is to be gained.
    """
    return "AMD" in processor_name() and bool(torch.cpu.get_capabilities().get("avx512_f"))


def accelerate(model, precision="float32"):
    """Swap the slow modules of a Classifier's encoder, or of an Encoder, in place.

    Names, parameters and what isinstance says of a module stay, so this can come before or after
    heterolora.inject. The head stays as it is. Returns the names of what was swapped. With
    precision "int8" linears become Int8Linear, which rounds if its weight is frozen and float32.
    """
    fast = {}  # class -> what to call it, and the class that replaces it
    fast[Attention] = ("attention", FastAttention)
    fast[nn.Dropout] = ("dropout", FastDropout)
    if precision == "int8":
        fast[nn.Linear] = ("frozen linears in 8 bits", Int8Linear)
    elif has_slow_linears():
        fast[nn.Linear] = ("frozen float32 linears", FastLinear)
    swapped = []
    for module in getattr(model, "encoder", model).modules():
        if type(module) not in fast:
            continue
        name, fast_class = fast[type(module)]
        module.__class__ = fast_class
        if name not in swapped:
            swapped.append(name)
    return ", ".join(sorted(swapped)) or "nothing"


def dropout(x, p):
    """Set elements of x, of any shape, to 0 with probability p and scale up the rest.

    On a CPU a random byte decides, at a tenth of the cost of F.dropout: p is rounded to a multiple
    of 1/256. The factor for the rest goes with the rounded p, so that the mean stays. (In bfloat16
    the factor itself is rounded: for p = 0.1 the mean falls by 0.35 %.)
    """
    threshold = round(p * 256)
    if x.device.type != "cpu" or threshold > 255:
        return F.dropout(x, p)
    n = x.numel()
    n_words = (n + 7) // 8  # of 8 bytes each
    words = torch.empty(n_words, dtype=torch.int64)
    words.random_(-(2**63), None)  # from the lowest to the highest number: every bit is random
    noise = words.view(torch.uint8)[:n]
    noise = noise.view(x.shape)
    keep = torch.empty(x.shape, dtype=x.dtype)
    torch.ge(noise, threshold, out=keep)  # 0 and 1 as floats at once: booleans cost a conversion
    keep.mul_(256 / (256 - threshold))
    return x * keep


class FastDropout(nn.Dropout):
    """nn.Dropout from random bytes."""

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        return dropout(x, self.p)


class FastLinear(nn.Linear):
    """nn.Linear whose frozen float32 weight is applied as a convolution with a 1 x 1 kernel.

    The sums are the same, at twice the speed where `has_slow_linears`: a convolution calls oneDNN,
    which uses AVX-512 on every processor that has it.
    """

    def forward(self, x):
        """x (..., d_in) -> (..., d_out)"""
        is_float32_on_cpu = x.dtype == torch.float32 and x.device.type == "cpu"
        is_sequence = x.dim() >= 3 and x.numel() > 0
        if self.weight.requires_grad or not is_float32_on_cpu or not is_sequence:
            return super().forward(x)
        image = x.reshape(len(x), -1, 1, self.in_features)  # (B, T, 1, d_in)
        image = image.permute(0, 3, 1, 2)  # (B, d_in, T, 1): channels last in memory
        kernel = self.weight[:, :, None, None]  # (d_out, d_in, 1, 1)
        y = F.conv2d(image, kernel, self.bias)  # (B, d_out, T, 1)
        y = y.permute(0, 2, 3, 1)  # (B, T, 1, d_out)
        return y.reshape(*x.shape[:-1], self.out_features)


def largest(rows):
    """rows (n, d) -> the largest absolute value of each (n, 1), never 0"""
    return rows.abs().amax(1, keepdim=True).clamp_(min=1e-30)


class Int8Weight:
    """A matrix W (d_out, d_in) in 7 bits, which multiplies inputs in 8 bits.

    Every row of W is divided by a scale of its own, so that its largest magnitude is 63, and
    rounded. So is every input, to 127. Only this loses accuracy: whole numbers are multiplied and
    added exactly.
    """

    def __init__(self, W):
        scales = largest(W) / LARGEST_WEIGHT  # (d_out, 1)
        self.scales = scales.flatten()
        self.zeros = torch.zeros(len(W), dtype=torch.int32)
        whole = (W / scales).round().to(torch.int8)
        # A transposed W is a view; oneDNN reads memory row by row.
        self.packed = torch.ops.onednn.qlinear_prepack(whole.contiguous(), None)

    def times(self, x):
        """x (n, d_in) -> W x (n, d_out), both in float32"""
        scales = largest(x) / LARGEST_INPUT  # (n, 1)
        whole = (x / scales).round_().to(torch.int8)
        whole = whole.view(torch.uint8).add_(ZERO)  # -127 is read as 129; 129 + 128 = 1 (mod 256)
        inputs = (whole, 1.0, ZERO)  # scale 1: the real one differs by row and comes last
        weights = (self.packed, self.scales, self.zeros)
        output = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, float32, no activation
        y = torch.ops.onednn.qlinear_pointwise(*inputs, *weights, *output)
        return y.mul_(scales)


class Int8Product(torch.autograd.Function):
    """x (n, d_in) -> W x (n, d_out), backward dy -> W^T dy, each by a rounded Int8Weight.

    W^T is rounded by its own rows, so it is not quite the transpose of the rounded W.
    """

    @staticmethod
    def forward(ctx, x, W, W_transposed):
        ctx.W_transposed = W_transposed
        return W.times(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.W_transposed.times(dy), None, None


class Int8Linear(nn.Linear):
    """nn.Linear whose frozen float32 weight is applied in 8 bits, forward and backward.

    The weight is read at the first pass; later changes of it are not seen. Rounded copies of it and
    of its transpose are kept, outside of state_dict.
    """

    rounded = None

    def __getstate__(self):
        """Leave the rounded copies out: torch can neither copy nor pickle them."""
        return self.__dict__ | {"rounded": None}

    def forward(self, x):
        """x (..., d_in) -> (..., d_out)"""
        is_float32_on_cpu = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if self.weight.requires_grad or not is_float32_on_cpu or x.numel() == 0:
            return super().forward(x)
        if self.rounded is None:
            W = self.weight.detach()
            self.rounded = (Int8Weight(W), Int8Weight(W.T))
        y = Int8Product.apply(x.reshape(-1, self.in_features), *self.rounded)  # (n, d_out)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class FastAttention(Attention):
    """Attention written out where that is faster: up to SHORT tokens, or with dropout."""

    def forward(self, q, k, v, mask):
        """q, k, v (B, T, D) and mask (B, 1, 1, T), True for real tokens -> (B, T, D)"""
        B, T, D = q.shape
        p = self.dropout if self.training else 0.0
        if q.device.type != "cpu" or (p == 0 and T > SHORT):
            return super().forward(q, k, v, mask)
        width = D // self.heads
        q = q.view(B, T, self.heads, width).transpose(1, 2)  # (B, H, T, D/H)
        k = k.view(B, T, self.heads, width).transpose(1, 2)  # (B, H, T, D/H)
        v = v.view(B, T, self.heads, width).transpose(1, 2)  # (B, H, T, D/H)

        # The lowest finite number, not -inf: a row of padding alone must not give NaN. At least
        # float32, and with it the scores and their softmax, where the weights are in 16 bits.
        wide = torch.promote_types(q.dtype, torch.float32)
        bias = (1 - mask.to(wide)) * torch.finfo(wide).min  # (B, 1, 1, T)
        q = q * width**-0.5
        scores = q @ k.transpose(2, 3) + bias  # (B, H, T, T)
        weights = scores.softmax(-1).to(v.dtype)
        if p > 0:
            weights = dropout(weights, p)
        y = weights @ v  # (B, H, T, D/H)
        return y.transpose(1, 2).reshape(B, T, D)
