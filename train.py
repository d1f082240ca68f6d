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
        ("--pool", str, "combined", ("combined", "separated"), "LoRA and shortcuts in one list, or each with its share"),
        ("--probe-batches", whole, 8, "N", "training batches that a scoring sees"),
        ("--realloc-every", positive, 0.2, "E", "epochs between reallocations (dynamic)"),
        ("--head-warmup", number(int, 0), 100, "N", "steps of head-only training before the first scoring"))
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
        ("--out", str, None, "DIR", "a new folder for config.json, log.jsonl, result.json and adapters.pt"))
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", *(sys.argv if argv is None else ["train.py", *argv])])
    return args


# ------------------------------------------------------------------------------------------------ input and output

def built_in_config():
    """EncoderConfig of the small encoder"""
    return encoders.EncoderConfig(vocab_size=len(data.built_in_tokenizer().vocab), **BUILT_IN_ENCODER)


def built_in_encoder(log):
    """The small encoder of the built-in language, pre-trained once and then taken from the cache -> Encoder, Tokenizer"""
    tokenizer, config = data.built_in_tokenizer(), built_in_config()
    everything = repr((config, BUILT_IN_PRETRAINING, BUILT_IN_CORPUS, inspect.getsource(data), inspect.getsource(encoders), torch.__version__))
    cache = os.environ.get("HETEROLORA_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "heterolora")
    folder = os.path.join(cache, "encoder-" + hashlib.sha256(everything.encode()).hexdigest()[:16])
    if not os.path.isdir(folder):
        os.makedirs(cache, exist_ok=True)  # now rather than after a minute's work
        log(f"pre-training the built-in encoder, once, into {folder}")
        sequences = [tokenizer.encode(*texts) for texts in data.built_in_corpus(BUILT_IN_CORPUS)]
        first_word = min(i for token, i in tokenizer.vocab.items() if token.isalpha() and len(token) > 1)
        encoder = encoders.pretrain(config, sequences, tokenizer.mask_id, first_word, log=log, **BUILT_IN_PRETRAINING)
        encoders.save_pretrained(encoder, folder, [("vocab.txt", "".join(token + "\n" for token in tokenizer.vocab))])
    return encoders.load_pretrained(folder, log), data.load_tokenizer(folder)


def write(path, save):
    """Call save(temporary path), then rename: the file at `path` is whole, or not there."""
    save(path + ".unfinished")
    os.replace(path + ".unfinished", path)


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
    built_in = args.model == "built-in"
    if built_in and args.task in data.GLUE:
        raise UsageError(f"task {args.task} needs --model DIR, a Hugging Face folder: the built-in encoder knows only its own language")
    task = data.load_task(args.task, args.data_dir)
    if args.train_limit:
        chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:args.train_limit].sort().values
        task.train = [task.train[i] for i in chosen.tolist()]
    if built_in:
        adapt(args, encoders.Encoder(built_in_config()))  # a rehearsal: bad flags show before a minute of pre-training
    encoder, tokenizer = built_in_encoder(log) if built_in else (encoders.load_pretrained(args.model, log), data.load_tokenizer(args.model))
    if max(tokenizer.vocab.values()) >= encoder.config.vocab_size:
        raise UsageError(f"{args.model}: the tokenizer has ids up to {max(tokenizer.vocab.values())}, the encoder only {encoder.config.vocab_size} words")
    model = encoders.Classifier(encoder, task.num_labels, args.pooling, generator(args.seed, "head")).to(device)
    adapters, args.budget = adapt(args, encoder)
    args.max_length = min(args.max_length, encoder.max_length)
    args.epochs = args.epochs or EPOCHS.get(args.task, 4)
    args.batch_size = args.batch_size or (32 if built_in else 16)
    args.lr = args.lr or ((3e-4 if built_in else 5e-5) if args.method == "full" else 2e-3 if built_in else 1e-3)
    return device, task, tokenizer, model, adapters


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
    return adapters, heterolora.parse_budget(args.budget or ("100%" if args.method == "lora" else "25%"), heterolora.size(adapters))


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
        write_json(os.path.join(args.out, "config.json"), {"command": args.command, **config, "torch": torch.__version__})
    return log, *prepared


