"""What a run holds while it trains, what it has learned, and how both are put back.

`State` is everything that a run needs to go on, bit for bit on a CPU with as many threads. What was
learned is less: the ranks that are on and their values, the head, and the names of the classes.
"""

import contextlib
import dataclasses
import math
import os
import time
import zlib

import torch

import heterolora
from data import InputError
from extras.checkpoints import read_pickle
from extras.files import read_json
from extras.results import WRONG_FORM


def checksum(encoder):
    """Return a number that tells one checkpoint's weights from another's. They are on the CPU."""
    total = 0
    for tensor in encoder.state_dict().values():
        total = zlib.crc32(tensor.flatten().numpy().data, total)
    return total


def form(encoder, tokenizer):
    """Return a number that tells an architecture and its tokenizer from another."""
    settings = {name: value for name, value in vars(tokenizer).items() if not callable(value)}
    return zlib.crc32(repr((encoder.config, settings)).encode())


PLACES = ("model", "task", "data_dir", "device")  # flags that may differ when a run is resumed


def run_checksum(flags, checkpoint):
    """Return a number that tells one run from another: from its flags and its checkpoint."""
    kept = {name: flags[name] for name in sorted(flags) if name not in PLACES}
    return zlib.crc32(repr((kept, checkpoint)).encode())


