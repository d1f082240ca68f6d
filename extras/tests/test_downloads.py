"""What extras/downloads.py and extras/files.py claim, against a server on this machine."""

import http.server
import io
import json
import threading
import zipfile

import pytest

from data import InputError
from extras import downloads, files

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
    """Serve Handler.files, with Range; cut answers short while Handler.cuts is over 0."""

    files = {}
    cuts = 0
    fail = 0
    seen = []

    def do_GET(self):
        Handler.seen.append((self.path, dict(self.headers)))
        if Handler.fail:
            Handler.fail -= 1
            return self.send_error(503)
        if self.path not in Handler.files:
            return self.send_error(404)
        content = Handler.files[self.path]
        tag = f'"{len(content)}-{content[:1].hex()}"'
        start = 0
        if "Range" in self.headers and self.headers["If-Range"] == tag:
            start = int(self.headers["Range"][6:-1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        content = content[start:]
        if Handler.cuts:
            Handler.cuts -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    Handler.files, Handler.seen, Handler.cuts, Handler.fail = {}, [], 0, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(downloads, "PAUSE", 0.001)
    monkeypatch.setenv("HETEROLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("GLUE_ENDPOINT", address)
    yield address
    server.shutdown()


def test_a_file_that_is_cut_off_is_gone_on_with(server, tmp_path):
    Handler.files["/a"] = CONTENT
    Handler.cuts = 2
    downloads.fetch(server + "/a", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert [headers.get("Range") for _, headers in Handler.seen] == [
        None,
        "bytes=5120-",
        "bytes=7680-",
    ]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["a"]


def test_a_partial_file_of_another_version_is_begun_anew(server, tmp_path):
    Handler.files["/a"] = CONTENT
    (tmp_path / "a.part").write_bytes(b"x" * 100)
    (tmp_path / "a.part.version").write_text('"old"')
    downloads.fetch(server + "/a", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_server_in_trouble_is_asked_again_and_at_last_given_up(server, tmp_path):
    Handler.files["/a"] = CONTENT
    Handler.fail = 2
    downloads.fetch(server + "/a", str(tmp_path / "a"))
    Handler.fail = 99
    with pytest.raises(InputError, match="503"):
        downloads.fetch(server + "/a", str(tmp_path / "b"))
    assert len(Handler.seen) == 3 + downloads.TRIES


def test_a_hub_model_is_downloaded_once_with_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("config.json", "vocab.txt", "pytorch_model.bin"):
        Handler.files[f"/some/model/resolve/main/{name}"] = b"{}"
    folder = downloads.hub_folder("some/model")
    assert json.loads(open(folder + "/config.json").read()) == {}
    assert Handler.seen[0][1]["Authorization"] == "Bearer secret"


def test_the_token_is_not_sent_to_another_host():
    request = downloads.urllib.request.Request(
        "https://a.org/x", headers={"Authorization": "Bearer t"}
    )
    handler = downloads.KeepTokenHome()
    for url, is_kept in (("https://a.org/y", True), ("https://b.org/y", False)):
        new = handler.redirect_request(request, None, 302, "Found", {}, url)
        assert new.has_header("Authorization") == is_kept


@pytest.mark.parametrize(
    "present, message",
    [
        ([], "no model some/model"),
        (["config.json"], "neither vocab.txt"),
        (["config.json", "vocab.txt"], "neither model.safetensors"),
    ],
)
def test_what_a_hub_model_lacks_is_said(server, present, message):
    for name in present:
        Handler.files[f"/some/model/resolve/main/{name}"] = b"{}"
    with pytest.raises(InputError, match=message):
        downloads.hub_folder("some/model")


def test_a_glue_zip_is_unpacked_and_a_damaged_one_not_kept(server):
    Handler.files["/glue/data/SST-2.zip"] = b"no zip"
    with pytest.raises(InputError, match="--data-dir"):
        downloads.glue_folder("sst2")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("SST-2/train.tsv", "sentence\tlabel\ngood\t1\n")
        file.writestr("SST-2/dev.tsv", "sentence\tlabel\nbad\t0\n")
    Handler.files["/glue/data/SST-2.zip"] = content.getvalue()
    folder = downloads.glue_folder("sst2")
    assert open(folder + "/SST-2/dev.tsv").read() == "sentence\tlabel\nbad\t0\n"
    requests = len(Handler.seen)
    downloads.glue_folder("sst2")
    assert len(Handler.seen) == requests


def test_mrpc_is_split_by_the_list_of_ids(tmp_path):
    (tmp_path / "text").write_text("Quality\tID\tID\n1\t10\t11\ta\tb\r\n0\t20\t21\tc\td\n")
    (tmp_path / "ids").write_text("20\t21\n")
    train, dev = downloads.split_mrpc(tmp_path / "text", tmp_path / "ids")
    assert train == b"Quality\tID\tID\n1\t10\t11\ta\tb\n"
    assert dev == b"Quality\tID\tID\n0\t20\t21\tc\td\n"


def test_a_changed_mrpc_is_refused(server):
    Handler.files["/" + downloads.MRPC_TEXT] = b"other"
    with pytest.raises(InputError, match="SHA-256"):
        downloads.glue_folder("mrpc")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    files.write(tmp_path / "a", "old")

    def fail(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        files.write(tmp_path / "a", fail)
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "a") as folder:
        files.write(folder + "/x", "1")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with files.new_folder(tmp_path / "a") as folder:
        files.write(folder + "/x", "1")
    assert (tmp_path / "a" / "x").read_text() == "1"
    with pytest.raises(InputError, match="there already"), files.new_folder(tmp_path / "a"):
        pass


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_file_that_holds_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "a").write_text(text)
    with pytest.raises(InputError):
        files.read_json(tmp_path / "a")
