"""Fine-tune an encoder under a parameter budget: HeteroLoRA (static or dynamic), uniform LoRA, head only, or everything.

    python train.py --budget 25%                                     # built-in task and encoder, no data needed
    python train.py --task mrpc --data-dir glue --model DIR          # GLUE and a Hugging Face BERT or RoBERTa folder

Read `train` top to bottom: it is the whole run. Every flag: python train.py --help, or the table in the README.
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import shlex
import sys
import tempfile
import time
import zlib

import torch
import torch.nn.functional as F

import data
import heterolora
import model as encoders

METHODS = ("dynamic", "static", "lora", "head", "full")
EPOCHS = {"mrpc": 5, "rte": 10, "cola": 5, "sst2": 1, "qnli": 1, "qqp": 1, "mnli": 1}  # small sets want more passes
BUILT_IN_ENCODER = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, max_position_embeddings=128,
                        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
BUILT_IN_PRETRAINING = dict(steps=2400, batch_size=32, lr=2e-3, mask=0.3, seed=0)
BUILT_IN_CORPUS = 40_000


class UsageError(ValueError):
    """Input that cannot work, found before any training: exit status 2."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: error: {message} (python train.py --help lists every flag)\n")


def parse_args(argv=None):
    """list of str (None: the command line) -> argparse.Namespace"""
    parser = Parser(description="HeteroLoRA and its baselines under a budget of trainable parameters.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = lambda text: [] if text == "none" else text.split(",")
    def number(kind, low, open_end=False):
        def parse(text):
            value = kind(text)
            if not (value > low if open_end else value >= low) or math.isinf(value):
                raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {'over' if open_end else 'at least'} {low}")
            return value
        parse.__name__ = "whole number" if kind is int else "number"
        return parse
    group = parser.add_argument_group("task and model")
    group.add_argument("--task", default="paraphrase", choices=[*data.BUILT_IN, *data.GLUE], help="the first four are built in, the others GLUE")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the GLUE folders: DIR/MRPC/train.tsv ...")
    group.add_argument("--train-limit", type=number(int, 1), metavar="N", help="train on N examples, the same ones for every seed")
    group.add_argument("--max-length", type=number(int, 5), default=128, metavar="N", help="tokens of an example at most")
    group.add_argument("--model", default="built-in", metavar="DIR", help="Hugging Face BERT or RoBERTa folder")
    group.add_argument("--pooling", default="mean", choices=("mean", "cls"), help="what the head sees")
    group = parser.add_argument_group("method")
    group.add_argument("--method", default="dynamic", choices=METHODS, help="lora: uniform rank on the targets; head: no adapters; full: every weight")
    group.add_argument("--budget", metavar="B", help="25%% or 0.25 of the search space, or a number of parameters (default: 25%%; everything for lora)")
    group.add_argument("--targets", type=names, default="q,v", metavar="LIST", help=f"all, or some of {','.join(heterolora.TARGETS)}")
    group.add_argument("--shortcuts", type=names, default="all", metavar="LIST", help=f"all, none, or some of {','.join(heterolora.SHORTCUTS)}")
    group.add_argument("--rank", type=number(int, 1), default=8, metavar="R", help="r_max, the rank of a module that is on")
    group.add_argument("--alpha", type=number(float, 0, True), default=16.0, help="LoRA adds alpha / R * BA")
    group.add_argument("--shortcut-alpha", type=number(float, 0, True), default=4.0, metavar="ALPHA", help="the same for shortcuts")
    group.add_argument("--proxy", default="grad-norm", choices=heterolora.PROXIES, help="score of a module")
    group.add_argument("--allocator", default="greedy", choices=heterolora.ALLOCATORS, help="how scores become ranks")
    group.add_argument("--pool", default="combined", choices=("combined", "separated"), help="LoRA and shortcuts in one list, or each with its share")
    group.add_argument("--probe-batches", type=number(int, 1), default=8, metavar="N", help="training batches that a scoring sees")
    group.add_argument("--realloc-every", type=number(float, 0, True), default=0.2, metavar="E", help="epochs between reallocations (dynamic)")
    group.add_argument("--head-warmup", type=number(int, 0), default=100, metavar="N", help="steps of head-only training before the first scoring")
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=number(float, 0, True), metavar="N", help="default: by task, see the README")
    group.add_argument("--max-steps", type=number(int, 1), metavar="N", help="stop after N steps, and let the schedule end there")
    group.add_argument("--batch-size", type=number(int, 1), default=32, metavar="N", help="examples a step")
    group.add_argument("--lr", type=number(float, 0, True), help="of the adapters or, for full, the encoder (default: by method and model)")
    group.add_argument("--head-lr", type=number(float, 0, True), default=1e-3, metavar="LR", help="of the head")
    group.add_argument("--weight-decay", type=number(float, 0), default=0.01, metavar="W", help="AdamW's, on matrices")
    group.add_argument("--schedule", default="linear", choices=("linear", "constant"), help="of the learning rate, after the warm-up")
    group.add_argument("--lr-warmup", type=number(float, 0), default=0.06, metavar="SHARE", help="share of the steps in which the learning rate rises")
    group.add_argument("--clip", type=number(float, 0, True), default=1.0, metavar="NORM", help="gradient norm at most")
    group.add_argument("--seed", type=number(int, 0), default=0, help="of initialisation, data order, probing, ties and dropout")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    group.add_argument("--log-every", type=number(int, 1), default=50, metavar="N", help="steps between log lines")
    group.add_argument("--out", metavar="DIR", help="a new folder for config.json, log.jsonl, result.json and adapters.pt")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
    return args