def read_config(folder):
    """Return config.json of a run: command, flags, checkpoint, checksum. Raises InputError."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise InputError(f"{folder} holds no run: there is no config.json in it")
    config = read_json(path)
    for key, kind in (("command", str), ("flags", dict), ("checkpoint", int), ("checksum", int)):
        if type(config.get(key)) is not kind:
            raise InputError(f"{path}: {key} is missing, or is no {kind.__name__}")
    flags = config["flags"]
    if not all(type(text) is str for text in flags.values()):
        raise InputError(f"{path}: its flags must all be texts")
    if config["checksum"] != run_checksum(flags, config["checkpoint"]):
        raise InputError(f"{path} was changed by hand, or is damaged: its checksum is wrong")
    return config


def check_checkpoint(config, model, name, folder):
    """Raise InputError if a model's checkpoint is not that of a run's config.json."""
    if config["checkpoint"] != model.checkpoint:
        raise InputError(f"{name} has other weights than when {folder} began")
    if config.get("form", model.form) != model.form:  # older runs lack it
        raise InputError(f"{name} has another config or tokenizer than when {folder} began")


@contextlib.contextmanager
def fitting(path):
    """Turn what goes wrong when content of the wrong form is put back into an InputError."""
    try:
        yield
    except (*WRONG_FORM, LookupError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} does not fit the run: {reason.splitlines()[0]}") from None


def data_checksum(split, labels):
    """Return a number that tells whether a resumed run has the data that it began with."""
    total = zlib.crc32(repr(labels).encode())
    for encoded, label in zip(split.encoded, split.labels, strict=True):
        total = zlib.crc32(repr((encoded, label)).encode(), total)
    return total


@dataclasses.dataclass
class Progress:
    """What a run counts."""

    step: int = 0
    queue: list = dataclasses.field(default_factory=list)  # batches left of this epoch
    loss: float = 0.0  # sum since the last log line; a step makes it a tensor, `read_loss` a float
    samples: int = 0
    tokens: int = 0  # padding included
    step_seconds: float = 0.0
    recorded_tokens: int = 0  # the same of the steps that were recorded for a score
    recorded_seconds: float = 0.0
    search_seconds: float = 0.0  # of scoring and allocating
    evaluations: list = dataclasses.field(default_factory=list)

    def read_loss(self):
        """Turn the sum of losses into a number. Raises FloatingPointError if it is not finite."""
        start = time.perf_counter()
        self.loss = float(self.loss)
        self.step_seconds += time.perf_counter() - start  # float() waited for a GPU's steps
        if not math.isfinite(self.loss):
            raise self.not_finite("the loss")

    def not_finite(self, what):
        """Return the error that stops a run."""
        where = f"at step {self.step} or shortly before"
        return FloatingPointError(f"{what} is not finite {where}: try a lower --lr")

    def count(self, step, batch, seconds, is_recorded):
        """Count a step that has been made."""
        (input_ids, *_), labels = batch
        self.step = step
        self.samples += len(labels)
        self.tokens += input_ids.numel()
        self.step_seconds += seconds
        if is_recorded:
            self.recorded_tokens += input_ids.numel()
            self.recorded_seconds += seconds


@dataclasses.dataclass
class State:
    """The objects that change while a run trains. Random numbers of dropout are torch's own."""

    device: torch.device
    model: object
    adapters: dict
    optimizer: object
    schedule: object
    search: object
    data_order: torch.Generator
    probing: torch.Generator
    progress: Progress = dataclasses.field(default_factory=Progress)

    def collect(self):
        """Read the loss, and return everything as plain values and tensors.

        Raises FloatingPointError if the loss or what trains is not finite: that is never saved.
        """
        self.progress.read_loss()
        if not all(p.isfinite().all() for p in self.model.parameters() if p.requires_grad):
            raise self.progress.not_finite("a weight")
        state = {
            "progress": dataclasses.asdict(self.progress),
            "trained": {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad},
            "ranks": {name: adapter.rank for name, adapter in self.adapters.items()},
            "optimizer": self.optimizer.state_dict()["state"],
            "generators": [self.data_order.get_state(), self.probing.get_state()],
            "dropout": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["dropout_cuda"] = torch.cuda.get_rng_state(self.device)
        if self.search:
            recorded = {}
            for name, adapter in self.adapters.items():
                if adapter in self.search.recorded:
                    recorded[name] = list(self.search.recorded[adapter])
            state["search"] = {
                "history": self.search.history,
                "generator": self.search.generator.get_state(),
                "recorded": recorded,
                "recorded_steps": self.search.recorded_steps,
            }
        return state

    def restore(self, state):
        """Put back what `collect` returned. Raises an error of any type if it does not fit."""
        for field in dataclasses.fields(self.progress):
            value = state["progress"][field.name]
            if type(value) is not field.type:
                raise ValueError(f"{field.name} is a {type(value).__name__}")
            setattr(self.progress, field.name, value)
        evaluations = self.progress.evaluations
        if self.progress.step < 0 or not all(type(e) is dict and "loss" in e for e in evaluations):
            raise ValueError("the counters are not those of a run")
        if any(type(i) is not int or i < 0 for batch in self.progress.queue for i in batch):
            raise ValueError("its batches are not made of examples")
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        put(state["trained"], trained)
        if state["ranks"].keys() != self.adapters.keys():
            raise ValueError("the ranks are of other modules")
        heterolora.set_ranks(self.adapters, state["ranks"])
        groups = self.optimizer.state_dict()["param_groups"]  # these follow from the flags
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if self.progress.step > 0 and not self.optimizer.state:
            raise ValueError("the optimizer's state is missing")
        for parameter, moments in self.optimizer.state.items():
            if moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError("the optimizer's state is that of another optimizer")
            for moment in moments.values():
                if moment.dim() > 0 and moment.shape != parameter.shape:
                    raise ValueError("the optimizer's state is of another shape")
                if not moment.isfinite().all():
                    raise ValueError("the optimizer's state is not finite")
        self.schedule.last_epoch = self.progress.step
        factors = self.schedule.lr_lambdas
        for group, factor in zip(self.optimizer.param_groups, factors, strict=True):
            group["lr"] = group["initial_lr"] * factor(self.progress.step)
        self.data_order.set_state(state["generators"][0])
        self.probing.set_state(state["generators"][1])
        torch.set_rng_state(state["dropout"])
        if self.device.type == "cuda" and "dropout_cuda" in state:  # a run from a CPU has none
            torch.cuda.set_rng_state(state["dropout_cuda"], self.device)
        if self.search:
            saved = state["search"]
            for entry in saved["history"]:
                if entry["ranks"].keys() != self.adapters.keys():
                    raise ValueError("an allocation is of other modules")
                heterolora.set_ranks(self.adapters, entry["ranks"])  # refuses what is no rank
                if type(entry["step"]) is not int or type(entry["parameters"]) is not int:
                    raise ValueError("an allocation lacks its step or its parameters")
                if entry["scores"].keys() - self.adapters.keys():
                    raise ValueError("the scores are of other modules")
            if state["ranks"] != saved["history"][-1]["ranks"]:
                raise ValueError("the ranks are not those of the last allocation")
            self.search.history = list(saved["history"])
            self.search.generator.set_state(saved["generator"])
            self.search.recorded_steps = int(saved["recorded_steps"])
            if self.search.recorded_steps < 0:
                raise ValueError("the number of recorded steps is negative")
            for name, sums in saved["recorded"].items():
                adapter = self.adapters[name]
                self.search.recorded[adapter] = [total.to(self.device) for total in sums]


def blocks_on(adapters):
    """Return {"module number": what is on of the module's parameter of that number}."""
    blocks = {}
    for name, adapter in adapters.items():
        for number, (parameter, slices) in enumerate(adapter.active(adapter.rank)):
            blocks[f"{name} {number}"] = parameter.data[slices]
    return blocks


def collect_learned(task, model, adapters):
    """Return what a run has learned and no more: what is on, the head, for full the encoder."""
    learned = {
        "ranks": {name: adapter.rank for name, adapter in adapters.items()},
        "adapters": {name: block.clone() for name, block in blocks_on(adapters).items()},
        "head": model.head.state_dict(),
        "labels": list(task.labels),
        "texts": 1 if task.dev[0][1] is None else 2,  # in an example
    }
    if not adapters and next(model.encoder.parameters()).requires_grad:
        learned["encoder"] = model.encoder.state_dict()
    return learned


def read_learned(folder):
    """Return what `collect_learned` made, from a finished run's folder. Raises InputError."""
    path = os.path.join(folder, "adapters.pt")
    if not os.path.isfile(path):
        if os.path.isfile(os.path.join(folder, "result.json")):
            raise InputError(f"{folder} is finished, but its adapters.pt is gone: train a new run")
        raise InputError(f"{folder} is not finished: go on with python train.py --resume {folder}")
    learned = read_pickle(path, ("run", "ranks", "adapters", "head", "labels", "texts"))
    labels = learned["labels"]
    if type(labels) is not list or not labels or not all(type(label) is str for label in labels):
        raise InputError(f"{path}: want a list of labels")
    if type(learned["texts"]) is not int or learned["texts"] not in (1, 2):
        raise InputError(f"{path}: want 1 or 2 texts in an example")
    return learned


def put(tensors, parameters):
    """Copy {name: tensor} into the parameters of the same names. Raises ValueError."""
    if tensors.keys() != parameters.keys():
        raise ValueError("its tensors are not those of this run")
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
            raise ValueError(f"{name} has another shape or type of number")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")
        parameter.data.copy_(tensor)


def put_learned(folder, learned, args, model, adapters):
    """Put what was learned into a model built from the same flags. Raises InputError."""
    config = read_config(folder)
    path = os.path.join(folder, "adapters.pt")
    check_checkpoint(config, model, args.model, folder)
    model.args = args
    model.adapters = adapters
    model.labels = learned["labels"]
    model.texts = learned["texts"]
    with fitting(path):
        if learned["run"] != config["checksum"]:
            raise ValueError("it is of a run with other flags or another checkpoint")
        if args.method == "full":
            put(learned["encoder"], dict(model.encoder.named_parameters()))
        put(learned["head"], dict(model.head.named_parameters()))
        heterolora.set_ranks(adapters, learned["ranks"])
        put(learned["adapters"], blocks_on(adapters))
