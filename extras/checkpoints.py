"""Read and write encoders as folders of Hugging Face's format: config.json and model.safetensors.

    folder = find_checkpoint("roberta-base")      # or a folder, or "built-in"
    encoder = load_encoder(folder)
    save_encoder(encoder, "new/folder", texts={"vocab.txt": vocabulary})

A .safetensors file is 8 bytes (the length of the header), a JSON header {name: {dtype, shape,
data_offsets}}, and the bytes of the tensors one after the other, without holes.
"""

import dataclasses
import json
import math
import os
import re
import zipfile
import zlib

import torch

from data import InputError
from extras.configs import read_encoder_config
from extras.files import new_folder, refuse_git_pointer, write
from model import Encoder

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one that is there counts
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES = FLOATS | INTEGERS | {"U8": torch.uint8, "BOOL": torch.bool}
LONGEST_HEADER = 10_000_000  # bytes; that of an encoder with 24 layers has 50,000


def read_safetensors(path):
    """Return the tensors of a .safetensors file as {name: tensor}. Raises InputError."""
    refuse_git_pointer(path)
    try:
        size = os.path.getsize(path)
        content = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    header, start = _read_header(path, content)
    entries = sorted(_check_entry(path, name, entry) for name, entry in header.items())
    # Each tensor begins where the one before ends, and the last one ends with the file.
    begins = [entry[0] for entry in entries] + [size - start]
    ends = [0] + [entry[1] for entry in entries]
    if begins != ends:
        raise InputError(f"{path}: truncated or damaged: its tensors do not lie end to end in it")
    tensors = {}
    for begin, end, name, dtype, shape in entries:
        raw = content[start + begin : start + end].clone()  # the file may change, a copy does not
        try:
            tensors[name] = raw.view(DTYPES[dtype]).view(shape)
        except RuntimeError:  # a 0 beside numbers that are too large
            raise InputError(f"{path}: {name!r}: no tensor has the shape {shape}") from None
    return tensors


def _read_header(path, content):
    """Return the header of a .safetensors file, and the byte at which its data start."""
    first = bytes(content[:8].numpy())
    start = 8 + int.from_bytes(first, "little")
    if len(content) < start:
        raise InputError(f"{path}: truncated: {len(content)} bytes, and the header alone {start}")
    if start > LONGEST_HEADER:
        raise InputError(f"{path}: a header of {start} bytes: want at most {LONGEST_HEADER}")
    try:
        header = json.loads(bytes(content[8:start].numpy()).decode())
        header.pop("__metadata__", None)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: the header is not a safetensors header") from None
    return header, start


def _check_entry(path, name, entry):
    """Return a tensor's entry of the header as (begin, end, name, dtype, shape)."""
    try:
        dtype = entry["dtype"]
        width = DTYPES[dtype].itemsize
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        numbers = shape + entry["data_offsets"]  # lists, or this is a TypeError
    except (KeyError, TypeError, ValueError):
        wanted = f"shape, two data_offsets and a dtype of {', '.join(DTYPES)}"
        raise InputError(f"{path}: {name!r} is {entry}: want {wanted}") from None
    for number in numbers:
        if type(number) is not int or not 0 <= number < 2**63:
            raise InputError(f"{path}: {name!r}: {number!r}: want whole numbers from 0 to 2^63 - 1")
    if len(shape) > 64:
        raise InputError(f"{path}: {name!r} has {len(shape)} dimensions: want at most 64")
    if end - begin != math.prod(shape) * width:
        raise InputError(f"{path}: {name!r}: {end - begin} bytes for shape {shape} of {dtype}")
    return begin, end, name, dtype, shape


