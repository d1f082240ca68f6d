"""Download models of the Hugging Face hub and GLUE tasks into the cache, each file once.

A file that was cut off is gone on with. Addresses: $HF_ENDPOINT and $GLUE_ENDPOINT, if set; the
token in $HF_TOKEN is sent to the hub, and to no host that it redirects to.
"""

import contextlib
import hashlib
import http.client
import os
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile

from data import GLUE, InputError
from extras.files import cache_path, write

TRIES = 4
PAUSE = 1.0  # seconds before the second try; doubled each time
TIMEOUT = 30  # seconds without a byte
LARGEST = 2**29  # bytes of an unpacked GLUE file: far more than any should have
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ZIPS = {
    "cola": "CoLA",
    "sst2": "SST-2",
    "rte": "RTE",
    "qnli": "QNLIv2",
    "qqp": "QQP-clean",
    "mnli": "MNLI",
}
MRPC_TEXT = "senteval/senteval_data/msr_paraphrase_train.txt"
MRPC_DEV_IDS = "glue/data/mrpc_dev_ids.tsv"
SHA256 = {
    MRPC_TEXT: "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
    MRPC_DEV_IDS: "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7",
}


class NotThere(InputError):
    """The server has no such file."""


class KeepTokenHome(urllib.request.HTTPRedirectHandler):
    """Send the token to no other host."""

    def redirect_request(self, request, *rest):
        """Follow a redirect, without the token if the host changes."""
        new = super().redirect_request(request, *rest)
        if (
            new
            and urllib.parse.urlsplit(new.full_url)[:2]
            != urllib.parse.urlsplit(request.full_url)[:2]
        ):
            new.remove_header("Authorization")
        return new


opener = urllib.request.build_opener(KeepTokenHome)