# ------------------------------------------------------------------------------------------------ input and output

def built_in_encoder(log):
    """The small encoder of the built-in language, pre-trained once and then taken from the cache -> Encoder, Tokenizer"""
    tokenizer = data.built_in_tokenizer()
    config = encoders.EncoderConfig(vocab_size=len(tokenizer.vocab), **BUILT_IN_ENCODER)
    sources = [inspect.getsource(part) for part in (data.Language, data.built_in_corpus, encoders.Layer, encoders.Encoder, encoders.pretrain)]
    everything = repr((config, BUILT_IN_PRETRAINING, BUILT_IN_CORPUS, list(tokenizer.vocab), data.LEXICON, sources, torch.__version__))
    cache = os.environ.get("HETEROLORA_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "heterolora")
    folder = os.path.join(cache, "encoder-" + hashlib.sha256(everything.encode()).hexdigest()[:16])
    if not os.path.isdir(folder):
        log(f"pre-training the built-in encoder, once, into {folder}")
        sequences = [tokenizer.encode(*texts) for texts in data.built_in_corpus(BUILT_IN_CORPUS)]
        first_word = min(i for token, i in tokenizer.vocab.items() if token.isalpha() and len(token) > 1)
        encoder = encoders.pretrain(config, sequences, tokenizer.mask_id, first_word, log=log, **BUILT_IN_PRETRAINING)
        encoders.save_pretrained(encoder, folder, [("vocab.txt", "".join(token + "\n" for token in tokenizer.vocab))])
    return encoders.load_pretrained(folder, log), data.load_tokenizer(folder)


def write(path, save):
    """Call save(temporary path), then rename: the file at `path` is whole, or not there."""
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix="unfinished-")
    os.close(handle)
    try:
        save(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path, value):
    """A JSON file, whole or not at all"""
    def save(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
    write(path, save)


class Log:
    """Lines for people on stdout; the same facts as JSON lines in OUT/log.jsonl if there is an OUT."""

    def __init__(self, out):
        self.file = open(os.path.join(out, "log.jsonl"), "a", encoding="utf-8") if out else None

    def __call__(self, line, **record):
        print(line, flush=True)
        if self.file and record:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()


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
    if args.model == "built-in" and args.task in data.GLUE:
        raise UsageError(f"task {args.task} needs --model DIR, a Hugging Face folder: the built-in encoder knows only its own language")
    task = data.load_task(args.task, args.data_dir)
    if args.train_limit:
        chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:args.train_limit].sort().values
        task.train = [task.train[i] for i in chosen.tolist()]
    encoder, tokenizer = built_in_encoder(log) if args.model == "built-in" else (encoders.load_pretrained(args.model, log), data.load_tokenizer(args.model))
    if max(tokenizer.vocab.values()) >= encoder.config.vocab_size:
        raise UsageError(f"{args.model}: the tokenizer has ids up to {max(tokenizer.vocab.values())}, the encoder only {encoder.config.vocab_size} words")
    args.max_length = min(args.max_length, encoder.max_length)
    model = encoders.Classifier(encoder, task.num_labels, args.pooling, torch.Generator().manual_seed(args.seed)).to(device)
    args.epochs = args.epochs or EPOCHS.get(args.task, 4)
    args.lr = args.lr or {"full": 3e-4 if args.model == "built-in" else 5e-5}.get(args.method, 3e-3 if args.model == "built-in" else 1e-3)
    adapters = {}
    if args.method in ("dynamic", "static", "lora"):
        targets, shortcuts = ((every if chosen == ["all"] else chosen) for chosen, every in ((args.targets, heterolora.TARGETS), (args.shortcuts, heterolora.SHORTCUTS)))
        adapters = heterolora.inject(model.encoder, targets, shortcuts, args.rank, args.alpha, args.shortcut_alpha, args.seed)
        if not adapters:
            raise UsageError("the search space is empty: give --targets or --shortcuts")
        args.budget = heterolora.parse_budget(args.budget or ("100%" if args.method == "lora" else "25%"), heterolora.size(adapters))
    elif args.method == "head":
        encoder.requires_grad_(False)
    return device, task, tokenizer, model, adapters


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
        return [self[[drawn[i] for i in chunk]] for chunk in data.batches([self.lengths[i] for i in drawn], batch_size)]


