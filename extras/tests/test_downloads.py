"""What extras/downloads.py and transfer.py claim, against a server on this machine."""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import threading
import zipfile
import zlib

import pytest
import torch

from data import GLUE, InputError
from extras import checkpoints, downloads, transfer
from model import Encoder, EncoderConfig

BODY = random.Random(0).randbytes(900_000)
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 8, "max_position_embeddings": 16}
CONFIGS = {
    "bert": EncoderConfig("bert", 105, **SIZES),
    "roberta": EncoderConfig("roberta", 8, pad_token_id=1, **SIZES),
}
BERT, ROBERTA = [json.dumps(vars(config)).encode() for config in CONFIGS.values()]
VOCAB_TXT = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + b"".join(b"w%03d\n" % i for i in range(100))
ROBERTA_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"]
VOCAB_JSON = json.dumps({token: i for i, token in enumerate(ROBERTA_TOKENS)}).encode()


def tensors(kind):
    """Return the weights of an encoder under Hugging Face's names."""
    state = Encoder(CONFIGS[kind]).state_dict()
    return {checkpoints.hf_name(name): tensor for name, tensor in state.items()}


def safetensors(tensors):
    """Return a .safetensors file of tensors in float32."""
    header = {}
    content = b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        offsets = [len(content), len(content) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        content += raw
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


def pickled(value):
    """Return what torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WEIGHTS = safetensors(tensors("bert"))


class Server(http.server.ThreadingHTTPServer):
    """Serve `content`, {path: bytes}, and note every request in `asked`, [(path, headers)].

    faults: {path: [what goes wrong with the first request, with the second, ...]}, each a status
    {"status": 500} without the body or {"as": 206} with it, a redirect {"to": address}, a body that
    ends early {"cut": bytes}, another body {"body": bytes}, or headers that are not true or None.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.content, self.faults, self.asked = {}, {}, []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """Print nothing when a client hangs up early, as one that refuses an answer does."""

    def ranges(self):
        return [headers.get("Range") for _, headers in self.asked]


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        faults = self.server.faults.get(self.path, [])
        fault = faults.pop(0) if faults else {}
        if "to" in fault:
            self.send_response(302)
            self.send_header("Location", fault["to"])
            return self.end_headers()
        if "status" in fault or self.path not in self.server.content:
            return self.send_error(fault.get("status", 404))
        body = fault.get("body", self.server.content[self.path])
        etag = f'"{zlib.crc32(body)}"'
        start = 0
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and self.headers.get("If-Range") == etag:
            start = int(wanted[1])
        if start > len(body):
            return self.send_error(416)
        headers = {"ETag": etag, "Content-Type": "text/plain"}
        headers["Content-Length"] = str(len(body) - start)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        headers |= {name: value for name, value in fault.items() if name[0].isupper()}
        self.send_response(fault.get("as", 206 if start else 200))
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[start : start + fault.get("cut", len(body))])


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = Server()
    monkeypatch.setattr(transfer, "PAUSES", (0, 0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HETEROLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("GLUE_ENDPOINT", server.url + "/")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def accept(path):
    """Accept any file."""


def fetch(server, folder, check=accept):
    """Download /file from the server into a folder, and return its content."""
    path = str(folder / "file")
    transfer.fetch(server.url + "/file", path, check)
    with open(path, "rb") as file:
        return file.read()


def files_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_a_download_that_is_cut_goes_on_where_it_ended(server, tmp_path, capsys):
    server.content["/file"] = BODY
    server.faults["/file"] = [{"cut": 500_000}, {"status": 503}, {"cut": 100_000}]
    assert fetch(server, tmp_path / "a") == BODY
    assert server.ranges() == [None, "bytes=500000-", "bytes=500000-", "bytes=600000-"]
    assert files_in(tmp_path) == ["file"]
    assert "file: 0.9 MB" in capsys.readouterr().err
    assert fetch(server, tmp_path / "a") == BODY  # there already: no request
    assert len(server.asked) == 4


def test_the_next_call_goes_on_with_the_same_version_and_begins_anew_with_another(server, tmp_path):
    for body, expected in ((BODY, "bytes=500000-"), (BODY[::-1], None)):
        server.content["/file"] = BODY
        server.faults["/file"] = [{"cut": 500_000}] + [{"status": 500}] * 3
        folder = tmp_path / str(expected)
        with pytest.raises(InputError, match="500 Internal Server Error; gave up after 4"):
            fetch(server, folder)
        assert files_in(folder) == ["unfinished-file", "unfinished-file.etag"]
        server.content["/file"] = body
        assert fetch(server, folder) == body
        assert server.ranges()[-1] == "bytes=500000-"


@pytest.mark.parametrize(
    "lie", [{"Content-Range": "bytes 7-899999/900000"}, {"ETag": '"other"'}, {"status": 416}]
)
def test_a_part_that_does_not_fit_is_not_glued_on(server, tmp_path, lie):
    server.content["/file"] = BODY
    server.faults["/file"] = [{"cut": 500_000}, lie]
    assert fetch(server, tmp_path) == BODY
    assert server.ranges() == [None, "bytes=500000-", None]


@pytest.mark.parametrize("etag", ['"1"', "", None])
def test_a_part_that_was_not_asked_for_is_not_kept(server, tmp_path, etag):
    server.content["/file"] = BODY
    part = {"as": 206, "ETag": etag, "Content-Range": "bytes 0-899999/900000"}
    server.faults["/file"] = [part, {"cut": 500_000, "ETag": etag} | part, {}]
    assert fetch(server, tmp_path) == BODY
    assert server.ranges() == [None, None, None]


def test_a_version_without_a_strong_name_is_not_gone_on_with(server, tmp_path):
    server.content["/file"] = BODY
    server.faults["/file"] = [{"cut": 500_000, "ETag": 'W/"weak"'}]
    assert fetch(server, tmp_path) == BODY
    assert server.ranges() == [None, None]


@pytest.mark.parametrize(
    "faults, message, requests",
    [
        ([{"status": 404}], "404", 1),
        ([{"status": 401}], "401 Unauthorized: .*HF_TOKEN", 1),
        ([{"to": "/file"}] * 20, "infinite loop", 5),
        ([{"to": "http://["}] * 4, "the download broke: Invalid IPv6 URL; gave up", 4),
        ([{"Content-Type": "text/html"}], "a web page came instead", 1),
        ([{"cut": 0, "Content-Length": "0"}] * 4, "the file is empty", 4),
        ([{"Content-Length": "999999", "ETag": ""}] * 4, "900000 bytes came instead of 999999", 4),
        ([{"Content-Length": None}] * 4, "does not say how long the file is", 4),
        ([{"as": 203}] * 4, "status 203 came", 4),
    ],
)
def test_a_download_that_fails_names_the_address_and_leaves_no_file(
    server, tmp_path, faults, message, requests
):
    server.content["/file"] = BODY
    server.faults["/file"] = faults
    with pytest.raises(InputError, match=f"{server.url}/file: .*{message}") as error:
        fetch(server, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "file").exists()
    assert len(server.asked) == requests


def test_a_server_that_cannot_be_reached_is_an_error(server, tmp_path):
    with pytest.raises(InputError, match="the download broke: .*refused.*; gave up after 4"):
        transfer.fetch("http://127.0.0.1:9/file", str(tmp_path / "file"), accept)


def test_a_network_that_goes_down_in_mid_download_is_tried_again(server, tmp_path, monkeypatch):
    server.content["/file"] = BODY
    download = transfer.download
    errors = [OSError(errno.ENETUNREACH, "Network is unreachable")]

    def first_fails(url, part):
        if errors:
            raise errors.pop()
        return download(url, part)

    monkeypatch.setattr(transfer, "download", first_fails)
    assert fetch(server, tmp_path) == BODY
    errors.append(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        transfer.fetch(f"{server.url}/file", str(tmp_path / "other"), accept)


def test_a_file_with_another_sha256_is_refused_and_not_kept(server, tmp_path):
    server.content["/file"] = BODY
    for wanted in ("0" * 64, hashlib.sha256(BODY).hexdigest()):
        check = functools.partial(downloads.check_sha256, wanted=wanted)
        if wanted.startswith("0"):
            with pytest.raises(
                InputError, match="file: refused: SHA-256 is [0-9a-f]{64} instead of 0"
            ):
                fetch(server, tmp_path, check)
            assert files_in(tmp_path) == []
    assert fetch(server, tmp_path, check) == BODY


def test_the_token_goes_to_the_hub_and_to_no_other_host(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret\n")  # as a file with a token ends
    other = Server()
    server.content["/file"] = other.content["/far"] = BODY
    server.faults["/file"] = [{"to": "/file"}, {"to": other.url + "/far"}]
    assert fetch(server, tmp_path) == BODY
    assert [headers.get("Authorization") for _, headers in server.asked] == ["Bearer secret"] * 2
    transfer.fetch(other.url + "/far", str(tmp_path / "far"), accept)
    assert [headers.get("Authorization") for _, headers in other.asked] == [None, None]
    other.shutdown()
    other.server_close()


@pytest.mark.parametrize("token", ["secret\nX: y", "sécret"])
def test_a_broken_token_is_refused_and_not_shown(server, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match="HF_TOKEN") as error:
        fetch(server, tmp_path)
    assert "cret" not in str(error.value)


def on_the_hub(server, **files):
    """Put files of the model some/model on the server. Write a dot in a name as two underscores."""
    for name, content in files.items():
        server.content[f"/some/model/resolve/main/{name.replace('__', '.')}"] = content


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": BERT, "vocab__txt": VOCAB_TXT, "model__safetensors": WEIGHTS},
        {
            "config__json": ROBERTA,
            "vocab__json": VOCAB_JSON,
            "merges__txt": b"a b",
            "pytorch_model__bin": pickled(tensors("roberta")),
        },
    ],
)
def test_a_hub_model_is_downloaded_once_weights_last(server, files, monkeypatch):
    on_the_hub(server, tokenizer_config__json=b"{}", **files)
    folder = downloads.hub_folder("some/model")
    assert len(os.listdir(folder)) == len(server.content)
    assert server.asked[-1][0] in [path for path in server.content if path.endswith(("s", "bin"))]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # from here on the network is down
    assert downloads.hub_folder("some/model") == folder


@pytest.mark.parametrize("lost", ["config.json", "vocab.txt", "model.safetensors"])
def test_a_folder_without_config_vocabulary_or_weights_is_filled_up(server, lost):
    on_the_hub(server, config__json=BERT, vocab__txt=VOCAB_TXT, model__safetensors=WEIGHTS)
    folder = downloads.hub_folder("some/model")
    os.remove(os.path.join(folder, lost))
    downloads.hub_folder("some/model")
    assert lost in os.listdir(folder)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "some/model is no folder here, and the hub has no config.json"),
        ({"config__json": b'{"model_type": "t5"}', "model__safetensors": WEIGHTS}, "t5"),
        ({"config__json": ROBERTA, "vocab__json": VOCAB_JSON}, "neither vocab.txt nor"),
        ({"config__json": BERT, "vocab__txt": VOCAB_TXT}, "sharded ones are not read"),
        (
            {"config__json": BERT, "vocab__txt": VOCAB_TXT, "added_tokens__json": b'{"[E]": 9}'},
            r"tokens beside the usual ones are not supported: \[E\]",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_its_weights_come(server, files, message):
    on_the_hub(server, **files)
    with pytest.raises(InputError, match=message) as error:
        downloads.hub_folder("some/model")
    assert "\n" not in str(error.value)
    downloaded = {path for path, _ in server.asked if path in server.content}
    assert not any("model." in path for path in downloaded)


JUNK = [b"<!doctype html>", b"not what was asked for", b"\x1f\x8b\x08\0\xff", BODY]
JUNK += [b'{"error": "busy"}']
WHOLE = {
    "config.json": BERT,
    "tokenizer_config.json": b"{}",
    "vocab.txt": VOCAB_TXT,
    "model.safetensors": WEIGHTS,
}
WHOLE_ROBERTA = {
    "config.json": ROBERTA,
    "vocab.json": VOCAB_JSON,
    "merges.txt": b"a b",
    "pytorch_model.bin": pickled(tensors("roberta")),
}


@pytest.mark.parametrize("model", [WHOLE, WHOLE_ROBERTA], ids=["bert", "roberta"])
def test_an_answer_that_cannot_be_read_does_not_enter_the_cache(server, tmp_path, model):
    folder = tmp_path / "cache" / "hub" / "some" / "model"
    for name, content in model.items():
        address = f"/some/model/resolve/main/{name}"
        server.content[address] = content
        for body in (*JUNK, content[: len(content) // 2]):
            server.faults[address] = [{"body": body}]
            with pytest.raises(InputError, match=f"main/{name}: refused: .*unfinished-{name}"):
                downloads.hub_folder("some/model")
            assert not [file for file in os.listdir(folder) if name in file]
        with contextlib.suppress(InputError):  # until the last one, the next file is missing
            downloads.hub_folder("some/model")
    for name, content in model.items():
        assert (folder / name).read_bytes() == content


QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("model.safetensors", safetensors({"a": torch.ones(2)}), "embeddings.* is missing"),
        ("model.safetensors", {QUERY: torch.ones(8, 9)}, r"\[8, 9\], and config.json asks for"),
        ("model.safetensors", {QUERY: torch.full((8, 8), torch.nan)}, "not finite"),
        ("model.safetensors", {"encoder.layer.1.x": torch.ones(1)}, "an encoder without it"),
        (
            "vocab.txt",
            VOCAB_TXT + b"one more\n",
            "106 tokens with ids up to 105, and the model has 105",
        ),
        ("tokenizer_config.json", b'{"tokenizer_class": "XLNetTokenizer"}', "XLNet.*supported"),
    ],
    ids=range(6),
)
def test_files_that_do_not_fit_together_are_not_admitted(server, name, content, message):
    if isinstance(content, dict):
        content = safetensors(tensors("bert") | content)
    for file, whole in (WHOLE | {name: content}).items():
        server.content[f"/some/model/resolve/main/{file}"] = whole
    for _ in range(2):  # the second time, too
        with pytest.raises(InputError, match=message) as error:
            downloads.hub_folder("some/model")
        assert "\n" not in str(error.value)
    server.content[f"/some/model/resolve/main/{name}"] = WHOLE[name]  # the server is mended
    assert set(os.listdir(downloads.hub_folder("some/model"))) == set(WHOLE)


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"vocab_size": 500}])
def test_a_config_of_another_model_does_not_stay(server, change):
    other = json.dumps(vars(CONFIGS["bert"]) | change).encode()
    on_the_hub(server, config__json=other, vocab__txt=VOCAB_TXT, model__safetensors=WEIGHTS)
    with pytest.raises(InputError, match="config.json asks for|the model has 500 tokens"):
        downloads.hub_folder("some/model")
    on_the_hub(server, config__json=BERT)
    folder = downloads.hub_folder("some/model")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "vocab.txt"]


