"""Download one file: go on after a cut, check what came, and only then give it its name.

$HF_TOKEN is sent to the hub's own host only.
"""

import errno
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from data import InputError, read_text
from extras.files import write

HUB = ("HF_ENDPOINT", "https://huggingface.co")  # a variable that names another server
PAUSES = (0, 1, 2, 4)  # seconds before each attempt
TIMEOUT = 30  # seconds without a byte
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR)
DISK_ERRORS += (errno.EEXIST, errno.ENAMETOOLONG)


class NotThere(InputError):
    """The server has no such file (status 404)."""


class Refused(InputError):
    """What the server sent is not what was asked for."""


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


def unfinished(path):
    """Return the name of a file while it is not whole. Its ending stays."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f"unfinished-{name}")


def keep(path, check):
    """Give an unfinished file its name if check(file) accepts it. If not, remove it.

    Raises the InputError of `check`.
    """
    try:
        check(unfinished(path))
    except InputError:
        os.remove(unfinished(path))
        raise
    os.replace(unfinished(path), path)


def fetch(url, path, check):
    """Download url to path, unless path is there already. Only one process may do so at a time.

    check(file) raises InputError if something else came. Only what it accepts is kept.
    What came before a failure stays, and the next call goes on from there, if the server names the
    file's version. Raises NotThere for status 404, OSError for the disk, InputError for the rest.
    """
    if os.path.isfile(path):
        return
    part = unfinished(path)
    for pause in PAUSES:
        time.sleep(pause)
        problem = attempt(url, part)
        if problem is None:
            break
    else:
        raise InputError(f"{url}: {problem}; gave up after {len(PAUSES)} attempts")
    os.remove(f"{part}.etag")
    try:
        keep(path, check)
    except InputError as error:
        raise Refused(f"{url}: refused: {error}") from None


def attempt(url, part):
    """Make one request. Return None if `part` is whole now, else why to try again."""
    try:
        return download(url, part)
    except urllib.error.HTTPError as error:
        problem = f"{error.code} {error.reason}"
        if error.code == 404:
            raise NotThere(f"{url}: {problem}") from None
        if error.code == 416 and os.path.isfile(part):  # as long as on the server, or longer
            write(part, "")
        elif error.code < 500 and error.code not in (408, 429):
            raise InputError(f"{url}: {problem}: misspelt, or private (set HF_TOKEN)?") from None
        return problem
    except InputError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        if getattr(error, "errno", None) in DISK_ERRORS:  # another attempt would not help
            raise
        return f"the download broke: {getattr(error, 'reason', error)}"


def download(url, part):
    """Download url, or what `part` lacks of it. Return None, or why `part` is not whole."""
    request = urllib.request.Request(url, headers={"User-Agent": "heterolora"})
    add_token(request)
    have = os.path.getsize(part) if os.path.isfile(part) else 0
    etag = read_text(f"{part}.etag") if os.path.isfile(f"{part}.etag") else ""
    goes_on = have > 0 and etag != ""
    if goes_on:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", etag)  # a server with another version sends all of it
    with OPENER.open(request, timeout=TIMEOUT) as response:
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise InputError(f"{url}: a web page came instead: does the network want a login?")
        os.makedirs(os.path.dirname(part), exist_ok=True)  # a misspelt name leaves no folder
        total = response.length
        if response.status == 206:
            rest = re.fullmatch(rf"bytes {have}-\d+/(\d{{1,18}})", headers.get("Content-Range", ""))
            if not goes_on or rest is None or headers.get("ETag") != etag:
                write(part, "")
                return "another part came than the one asked for"
            total = int(rest[1])
        elif response.status != 200:
            return f"status {response.status} came"
        elif total is None and not response.chunked:
            return "the server does not say how long the file is"
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
