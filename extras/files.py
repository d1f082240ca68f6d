"""Write files and folders that are whole or not there at all, find the cache, look into files."""

import contextlib
import json
import os
import sys
import tempfile

from data import InputError, read_text


def write(path, content):
    """Write bytes, text, or whatever the function content(binary file) writes.

    The content goes to a temporary name first, so the file at `path` is whole, or as it was.
    Raises OSError.
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
        first_line = str(error).partition("\n")[0]
        raise OSError(f"{path} cannot be written: {first_line}") from error
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
        # Only the user may read a TemporaryDirectory; a folder in it has ordinary permissions.
        whole = os.path.join(temporary, "whole")
        os.mkdir(whole)
        yield whole
        os.rename(whole, folder)


def lock(path, wait=False):
    """Open a file, which may be new, and lock it -> the file. Closing it frees the lock.

    So does the end of the process, however it ends. Raises InputError if another process has it,
    unless it is to wait. On Windows, and on file systems without locks, it is only opened.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        folder = os.path.dirname(path)
        raise InputError(f"{folder}: another process trains this run: wait, or stop it") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def say(line):
    """Print a line. A character that the terminal's encoding lacks is written as an escape."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # stdout may be a StringIO, or None
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def cache_path(*parts):
    """Return a path in the cache: $HETEROLORA_CACHE, else heterolora in the user's cache folder."""
    root = os.environ.get("HETEROLORA_CACHE")
    if not root:
        user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        root = os.path.join(user_cache, "heterolora")
    return os.path.join(root, *parts)


def refuse_git_pointer(path):
    """Raise InputError if a file cannot be opened, or if Git LFS left its pointer in its place."""
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: this is only Git's pointer to the file: run git lfs pull")


def read_json(path):
    """Return the dict of a file that holds a JSON object. Raises InputError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a ValueError: also a number of 5,000 digits
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: want a JSON object, and it holds a {type(value).__name__}")
    return value
