"""What a run needs before it begins: examples, an encoder, and the values of unset flags."""

import math
import os

import torch

import data
from data import InputError
from extras import devices, fast_cpu
from extras.adalora import AdaLoRA
from extras.allocators import BY_LAYERS
from extras.alora import SCORE_EXAMPLES, ALoRA
from extras.checkpoints import find_checkpoint
from extras.flags import parse_budget
from heterolora import SHORTCUTS
from model import load_pretrained

EPOCHS = {"mrpc": 5, "rte": 10, "cola": 5, "sst2": 1, "qnli": 1, "qqp": 1, "mnli": 1}


def check_flags(args):
    """Raise InputError for flags that do not go together."""
    needs_checkpoint = args.task in data.GLUE or os.path.isdir(args.task)
    if args.model == "built-in" and needs_checkpoint and args.task not in data.BUILT_IN:
        raise InputError(f"task {args.task} needs --model: a checkpoint folder or a hub id")
    if args.method == "full" and args.precision not in (None, "float32"):
        raise InputError(
            f"--method full has no frozen weights: leave out --precision {args.precision}"
        )
    rules = ("uniform", *BY_LAYERS)
    if args.method == "lora" and args.allocator not in ("greedy", *rules):
        raise InputError(f"--method lora has no scores: --allocator may be {', '.join(rules)}")
    if args.method in ("alora", "adalora") and args.allocator != "greedy":
        raise InputError(f"--method {args.method} has its own rule: leave --allocator out")
    if args.method in ("head", "full") and args.budget is not None:  # in any form: it is not used
        parse_budget(str(args.budget), most=10**12)
    if args.init == "gradient" and args.method in ("head", "full"):
        raise InputError(f"--method {args.method} has no adapters: leave --init out")
    if args.init == "gradient" and args.method == "alora":
        raise InputError("--method alora has no warm-up for a gradient: leave --init out")
    if args.method == "lora" and args.targets == []:
        raise InputError("--method lora is of linears, and there are none: give --targets")
    if args.score_repeats and args.method not in ("static", "dynamic"):
        raise InputError(f"--method {args.method} has no first score: leave --score-repeats out")


def read_task(args):
    """Return the task with the examples and metric that the flags ask for. Raises InputError."""
    if args.data_dir:
        args.data_dir = os.path.abspath(args.data_dir)
    task = data.load_task(args.task, args.data_dir)
    if args.task not in (*data.BUILT_IN, *data.GLUE):
        args.task = os.path.abspath(args.task)
    if args.metric and len(task.labels) != 2:
        raise InputError(f"--metric {args.metric} is of two classes; there are {len(task.labels)}")
    if args.metric:
        metric = data.METRICS[args.metric]
        task.metric = lambda *both: metric(*both) | data.accuracy(*both)
    if args.train_limit:
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))
        task.train = [task.train[i] for i in order[: args.train_limit].sort().values]
    return data.hold_out(task, args.holdout) if args.holdout else task


def read_checkpoint(args):
    """Return the tokenizer and the encoder of --model. Raises InputError."""
    folder = find_checkpoint(args.model)
    encoder = load_pretrained(folder)
    tokenizer = data.load_tokenizer(folder)
    if max(tokenizer.vocab.values()) >= encoder.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has more words than the encoder")
    tokenizer.second_type = min(tokenizer.second_type, encoder.config.type_vocab_size - 1)
    if args.model != "built-in" and os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)
    args.max_length = min(args.max_length, encoder.max_length)
    tokenizer.encode("", "", args.max_length)  # refuses a length without room for a pair
    return tokenizer, encoder


def connections(encoder):
    """Return the kinds of connections that an encoder has: a single layer has no shortcut_ffn."""
    there = {name.split(".")[-1] for name, _ in encoder.named_modules()}
    return [kind for kind in SHORTCUTS if kind in there]


def place(args, task, model):
    """Put a model where it trains, and fill in the flags that were left out -> model"""
    is_built_in = args.model == "built-in"
    is_full = args.method == "full"
    device = devices.find_device(args.device)
    has_int8 = device.type == "cpu" and fast_cpu.has_onednn()
    if args.precision == "int8" and not has_int8:
        raise InputError(
            "--precision int8 needs an x86 CPU with oneDNN: add --device cpu, or leave it out"
        )
    if is_full:
        args.precision = "float32"
    args.precision = args.precision or devices.best_precision(device)
    args.epochs = args.epochs or float(EPOCHS.get(args.task, 4))
    args.batch_size = min(args.batch_size or (32 if is_built_in else 16), len(task.train))
    if is_full:
        args.lr = args.lr or (3e-4 if is_built_in else 5e-5)
    args.lr = args.lr or (2e-3 if is_built_in else 1e-3)
    if args.method in ("alora", "adalora"):
        args.head_warmup = args.warmup_steps = 0  # their first allocation has no score
    if args.method == "alora":
        args.probe_batches = math.ceil(SCORE_EXAMPLES / args.batch_size)
    devices.round_frozen(model.encoder, args.precision)
    return model.to(device)


def neighbour(args, model, adapters, loss_fn, optimizer, total):
    """Return the search of --method alora or adalora, tied to an optimizer of `total` steps."""
    common = (model, adapters, int(args.budget), loss_fn)
    if args.method == "alora":
        return ALoRA(*common, seed=args.seed).follow(optimizer)
    return AdaLoRA(*common, seed=args.seed).follow(optimizer, total)
