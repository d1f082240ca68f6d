"""Claims about damaged files: each is refused in one line, or read as another valid one."""

import copy
import json
import random

import pytest
import torch

import data
import train
from data import InputError
from extras import checkpoints, compare, evidence, tokenizers
from model import Encoder, EncoderConfig

COUNT = 200  # cases of each file
JUNK = [
    None,
    True,
    -1,
    0,
    1,
    7,
    15,
    17,
    0.5,
    1e308,
    -1e308,
    10**400,
    2**62,
    float("nan"),
    float("inf"),
]
JUNK += ["", "x", "0.5", "a\nb", "\0", "[PAD]", "x" * 9000, [], [1], ["x"], {}, {"x": 1}]
PIECES = [b"\0", b"\t", b"\n", b"\r", b'"', b"\xff", "\u2028".encode(), b"7" * 5000, b"[" * 99_999]


def changed(value, rng):
    """Return a JSON value with one part of it left out, or replaced by junk."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(JUNK)
    value = copy.copy(value)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.2:
        del value[place]
    else:
        value[place] = changed(value[place], rng)
    return value


def damaged(content, rng):
    """Return bytes that are cut off, or in which a few are changed, added or lost."""
    content = bytearray(content)
    place = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        content[place] = rng.randrange(256)
    elif kind == 2:
        content[place:place] = rng.choice(PIECES)
    else:
        del content[place : place + rng.randrange(1, 20)]
    return content


def mutated(name, content, rng):
    """Return a mutation of the content of a file: of its bytes, or of the JSON of a line of it."""
    if "json" not in name or rng.random() < 0.4:
        return damaged(content, rng)
    lines = content.split(b"\n")
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(changed(json.loads(lines[place]), rng)).encode()
    return b"\n".join(lines)


def try_mutations(path, read, count=COUNT, seed=0):
    """Mutate a file again and again. read() must accept it or raise InputError -> number refused"""
    rng = random.Random(seed)
    content = path.read_bytes()
    read()
    refused = 0
    for _ in range(count):
        path.write_bytes(mutated(path.name, content, rng))
        try:
            read()
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 1100
            refused += 1
    assert 0 < refused < count
    return refused


SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 8, "max_position_embeddings": 16}
SPECIALS = {"bert": tokenizers.WordPiece.specials, "roberta": tokenizers.BPE.specials}
WORDS = {"bert": ["a", "cook", "##s", "."], "roberta": ["a", "b", "c", "ab", "abc"]}


def model_folder(folder, kind):
    """Write a small checkpoint of a kind -> its path"""
    vocab = {token: i for i, token in enumerate([*SPECIALS[kind], *WORDS[kind]])}
    texts = {"tokenizer_config.json": json.dumps({"do_lower_case": True, "sep_token": "</s>"})}
    if kind == "bert":
        texts = {"tokenizer_config.json": json.dumps({"do_lower_case": True})}
        texts["vocab.txt"] = "\n".join(vocab)
    else:
        texts["vocab.json"] = json.dumps(vocab)
        texts["merges.txt"] = "#version: 0.2\na b\nab c\n"
    tokens = [{"id": 0, "content": SPECIALS[kind][0], "special": True}]
    texts["tokenizer.json"] = json.dumps({"added_tokens": tokens, "model": {"vocab": vocab}})
    encoder = Encoder(EncoderConfig(kind, len(vocab), pad_token_id=2, **SIZES))
    checkpoints.save_encoder(encoder, str(folder), texts=texts)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))  # in one line
    return folder


TEXTS = [("a cook .", "abc"), ("", "cooks \n"), ("a" * 40, "b c " * 20)]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_damaged_config_is_refused_or_gives_an_encoder_that_works(tmp_path, kind):
    folder = model_folder(tmp_path / "model", kind)

    def read():
        encoder = checkpoints.load_encoder(folder).eval()
        ids = torch.arange(min(5, encoder.max_length)).view(1, -1)
        with torch.inference_mode():
            assert encoder(ids, torch.ones_like(ids), torch.zeros_like(ids)).isfinite().all()

    try_mutations(folder / "config.json", read, COUNT // 2)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("bert", "vocab.txt"),
        ("bert", "tokenizer.json"),
        ("bert", "tokenizer_config.json"),
        ("roberta", "vocab.json"),
        ("roberta", "merges.txt"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_refused_or_gives_tokens_it_knows(tmp_path, kind, name):
    folder = model_folder(tmp_path / "model", kind)

    def read():
        tokenizer = data.load_tokenizer(folder)
        for texts in TEXTS:
            ids, types = tokenizer.encode(*texts, max_length=12)
            assert len(ids) == len(types) <= 12
            assert set(ids) <= set(tokenizer.vocab.values())

    try_mutations(folder / name, read)


@pytest.mark.filterwarnings("ignore:.* are in train.tsv too")
@pytest.mark.parametrize("name", ["train.tsv", "dev.tsv"])
def test_damaged_data_are_refused_or_give_examples_with_texts_and_classes(tmp_path, name):
    rows = [f"{i}\ttext {i}\t{'yes' if i % 2 else 'no'}\tother {i}" for i in range(8)]
    for file in ("train.tsv", "dev.tsv"):
        (tmp_path / file).write_text("\n".join(["id\tsentence1\tlabel\tsentence2", *rows]))

    def read():
        task = data.load_task(str(tmp_path))
        for text, pair, label in task.train + task.dev:
            assert text.strip() and (pair is None or pair.strip())
            assert label in range(len(task.labels))

    try_mutations(tmp_path / name, read)


def finished_run(method, seed):
    """Return a line of a file of finished runs."""
    flags = {"task": "mrpc", "method": method, "seed": seed, "holdout": None, "targets": ["q"]}
    flags |= {"lr": 0.003, "budget": "3072", "data_checksum": 7}
    dev = {"accuracy": 0.75, "loss": 0.5, "right": "e0"}
    result = {"metric": "accuracy", "last": 0.75, "best": 0.8, "dev": dev, "ranks": {"q": 1}}
    result |= {"params_active": 3072, "params_ever_trained": 4096}
    result |= {"train_seconds": 3.0, "search_seconds": 1.0}
    record = {"flags": flags, "result": result, "processor": "A", "code": 1}
    return json.dumps(record)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_damaged_results_are_refused_or_give_a_table(tmp_path, capsys):
    path = tmp_path / "runs.jsonl"
    runs = [(method, seed) for method in ("lora", "static") for seed in (0, 1)]
    path.write_text("\n".join(finished_run(*run) for run in runs))

    def read():
        try:
            evidence.main([str(path), "--task", "mrpc", "--details"])
        except SystemExit:
            *_, line = capsys.readouterr().err.splitlines()
            raise InputError(line) from None
        for line in capsys.readouterr().out.splitlines():
            assert line.startswith("| ") or line == "|---" * 10 + "|"

    try_mutations(path, read)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_damaged_result_is_not_kept_or_gives_a_row_of_a_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "processor_name", lambda: "A")
    path = tmp_path / "runs.jsonl"
    whole = finished_run("lora", 0)
    path.write_text(whole)
    flags = json.loads(whole)["flags"]
    contenders = {"lora": train.parse_args(["--lr", "0.003"])}

    def read():
        record = compare.read_record(str(path), compare.as_key(flags))
        if record is None:
            raise InputError("not kept")
        results = {"lora": {0: record["result"], 1: json.loads(whole)["result"]}}
        assert len(compare.table(contenders, results).splitlines()) == 3

    try_mutations(path, read)