def fetch(url, path, token=None):
    """Download url to path, unless it is there. Raises NotThere, or InputError with the reason."""
    if os.path.isfile(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            if fetch_once(url, path + ".part", token):
                os.replace(path + ".part", path)
                with contextlib.suppress(OSError):
                    os.remove(path + ".part.version")
                return
            reason = "fewer bytes came than were announced"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code == 404:
                raise NotThere(f"{url}: {reason}") from None
            if error.code == 416:  # the partial file is longer than the file there
                os.remove(path + ".part")
            elif error.code in (401, 403):
                reason += ": private, gated or misspelt; set HF_TOKEN if it wants one"
                raise InputError(f"{url}: {reason}") from None
            elif error.code < 500 and error.code not in (408, 429):
                raise InputError(f"{url}: {reason}") from None
        except (
            urllib.error.URLError,
            http.client.HTTPException,
            ConnectionError,
            TimeoutError,
        ) as e:
            cause = getattr(e, "reason", None) or e
            reason = f"cannot be reached: {cause}"
            if isinstance(cause, socket.gaierror):  # no such name, or no network
                break
        except ValueError:
            raise InputError(f"{url} is no address") from None
    raise InputError(f"{url}: {reason}")


def fetch_once(url, part, token):
    """Make one request, which goes on with the file `part` if the server's version is the same.

    Returns whether the file is whole.
    """
    version_path = part + ".version"
    headers = {"User-Agent": "heterolora", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token.strip()}"
    have = os.path.getsize(part) if os.path.isfile(part) else 0
    if have and os.path.isfile(version_path):
        with open(version_path, encoding="utf-8") as file:
            headers["If-Range"] = file.read()
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    with opener.open(request, timeout=TIMEOUT) as response:
        goes_on = response.status == 206
        if not goes_on:
            have = 0
        length = response.headers.get("Content-Length")
        with open(part, "ab" if goes_on else "wb") as file:
            version = response.headers.get("ETag", "")
            if not goes_on and version.startswith('"'):  # a weak one says nothing of single bytes
                write(version_path, version)
            done = have
            while chunk := response.read(1 << 18):
                file.write(chunk)
                done += len(chunk)
    print(f"download {os.path.basename(part)[:-5]} | {done / 2**20:.1f} MB", file=sys.stderr)
    return length is None or done == have + int(length)


def hub_folder(name):
    """Return a folder with a hub model's config, tokenizer and weights. Raises InputError."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    folder = cache_path("hub", *name.split("/"))

    def get(file):
        try:
            fetch(f"{endpoint}/{name}/resolve/main/{file}", os.path.join(folder, file), token)
            return True
        except NotThere:
            return False

    if not get("config.json"):
        raise InputError(f"{endpoint} has no model {name}, or no config.json for it")
    if not get(
        "tokenizer_config.json"
    ):  # without it the defaults hold: remember that it is not there
        write(os.path.join(folder, "tokenizer_config.json"), "{}")
    if not get("vocab.txt") and not (get("vocab.json") and get("merges.txt")):
        raise InputError(f"{name} has neither vocab.txt nor vocab.json with merges.txt")
    if not any(get(file) for file in WEIGHTS):
        raise InputError(f"{name} has neither {' nor '.join(WEIGHTS)}; sharded ones are not read")
    return folder


def glue_folder(task):
    """Return a folder that holds a GLUE task as GLUE has it. Raises InputError."""
    data_dir = cache_path("glue")
    form = GLUE[task]
    folder = os.path.join(data_dir, form.folder)
    paths = [os.path.join(folder, name) for name in ("train.tsv", form.dev_file)]
    if all(os.path.isfile(path) for path in paths):
        return data_dir
    endpoint = (os.environ.get("GLUE_ENDPOINT") or "https://dl.fbaipublicfiles.com").rstrip("/")
    sources = [MRPC_TEXT, MRPC_DEV_IDS] if task == "mrpc" else [f"glue/data/{ZIPS[task]}.zip"]
    raw = [os.path.join(folder, os.path.basename(source)) for source in sources]
    try:
        for source, path in zip(sources, raw, strict=True):
            fetch(f"{endpoint}/{source}", path)
            check_sha256(path, SHA256.get(source))
        if task == "mrpc":
            contents = split_mrpc(*raw)
        else:
            contents = [unpack(raw[0], f"{form.folder}/{os.path.basename(p)}") for p in paths]
    except InputError as error:
        raise InputError(f"{error}; --data-dir takes GLUE files that are here already") from None
    for path, content in zip(paths, contents, strict=True):
        write(path, content)
    for path in raw:
        os.remove(path)
    return data_dir


def check_sha256(path, wanted):
    """Remove a file that is not the wanted one, and raise InputError."""
    if wanted is None:
        return
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != wanted:
        os.remove(path)
        raise InputError(f"{path}: SHA-256 is {found} instead of {wanted}")


def unpack(archive, member):
    """Return the bytes of a file in an archive. A damaged one is removed. Raises InputError."""
    try:
        with zipfile.ZipFile(archive) as file:
            if file.getinfo(member).file_size > LARGEST:
                raise ValueError("it is larger than any GLUE file")
            return file.read(member)
    except Exception as error:  # zipfile raises many types for a damaged file
        os.remove(archive)
        raise InputError(f"{archive}: {member} cannot be read from it: {error}") from None


def split_mrpc(text_path, ids_path):
    """Return GLUE's train.tsv and dev.tsv of MRPC, as bytes: dev is what the list of ids names."""
    with open(text_path, encoding="utf-8-sig", newline="") as file:
        header, *rows = [line.rstrip("\r") for line in file.read().split("\n") if line.strip()]
    with open(ids_path, encoding="utf-8-sig", newline="") as file:
        lines = [line.rstrip("\r") for line in file.read().split("\n") if line.strip()]
    dev_ids = {tuple(line.split("\t")) for line in lines}
    train = [header]
    dev = [header]
    for row in rows:
        ids = tuple(row.split("\t")[1:3])
        part = dev if ids in dev_ids else train
        part.append(row)
    return ["\n".join([*part, ""]).encode() for part in (train, dev)]
