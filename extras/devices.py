"""The device that a run trains on, and the precision of what is frozen there."""

import sys

import torch

from data import InputError

DTYPES = {  # in which frozen weights are stored; fast_cpu.py makes rounded copies for int8
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
}


def find_device(name=None):
    """Return the torch.device that was asked for, or a GPU if there is one. Raises InputError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("want cpu or cuda; others were never tried")
        torch.ones(1, device=device).item()  # fails on a device that is not there, or holds no data
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def best_precision(device):
    """Return "bfloat16" where matrices are multiplied faster in it, else "float32"."""
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities()
        is_fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return "bfloat16" if is_fast else "float32"


def round_frozen(encoder, precision):
    """Store the frozen weights of an encoder in the type of a precision."""
    for parameter in encoder.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[precision])


def peak_memory_mb(device):
    """Return the peak memory of the GPU, or of this process since it began. None if not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # which Windows does not have
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