def train(args):
    """One whole run of parse_args(...) -> result, the dict that result.json holds

    Raises UsageError for bad input before any training, FloatingPointError if the loss stops being finite.
    """
    log, device, task, tokenizer, model, adapters = begin(args)
    train_set, dev_set = (Batches(split, tokenizer, args.max_length, device) for split in (task.train, task.dev))
    steps_per_epoch = math.ceil(len(train_set.labels) / args.batch_size)
    total = min(math.ceil(args.epochs * steps_per_epoch), args.max_steps or math.inf)
    realloc_every = max(1, round(args.realloc_every * steps_per_epoch))
    optimizer, schedule = make_optimizer(args, model, total)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    encoder_size = sum(p.numel() for name, p in model.encoder.named_parameters() if ".lora." not in name)
    log(f"model   encoder {encoder_size:,} | head {count(model.head):,} | search space {heterolora.size(adapters):,} in {len(adapters)} modules")
    log(f"data    {args.task}: {len(train_set.labels):,} train, {len(dev_set.labels):,} dev | {total} steps, {steps_per_epoch} an epoch")

    search = None
    if args.method == "lora":  # the same rank for every target; shortcuts count in the search space, and stay off
        costs = {name: [lora.price] * lora.max_rank for name, lora in adapters.items() if not lora.shortcut}
        heterolora.set_ranks(adapters, heterolora.uniform({}, costs, args.budget, None))
        log(f"uniform {heterolora.spent(adapters):,}/{args.budget:,} params")
    elif adapters:
        search = heterolora.HeteroLoRA(model, adapters, args.budget, loss_fn, args.proxy, args.allocator, args.pool, args.seed)
        heterolora.set_ranks(adapters, {})
    data_order, probing, heading = (generator(args.seed, purpose) for purpose in ("data order", "probing", "head warm-up"))
    model.train()
    torch.manual_seed(args.seed)  # dropout
    train_seconds = search_seconds = running = 0.0
    evaluations, queue, samples = [], [], 0
    advice = f"try a lower --lr (now {args.lr:g}) or --head-lr (now {args.head_lr:g})"
    for step in range(1, total + 1):
        if search and (step == 1 or args.method == "dynamic" and (step - 1) % realloc_every == 0):
            start = time.perf_counter()
            if step == 1:
                head = {name: value.clone() for name, value in model.head.state_dict().items()}
                warm_up_head(model, train_set.sample(args.head_warmup, args.batch_size, heading), args.head_lr)
            try:
                entry = search.reallocate(train_set.sample(args.probe_batches, args.batch_size, probing), step - 1)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} (step {step}): {advice}") from None
            if step == 1:
                model.head.load_state_dict(head)  # training starts from the same head with and without a search
            search_seconds += time.perf_counter() - start
            log_reallocation(log, entry, args.budget)
        if step == 1 and adapters:
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
            raise FloatingPointError(f"the loss is {value} at step {step}: {advice}")
        train_seconds += time.perf_counter() - start
        samples, running = samples + len(batch[1]), running + value

        if step % args.log_every == 0 or step == total:
            mean, running = running / ((step - 1) % args.log_every + 1), 0.0
            log(f"step {step:6d}/{total} | loss {mean:.4f} | {1000 * train_seconds / step:.1f} ms/step | {samples / train_seconds:.1f} samples/s",
                kind="step", step=step, loss=mean, lr=schedule.get_last_lr()[0], train_seconds=train_seconds)
        if step % steps_per_epoch == 0 or step == total:
            evaluations.append(evaluate(model, dev_set, task.metric))
            if not math.isfinite(evaluations[-1]["loss"]):
                raise FloatingPointError(f"the loss on the dev set is {evaluations[-1]['loss']} after step {step}: {advice}")
            log(f"eval {step:6d}/{total} | {in_words(evaluations[-1])}", kind="eval", step=step, **evaluations[-1])

    result = summarise(args, log, model, adapters, search, evaluations) | {
        "steps": total, "train_seconds": train_seconds, "search_seconds": search_seconds, "samples_per_second": samples / train_seconds,
        "peak_memory_mb": peak_memory_mb(device), "threads": torch.get_num_threads()}
    log(f"time    training {train_seconds:.1f} s | search {search_seconds:.1f} s | {result['samples_per_second']:.1f} samples/s | "
        f"peak memory {result['peak_memory_mb'] or 0:.0f} MB")
    if args.out:
        write(os.path.join(args.out, "adapters.pt"), lambda path: torch.save(trained_state(model, adapters), path))
        write_json(os.path.join(args.out, "result.json"), result)
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
        log(heterolora.grid(adapters))
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
    """One line for an entry of HeteroLoRA.history: how much is on, and after the first what came and what went"""
    changes = [sign + name.removeprefix("layers.") for sign, names in (("+", entry["on"]), ("-", entry["off"])) for name in names]
    log(f"alloc @ step {entry['step']} | on {sum(map(bool, entry['ranks'].values()))}/{len(entry['ranks'])} modules | {entry['parameters']:,}/{budget:,} params"
        + ("" if entry["jaccard"] is None else f" | jaccard {entry['jaccard']:.2f} | {' '.join(changes) or ('other ranks' if entry['changed'] else 'no change')}"), kind="alloc", **entry)


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
