"""Fine-tune an encoder under a parameter budget: HeteroLoRA (static or dynamic), uniform LoRA, head only, or everything.

    python train.py --budget 25%                                     # built-in task and encoder, no data needed
    python train.py --task mrpc --model roberta-base --out runs/a    # GLUE and a checkpoint, downloaded or in a folder
    python train.py --resume runs/a                                  # after a Ctrl-C or a crash
    python train.py --predict runs/a "One sentence." "Another."

Read `train` top to bottom: it is the whole run. Every flag: python train.py --help, or the table in the README.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zlib

import torch
import torch.distributed as dist
import torch.nn.functional as F

import data
import files
import heterolora
import model as encoders
from files import grid

METHODS = ("dynamic", "static", "lora", "head", "full")
EPOCHS = {"mrpc": 5, "rte": 10, "cola": 5, "sst2": 1, "qnli": 1, "qqp": 1, "mnli": 1}  # small sets want more passes

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# a saved run has its flags with it: what else may stand beside these
WITH = {"resume": ("model", "data_dir", "device"), "eval": ("task", "model", "data_dir", "device", "precision", "merge", "export_peft"), "predict": ("model", "device", "precision"), "show": ("svg",)}


class UsageError(files.InputError):
    """Flags that cannot work, found before any training: exit status 2."""


class Interrupted(Exception):
    """Ctrl-C, or SIGTERM: exit status 130"""


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and without "(default: None)" """
    flags = {}  # name as in the Namespace -> type, choices

    def error(self, message):
        self.exit(2, f"train.py: error: {message} (python train.py --help lists every flag)\n")

    def add(self, title, *flags):
        """flags: (name, type, default, metavar or choices, help)"""
        group = self.add_argument_group(title)
        for name, kind, default, values, text in flags:
            self.flags[name[2:].replace("-", "_")] = kind, None if isinstance(values, str) else values
            values = {"metavar": values} if isinstance(values, str) else {"choices": list(values)}
            values |= {"nargs": "+"} if name in ("--predict", "--compare", "--seeds", "--lr") else {}
            values |= {"metavar": tuple(values["metavar"].split())} if name == "--predict" else {}
            group.add_argument(name, type=kind, default=default, help=text + ("" if default is None else " (default: %(default)s)"), **values)


def number(kind, low, included=True, below=math.inf):
    """-> an argparse type: an int or float from `low` on, or above it, and below another"""
    def parse(text):
        value = kind(text)
        if not (value >= low if included else value > low) or not value < below:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {'at least' if included else 'over'} {low}" + ("" if below == math.inf else f" and below {below}"))
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def parse_args(argv=None, others=None):
    """list of str (None: the command line) -> argparse.Namespace. others: a Namespace whose values stand for flags that are not given"""
    whole, positive, share = number(int, 1), number(float, 0, included=False), number(float, 0)

    def names(text):
        return [] if text == "none" else text.split(",")
    parser = Parser(description="HeteroLoRA and its baselines under a budget of trainable parameters.")
    parser.add("task and model",
        ("--task", str, "paraphrase", [*data.BUILT_IN, *data.GLUE], "the first four are built in, the others GLUE"),
        ("--data-dir", str, None, "DIR", "folder of the GLUE folders, DIR/MRPC/train.tsv and so on (default: downloaded)"),
        ("--train-limit", whole, None, "N", "train on N examples, the same ones for every seed (default: all)"),
        ("--holdout", number(float, 0, below=1), 0.0, "SHARE", "evaluate on this share of the training set, not trained on then, and leave dev alone"),
        ("--max-length", number(int, 5), 128, "N", "tokens of an example at most"),
        ("--model", str, "built-in", "NAME", "a BERT or RoBERTa: folder, or id on the Hugging Face hub"),
        ("--pooling", str, "mean", ("mean", "cls"), "what the head sees"))
    parser.add("method",
        ("--method", str, "dynamic", METHODS, "lora: uniform rank on the targets (with an allocator *-layers: in those); head: no adapters; full: every weight"),
        ("--budget", str, None, "B", "25%% or 0.25 of the search space, or a number of parameters (default: 25%%; all of it for lora)"),
        ("--targets", names, "q,v", "LIST", f"all, none, or some of {','.join(heterolora.TARGETS)}"),
        ("--shortcuts", names, "all", "LIST", f"all, none, or some of {','.join(heterolora.SHORTCUTS)}"),
        ("--rank", whole, 8, "R", "r_max, the rank of a module that is fully on"),
        ("--alpha", positive, 16.0, "ALPHA", "LoRA adds alpha / R * BA"),
        ("--shortcut-alpha", positive, 4.0, "ALPHA", "the same for shortcuts"),
        ("--proxy", str, "grad-norm", heterolora.PROXIES, "score of a module"),
        ("--allocator", str, "greedy", heterolora.ALLOCATORS, "how scores become ranks"),
        ("--granularity", str, "module", ("module", "rank"), "buy modules whole, or rank by rank"),
        ("--order", str, "score", ("score", "density"), "buy by score, or by score per parameter"),
        ("--scale", str, "in", ("in", "out"), "does a gradient count with its module's alpha / R, or without"),
        ("--pool", str, "combined", ("combined", "separated"), "LoRA and shortcuts in one list, or each with its share"),
        ("--realloc-every", positive, 0.2, "E", "epochs between reallocations (dynamic)"),
        ("--probe", str, None, ("inline", "separate"), "read later scores off the training steps, or make passes for them (default: inline if the proxy can)"),
        ("--probe-batches", whole, 8, "N", "training batches that a scoring sees"),
        ("--head-warmup", number(int, 0), 100, "N", "steps of head-only training before the first scoring, undone after it"),
        ("--warmup-steps", number(int, 0), 0, "N", "instead: steps with every candidate on, undone after the first scoring"),
        ("--warmup-rank", whole, 1, "R", "the rank of every candidate in these steps"),
        ("--warmup-values", str, "undo", ("undo", "keep"), "what a warm-up has trained: undo it after the first scoring, or go on from there"))
    parser.add("training",
        ("--epochs", positive, None, "N", f"default: 4 for the built-in tasks, {', '.join(f'{v} {k}' for k, v in EPOCHS.items())}"),
        ("--max-steps", whole, None, "N", "stop after N steps, and let the schedule end there"),
        ("--batch-size", whole, None, "N", "examples a step (default: 32 with the built-in encoder, else 16)"),
        ("--accumulate", whole, 1, "N", "work a batch off in N parts: the same gradient in less memory"),
        ("--lr", positive, None, "LR", "of the adapters (default: 2e-3 built-in, else 1e-3) or, for full, the encoder (3e-4, else 5e-5)"),
        ("--head-lr", positive, 1e-3, "LR", "of the head"),
        ("--weight-decay", share, 0.01, "W", "AdamW's, on matrices"),
        ("--schedule", str, "linear", ("linear", "constant"), "of the learning rate, after its warm-up"),
        ("--lr-warmup", share, 0.06, "SHARE", "share of the steps in which the learning rate rises"),
        ("--clip", positive, 1.0, "NORM", "gradient norm at most"),
        ("--seed", number(int, 0, below=2**63), 0, "SEED", "of initialisation, data order, probing, ties and dropout"),
        ("--device", str, None, "DEVICE", "cpu, cuda, cuda:1 and so on (default: cuda if there is one)"),
        ("--precision", str, None, tuple(PRECISIONS), "of frozen weights and of what is computed with them (default: bfloat16 if the processor has it)"),
        ("--log-every", whole, 50, "N", "steps between log lines"),
        ("--out", str, None, "DIR", "a new folder for the run: config, logs, history, state to resume from, result, adapters"),
        ("--save-every", whole, 500, "N", "steps between saves of that state; after every epoch it is saved too"),
        ("--resume", str, None, "RUN_DIR", "go on with a run that was interrupted"))
    parser.add("using a run",
        ("--eval", str, None, "RUN_DIR", "evaluate a finished run on the dev set of its --task, or of another"),
        ("--predict", str, None, "RUN_DIR TEXT", "label and probability of the text or two after it, or of every line of standard input"),
        ("--merge", str, None, "DIR", "after training, or with --eval: write a Hugging Face folder with LoRA folded into the weights"),
        ("--export-peft", str, None, "DIR", "the same as a Hugging Face PEFT adapter"),
        ("--show", str, None, "RUN_DIR", "print what the search of a run did, from its history.jsonl, and stop"),
        ("--svg", str, None, "FILE", "with --show: draw it too"))
    parser.add("evidence",
        ("--compare", str, None, "METHOD", "train with each of several methods and seeds, and print a table; METHOD[:PROXY][:VALUE or :FLAG=VALUE]..."),
        ("--seeds", number(int, 0, below=2**63), None, "SEED", "of --compare (default: 0 1 2 3 4)"),
        ("--results", str, "results.jsonl", "FILE", "of --compare: every run that has ended, one a line; what is there is not done again"),
        ("--benchmark", whole, None, "STEPS", "measure the speed of this machine with these flags over so many training steps"))
    args = parser.parse_args(argv, others and argparse.Namespace(**vars(others)))
    unset = object()
    given = {key: value for key, value in vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))).items() if value is not unset}
    saved = next((mode for mode in WITH if mode in given), None)
    if args.svg and not args.show:
        parser.error("--svg needs --show RUN_DIR")
    if isinstance(args.lr, list) and not args.compare:
        args.lr = args.lr[0] if len(args.lr) == 1 else parser.error("--lr takes a list only with --compare")
    if not args.compare and {"seeds", "results"} & set(given):
        parser.error("--seeds and --results need --compare; one run takes --seed, and --out")
    if args.compare and {"seed", "method", "benchmark"} & set(given):
        parser.error("--compare takes no --benchmark; its methods are what it lists, and it has --seeds for --seed")
    extra = [f"--{key.replace('_', '-')}" for key in given if saved and key != saved and key not in WITH[saved]]
    if extra:
        parser.error(f"--{saved} takes the flags of the run from its config.json, and beside them no {', '.join(extra)}")
    if saved not in (None, "show"):
        folder = given[saved][0] if saved == "predict" else given[saved]
        args = argparse.Namespace(**{**vars(args), "precision": "float32", **read_config(folder), **({} if saved == "resume" else {"merge": None, "export_peft": None}), **given, "out": args.resume})
        if "model" in given:
            args.checkpoint = None
    args.checkpoint, args.fingerprint = getattr(args, "checkpoint", None), getattr(args, "fingerprint", None)  # set by prepare
    args.command = shlex.join(["python", *(sys.argv if argv is None else ["train.py", *argv])])
    return args


