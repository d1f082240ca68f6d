"""Write files and folders so that they are whole or not there at all; read JSON; find the cache."""

import contextlib
import json
import os
import tempfile

from data import InputError


def write(path, content):
    """Write bytes, text, or what content(binary file) writes: to a temporary name, then rename.

    The file at `path` is whole, or as it was. Raises OSError.
    """
    temporary = f"{path}.{os.getpid()}.unfinished"
    if isinstance(content, str):
        content = content.encode()
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch.save raises when the disk is full
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


@contextlib.contextmanager
def new_folder(folder):
    """Give a temporary folder to fill, which then appears at `folder`, whole or not at all.

    Raises InputError if `folder` is there already.
    """
    folder = os.path.abspath(folder)
    if os.path.exists(folder):
        raise InputError(f"{folder} is there already: give a new folder")
    parent = os.path.dirname(folder)
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".unfinished-") as temporary:
        whole = os.path.join(temporary, "whole")
        os.mkdir(whole)
        yield whole
        os.rename(whole, folder)


def cache_path(*parts):
    """Return a path in the cache: $HETEROLORA_CACHE, else heterolora in the user's cache folder."""
    root = os.environ.get("HETEROLORA_CACHE")
    if not root:
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(user, "heterolora")
    os.makedirs(root, exist_ok=True)
    return os.path.join(root, *parts)


def read_json(path):
    """Return the dict of a file that holds a JSON object. Raises InputError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: want a JSON object, and it holds a {type(value).__name__}")
    return value
