"""Download models of the Hugging Face hub and GLUE tasks into the cache, each of them once.

$HF_ENDPOINT and $GLUE_ENDPOINT name other servers. $HF_TOKEN is sent to the hub's own host only.
"""

import contextlib
import hashlib
import http.client
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
import zipfile
from urllib.parse import urlsplit

from data import GLUE, InputError, read_text
from extras.checkpoints import read_config
from extras.files import cache_path, write

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HUB = ("HF_ENDPOINT", "https://huggingface.co")
GLUE_SERVER = ("GLUE_ENDPOINT", "https://dl.fbaipublicfiles.com")
ZIP_NAMES = {"qnli": "QNLIv2", "qqp": "QQP-clean"}  # the others are named like their folder
MRPC_PAIRS = "senteval/senteval_data/msr_paraphrase_train.txt"
MRPC_PAIRS_SHA256 = "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"
MRPC_DEV = "glue/data/mrpc_dev_ids.tsv"
MRPC_DEV_SHA256 = "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"
PAUSES = (0, 1, 2, 4)  # seconds before each attempt
TIMEOUT = 30  # seconds without a byte


class NotThere(InputError):
    """The server has no such file (status 404)."""


def address_of(variable, default):
    """Return a server's address: the environment variable, or the default. Raises InputError."""
    address = os.environ.get(variable) or default
    if not re.match(r"https?://\w", address):
        raise InputError(f"{variable}={address}: give an address that begins with https://")
    return address.rstrip("/")