def read_config(folder):
    """The flags of the run in a folder -> dict. Raises UsageError."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UsageError(f"{folder} holds no run: there is no {path}")
    config = files.read_json(path)
    for key, (kind, choices) in Parser.flags.items():
        value = config.get(key)
        if value is None and key not in ("task", "method", "proxy", "allocator", "model"):
            continue
        if choices is not None and value not in choices:
            raise UsageError(f"{path}: {key} {value!r} is not one of {', '.join(choices)}; has the file been edited, or is it one of your own, and wants the script that registers it?")
        try:
            fits = key == "budget" or kind(",".join(value) or "none" if isinstance(value, list) else str(value)) == value
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            fits = False
        if not fits:
            raise UsageError(f"{path}: {key} cannot be {value!r}: has the file been edited?")
    return config


# ------------------------------------------------------------------------------------------------ input and output

def peak_memory_mb(device):
    """Peak memory of the GPU, or of this process"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------------------ several processes

# torchrun starts them. All hold the same model and draw the same batches; each takes its share of every batch, and gradients,
# scores and results are added up, so that all make the same step and the same allocation.

def ranks():
    """-> (rank of this process, how many there are); (0, 1) without torchrun"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensors):
    """Sum every tensor over the processes, in place, in one flat all-reduce"""
    if ranks()[1] > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))


def average_scores(device, scores):
    """{name: score or list of scores} -> their means over the processes: bit for bit the same everywhere"""
    tensors = {name: torch.tensor(score, dtype=torch.double, device=device) for name, score in scores.items()}
    add_up([*tensors.values()])
    return {name: (tensor / ranks()[1]).tolist() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------ the run

@contextlib.contextmanager
def refusing():
    """What is wrong with the input in here is the user's to mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None


@refusing()
def start(args):
    """The device, and under torchrun the group of processes -> torch.device. Raises UsageError."""
    local, world = os.environ.get("LOCAL_RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        device = torch.device(device.type, int(local)) if device.type == "cuda" and world > 1 else device
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # nccl's collectives take the current one
    if world > 1 and not dist.is_initialized():  # a first download may take hours
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=12))
    return device


def read_task(args):
    """-> Task with no more training examples than --train-limit, and those of --holdout in place of dev"""
    task = data.load_task(args.task, args.data_dir)
    if args.train_limit:
        chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:args.train_limit].sort().values
        task.train = [task.train[i] for i in chosen.tolist()]
    if args.holdout:
        order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1)).tolist()
        if len(order) < 2:
            raise UsageError(f"--holdout {args.holdout} of {len(order)} training example(s) leaves nothing to train on")
        n = max(1, min(len(order) - 1, round(args.holdout * len(order))))
        task.dev, task.train = ([task.train[i] for i in sorted(part)] for part in (order[:n], order[n:]))
    return task


