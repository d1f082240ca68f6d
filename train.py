"""Fine-tune an encoder under a parameter budget: HeteroLoRA (static or dynamic), uniform LoRA, head only, or everything.

    python train.py --budget 25%                                     # built-in task and encoder, no data needed
    python train.py --task mrpc --data-dir glue --model DIR          # GLUE and a Hugging Face BERT or RoBERTa folder

Read `train` top to bottom: it is the whole run. Every flag: python train.py --help, or the table in the README.
"""
import argparse
import contextlib
import html
import itertools
import json
import math
import os
import shlex
import sys
import time
import types
import warnings
import zlib

import torch
import torch.nn.functional as F

import data
import heterolora
import model as encoders

METHODS = ("dynamic", "static", "lora", "head", "full")
EPOCHS = {"mrpc": 5, "rte": 10, "cola": 5, "sst2": 1, "qnli": 1, "qqp": 1, "mnli": 1}  # small sets want more passes


class UsageError(ValueError):
    """Input that cannot work, found before any training: exit status 2."""


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error, and without "(default: None)" """

    def error(self, message):
        self.exit(2, f"train.py: error: {message} (python train.py --help lists every flag)\n")

    def add(self, title, *flags):
        """flags: (name, type, default, metavar or choices, help)"""
        group = self.add_argument_group(title)
        for name, kind, default, values, text in flags:
            values = {"metavar": values} if isinstance(values, str) else {"choices": list(values)}
            group.add_argument(name, type=kind, default=default, help=text + ("" if default is None else " (default: %(default)s)"), **values)


def number(kind, low, included=True, below=math.inf):
    """-> an argparse type: an int or float from `low` on, or above it, and below another"""
    def parse(text):
        value = kind(text)
        if not (value >= low if included else value > low) or not value < below:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {'at least' if included else 'over'} {low} and below {below}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def parse_args(argv=None):
    """list of str (None: the command line) -> argparse.Namespace"""
    whole, positive, share = number(int, 1), number(float, 0, included=False), number(float, 0)

    def names(text):
        return [] if text == "none" else text.split(",")
    parser = Parser(description="HeteroLoRA and its baselines under a budget of trainable parameters.")
    parser.add("task and model",
        ("--task", str, "paraphrase", [*data.BUILT_IN, *data.GLUE], "the first four are built in, the others GLUE"),
        ("--data-dir", str, None, "DIR", "folder of the GLUE folders: DIR/MRPC/train.tsv and so on"),
        ("--train-limit", whole, None, "N", "train on N examples, the same ones for every seed (default: all)"),
        ("--max-length", number(int, 5), 128, "N", "tokens of an example at most"),
        ("--model", str, "built-in", "DIR", "Hugging Face BERT or RoBERTa folder"),
        ("--pooling", str, "mean", ("mean", "cls"), "what the head sees"))
    parser.add("method",
        ("--method", str, "dynamic", METHODS, "lora: uniform rank on the targets; head: no adapters; full: every weight"),
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
        ("--warmup-rank", whole, 1, "R", "the rank of every candidate in these steps"))
    parser.add("training",
        ("--epochs", positive, None, "N", f"default: 4 for the built-in tasks, {', '.join(f'{v} {k}' for k, v in EPOCHS.items())}"),
        ("--max-steps", whole, None, "N", "stop after N steps, and let the schedule end there"),
        ("--batch-size", whole, None, "N", "examples a step (default: 32 with the built-in encoder, else 16)"),
        ("--lr", positive, None, "LR", "of the adapters (default: 2e-3 built-in, else 1e-3) or, for full, the encoder (3e-4, else 5e-5)"),
        ("--head-lr", positive, 1e-3, "LR", "of the head"),
        ("--weight-decay", share, 0.01, "W", "AdamW's, on matrices"),
        ("--schedule", str, "linear", ("linear", "constant"), "of the learning rate, after its warm-up"),
        ("--lr-warmup", share, 0.06, "SHARE", "share of the steps in which the learning rate rises"),
        ("--clip", positive, 1.0, "NORM", "gradient norm at most"),
        ("--seed", number(int, 0, below=2**63), 0, "SEED", "of initialisation, data order, probing, ties and dropout"),
        ("--device", str, None, "DEVICE", "cpu, cuda, cuda:1 and so on (default: cuda if there is one)"),
        ("--log-every", whole, 50, "N", "steps between log lines"),
        ("--out", str, None, "DIR", "a new folder for config.json, log.jsonl, history.jsonl, result.json and adapters.pt"))
    parser.add("looking at a run",
        ("--show", str, None, "RUN_DIR", "print what the search of a run did, from its history.jsonl, and stop"),
        ("--svg", str, None, "FILE", "with --show: draw it too"))
    args = parser.parse_args(argv)
    if args.svg and not args.show:
        parser.error("--svg needs --show RUN_DIR")
    args.command = shlex.join(["python", *(sys.argv if argv is None else ["train.py", *argv])])
    return args


# ------------------------------------------------------------------------------------------------ input and output

def write(path, save):
    """Call save(temporary path), then rename: the file at `path` is whole, or not there."""
    save(path + ".unfinished")
    os.replace(path + ".unfinished", path)


def write_text(path, text):
    """A text file, whole or not at all. Raises UsageError."""
    def save(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
    try:
        write(path, save)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


class Log:
    """Lines for people on stdout; facts as JSON lines in OUT/log.jsonl (steps, evaluations) and OUT/history.jsonl (the search)"""

    def __init__(self, out):
        self.out = out

    def __call__(self, line, **record):
        print(line, flush=True)
        self.save("log.jsonl", record)

    def save(self, name, record):
        """Append a record to a file of OUT, if there is an OUT"""
        if self.out and record:
            with open(os.path.join(self.out, name), "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def peak_memory_mb(device):
    """Peak memory of the GPU, or of this process"""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ------------------------------------------------------------------------------------------------ the run

def prepare(args, log):
    """Everything that can fail on bad input: device, data, model, adapters, budget. Fills in the defaults in args."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
    built_in = args.model == "built-in"
    if built_in and args.task in data.GLUE:
        raise UsageError(f"task {args.task} needs --model DIR, a Hugging Face folder: the built-in encoder knows only its own language")
    task = data.load_task(args.task, args.data_dir)
    if args.train_limit:
        chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:args.train_limit].sort().values
        task.train = [task.train[i] for i in chosen.tolist()]
    if built_in:
        adapt(args, encoders.Encoder(encoders.built_in_config()))  # a rehearsal: bad flags show before a minute of pre-training
    encoder, tokenizer = encoders.built_in_encoder(log) if built_in else (encoders.load_pretrained(args.model, log), data.load_tokenizer(args.model))
    if max(tokenizer.vocab.values()) >= encoder.config.vocab_size:
        raise UsageError(f"{args.model}: the tokenizer has ids up to {max(tokenizer.vocab.values())}, the encoder only {encoder.config.vocab_size} words")
    model = encoders.Classifier(encoder, task.num_labels, args.pooling, generator(args.seed, "head")).to(device)
    adapters, args.budget = adapt(args, encoder)
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
    return device, task, tokenizer, model, adapters


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
    return adapters, parse_budget(args.budget or ("100%" if args.method == "lora" else "25%"), heterolora.size(adapters))


