"""Faster arithmetic for the encoder on a CPU: `accelerate` swaps the slow modules in place.

model.py says what is computed, this file computes it faster. Three parts of model.py are slow on a
CPU: attention, whose fused kernel knows no dropout and is slow on short sequences; random numbers
for dropout; and, in float32 on AMD processors with AVX-512, nn.Linear. One part is not needed: with
--pooling cls the head reads only the first token, so in training the last layer computes only that
one. The model stays the same, but for rounding and dropout's draws. With precision "int8" products
with frozen weights are of whole numbers: faster on processors without bfloat16, but rounded more.
On other devices than a CPU only the last layer is another.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from model import Attention, Layer

SHORT = 128  # up to so many queries, plain products are faster than the fused kernel
LARGEST_INPUT = 127  # in 8 bits: an input becomes a whole number from -127 to 127
LARGEST_WEIGHT = 63  # in 7 bits: AVX2 adds two products in 16 bits, where 8 bits would overflow
ZERO = 128  # added to rounded inputs, as oneDNN takes none below 0


def processor_name():
    """Return the name that the processor gives itself, such as "AMD EPYC"."""
    return str(torch.cpu.get_capabilities().get("cpu_name"))


def has_onednn():
    """Tell whether to use oneDNN: it is there, on x86. Elsewhere this file is not tested."""
    is_x86 = torch.cpu.get_capabilities().get("architecture") == "x86_64"
    return is_x86 and torch.backends.mkldnn.is_available()


def has_slow_linears():
    """Tell whether oneDNN, with a weight arranged for it, beats nn.Linear in float32 here.

    nn.Linear calls MKL, which uses no AVX-512 on AMD processors; oneDNN does. On AMD processors
    with AVX2 but no AVX-512, and on Intel's, MKL was faster: docs/SPEED.md. Timing is not
    used: it could answer differently, and so round differently, when a run is resumed.
    """
    has_avx512 = torch.cpu.get_capabilities().get("avx512_f", False)
    return "AMD" in processor_name() and has_avx512 and has_onednn()


def accelerate(model, precision="float32"):
    """Swap the slow modules of a Classifier's encoder, or of an Encoder, in place.

    Names, parameters and what isinstance says of a module stay, so this can come before or after
    heterolora.inject. The head stays as it is. Returns what was swapped, as a text. With
    precision "int8", which needs has_onednn(), linears become Int8Linear. With pooling "cls" the
    encoder in training gives only the first token: do not change the pooling afterwards.
    """
    fast = {}  # class -> what to call it, and the class that replaces it
    fast[Attention] = ("attention", FastAttention)
    fast[nn.Dropout] = ("dropout", FastDropout)
    if precision == "int8":
        fast[nn.Linear] = ("frozen linears in 8 bits", Int8Linear)
    elif precision == "float32" and has_slow_linears():
        fast[nn.Linear] = ("frozen float32 linears", PackedLinear)
    swapped = []
    for module in getattr(model, "encoder", model).modules():
        if type(module) not in fast:
            continue
        name, fast_class = fast[type(module)]
        module.__class__ = fast_class
        if name not in swapped:
            swapped.append(name)
    if getattr(model, "pooling", None) == "cls":  # an Encoder has none
        last = model.encoder.layers[-1]
        if type(last) is Layer:
            last.__class__ = FirstTokenLayer
            swapped.append("last layer")
    return ", ".join(sorted(swapped)) or "nothing"


def dropout(x, p):
    """Set elements of x, of any shape, to 0 with probability p and scale up the rest.

    On a CPU a random byte decides, at a tenth of the cost of F.dropout: p is rounded to a multiple
    of 1/256. The factor for the rest goes with the rounded p, so that the mean stays. (In bfloat16
    the factor itself is rounded: for p = 0.1 the mean falls by 0.33 %.)
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


class PackedWeight:
    """A matrix W (d_out, d_in) in the order in which oneDNN reads it."""

    def __init__(self, W):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(W)

    def times(self, x, bias):
        """x (n, d_in), bias (d_out) or None -> x W^T + bias (n, d_out)"""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def largest(rows):
    """rows (n, d) -> the largest absolute value of each (n, 1), never 0"""
    return rows.abs().amax(1, keepdim=True).clamp_(min=1e-30)


class Int8Weight:
    """A matrix W (d_out, d_in) in 7 bits, which multiplies inputs in 8 bits.

    Every row of W is divided by a scale of its own, so that its largest magnitude is 63, and
    rounded. So is every row of x, to 127. Only the rounding loses accuracy: whole numbers are
    multiplied and added exactly.
    """

    def __init__(self, W):
        scales = largest(W) / LARGEST_WEIGHT  # (d_out, 1)
        self.scales = scales.flatten()
        self.zeros = torch.zeros(len(W), dtype=torch.int32)
        whole = (W / scales).round().to(torch.int8)
        # A transposed W is a view, and this call wants one row after the other in memory.
        self.packed = torch.ops.onednn.qlinear_prepack(whole.contiguous(), None)

    def times(self, x, bias):
        """x (n, d_in), bias (d_out) or None -> x W^T + bias (n, d_out), all in float32"""
        scales = largest(x) / LARGEST_INPUT  # (n, 1)
        whole = (x / scales).round_().to(torch.int8)
        whole = whole.view(torch.uint8).add_(ZERO)  # -127 is read as 129; 129 + 128 = 1 (mod 256)
        inputs = (whole, 1.0, ZERO)  # scale 1: the real one differs by row and comes last
        weights = (self.packed, self.scales, self.zeros)
        output = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, float32, no activation
        y = torch.ops.onednn.qlinear_pointwise(*inputs, *weights, *output)
        y.mul_(scales)
        return y if bias is None else y.add_(bias)


