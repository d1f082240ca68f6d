"""Files, ours and other people's: whole or not there, downloads, safetensors, Hugging Face and PEFT folders, and runs to look at.

Nothing here knows how to train. `model.py` reads and writes checkpoints with it, `data.py` fetches GLUE, `train.py` keeps runs.
"""
import contextlib
import dataclasses
import hashlib
import html
import http.client
import itertools
import json
import math
import mmap
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import sys
import tempfile
import time
import types
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None


class InputError(ValueError):
    """Input that cannot work. The message says what was given, what is wrong with it, and what to do: exit status 2."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


class DownloadError(InputError):
    """A file that cannot be fetched; the message names its address."""


class NotThere(DownloadError):
    """404: the server has no such file"""


# ------------------------------------------------------------------------------------------------ whole files

def write(path, content):
    """Write bytes, text, or whatever content(binary file) writes, to a temporary name, then rename: the file at `path` is whole, or as
    it was. Raises OSError."""
    temporary = f"{path}.unfinished"
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if isinstance(error, RuntimeError):  # torch.save's word for a disk that is full
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise


@contextlib.contextmanager
def new_folder(folder):
    """`with new_folder(path) as temporary:` fill it, and it appears at `path`, whole or not at all. Raises InputError if it is there."""
    folder = os.path.abspath(folder)
    if os.path.exists(folder):
        raise InputError(f"{folder} is there already: give a new folder")
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder), prefix=".unfinished-") as temporary:
        whole = os.path.join(temporary, "whole")
        os.mkdir(whole)
        yield whole
        os.rename(whole, folder)


def lock(path, wait=True):
    """Keep other processes from locking `path` until the file that this gives is closed or the process ends, however it ends.
    Raises BlockingIOError if it is locked and wait is False."""
    file = open(path, "a")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            file.close()
            raise
        print(f"waiting for another process, which has {path}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    return file


def cache_path(*parts):
    """A path in HETEROLORA_CACHE, or in heterolora in the user's cache folder, which is made -> str"""
    root = os.environ.get("HETEROLORA_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "heterolora")
    os.makedirs(root, exist_ok=True)
    return os.path.join(root, *parts)


def read_json(path, error=InputError):
    """A file that holds a JSON object -> dict. Raises InputError, or the kind of it that is given."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path}: cannot be read: {reason}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: a JSON object is wanted, and it holds a {type(value).__name__}")
    return value


# ------------------------------------------------------------------------------------------------ downloads

TRIES, PAUSE = 4, 1.0  # attempts that bring nothing new, seconds before the second; doubled each time
TIMEOUT = 30  # seconds without a byte


class _SameHost(urllib.request.HTTPRedirectHandler):
    """A redirect to another host does not get the token."""

    def redirect_request(self, request, *rest):
        new = super().redirect_request(request, *rest)
        if new and urllib.parse.urlsplit(new.full_url)[:2] != urllib.parse.urlsplit(request.full_url)[:2]:
            new.remove_header("Authorization")
        return new


_opener = urllib.request.build_opener(_SameHost)


class _Progress:
    """One line on stderr: overwritten in a terminal, else written once, at the end."""

    def __init__(self, name, total):
        self.name, self.total, self.start, self.last = name, total, time.monotonic(), 0.0

    def __call__(self, done, end=False):
        now = time.monotonic()
        if end or (sys.stderr.isatty() and now - self.last > 0.2):
            self.last, share = now, f" of {self.total / 2**20:.1f} MB, {done / max(self.total, 1):.0%}" if self.total is not None else " MB"
            line = f"download {self.name} | {done / 2**20:.1f}{share}, {now - self.start:.0f} s"
            print("\r" * sys.stderr.isatty() + line, end="\n" if end else "", file=sys.stderr, flush=True)


def _read(response):
    try:
        return response.read(1 << 18)
    except OSError as error:  # of the network, not of the disk
        raise ConnectionError(error) from None


def _attempt(url, part, headers):
    """One request for url, appended to `part` where the server goes on from there. True: whole. False: cut short."""
    note = part + ".validator"  # what the server called the version that `part` is of; a file that has changed starts anew
    validator, have = "", os.path.getsize(part) if os.path.isfile(part) else 0
    if have and os.path.isfile(note):
        with open(note, encoding="utf-8") as file:
            validator = file.read()
    request = urllib.request.Request(url, headers={"User-Agent": "heterolora", "Accept-Encoding": "identity", **headers})
    if validator:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", validator)
    with _opener.open(request, timeout=TIMEOUT) as response:
        goes_on, tag = response.status == 206, response.headers.get("ETag", "")
        given = re.fullmatch(rf"bytes {have}-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError(f"{url}: comes as {response.headers['Content-Encoding']}, which was not asked for")
        if goes_on and (not given or tag and validator.startswith('"') and tag != validator):  # not what was asked for, or of another version
            os.remove(part)
            return False
        length, start = response.headers.get("Content-Length"), have if goes_on else 0
        total = int(given[1]) if goes_on else None if length is None else int(length)
        with open(part, "ab" if goes_on else "wb") as file:
            if not goes_on:
                with open(note, "w", encoding="utf-8") as other:
                    other.write(response.headers.get("Last-Modified", "") if not tag or tag.startswith("W/") else tag)
            progress, done = _Progress(os.path.basename(part).removesuffix(".part"), total), start
            while chunk := _read(response):
                file.write(chunk)
                done += len(chunk)
                progress(done)
        progress(done, end=True)
        return total is None or done == total


def fetch(url, path, sha256=None, token=None):
    """Download url to path, unless it is there. A partial file stays in PATH.part and is gone on with, if the server can and the file there
    has not changed. Checked against the announced size, and SHA-256 where given. Raises NotThere, DownloadError; OSError of the disk."""
    if os.path.isfile(path):
        return path
    token = (token or "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise DownloadError(f"{url}: HF_TOKEN has characters in it that no token has")
    part, most, idle, reason = path + ".part", -1, 0, ""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    while idle < TRIES:
        try:
            if _attempt(url, part, {"Authorization": f"Bearer {token}"} if token else {}):
                break
            reason = "fewer bytes came than were announced"
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}"
            if error.code == 404:
                raise NotThere(f"{url}: {reason}") from None
            if error.code == 416 and os.path.isfile(part):
                os.remove(part)
            elif error.code < 500 and error.code not in (408, 416, 429):
                advice = ": private, gated or misspelt; set HF_TOKEN if it wants one" if error.code in (401, 403) else ""
                raise DownloadError(f"{url}: {reason}{advice}") from None
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            cause = getattr(error, "reason", None) or error
            reason = f"cannot be reached: {cause}"
            if isinstance(cause, socket.gaierror):  # no such name, or no network: nor will it be in a second
                raise DownloadError(f"{url}: {reason}") from None
        except DownloadError:
            raise
        except ValueError:
            raise DownloadError(f"{url}: this, or what it redirects to, is no address") from None
        have = os.path.getsize(part) if os.path.isfile(part) else 0
        idle, most = (0 if have > most >= 0 else idle + 1), max(have, most)  # as long as something new comes, go on
        if idle < TRIES:
            time.sleep(PAUSE * 2 ** max(idle - 1, 0))
    else:
        raise DownloadError(f"{url}: {reason}; gave up after {TRIES} attempts")
    if sha256:
        with open(part, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != sha256:
            os.remove(part)
            raise DownloadError(f"{url}: not the file that was wanted: SHA-256 {found} instead of {sha256}")
    os.replace(part, path)
    with contextlib.suppress(OSError):
        os.remove(part + ".validator")
    return path


def hub_folder(name, check):
    """A model of the Hugging Face hub -> folder in the cache with its config.json, weights and tokenizer files, downloaded once.

    Addresses are {HF_ENDPOINT}/{name}/resolve/main/{file}; HF_TOKEN is sent if set. check(folder) is called as soon as config.json is
    there, and may raise, before the large files come. Raises InputError.
    """
    endpoint, folder = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"), cache_path("hub", *name.split("/"))

    def get(*names):
        """The first of these that is there -> its name, None if none is"""
        for file in names:
            with contextlib.suppress(NotThere):
                fetch(f"{endpoint}/{name}/resolve/main/{file}", os.path.join(folder, file), token=os.environ.get("HF_TOKEN"))
                return file

    def complete():
        return any(os.path.isfile(os.path.join(folder, file)) for file in WEIGHTS)  # they come last

    def sound(file, look):
        """look(folder), and if it does not like what it sees, the file is not kept"""
        try:
            look(folder)
        except InputError:
            os.remove(os.path.join(folder, file))
            raise
    if complete():
        return folder
    with lock(cache_path("lock")):
        if not complete():
            if not get("config.json"):
                raise DownloadError(f"{endpoint} has no such model, or no config.json for it")
            sound("config.json", check)
            get("tokenizer_config.json")
            if not get("vocab.txt") and not (get("vocab.json") and get("merges.txt")):
                raise DownloadError(f"{endpoint} has neither vocab.txt nor vocab.json with merges.txt for it: another kind of tokenizer, not supported")
            weights = get(*WEIGHTS)
            if not weights:
                sharded = get(*(weights + ".index.json" for weights in WEIGHTS))
                raise DownloadError(f"a sharded checkpoint ({sharded}) is not supported" if sharded else f"{endpoint} has neither {' nor '.join(WEIGHTS)} for it")
            sound(weights, read_tensors)
    return folder


# ------------------------------------------------------------------------------------------------ safetensors

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
LONGEST_HEADER = 100_000_000  # bytes, as in the reference library


def _without_repeats(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, memory-mapped (copy on write). Raises CheckpointError.

    The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, raw bytes, in which the
    tensors lie one after the other without holes.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if head == b"version ":
            raise CheckpointError(f"{path}: not the file itself but Git's pointer to it: run git lfs pull")
        if 8 + length > size:
            raise CheckpointError(f"{path}: truncated: the header wants {8 + length} bytes, the file has {size}")
        if length > LONGEST_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes; at most {LONGEST_HEADER} are allowed")
        try:
            text = file.read(length).decode()
            header = json.loads(text, object_pairs_hook=_without_repeats)
            if text[0] != "{" or not all(isinstance(value, str) for value in header.pop("__metadata__", {}).values()):
                raise ValueError
            entries = {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()}
            entries = sorted(((name, dtype, shape, begin, end) for name, (dtype, shape, begin, end) in entries.items()), key=lambda entry: entry[3:])
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError):
            raise CheckpointError(f"{path}: the header is not a safetensors header") from None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a writable map: torch warns of read-only memory
    tensors, position, start = {}, 0, 8 + length
    for name, dtype, shape, begin, end in entries:
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in [*shape, begin, end]):
            raise CheckpointError(f"{path}: {name}: shape and offsets must be whole numbers, not negative")
        count, itemsize = math.prod(shape), DTYPES[dtype].itemsize
        if end - begin != count * itemsize:
            raise CheckpointError(f"{path}: {name}: {end - begin} bytes for shape {shape} of {dtype}")
        if begin != position:
            raise CheckpointError(f"{path}: {name} begins at byte {begin} of the data, not at {position}, where the tensor before it ends")
        if start + end > size:
            raise CheckpointError(f"{path}: truncated: {name} ends at byte {start + end}, the file has {size}")
        position, aligned = end, (start + begin) % itemsize == 0
        raw = torch.frombuffer(data, dtype=torch.uint8, count=end - begin, offset=start + begin) if count else torch.empty(0, dtype=torch.uint8)
        try:
            tensors[name] = (raw if aligned else raw.clone()).view(DTYPES[dtype]).view(shape)
        except RuntimeError as error:  # a shape such as [0, 2**62, 2**62]
            raise CheckpointError(f"{path}: {name}: shape {shape}: {str(error).splitlines()[0]}") from None
    if start + position != size:
        raise CheckpointError(f"{path}: {size - start - position} bytes after the last tensor")
    return tensors


def write_safetensors(path, tensors):
    """{name: tensor} -> a .safetensors file, atomically: widest types first, so that every tensor is aligned to its type, and the header
    filled up with spaces, so that the data begin at a multiple of 8 bytes. Raises OSError."""
    names, header, position = {dtype: name for name, dtype in DTYPES.items()}, {"__metadata__": {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        end = position + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": names[tensors[name].dtype], "shape": list(tensors[name].shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def content(file):
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    write(path, content)


def read_tensors(folder):
    """The weights of a Hugging Face folder -> (path, {name: tensor}). Pickles are read with weights_only=True. Raises CheckpointError."""
    paths = [os.path.join(folder, name) for name in WEIGHTS]
    path = next((path for path in paths if os.path.isfile(path)), None)
    if path is None:
        sharded = next((path + ".index.json" for path in paths if os.path.isfile(path + ".index.json")), None)
        raise CheckpointError(f"{sharded}: a sharded checkpoint is not supported" if sharded else f"{folder}: neither {' nor '.join(WEIGHTS)} is there")
    return path, read_safetensors(path) if path.endswith(".safetensors") else read_pickle(path, lambda value: all(isinstance(t, torch.Tensor) for t in value.values()), "a dictionary of tensors")


def read_pickle(path, check, what):
    """What torch.save wrote, read with weights_only=True -> dict for which check(dict) is true. Raises CheckpointError."""
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file; only the first line is for people
        raise CheckpointError(f"{path}: cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if not isinstance(value, dict) or not check(value):
        raise CheckpointError(f"{path}: not {what}")
    return value


# ------------------------------------------------------------------------------------------------ Hugging Face and PEFT folders

TOKENIZER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EMBEDDINGS = {"word": "word_embeddings", "position": "position_embeddings", "token_type": "token_type_embeddings", "ln": "LayerNorm"}
IN_LAYER = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense",
            "ln1": "attention.output.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense", "ln2": "output.LayerNorm"}
HEADS = {"bert": {"0": "bert.pooler.dense", "3": "classifier"}, "roberta": {"0": "classifier.dense", "3": "classifier.out_proj"}}


def hf_name(name):
    """Our name of a module or tensor of the encoder -> Hugging Face's, without the model's prefix:
    layers.0.q.weight -> encoder.layer.0.attention.self.query.weight"""
    parts = name.split(".")
    if parts[0] == "layers":
        return ".".join(["encoder.layer", parts[1], IN_LAYER[parts[2]], *parts[3:]])
    return ".".join(["embeddings", EMBEDDINGS[parts[0]], *parts[1:]])


def hf_tensors(encoder_state, head_state, model_type, with_head):
    """State dicts of an encoder without adapters and of a head -> {Hugging Face's name: tensor}, as in {Bert,Roberta}ForSequenceClassification
    if with_head, else as in {Bert,Roberta}Model"""
    tensors = {f"{model_type}." * with_head + hf_name(name): tensor for name, tensor in encoder_state.items()}
    for name, tensor in head_state.items() if with_head else ():
        number, _, last = name.partition(".")
        tensors[f"{HEADS[model_type][number]}.{last}"] = tensor
    return tensors


def save_checkpoint(folder, config, encoder_state, head_state=None, with_head=False, source=None, texts=()):
    """Write a Hugging Face folder, whole or not at all: config.json, model.safetensors, and the tokenizer's files from the folder `source`, or
    texts = (name, text) pairs. config: dict. A head that is not part of Hugging Face's classifiers goes into head.safetensors."""
    kind = {"bert": "Bert", "roberta": "Roberta"}[config["model_type"]]
    config = config | {"architectures": [kind + ("ForSequenceClassification" if with_head else "Model")], "torch_dtype": "float32"}
    with new_folder(folder) as new:
        write(os.path.join(new, "config.json"), json.dumps(config, indent=1))
        for name, text in texts:
            write(os.path.join(new, name), text)
        for name in TOKENIZER_FILES if source else ():
            if os.path.isfile(os.path.join(source, name)):
                shutil.copyfile(os.path.join(source, name), os.path.join(new, name))
        write_safetensors(os.path.join(new, "model.safetensors"), hf_tensors(encoder_state, head_state or {}, config["model_type"], with_head))
        if head_state and not with_head:
            write_safetensors(os.path.join(new, "head.safetensors"), head_state)


def export_peft(folder, adapters, head_state, model_type, with_head, base):
    """Write the LoRA modules that are on as a Hugging Face PEFT adapter: for {Bert,Roberta}ForSequenceClassification, head included, if
    with_head, else for {Bert,Roberta}Model, with the head in head.safetensors. base: path or hub id of the checkpoint. Raises InputError.

    PEFT scales a module by alpha / r of that module; here scale does not depend on the rank, so alpha_pattern holds scale * rank.
    """
    on = {name: lora for name, lora in adapters.items() if lora.rank}
    if not on:
        raise InputError("no LoRA module is on: there is nothing to export to PEFT")
    names = {name: f"{model_type}." * with_head + hf_name(name) for name in on}
    rank = max(lora.rank for lora in on.values())
    alpha = max(lora.scale for lora in on.values()) * rank
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS" if with_head else "FEATURE_EXTRACTION", "base_model_name_or_path": base, "inference_mode": True,
              "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
              "target_modules": sorted(names.values()), "modules_to_save": sorted({name.removeprefix("bert.").split(".")[0] for name in HEADS[model_type].values()}) if with_head else None,
              "rank_pattern": {names[name]: lora.rank for name, lora in on.items() if lora.rank != rank},
              "alpha_pattern": {names[name]: lora.scale * lora.rank for name, lora in on.items() if lora.scale * lora.rank != alpha}}
    tensors = {f"{names[name]}.lora_A.weight": lora.A[:lora.rank] for name, lora in on.items()}
    tensors |= {f"{names[name]}.lora_B.weight": lora.B[:, :lora.rank] for name, lora in on.items()}
    tensors |= hf_tensors({}, head_state, model_type, with_head)
    with new_folder(folder) as new:
        write(os.path.join(new, "adapter_config.json"), json.dumps(config, indent=1))
        write_safetensors(os.path.join(new, "adapter_model.safetensors"), {"base_model.model." + name: tensor for name, tensor in tensors.items()})
        if not with_head:
            write_safetensors(os.path.join(new, "head.safetensors"), head_state)


def check_export(args, shortcuts):
    """Refuse what --merge and --export-peft cannot write, before anything is done. shortcuts: those that are on, or may be"""
    for flag, folder in (("--merge", args.merge), ("--export-peft", args.export_peft)):
        if folder and os.path.exists(folder):
            raise InputError(f"{flag} {folder} is there already: give a new folder")
        if folder:
            os.makedirs(os.path.dirname(os.path.abspath(folder)), exist_ok=True)
        if folder and shortcuts:
            raise InputError(f"{flag}: shortcuts are on, or may be ({', '.join(shortcuts)}); they are connections that neither a plain checkpoint nor a PEFT adapter has, and "
                             "no weight to fold them into. Train with --shortcuts none, or use the run as it is, with --eval, --predict or load_run")
    if args.merge and args.export_peft and os.path.abspath(args.merge) == os.path.abspath(args.export_peft):
        raise InputError(f"--merge and --export-peft name the same folder, {args.merge}: give two")
    if args.export_peft and args.method in ("head", "full"):
        raise InputError(f"--export-peft: --method {args.method} has no LoRA modules")


def export(args, model, adapters, log):
    """--merge and --export-peft. The head becomes part of the folder where Hugging Face has the same, that is for --pooling cls."""
    head, config, with_head = model.head.state_dict(), model.config, args.pooling == "cls"
    where = "" if with_head else ", the head apart in head.safetensors: Hugging Face's classifiers see the first token, not the mean"
    if args.merge:
        hosts = [module for module in model.modules() if hasattr(module, "unmerge")]
        for module in hosts:
            module.merge()
        state = {name.replace(".host.", "."): tensor for name, tensor in model.encoder.state_dict().items() if ".lora." not in name}
        for module in hosts:
            module.unmerge()
        fields = read_json(os.path.join(args.checkpoint, "config.json")) | dataclasses.asdict(config)
        fields |= {"id2label": dict(enumerate(model.labels)), "label2id": {label: i for i, label in enumerate(model.labels)}} if with_head else {}
        save_checkpoint(args.merge, fields, state, head, with_head, source=args.checkpoint)
        log(f"merge   {args.merge}: an ordinary checkpoint{where}")
    if args.export_peft:
        base = args.model if args.checkpoint.startswith(os.path.abspath(cache_path("hub")) + os.sep) else args.checkpoint
        export_peft(args.export_peft, adapters, head, config.model_type, with_head, base)
        log(f"peft    {args.export_peft}: {sum(lora.rank > 0 for lora in adapters.values())} LoRA modules for {base}{where}")


# ------------------------------------------------------------------------------------------------ a run while it lasts

class Log:
    """Lines for people on stdout; facts as JSON lines in OUT/log.jsonl (steps, evaluations) and OUT/history.jsonl (the search). The folder
    is locked while this lives. silent: neither, for all but the first of several processes."""
    names = ("log.jsonl", "history.jsonl")

    def __init__(self, out, silent=False):
        self.silent, self.out = silent, None if silent else out
        if self.out:
            try:
                os.makedirs(out, exist_ok=True)
                self.lock = lock(os.path.join(out, "log.jsonl"), wait=False)
            except BlockingIOError:
                raise InputError(f"--out {out} is in use: another process is writing to it") from None
            except OSError as error:
                raise InputError(f"--out {out} cannot be written: {error.strerror}") from None

    def abandon(self):
        """Take the folder away again, if there is nothing in it"""
        with contextlib.suppress(OSError):
            if self.out and os.listdir(self.out) == ["log.jsonl"] and not os.path.getsize(os.path.join(self.out, "log.jsonl")):
                os.remove(os.path.join(self.out, "log.jsonl"))
                os.rmdir(self.out)

    def __call__(self, line, **record):
        if not self.silent:
            print(line, flush=True)
        self.save("log.jsonl", record)

    def save(self, name, record):
        """Append a record to a file of OUT, if there is an OUT"""
        if self.out and record:
            with open(os.path.join(self.out, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def sizes(self):
        """-> {file: bytes}"""
        paths = {name: os.path.join(self.out, name) for name in self.names}
        return {name: os.path.getsize(path) for name, path in paths.items() if os.path.isfile(path)}

    def rewind(self, sizes):
        """Cut the files back to these sizes: what was written after the state was saved will be written again"""
        now = self.sizes()
        for name in {**now, **sizes}:
            if now.get(name, 0) < sizes.get(name, 0):
                raise InputError(f"{os.path.join(self.out, name)} is shorter than when the state of the run was saved: it cannot go on")
            os.truncate(os.path.join(self.out, name), sizes.get(name, 0))


class Patience:
    """`with Patience() as asked:` the first Ctrl-C or SIGTERM only appends to the list `asked`, so that a step can end; the second is not put off."""

    def __enter__(self):
        self.asked, self.before = [], {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only the main thread may
                self.before[number] = signal.signal(number, self.hear)
        return self.asked

    def hear(self, number, _):
        """The handler"""
        if self.asked:
            raise KeyboardInterrupt
        self.asked.append(number)
        print("stopping after this step (again: at once)", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ looking at a run

def layout(adapters):
    """Names of modules as a table -> ([layer, ...], [module type, ...], {(layer, type): name}), LoRA before shortcuts"""
    parts = {name: name.rpartition(".") for name in sorted(adapters, key=lambda n: adapters[n].shortcut)}
    rows = dict.fromkeys(name.rpartition(".")[0] for name in adapters)
    return [*rows], [*dict.fromkeys(kind for *_, kind in parts.values())], {(row, kind): name for name, (row, _, kind) in parts.items()}


def grid(adapters, ranks=None, cell=None):
    """An allocation as text: layers down, module types across, ranks in the cells (. = off), parameters at the edges.

    cell: function of a module's name -> other text for its cell, without the edges.
    """
    ranks = {name: lora.rank for name, lora in adapters.items()} if ranks is None else ranks
    rows, kinds, names = layout(adapters)

    def total(chosen):
        return [] if cell else [f"{sum(adapters[n].price * ranks.get(n, 0) for key in chosen if (n := names.get(key))):,}"]
    cell_of = cell or (lambda name: str(ranks.get(name, 0) or "."))
    table = [["", *kinds, *["parameters"][:not cell]]]
    table += [[row, *(cell_of(names[row, kind]) if (row, kind) in names else "" for kind in kinds), *total([(row, kind) for kind in kinds])] for row in rows]
    table += [] if cell else [["parameters", *(t for kind in kinds for t in total([(row, kind) for row in rows])), *total(names)]]
    return aligned(table)


def aligned(table):
    """Rows of strings -> lines of text, the first column to the left, the others to the right"""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in table)


def comparison(results):
    """{method: (lr, [result of each seed, ...])} -> a Markdown table. Figures are times 100, mean ± sd over seeds. The difference is the mean of
    the paired differences to the first method with its 95 % interval (Student's t), over the seeds at which both ended; "could show" is the true
    difference that would have been told from zero with a probability of 80 %."""
    metric = next((r["metric"] for _, runs in results.values() for r in runs if "metric" in r), "metric")
    table = [["method", "lr", "parameters", "n", f"last {metric}", "best of dev", "difference to the first", "could show", "seconds"]]
    first = next(iter(results.values()))[1]

    def spread(values):
        return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    for method, (lr, runs) in results.items():
        ended, row = [r for r in runs if "metric" in r], [method, f"{lr:g}"]
        if ended:
            pairs = [100 * (r["last"] - f["last"]) for r, f in zip(runs, first) if "metric" in r and "metric" in f]
            row += [f"{statistics.mean(r['params_active'] for r in ended):,.0f}", str(len(ended)), *(spread([100 * r[key] for r in ended]) for key in ("last", "best"))]
            row += ["", ""] if runs is first or len(pairs) < 2 else differences(pairs)
            row += [f"{statistics.mean(r['seconds'] for r in ended):.0f}"]
        row += [""] * (len(table[0]) - len(row))
        row[3] += f" ({len(runs) - len(ended)} diverged)" * (len(ended) < len(runs))
        table.append(row)
    table.insert(1, ["---"] * len(table[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def differences(pairs):
    """Paired differences -> ["mean [95 % interval]", "what could have been shown"]"""
    n, error = len(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    mean, half = statistics.mean(pairs), student(0.975, n - 1) * error
    return [f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]", f"{half + student(0.8, n - 1) * error:.2f}"]


def student(p, freedom):
    """The p-quantile, p over 0.5, of Student's t: with t = sqrt(freedom) tan(u) the density is proportional to cos(u)^(freedom - 1)"""
    u = np.linspace(0, np.pi / 2, 200_001)
    area = np.cumsum(np.cos((u[1:] + u[:-1]) / 2) ** (freedom - 1))
    return math.sqrt(freedom) * math.tan(np.interp((2 * p - 1) * area[-1], area, u[1:]))


def read_history(folder):
    """OUT/history.jsonl -> {module name: its price, max_rank and shortcut}, [entry of HeteroLoRA.history, ...]. Raises InputError."""
    path = os.path.join(folder, "history.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            space, *history = map(json.loads, file)
        modules = {name: types.SimpleNamespace(**module) for name, module in space["modules"].items()}
        if not all(set(entry["ranks"]) == set(modules) for entry in history) or not history:
            raise ValueError("no allocation in it")
        return modules, history
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"--show {folder}: {path} is not the history of a search: {error}") from None


def parameters_by_type(modules, ranks):
    """-> {module type: parameters on}"""
    _, kinds, names = layout(modules)
    return {kind: sum(modules[n].price * ranks[n] for (_, k), n in names.items() if k == kind) for kind in kinds}


def show(folder):
    """The history of a run in words: final ranks, how often every module was on, and every reallocation -> text"""
    modules, history = read_history(folder)
    layers, kinds, names = layout(modules)

    def how_often(name):
        share = sum(entry["ranks"][name] > 0 for entry in history) / len(history)
        return f"{' ░▒▓█'[math.ceil(4 * share)]} {share:4.0%}" if share else "."
    table = [["step", "on", "parameters", "came", "went", "other rank", "jaccard", "with first", "mean layer", *kinds]]
    for entry in history:
        by_type, total = parameters_by_type(modules, entry["ranks"]), max(entry["parameters"], 1)
        depth = sum(modules[n].price * entry["ranks"][n] * layers.index(layer) for (layer, _), n in names.items()) / total
        came, went = len(entry["on"]), len(entry["off"])
        table.append([str(entry["step"]), str(sum(map(bool, entry["ranks"].values()))), f"{entry['parameters']:,}", str(came), str(went), str(entry["changed"] - came - went),
                      *("" if entry[key] is None else f"{entry[key]:.2f}" for key in ("jaccard", "jaccard_first")), f"{depth:.2f}", *(f"{p / total:.0%}" for p in by_type.values())])
    return (f"ranks at the end\n{grid(modules, history[-1]['ranks'])}\n\nhow often on, of {len(history)} allocations\n"
            f"{grid(modules, {}, how_often)}\n\nallocations, with the share of the parameters that each type has\n{aligned(table)}")


def draw(folder):
    """The same as a picture: for every module type its layers (down) over the allocations (across), below them the
    parameters by type -> SVG text. Greys and colours that can be read on white and on black."""
    modules, history = read_history(folder)
    layers, kinds, names = layout(modules)
    colours = dict(zip(kinds, itertools.cycle(("#4a86d8", "#e07b39", "#3fa06a", "#b565c9", "#c9a227", "#d1495b", "#4aa8a8", "#8d7bd6", "#8a9a3b", "#b07d62"))))
    left, width, row, gap, chart = 110, 600, max(3, 60 / len(layers)), 10, 110
    step, strip = width / len(history), row * len(layers) + 10
    most = max(max(entry["parameters"] for entry in history), 1)
    bottom = 30 + len(kinds) * strip + gap + chart
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {bottom + 40:.0f}" font-family="sans-serif" font-size="11" fill="#7a7a7a">']

    def text(x, y, words, anchor="start"):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>')

    def box(x, y, w, h, colour, opacity, title):
        parts.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill="{colour}" fill-opacity="{opacity:.2f}"><title>{html.escape(title)}</title></rect>')
    text(left, 16, f"ranks by type: {len(layers)} layers down ({layers[0]} on top), {len(history)} allocations across")
    for k, kind in enumerate(kinds):
        top = 26 + k * strip
        text(left - 8, top + strip / 2, kind, "end")
        for i, layer in enumerate(layers):
            name = names.get((layer, kind))
            for rank, same in itertools.groupby(range(len(history)), lambda j: name and history[j]["ranks"][name]):
                first, *_, last = [*same] * 2
                if name:
                    share = rank / modules[name].max_rank
                    box(left + first * step, top + i * row, (last - first + 0.95) * step, 0.88 * row, colours[kind] if rank else "#7a7a7a", 0.3 + 0.7 * share if rank else 0.12,
                        f"{name}, steps {history[first]['step']} to {history[last]['step']}: rank {rank}")
    text(left - 8, bottom - chart / 2, "parameters", "end")
    text(left - 8, bottom - chart + 10, f"{most:,}", "end")
    for j, entry in enumerate(history):
        y = bottom
        for kind, p in parameters_by_type(modules, entry["ranks"]).items():
            y -= p / most * chart
            if p:
                box(left + j * step, y, 0.95 * step, p / most * chart, colours[kind], 1, f"{kind}, step {entry['step']}: {p:,} parameters")
    text(left, bottom + 16, f"step {history[0]['step']}")
    text(left + width, bottom + 16, f"step {history[-1]['step']}", "end")
    return "\n".join([*parts, "</svg>\n"])
