"""The folder of a run: logs, the state to resume from, the result, and what was learned.

config.json    the flags of the run, as train.py resolved them, and the checkpoint's checksum
log.jsonl      a line for each loss and each evaluation that was printed
history.jsonl  the search space, then a line for every allocation
state.pt       everything that changes while the run trains; gone when it has ended
adapters.pt    what was learned: active ranks and their values, the head, names of the classes
result.json    the result; when it is there, the run is finished
lock           empty; locked while a process trains the run

Without a folder (None) a Run only prints.
"""

import argparse
import contextlib
import json
import os
import warnings

import torch

from data import InputError
from extras.allocators import costs_once
from extras.checkpoints import content_checksum, read_pickle
from extras.files import lock, read_json, say, write
from extras.show import changes, grid
from extras.state import (
    PLACES,
    check_checkpoint,
    collect_learned,
    fitting,
    read_config,
    run_checksum,
)

LOGS = ("log.jsonl", "history.jsonl")
FILES = ("config.json", *LOGS, "state.pt", "adapters.pt", "result.json")
NOT_SAVED = ("out", "resume", "command")


def resumed_args(parser, args, argv):
    """Return the flags of the run that --resume names; those in PLACES may be given anew.

    Raises InputError if there is no run, and exits as argparse does if other flags are given.
    """
    # argparse gives a default only to flags that have no value yet. So what is not None was given.
    unset = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = vars(parser.parse_args(argv, unset))
    given = {name: value for name, value in given.items() if value is not None}
    extra = sorted(set(given) - {"resume", *PLACES})
    if extra:
        extra = ", ".join(f"--{name.replace('_', '-')}" for name in extra)
        parser.error(f"--resume takes its flags from the run, and no {extra}")
    flags = read_config(args.resume)["flags"]
    known = vars(args).keys() - set(NOT_SAVED)
    unknown = flags.keys() - known
    if unknown:
        unknown = ", ".join(sorted(unknown))
        raise InputError(
            f"{args.resume}: flags in its config.json that are unknown here: {unknown}"
        )

    def refuse(message):
        raise InputError(f"{args.resume}: its config.json: {message}")

    parser.error = refuse  # a wrong value there is no wrong use of the command line
    flags = flags | given | {"out": args.resume}
    return parser.parse_args([f"--{name.replace('_', '-')}={flags[name]}" for name in flags])


