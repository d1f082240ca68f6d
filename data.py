"""Text in, batches out: GLUE tasks, their metrics, and batches of examples of similar length.

    task = load_task("mrpc", "path/to/glue")        # Task(train, dev, labels, metric)
    tokenizer = load_tokenizer("path/to/checkpoint")
    split = Split(task.train, tokenizer, max_length=128, device="cpu")
    for indices in batches(split.lengths, 16, generator):
        inputs, labels = split[indices]             # inputs: three tensors (B, T), labels (B,)

An example is a tuple (text, second text or None, number of its label).
"""

import dataclasses
import math
import os
import zlib
from typing import Callable

import numpy as np
import torch


class InputError(ValueError):
    """Input that cannot work. The message says what was given, what is allowed, and what to do."""


# ------------------------------------------------------------------------------------- metrics
# Each takes two lists of class numbers and gives {name: value}, the main metric first.


def accuracy(predictions, labels):
    """Return the share of predictions that are right."""
    return {"accuracy": float(np.mean(np.equal(predictions, labels)))}


def accuracy_and_f1(predictions, labels):
    """Return accuracy, and F1 of class 1 (0 where undefined): GLUE's metrics of MRPC and QQP."""
    predicted = np.asarray(predictions) == 1
    true = np.asarray(labels) == 1
    hits = (predicted & true).sum()
    f1 = 2 * hits / max(predicted.sum() + true.sum(), 1)
    return accuracy(predictions, labels) | {"f1": float(f1)}


def matthews(predictions, labels):
    """Return the Matthews correlation, which GLUE reports for CoLA. It is 0 where undefined."""
    predicted = np.asarray(predictions) == 1
    true = np.asarray(labels) == 1
    tp = int((predicted & true).sum())
    tn = int((~predicted & ~true).sum())
    fp = int((predicted & ~true).sum())
    fn = int((~predicted & true).sum())
    scale = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {"matthews": (tp * tn - fp * fn) / (scale or 1.0)}


# --------------------------------------------------------------------------------------- tasks


@dataclasses.dataclass
class Task:
    """A classification task: two lists of examples, the names of the classes, and a metric."""

    train: list
    dev: list
    labels: tuple
    metric: Callable


@dataclasses.dataclass
class GlueFormat:
    """Where a GLUE task lies and how its files are read.

    Columns are names from the header line, or numbers where the file has no header (CoLA).
    """

    folder: str
    texts: tuple
    label: str | int
    labels: tuple
    metric: Callable
    dev_file: str = "dev.tsv"


BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    "mrpc": GlueFormat("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, accuracy_and_f1),
    "rte": GlueFormat("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, accuracy),
    "sst2": GlueFormat("SST-2", ("sentence",), "label", BINARY, accuracy),
    "cola": GlueFormat("CoLA", (3,), 1, BINARY, matthews),
    "qnli": GlueFormat("QNLI", ("question", "sentence"), "label", ENTAILMENT, accuracy),
    "qqp": GlueFormat("QQP", ("question1", "question2"), "is_duplicate", BINARY, accuracy_and_f1),
    "mnli": GlueFormat(
        "MNLI",
        ("sentence1", "sentence2"),
        "gold_label",
        ("entailment", "neutral", "contradiction"),
        accuracy,
        "dev_matched.tsv",
    ),
}
BUILT_IN = ("paraphrase", "entailment", "sentiment", "acceptability")  # extras/language.py


def load_task(name, data_dir=None):
    """Return a built-in task, or a GLUE task from the folder data_dir.

    data_dir holds MRPC/train.tsv and so on. Without it the task is downloaded into the cache.
    Raises InputError for an unknown name, a missing folder, or a file that cannot be read.
    """
    if name in BUILT_IN:
        from extras.language import make_task

        return make_task(name)
    if name not in GLUE:
        raise InputError(f"no task {name!r}; there are: {', '.join((*BUILT_IN, *GLUE))}")
    form = GLUE[name]
    if data_dir is None:
        from extras.downloads import glue_folder

        data_dir = glue_folder(name)
    folder = os.path.join(data_dir, form.folder)
    if not os.path.isdir(folder):
        raise InputError(
            f"{data_dir} has no folder {form.folder} in it: "
            f"--data-dir is the folder above {form.folder}/train.tsv"
        )
    train = read_glue(os.path.join(folder, "train.tsv"), form)
    dev = read_glue(os.path.join(folder, form.dev_file), form)
    return Task(train, dev, form.labels, form.metric)


def read_text(path):
    """Return the text of a UTF-8 file. Raises InputError with the place of what is not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8: save it as UTF-8") from None


def read_glue(path, form):
    """Return the examples of one GLUE file. Raises InputError with the line that is wrong.

    Only tabs and line ends are syntax. Quotes are ordinary characters: MRPC has unbalanced ones.
    """
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    if lines[-1] == "":
        lines.pop()
    if not lines:
        raise InputError(f"{path}: the file is empty")

    columns = [*form.texts, form.label]
    first_line = 1
    width = max(columns) + 1 if isinstance(form.label, int) else None
    if width is None:  # the file has a header
        header = lines.pop(0).split("\t")
        missing = [column for column in columns if column not in header]
        if missing:
            raise InputError(
                f"{path}, line 1: no column {', '.join(missing)}; "
                f"there are, separated by tabs: {', '.join(header)}"
            )
        columns = [header.index(column) for column in columns]
        width = len(header)
        first_line = 2

    examples = []
    for number, line in enumerate(lines, first_line):
        cells = line.split("\t")
        if "\0" in line:
            raise InputError(f"{path}, line {number}: a NUL byte; is the file damaged, or UTF-16?")
        if len(cells) != width:
            raise InputError(f"{path}, line {number}: {len(cells)} columns instead of {width}")
        *texts, label = [cells[column] for column in columns]
        if label not in form.labels:
            raise InputError(
                f"{path}, line {number}: label {label!r} is not one of {', '.join(form.labels)}"
            )
        pair = texts[1] if len(texts) == 2 else None
        examples.append((texts[0], pair, form.labels.index(label)))
    if not examples:
        raise InputError(f"{path}: no examples in it")
    return examples


def hold_out(task, share):
    """Return a task whose dev set is a share of its training set, and is not trained on.

    Examples with the same texts stay on one side. The split does not depend on the run's seed.
    Raises InputError if nothing is left to train on.
    """
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = max(1, round(share * len(order)))
    held_texts = {task.train[i][:2] for i in order[:wanted]}
    train = [example for example in task.train if example[:2] not in held_texts]
    dev = [example for example in task.train if example[:2] in held_texts]
    if not train:
        raise InputError(f"--holdout {share} of {len(order)} examples leaves nothing to train on")
    return Task(train, dev, task.labels, task.metric)


# ------------------------------------------------------------------------------------- batches


def load_tokenizer(folder):
    """Return the tokenizer of a Hugging Face folder of a BERT or RoBERTa.

    tokenizer.encode(text, pair=None, max_length=None) gives (input_ids, token_type_ids).
    Raises InputError if there is no vocabulary, or a damaged one.
    """
    from extras.tokenizers import load_tokenizer

    return load_tokenizer(folder)


def pad(sequences, pad_id, length=0):
    """Turn a list of (input_ids, token_type_ids) into three tensors (B, T).

    They are input_ids, attention_mask (1 for real tokens) and token_type_ids. T is `length`, or
    the longest sequence if that is longer.
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

    With a generator: shuffle, sort by length within groups of 50 batches, and shuffle the batches.
    So a batch has little padding, and its company changes every epoch.
    Without one (evaluation): sort everything by length.
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

    def __init__(self, examples, tokenizer, max_length, device):
        self.encoded = [tokenizer.encode(text, pair, max_length) for text, pair, _ in examples]
        self.lengths = [len(ids) for ids, _ in self.encoded]
        self.labels = [label for _, _, label in examples]
        self.pad_id = tokenizer.pad_id
        self.max_length = max_length
        self.device = device

    def __getitem__(self, indices):
        """Return (input_ids, attention_mask, token_type_ids), each (B, T), and labels (B,)."""
        # The libraries beneath torch keep code for every shape: round T up to a multiple of 8.
        longest = max(self.lengths[i] for i in indices)
        T = min(math.ceil(longest / 8) * 8, self.max_length)
        inputs = pad([self.encoded[i] for i in indices], self.pad_id, T)
        labels = torch.tensor([self.labels[i] for i in indices], device=self.device)
        return tuple(tensor.to(self.device) for tensor in inputs), labels

    def sample(self, count, batch_size, generator):
        """Return `count` random batches, drawn with replacement."""
        n = count * batch_size
        drawn = torch.randint(len(self.labels), (n,), generator=generator).tolist()
        lengths = [self.lengths[i] for i in drawn]
        sampled = []
        for chunk in batches(lengths, batch_size, generator):
            sampled.append(self[[drawn[i] for i in chunk]])
        return sampled

    def checksum(self):
        """Return a number that tells whether a resumed run has the data that it began with."""
        total = 0
        for encoded, label in zip(self.encoded, self.labels, strict=True):
            total = zlib.crc32(repr((encoded, label)).encode(), total)
        return total
