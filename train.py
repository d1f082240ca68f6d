"""Fine-tune an encoder under a budget of trainable parameters.

    python train.py --budget 25%                                   # a built-in task and encoder
    python train.py --task mrpc --model roberta-base --out runs/a  # GLUE and a real checkpoint
    python train.py --resume runs/a                                # after Ctrl-C or a crash

The methods are HeteroLoRA (dynamic, static), two other searches (extras/), and the baselines: lora
(no search), head (no adapters), full (every weight). Read `train` top to bottom, then `fit`.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import sys
import time
import warnings
import zlib

import torch
import torch.nn.functional as F

import data
import heterolora
from data import InputError
from extras.flags import arguments, names, number, parse_budget
from extras.part_ranks import RankAdamW, hold_off_ranks
from model import Classifier

METHODS = ("dynamic", "static", "lora", "head", "full")
NEIGHBOURS = ("alora", "adalora")  # other searches, in extras/
PRECISIONS = ("float32", "bfloat16", "int8")
INITS = ("random", "gradient")

HEAD_LR = 1e-3  # the head starts from nothing, whatever the adapters do
WEIGHT_DECAY = 0.01  # on matrices
LR_WARMUP = 0.06  # share of the steps in which the learning rate rises; then it falls to 0
CLIP = 1.0  # largest norm of the gradient
LOG_EVERY = 50  # steps
SAVE_EVERY = 500  # steps; also at the end of every epoch


# --------------------------------------------------------------------------------------- flags


def parse_args(argv=None):
    """Turn a command line into a Namespace. With --resume the flags are those of the saved run."""
    import extras.adapters  # noqa: F401  they register what the paper does not have
    import extras.alignment  # noqa: F401
    import extras.allocators  # noqa: F401
    import extras.proxies  # noqa: F401

    whole = number(int, 0)  # 1 or more
    few = number(int, -1, 9999)  # 0 to 9999
    positive = number(float, 0)
    parser = argparse.ArgumentParser(
        prog="train.py", usage="python train.py [flags]", description="HeteroLoRA and baselines."
    )
    add = parser.add_argument_group("task and model").add_argument
    add("--task", default="paraphrase", help="built-in, GLUE, or your own folder")
    add("--metric", choices=data.METRICS, help="of tasks with two classes, beside accuracy")
    add("--data-dir", help="the folder above MRPC/train.tsv (default: downloaded)")
    add("--train-limit", type=whole, help="train on so many examples")
    add("--holdout", type=positive, help="evaluate on this share of the training set, not on dev")
    add("--max-length", type=number(int, 4), default=128, help="tokens of an example (128)")
    add("--model", default="built-in", help="a BERT or RoBERTa: folder or hub id")
    add("--pooling", choices=("mean", "cls"), default="mean", help="what the head sees (mean)")

    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS + NEIGHBOURS, default="dynamic")
    add("--budget", help="25%%, 0.25 or 12000 parameters (25%%; for lora 100%%)")
    add("--targets", type=names, default="q,v", help="linears: all, none, or of q,k,v,o,fc1,fc2")
    add("--shortcuts", type=names, default="all", help="all, none, or some: see heterolora.py")
    add("--rank", type=whole, help="r_max, the most ranks of a module (8 or what fits)")
    add("--alpha", type=positive, default=16.0, help="scale is alpha / rank (16)")
    add("--shortcut-alpha", type=positive, default=4.0, help="the same for shortcuts (4)")
    add("--adapter", choices=heterolora.ADAPTERS, default="lora", help="see extras/adapters.py")
    add("--init", choices=INITS, help="of A: a random draw, or along the gradient (random)")
    add("--proxy", choices=heterolora.PROXIES, default="grad-norm")
    add("--allocator", choices=heterolora.ALLOCATORS, default="greedy")
    add("--realloc-every", type=positive, default=0.2, help="epochs between allocations (0.2)")
    add("--probe-batches", type=number(int, 0, 9999), default=8, help="batches of a score (8)")
    add("--head-warmup", type=few, default=100, help="steps before scoring (100)")
    add("--warmup-steps", type=few, default=0, help="instead: steps of all modules (0)")
    add("--score-repeats", type=number(int, 0, 99), help="warm-ups to average over, at most (1)")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive, help="by the task: 1 to 10")
    add("--max-steps", type=whole, help="end after so many steps")
    add("--batch-size", type=whole, help="32 with the built-in encoder, else 16")
    add("--lr", type=positive, help="2e-3 built-in, else 1e-3; full: 3e-4 built-in, else 5e-5")
    add("--seed", type=number(int, -1), default=0)
    add("--device", help="cpu, cuda, cuda:1 ... (cuda if there is one)")
    add("--precision", choices=PRECISIONS, help="of frozen weights (bfloat16 if that is fast)")
    add("--out", metavar="DIR", help="a new folder for logs, state, result, adapters")
    add("--resume", metavar="DIR", help="go on with a run that was interrupted")

    args = parser.parse_args(arguments(argv))
    if args.resume:
        from extras.runs import resumed_args

        args = resumed_args(parser, args, argv)
    args.command = shlex.join(["python", *(sys.argv if argv is None else ["train.py", *argv])])
    return args


# ----------------------------------------------------------------------------------- the parts


def generator(seed, purpose):
    """Return random numbers for one purpose, so that more of one does not change another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


