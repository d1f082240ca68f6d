"""Train contenders with the same seeds, data and budget, and print a Markdown table.

    python -m extras.compare lora random static:grad-norm --task mrpc --model roberta-base
    python -m extras.compare lora dynamic:rank=4:lr=1e-3 --seeds 0 1 2 3 --lr 1e-3 3e-3

A contender is METHOD[:PROXY][:ALLOCATOR][:FLAG=VALUE]... with flags of train.py; `random` is
static:constant. Other flags of train.py hold for all. Runs that have ended are kept in a file of
JSON lines, and are not done again, even if the code has changed since. A run of another kind of
processor is done again, as each kind rounds in its own way; a GPU is not told from its CPU.
"""

import argparse
import contextlib
import copy
import datetime
import itertools
import json
import math
import os
import pathlib
import statistics
import sys
import warnings
import zlib

import torch

import extras.allocators  # noqa: F401  they register what a contender can name
import extras.proxies  # noqa: F401
import train
from data import InputError
from extras.evidence import gain_cell, level_cells, mean_and_sd
from extras.fast_cpu import processor_name
from extras.flags import command, number
from extras.results import WRONG_FORM, best_lr, gain_over, open_results, records, run_of
from extras.show import jaccard
from heterolora import ALLOCATORS, PROXIES

TUNING_SHARE = 0.2  # of the training set is held out, to choose among several learning rates

# Flags that do not tell runs apart. Data and model count by checksums (form: in `read_record`).
NO_MATTER = {"data_dir", "device", "out", "resume", "command", "model", "form"}
# Flags that are the same for all contenders.
SHARED = {"task", "metric", "train_limit", "holdout", "model", "method", "budget", "seed"}
SHARED |= NO_MATTER
# Flags of a score and what comes before it.
SEARCH = {"proxy", "realloc_every", "probe_batches", "head_warmup", "warmup_steps", "score_repeats"}
# Flags of the search space.
SPACE = {"budget", "targets", "shortcuts", "rank", "alpha", "shortcut_alpha", "adapter"}
SPACE |= {"allocator", "init"}
# Flags without effect on a method: its runs may differ in them and still be the same.
UNUSED = {
    "dynamic": set(),
    "static": {"realloc_every"},
    "lora": SEARCH,
    "alora": (SEARCH - {"realloc_every"}) | {"allocator"},
    "adalora": SEARCH | {"allocator"},
    "full": SEARCH | SPACE,
    "head": SEARCH | SPACE | {"lr"},
}


def contender_argv(spec, known):
    """Return a contender as train.py's arguments; known are all flags. Raises InputError."""
    method, *options = spec.split(":")
    if method == "random":
        method, options = "static", ["constant", *options]
    argv = [f"--method={method}"]
    for option in options:
        flag, _, value = option.partition("=")
        name = flag.replace("-", "_")
        if option in PROXIES:
            argv.append(f"--proxy={option}")
        elif option in ALLOCATORS:
            argv.append(f"--allocator={option}")
        elif name in SHARED:
            raise InputError(f"{spec}: contenders cannot differ in {flag}")
        elif name not in known or not value:
            raise InputError(f"{spec}: {option!r} is no proxy or allocator, and no FLAG=VALUE")
        else:
            argv.append(f"--{name.replace('_', '-')}={value}")
    return argv


def prepare(args, argv):
    """Check all that the runs need -> {contender: its flags, complete}. Raises InputError.

    The budget is in parameters; a share, such as 25%, is of the search space that argv describes.
    """
    common = train.parse_args(argv)
    if common.out or common.resume or common.holdout or common.seed or common.method != "dynamic":
        taken = "want --results, --seeds, --holdout in full, and contenders"
        raise InputError(f"compare takes no --out, --resume, --seed or --method: {taken}")
    if args.holdout and len(args.lr) > 1:
        raise InputError("--holdout with several --lr: both would choose on the same part")
    task, _, model, _ = train.prepare(common)
    # Of the whole data, so that a run with --holdout 0.2 can be one of tuning.
    data_checksum = zlib.crc32(repr((task.train, task.dev)).encode())
    if args.lr:
        argv = [*argv, f"--lr={args.lr[0]}"]
    contenders = {}
    for spec in args.contenders:
        flags = train.parse_args([*argv, *contender_argv(spec, vars(common))])
        flags.holdout = args.holdout
        flags.budget = int(common.budget)
        try:
            train.prepare(flags)
        except InputError as error:
            raise InputError(f"{spec}: {error}") from None
        flags.budget = int(common.budget)  # `prepare` lowers it where the space is smaller
        flags.data_checksum = data_checksum
        flags.checkpoint, flags.form = model.checkpoint, model.form
        contenders[spec] = flags
    return contenders