def add_token(request):
    """Add $HF_TOKEN to a request if it goes to the hub's own host. Raises InputError."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token.isascii() or not token.isprintable():
        raise InputError("HF_TOKEN holds characters that no token has: set it again")
    # The first two parts of an address are its scheme, and its host with the port.
    if token and urlsplit(request.full_url)[:2] == urlsplit(address_of(*HUB))[:2]:
        request.add_unredirected_header("Authorization", f"Bearer {token}")


class TokenRedirect(urllib.request.HTTPRedirectHandler):
    """Follow redirects, and decide for each of them whether the token goes along."""

    def redirect_request(self, *details):
        request = super().redirect_request(*details)
        add_token(request)
        return request


OPENER = urllib.request.build_opener(TokenRedirect)


def fetch(url, path, sha256=None):
    """Download url to path, unless path is there already. Only one process may do so: see lock.

    What came before a failure stays in PATH.part, and the next call goes on from there.
    Raises NotThere for status 404, InputError for other failures.
    """
    if os.path.isfile(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = f"{path}.part"
    for pause in PAUSES:
        time.sleep(pause)
        problem = attempt(url, part)
        if problem is None:
            break
    else:
        raise InputError(f"{url}: {problem}; gave up after {len(PAUSES)} attempts")
    if sha256 is not None:
        with open(part, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != sha256:
            os.remove(part)
            raise InputError(f"{url}: SHA-256 is {found} instead of {sha256}")
    os.replace(part, path)
    os.remove(f"{part}.etag")


def attempt(url, part):
    """Make one request. Return None if `part` is whole now, else why to try again."""
    try:
        return download(url, part)
    except urllib.error.HTTPError as error:
        problem = f"{error.code} {error.reason}".partition("\n")[0]
        if error.code == 404:
            raise NotThere(f"{url}: {problem}") from None
        if error.code == 416:  # `part` is longer than the file on the server
            write(part, "")
        elif error.code < 500 and error.code not in (408, 429):
            raise InputError(f"{url}: {problem}: misspelt, or private (set HF_TOKEN)?") from None
        return problem
    except urllib.error.URLError as error:
        return f"cannot be reached: {error.reason}"
    except (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        return f"the connection broke: {error}"


def download(url, part):
    """Download url, or what `part` lacks of it. Return None, or why `part` is not whole."""
    request = urllib.request.Request(url, headers={"User-Agent": "heterolora"})
    add_token(request)
    have = os.path.getsize(part) if os.path.isfile(part) else 0
    etag = read_text(f"{part}.etag") if os.path.isfile(f"{part}.etag") else ""
    if have and etag:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag)  # a server with another version sends all of it
    with OPENER.open(request, timeout=TIMEOUT) as response:
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise InputError(f"{url}: a web page came instead: does the network want a login?")
        total = response.length
        if response.status == 206:
            rest = re.fullmatch(rf"bytes {have}-\d+/(\d+)", headers.get("Content-Range", ""))
            if rest is None or headers.get("ETag") != etag:
                write(part, "")
                return "another part came than the one asked for"
            total = int(rest[1])
        else:
            have = 0
            write(part, "")
            is_strong = headers.get("ETag", "").startswith('"')  # W/"..." vouches for no bytes
            write(f"{part}.etag", headers["ETag"] if is_strong else "")
        with open(part, "ab") as file:
            while chunk := response.read(2**18):
                have += file.write(chunk)
                if sys.stderr.isatty():
                    print(f"\rdownload {have / 1e6:.1f} MB", end="", file=sys.stderr, flush=True)
    print(f"\rdownload {url}: {have / 1e6:.1f} MB", file=sys.stderr)
    if have == 0:
        return "the file is empty"
    return None if total in (None, have) else f"{have} bytes came instead of {total}"


@contextlib.contextmanager
def lock():
    """Wait until no other process downloads. The lock ends with the process, however it ends."""
    with open(cache_path("lock"), "w") as file:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hub_folder(name):
    """Return a cache folder with the config, tokenizer files and weights of a hub model.

    Raises InputError if the hub lacks one of them, or the model is not of a supported kind.
    """
    folder = cache_path("hub", *name.split("/"))
    there = os.listdir(folder) if os.path.isdir(folder) else []
    has_vocabulary = "vocab.txt" in there or {"vocab.json", "merges.txt"} <= set(there)
    has_weights = "model.safetensors" in there or "pytorch_model.bin" in there
    if "config.json" in there and has_vocabulary and has_weights:
        return folder

    def get(file):
        try:
            fetch(f"{address_of(*HUB)}/{name}/resolve/main/{file}", os.path.join(folder, file))
        except NotThere:
            return False
        return True

    with lock():
        if not get("config.json"):
            raise InputError(f"{name} is no folder here, and the hub has no config.json for it")
        read_config(folder)  # refuse other architectures before the large files come
        get("tokenizer_config.json")
        if not get("vocab.txt") and not (get("vocab.json") and get("merges.txt")):
            raise InputError(f"{name}: neither vocab.txt nor vocab.json with merges.txt on the hub")
        if not get("model.safetensors") and not get("pytorch_model.bin"):
            raise InputError(
                f"{name}: no weights in one file on the hub: sharded ones are not read"
            )
    return folder


def glue_folder(task):
    """Return a cache folder with MRPC/train.tsv and so on of a task in data.GLUE.

    Raises InputError if it cannot be downloaded.
    """
    data_dir = cache_path("glue")
    folder = os.path.join(data_dir, GLUE[task].folder)
    names = ["train.tsv", GLUE[task].dev_file]
    if all(os.path.isfile(os.path.join(folder, name)) for name in names):
        return data_dir
    with lock():
        try:
            contents = (
                download_mrpc(folder) if task == "mrpc" else download_zip(task, folder, names)
            )
        except InputError as error:
            raise InputError(f"{error}; --data-dir takes files that are here already") from None
        for name, content in zip(names, contents, strict=True):
            write(os.path.join(folder, name), content)
    return data_dir


def download_zip(task, folder, names):
    """Return the bytes of the named files in the archive of a GLUE task. Raises InputError."""
    archive = os.path.join(folder, "archive.zip")
    url = f"{address_of(*GLUE_SERVER)}/glue/data/{ZIP_NAMES.get(task, GLUE[task].folder)}.zip"
    fetch(url, archive)
    try:
        with zipfile.ZipFile(archive) as file:
            return [file.read(f"{GLUE[task].folder}/{name}") for name in names]
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise InputError(f"{url}: a damaged archive: {error}") from None
    finally:
        os.remove(archive)


def download_mrpc(folder):
    """Return train.tsv and dev.tsv of MRPC: dev are the pairs on GLUE's list. Raises InputError."""

    def get_lines(source, sha256):
        path = os.path.join(folder, os.path.basename(source))
        fetch(f"{address_of(*GLUE_SERVER)}/{source}", path, sha256)
        lines = read_text(path).replace("\r\n", "\n").split("\n")
        os.remove(path)
        return [line for line in lines if line]

    header, *pairs = get_lines(MRPC_PAIRS, MRPC_PAIRS_SHA256)
    dev_ids = get_lines(MRPC_DEV, MRPC_DEV_SHA256)
    train = [header]
    dev = [header]
    for pair in pairs:
        _, first_id, second_id, *_ = pair.split("\t")
        is_dev = f"{first_id}\t{second_id}" in dev_ids
        (dev if is_dev else train).append(pair)
    return "\n".join([*train, ""]), "\n".join([*dev, ""])