def prepare(args):
    """Load everything and fill in the defaults -> task, tokenizer, model, adapters

    Whatever is wrong with the input raises InputError here, before any training.
    """
    from extras import setup

    setup.check_flags(args)
    task = setup.read_task(args)
    tokenizer, model, adapters = build(args, len(task.labels))
    return task, tokenizer, setup.place(args, task, model), adapters


def build(args, num_labels):
    """Build the model of a run -> tokenizer, model, adapters. Raises InputError."""
    from extras.adapters import check_what_trains, choose_kind
    from extras.setup import connections, read_checkpoint
    from extras.state import checksum, form

    tokenizer, encoder = read_checkpoint(args)
    model = Classifier(encoder, num_labels, args.pooling, generator(args.seed, "head"))
    model.checkpoint, model.form = checksum(encoder), form(encoder, tokenizer)  # before training
    if args.method in ("head", "full"):
        encoder.requires_grad_(args.method == "full")
        args.budget = None
        return tokenizer, model, {}
    targets = heterolora.TARGETS if args.targets == ["all"] else args.targets
    shortcuts = connections(encoder) if args.shortcuts == ["all"] else args.shortcuts
    try:
        kind = choose_kind(args, encoder, targets, shortcuts)
        settings = (args.rank, args.alpha, args.shortcut_alpha)
        adapters = heterolora.inject(encoder, targets, shortcuts, *settings, args.seed, kind)
        check_what_trains(adapters)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"--targets, --shortcuts, --rank: {error}") from None
    if not adapters:
        raise InputError("the search space is empty: give --targets or --shortcuts")
    default = "100%" if args.method == "lora" else "25%"
    if isinstance(args.budget, int):  # from usual_rank or extras.compare: lowered to what fits
        args.budget = str(min(args.budget, size(adapters)))
    args.budget = str(parse_budget(args.budget or default, size(adapters)))
    return tokenizer, model, adapters


def size(adapters):
    """Return the parameters of the whole search space."""
    return heterolora.cost(adapters, {name: a.max_rank for name, a in adapters.items()})


def loss_fn(model, batch):
    """Return the mean cross-entropy of a batch (inputs, labels)."""
    inputs, labels = batch
    return F.cross_entropy(model(*inputs), labels)


@torch.inference_mode()
def evaluate(model, split, metric):
    """Evaluate a split, without dropout -> {metric: value, ..., "loss": mean, "right": hex}"""
    was_training = model.training
    model.eval()
    predictions = [0] * len(split.labels)
    loss = 0.0
    for indices in data.batches(split.lengths, batch_size=32):
        inputs, labels = split[indices]
        logits = model(*inputs)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        for i, prediction in zip(indices, logits.argmax(1).tolist(), strict=True):
            predictions[i] = prediction
    model.train(was_training)
    loss /= len(split.labels)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss on the dev set is {loss}")
    right = data.which_are_right(predictions, split.labels)
    return metric(predictions, split.labels) | {"loss": loss, "right": right}


