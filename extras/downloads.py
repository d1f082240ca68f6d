"""Download models of the Hugging Face hub and GLUE tasks into the cache, each file once.

$HF_ENDPOINT and $GLUE_ENDPOINT name other servers. What cannot be read does not enter the cache.
"""

import contextlib
import functools
import hashlib
import os
import zipfile

from data import GLUE, InputError, read_text
from extras.checkpoints import load_encoder
from extras.configs import read_encoder_config
from extras.files import cache_path, lock, write
from extras.tables import read_glue
from extras.tokenizers import BPE, WordPiece, load_tokenizer
from extras.transfer import HUB, NotThere, Refused, address_of, fetch, keep, unfinished
from extras.vocabularies import SETTINGS_FILES, read_merges, read_options, read_vocabulary

GLUE_SERVER = ("GLUE_ENDPOINT", "https://dl.fbaipublicfiles.com")
ZIP_NAMES = {"qnli": "QNLIv2", "qqp": "QQP-clean"}  # the others are named like their folder
MRPC_PAIRS = "senteval/senteval_data/msr_paraphrase_train.txt"
MRPC_PAIRS_SHA256 = "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89"
MRPC_DEV = "glue/data/mrpc_dev_ids.tsv"
MRPC_DEV_SHA256 = "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"


def check_vocabulary(path, specials):
    """Raise InputError for a vocabulary that does not fit the config.json beside it.

    Some models have room for more tokens than there are, but not for many more.
    """
    config = read_encoder_config(os.path.join(os.path.dirname(path), "config.json"))
    vocab = read_vocabulary(path, specials)
    highest = max(vocab.values())
    if len(vocab) < 0.9 * config.vocab_size or highest >= config.vocab_size:
        reason = f"and the model has {config.vocab_size} tokens: cut off, or of another model?"
        raise InputError(f"{path}: {len(vocab)} tokens with ids up to {highest}, {reason}")


def check_merges(path):
    """Raise InputError unless a file is the merges.txt of the vocab.json beside it."""
    vocab_json = os.path.join(os.path.dirname(path), "vocab.json")
    read_merges(path, read_vocabulary(vocab_json, BPE.specials))


def check_weights(path):
    """Raise InputError unless a file holds the weights of the config.json beside it."""
    load_encoder(os.path.dirname(path), weights=path)


HUB_FILES = {  # file of a model on the hub -> a function that raises InputError for anything else
    **dict.fromkeys(SETTINGS_FILES, read_options),  # load_tokenizer looks for tokens in them
    "config.json": read_encoder_config,  # refuses other architectures, before the large files come
    "vocab.txt": functools.partial(check_vocabulary, specials=WordPiece.specials),
    "vocab.json": functools.partial(check_vocabulary, specials=BPE.specials),
    "merges.txt": check_merges,
    "model.safetensors": check_weights,
    "pytorch_model.bin": check_weights,
}


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
        url = f"{address_of(*HUB)}/{name}/resolve/main/{file}"
        try:
            fetch(url, os.path.join(folder, file), HUB_FILES[file])
        except NotThere:
            return False
        return True

    def get_all():
        if not get("config.json"):
            raise InputError(f"{name} is no folder here, and the hub has no config.json for it")
        for file in SETTINGS_FILES:
            get(file)
        if not get("vocab.txt") and not (get("vocab.json") and get("merges.txt")):
            raise InputError(f"{name}: neither vocab.txt nor vocab.json with merges.txt on the hub")
        try:
            load_tokenizer(folder)  # before the weights come
        except InputError as error:
            raise Refused(str(error)) from None
        if not get("model.safetensors") and not get("pytorch_model.bin"):
            raise InputError(
                f"{name}: no weights in one file on the hub: sharded ones are not read"
            )

    with lock(cache_path("lock"), wait=True):
        try:
            get_all()
        except Refused:  # any file may be the wrong one, so none stays
            for file in HUB_FILES:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, file))
            raise
    return folder


def glue_folder(task):
    """Return a cache folder with MRPC/train.tsv and so on of a task in data.GLUE.

    Raises InputError if it cannot be downloaded.
    """
    data_dir = cache_path("glue")
    folder = os.path.join(data_dir, GLUE[task].folder)
    names = ["train.tsv", GLUE[task].dev_file]
    paths = [os.path.join(folder, name) for name in names]
    if all(map(os.path.isfile, paths)):
        return data_dir
    with lock(cache_path("lock"), wait=True):
        if all(map(os.path.isfile, paths)):  # another process was here meanwhile
            return data_dir
        try:
            if task == "mrpc":
                contents = download_mrpc(folder)
            else:
                contents = download_zip(task, folder, names)
            for path, content in zip(paths, contents, strict=True):
                write(unfinished(path), content)
                keep(path, functools.partial(read_glue, form=GLUE[task]))
        except InputError as error:
            raise InputError(f"{error}; --data-dir takes files that are here already") from None
    return data_dir


def download_zip(task, folder, names):
    """Return the bytes of the named files in the archive of a GLUE task. Raises InputError."""
    archive = os.path.join(folder, "archive.zip")
    url = f"{address_of(*GLUE_SERVER)}/glue/data/{ZIP_NAMES.get(task, GLUE[task].folder)}.zip"
    unzip = functools.partial(read_zip, names=[f"{GLUE[task].folder}/{name}" for name in names])
    fetch(url, archive, unzip)
    contents = unzip(archive)
    os.remove(archive)
    return contents


def read_zip(path, names):
    """Return the bytes of the named files in an archive. Raises InputError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            return [file.read(name) for name in names]
    except Exception as error:  # zipfile raises many types
        raise InputError(f"a damaged archive: {error}") from None


def check_sha256(path, wanted):
    """Raise InputError for a file with another SHA-256."""
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != wanted:
        raise InputError(f"SHA-256 is {found} instead of {wanted}")


def download_mrpc(folder):
    """Return train.tsv and dev.tsv of MRPC: dev are the pairs on GLUE's list. Raises InputError."""

    def get_lines(source, sha256):
        path = os.path.join(folder, os.path.basename(source))
        url = f"{address_of(*GLUE_SERVER)}/{source}"
        fetch(url, path, functools.partial(check_sha256, wanted=sha256))
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