def prepare(args, device, log):
    """Everything that can fail on bad input: data, model, adapters, budget. Fills in the defaults in args -> task, tokenizer, model, adapters"""
    built_in = args.model == "built-in"
    if built_in and args.task in data.GLUE:
        raise UsageError(f"task {args.task} needs --model, a Hugging Face folder or id: the built-in encoder knows only its own language")
    args.data_dir = args.data_dir and os.path.abspath(args.data_dir)
    task = read_task(args)
    if built_in:
        adapt(args, encoders.Encoder(encoders.built_in_config()))  # a rehearsal: bad flags show before a minute of pre-training
    args.checkpoint = checkpoint_folder(args, log)
    encoder, tokenizer = encoders.load_pretrained(args.checkpoint, log), data.load_tokenizer(args.checkpoint)
    if max(tokenizer.vocab.values()) >= encoder.config.vocab_size:
        raise UsageError(f"{args.model}: the tokenizer has ids up to {max(tokenizer.vocab.values())}, the encoder only {encoder.config.vocab_size} words")
    args.fingerprint = same_checkpoint(args, encoder)
    model = encoders.Classifier(encoder, task.num_labels, args.pooling, generator(args.seed, "head"))
    adapters, args.budget = adapt(args, encoder)
    if args.method == "full" and args.precision == "bfloat16":
        raise UsageError("--precision bfloat16 is of frozen weights, and --method full has none")
    args.precision = args.precision or ("float32" if args.method == "full" else fast_precision(device))
    encoder.lower(PRECISIONS[args.precision])
    model.to(device)
    if args.merge or args.export_peft:
        files.check_export(args, args.method in ("dynamic", "static") and args.shortcuts)
    reads = heterolora.PROXIES[args.proxy].reads
    if args.probe == "inline" and not reads:
        able = ", ".join(name for name, proxy in heterolora.PROXIES.items() if proxy.reads)
        raise UsageError(f"--probe inline: {args.proxy} needs passes of its own; use --probe separate, or one of {able}")
    args.probe = args.probe or ("inline" if reads else "separate")
    if args.warmup_rank > args.rank:
        raise UsageError(f"--warmup-rank {args.warmup_rank}: it must be from 1 to --rank, {args.rank}")
    args.max_length = min(args.max_length, encoder.max_length)
    args.epochs = args.epochs or EPOCHS.get(args.task, 4)
    args.batch_size = args.batch_size or (32 if built_in else 16)
    args.lr = args.lr or ((3e-4 if built_in else 5e-5) if args.method == "full" else 2e-3 if built_in else 1e-3)
    return task, tokenizer, model, adapters


def fast_precision(device):
    """The precision in which the device multiplies matrices fastest, by what it says of itself"""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def checkpoint_folder(args, log):
    """That of the run which args come from if it is still there, else that of --model -> absolute path"""
    if args.checkpoint and os.path.isdir(args.checkpoint):
        return args.checkpoint
    return os.path.abspath(encoders.built_in_folder(log) if args.model == "built-in" else encoders.find_pretrained(args.model))


def same_checkpoint(args, encoder):
    """A checksum of the frozen weights, which must be that of the run that args come from, if they come from one. Raises UsageError."""
    checksum = 0
    for tensor in encoder.state_dict().values():
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    if args.fingerprint not in (None, checksum):
        raise UsageError(f"{args.checkpoint} has other weights than the checkpoint that the run was trained on: give that one with --model")
    return checksum


def parse_budget(text, largest):
    """"25%" or "0.25": that share of `largest` parameters; a whole number over 1: that many -> int. Raises ValueError."""
    advice = f"give a share such as 25% or 0.25, or from 2 to {largest:,} parameters (all there are)"
    try:
        number = float(str(text).rstrip().removesuffix("%").replace(",", ""))
    except ValueError:
        raise ValueError(f"budget {text!r} is not a number: {advice}") from None
    share = number / 100 if str(text).rstrip().endswith("%") else number if number <= 1 else None
    if not 0 <= number < math.inf or (share or 0) > 1 or number > largest and share is None or share is None and number % 1:
        raise ValueError(f"budget {text!r} is out of range: {advice}")
    return int(number) if share is None else math.floor(share * largest + 1e-6)


def adapt(args, encoder):
    """Put the adapters that the method asks for into the encoder -> {name: LoRA} and the budget in parameters, {} and None without"""
    if args.method in ("head", "full"):
        encoder.requires_grad_(args.method == "full")
        return {}, None
    targets, shortcuts = (every if chosen == ["all"] else chosen
                          for chosen, every in ((args.targets, heterolora.TARGETS), (args.shortcuts, heterolora.SHORTCUTS)))
    adapters = heterolora.inject(encoder, targets, shortcuts, args.rank, args.alpha, args.shortcut_alpha, args.seed)
    if not adapters:
        raise UsageError("the search space is empty: give --targets or --shortcuts")
    if isinstance(args.budget, int):  # from the config of a run, or the same for all that are compared, of which one may have less to spend it on
        return adapters, min(args.budget, heterolora.size(adapters))
    return adapters, parse_budget(args.budget or ("100%" if args.method == "lora" else "25%"), heterolora.size(adapters))


def loss_fn(model, batch):
    """Mean cross-entropy of a batch (inputs, labels)"""
    return F.cross_entropy(model(*batch[0]), batch[1])


@torch.inference_mode()
def evaluate(model, split, metric, batch_size=32):
    """All examples of a split, without dropout -> {metric: value, ..., "loss"}

    Batches of 64 would set the memory peak of a whole MRPC run (760 MB against 706 on a CPU) and are no faster."""
    model.eval()
    rank, world = ranks()
    predictions, total = torch.zeros(len(split.labels), dtype=torch.long, device=split.device), torch.zeros((), dtype=torch.double, device=split.device)
    for indices in data.batches(split.lengths, batch_size)[rank::world]:
        inputs, labels = split[indices]
        logits = model(*inputs)
        total += F.cross_entropy(logits, labels, reduction="sum")
        predictions[indices] = logits.argmax(1)
    for tensor in (predictions, total):
        add_up([tensor])
    model.train()
    return metric(predictions.tolist(), split.labels) | {"loss": total.item() / len(split.labels)}


