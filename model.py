"""A plain transformer encoder of the BERT and RoBERTa family, its loading from checkpoints, and the small built-in one.

Nothing here knows of LoRA. Every layer has four named connection points (see the README's
figure): the two residual connections, which are `nn.Identity`, and two cross-layer shortcuts, which
are `Nothing`. `heterolora.inject` swaps those, and the linears, by name.

Shapes: B sequences, T tokens, D hidden_size, F intermediate_size, H heads, C classes.
"""
import dataclasses
import hashlib
import inspect
import os
import re
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import files
from files import CheckpointError, hf_name

ACTIVATIONS = {  # hidden_act of config.json; "gelu" is the exact one, with erf
    "gelu": F.gelu, "gelu_python": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"), "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"), "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
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

    def __post_init__(self):
        wrong = [f"{f.name}={getattr(self, f.name)!r} (want {f.type.__name__})" for f in dataclasses.fields(self)
                 if type(getattr(self, f.name)) not in {int: (int,), float: (float, int), str: (str,)}[f.type]]
        wrong += [f"{name}={getattr(self, name)} (want at least 1)" for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "max_position_embeddings", "type_vocab_size") if not wrong and getattr(self, name) < 1]
        wrong += [f"{name}={getattr(self, name)} (want from 0 to 0.99)" for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
                  if not wrong and not 0 <= getattr(self, name) <= 0.99]
        if wrong:
            raise CheckpointError("encoder config: " + ", ".join(wrong))
        if self.model_type not in ("bert", "roberta"):
            raise CheckpointError(f"encoder config: model_type {self.model_type!r} is not supported; bert and roberta are")
        if self.hidden_act not in ACTIVATIONS:
            raise CheckpointError(f"encoder config: hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(f"encoder config: hidden_size {self.hidden_size} is not a multiple of "
                                  f"num_attention_heads {self.num_attention_heads}")

    @classmethod
    def from_folder(cls, folder):
        """Read folder/config.json. Fields it leaves out get the model type's own defaults. Raises CheckpointError."""
        path = os.path.join(folder, "config.json")
        if not os.path.isfile(path):
            raise CheckpointError(f"{folder}: no Hugging Face checkpoint, there is no config.json in it")
        fields = files.read_json(path, CheckpointError)
        if "model_type" not in fields:
            raise CheckpointError(f"{path}: not a Hugging Face encoder config (no model_type)")
        for name, plain in (("position_embedding_type", "absolute"), ("is_decoder", False), ("add_cross_attention", False)):
            if fields.get(name, plain) != plain:
                raise CheckpointError(f"{path}: {name} {fields[name]!r} is not supported; {plain!r} is")
        defaults = {"vocab_size": 50265, "pad_token_id": 1} if fields["model_type"] == "roberta" else {}
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{**defaults, **{k: v for k, v in fields.items() if k in known}})
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None


SHORT = 128  # tokens up to which attention written out is faster on a CPU than the fused kernel, which knows no dropout there either


