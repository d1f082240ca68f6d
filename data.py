"""Text in, batches out: tasks and their files, metrics, and batches of examples of similar length.

    task = load_task("mrpc", "path/to/glue")        # Task(train, dev, labels, metric)
    task = load_task("path/to/folder")              # your own train.tsv and dev.tsv
    tokenizer = load_tokenizer("path/to/checkpoint")
    split = Split(task.train, tokenizer, max_length=128, device="cpu")
    for indices in batches(split.lengths, 16, generator):
        inputs, labels = split[indices]             # inputs: three tensors (B, T), labels (B,)

An example is a tuple (text, second text or None, number of its label).
"""

import dataclasses
import math
import os
from typing import Callable

import numpy as np
import torch


class InputError(ValueError):
    """Input that cannot work: one line that says what was given, what is allowed, what to do."""

    def __init__(self, message):
        if len(message) > 1000:
            message = f"{message[:600]} [...] {message[-300:]}"
        # A line end, say, is shown as \n.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


# ------------------------------------------------------------------------------------- metrics
# A metric turns two lists of class numbers into {name: value}, the main one first. 1 is positive.


def accuracy(predictions, labels):
    """Return the share of predictions that are right."""
    return {"accuracy": float(np.mean(np.equal(predictions, labels)))}


def f1(predictions, labels):
    """Return F1, the harmonic mean of precision and recall. It is 0 where undefined."""
    predicted = np.equal(predictions, 1)
    true = np.equal(labels, 1)
    return {"f1": float(2 * (predicted & true).sum() / max(predicted.sum() + true.sum(), 1))}


def accuracy_and_f1(predictions, labels):
    """Return both: GLUE's metrics of MRPC and QQP."""
    return accuracy(predictions, labels) | f1(predictions, labels)


def matthews(predictions, labels):
    """Return the Matthews correlation, Pearson's of two classes. It is 0 where undefined."""
    if np.std(predictions) == 0 or np.std(labels) == 0:
        return {"matthews": 0.0}
    return {"matthews": float(np.corrcoef(predictions, labels)[0, 1])}


def which_are_right(predictions, labels):
    """Return a bit for every example, 1 if it is right, as hexadecimal digits."""
    return np.packbits(np.equal(predictions, labels)).tobytes().hex()


METRICS = {"f1": f1, "matthews": matthews}  # of two classes, as --metric names them


# --------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass
class Task:
    """A classification task: two lists of examples, the names of the classes, and a metric."""

    train: list
    dev: list
    labels: tuple
    metric: Callable
    dev_name: str = "dev"  # as the log names it


