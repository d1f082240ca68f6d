"""Finished runs: read them from a file, choose among them, and pair them by seed.

A file has one JSON object a line, {"flags": {...}, "result": {...}}, as extras.compare writes it,
plain or gzipped.
"""

import dataclasses
import gzip
import json
import statistics
import warnings
import zlib

import numpy as np

from data import InputError
from extras.intervals import mean_and_half_width


@dataclasses.dataclass
class FinishedRun:
    """A finished run. What has a default is None if the run failed, or did not keep it."""

    flags: dict  # {flag: value as text}, without the seed, with the processor
    seed: str
    score: float | None = None  # the metric after the last epoch, times 100
    parameters: int | None = None  # of the adapters, at the end; full: of the encoder
    ever_trained: int | None = None  # the same, at any step
    right: np.ndarray | None = None  # (n,): 1 for each dev example that it got right, else 0


@dataclasses.dataclass
class Gain:
    """A row minus the baseline, paired by seed, in points."""

    differences: list  # one for each pair
    mean: float
    half: float  # half the width of the mean's 95 % interval
    by_example: np.ndarray | None  # (n,): difference for each dev example, mean over seeds


# What is raised where a record is not of the form of a finished run.
WRONG_FORM = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def open_results(path):
    """Make sure that results can be appended, on a line of their own. Raises OSError, InputError"""
    if path.endswith(".gz"):
        raise InputError(f"--results {path}: want a plain file; gunzip it first")
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        file.seek(0)
        if file.read()[-1:] not in ("", "\n"):
            file.write("\n")


def records(path):
    """Yield (line number, what it holds) of a file of JSON lines, plain or gzipped.

    A line that was written in part is left out, with a warning. Raises InputError.
    """
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):  # a ValueError: also a number of 5,000 digits
                    warnings.warn(f"{path}, line {number}, is not whole: left out", stacklevel=2)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    except UnicodeDecodeError:
        reason = "not text in UTF-8; the name of a gzipped file has to end in .gz"
        raise InputError(f"{path} is {reason}") from None


def read_runs(path):
    """Return the runs in a file, with the flags that were set. Raises InputError."""
    runs = []
    for number, record in records(path):
        try:
            runs.append(as_run(record))
        except WRONG_FORM as error:
            raise InputError(f"{path}, line {number}, is no finished run: {error!r}") from None
    if not runs:
        raise InputError(f"{path} holds no finished run")
    return runs


def as_run(record):
    """Return the FinishedRun of {"flags": {name: value}, "result": {name: value}}."""
    flags = {}
    for flag, value in record["flags"].items():
        if value is not None:
            flags[flag] = as_text(value)
    seed = flags.pop("seed")
    for needed in ("method", "task"):
        if not flags.get(needed, "").strip():
            raise ValueError(f"no {needed}")
    flags.setdefault("holdout", "0")
    if "processor" in record:
        flags["processor"] = str(record["processor"])
    for flag, text in flags.items():
        if len((flag + text).splitlines()) > 1:  # a label is one line
            raise ValueError(f"a line end in {flag}={text!r:.40}")
    return run_of(flags, seed, record["result"])


def run_of(flags, seed, result):
    """Return the FinishedRun of {flag: value as text}, a seed as text, and {name: value}."""
    if "failed" in result:
        return FinishedRun(flags, seed)
    score = 100 * float(result["last"])
    if not -100 <= score <= 100:  # NaN is in no range
        raise ValueError(f"the metric is {score / 100}")
    parameters = int(result["params_active"])
    ever_trained = int(result["params_ever_trained"])
    # The bits are those of accuracy. They say nothing of another metric.
    right = None
    if result.get("metric") == "accuracy":
        right = unpack_right(result.get("dev", {}))
    return FinishedRun(flags, seed, score, parameters, ever_trained, right)


def as_text(value):
    """Return the value of a flag as labels show it: q,v or 0.003."""
    if isinstance(value, list):
        return ",".join(value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def unpack_right(dev):
    """Return what data.which_are_right packed (n,), as 0 and 1; None if it is not there."""
    if not dev.get("right") or not dev["accuracy"]:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(dev["right"]), np.uint8))
    n = round(bits.sum() / dev["accuracy"])  # the last byte is filled up with zeros
    if not len(bits) - 8 < n <= len(bits):
        raise ValueError(f"right has {len(bits)} bits, and its accuracy asks for {n} examples")
    return bits[:n]


def best_lr(scores):
    """Return the learning rate with the best mean, the smallest of equals; None if all are out.

    scores: {learning rate: [score of each seed]}. A rate is out if a run failed: its score is None.
    """
    means = {}
    for lr in sorted(scores, key=float):
        if None not in scores[lr]:
            means[lr] = round(statistics.mean(scores[lr]), 6)  # equal means may differ by rounding
    return max(means, key=means.get, default=None)


def select(runs, flag, texts):
    """Return the runs whose flag has one of these values, and those that lack the flag.

    Raises InputError for a value that no run has.
    """
    found = sorted({run.flags[flag] for run in runs if flag in run.flags})
    wanted = set()
    for text in texts:
        same = {value for value in found if is_same(value, text)}
        if not same:
            there = f"have {', '.join(found)}" if found else "lack this flag"
            others = f"the runs left so far {there}"
            raise InputError(f"no run has {flag}={text}; {others}")
        wanted |= same
    return [run for run in runs if flag not in run.flags or run.flags[flag] in wanted]


def is_same(text, other):
    """Return whether two texts are equal, or are equal numbers, such as 0.003 and 3e-3."""
    try:
        return text == other or float(text) == float(other)
    except ValueError:
        return False


def is_pair(run, other):
    """Return whether both runs ended, with the same data, metric and kind of processor."""
    if run.score is None or other.score is None:
        return False
    same = ("processor", "data_checksum", "train_limit", "holdout", "metric")
    return all(run.flags.get(flag) == other.flags.get(flag) for flag in same)


def gain_over(row, baseline):
    """Return the Gain of a row, or None if it makes fewer than two pairs with the baseline."""
    pairs = []
    for seed, run in row.items():
        if seed in baseline and is_pair(run, baseline[seed]):
            pairs.append((run, baseline[seed]))
    if len(pairs) < 2:
        return None
    differences = [run.score - other.score for run, other in pairs]
    by_example = None
    kept = [run.right for pair in pairs for run in pair]
    if all(right is not None and len(right) == len(kept[0]) for right in kept):
        by_example = np.mean([100.0 * run.right - 100.0 * other.right for run, other in pairs], 0)
    return Gain(differences, *mean_and_half_width(differences), by_example)