def code_checksum():
    """Return a number that tells whether the code is that of an earlier run; tests do not count."""
    root = pathlib.Path(train.__file__).parent
    total = 0
    for path in sorted([*root.glob("*.py"), *root.glob("extras/*.py")]):
        if not path.name.startswith((".", "test_")):
            total = zlib.crc32(path.read_bytes(), total)
    return total


CODE = code_checksum()  # of what was imported: the files may change while runs go on


def read_record(path, key, form=None):
    """Return the record of a run with these flags, a model of this form, and a processor as here.

    Or None. A line of such a run that is no result is left out, with a warning. Raises InputError.
    """
    here = {"processor": processor_name(), "form": form}  # old records lack the form
    found = None
    for line, record in records(path):
        try:
            is_here = all(record.get(name, value) == value for name, value in here.items())
            if is_here and as_key(record["flags"]) == key:
                check_result(record["result"])
                found = record
        except WRONG_FORM:
            warnings.warn(f"{path}, line {line}, is no result: left out", stacklevel=2)
    return found


def check_result(result):
    """Raise one of WRONG_FORM for a result that `table` cannot show, alone or beside another."""
    table({"": argparse.Namespace(method="", lr=0.0)}, {"": {0: result, 1: result}})
    in_words(result)
    if "failed" not in result:
        jaccard(result["ranks"], result["ranks"])  # the table leaves it out if nothing is on
        if not math.isfinite(result["best"]):
            raise ValueError("the best metric is not finite")


def as_key(flags):
    """Return flags as text. None is left out: records of before a flag was added match."""
    return json.dumps({k: v for k, v in flags.items() if v is not None}, sort_keys=True)


def unused_flags(flags):
    """Return the names of the flags that make no difference to a run with these flags."""
    unused = UNUSED[flags.method]
    if flags.init == "gradient":  # it sees the same warm-up and batches as a score
        unused = unused - {"probe_batches", "head_warmup", "warmup_steps"}
    return NO_MATTER | unused


def run(spec, flags, path):
    """Train once, unless the file at path has the result -> result, or {"failed": reason}"""
    kept = vars(flags) | {
        "task": os.path.basename(os.path.normpath(flags.task)),
        "budget": str(flags.budget),
    }
    for name in unused_flags(flags):
        kept.pop(name, None)
    key = as_key(kept)
    if record := read_record(path, key, flags.form):
        told = in_words(record["result"])
        if record.get("code") != CODE:
            told += " (by other code, or unknown: another --results FILE trains anew)"
        print(f"kept    {spec} seed {flags.seed} lr {flags.lr:g} | {told}", flush=True)
        return record["result"]
    try:
        with contextlib.redirect_stdout(None):
            result = train.train(copy.copy(flags))
    except FloatingPointError as error:
        result = {"failed": str(error)}
    if record := read_record(path, key, flags.form):  # by another process, meanwhile
        return record["result"]
    record = {"flags": kept, "result": result, "date": datetime.date.today().isoformat()}
    record |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "code": CODE}
    record |= {"processor": processor_name(), "form": flags.form}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(f"run     {spec} seed {flags.seed} lr {flags.lr:g} | {in_words(result)}", flush=True)
    return result


def in_words(result):
    """Return what a run came to."""
    return result.get("failed") or f"{result['metric']} {result['last']:.4f}"