class Linear(nn.Linear):
    """nn.Linear. On an AMD processor a frozen one in float32 is computed as a convolution: the same sums at twice the speed, since MKL,
    which nn.Linear calls, does not use what such a processor has, and oneDNN, which a convolution calls, does."""
    slow = "AMD" in str(torch.cpu.get_capabilities().get("cpu_name"))

    def forward(self, x):
        """x (..., d_in) -> (..., d_out)"""
        if not self.slow or self.weight.requires_grad or x.dtype != torch.float32 or x.device.type != "cpu" or x.dim() < 3 or not x.numel():
            return super().forward(x)
        image = x.reshape(len(x), -1, 1, self.in_features).permute(0, 3, 1, 2)  # (B, d_in, T, 1), channels last in memory
        y = F.conv2d(image, self.weight[:, :, None, None], self.bias)  # (B, d_out, T, 1)
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class Dropout(nn.Dropout):
    """nn.Dropout. On the CPU from random bytes, at a tenth of the cost: p is rounded to a multiple of 1/256, and in bfloat16 the factor that
    makes up for what is dropped to 8 bits (1.109 for 1.113)."""

    def forward(self, x):
        """x, any shape -> the same, its elements zero with probability p, else scaled up"""
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        n, threshold = x.numel(), round(self.p * 256)
        noise = torch.empty((n + 7) // 8, dtype=torch.int64).random_(-2**63, None).view(torch.uint8)[:n].view(x.shape)
        keep = torch.ge(noise, threshold, out=torch.empty(x.shape, dtype=x.dtype))
        return x * keep.mul_(256 / (256 - threshold))


class Nothing(nn.Module):
    """A connection that is not there: adds nothing to a sum and costs nothing."""

    def forward(self, x):
        """x (B, T, D) -> None"""
        return None


def _sum(*terms):
    present = [t for t in terms if t is not None]
    total = present[0]
    for t in present[1:]:
        total = total + t
    return total


class Layer(nn.Module):
    """One post-LayerNorm layer with its connection points. The first layer has no shortcut_ffn: nothing is before it."""

    def __init__(self, config, first):
        super().__init__()
        D, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.attention_dropout = config.num_attention_heads, Dropout(config.attention_probs_dropout_prob)
        self.q, self.k, self.v, self.o = (Linear(D, D) for _ in range(4))
        self.residual_attn = nn.Identity()
        self.shortcut_ffn = None if first else Nothing()
        self.ln1 = nn.LayerNorm(D, eps=eps)
        self.fc1, self.fc2 = Linear(D, config.intermediate_size), Linear(config.intermediate_size, D)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.residual_ffn = nn.Identity()
        self.shortcut_attn = Nothing()
        self.ln2 = nn.LayerNorm(D, eps=eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def attention(self, x, bias):
        """x (B, T, D), bias (B, 1, 1, T) added to the scores -> (B, T, D)"""
        B, T, D = x.shape
        q, k, v = (p(x).view(B, T, self.heads, D // self.heads).transpose(1, 2) for p in (self.q, self.k, self.v))  # (B, H, T, D/H)
        p = self.attention_dropout.p if self.training else 0.0
        if x.device.type == "cpu" and (p or T <= SHORT):
            scores = (q * (D // self.heads) ** -0.5) @ k.transpose(2, 3) + bias  # (B, H, T, T), bias is float32 at least: so is softmax
            y = self.attention_dropout(scores.softmax(-1).to(v.dtype)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=p)
        return self.dropout(self.o(y.transpose(1, 2).reshape(B, T, D)))

    def forward(self, x, f_prev, bias):
        """x (B, T, D), f_prev (B, T, D) or None -> (f, y): the input of the feed-forward part and the layer's output"""
        shortcut = self.shortcut_ffn(f_prev) if self.shortcut_ffn is not None else None
        f = self.ln1(_sum(self.residual_attn(x), self.attention(x, bias), shortcut))
        ffn = self.dropout(self.fc2(self.activation(self.fc1(f))))  # (B, T, D) -> (B, T, F) -> (B, T, D)
        return f, self.ln2(_sum(self.residual_ffn(f), ffn, self.shortcut_attn(x)))


def _table(n, D):
    """nn.Embedding(n, D), whose own way to begin takes a second and 70 MB on the meta device, where load_pretrained makes encoders"""
    values = torch.empty(n, D)
    return nn.Embedding.from_pretrained(values if values.is_meta else values.normal_(), freeze=False)


class Encoder(nn.Module):
    """Embeddings and `config.num_hidden_layers` layers."""

    def __init__(self, config):
        super().__init__()
        self.config, D = config, config.hidden_size
        self.word, self.position, self.token_type = (_table(n, D) for n in (config.vocab_size, config.max_position_embeddings, config.type_vocab_size))
        self.ln = nn.LayerNorm(D, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(Layer(config, first=i == 0) for i in range(config.num_hidden_layers))
        # RoBERTa counts positions from pad_token_id + 1 and gives padding the position pad_token_id
        self.first_position = config.pad_token_id + 1 if config.model_type == "roberta" else 0
        self.max_length = config.max_position_embeddings - self.first_position

    def positions(self, input_ids):
        """input_ids (B, T) -> position ids (B, T) or (1, T)"""
        if self.config.model_type == "roberta":
            real = (input_ids != self.config.pad_token_id).long()
            return real.cumsum(1) * real + self.config.pad_token_id
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]

    def lower(self, dtype):
        """Store what is frozen in `dtype`. All but the trainable adapters then computes in it; hidden states still come out in float32."""
        for p in self.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """input_ids (B, T), attention_mask (B, T) with 1 for real tokens -> hidden states (B, T, D), at least float32

        Raises ValueError for sequences longer than the position table.
        """
        if input_ids.shape[1] > self.max_length:
            raise ValueError(f"{input_ids.shape[1]} tokens, but the encoder has positions for {self.max_length}: truncate")
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.word(input_ids) + self.position(self.positions(input_ids)) + self.token_type(types)  # (B, T, D)
        x, f = self.dropout(self.ln(x)), None
        # the lowest finite number, not -inf: a row of padding alone must not give NaN
        wide = torch.promote_types(x.dtype, torch.float32)
        bias = (1 - attention_mask[:, None, None, :].to(wide)) * torch.finfo(wide).min  # (B, 1, 1, T)
        for layer in self.layers:
            f, x = layer(x, f, bias)
        return x.to(wide)


class Classifier(nn.Module):
    """Encoder, pooling ("cls": first token, "mean": over real tokens) and a small MLP head. logits (B, C)"""

    def __init__(self, encoder, num_labels, pooling="mean", generator=None):
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling {pooling!r}: use cls or mean")
        self.config, self.encoder, self.pooling = encoder.config, encoder, pooling
        D, std = self.config.hidden_size, self.config.initializer_range
        self.head = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(self.config.hidden_dropout_prob), nn.Linear(D, num_labels))
        for linear in (self.head[0], self.head[3]):
            nn.init.normal_(linear.weight, std=std, generator=generator)
            nn.init.zeros_(linear.bias)

    def pool(self, hidden, attention_mask):
        """hidden (B, T, D), attention_mask (B, T) -> (B, D)"""
        if self.pooling == "cls":
            return hidden[:, 0]
        weight = attention_mask[:, :, None].to(hidden.dtype)  # (B, T, 1)
        return (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """As Encoder.forward, -> logits (B, C)"""
        return self.head(self.pool(self.encoder(input_ids, attention_mask, token_type_ids), attention_mask))


# ----------------------------------------------------------------------------------------------- checkpoints

def find_pretrained(name):
    """A folder, or the id of a model on the Hugging Face hub, which is downloaded into the cache -> folder. Raises InputError."""
    name = os.fspath(name)
    if not os.path.exists(name) and re.fullmatch(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)?", name, re.ASCII):
        try:
            return files.hub_folder(name, EncoderConfig.from_folder)
        except files.DownloadError as error:
            raise CheckpointError(f"{name} is no folder here, and as an id on the Hugging Face hub: {error}") from None
    if os.path.isfile(name):
        raise CheckpointError(f"{name} is a file: give the folder that it is in")
    if not os.path.isdir(name):
        raise CheckpointError(f"{name}: no such folder, nor can it be an id on the Hugging Face hub; give a checkpoint folder, or an id such as roberta-base")
    return name


def load_pretrained(name_or_dir, log=print):
    """A Hugging Face BERT or RoBERTa folder (config.json and model.safetensors or pytorch_model.bin) or hub id -> Encoder in float32.

    Tensors that belong to no encoder (heads, poolers, position ids) are named once through `log`. Raises InputError for a
    missing folder, file or tensor, a wrong shape, a truncated file, an architecture that is not supported, a failed download.
    """
    folder = find_pretrained(name_or_dir)
    config = EncoderConfig.from_folder(folder)
    path, tensors = files.read_tensors(folder)
    found, prefixes = {}, ("bert.", "roberta.")
    for name, tensor in tensors.items():
        short = name.split(".", 1)[1] if name.startswith(prefixes) else name
        # the oldest checkpoints, bert-base-uncased among them, say gamma and beta
        found[short.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")] = name, tensor
    with torch.device("meta"):
        encoder = Encoder(config)
    state = {}
    for name, parameter in encoder.state_dict().items():
        if hf_name(name) not in found:
            raise CheckpointError(f"{path}: tensor {hf_name(name)} is missing")
        original, tensor = found.pop(hf_name(name))
        if tensor.shape != parameter.shape:
            raise CheckpointError(f"{path}: {original} has shape {list(tensor.shape)}, config.json asks for {list(parameter.shape)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {original} has dtype {tensor.dtype}; a floating-point one is needed")
        state[name] = tensor.float().clone()
    strange = [name for short, (name, _) in found.items() if short.startswith(("encoder.", "embeddings.")) and not short.endswith("position_ids")]
    if strange:
        raise CheckpointError(f"{path}: {strange[0]} and {len(strange) - 1} more have no place in the encoder of config.json")
    encoder.load_state_dict(state, assign=True)
    if found:
        log(f"checkpoint {path}: not part of the encoder, left out: {', '.join(sorted(name for name, _ in found.values()))}")
    return encoder


def save_pretrained(encoder, folder, texts=()):
    """Write an encoder without adapters as a new Hugging Face folder, with further text files, (name, text) pairs. Raises InputError, OSError."""
    files.save_checkpoint(folder, dataclasses.asdict(encoder.config), encoder.state_dict(), texts=texts)


# ----------------------------------------------------------------------------------------------- the built-in encoder

BUILT_IN_ENCODER = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, max_position_embeddings=128,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BUILT_IN_PRETRAINING = dict(steps=2400, batch_size=32, lr=2e-3, mask=0.3, seed=0)
BUILT_IN_CORPUS = 40_000


def pretrain(config, sequences, mask_id, first_word_id, steps, batch_size=32, lr=2e-3, mask=0.3, seed=0, log=print):
    """Masked language modelling from scratch (Devlin et al. 2018, without next-sentence prediction) -> Encoder

    sequences: list of (input_ids, token_type_ids); ids from first_word_id on are ordinary words. Of all word positions
    a share of `mask` is predicted: 60 % of them are masked, 30 % replaced, 10 % kept. Two things make it work in a
    minute: positions start as sinusoids (Vaswani et al. 2017), and a replacement is a word that follows the same
    previous word elsewhere, so that only the meaning gives it away (as ELECTRA's generator does, Clark et al. 2020).
    """
    with torch.random.fork_rng(devices=[]):  # whoever calls keeps his random state
        torch.manual_seed(seed)
        encoder, D = Encoder(config), config.hidden_size
        for module in encoder.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.06 if isinstance(module, nn.Linear) else 0.1)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        angle = torch.arange(config.max_position_embeddings)[:, None] * 1000 ** (-torch.arange(0, D, 2) / D)  # (positions, D/2)
        encoder.position.weight.data = 0.1 * torch.cat([angle.sin(), angle.cos()], 1)[:, :D]
        transform, bias = nn.Linear(D, D), nn.Parameter(torch.zeros(config.vocab_size))

        followers = [[] for _ in range(config.vocab_size)]
        for ids, _ in sequences:
            for previous, word in zip(ids, ids[1:]):
                if word >= first_word_id:
                    followers[previous].append(word)
        table = torch.stack([torch.tensor(f or [mask_id])[torch.randint(max(len(f), 1), (512,))] for f in followers])

        parameters = [*encoder.parameters(), *transform.parameters(), bias]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, anneal_strategy="linear", cycle_momentum=False)
        start, lengths, queue, losses = time.perf_counter(), [len(ids) for ids, _ in sequences], [], []
        for step in range(1, steps + 1):
            queue = queue or data.batches(lengths, batch_size, torch.default_generator)
            input_ids, attention_mask, token_type_ids = data.pad([sequences[i] for i in queue.pop()], config.pad_token_id)
            picked = (torch.rand(input_ids.shape) < mask) & (input_ids >= first_word_id)
            fate, replacement = torch.rand(input_ids.shape), table[input_ids.roll(1, 1), torch.randint(512, input_ids.shape)]
            corrupted = torch.where(picked & (fate < 0.6), mask_id, torch.where(picked & (fate >= 0.7), replacement, input_ids))
            hidden = encoder(corrupted, attention_mask, token_type_ids)[picked]  # (number picked, D)
            loss = F.cross_entropy(F.linear(F.gelu(transform(hidden)), encoder.word.weight, bias), input_ids[picked])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % 200 == 0 or step == steps:
                log(f"pretrain {step:5d}/{steps} | masked-word loss {sum(losses) / len(losses):.3f} | {time.perf_counter() - start:.0f} s")
                losses.clear()
    return encoder


def built_in_config():
    """EncoderConfig of the small encoder"""
    return EncoderConfig(vocab_size=len(data.built_in_tokenizer().vocab), **BUILT_IN_ENCODER)


def built_in_folder(log):
    """Folder of the small encoder of the built-in language, pre-trained once and then kept in the cache"""
    tokenizer, config = data.built_in_tokenizer(), built_in_config()
    makers = (data.Tokenizer, data.WordPiece, data.Language, data.built_in_corpus, data.pad, data.batches, Layer, Encoder, pretrain)
    recipe = repr((config, BUILT_IN_PRETRAINING, BUILT_IN_CORPUS, data.LEXICON, data.ARTICLES, [*tokenizer.vocab], *map(inspect.getsource, makers), torch.__version__))
    folder = files.cache_path("encoder-" + hashlib.sha256(recipe.encode()).hexdigest()[:16])
    if not os.path.isdir(folder):
        with files.lock(files.cache_path("lock")):
            if not os.path.isdir(folder):
                log(f"pre-training the built-in encoder, once, into {folder}")
                sequences = [tokenizer.encode(*texts) for texts in data.built_in_corpus(BUILT_IN_CORPUS)]
                first_word = min(i for token, i in tokenizer.vocab.items() if token.isalpha() and len(token) > 1)
                encoder = pretrain(config, sequences, tokenizer.mask_id, first_word, log=log, **BUILT_IN_PRETRAINING)
                save_pretrained(encoder, folder, [("vocab.txt", "".join(token + "\n" for token in tokenizer.vocab))])
    return folder