def loss_fn(model, batch):
    """Mean cross-entropy of a batch; bfloat16 autocast on CUDA"""
    inputs, labels = batch
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.device.type == "cuda"):
        logits = model(*inputs)
    return F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, labels)


@torch.inference_mode()
def evaluate(model, split, metric, batch_size=64):
    """All examples of a split, without dropout -> {metric: value, ..., "loss"}"""
    model.eval()
    predictions, total = [0] * len(split.labels), 0.0
    for indices in data.batches(split.lengths, batch_size):
        inputs, labels = split[indices]
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.device.type == "cuda"):
            logits = model(*inputs).float()
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        for i, prediction in zip(indices, logits.argmax(1).tolist()):
            predictions[i] = prediction
    model.train()
    return metric(predictions, split.labels) | {"loss": total / len(split.labels)}


def warm_up_head(model, batches, lr):
    """Train the head alone on these batches, without dropout. A random head sends gradients nowhere in particular."""
    model.eval()
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.train()


def generator(seed, purpose):
    """Each purpose has its own random numbers, so that more of one does not change another."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))


def train(args):
    """One whole run of parse_args(...) -> result, the dict that result.json holds

    Raises UsageError for bad input before any training, FloatingPointError if the loss stops being finite.
    """
    try:
        if args.out:
            os.makedirs(args.out, exist_ok=True)
            if os.path.exists(os.path.join(args.out, "config.json")):
                raise UsageError(f"--out {args.out} holds a run already: give a new folder")
        log = Log(args.out)
        device, task, tokenizer, model, adapters = prepare(args, log)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from None
    config = {key: value for key, value in vars(args).items() if key != "command"}
    log(f"command {args.command}")
    log("config  " + " ".join(f"{key}={','.join(v) if isinstance(v, list) else v}" for key, v in config.items() if v is not None))
    if args.out:
        write_json(os.path.join(args.out, "config.json"), {"command": args.command, **config, "torch": torch.__version__})

    train_set, dev_set = (Batches(split, tokenizer, args.max_length, device) for split in (task.train, task.dev))
    steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
    total = min(math.ceil(args.epochs * steps_per_epoch), args.max_steps or math.inf)
    realloc_every = max(1, round(args.realloc_every * steps_per_epoch))
    data_order, probing = generator(args.seed, "data order"), generator(args.seed, "probing")

    search, space = None, heterolora.size(adapters)
    if args.method == "lora":  # the same rank for every target; shortcuts count in the search space, and stay off
        costs = {name: [lora.price] * lora.max_rank for name, lora in adapters.items() if not lora.shortcut}
        heterolora.set_ranks(adapters, heterolora.uniform({}, costs, args.budget, None))
    elif adapters:
        search = heterolora.HeteroLoRA(model, adapters, args.budget, loss_fn, args.proxy, args.allocator, args.pool, args.seed)
        heterolora.set_ranks(adapters, {})

    encoder = [p for p in model.encoder.parameters() if p.requires_grad]
    groups = [{"params": [p for p in part if (p.dim() > 1) == matrices], "lr": lr, "weight_decay": args.weight_decay * matrices}
              for part, lr in ((encoder, args.lr), (list(model.head.parameters()), args.head_lr)) for matrices in (True, False)]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]])
    warm = math.ceil(args.lr_warmup * total)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(warm, 1)) * (
        1 if args.schedule == "constant" else min(1, (total - step) / max(total - warm, 1))))
    trained = [p for g in groups for p in g["params"]]
    params_head = sum(p.numel() for p in model.head.parameters())
    params_encoder = sum(p.numel() for p in encoder)
    log(f"model   encoder {sum(p.numel() for n, p in model.encoder.named_parameters() if '.lora.' not in n):,} | head {params_head:,} | "
        f"search space {space:,} in {len(adapters)} modules | budget {args.budget if adapters else 0:,} parameters")
    log(f"data    {args.task}: {len(train_set.labels):,} train, {len(dev_set.labels):,} dev | {total} steps, {steps_per_epoch} an epoch")

    model.train()
    torch.manual_seed(args.seed)  # dropout
    train_seconds = search_seconds = running = 0.0
    evaluations, queue, samples, since = [], [], 0, time.perf_counter()
    for step in range(total):
        if search and (step == 0 or args.method == "dynamic" and step % realloc_every == 0):
            start = time.perf_counter()
            head = {name: value.clone() for name, value in model.head.state_dict().items()}
            if step == 0:
                warm_up_head(model, train_set.sample(args.head_warmup, args.batch_size, probing), args.head_lr)
            entry = search.reallocate(train_set.sample(args.probe_batches, args.batch_size, probing), step)
            model.head.load_state_dict(head)  # training starts from the same head with and without a search
            search_seconds += time.perf_counter() - start
            changes = [f"{sign}{name.removeprefix('layers.')}" for sign, names in (("+", entry["on"]), ("-", entry["off"])) for name in names if step]
            log(f"alloc @ step {step} | on {sum(map(bool, entry['ranks'].values()))}/{len(adapters)} modules | {entry['parameters']:,}/{args.budget:,} params"
                + (f" | jaccard {entry['jaccard']:.2f} | {' '.join(changes) or 'no change'}" if step else ""), kind="alloc", **entry)
        if step == 0 and adapters:
            log(heterolora.grid(adapters))
            if not any(lora.rank for lora in adapters.values()):
                log(f"note    nothing is on: the cheapest choice costs more than the budget of {args.budget:,}; only the head trains")

        start = time.perf_counter()
        queue = queue or data.batches(train_set.lengths, args.batch_size, data_order)
        batch = train_set[queue.pop(0)]
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()
        schedule.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step + 1}: try a lower --lr (now {args.lr:g}) or --head-lr (now {args.head_lr:g})")
        train_seconds += time.perf_counter() - start
        samples, running = samples + len(batch[1]), running + value

        done = step + 1
        if done % args.log_every == 0 or done == total:
            count = (done - 1) % args.log_every + 1
            log(f"step {done:6d}/{total} | loss {running / count:.4f} | {1000 * train_seconds / done:.1f} ms/step | {samples / train_seconds:.1f} samples/s",
                kind="step", step=done, loss=running / count, lr=schedule.get_last_lr()[0], train_seconds=train_seconds)
            running = 0.0
        if done % steps_per_epoch == 0 or done == total:
            evaluations.append(evaluate(model, dev_set, task.metric))
            log(f"eval {done:6d}/{total} | " + " | ".join(f"{k} {v:.4f}" for k, v in evaluations[-1].items()), kind="eval", step=done, **evaluations[-1])

    ranks = {name: lora.rank for name, lora in adapters.items()}
    metric = next(iter(evaluations[-1]))
    result = {
        "task": args.task, "method": args.method, "proxy": args.proxy if search else None, "seed": args.seed, "metric": metric,
        "last": evaluations[-1][metric], "best": max(e[metric] for e in evaluations), "dev": evaluations[-1],
        "params_budget": args.budget if adapters else None, "params_active": heterolora.spent(adapters) if adapters else params_encoder,
        "params_ever_trained": heterolora.spent(adapters, search.ever if search else None) if adapters else params_encoder,
        "params_stored": heterolora.spent(adapters) if adapters else params_encoder,
        "params_search_space": space, "params_head": params_head, "ranks": ranks, "steps": total,
        "train_seconds": train_seconds, "search_seconds": search_seconds, "wall_seconds": time.perf_counter() - since,
        "samples_per_second": samples / train_seconds, "peak_memory_mb": peak_memory_mb(device), "threads": torch.get_num_threads()}
    if adapters:
        log(heterolora.grid(adapters))
    log(f"result  {args.task} {args.method} seed {args.seed} | " + " | ".join(f"{k} {v:.4f}" for k, v in evaluations[-1].items())
        + f" | best {metric} {result['best']:.4f}")
    log(f"params  active {result['params_active']:,} | ever trained {result['params_ever_trained']:,} | stored {result['params_stored']:,} | head {params_head:,}")
    log(f"time    training {train_seconds:.1f} s | search {search_seconds:.1f} s | {result['samples_per_second']:.1f} samples/s | peak memory {result['peak_memory_mb'] or 0:.0f} MB")
    if args.out:
        write(os.path.join(args.out, "adapters.pt"), lambda path: torch.save(trained_state(model, adapters), path))
        write_json(os.path.join(args.out, "result.json"), result)
    return result


def trained_state(model, adapters):
    """What a run has learned, and no more: the ranks, the active rows of A and columns of B, the head; for full the encoder"""
    on = {name: lora for name, lora in adapters.items() if lora.rank}
    state = {"ranks": {name: lora.rank for name, lora in adapters.items()}, "head": model.head.state_dict(),
             "adapters": {name: {"A": lora.A[:lora.rank].detach().clone(), "B": lora.B[:, :lora.rank].detach().clone(), "scale": lora.scale} for name, lora in on.items()}}
    if any(p.requires_grad for p in model.encoder.parameters()) and not adapters:
        state["encoder"] = model.encoder.state_dict()
    return state


def main(argv=None):
    """Run the command line -> exit status: 0, 1 for a fault during the run, 2 for bad input"""
    try:
        train(parse_args(argv))
    except UsageError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
