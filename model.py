"""A plain transformer encoder of the BERT and RoBERTa family, with four named connection points.

Nothing here knows of LoRA. Every layer names its linears (q, k, v, o, fc1, fc2) and the places
where something can be connected, so that `heterolora.inject` can swap them by name:

    f = ln1(residual_attn(x) + attention(x) + shortcut_ffn(f of the layer before))
    y = ln2(residual_ffn(f)  + feed_forward(f) + shortcut_attn(x))

The residual connections are nn.Identity. The two shortcuts are `Nothing`: they add nothing.

Shapes: B sequences, T tokens, Q queries, D hidden_size, F intermediate_size, H heads, C classes.
"""

import dataclasses
import functools

import torch
import torch.nn as nn
import torch.nn.functional as F


def quick_gelu(x):
    """Return the sigmoid approximation of GELU, elementwise."""
    return x * torch.sigmoid(1.702 * x)


gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {  # hidden_act of config.json -> function; "gelu" is the exact one, with erf
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


@dataclasses.dataclass
class EncoderConfig:
    """The fields of Hugging Face's config.json that shape the encoder, under their names there."""

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0


class Nothing(nn.Identity):
    """A connection that is not there: it adds nothing to a sum and costs nothing."""

    def forward(self, x):
        """x (B, T, D) -> None"""
        return None


def add(total, *terms):
    """Return the sum of all that are not None."""
    for term in terms:
        if term is not None:
            total = total + term
    return total


class Attention(nn.Module):
    """Softmax attention of H heads over projected queries, keys and values. It has no weights."""

    def __init__(self, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout

    def forward(self, q, k, v, mask):
        """q (B, Q, D), k, v (B, T, D), mask (B, 1, 1, T), True for real tokens -> (B, Q, D)

        The Q queries are all T tokens, or only some of them.
        """
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, Q, D/H)
        k = k.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, H, T, D/H)
        v = v.unflatten(2, (self.heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """One post-LayerNorm layer. The first layer has no shortcut_ffn: no layer is before it."""

    def __init__(self, config, is_first):
        super().__init__()
        D = config.hidden_size
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D)
        self.v = nn.Linear(D, D)
        self.attention = Attention(config.num_attention_heads, config.attention_probs_dropout_prob)
        self.o = nn.Linear(D, D)
        self.residual_attn = nn.Identity()
        self.shortcut_ffn = None if is_first else Nothing()
        self.ln1 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(D, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, D)
        self.residual_ffn = nn.Identity()
        self.shortcut_attn = Nothing()
        self.ln2 = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, f_before, mask):
        """x (B, T, D), f_before (B, T, D) or None, mask (B, 1, 1, T) -> f and y, each (B, T, D)

        f is the feed-forward part's input, f_before the f of the layer before, y the output.
        """
        attended = self.o(self.attention(self.q(x), self.k(x), self.v(x), mask))
        return self.after_attention(x, f_before, attended)

    def after_attention(self, x, f_before, attended):
        """Do the rest of the layer -> f and y. attended (B, T, D): the attention part's output.

        It is apart so that extras/fast_cpu.py can do it for one token alone.
        """
        from_before = self.shortcut_ffn(f_before) if self.shortcut_ffn is not None else None
        f = self.ln1(add(self.residual_attn(x), self.dropout(attended), from_before))

        fed_forward = self.fc2(self.activation(self.fc1(f)))  # (B, T, D) -> (B, T, F) -> (B, T, D)
        y = self.ln2(add(self.residual_ffn(f), self.dropout(fed_forward), self.shortcut_attn(x)))
        return f, y


class Encoder(nn.Module):
    """Embeddings and config.num_hidden_layers layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.word = nn.Embedding(config.vocab_size, D)
        self.position = nn.Embedding(config.max_position_embeddings, D)
        self.token_type = nn.Embedding(config.type_vocab_size, D)
        self.ln = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        n = config.num_hidden_layers
        self.layers = nn.ModuleList(Layer(config, is_first=i == 0) for i in range(n))
        self.max_length = config.max_position_embeddings  # of a sequence, in tokens
        self.is_roberta = config.model_type == "roberta"
        if self.is_roberta:  # positions count from pad_token_id + 1; padding has pad_token_id
            self.max_length -= config.pad_token_id + 1

    def positions(self, input_ids):
        """input_ids (B, T) -> position ids (B, T) or (1, T)"""
        if not self.is_roberta:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        is_real = (input_ids != self.config.pad_token_id).long()
        return is_real.cumsum(1) * is_real + self.config.pad_token_id

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """input_ids (B, T), attention_mask (B, T), 1 for real tokens -> hidden states (B, T, D)

        The hidden states are at least float32, also where the weights are in 16 bits.
        Raises ValueError for a sequence that is longer than the table of positions.
        """
        T = input_ids.shape[1]
        if T > self.max_length:
            raise ValueError(f"{T} tokens, but the encoder has positions for {self.max_length}")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word(input_ids) + self.position(self.positions(input_ids))
        x = x + self.token_type(token_type_ids)  # (B, T, D)
        x = self.dropout(self.ln(x))
        mask = attention_mask[:, None, None, :].bool()  # (B, 1, 1, T)
        f = None
        for layer in self.layers:
            f, x = layer(x, f, mask)
        return x.to(torch.promote_types(x.dtype, torch.float32))


class Classifier(nn.Module):
    """An encoder, pooling over tokens ("cls": the first, "mean": all real ones), and a small MLP.

    The head's weights are drawn from `generator`. Raises ValueError for an unknown pooling.
    """

    def __init__(self, encoder, num_labels, pooling="mean", generator=None):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling {pooling!r}: use cls or mean")
        self.config = encoder.config
        self.encoder = encoder
        self.pooling = pooling
        D = self.config.hidden_size
        dropout = nn.Dropout(self.config.hidden_dropout_prob)
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), dropout, nn.Linear(D, num_labels))
        self.draw_head(generator)

    def draw_head(self, generator=None):
        """Give the head new initial values. generator: always one of the CPU."""
        std = self.config.initializer_range
        for linear in (self.head[0], self.head[3]):
            weight = nn.init.normal_(torch.empty(linear.weight.shape), std=std, generator=generator)
            linear.weight.data.copy_(weight)
            nn.init.zeros_(linear.bias)

    def pool(self, hidden, attention_mask):
        """hidden (B, T, D), attention_mask (B, T) -> (B, D)"""
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = attention_mask[:, :, None].to(hidden.dtype)  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """The arguments of Encoder.forward -> logits (B, C)"""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids)
        return self.head(self.pool(hidden, attention_mask))


def load_pretrained(name_or_dir):
    """Return the Encoder of a Hugging Face folder, or of a model on the Hugging Face hub.

    Raises data.InputError for what is missing, damaged or of another architecture.
    """
    from extras.checkpoints import find_checkpoint, load_encoder

    return load_encoder(find_checkpoint(name_or_dir))
