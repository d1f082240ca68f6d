"""Claims about exported runs: other programs compute from the files what the run computes."""

import json
import os
import re

import pytest
import torch
import torch.nn.functional as F

import heterolora
from data import InputError
from extras import checkpoints, export
from model import Classifier, Encoder, EncoderConfig

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 1, 1]])
MASK = (IDS != 1).long()


def make_checkpoint(folder, family="bert"):
    """Write a small pre-trained encoder as a Hugging Face folder."""
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(intermediate_size=24, max_position_embeddings=20, pad_token_id=1)
    encoder = Encoder(EncoderConfig(model_type=family, **sizes))
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    checkpoints.save_encoder(encoder, folder, texts={"vocab.txt": "[PAD]\n", "notes.md": ""})


def make_run(
    folder, pooling="cls", targets=heterolora.TARGETS, shortcuts=(), adapter=heterolora.LoRA
):
    """Return what train.load_run would: adapters of rank 0 to 3 that change what is computed."""
    encoder = checkpoints.load_encoder(folder)
    adapters = {}
    if targets or shortcuts:
        adapters = heterolora.inject(encoder, targets, shortcuts, 3, 6, adapter=adapter)
    generator = torch.Generator().manual_seed(1)
    for kind in adapters.values():
        for parameter, _ in kind.active(3):
            parameter.data.normal_(std=0.3, generator=generator)
    heterolora.set_ranks(adapters, {name: i % 4 for i, name in enumerate(adapters)})
    run = Classifier(encoder, 3, pooling, generator).eval()
    run.adapters = adapters
    run.labels = ("yes", "no", "maybe")
    return run


def answer_with(monkeypatch, run):
    monkeypatch.setattr(export.train, "load_run", lambda folder, model=None: run, raising=False)


def logits_from_files(encoder, head, pooling):
    """Return what an encoder without adapters and the tensors of a head compute."""
    hidden = encoder.eval()(IDS, MASK)
    pooled = hidden[:, 0]
    if pooling == "mean":
        pooled = (hidden * MASK[:, :, None]).sum(1) / MASK.sum(1)[:, None]
    w1, b1, w2, b2 = head
    return F.linear(torch.tanh(F.linear(pooled, w1, b1)), w2, b2)


HEAD_NAMES = {
    ("bert", "cls"): ("bert.pooler.dense", "classifier"),
    ("roberta", "cls"): ("classifier.dense", "classifier.out_proj"),
    ("bert", "mean"): ("0", "3"),
    ("roberta", "mean"): ("0", "3"),
}


def head_of(tensors, family, pooling, prefix=""):
    """Return weight, bias, weight, bias of the head."""
    head = []
    for name in HEAD_NAMES[family, pooling]:
        head += [tensors[f"{prefix}{name}.weight"], tensors[f"{prefix}{name}.bias"]]
    return head