def choose_lr(spec, flags, args):
    """Return the learning rate that is best on held-out training examples, the least of equals."""
    flags = copy.copy(flags)
    flags.holdout = TUNING_SHARE
    scores = {lr: [] for lr in sorted(args.lr)}
    for lr in scores:
        flags.lr = lr
        for seed in args.seeds[: args.tuning_seeds]:
            flags.seed = seed
            result = run(f"{spec}, held out,", flags, args.results)
            scores[lr].append(result.get("last"))  # None of a run that failed
    return best_lr(scores) or min(scores)


def compare(args, argv):
    """Train every contender with every seed -> Markdown table. Raises InputError before any run."""
    contenders = prepare(args, argv)
    open_results(args.results)
    for spec, flags in contenders.items():
        if len(args.lr) > 1 and flags.method != "head" and ":lr=" not in spec:
            flags.lr = choose_lr(spec, flags, args)
    results = {spec: {} for spec in contenders}
    for seed in args.seeds:
        for spec, flags in contenders.items():
            flags.seed = seed
            results[spec][seed] = run(spec, flags, args.results)
    return table(contenders, results)


def overlap(ended):
    """Return the mean Jaccard index of the modules that are on, over pairs of seeds.

    "" if there is one seed, or if nothing is ever on, as with head.
    """
    allocations = [result["ranks"] for result in ended]
    pairs = list(itertools.combinations(allocations, 2))
    if not pairs or not any(any(ranks.values()) for ranks in allocations):
        return ""
    return f"{statistics.mean(jaccard(ranks, others) for ranks, others in pairs):.2f}"


def table(contenders, results):
    """Return a Markdown table of {contender: {seed: result}}, as extras.evidence has it, and more.

    A difference is over the seeds at which both ended, with a 95 % interval of Student's t.
    """
    rows = {}
    for spec, of_spec in results.items():
        rows[spec] = {seed: run_of({}, str(seed), result) for seed, result in of_spec.items()}
    first = next(iter(rows))
    head = "contender | lr | n | mean ± sd | parameters | ever trained | minus the first [95 %]"
    lines = [f"| {head} | best | overlap of seeds | seconds |", "|---" * 10 + "|"]
    for spec, row in rows.items():
        gain = gain_over(row, rows[first])
        difference = gain_cell(gain) if gain and spec != first else ""
        lr = "" if contenders[spec].method == "head" else f"{contenders[spec].lr:g}"
        cells = [f"`{spec}`", lr, *level_cells(row), difference]
        ended = [result for result in results[spec].values() if "failed" not in result]
        if ended:
            seconds = [result["train_seconds"] + result["search_seconds"] for result in ended]
            cells.append(mean_and_sd([100 * result["best"] for result in ended]))
            cells.append(overlap(ended))
            cells.append(f"{statistics.mean(seconds):.0f}")
        cells += [""] * (10 - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@command
def main(argv=None):
    rest = "Contenders come first. All other flags are those of train.py, for every contender."
    parser = argparse.ArgumentParser(prog="extras.compare", allow_abbrev=False, epilog=rest,
                                     description=__doc__.splitlines()[0])  # fmt: skip
    add = parser.add_argument
    add("contenders", nargs="+", metavar="CONTENDER",
        help="METHOD[:PROXY][:ALLOCATOR][:FLAG=VALUE]...; random is static:constant")  # fmt: skip
    add("--seeds", type=number(int, -1), nargs="+", default=[0, 1, 2])
    add("--lr", type=number(float, 0), nargs="+", default=[], help="of several, each chooses one")
    add("--tuning-seeds", type=number(int, 0), default=2, help="so many seeds choose an --lr (2)")
    add("--holdout", type=number(float, 0), help="evaluate on this share of the training set")
    add("--results", metavar="FILE", default="results.jsonl")
    args, rest = parser.parse_known_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    args.lr = list(dict.fromkeys(args.lr))
    try:
        print(compare(args, rest))
    except KeyboardInterrupt:
        print(f"stopped; what ended is in {args.results}, and is not done again", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