@dataclasses.dataclass
class GlueFormat:
    """Where a GLUE task lies, and its columns; header: where no first line names them (CoLA)."""

    folder: str
    texts: tuple
    label: str
    labels: tuple
    metric: Callable
    dev_file: str = "dev.tsv"
    header: tuple | None = None


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
PAIR = ("sentence1", "sentence2")
COLA = ("source", "label", "star", "sentence")
GLUE = {
    "mrpc": GlueFormat("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, accuracy_and_f1),
    "rte": GlueFormat("RTE", PAIR, "label", ENTAILMENT, accuracy),
    "sst2": GlueFormat("SST-2", ("sentence",), "label", BINARY, accuracy),
    "cola": GlueFormat("CoLA", ("sentence",), "label", BINARY, matthews, header=COLA),
    "qnli": GlueFormat("QNLI", ("question", "sentence"), "label", ENTAILMENT, accuracy),
    "qqp": GlueFormat("QQP", ("question1", "question2"), "is_duplicate", BINARY, accuracy_and_f1),
    "mnli": GlueFormat("MNLI", PAIR, "gold_label", MNLI, accuracy, "dev_matched.tsv"),
}
BUILT_IN = ("paraphrase", "entailment", "sentiment", "acceptability")  # extras/language.py


def load_task(name, data_dir=None):
    """Return a built-in task, a GLUE task from data_dir, or one of your own from the folder `name`.

    data_dir holds MRPC/train.tsv and so on; without it GLUE is downloaded into the cache. A folder
    of your own holds train.tsv and dev.tsv (extras/tables.py). Raises InputError.
    """
    if name in (*BUILT_IN, *GLUE) and os.path.isfile(os.path.join(name, "train.tsv")):
        raise InputError(f"{name} is a task, and a folder here: say ./{name}, or go elsewhere")
    if name in BUILT_IN:
        from extras.language import make_task

        return make_task(name)
    from extras.tables import load_glue, load_own

    if name in GLUE:
        return load_glue(name, data_dir)
    if os.path.isdir(name):
        return load_own(name)
    known = ", ".join((*BUILT_IN, *GLUE))
    raise InputError(f"no task {name!r}: want a folder that holds train.tsv, or one of {known}")


def read_text(path):
    """Return the text of a UTF-8 file. Raises InputError with the place of what is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None


def hold_out(task, share):
    """Return a task whose dev set is a share of its training set, and is not trained on.

    Examples with the same texts stay on one side. The split does not depend on the run's seed.
    Raises InputError if nothing is left to train on.
    """
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = max(1, round(share * len(order)))
    held_texts = {task.train[i][:2] for i in order[:wanted]}
    train = []
    dev = []
    for example in task.train:
        part = dev if example[:2] in held_texts else train
        part.append(example)
    if not train:
        reason = "nothing is left to train on: give dev.tsv, or a smaller --holdout"
        raise InputError(f"{share} of {len(order)} examples held out: {reason}")
    return Task(train, dev, task.labels, task.metric, "held out")


# ------------------------------------------------------------------------------------- batches


def load_tokenizer(folder):
    """Return the tokenizer of a Hugging Face folder. Raises InputError.

    tokenizer.encode(text, pair=None, max_length=None) gives (input_ids, token_type_ids).
    """
    from extras.tokenizers import load_tokenizer

    return load_tokenizer(folder)


def pad(sequences, pad_id, length=0):
    """Turn a list of (input_ids, token_type_ids) into three tensors (B, T), T at least `length`.

    They are input_ids, attention_mask (1 for real tokens) and token_type_ids.
    """
    B = len(sequences)
    T = max(length, max(len(ids) for ids, _ in sequences))
    input_ids = torch.full((B, T), pad_id)
    attention_mask = torch.zeros(B, T, dtype=torch.long)
    token_type_ids = torch.zeros(B, T, dtype=torch.long)
    for row, (ids, types) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        token_type_ids[row, : len(ids)] = torch.tensor(types)
    return input_ids, attention_mask, token_type_ids


def batches(lengths, batch_size, generator=None):
    """Return one epoch of batches, as lists of indices into `lengths`.

    With a generator: shuffle, sort by length within groups of 50 batches, and shuffle the batches,
    so that there is little padding. Without one (evaluation): sort everything by length.
    """
    n = len(lengths)
    order = list(range(n))
    group = max(n, 1)
    if generator is not None:
        order = torch.randperm(n, generator=generator).tolist()
        group = 50 * batch_size
    by_length = []
    for start in range(0, n, group):
        by_length += sorted(order[start : start + group], key=lengths.__getitem__)
    chunks = [by_length[start : start + batch_size] for start in range(0, n, batch_size)]
    if generator is not None:
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=generator)]
    return chunks


class Split:
    """The tokenized examples of one split. split[list of indices] is a batch on the device."""

    def __init__(self, examples, tokenizer, max_length, device, precision="float32"):
        self.encoded = []  # (input_ids, token_type_ids) of every example
        self.lengths = []
        self.labels = []
        for text, pair, label in examples:
            ids, types = tokenizer.encode(text, pair, max_length)
            self.encoded.append((ids, types))
            self.lengths.append(len(ids))
            self.labels.append(label)
        self.pad_id = tokenizer.pad_id
        self.max_length = max_length
        self.device = torch.device(device)
        self.multiple = 8 if precision == "bfloat16" else 1  # in bfloat16 each new T costs time

    def __getitem__(self, indices):
        """Return (input_ids, attention_mask, token_type_ids), each (B, T), and labels (B,)."""
        longest = max(self.lengths[i] for i in indices)
        T = min(math.ceil(longest / self.multiple) * self.multiple, self.max_length)
        inputs = pad([self.encoded[i] for i in indices], self.pad_id, T)
        labels = torch.tensor([self.labels[i] for i in indices])
        is_cuda = self.device.type == "cuda"  # a copy to it may overlap the step before
        *inputs, labels = [x.to(self.device, non_blocking=is_cuda) for x in (*inputs, labels)]
        return tuple(inputs), labels

    def sample(self, count, batch_size, generator):
        """Return `count` random batches, drawn with replacement."""
        drawn = torch.randint(len(self.labels), (count * batch_size,), generator=generator).tolist()
        lengths = [self.lengths[i] for i in drawn]
        sampled = []
        for chunk in batches(lengths, batch_size, generator):
            sampled.append(self[[drawn[i] for i in chunk]])
        return sampled