def make_optimizer(args, model, adapters, total):
    """Return AdamW and its schedule: the learning rate rises linearly, then falls to 0."""
    groups = []
    for part, lr in ((model.encoder, args.lr), (model.head, HEAD_LR)):
        trained = [p for p in part.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() > 1]
        vectors = [p for p in trained if p.dim() <= 1]
        groups.append({"params": matrices, "lr": lr, "weight_decay": WEIGHT_DECAY})
        groups.append({"params": vectors, "lr": lr, "weight_decay": 0.0})
    warm = math.ceil(LR_WARMUP * total)

    def factor(step):
        return min(1, (step + 1) / max(warm, 1), (total - step) / max(total - warm, 1))

    may_buy_ranks = args.method == "dynamic" and args.allocator != "greedy"
    if may_buy_ranks or args.method == "alora":  # ranks come on in modules that are partly on
        optimizer = RankAdamW(groups, adapters)
    else:
        optimizer = torch.optim.AdamW(groups)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def update(model, adapters, optimizer, schedule):
    """Make one step of the optimizer with the gradients as they are. Ranks that are off stay."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, CLIP)
    with hold_off_ranks(adapters):
        optimizer.step()
    schedule.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------- the run


def train(args):
    """Do one whole run -> its result, as result.json holds it (docs/REFERENCE.md)

    Raises InputError for bad input before any training, FloatingPointError if a loss or weight is
    not finite, KeyboardInterrupt after Ctrl-C. With --out the first Ctrl-C saves the state.
    """
    from extras import fast_cpu, runs, setup
    from extras.allocators import plain_lora
    from extras.gradient_start import start_along_gradients
    from extras.state import State, data_checksum
    from extras.stop import StopSignal
    from extras.summary import summarise
    from extras.warm_up import first_allocation

    run = runs.Run(args.out, is_new=not args.resume)
    if run.is_finished():
        return run.result()
    task, tokenizer, model, adapters = prepare(args)
    device = model.head[0].weight.device
    run.begin(args, model)
    if device.type == "cpu":  # the same, but for rounding and dropout's draws
        run.log(f"cpu     faster {fast_cpu.accelerate(model, args.precision)}")
    budget = int(args.budget or 0)
    sizes = f"{len(task.train):,} train, {len(task.dev):,} {task.dev_name}"
    run.log(f"data    {args.task}: {sizes}, classes {', '.join(task.labels)}")
    run.log(f"model   {len(adapters)} modules, {size(adapters):,} parameters, budget {budget:,}")
    train_set = data.Split(task.train, tokenizer, args.max_length, device, args.precision)
    dev_set = data.Split(task.dev, tokenizer, args.max_length, device, args.precision)

    steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
    total = max(1, min(math.ceil(args.epochs * steps_per_epoch - 1e-6), args.max_steps or math.inf))
    optimizer, schedule = make_optimizer(args, model, adapters, total)
    search = None
    if args.method in ("static", "dynamic"):
        search = heterolora.HeteroLoRA(
            model, adapters, budget, loss_fn, args.proxy, args.allocator, args.seed
        )
    if args.method in NEIGHBOURS:
        search = setup.neighbour(args, model, adapters, loss_fn, optimizer, total)
    data_order = generator(args.seed, "data order")
    probing = generator(args.seed, "probing")
    state = State(device, model, adapters, optimizer, schedule, search, data_order, probing)
    progress = state.progress
    run.data_checksum = [data_checksum(split, task.labels) for split in (train_set, dev_set)]

    with StopSignal() as stop:  # Ctrl-C lets the first allocation or a step end; then it is saved
        if run.has_state():
            run.load(state)
        elif search:
            start = time.perf_counter()
            first_allocation(args, run, search, train_set)  # after a warm-up, which is undone
            progress.search_seconds += time.perf_counter() - start
            run.log_allocations(search)
        elif adapters:
            heterolora.set_ranks(adapters, plain_lora(adapters, args.allocator, budget))
            run.log(f"lora    {heterolora.cost(adapters):,} parameters are on")
        if args.init == "gradient" and not run.has_state():
            progress.search_seconds += start_along_gradients(args, model, adapters, train_set)
        run.log_grid(adapters)
        model.train()
        if progress.step == 0:
            torch.manual_seed(args.seed)  # dropout
            run.save(state)
        fit(args, run, state, total, steps_per_epoch, train_set, dev_set, task.metric, stop)
    result = summarise(args, model, adapters, search, progress, device)
    run.finish(result, task, model, adapters)
    return result


def fit(args, run, state, total, steps_per_epoch, train_set, dev_set, metric, stop):
    """Train from the state's step to the last one, `total`. All arguments are made in `train`."""
    model, adapters, search = state.model, state.adapters, state.search
    progress = state.progress
    realloc_every = max(1, round(args.realloc_every * steps_per_epoch))
    objective = search.loss_fn if search else loss_fn
    is_dynamic = args.method in ("dynamic", "alora")
    # Inline: scores come from the training steps themselves, not from passes of their own.
    is_inline = args.method == "dynamic" and heterolora.PROXIES[args.proxy].measure is not None
    if is_dynamic and realloc_every >= total:
        run.log(f"note    no second allocation: it would come after step {realloc_every:,}")
    elif is_inline and realloc_every < args.probe_batches:
        run.log(f"note    a score sees {realloc_every} batches: all between two allocations")

    for step in range(progress.step + 1, total + 1):
        # Allocate anew, if it is time: score what has been recorded, or make passes for it.
        since = (step - 1) % realloc_every  # steps made since the last allocation
        if is_dynamic and since == 0 and step > 1:
            progress.read_loss()  # before the clock starts: a wait for a GPU belongs to training
            start = time.perf_counter()
            batches = None
            if not is_inline:
                batches = train_set.sample(args.probe_batches, args.batch_size, state.probing)
            search.reallocate(batches, step - 1)
            progress.search_seconds += time.perf_counter() - start
            run.log_allocations(search)

        # Train. Record the last steps before an allocation, if there is to be one.
        steps_left = realloc_every - since
        is_near = steps_left <= args.probe_batches and step + steps_left <= total
        is_recorded = is_inline and is_near
        start = time.perf_counter()
        if not progress.queue:
            progress.queue = data.batches(train_set.lengths, args.batch_size, state.data_order)
        batch = train_set[progress.queue.pop(0)]
        with search.record() if is_recorded else contextlib.nullcontext():
            loss = objective(model, batch)
            loss.backward()
        update(model, adapters, state.optimizer, state.schedule)
        progress.loss += loss.detach()  # not read yet: that would wait for a GPU at every step
        progress.count(step, batch, time.perf_counter() - start, is_recorded)

        # Log, evaluate, save.
        is_epoch_end = step % steps_per_epoch == 0
        if step % LOG_EVERY == 0 or step == total:
            run.log_step(progress, total, steps=(step - 1) % LOG_EVERY + 1)
            progress.loss = 0.0
        if search:
            run.log_allocations(search)  # AdaLoRA makes its last one after a step
        if is_epoch_end or step == total:
            progress.read_loss()
            progress.evaluations.append(evaluate(model, dev_set, metric))
            run.log_evaluation(progress, total)
        if is_epoch_end or step % SAVE_EVERY == 0 or stop.requested:
            run.save(state)
        if stop.requested and step < total:
            raise KeyboardInterrupt(f"after step {step} of {total}")


def load_run(folder, model=None):
    """Load a finished run -> Classifier in eval mode, with adapters, tokenizer, labels and texts

    texts: how many an example has. It is on the CPU, with frozen weights in float32. model: its
    checkpoint, if that has moved. Raises InputError.
    """
    from extras.state import put_learned, read_learned

    folder = os.fspath(folder)
    args = parse_args(["--resume", folder] + (["--model", os.fspath(model)] if model else []))
    learned = read_learned(folder)
    tokenizer, model, adapters = build(args, len(learned["labels"]))
    put_learned(folder, learned, args, model, adapters)
    model.tokenizer = tokenizer
    return model.eval()


def main(argv=None):
    """Run a command line -> exit status: 0, 1 for a fault, 2 for bad input, 130 for Ctrl-C"""
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    warnings.formatwarning = lambda message, *_: f"train.py: warning: {message}\n"
    args = None
    try:
        args = parse_args(argv)
        train(args)
        return 0
    except InputError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        print(f"train.py: stopped: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        advice = "nothing was kept"
        if args and args.out and os.path.isfile(os.path.join(args.out, "config.json")):
            advice = f"go on with: python train.py --resume {shlex.quote(args.out)}"
        print(f"train.py: stopped {str(error) or 'early'}; {advice}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