def find(patterns, name):
    """Return the one value whose pattern is that of a module's name, as PEFT looks for it."""
    (value,) = [patterns[key] for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
    return value


def read(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return checkpoints.read_safetensors(path)


@torch.no_grad()
def test_the_merged_weight_computes_what_the_adapted_linear_computes():
    linear = heterolora.LoRALinear(torch.nn.Linear(6, 4), heterolora.LoRA(6, 4, 3, alpha=5))
    torch.nn.init.normal_(linear.adapter.B)
    linear.adapter.rank = 2
    x = torch.randn(8, 6)
    merged = F.linear(x, export.merged_weight(linear), linear.host.bias)
    torch.testing.assert_close(linear(x), merged)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_merged_run_computes_the_same_without_adapters(
    tmp_path, monkeypatch, capsys, family, pooling
):
    make_checkpoint(tmp_path / "base", family)
    run = make_run(tmp_path / "base", pooling)
    answer_with(monkeypatch, run)
    new = tmp_path / "new"
    export.main(["run", "--merge", str(new)])
    assert capsys.readouterr().out.count("\n") == 1

    files = ["config.json", "model.safetensors", "vocab.txt"]
    head_file = "model.safetensors"
    if pooling == "mean":
        head_file = "head.safetensors"
        files.append(head_file)
    assert sorted(os.listdir(new)) == sorted(files)
    head = head_of(read(new / head_file), family, pooling)
    merged = logits_from_files(checkpoints.load_encoder(new), head, pooling)
    torch.testing.assert_close(merged, run(IDS, MASK), atol=1e-5, rtol=1e-5)
    plain = logits_from_files(checkpoints.load_encoder(tmp_path / "base"), head, pooling)
    assert not torch.allclose(plain, merged, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_peft_adapter_follows_the_rule_of_peft(tmp_path, monkeypatch, capsys, family, pooling):
    """The rule: W + alpha / r * B A, with r and alpha from the patterns."""
    make_checkpoint(tmp_path / "base", family)
    run = make_run(tmp_path / "base", pooling)
    answer_with(monkeypatch, run)
    new = tmp_path / "new"
    export.main(["run", "--peft", str(new)])
    assert capsys.readouterr().out.count("\n") == 1

    config = read(new / "adapter_config.json")
    tensors = read(new / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    if pooling == "cls":
        assert config["task_type"] == "SEQ_CLS"
        modules = {"bert": ["classifier", "pooler"], "roberta": ["classifier"]}
        assert config["modules_to_save"] == modules[family]
    else:
        assert config["task_type"] == "FEATURE_EXTRACTION"
        assert "modules_to_save" not in config
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    encoder = checkpoints.load_encoder(tmp_path / "base")
    on = [name for name, adapter in run.adapters.items() if adapter.rank > 0]
    assert len(config["target_modules"]) == len(on) < len(run.adapters)
    for name in on:
        module = checkpoints.hf_name(name)
        module = f"{family}.{module}" if pooling == "cls" else module
        assert module in config["target_modules"]
        rank = find(config["rank_pattern"], module)
        alpha = find(config["alpha_pattern"], module)
        A = tensors.pop(f"base_model.model.{module}.lora_A.weight")
        B = tensors.pop(f"base_model.model.{module}.lora_B.weight")
        assert len(A) == rank == run.adapters[name].rank
        encoder.get_submodule(name).weight += alpha / rank * B @ A
    prefix = "base_model.model."
    if pooling == "mean":
        assert not tensors
        tensors = read(new / "head.safetensors")
        prefix = ""
    assert len(tensors) == 4
    logits = logits_from_files(encoder, head_of(tensors, family, pooling, prefix), pooling)
    torch.testing.assert_close(logits, run(IDS, MASK), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_transformers_and_peft_compute_what_the_run_computes(tmp_path, monkeypatch, family):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    make_checkpoint(tmp_path / "base", family)
    run = make_run(tmp_path / "base", "cls")
    answer_with(monkeypatch, run)
    merge, adapter = str(tmp_path / "merge"), str(tmp_path / "peft")
    export.main(["run", "--merge", merge, "--peft", adapter])
    kind = transformers.AutoModelForSequenceClassification
    merged = kind.from_pretrained(merge).eval()
    assert merged.config.id2label == {0: "yes", 1: "no", 2: "maybe"}
    adapted = kind.from_pretrained(str(tmp_path / "base"), num_labels=3)
    adapted = peft.PeftModel.from_pretrained(adapted, adapter).eval()
    for model in (merged, adapted):
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        torch.testing.assert_close(logits, run(IDS, MASK), atol=1e-5, rtol=1e-5)

    run = make_run(tmp_path / "base", "mean")
    answer_with(monkeypatch, run)
    export.main(["run", "--peft", adapter + "-mean"])
    adapted = transformers.AutoModel.from_pretrained(str(tmp_path / "base"))
    adapted = peft.PeftModel.from_pretrained(adapted, adapter + "-mean").eval()
    hidden = adapted(input_ids=IDS, attention_mask=MASK).last_hidden_state
    is_real = MASK.bool()
    ours = run.encoder(IDS, MASK)[is_real]
    torch.testing.assert_close(hidden[is_real], ours, atol=1e-5, rtol=1e-5)


def test_a_run_of_train_py_is_exported(tmp_path):
    run, merge, adapter = str(tmp_path / "run"), str(tmp_path / "merge"), str(tmp_path / "peft")
    flags = "--task acceptability --train-limit 32 --holdout 0.5 --max-steps 3 --head-warmup 1"
    flags += " --lr 0.1 --shortcuts none --precision float32 --out"
    assert export.train.main([*flags.split(), run]) == 0
    export.main([run, "--merge", merge, "--peft", adapter])
    merged = checkpoints.load_encoder(merge).eval()
    loaded = export.train.load_run(run).encoder
    plain = checkpoints.load_encoder(checkpoints.find_checkpoint("built-in")).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS, MASK), loaded(IDS, MASK), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(merged(IDS, MASK), plain(IDS, MASK), atol=1e-3)


@torch.no_grad()
def test_a_run_without_adapters_is_merged_too(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "base")
    run = make_run(tmp_path / "base", targets=())
    run.encoder.layers[0].q.weight += 1  # --method full
    answer_with(monkeypatch, run)
    export.main(["run", "--merge", str(tmp_path / "new")])
    merged = checkpoints.load_encoder(tmp_path / "new").eval()
    assert torch.equal(merged(IDS, MASK), run.encoder(IDS, MASK))


def test_the_config_of_the_checkpoint_goes_along(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(
        json.dumps(
            read(path)
            | {"tokens": "lower case", "dtype": "float16", "torch_dtype": "float16"}
            # What a classifier of another task may have left.
            | {"num_labels": 1, "problem_type": "regression"}
        )
    )
    (tmp_path / "base" / "tokenizer").mkdir()
    answer_with(monkeypatch, make_run(tmp_path / "base"))
    export.main(["run", "--merge", str(tmp_path / "new")])
    config = read(tmp_path / "new" / "config.json")
    assert config["tokens"] == "lower case"
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config and "num_labels" not in config
    assert config["problem_type"] == "single_label_classification"
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "yes", "1": "no", "2": "maybe"}
    assert config["label2id"] == {"yes": 0, "no": 1, "maybe": 2}


def test_peft_finds_a_downloaded_checkpoint_by_its_hub_id(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROLORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "hub" / "google" / "tiny-bert"
    make_checkpoint(folder)
    answer_with(monkeypatch, make_run(folder))
    export.main(["run", "--peft", str(tmp_path / "new")])
    config = read(tmp_path / "new" / "adapter_config.json")
    assert config["base_model_name_or_path"] == "google/tiny-bert"


def test_an_export_makes_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETEROLORA_CACHE", str(tmp_path / "cache"))
    make_checkpoint(tmp_path / "base")
    answer_with(monkeypatch, make_run(tmp_path / "base"))
    export.main(["run", "--peft", str(tmp_path / "new")])
    assert not (tmp_path / "cache").exists()


class Other(heterolora.LoRA):
    """Another kind of adapter, which must not be asked while it is off."""

    def forward(self, x, rank=None):
        assert self.rank > 0
        return super().forward(x, rank)


class Bent(heterolora.LoRA):
    """A kind that is no linear map, as that of the README."""

    def forward(self, x, rank=None):
        return super().forward(x, rank).relu()


@pytest.mark.parametrize(
    "changes,flags,message",
    [
        ({"shortcuts": heterolora.SHORTCUTS}, ["--merge"], "shortcuts none"),
        ({"shortcuts": heterolora.SHORTCUTS}, ["--peft"], "shortcuts none"),
        ({"adapter": Other}, ["--merge", "--peft"], "--peft writes LoRA, not Other: use --merge"),
        ({"adapter": Bent}, ["--merge"], "--merge writes weights, and Bent is no linear map"),
        ({"targets": ()}, ["--peft"], "--peft writes LoRA, and none is on: use --merge"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, changes, flags, message
):
    make_checkpoint(tmp_path / "base")
    answer_with(monkeypatch, make_run(tmp_path / "base", **changes))
    argv = ["run"]
    for flag in flags:
        argv += [flag, str(tmp_path / flag)]
    with pytest.raises(SystemExit, match="2"):
        export.main(argv)
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert os.listdir(tmp_path) == ["base"]


def test_shortcuts_that_are_off_are_no_obstacle(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "base")
    run = make_run(tmp_path / "base", shortcuts=heterolora.SHORTCUTS, adapter=Other)
    ranks = {name: 2 for name in run.adapters if name.endswith((".q", ".fc1"))}
    heterolora.set_ranks(run.adapters, ranks)
    answer_with(monkeypatch, run)
    export.main(["run", "--merge", str(tmp_path / "new")])
    merged = checkpoints.load_encoder(tmp_path / "new").eval()
    with torch.no_grad():
        difference = merged(IDS, MASK) - run.encoder(IDS, MASK)
    assert difference.abs().max() < 1e-5


def test_wrong_folders_are_refused_before_the_run_is_loaded(tmp_path, monkeypatch, capsys):
    answer_with(monkeypatch, None)
    new = str(tmp_path / "new")
    with pytest.raises(SystemExit, match="2"):
        export.main(["run"])
    assert "give --merge DIR, --peft DIR, or both" in capsys.readouterr().err
    for other in (new, os.path.join(new, "inside")):
        with pytest.raises(SystemExit, match="2"):
            export.main(["run", "--merge", new, "--peft", other])
        with pytest.raises(SystemExit, match="2"):
            export.main(["run", "--merge", other, "--peft", new])
        assert capsys.readouterr().err.count("different folders, none in the other") == 2
    with pytest.raises(SystemExit, match="2"):
        export.main(["run", "--peft", str(tmp_path)])
    assert "is there already: give a new folder" in capsys.readouterr().err


def test_a_run_that_cannot_be_loaded_is_one_line(monkeypatch, tmp_path, capsys):
    def refuse(folder, model=None):
        raise InputError(f"{folder}: the run has not ended")

    monkeypatch.setattr(export.train, "load_run", refuse, raising=False)
    with pytest.raises(SystemExit, match="2"):
        export.main(["some/run", "--merge", str(tmp_path / "new")])
    assert capsys.readouterr().err == "error: some/run: the run has not ended\n"


@pytest.mark.parametrize("flag", ["--merge", "--peft"])
def test_a_folder_that_cannot_be_filled_does_not_appear(tmp_path, monkeypatch, capsys, flag):
    make_checkpoint(tmp_path / "base")
    answer_with(monkeypatch, make_run(tmp_path / "base", "mean"))

    def full_disk(path, tensors):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(export, "write_safetensors", full_disk)
    with pytest.raises(SystemExit, match="2"):
        export.main(["run", flag, str(tmp_path / "new")])
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["base"]