def write_safetensors(path, tensors):
    """Write {name: tensor} as a .safetensors file, which is whole or not there. Raises OSError.

    The widest types come first and the header ends at a multiple of 8 bytes, so that every tensor
    begins at a multiple of its own width.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        entry = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = entry | {"data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def content(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            tensor = tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            file.write(tensor.flatten().view(torch.uint8).numpy())

    write(path, content)


def read_pickle(path, keys):
    """Return the dictionary that torch.save wrote. No code in it is run.

    Raises InputError for a damaged file, and for a dictionary that lacks one of `keys`.
    """
    refuse_git_pointer(path)
    try:
        if zipfile.is_zipfile(path):  # torch.load does not compare the checksums
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
                # torch leaves the memory of a tensor unset if its entry is marked as a folder.
                folders = [entry for entry in file.infolist() if entry.external_attr & 0x10]
            if damaged or folders:
                raise ValueError
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # damage raises many types, and torch advises to run what is in the file
        expected = "tensors and plain values that torch.save wrote"
        raise InputError(f"{path}: cannot be read: damaged, or not only {expected}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: want a dictionary, not a {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            kind = type(key).__name__
            raise InputError(f"{path}: names are strings, not {kind}: something else wrote this")
    for key in keys:
        if key not in value:
            raise InputError(f"{path}: there is no {key!r} in it: something else wrote this file")
    return value


IN_LAYER = {  # our name of a module in a layer -> Hugging Face's
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "ln1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "ln2": "output.LayerNorm",
}


def hf_name(name):
    """Return Hugging Face's name of a module or tensor of Encoder, without the model's prefix.

    layers.0.q.weight -> encoder.layer.0.attention.self.query.weight
    """
    first, *rest = name.split(".")
    if first == "layers":
        number, module, *rest = rest
        return ".".join(["encoder.layer", number, IN_LAYER[module], *rest])
    table = "LayerNorm" if first == "ln" else f"{first}_embeddings"
    return ".".join(["embeddings", table, *rest])


def content_checksum(value, total=0):
    """Return the CRC of nested lists, dictionaries, plain values and tensors.

    total: the CRC of what came before.
    """
    total = zlib.crc32(type(value).__name__.encode(), total)
    if isinstance(value, torch.Tensor):
        total = zlib.crc32(repr((value.dtype, value.shape)).encode(), total)
        flat = value.detach().cpu().contiguous().flatten()
        return zlib.crc32(flat.view(torch.uint8).numpy().data, total)  # NumPy has no bfloat16
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, (list, tuple)):
        return zlib.crc32(repr(value).encode(), total)
    total = zlib.crc32(repr(len(value)).encode(), total)
    for part in value:
        total = content_checksum(part, total)
    return total


def find_checkpoint(name_or_dir):
    """Return the folder of a checkpoint, downloaded if need be. Raises InputError.

    name_or_dir is a folder, "built-in", or the id of a model on the Hugging Face hub.
    """
    name = os.fspath(name_or_dir)
    if name == "built-in":
        extras = os.path.dirname(os.path.abspath(__file__))
        return os.path.join(os.path.dirname(extras), "builtin")
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise InputError(f"{name} is a file: give the folder that holds it")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise InputError(f"{name}: no such folder: give one, or a hub id such as roberta-base")
    from extras.downloads import hub_folder

    return hub_folder(name)


def find_weights(folder):
    """Return the path of a folder's weights. Raises InputError."""
    for name in WEIGHTS:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    raise InputError(f"{folder}: no weights: want {' or '.join(WEIGHTS)}, not in several parts")


def load_encoder(folder, weights=None):
    """Return the Encoder of a Hugging Face folder, in float32. Its attribute `folder` says which.

    weights: their path, if it is not one of WEIGHTS in the folder. Heads and poolers are left out.
    Raises InputError for a missing file or tensor, a damaged one, a wrong shape, numbers that are
    not finite, and layers that config.json does not have.
    """
    config = read_encoder_config(os.path.join(folder, "config.json"))
    path = weights or find_weights(folder)
    if path.endswith(".safetensors"):
        tensors = read_safetensors(path)
    else:
        tensors = read_pickle(path, keys=())
    with torch.device("meta"):  # neither memory nor random numbers for weights that are replaced
        encoder = Encoder(config)
    missing = {hf_name(name): (name, weight.shape) for name, weight in encoder.named_parameters()}
    state = {}
    for full_name, tensor in tensors.items():
        short = re.sub(r"^(bert|roberta)\.", "", full_name)
        short = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", short)  # the oldest checkpoints
        short = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", short)
        if short in missing:
            name, shape = missing.pop(short)
            state[name] = _check_weight(path, full_name, tensor, shape)
        elif re.match(r"(encoder|embeddings)\.(?!position_ids)", short):
            reason = "config.json describes an encoder without it, or it is there twice"
            raise InputError(f"{path}: {full_name}: {reason}")
    for short in missing:
        raise InputError(f"{path}: the tensor {short} is missing")
    encoder.load_state_dict(state, assign=True)
    encoder.folder = folder
    return encoder


def _check_weight(path, name, tensor, shape):
    """Return a weight in float32. Raises InputError for what cannot be one."""
    is_tensor = isinstance(tensor, torch.Tensor) and tensor.dtype in FLOATS.values()
    if not is_tensor or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
        raise InputError(f"{path}: {name}: want an ordinary tensor of floating-point numbers")
    if tensor.shape != shape:
        sizes = f"{list(tensor.shape)}, and config.json asks for {list(shape)}"
        raise InputError(f"{path}: {name} has the shape {sizes}")
    weight = tensor.float().contiguous()
    if not weight.isfinite().all():
        raise InputError(f"{path}: {name} holds numbers that are not finite: get the file again")
    return weight


def write_checkpoint(folder, config, tensors):
    """Write the two files of a checkpoint into a folder. config is a dictionary."""
    write(os.path.join(folder, "config.json"), json.dumps(config, indent=1))
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)


def save_encoder(encoder, folder, dtype=torch.float32, texts=None):
    """Write an encoder without adapters as a new Hugging Face folder, with files {name: text}.

    Raises InputError if the folder is there already, OSError if it cannot be written.
    """
    kind = {"bert": "BertModel", "roberta": "RobertaModel"}[encoder.config.model_type]
    config = dataclasses.asdict(encoder.config)
    config |= {"architectures": [kind], "torch_dtype": str(dtype).removeprefix("torch.")}
    tensors = {hf_name(name): tensor.to(dtype) for name, tensor in encoder.state_dict().items()}
    with new_folder(folder) as new:
        for name, text in (texts or {}).items():
            write(os.path.join(new, name), text)
        write_checkpoint(new, config, tensors)