class Batches:
    """The examples of a split as tensors on the device"""

    def __init__(self, split, tokenizer, max_length, device):
        self.encoded = [tokenizer.encode(text, pair, max_length) for text, pair, _ in split]
        self.labels, self.lengths = [label for *_, label in split], [len(ids) for ids, _ in self.encoded]
        self.pad_id, self.device = tokenizer.pad_id, device

    def __getitem__(self, indices):
        """list of int -> (input_ids, attention_mask, token_type_ids), each (B, T), and labels (B,)"""
        inputs = data.pad([self.encoded[i] for i in indices], self.pad_id)
        return tuple(t.to(self.device) for t in inputs), torch.tensor([self.labels[i] for i in indices], device=self.device)

    def sample(self, count, batch_size, generator):
        """`count` random batches, for scoring"""
        drawn = torch.randint(len(self.labels), (count * batch_size,), generator=generator).tolist()
        return [self[[drawn[i] for i in chunk]] for chunk in data.batches([self.lengths[i] for i in drawn], batch_size, generator)]


def predict(model, inputs):
    """(input_ids, attention_mask, token_type_ids) -> logits (B, C), at least float32; bfloat16 autocast inside on CUDA"""
    device = inputs[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        logits = model(*inputs)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def loss_fn(model, batch):
    """Mean cross-entropy of a batch (inputs, labels)"""
    return F.cross_entropy(predict(model, batch[0]), batch[1])


@torch.inference_mode()
def evaluate(model, split, metric, batch_size=64):
    """All examples of a split, without dropout -> {metric: value, ..., "loss"}"""
    model.eval()
    predictions, total = [0] * len(split.labels), 0.0
    for indices in data.batches(split.lengths, batch_size):
        inputs, labels = split[indices]
        logits = predict(model, inputs)
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        for i, prediction in zip(indices, logits.argmax(1).tolist()):
            predictions[i] = prediction
    model.train()
    return metric(predictions, split.labels) | {"loss": total / len(split.labels)}


def generator(seed, purpose):
    """Each purpose has its own random numbers, so that more of one does not change another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


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
    """Refuse bad input, then say and save what will be run -> log and what `prepare` gives. Raises UsageError."""
    try:
        if args.out:
            os.makedirs(args.out, exist_ok=True)
            if os.path.exists(os.path.join(args.out, "config.json")):
                raise UsageError(f"--out {args.out} holds a run already: give a new folder")
        log = Log(args.out)
        prepared = prepare(args, log)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    config = {key: value for key, value in vars(args).items() if key != "command"}
    log(f"command {args.command}")
    log("config  " + " ".join(f"{key}={','.join(v) if isinstance(v, list) else v}" for key, v in config.items() if v is not None))
    if args.out:
        write_text(os.path.join(args.out, "config.json"), json.dumps({"command": args.command, **config, "torch": torch.__version__}, indent=1))
    return log, *prepared


def optimise(args, model, batch, optimizer, schedule):
    """One training step -> loss of the batch (float). Raises FloatingPointError if it is not finite."""
    loss = loss_fn(model, batch)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], args.clip)
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
    """Warm up, score, put every value back to its start, allocate -> seconds

    Gradients through a random head point nowhere in particular, so the head trains first (--head-warmup), alone or together
    with every candidate at --warmup-rank (--warmup-steps).
    """
    start, draws = time.perf_counter(), generator(args.seed, "warm-up")
    values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    heterolora.set_ranks(search.adapters, dict.fromkeys(search.adapters, args.warmup_rank if args.warmup_steps else 0))
    if args.warmup_steps:
        search.ever = dict.fromkeys(search.adapters, args.warmup_rank)
        model.train()
        torch.manual_seed(args.seed)  # dropout
        optimizer, schedule = make_optimizer(args, model, args.warmup_steps)
        losses = [optimise(args, model, batch, optimizer, schedule) for batch in train_set.sample(args.warmup_steps, args.batch_size, draws)]
        log(f"warm-up {args.warmup_steps} steps, {heterolora.spent(search.adapters):,} params on | loss {sum(losses[-20:]) / len(losses[-20:]):.4f} | {time.perf_counter() - start:.1f} s")
    elif args.head_warmup:
        warm_up_head(args, model, train_set.sample(min(args.head_warmup, 32), args.batch_size, draws))
    model.zero_grad()
    entry = search.reallocate(train_set.sample(args.probe_batches, args.batch_size, generator(args.seed, "first probing")))
    model.load_state_dict(values, strict=False)
    log_reallocation(log, entry, args.budget)
    return time.perf_counter() - start


class Stopwatch:
    """Seconds of plain training steps and of steps whose gradients are recorded; what recording costs is their difference a token."""

    def __init__(self):
        self.seconds, self.tokens = {False: 0.0, True: 0.0}, {False: 0, True: 0}

    def add(self, recorded, seconds, tokens):
        """Count one step"""
        self.seconds[recorded] += seconds
        self.tokens[recorded] += tokens

    def split(self):
        """-> (training seconds, seconds that the recordings added)"""
        total = sum(self.seconds.values())
        extra = self.seconds[True] - self.tokens[True] * self.seconds[False] / self.tokens[False] if all(self.tokens.values()) else 0.0
        return total - extra, extra


def train(args):
    """One whole run of parse_args(...) -> result, the dict that result.json holds

    Raises UsageError for bad input before any training, FloatingPointError if the loss stops being finite.
    """
    log, device, task, tokenizer, model, adapters = begin(args)
    train_set, dev_set = (Batches(split, tokenizer, args.max_length, device) for split in (task.train, task.dev))
    steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
    total = min(math.ceil(args.epochs * steps_per_epoch), args.max_steps or math.inf)
    realloc_every = max(1, round(args.realloc_every * steps_per_epoch))
    encoder_size = sum(p.numel() for name, p in model.encoder.named_parameters() if ".lora." not in name)
    log(f"model   encoder {encoder_size:,} | head {count(model.head):,} | search space {heterolora.size(adapters):,} in {len(adapters)} modules")
    log(f"data    {args.task}: {len(train_set.labels):,} train, {len(dev_set.labels):,} dev | {total} steps, {steps_per_epoch} an epoch")
    advice = f"try a lower --lr (now {args.lr:g}) or --head-lr (now {args.head_lr:g})"

    search, first_seconds, search_seconds, running = None, 0.0, 0.0, 0.0
    if args.method == "lora":  # the same rank for every target; shortcuts count in the search space, and stay off
        costs = {name: [lora.price] * lora.max_rank for name, lora in adapters.items() if not lora.shortcut}
        heterolora.set_ranks(adapters, heterolora.uniform({}, costs, args.budget, None))
        log(f"uniform {heterolora.spent(adapters):,}/{args.budget:,} params")
    elif adapters:
        search = heterolora.HeteroLoRA(model, adapters, args.budget, loss_fn, args.proxy, args.allocator, args.pool, args.seed,
                                       args.granularity, args.order, args.scale)
        log.save("history.jsonl", {"modules": {name: {"price": lora.price, "max_rank": lora.max_rank, "shortcut": lora.shortcut} for name, lora in adapters.items()}})
        try:
            first_seconds = search_seconds = first_allocation(args, log, model, train_set, search)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, before the first step: {advice}") from None
    if adapters:
        log(grid(adapters))
        if not any(lora.rank for lora in adapters.values()):
            log(f"note    nothing is on: the cheapest choice costs more than the budget of {args.budget:,}; only the head trains")

    optimizer, schedule = make_optimizer(args, model, total)
    data_order, probing = (generator(args.seed, purpose) for purpose in ("data order", "probing"))
    model.train()
    torch.manual_seed(args.seed)  # dropout
    evaluations, queue, samples, watch, recording = [], [], 0, Stopwatch(), None
    for step in range(1, total + 1):
        try:
            ahead = realloc_every - (step - 1) % realloc_every  # steps to the next reallocation, this one included
            if args.method == "dynamic" and step > 1 and ahead == realloc_every:
                start = time.perf_counter()
                entry = search.reallocate(recording or train_set.sample(args.probe_batches, args.batch_size, probing), step - 1)
                recording, search_seconds = None, search_seconds + time.perf_counter() - start
                log_reallocation(log, entry, args.budget)
            record = args.method == "dynamic" and args.probe == "inline" and ahead <= args.probe_batches and step + ahead <= total
            if record:
                recording = recording or heterolora.Recording(adapters, heterolora.PROXIES[args.proxy].reads)

            start = time.perf_counter()
            queue = queue or data.batches(train_set.lengths, args.batch_size, data_order)
            batch = train_set[queue.pop(0)]
            with recording if record else contextlib.nullcontext():
                running += optimise(args, model, batch, optimizer, schedule)
            watch.add(record, time.perf_counter() - start, batch[0][0].numel())
            samples += len(batch[1])

            if step % args.log_every == 0 or step == total:
                mean, running = running / ((step - 1) % args.log_every + 1), 0.0
                seconds = watch.split()[0]
                log(f"step {step:6d}/{total} | loss {mean:.4f} | {1000 * seconds / step:.1f} ms/step | {samples / seconds:.1f} samples/s",
                    kind="step", step=step, loss=mean, lr=schedule.get_last_lr()[0], train_seconds=seconds)
            if step % steps_per_epoch == 0 or step == total:
                evaluations.append(evaluate(model, dev_set, task.metric))
                if not math.isfinite(evaluations[-1]["loss"]):
                    raise FloatingPointError(f"the loss on the dev set is {evaluations[-1]['loss']}")
                log(f"eval {step:6d}/{total} | {in_words(evaluations[-1])}", kind="eval", step=step, **evaluations[-1])
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} at step {step}: {advice}") from None

    train_seconds, extra = watch.split()
    search_seconds += extra
    result = summarise(args, log, model, adapters, search, evaluations) | {
        "steps": total, "train_seconds": train_seconds, "search_seconds": search_seconds, "first_allocation_seconds": first_seconds, "samples_per_second": samples / train_seconds,
        "peak_memory_mb": peak_memory_mb(device), "threads": torch.get_num_threads()}
    log(f"time    training {train_seconds:.1f} s | search {search_seconds:.1f} s ({first_seconds:.1f} before training) | {result['samples_per_second']:.1f} samples/s | "
        f"peak memory {result['peak_memory_mb'] or 0:.0f} MB")
    if args.out:
        write(os.path.join(args.out, "adapters.pt"), lambda path: torch.save(trained_state(model, adapters), path))
        write_text(os.path.join(args.out, "result.json"), json.dumps(result, indent=1))
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


def trained_state(model, adapters):
    """What a run has learned, and no more: the ranks, the active rows of A and columns of B, the head; for full the encoder"""
    on = {name: lora for name, lora in adapters.items() if lora.rank}
    state = {"ranks": {name: lora.rank for name, lora in adapters.items()}, "head": model.head.state_dict(),
             "adapters": {name: {"A": lora.A[:lora.rank].detach().clone(), "B": lora.B[:, :lora.rank].detach().clone(), "scale": lora.scale} for name, lora in on.items()}}
    if any(p.requires_grad for p in model.encoder.parameters()) and not adapters:
        state["encoder"] = model.encoder.state_dict()
    return state


# ------------------------------------------------------------------------------------------------ looking at a run

def layout(adapters):
    """Names of modules as a table -> ([layer, ...], [module type, ...], {(layer, type): name}), LoRA before shortcuts"""
    parts = {name: name.rpartition(".") for name in sorted(adapters, key=lambda n: adapters[n].shortcut)}
    rows = dict.fromkeys(name.rpartition(".")[0] for name in adapters)
    return [*rows], [*dict.fromkeys(kind for *_, kind in parts.values())], {(row, kind): name for name, (row, _, kind) in parts.items()}


def grid(adapters, ranks=None, cell=None):
    """An allocation as text: layers down, module types across, ranks in the cells (. = off), parameters at the edges.

    cell: function of a module's name -> other text for its cell, without the edges.
    """
    ranks = {name: lora.rank for name, lora in adapters.items()} if ranks is None else ranks
    rows, kinds, names = layout(adapters)

    def total(chosen):
        return [] if cell else [f"{sum(adapters[n].price * ranks.get(n, 0) for key in chosen if (n := names.get(key))):,}"]
    cell_of = cell or (lambda name: str(ranks.get(name, 0) or "."))
    table = [["", *kinds, *["parameters"][:not cell]]]
    table += [[row, *(cell_of(names[row, kind]) if (row, kind) in names else "" for kind in kinds), *total([(row, kind) for kind in kinds])] for row in rows]
    table += [] if cell else [["parameters", *(t for kind in kinds for t in total([(row, kind) for row in rows])), *total(names)]]
    return aligned(table)


def aligned(table):
    """Rows of strings -> lines of text, the first column to the left, the others to the right"""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in table)


def read_history(folder):
    """OUT/history.jsonl -> {module name: its price, max_rank and shortcut}, [entry of HeteroLoRA.history, ...]. Raises UsageError."""
    path = os.path.join(folder, "history.jsonl")
    try:
        with open(path, encoding="utf-8") as file:
            space, *history = map(json.loads, file)
        modules = {name: types.SimpleNamespace(**module) for name, module in space["modules"].items()}
        if not all(set(entry["ranks"]) == set(modules) for entry in history) or not history:
            raise ValueError("no allocation in it")
        return modules, history
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--show {folder}: {path} is not the history of a search: {error}") from None


def parameters_by_type(modules, ranks):
    """-> {module type: parameters on}"""
    _, kinds, names = layout(modules)
    return {kind: sum(modules[n].price * ranks[n] for (_, k), n in names.items() if k == kind) for kind in kinds}


def show(folder):
    """The history of a run in words: final ranks, how often every module was on, and every reallocation -> text"""
    modules, history = read_history(folder)
    layers, kinds, names = layout(modules)

    def how_often(name):
        share = sum(entry["ranks"][name] > 0 for entry in history) / len(history)
        return f"{' ░▒▓█'[math.ceil(4 * share)]} {share:4.0%}" if share else "."
    table = [["step", "on", "parameters", "came", "went", "other rank", "jaccard", "with first", "mean layer", *kinds]]
    for entry in history:
        by_type, total = parameters_by_type(modules, entry["ranks"]), max(entry["parameters"], 1)
        depth = sum(modules[n].price * entry["ranks"][n] * layers.index(layer) for (layer, _), n in names.items()) / total
        came, went = len(entry["on"]), len(entry["off"])
        table.append([str(entry["step"]), str(sum(map(bool, entry["ranks"].values()))), f"{entry['parameters']:,}", str(came), str(went), str(entry["changed"] - came - went),
                      *("" if entry[key] is None else f"{entry[key]:.2f}" for key in ("jaccard", "jaccard_first")), f"{depth:.2f}", *(f"{p / total:.0%}" for p in by_type.values())])
    return (f"ranks at the end\n{grid(modules, history[-1]['ranks'])}\n\nhow often on, of {len(history)} allocations\n"
            f"{grid(modules, {}, how_often)}\n\nallocations, with the share of the parameters that each type has\n{aligned(table)}")


def draw(folder):
    """The same as a picture: for every module type its layers (down) over the allocations (across), below them the
    parameters by type -> SVG text. Greys and colours that can be read on white and on black."""
    modules, history = read_history(folder)
    layers, kinds, names = layout(modules)
    colours = dict(zip(kinds, itertools.cycle(("#4a86d8", "#e07b39", "#3fa06a", "#b565c9", "#c9a227", "#d1495b", "#4aa8a8", "#8d7bd6", "#8a9a3b", "#b07d62"))))
    left, width, row, gap, chart = 110, 600, max(3, 60 / len(layers)), 10, 110
    step, strip = width / len(history), row * len(layers) + 10
    most = max(max(entry["parameters"] for entry in history), 1)
    bottom = 30 + len(kinds) * strip + gap + chart
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {bottom + 40:.0f}" font-family="sans-serif" font-size="11" fill="#7a7a7a">']

    def text(x, y, words, anchor="start"):
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>')

    def box(x, y, w, h, colour, opacity, title):
        parts.append(f'<rect x="{x:.2f}" y="{y:.2f}" width="{w:.2f}" height="{h:.2f}" fill="{colour}" fill-opacity="{opacity:.2f}"><title>{html.escape(title)}</title></rect>')
    text(left, 16, f"ranks by type: {len(layers)} layers down ({layers[0]} on top), {len(history)} allocations across")
    for k, kind in enumerate(kinds):
        top = 26 + k * strip
        text(left - 8, top + strip / 2, kind, "end")
        for i, layer in enumerate(layers):
            name = names.get((layer, kind))
            for rank, same in itertools.groupby(range(len(history)), lambda j: name and history[j]["ranks"][name]):
                first, *_, last = [*same] * 2
                if name:
                    share = rank / modules[name].max_rank
                    box(left + first * step, top + i * row, (last - first + 0.95) * step, 0.88 * row, colours[kind] if rank else "#7a7a7a", 0.3 + 0.7 * share if rank else 0.12,
                        f"{name}, steps {history[first]['step']} to {history[last]['step']}: rank {rank}")
    text(left - 8, bottom - chart / 2, "parameters", "end")
    text(left - 8, bottom - chart + 10, f"{most:,}", "end")
    for j, entry in enumerate(history):
        y = bottom
        for kind, p in parameters_by_type(modules, entry["ranks"]).items():
            y -= p / most * chart
            if p:
                box(left + j * step, y, 0.95 * step, p / most * chart, colours[kind], 1, f"{kind}, step {entry['step']}: {p:,} parameters")
    text(left, bottom + 16, f"step {history[0]['step']}")
    text(left + width, bottom + 16, f"step {history[-1]['step']}", "end")
    return "\n".join([*parts, "</svg>\n"])


def main(argv=None):
    """Run the command line -> exit status: 0, 1 for a fault during the run, 2 for bad input"""
    warnings.formatwarning = lambda message, *_: f"train.py: warning: {message}\n"
    try:
        args = parse_args(argv)
        if args.show:
            print(show(args.show))
            if args.svg:
                write_text(args.svg, draw(args.show))
        else:
            train(args)
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