def test_a_file_in_the_place_of_the_folder_ends_the_download_at_once(server, tmp_path):
    on_the_hub(server, config__json=BERT)
    place = tmp_path / "cache" / "hub" / "some" / "model"
    place.parent.mkdir(parents=True)
    place.write_text("")
    with pytest.raises(OSError):
        downloads.hub_folder("some/model")
    assert len(server.asked) == 1  # another attempt would not help


def test_a_name_that_is_misspelt_leaves_no_folder(server, tmp_path):
    with pytest.raises(InputError, match="the hub has no config.json"):
        downloads.hub_folder("some/model")
    assert os.listdir(tmp_path / "cache") == ["lock"]


def check_the_weights():
    torch.set_num_threads(1)  # a process made by fork has lost torch's threads
    folder = downloads.hub_folder("some/model")
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        assert file.read() == WEIGHTS


def test_two_processes_that_download_at_the_same_time_both_get_whole_files(server):
    on_the_hub(server, config__json=BERT, vocab__txt=VOCAB_TXT, model__safetensors=WEIGHTS)
    weights = "/some/model/resolve/main/model.safetensors"
    server.faults[weights] = [{"cut": 1000}, {"cut": 1000}]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=check_the_weights) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path for path, _ in server.asked].count(weights) == 3  # the second process waited