def generator(seed, purpose):
    """Each purpose has its own random numbers, so that more of one does not change another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


def seed_dropout(args):
    """Each process draws its own."""
    torch.manual_seed(args.seed + 1_000_003 * ranks()[0])


def make_optimizer(args, model, total):
    """AdamW over what is trainable: encoder (adapters, or all of it) at --lr, head at --head-lr; decay on matrices only"""
    groups = []
    for part, lr in ((model.encoder, args.lr), (model.head, args.head_lr)):
        for matrices in (True, False):
            params = [p for p in part.parameters() if p.requires_grad and (p.dim() > 1) == matrices]
            groups += [{"params": params, "lr": lr, "weight_decay": args.weight_decay * matrices}] if params else []
    warm = math.ceil(args.lr_warmup * total)

    def factor(step):
        rise, fall = (step + 1) / max(warm, 1), (total - step) / max(total - warm, 1)
        return min(1, rise) if args.schedule == "constant" else min(1, rise, fall)
    optimizer = torch.optim.AdamW(groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def begin(args):
    """Refuse bad input, then say and save what will be run -> log, device and what `prepare` gives. Raises UsageError."""
    log = None
    try:
        device = start(args)
        if args.out and not args.resume and ranks()[0] == 0:
            taken = [name for name in ("config.json", "log.jsonl", "history.jsonl", "state.pt", "adapters.pt", "result.json") if os.path.exists(path := os.path.join(args.out, name)) and os.path.getsize(path)]
            if taken:
                raise UsageError(f"--out {args.out} holds a run already ({taken[0]}): give a new folder, or go on with it: {resuming(args)}")
        log = files.Log(args.out, silent=ranks()[0] > 0)
        with first_process_first(), refusing():
            prepared = prepare(args, device, log)
    except files.InputError:
        if log:
            log.abandon()
        raise
    config = {key: value for key, value in vars(args).items() if key not in ("command", "torch", "svg", "compare", "seeds", "results", "benchmark", *WITH)}
    log(f"command {args.command}")
    log("config  " + " ".join(f"{key}={','.join(v) if isinstance(v, list) else v}" for key, v in config.items() if v is not None))
    if log.out and not args.resume:
        files.write(os.path.join(args.out, "config.json"), json.dumps({"command": args.command, **config, "torch": torch.__version__}, indent=1))
    return log, device, *prepared


@contextlib.contextmanager
def first_process_first():
    """What is downloaded or pre-trained is so by one process; the others wait, and find it."""
    if ranks()[0]:
        try:
            dist.barrier()
        except RuntimeError:
            raise UsageError("the first process has stopped") from None
    yield
    if not ranks()[0] and ranks()[1] > 1:
        dist.barrier()


def resuming(args):
    """The command that goes on with a run"""
    start = f"torchrun --nproc-per-node={ranks()[1]}" if ranks()[1] > 1 else "python"
    return f"{start} {os.path.basename(sys.argv[0]) or 'train.py'} --resume {shlex.quote(args.out)}"


def what_is_kept(args):
    """What to say of a run that was stopped"""
    if args.eval or args.predict or args.show:
        return ""
    if args.compare:
        return f"; what has ended is in {args.results}, and the same command goes on from there"
    if not args.out:
        return "; nothing was kept, for want of --out"
    if os.path.isfile(os.path.join(args.out, "result.json")):
        return f"; the run itself is whole; export it with: --eval {shlex.quote(args.out)}"
    return f"; go on with: {resuming(args)}" if os.path.isfile(os.path.join(args.out, "config.json")) else "; nothing was begun"


def optimise(args, model, parts, optimizer, schedule, recording=None):
    """One training step on the parts of a batch -> its mean loss (float). Raises FloatingPointError if it is not finite."""
    optimizer.zero_grad()
    losses = []
    with recording or contextlib.nullcontext():
        for share, batch in parts:
            if recording:
                recording.share = share or 1.0
            loss = loss_fn(model, batch) * share
            loss.backward()
            losses.append(loss.detach())
    loss, params = sum(losses), [p for group in optimizer.param_groups for p in group["params"]]
    add_up([loss, *(p.grad for p in params if p.grad is not None)])
    torch.nn.utils.clip_grad_norm_(params, args.clip)
    optimizer.step()
    schedule.step()
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value}")
    return value


def warm_up_head(args, model, batches):
    """Train the head alone, over and over on these batches, whose features the encoder computes once"""
    model.eval()
    with torch.no_grad():
        features = [(model.pool(model.encoder(*inputs), inputs[1]), labels) for inputs, labels in batches]  # (B, D), (B,)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=args.head_lr)
    for step in range(args.head_warmup):
        x, labels = features[step % len(features)]
        optimizer.zero_grad()
        F.cross_entropy(model.head(x), labels).backward()
        optimizer.step()


def first_allocation(args, log, model, train_set, search):
    """Warm up, score, put every value back to its start (unless --warmup-values keep), allocate -> seconds

    Gradients through a random head point nowhere in particular, so the head trains first (--head-warmup), alone or together
    with every candidate at --warmup-rank (--warmup-steps).
    """
    start, draws = time.perf_counter(), generator(args.seed, "warm-up")
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    heterolora.set_ranks(search.adapters, dict.fromkeys(search.adapters, args.warmup_rank if args.warmup_steps else 0))
    if args.warmup_steps:
        search.ever = dict.fromkeys(search.adapters, args.warmup_rank)
        model.train()
        seed_dropout(args)
        optimizer, schedule = make_optimizer(args, model, args.warmup_steps)
        losses = [optimise(args, model, train_set.parts(batch, args.accumulate, *ranks()), optimizer, schedule) for batch in train_set.sample(args.warmup_steps, args.batch_size, draws)]
        log(f"warm-up {args.warmup_steps} steps, {heterolora.spent(search.adapters):,} params on | loss {sum(losses[-20:]) / len(losses[-20:]):.4f} | {time.perf_counter() - start:.1f} s")
    elif args.head_warmup:
        warm_up_head(args, model, [train_set[batch] for batch in train_set.sample(min(args.head_warmup, 32), args.batch_size, draws)])
    model.zero_grad()
    entry = search.reallocate([train_set[batch] for batch in train_set.sample(args.probe_batches, args.batch_size, generator(args.seed, "first probing"))])
    if args.warmup_values == "undo":
        model.load_state_dict(values, strict=False)
    log_reallocation(log, entry, args.budget)
    return time.perf_counter() - start


class Run:
    """What changes while a run trains. `save` writes all of it, and `load` puts it back, bit for bit."""
    plain = ("step", "queue", "loss", "samples", "evaluations", "first_seconds", "search_seconds", "seconds", "tokens")

    def __init__(self, args, log, device, model, adapters, total):
        self.args, self.log, self.device, self.model, self.adapters, self.total = args, log, device, model, adapters, total
        self.path = os.path.join(args.out or "", "state.pt")
        self.optimizer, self.schedule = make_optimizer(args, model, total)
        self.data_order, self.probing = generator(args.seed, "data order"), generator(args.seed, "probing")
        self.search = self.recording = None
        self.step, self.queue, self.loss, self.samples, self.evaluations = 0, [], 0.0, 0, []
        self.first_seconds = self.search_seconds = 0.0
        self.seconds, self.tokens = {False: 0.0, True: 0.0}, {False: 0, True: 0}  # of plain steps, and of steps that are recorded
        if adapters and args.method != "lora":
            self.search = heterolora.HeteroLoRA(model, adapters, args.budget, loss_fn, args.proxy, args.allocator, args.pool, args.seed,
                                                args.granularity, args.order, args.scale)
            if ranks()[1] > 1:
                self.search.agree = lambda scores: average_scores(device, scores)

    def split(self):
        """-> (training seconds, seconds that recording added): the difference a token between recorded steps and plain ones"""
        total = sum(self.seconds.values())
        extra = self.seconds[True] - self.tokens[True] * self.seconds[False] / self.tokens[False] if all(self.tokens.values()) else 0.0
        return total - extra, extra

    def save(self, data_checksum):
        """Write OUT/state.pt, if there is an OUT; all processes must call it. Raises OSError."""
        if not self.args.out:
            return
        search, recording = self.search, self.recording
        own = {"dropout": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state(),
               "recording": recording and {"batches": recording.batches, "sums": {key: value.cpu() for key, value in recording.sums.items()}}}
        each = [own]  # what differs from process to process
        if ranks()[1] > 1:
            each = [None] * ranks()[1]
            dist.all_gather_object(each, own)
        if self.log.out:
            state = {"plain": {key: getattr(self, key) for key in self.plain}, "each": each, "data": data_checksum, "logs": self.log.sizes(),
                     "trained": {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}, "ranks": {name: lora.rank for name, lora in self.adapters.items()},
                     "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "generators": [self.data_order.get_state(), self.probing.get_state()],
                     "search": search and {"history": search.history, "ever": search.ever, "generator": search.generator.get_state()}}
            files.write(self.path, lambda file: torch.save(state, file))

    def load(self, data_checksum):
        """Put back what `save` wrote -> whether there was anything. Raises InputError."""
        saved = os.path.isfile(self.path)
        state = files.read_pickle(self.path, lambda state: {"plain", "each", "data", "logs"} <= set(state), "the state of a run") if saved else {}
        if saved and state["data"] != data_checksum:
            raise UsageError(f"{self.args.task}: the training data are not those that the run began with")
        if saved and len(state["each"]) != ranks()[1]:
            raise UsageError(f"the run was saved by {len(state['each'])} processes, and now there are {ranks()[1]}: torchrun --nproc-per-node={len(state['each'])} train.py --resume {self.args.out}")
        if self.log.out:
            self.log.rewind(state.get("logs", {}))
        if saved:
            vars(self).update(state["plain"])
            self.model.load_state_dict(state["trained"], strict=False)
            heterolora.set_ranks(self.adapters, state["ranks"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            for generator, value in zip((self.data_order, self.probing), state["generators"]):
                generator.set_state(value)
            if self.search:
                self.search.history, self.search.ever = state["search"]["history"], state["search"]["ever"]
                self.search.generator.set_state(state["search"]["generator"])
            own = state["each"][ranks()[0]]
            if own["recording"]:
                self.recording = heterolora.Recording(self.adapters, heterolora.PROXIES[self.args.proxy].reads)
                self.recording.batches, self.recording.sums = own["recording"]["batches"], {key: t.to(self.device) for key, t in own["recording"]["sums"].items()}
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(own["dropout"], self.device)
            else:
                torch.set_rng_state(own["dropout"])
        return saved


def train(args):
    """One whole run of parse_args(...) -> result, the dict that result.json holds

    Raises UsageError for bad input before any training, FloatingPointError if the loss stops being finite, Interrupted after Ctrl-C,
    OSError if OUT cannot be written.
    """
    if args.resume and os.path.isfile(done := os.path.join(args.resume, "result.json")):
        print(f"{args.resume} is finished: {done}")
        return files.read_json(done)
    log, device, task, tokenizer, model, adapters = begin(args)
    train_set, dev_set = (data.Batches(split, tokenizer, args.max_length, device) for split in (task.train, task.dev))
    steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
    total = min(math.ceil(args.epochs * steps_per_epoch), args.max_steps or math.inf)
    realloc_every = max(1, round(args.realloc_every * steps_per_epoch))
    encoder_size = sum(p.numel() for name, p in model.encoder.named_parameters() if ".lora." not in name)
    log(f"model   encoder {encoder_size:,} | head {count(model.head):,} | search space {heterolora.size(adapters):,} in {len(adapters)} modules")
    log(f"data    {args.task}: {len(train_set.labels):,} train, {len(dev_set.labels):,} dev | {total} steps, {steps_per_epoch} an epoch")
    advice = f"try a lower --lr (now {args.lr:g}) or --head-lr (now {args.head_lr:g})"

    run, checksum = Run(args, log, device, model, adapters, total), train_set.checksum()
    search = run.search
    resumed = args.resume and run.load(checksum)
    if resumed:
        log(f"resume  {args.out} after step {run.step}")
    elif search:
        log.save("history.jsonl", {"modules": {name: {"price": lora.price, "max_rank": lora.max_rank, "shortcut": lora.shortcut} for name, lora in adapters.items()}})
        try:
            run.first_seconds = run.search_seconds = first_allocation(args, log, model, train_set, search)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, before the first step: {advice}") from None
    elif adapters:  # uniform: the same rank for every target; shortcuts count in the search space, and stay off
        costs = {name: [lora.price] * lora.max_rank for name, lora in adapters.items() if not lora.shortcut}
        rule = args.allocator if args.allocator.endswith("-layers") else "uniform"  # the others want scores
        heterolora.set_ranks(adapters, heterolora.ALLOCATORS[rule](dict.fromkeys(costs, 0.0), costs, args.budget, generator(args.seed, "ties")))
        log(f"{rule} {heterolora.spent(adapters):,}/{args.budget:,} params")
    if adapters:
        log(grid(adapters))
        if not any(lora.rank for lora in adapters.values()):
            log(f"note    nothing is on: the cheapest choice costs more than the budget of {args.budget:,}; only the head trains")

    model.train()
    if not resumed:
        seed_dropout(args)
        run.save(checksum)
    with files.Patience() as asked:
        for step in range(run.step + 1, total + 1):
            try:
                ahead = realloc_every - (step - 1) % realloc_every  # steps to the next reallocation, this one included
                if args.method == "dynamic" and step > 1 and ahead == realloc_every:
                    begun = time.perf_counter()
                    if run.recording:
                        add_up([*run.recording.sums.values()])
                    probes = run.recording or [train_set[batch] for batch in train_set.sample(args.probe_batches, args.batch_size, run.probing)]
                    entry, run.recording = search.reallocate(probes, step - 1), None
                    run.search_seconds += time.perf_counter() - begun
                    log_reallocation(log, entry, args.budget)
                record = args.method == "dynamic" and args.probe == "inline" and ahead <= args.probe_batches and step + ahead <= total
                if record:
                    run.recording = run.recording or heterolora.Recording(adapters, heterolora.PROXIES[args.proxy].reads)

                begun = time.perf_counter()
                run.queue = run.queue or data.batches(train_set.lengths, args.batch_size, run.data_order)
                indices = run.queue.pop(0)
                parts = train_set.parts(indices, args.accumulate, *ranks())
                run.loss += optimise(args, model, parts, run.optimizer, run.schedule, run.recording if record else None)
                run.step, run.samples = step, run.samples + len(indices)
                run.seconds[record] += time.perf_counter() - begun
                run.tokens[record] += sum(inputs[0].numel() for _, (inputs, _) in parts)

                if step % args.log_every == 0 or step == total:
                    mean, run.loss = run.loss / ((step - 1) % args.log_every + 1), 0.0
                    seconds = run.split()[0]
                    log(f"step {step:6d}/{total} | loss {mean:.4f} | {1000 * seconds / step:.1f} ms/step | {run.samples / seconds:.1f} samples/s",
                        kind="step", step=step, loss=mean, lr=run.schedule.get_last_lr()[0], train_seconds=seconds)
                if step % steps_per_epoch == 0 or step == total:
                    run.evaluations.append(evaluate(model, dev_set, task.metric))
                    if not math.isfinite(run.evaluations[-1]["loss"]):
                        raise FloatingPointError(f"the loss on the dev set is {run.evaluations[-1]['loss']}")
                    log(f"eval {step:6d}/{total} | {in_words(run.evaluations[-1])}", kind="eval", step=step, **run.evaluations[-1])
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {step}: {advice}") from None
            stop = torch.tensor(float(len(asked)), device=device)
            add_up([stop])  # all processes stop, or none
            if stop or step % steps_per_epoch == 0 or step % args.save_every == 0:
                run.save(checksum)
            if stop and step < total:
                raise Interrupted(f"after step {step} of {total}")

    train_seconds, extra = run.split()
    run.search_seconds += extra
    result = summarise(args, log, model, adapters, search, run.evaluations) | {
        "steps": total, "train_seconds": train_seconds, "search_seconds": run.search_seconds, "first_allocation_seconds": run.first_seconds, "samples_per_second": run.samples / train_seconds,
        "peak_memory_mb": peak_memory_mb(device), "threads": torch.get_num_threads(), "processes": ranks()[1]}
    log(f"time    training {train_seconds:.1f} s | search {run.search_seconds:.1f} s ({run.first_seconds:.1f} before training) | {result['samples_per_second']:.1f} samples/s | "
        f"peak memory {result['peak_memory_mb'] or 0:.0f} MB")
    if log.out:
        files.write(os.path.join(args.out, "adapters.pt"), lambda file: torch.save(trained_state(model, adapters, task), file))
        files.write(os.path.join(args.out, "result.json"), json.dumps(result, indent=1))
        with contextlib.suppress(FileNotFoundError):
            os.remove(run.path)
    if not log.silent:
        model.labels = task.labels
        export(args, model, adapters, log)
    return result


def summarise(args, log, model, adapters, search, evaluations):
    """What was reached with how many parameters, logged and -> dict. The last evaluation counts; the best is named beside it."""
    metric = next(iter(evaluations[-1]))
    active = heterolora.spent(adapters) if adapters else count(model.encoder)
    result = {
        "task": args.task, "method": args.method, "proxy": args.proxy if search else None, "seed": args.seed, "metric": metric,
        "last": evaluations[-1][metric], "best": max(e[metric] for e in evaluations), "dev": evaluations[-1],
        "params_budget": args.budget, "params_active": active, "params_ever_trained": heterolora.spent(adapters, search.ever) if search else active,
        "params_stored": active, "params_search_space": heterolora.size(adapters), "params_head": count(model.head),
        "ranks": {name: lora.rank for name, lora in adapters.items()}}
    if adapters:
        log(grid(adapters))
    log(f"result  {args.task} {args.method} seed {args.seed} | {in_words(evaluations[-1])} | best {metric} {result['best']:.4f}")
    log(f"params  active {active:,} | ever trained {result['params_ever_trained']:,} | stored {active:,} | head {result['params_head']:,}")
    return result


def count(module):
    """Trainable parameters of a module"""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def in_words(values):
    """{"accuracy": 0.5, ...} -> "accuracy 0.5000 | ..." """
    return " | ".join(f"{name} {value:.4f}" for name, value in values.items())


def log_reallocation(log, entry, budget):
    """One line for an entry of HeteroLoRA.history: how much is on, and after the first what came and what went; all of it in OUT/history.jsonl"""
    changes = [sign + name.removeprefix("layers.") for sign, names in (("+", entry["on"]), ("-", entry["off"])) for name in names]
    log(f"alloc @ step {entry['step']} | on {sum(map(bool, entry['ranks'].values()))}/{len(entry['ranks'])} modules | {entry['parameters']:,}/{budget:,} params"
        + ("" if entry["jaccard"] is None else f" | jaccard {entry['jaccard']:.2f} | {' '.join(changes) or ('other ranks' if entry['changed'] else 'no change')}"))
    log.save("history.jsonl", entry)


def trained_state(model, adapters, task):
    """What a run has learned, and no more: the ranks, the active rows of A and columns of B, the head; for full the encoder. Beside it what
    the classes are called, and how many texts an example has."""
    on = {name: lora for name, lora in adapters.items() if lora.rank}
    state = {"ranks": {name: lora.rank for name, lora in adapters.items()}, "head": model.head.state_dict(),
             "adapters": {name: {"A": lora.A[:lora.rank].detach().clone(), "B": lora.B[:, :lora.rank].detach().clone(), "scale": lora.scale} for name, lora in on.items()},
             "labels": [*task.labels], "texts": 1 if task.dev[0][1] is None else 2}
    if any(p.requires_grad for p in model.encoder.parameters()) and not adapters:
        state["encoder"] = model.encoder.state_dict()
    return state


# ------------------------------------------------------------------------------------------------ using a run

def load_run(folder, model=None):
    """A run that has ended, from its folder -> Classifier in eval mode, with .tokenizer, .labels (what the classes are called), .texts (how
    many an example has) and .adapters. model: its checkpoint, if that has moved. Raises InputError."""
    return rebuild(parse_args(["--eval", os.fspath(folder), *(["--model", os.fspath(model)] if model else [])]), torch.device("cpu"))


def rebuild(args, device):
    """The Classifier of the run that args come from, as load_run gives it"""
    folder = args.predict[0] if args.predict else args.eval
    path = os.path.join(folder, "adapters.pt")
    if not os.path.isfile(path):
        raise UsageError(f"{folder} has no adapters.pt: the run has not ended; go on with it: --resume {folder}")
    state = files.read_pickle(path, lambda state: {"ranks", "head", "adapters", "labels", "texts"} <= set(state), "what a run has learned")
    args.checkpoint = checkpoint_folder(args, print)
    encoder = encoders.load_pretrained(args.checkpoint, lambda line: None)
    if "encoder" not in state:
        same_checkpoint(args, encoder)
    model = encoders.Classifier(encoder, len(state["labels"]), args.pooling)
    try:
        encoder.load_state_dict(state.get("encoder", {}), strict="encoder" in state)
        adapters, _ = adapt(args, encoder)
        heterolora.set_ranks(adapters, state["ranks"])
        with torch.no_grad():
            for name, learned in state["adapters"].items():
                adapters[name].A[:state["ranks"][name]] = learned["A"]
                adapters[name].B[:, :state["ranks"][name]] = learned["B"]
        model.head.load_state_dict(state["head"])
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"{path} does not fit the config.json beside it: {str(error).splitlines()[0]}") from None
    encoder.lower(PRECISIONS[args.precision])
    model.tokenizer, model.labels, model.texts, model.adapters = data.load_tokenizer(args.checkpoint), state["labels"], state["texts"], adapters
    return model.to(device).eval()


def evaluate_run(args):
    """--eval, and with it --merge and --export-peft -> {metric: value, ..., "loss"}, of all dev examples"""
    device = start(args)
    model = rebuild(args, device)
    files.check_export(args, [name for name, lora in model.adapters.items() if lora.shortcut and lora.rank])
    task = read_task(args)
    texts = 1 if task.dev[0][1] is None else 2
    if ([*task.labels], texts) != (model.labels, model.texts):
        raise UsageError(f"{args.eval} sorts examples of {model.texts} text(s) into {', '.join(model.labels)}, and {args.task} has {texts} and {', '.join(task.labels)}: give a task of the same form")
    split = data.Batches(task.dev, model.tokenizer, args.max_length, device)
    values = evaluate(model, split, task.metric)
    if ranks()[0]:
        return values
    print(f"eval    {args.task} dev, {len(split.labels):,} examples | " + " | ".join(f"{name} {value!r}" for name, value in values.items()))
    export(args, model.eval(), model.adapters, print)
    return values


def export(args, model, adapters, log):
    """--merge and --export-peft. What is merged is the checkpoint as it is, whatever the precision of the run."""
    if args.merge and args.precision != "float32":
        whole = encoders.load_pretrained(args.checkpoint, lambda line: None).state_dict()
        for name, parameter in model.encoder.named_parameters():
            parameter.data = parameter.data if parameter.requires_grad else whole[name.replace(".host.", ".")].to(parameter.device)
    files.export(args, model, adapters, log)


def predict_texts(args):
    """--predict: print label and probability, of the texts given or of every line of standard input -> [(label, probability), ...]"""
    folder, *texts = args.predict
    device, found = start(args), []
    model = rebuild(args, device)
    for texts in [texts] if texts else (line.rstrip("\r\n").split("\t") for line in sys.stdin):
        if len(texts) != model.texts:
            raise UsageError(f"--predict {folder} wants {('one text', 'two texts (a line: with a tab between them)')[model.texts - 1]}, and {len(texts)} came")
        inputs = data.pad([model.tokenizer.encode(texts[0], *texts[1:], max_length=args.max_length)], model.tokenizer.pad_id)
        with torch.inference_mode():
            probability, i = model(*(x.to(device) for x in inputs)).softmax(1)[0].max(0)
        found.append((model.labels[i], probability.item()))
        print(f"label {model.labels[i]} | probability {probability:.4f}", flush=True)
    return found


# ------------------------------------------------------------------------------------------------ evidence

TUNED_ON = 0.2, 2  # for a list of --lr: share of the training set that is held out, and number of seeds
NO_MATTER = ("model", "data_dir", "device", "log_every", "save_every", "out", "svg", "compare", "seeds", "results", "benchmark", "merge", "export_peft", *WITH)  # to a result
SEARCH = ("proxy", "granularity", "order", "scale", "pool", "realloc_every", "probe", "probe_batches", "head_warmup", "warmup_steps", "warmup_rank", "warmup_values")
ADAPTERS = (*SEARCH, "budget", "targets", "shortcuts", "rank", "alpha", "shortcut_alpha", "allocator")
UNUSED = {"static": ("realloc_every", "probe"), "lora": SEARCH, "full": ADAPTERS, "head": (*ADAPTERS, "lr")}  # by a method: its runs are the same whatever these say
KEPT = ("metric", "last", "best", "params_budget", "params_active", "params_ever_trained", "search_seconds", "samples_per_second")  # of a result


def contender(args, spec):
    """METHOD[:PROXY][:VALUE or :FLAG=VALUE]... of --compare -> Namespace of that method, otherwise with the flags of args. Raises UsageError."""
    method, *options = spec.split(":")
    argv = ["--method", "static", "--proxy", "constant"] if method == "random" else ["--method", method]
    for option in options:
        flag, sign, value = option.partition("=")
        if not sign:
            flags = ("proxy", "allocator", "granularity", "order", "scale", "pool", "probe", "precision", "pooling")
            flag, value = next((flag for flag in flags if option in Parser.flags[flag][1]), None), option
        if flag is None or flag.replace("-", "_") not in set(Parser.flags) - {*NO_MATTER, "task", "seed", "method", "holdout", "train_limit"}:
            raise UsageError(f"--compare {spec}: {option} is no proxy or allocator, and not FLAG=VALUE with a flag of python train.py --help in which runs of one comparison may differ")
        argv += [f"--{flag.replace('_', '-')}", value]
    return parse_args(argv, argparse.Namespace(**{**vars(args), "compare": None, "seeds": None, "lr": None, "budget": None}))


def read_results(path):
    """The file of --results -> {flags as JSON: result}. A line that is none, torn by a crash, is left out."""
    done = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                    assert "metric" in record["result"] or "failed" in record["result"]
                    done[json.dumps(record["key"], sort_keys=True)] = record["result"]
                except (ValueError, KeyError, TypeError, AssertionError):
                    warnings.warn(f"{path}, line {number}: not a result; left out")
    return done


def compare(args):
    """--compare: train every method with every seed, but what --results has already, and print a Markdown table -> {method: [result, ...]}.

    All have the same checkpoint, budget in parameters, order of the data for a seed, and schedule. With a list of --lr each method that
    does not set its own has the one that is best on a held-out part of the training set.
    """
    if args.out or args.merge or args.export_peft or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("--compare keeps its runs in --results, in one process: it takes no --out, --merge or --export-peft, and no torchrun")
    seeds, grid_of_lr, device = [*dict.fromkeys(args.seeds or [0, 1, 2, 3, 4])], args.lr or [None], start(args)
    if args.holdout and len(grid_of_lr) > 1:
        raise UsageError("--holdout with several --lr: the learning rate would be chosen on what is reported; give one of them")
    whole = contender(args, "dynamic" if args.targets or args.shortcuts else "head")
    whole.budget = args.budget or "25%"
    chosen = {spec: contender(args, spec) for spec in args.compare}
    with refusing():
        task, tokenizer, model, _ = prepare(whole, device, print)
        whole.identity = zlib.crc32(repr((task.train, task.dev, model.config, sorted(tokenizer.vocab.items()))).encode())  # of data and checkpoint, beside its weights
        with open(args.results, "ab+") as file:  # it must be possible to write there, and on a line of its own
            file.seek(max(file.tell() - 1, 0))
            file.write(b"\n" * (file.read() not in (b"", b"\n")))
        for one in chosen.values():
            one.own_lr = one.lr is not None or one.method == "head"
            one.lr = one.lr or grid_of_lr[0]
            one.budget = one.budget or whole.budget
            prepare(one, device, lambda line: None)
    done = read_results(args.results)

    def run(spec, seed, lr, **more):
        flags = argparse.Namespace(**{**vars(chosen[spec]), "seed": seed, "lr": lr, **more})
        key = {name: getattr(flags, name) for name in ("fingerprint", *Parser.flags) if name not in (*NO_MATTER, *UNUSED.get(flags.method, ()))}
        key = json.dumps({**key, "identity": whole.identity}, sort_keys=True)
        if key not in done:  # another process may be at the same comparison
            done.update(read_results(args.results))
        if key not in done:
            begun = time.perf_counter()
            try:
                with contextlib.redirect_stdout(None):
                    result = train(flags)
                result = {name: result[name] for name in KEPT} | {"ranks": {name: rank for name, rank in result["ranks"].items() if rank}}
            except FloatingPointError as error:
                result = {"failed": str(error)}
            done[key] = result | {"seconds": time.perf_counter() - begun}
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": json.loads(key), "result": done[key], "threads": torch.get_num_threads(), "torch": torch.__version__, "date": datetime.date.today().isoformat()}) + "\n")
            told = done[key].get("failed") or f"{result['metric']} {result['last']:.4f}"
            print(f"run     {spec} seed {seed} lr {lr:g}{' held-out' * bool(more)} | {told} | {done[key]['seconds']:.1f} s", flush=True)
        return done[key]
    for spec, one in chosen.items():
        if len(grid_of_lr) > 1 and not one.own_lr:
            share, n = TUNED_ON
            scores = {lr: [run(spec, seed, lr, holdout=share).get("last", -math.inf) for seed in seeds[:n]] for lr in grid_of_lr}
            one.lr = max(scores, key=lambda lr: sum(scores[lr]))
    results = {spec: [] for spec in chosen}
    for seed in seeds:
        for spec, one in chosen.items():
            results[spec].append(run(spec, seed, one.lr))
    print(files.comparison({spec: (chosen[spec].lr, runs) for spec, runs in results.items()}))
    return results


def benchmark(args):
    """--benchmark: print how fast and how large a run with these flags is on this machine -> dict. Raises UsageError.

    In turns, on the same batches: training steps with every module on, with a quarter of them, and with a quarter while they are read off for
    the search. The peak is the rate of F.linear at the encoder's own shapes (which model.Linear can surpass); 4 * its parameters without embeddings are
    the operations that a token needs, forward and back.
    """
    begun, device = time.perf_counter(), start(args)
    if args.method in ("head", "full") or ranks()[1] > 1:
        raise UsageError("--benchmark wants adapters and one process: no --method head or full, no torchrun")
    with refusing():
        task, tokenizer, model, adapters = prepare(args, device, print)
    train_set = data.Batches(task.train, tokenizer, args.max_length, device)
    (optimizer, schedule), order = make_optimizer(args, model, 10**9), data.batches(train_set.lengths, args.batch_size, generator(args.seed, "data order"))
    search = heterolora.HeteroLoRA(model, adapters, args.budget, loss_fn, args.proxy, args.allocator, args.pool, args.seed, args.granularity, args.order, args.scale)
    allowed = [name for name, lora in adapters.items() if args.method != "lora" or not lora.shortcut]
    everything, quarter = ({name: adapters[name].max_rank for name in allowed[::n]} for n in (1, 4))
    reads = heterolora.PROXIES[args.proxy].reads
    seconds, tokens, samples = {"all on": 0.0, "25 % on": 0.0} | ({"recorded": 0.0} if reads else {}), 0, 0
    model.train()
    seed_dropout(args)
    optimise(args, model, train_set.parts(order[0]), optimizer, schedule)
    ready = time.perf_counter() - begun
    print(f"start   {ready:.1f} s from the imports to the end of the first step", flush=True)
    for i in range(-5, args.benchmark):  # the first five do not count
        for kind in seconds:
            heterolora.set_ranks(adapters, everything if kind == "all on" else quarter)
            recording = heterolora.Recording(adapters, reads) if kind == "recorded" else None
            begun = time.perf_counter()
            batch = train_set.parts(order[i % len(order)], args.accumulate)
            optimise(args, model, batch, optimizer, schedule, recording)
            seconds[kind] += (time.perf_counter() - begun) * (i >= 0)
        tokens += sum(inputs[0].numel() for _, (inputs, _) in batch) * (i >= 0)
        samples += len(order[i % len(order)]) * (i >= 0)
    memory, n = peak_memory_mb(device), args.benchmark
    linears = [m for m in model.encoder.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(max(1, tokens // n), m.in_features, device=device, dtype=m.weight.dtype) for m in linears]
    with torch.inference_mode():
        best = math.inf
        for _ in range(20):
            begun = time.perf_counter()
            outputs = [F.linear(x, m.weight, m.bias) for x, m in zip(inputs, linears)]
            outputs[-1].sum().item()  # a GPU has finished then
            best = min(best, time.perf_counter() - begun)
    rate = sum(2 * len(x) * m.weight.numel() for x, m in zip(inputs, linears)) / best
    operations = 4 * sum(p.numel() for name, p in model.encoder.layers.named_parameters() if ".lora." not in name)
    result = {"start_seconds": ready, "peak_memory_mb": memory, "threads": torch.get_num_threads(), "precision": args.precision, "linear_gflops": rate / 1e9}
    for kind, total in seconds.items():
        result[kind] = {"ms_per_step": 1000 * total / n, "samples_per_second": samples / total, "tokens_per_second": tokens / total, "share_of_peak": operations * tokens / total / rate}
        print(f"{kind:8}| {1000 * total / n:.1f} ms/step | {samples / total:.1f} samples/s | {tokens / total:,.0f} tokens/s | {operations * tokens / total / rate:.0%} of the peak")
    print(f"peak    {rate / 1e9:,.0f} GFLOP/s by F.linear in {args.precision} | {torch.get_num_threads()} threads | memory {memory or 0:.0f} MB")
    if reads:
        begun = time.perf_counter()
        search.reallocate(recording)
        interval, plain = max(1, round(args.realloc_every * len(order))), seconds["25 % on"] / n
        extra = time.perf_counter() - begun + min(args.probe_batches, interval) * (seconds["recorded"] / n - plain)
        result["search_share"] = extra / (interval * plain)
        print(f"search  {result['search_share']:.1%} of the training time, with {args.proxy} read off {args.probe_batches} of every {interval} steps")
    return result


def main(argv=None):
    """Run the command line -> exit status: 0, 1 for a fault during the run, 2 for bad input, 130 for Ctrl-C"""
    warnings.formatwarning = lambda message, *_: f"train.py: warning: {message}\n"
    args = None
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = parse_args(argv)
        if args.show:
            print(files.show(args.show))
            if args.svg:
                try:
                    files.write(args.svg, files.draw(args.show))
                except OSError as error:
                    raise UsageError(f"{args.svg} cannot be written: {error.strerror}") from None
        else:
            (evaluate_run if args.eval else predict_texts if args.predict else compare if args.compare else benchmark if args.benchmark else train)(args)
    except files.InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    except (OSError, Interrupted, KeyboardInterrupt) as error:
        if isinstance(error, OSError) or ranks()[0] == 0:
            print(f"train.py: stopped: {str(error) or 'interrupted'}{args and what_is_kept(args) or ''}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
