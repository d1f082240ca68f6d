"""What extras/files.py claims."""

import multiprocessing
import os

import pytest

from data import InputError
from extras import files


@pytest.mark.parametrize("content", [b"new", "new", lambda file: file.write(b"new")])
def test_bytes_text_and_functions_are_written(tmp_path, content):
    files.write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("full\nstack"), KeyboardInterrupt])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    def fail(file):
        file.write(b"half")
        raise error

    files.write(tmp_path / "file", "old")
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        files.write(tmp_path / "file", fail)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_old_file_is_whole_while_the_new_one_is_written(tmp_path):
    def look(file):
        file.write(b"half")
        file.flush()
        assert (tmp_path / "file").read_text() == "old"

    files.write(tmp_path / "file", "old")
    files.write(tmp_path / "file", look)
    assert (tmp_path / "file").read_text() == "half"


def test_a_new_folder_appears_when_it_is_full(tmp_path):
    with files.new_folder(tmp_path / "a" / "b") as folder:
        files.write(os.path.join(folder, "file"), "x")
        assert not (tmp_path / "a" / "b").exists()
    assert os.listdir(tmp_path / "a") == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"
    ordinary = tmp_path / "ordinary"
    ordinary.mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == ordinary.stat().st_mode


def test_a_new_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), files.new_folder(tmp_path / "a") as folder:
        files.write(os.path.join(folder, "file"), "x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="there already"), files.new_folder(tmp_path):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"HETEROLORA_CACHE": "/1", "XDG_CACHE_HOME": "/2", "HOME": "/3"}, "/1"),
        ({"HETEROLORA_CACHE": "", "XDG_CACHE_HOME": "/2", "HOME": "/3"}, "/2/heterolora"),
        ({"HOME": "/3"}, "/3/.cache/heterolora"),
    ],
)
def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch, environment, expected):
    for name in ("HETEROLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value and f"{tmp_path}{value}")
    assert files.cache_path("hub", "a") == f"{tmp_path}{expected}/hub/a"
    with files.lock(files.cache_path("lock")):
        assert os.path.isdir(f"{tmp_path}{expected}")


BROKEN_JSON = [b"", b"{", b"[1]", b"\xff{}", b"[" * 100_000, b'{"a": %s}' % (b"9" * 5_000)]


@pytest.mark.parametrize("text", BROKEN_JSON, ids=range(len(BROKEN_JSON)))
def test_a_file_that_holds_no_json_object_is_refused_by_name(tmp_path, text):
    (tmp_path / "file").write_bytes(text)
    with pytest.raises(InputError, match="file"):
        files.read_json(tmp_path / "file")
    with pytest.raises(InputError, match="absent"):
        files.read_json(tmp_path / "absent")


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_json(tmp_path / "file") == {"a": 1}


def write_often(path, letter):
    for _ in range(30):
        files.write(path, letter * 100_000)


def test_two_processes_that_write_one_file_leave_one_of_their_contents(tmp_path):
    context = multiprocessing.get_context("fork")
    path = tmp_path / "file"
    processes = [context.Process(target=write_often, args=(path, letter)) for letter in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0, 0]
    assert path.read_text() in ("a" * 100_000, "b" * 100_000)
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_message_is_one_short_line_whatever_it_quotes():
    for quoted in ("a\nb", "\r\x0b\x1b\x85\u2028\ud800", "x" * 10**6, "\n" * 10**6):
        message = str(InputError(f"here/file: {quoted}: give another"))
        assert len(message.splitlines()) == 1 and message.isprintable() and len(message) < 3000
        assert message.startswith("here/file: ") and message.endswith(": give another")
    assert str(InputError(str(InputError("é\na  b")))) == "é\\na  b"