class Run:
    """One run's output. It prints; with a folder it also writes. Raises InputError."""

    def __init__(self, folder, is_new):
        self.folder = folder
        self.is_new = is_new
        self.checksum = None  # of the flags and the checkpoint
        self.data_checksum = None  # of what it trains and is evaluated on
        self.config = None  # what config.json holds
        self.logged = 0  # allocations in history.jsonl
        if folder and is_new:
            used = [name for name in FILES if os.path.exists(self.path(name))]
            if used:
                raise InputError(f"--out {folder} holds a run: give a new folder, or --resume")

    def path(self, name):
        """Return the path of a file of the run."""
        return os.path.join(self.folder, name)

    def is_finished(self):
        """Tell whether the run has ended."""
        return not self.is_new and os.path.isfile(self.path("result.json"))

    def has_state(self):
        """Tell whether there is a state to go on from."""
        return not self.is_new and os.path.isfile(self.path("state.pt"))

    def result(self):
        """Return the result of a finished run. Raises InputError."""
        if not os.path.isfile(self.path("adapters.pt")):
            warnings.warn(f"{self.folder}: adapters.pt is gone, so it cannot predict", stacklevel=2)
        result = read_json(self.path("result.json"))
        last = result.get("last")
        if type(last) not in (int, float) or not -1 <= last <= 1:  # NaN is in no range
            raise InputError(f"{self.path('result.json')} is no result: its metric is {last!r:.40}")
        print(f"{self.folder} is finished: {self.path('result.json')}")
        return result

    def begin(self, args, model):
        """Print the command and the flags; save them, or on --resume compare the checkpoint."""
        flags = {}
        for name, value in vars(args).items():
            if value is not None and name not in NOT_SAVED:
                flags[name] = (",".join(value) or "none") if isinstance(value, list) else str(value)
        self.log(f"command {args.command}")
        self.log("config  " + " ".join(f"{name}={value}" for name, value in flags.items()))
        if not self.folder:
            return
        self.config = {"command": args.command, "flags": flags}
        self.config |= {"checkpoint": model.checkpoint, "form": model.form}
        if not self.is_new:
            before = read_config(self.folder)
            check_checkpoint(before, model, args.model, self.folder)
            self.config["command"] = before["command"]
        self.take_folder()  # after the checks: it removes the logs of a run without a state
        self.config["checksum"] = self.checksum = run_checksum(flags, model.checkpoint)
        if not self.has_state():  # else `load` writes config.json, once the state is checked
            self.write_config()

    def take_folder(self):
        """Make the folder, or take it over; for this process alone, until it ends."""
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {self.folder} cannot be made: {error.strerror}") from None
        self.lock = lock(self.path("lock"))
        for name in os.listdir(self.folder):  # what a kill may have left of a file
            if name.startswith(FILES) and name.endswith(".unfinished"):
                os.remove(self.path(name))
        if os.path.isfile(self.path("result.json")):
            raise InputError(f"{self.folder}: another process has just finished this run")
        if self.has_state():
            return
        if not self.is_new:
            if os.path.isfile(self.path("adapters.pt")):
                raise InputError(f"{self.folder} has adapters.pt, but neither state nor result")
            self.log(f"resume  {self.folder} from the start: no step was saved")
        for name in LOGS:  # of a run that ended early
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path(name))

    def write_config(self):
        """Write config.json."""
        write(self.path("config.json"), json.dumps(self.config, indent=1))

    # ------------------------------------------------------------------------------ log lines

    def log(self, line, **values):
        """Print a line; the values go to log.jsonl."""
        say(line)
        if values:
            self.append("log.jsonl", values)

    def append(self, name, record):
        """Append a record to a file of JSON lines."""
        if self.folder:
            with open(self.path(name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    def log_step(self, progress, total, steps):
        """Print the mean loss of the last `steps` steps, and the speed since the start.

        Raises FloatingPointError if the loss is not finite.
        """
        progress.read_loss()
        loss = progress.loss / steps
        speed = progress.samples / progress.step_seconds
        milliseconds = 1000 * progress.step_seconds / progress.step
        line = f"step {progress.step:6d}/{total} | loss {loss:.4f} | {milliseconds:.1f} ms/step"
        self.log(f"{line} | {speed:.1f} samples/s", kind="step", step=progress.step, loss=loss)

    def log_evaluation(self, progress, total):
        """Print the last evaluation."""
        values = progress.evaluations[-1]
        line = f"eval {progress.step:6d}/{total} | {in_words(values)}"
        self.log(line, kind="eval", step=progress.step, **values)

    def log_allocations(self, search):
        """Print and save the allocations that are new in the search's history."""
        while self.logged < len(search.history):
            self.log_allocation(search, self.logged)
            self.logged += 1

    def log_allocation(self, search, number):
        """Print what came on and what went off; save the whole entry to history.jsonl."""
        entry = search.history[number]
        ranks = entry["ranks"]
        on = sum(rank > 0 for rank in ranks.values())
        line = f"alloc @ step {entry['step']} | on {on}/{len(ranks)} modules"
        line += f" | {entry['parameters']:,}/{search.budget:,} params"
        if number == 0:
            costs = costs_once(search.adapters)
            modules = {name: {"costs": prices} for name, prices in costs.items()}
            self.append("history.jsonl", {"modules": modules})
        else:
            before = search.history[number - 1]["ranks"]
            came, went, overlap = changes(ranks, before)
            words = [f"+{name.removeprefix('layers.')}" for name in came]
            words += [f"-{name.removeprefix('layers.')}" for name in went]
            if not words:
                words = ["no change" if ranks == before else "other ranks of the same modules"]
            line += f" | jaccard {overlap:.2f} | {' '.join(words)}"
        if on == 0:
            line += " | nothing fits the budget: only the head trains"
        self.log(line)
        self.append("history.jsonl", entry)

    def log_grid(self, adapters):
        """Print the ranks that are on, layers down and types of modules across."""
        if adapters:
            ranks = {name: adapter.rank for name, adapter in adapters.items()}
            self.log(grid(costs_once(adapters), ranks))

    # ---------------------------------------------------------------------------- the state

    def save(self, state):
        """Write state.pt, whole or not at all. Raises FloatingPointError (see State.collect)."""
        if self.folder:
            sizes = {}
            for name in LOGS:
                is_there = os.path.isfile(self.path(name))
                sizes[name] = os.path.getsize(self.path(name)) if is_there else 0
            content = state.collect() | {"data": self.data_checksum, "sizes": sizes}
            content["run"] = self.checksum
            content["checksum"] = content_checksum(content)
            write(self.path("state.pt"), lambda file: torch.save(content, file))

    def load(self, state):
        """Put back what `save` wrote, and cut the logs back to that moment. Raises InputError."""
        path = self.path("state.pt")
        saved = read_pickle(path, ("run", "data", "sizes", "progress", "trained"))
        with fitting(path):
            checksum = saved.pop("checksum", None)  # an older run's state has none
            if checksum not in (None, content_checksum(saved)):
                raise ValueError("it was changed by hand, or is damaged")
            if saved["run"] != self.checksum:
                raise ValueError("it is of a run with other flags or another checkpoint")
            if saved["data"] != self.data_checksum:
                raise ValueError("the data have changed since it was saved")
            sizes = {name: int(saved["sizes"][name]) for name in LOGS}
            state.restore(saved)
        self.logged = len(state.search.history) if state.search else 0
        for name, size in sizes.items():
            if os.path.isfile(self.path(name)) and 0 <= size <= os.path.getsize(self.path(name)):
                os.truncate(self.path(name), size)
        self.write_config()  # with the places where things are now
        self.log(f"resume  {self.folder} after step {state.progress.step}")

    def finish(self, result, task, model, adapters):
        """Print the result; write it and what was learned, and remove the state."""
        self.log_grid(adapters)
        line = f"result  {result['task']} {result['method']} seed {result['seed']}"
        best = f"best {result['metric']} {result['best']:.4f}"
        self.log(f"{line} | {in_words(result['dev'])} | {best}")
        self.log(
            f"params  active {result['params_active']:,} | ever trained "
            f"{result['params_ever_trained']:,} | head {result['params_head']:,}"
        )
        self.log(
            f"time    training {result['train_seconds']:.1f} s | search "
            f"{result['search_seconds']:.1f} s | {result['samples_per_second']:.1f} samples/s | "
            f"peak memory {result['peak_memory_mb'] or 0:.0f} MB"
        )
        if self.folder:
            learned = collect_learned(task, model, adapters) | {"run": self.checksum}
            write(self.path("adapters.pt"), lambda file: torch.save(learned, file))
            write(self.path("result.json"), json.dumps(result, indent=1))
            self.lock.close()  # Windows does not remove a file that is open
            for name in ("state.pt", "lock"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.path(name))


def in_words(values):
    """Turn {"accuracy": 0.5, ...} into "accuracy 0.5000 | ...". Text is left out."""
    numbers = {name: value for name, value in values.items() if not isinstance(value, str)}
    return " | ".join(f"{name} {value:.4f}" for name, value in numbers.items())