def test_an_address_without_https_is_refused(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    with pytest.raises(InputError, match="HF_ENDPOINT=mirror.example: give an address"):
        downloads.hub_folder("some/model")


def tsv(task, text):
    """Return a GLUE file with one example."""
    form = GLUE[task]
    header = "\t".join([*form.texts, form.label])
    return header + "\n" + "\t".join([text] * len(form.texts) + [form.labels[0]]) + "\n"


def zipped(**files):
    """Return a zip archive. Write RTE/train.tsv as RTE_train."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            folder, _, split = name.partition("_")
            archive.writestr(f"{folder}/{split}.tsv", content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "task, archive, folder, dev",
    [
        ("rte", "RTE", "RTE", "dev"),
        ("qnli", "QNLIv2", "QNLI", "dev"),
        ("qqp", "QQP-clean", "QQP", "dev"),
        ("mnli", "MNLI", "MNLI", "dev_matched"),
    ],
)
def test_glue_is_downloaded_once_and_taken_out_of_its_zip(
    server, tmp_path, task, archive, folder, dev
):
    files = {f"{folder}_train": tsv(task, "a"), f"{folder}_{dev}": tsv(task, "b"), ".._evil": "c"}
    content = zipped(**files)
    server.content[f"/glue/data/{archive}.zip"] = content
    data_dir = downloads.glue_folder(task)
    assert downloads.glue_folder(task) == data_dir
    assert len(server.asked) == 1
    assert files_in(tmp_path / "cache") == [f"{dev}.tsv", "lock", "train.tsv"]
    with open(os.path.join(data_dir, folder, f"{dev}.tsv")) as file:
        assert file.read() == tsv(task, "b")


A, B = tsv("rte", "a"), tsv("rte", "b")


def test_what_another_process_downloaded_meanwhile_is_not_downloaded_again(server, monkeypatch):
    server.content["/glue/data/RTE.zip"] = zipped(RTE_train=A, RTE_dev=B)
    lock = downloads.lock

    def lock_after_another(path, wait):
        monkeypatch.setattr(downloads, "lock", lock)
        downloads.glue_folder("rte")  # the other process
        return lock(path, wait)

    monkeypatch.setattr(downloads, "lock", lock_after_another)
    downloads.glue_folder("rte")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "archive, message",
    [
        (b"no zip", "refused: a damaged archive"),
        (zipped(RTE_train=A), "refused: a damaged archive: .*no item named 'RTE/dev.tsv'"),
        (zipped(RTE_train=A, RTE_dev=B)[:-30], "refused: a damaged archive"),
        (zipped(RTE_train=A, RTE_dev="<html>"), "unfinished-dev.tsv, line 1: want one column"),
        (zipped(RTE_train=A + "b\n", RTE_dev=B), "unfinished-train.tsv, line 3: 1 columns"),
    ],
    ids=range(5),
)
def test_an_archive_that_cannot_be_read_is_not_kept(server, tmp_path, archive, message):
    server.content["/glue/data/RTE.zip"] = archive
    with pytest.raises(InputError, match=f"{message}.*; --data-dir takes files"):
        downloads.glue_folder("rte")
    assert not {"dev.tsv", "archive.zip"} & set(files_in(tmp_path / "cache"))
    server.content["/glue/data/RTE.zip"] = zipped(RTE_train=A, RTE_dev=B)
    downloads.glue_folder("rte")
    assert files_in(tmp_path / "cache") == ["dev.tsv", "lock", "train.tsv"]


def test_mrpc_is_split_by_the_list_of_dev_pairs_and_checked(server, monkeypatch):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    pairs = f"{header}1\t11\t12\tA \u2028 b\tC\r\n0\t21\t22\tD\tE\r\n1\t12\t11\tF\tG\r\n".encode()
    server.content = {f"/{downloads.MRPC_PAIRS}": pairs, f"/{downloads.MRPC_DEV}": b"11\t12\n"}
    with pytest.raises(InputError, match="SHA-256 .*--data-dir"):
        downloads.glue_folder("mrpc")
    for name in ("MRPC_PAIRS", "MRPC_DEV"):
        content = server.content["/" + getattr(downloads, name)]
        monkeypatch.setattr(downloads, f"{name}_SHA256", hashlib.sha256(content).hexdigest())
    folder = os.path.join(downloads.glue_folder("mrpc"), "MRPC")
    rows = {}
    for split in ("train", "dev"):
        with open(os.path.join(folder, f"{split}.tsv"), encoding="utf-8", newline="") as file:
            rows[split] = file.read().split("\n")
    assert rows["dev"][1:] == ["1\t11\t12\tA \u2028 b\tC", ""]
    assert rows["train"][1:] == ["0\t21\t22\tD\tE", "1\t12\t11\tF\tG", ""]
    assert rows["train"][0] == rows["dev"][0] == "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    assert sorted(os.listdir(folder)) == ["dev.tsv", "train.tsv"]