class FrozenProduct(torch.autograd.Function):
    """x (n, d_in) -> x W^T + bias (n, d_out), backward dy -> dy W.

    W and W_transposed are each a PackedWeight or an Int8Weight. Without gradients W_transposed may
    be None.
    """

    @staticmethod
    def forward(ctx, x, bias, W, W_transposed):
        ctx.W_transposed = W_transposed
        return W.times(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.W_transposed.times(dy, None), None, None, None


class PackedLinear(nn.Linear):
    """nn.Linear whose frozen float32 weight is multiplied in a faster form, forward and backward.

    It keeps a copy of the weight in that form, and one of the transpose once a gradient needs it.
    They are not in state_dict. They are made anew when the weight is replaced or changed in place,
    but a change in place through `weight.data` goes unnoticed. This is a plain nn.Linear where the
    weight or the bias trains, and for inputs that are empty, not in float32 or not on a CPU.
    """

    form = PackedWeight
    source = None  # the weight that the copies were made of, and how often it had been changed
    forward_weight = None
    backward_weight = None

    def __getstate__(self):
        """Leave the copies out: torch can neither copy nor pickle them."""
        return self.__dict__ | {"source": None, "forward_weight": None, "backward_weight": None}

    def is_outdated(self, W):
        """Tell whether the copies are of another weight than W, or of W before a change."""
        if self.source is None:
            return True
        source, changes = self.source
        return source.data_ptr() != W.data_ptr() or changes != W._version

    def forward(self, x):
        """x (..., d_in) -> (..., d_out)"""
        trains = any(parameter.requires_grad for parameter in self.parameters())
        is_float32_on_cpu = x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"
        if trains or not is_float32_on_cpu or x.numel() == 0:
            return super().forward(x)
        W = self.weight.detach()
        if self.is_outdated(W):
            self.source = (W, W._version)  # while W is kept, no new weight can get its address
            self.forward_weight, self.backward_weight = self.form(W), None
        if self.backward_weight is None and x.requires_grad and torch.is_grad_enabled():
            self.backward_weight = self.form(W.T)
        rows = x.reshape(-1, self.in_features)  # (n, d_in)
        y = FrozenProduct.apply(rows, self.bias, self.forward_weight, self.backward_weight)
        return y.view(*x.shape[:-1], self.out_features)


class Int8Linear(PackedLinear):
    """PackedLinear with the weight in 7 bits, and inputs and gradients of outputs in 8.

    The transpose is rounded apart, so backward is not exactly the transpose of forward.
    """

    form = Int8Weight


class FastAttention(Attention):
    """Attention written out where that is faster: up to SHORT queries, or with dropout."""

    def forward(self, q, k, v, mask):
        """The arguments of Attention.forward -> (B, Q, D)"""
        B, Q, D = q.shape
        T = k.shape[1]
        p = self.dropout if self.training else 0.0
        if q.device.type != "cpu" or (p == 0 and Q > SHORT):
            return super().forward(q, k, v, mask)
        width = D // self.heads
        q = q.view(B, Q, self.heads, width).transpose(1, 2)  # (B, H, Q, D/H)
        k = k.view(B, T, self.heads, width).transpose(1, 2)  # (B, H, T, D/H)
        v = v.view(B, T, self.heads, width).transpose(1, 2)  # (B, H, T, D/H)

        # The lowest finite number, not -inf: a row of padding alone must not give NaN. This number
        # and the softmax are in float32 at least, even if q is in 16 bits.
        wide = torch.promote_types(q.dtype, torch.float32)
        bias = (1 - mask.to(wide)) * torch.finfo(wide).min  # (B, 1, 1, T)
        q = q * width**-0.5
        scores = q @ k.transpose(2, 3) + bias  # (B, H, Q, T)
        weights = scores.softmax(-1).to(v.dtype)
        if p > 0:
            weights = dropout(weights, p)
        y = weights @ v  # (B, H, Q, D/H)
        return y.transpose(1, 2).reshape(B, Q, D)


class FirstTokenLayer(Layer):
    """The last layer, when the head reads only the first token.

    In training it computes the output of that token only; the others serve as keys and values.
    Gradients stay the same, as those of the other tokens' outputs are 0. In evaluation mode it
    computes all tokens: a score such as alignment reads the inputs of all.
    """

    def forward(self, x, f_before, mask):
        """The arguments of Layer.forward -> f and y, of the first token: each (B, 1, D)"""
        if not self.training:
            return super().forward(x, f_before, mask)
        first = x[:, :1]  # (B, 1, D)
        attended = self.o(self.attention(self.q(first), self.k(x), self.v(x), mask))  # (B, 1, D)
        f_before = None if f_before is None else f_before[:, :1]
        return self.after_attention(first, f_before, attended)
