"""Text in, batches out: BERT's and RoBERTa's tokenizers, GLUE as it lies on disk or on the net, and a small built-in language.

`load_tokenizer(folder)` gives the ids that Hugging Face's fast tokenizers give; `load_task(name, data_dir)` gives a
Task of (text, pair or None, label) examples; `batches` puts examples of similar length together.
"""
import dataclasses
import functools
import itertools
import math
import os
import random
import re
import unicodedata
import zipfile
import zlib
from typing import Callable

import numpy as np
import torch

import files


class DataError(files.InputError):
    """Data that cannot be used; the message names the file, and the line where there is one."""


# ------------------------------------------------------------------------------------------------ tokenizers

class Tokenizer:
    """What WordPiece and BPE share: special tokens, pairs, truncation. Subclasses give pieces(text) -> list of ids."""

    def __init__(self, vocab, cls, sep, pad, unk, mask):
        missing = [t for t in (cls, sep, pad, unk, mask) if t not in vocab]
        if missing:
            raise DataError(f"the vocabulary has no {' '.join(missing)}")
        wrong = [token for token, i in vocab.items() if type(i) is not int or not 0 <= i < 2**31]
        if wrong or len(set(vocab.values())) < len(vocab):
            raise DataError(f"the id of {wrong[0]!r} is {vocab[wrong[0]]!r}, no number from 0 on" if wrong else "the vocabulary gives two tokens the same id")
        self.vocab, self.unk_id, self.mask_id, self.pad_id = vocab, vocab[unk], vocab[mask], vocab[pad]
        self.cls_id, self.sep_id = vocab[cls], vocab[sep]
        self.specials = {t: vocab[t] for t in (cls, sep, pad, unk, mask)}
        # RoBERTa's <mask> takes the white space before it along
        self.split = re.compile("(" + "|".join((r"\s*" if t == "<mask>" else "") + re.escape(t) for t in self.specials) + ")")

    def ids(self, text):
        """str -> ids without the frame. A special token written out in the text is that token, as in the reference."""
        ids = []
        for part in self.split.split(text):
            special = self.specials.get(part.lstrip() if part.endswith("<mask>") else part)
            ids += self.pieces(part) if special is None else [special]
        return ids

    def encode(self, text, pair=None, max_length=None):
        """str, str or None -> (input_ids, token_type_ids), framed by special tokens, at most max_length of them.

        Truncation is longest-first: what is too much is cut from the end of the longer text until both are equal.
        """
        a, b = self.ids(text), None if pair is None else self.ids(pair)
        frame = 2 if b is None else 2 + self.middle
        if max_length is not None:
            room = max_length - frame
            if room < 0:
                raise DataError(f"max_length {max_length} leaves no room for the {frame} special tokens")
            if b is None:
                a = a[:room]
            elif len(a) + len(b) > room:
                short = min(len(a), len(b))
                long = max(short, room - short)
                if short + long > room:
                    short, long = room // 2, room - room // 2
                a, b = (a[:short], b[:long]) if len(a) <= len(b) else (a[:long], b[:short])
        first = [self.cls_id, *a, self.sep_id]
        if b is None:
            return first, [0] * len(first)
        second = [self.sep_id] * (self.middle - 1) + [*b, self.sep_id]
        return first + second, [0] * len(first) + [self.second_type] * len(second)


def _is_control(c):
    return c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs")


def _is_punctuation(c):
    return unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~"  # BERT counts all ASCII symbols


def _is_cjk(c):
    return any(low <= ord(c) <= high for low, high in (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B920, 0x2CEAF),
        (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


class WordPiece(Tokenizer):
    """BERT's: clean, split on white space, punctuation and CJK characters, then the longest known pieces from the left.

    Marks and punctuation that came with Unicode 9 and later are classed as Python does; the reference has older tables.
    """
    middle, second_type = 1, 1

    def __init__(self, vocab, lower=True, strip_accents=None, split_cjk=True):
        super().__init__(vocab, "[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
        self.lower, self.split_cjk = lower, split_cjk
        self.strip_accents = lower if strip_accents is None else strip_accents
        self.word = functools.lru_cache(maxsize=100_000)(self._word)

    # all white space but the control characters among it, which BERT deletes instead
    space = re.compile(r"[\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")

    def pieces(self, text):
        """str -> ids"""
        return [i for word in self.space.split(text) for i in self.word(word)]

    def _word(self, word):
        """What stands between white space -> ids"""
        word = "".join(f" {c} " if self.split_cjk and _is_cjk(c) else c for c in word if c not in "\0\ufffd" and not _is_control(c))
        if self.strip_accents:
            word = "".join(c for c in unicodedata.normalize("NFD", word) if unicodedata.category(c) != "Mn")
        if self.lower:  # letter by letter: str.lower would turn a final sigma into another letter
            word = "".join(c.lower() for c in word)
        return [i for part in "".join(f" {c} " if _is_punctuation(c) else c for c in word).split() for i in self._longest_pieces(part)]

    def _longest_pieces(self, word):
        ids, start = [], 0
        while start < len(word) <= 100:  # BERT gives up on longer words
            for end in range(len(word), start, -1):
                piece = self.vocab.get(word[start:end] if start == 0 else "##" + word[start:end])
                if piece is not None:
                    break
            else:
                return [self.unk_id]
            ids.append(piece)
            start = end
        return ids or [self.unk_id]


class _Kind(dict):
    """Code point -> a stand-in that Python's re can class: other letters a, numbers 0, other white space tab, the rest !"""

    def __missing__(self, code):
        c = chr(code)
        kind = unicodedata.category(c)[0]
        self[code] = c if code < 128 and (kind == "L" or c in " '") else "a" if kind == "L" else "0" if kind == "N" else "\t" if c.isspace() and not 28 <= code < 32 else "!"
        return self[code]


class BPE(Tokenizer):
    """RoBERTa's and GPT-2's byte-level byte-pair encoding (Sennrich et al. 2016 on bytes)."""
    middle, second_type = 2, 0
    # the published pattern, 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, on stand-ins
    pattern = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?0+| ?[^\sA-Za-z0]+|\s+(?!\S)|\s+")

    def __init__(self, vocab, merges, add_prefix_space=False):
        super().__init__(vocab, "<s>", "</s>", "<pad>", "<unk>", "<mask>")
        self.ranks, self.add_prefix_space, self.kind = {pair: i for i, pair in enumerate(merges)}, add_prefix_space, _Kind()
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves,
        rest = [b for b in range(256) if b not in printable]  # the others for the characters from 256 on
        self.letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
        self.word = functools.lru_cache(maxsize=100_000)(self._word)

    def pieces(self, text):
        """str -> ids"""
        if self.add_prefix_space and text and not text[0].isspace():
            text = " " + text
        return [i for match in self.pattern.finditer(text.translate(self.kind)) for i in self.word(text[match.start():match.end()])]

    def _word(self, word):
        parts = [self.letter[b] for b in word.encode("utf-8", "replace")]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:]), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i:i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 1 + both
            parts = merged
        return [self.vocab.get(part, self.unk_id) for part in parts]


def _read(path):
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            return file.read()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as UTF-8, byte {error.start} is {error.object[error.start]:#x}: save it as UTF-8") from None


def load_tokenizer(folder):
    """A folder with vocab.txt (BERT) or vocab.json and merges.txt (RoBERTa) -> Tokenizer. Raises DataError."""
    folder = os.fspath(folder)
    path = functools.partial(os.path.join, folder)
    try:
        options = files.read_json(path("tokenizer_config.json")) if os.path.isfile(path("tokenizer_config.json")) else {}
        if os.path.isfile(path("vocab.txt")):
            lines, vocab = [line.rstrip("\r") for line in _read(path("vocab.txt")).split("\n")], {}
            for i, token in enumerate(lines[:-1] if lines[-1] == "" else lines):
                if vocab.setdefault(token, i) != i:
                    raise DataError(f"{path('vocab.txt')}, line {i + 1}: {token!r} is in line {vocab[token] + 1} already")
            return WordPiece(vocab, options.get("do_lower_case", True), options.get("strip_accents"), options.get("tokenize_chinese_chars", True))
        if os.path.isfile(path("vocab.json")) and os.path.isfile(path("merges.txt")):
            lines = _read(path("merges.txt")).split("\n")
            merges = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip("\r") and not line.startswith("#version")]
            wrong = next((merge for merge in merges if len(merge) != 2), None)
            if wrong:
                raise DataError(f"{path('merges.txt')}: {' '.join(wrong)!r} is not a pair")
            return BPE(files.read_json(path("vocab.json")), merges, options.get("add_prefix_space", False))
    except files.InputError as error:
        raise DataError(f"{folder}: {error}" if folder not in str(error) else str(error)) from None
    raise DataError(f"{folder}: no tokenizer here: neither vocab.txt nor vocab.json with merges.txt (tokenizer.json is not read)")


# ------------------------------------------------------------------------------------------------ tasks and metrics

def accuracy(predictions, labels):
    """two lists of class numbers -> {"accuracy"}"""
    return {"accuracy": float(np.mean(np.equal(predictions, labels)))}


def accuracy_and_f1(predictions, labels):
    """-> {"accuracy", "f1"}, F1 of class 1, as GLUE reports MRPC and QQP; 0 where it is undefined"""
    p, y = np.asarray(predictions) == 1, np.asarray(labels) == 1
    return accuracy(predictions, labels) | {"f1": float(2 * (p & y).sum() / max((p.sum() + y.sum()), 1))}


def matthews(predictions, labels):
    """-> {"matthews"}, the correlation that GLUE reports for CoLA; 0 where it is undefined"""
    p, y = np.asarray(predictions) == 1, np.asarray(labels) == 1
    tp, tn, fp, fn = (int(m.sum()) for m in (p & y, ~p & ~y, p & ~y, ~p & y))
    return {"matthews": (tp * tn - fp * fn) / (math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) or 1.0)}


@dataclasses.dataclass
class Task:
    """train and dev: lists of (text, pair or None, label). metric(predictions, labels) -> {name: value}, the main one first."""
    train: list
    dev: list
    num_labels: int
    metric: Callable
    labels: tuple = ("0", "1")  # what the classes are called


# folder, columns of text, column of the label (by name, or by number where the file has no header), labels, metric
GLUE = {
    "mrpc": ("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), accuracy_and_f1),
    "rte": ("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment"), accuracy),
    "sst2": ("SST-2", ("sentence",), "label", ("0", "1"), accuracy),
    "cola": ("CoLA", (3,), 1, ("0", "1"), matthews),
    "qnli": ("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment"), accuracy),
    "qqp": ("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), accuracy_and_f1),
    "mnli": ("MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"), accuracy),
}


def read_glue(path, texts, label, labels):
    """One GLUE file -> examples. Tabs and line ends are the only syntax: quotes in it are just text. Raises DataError."""
    lines = [line.removesuffix("\r") for line in _read(path).split("\n")]
    if lines[-1] == "":
        lines.pop()
    header = None if isinstance(label, int) else lines.pop(0).split("\t") if lines else []
    missing = [c for c in (*texts, label) if header is not None and c not in header]
    if missing:
        raise DataError(f"{path}, line 1: no column {', '.join(missing)}; there are, separated by tabs: {', '.join(header) or 'none, the file is empty'}")
    *texts, label = [c if header is None else header.index(c) for c in (*texts, label)]
    width, examples = max(*texts, label) + 1 if header is None else len(header), []
    for number, line in enumerate(lines, 1 if header is None else 2):
        fields = line.split("\t")
        if "\0" in line:
            raise DataError(f"{path}, line {number}: a NUL byte, which no text has: is the file damaged, or UTF-16?")
        if len(fields) != width:
            raise DataError(f"{path}, line {number}: {len(fields)} columns instead of {width}" if line else f"{path}, line {number}: an empty line")
        if fields[label] not in labels:
            raise DataError(f"{path}, line {number}: label {fields[label]!r} is not one of {', '.join(labels)}")
        examples.append((fields[texts[0]], fields[texts[1]] if len(texts) > 1 else None, labels.index(fields[label])))
    if not examples:
        raise DataError(f"{path}: no examples in it")
    return examples


ZIPS = {"cola": "CoLA", "sst2": "SST-2", "rte": "RTE", "qnli": "QNLIv2", "qqp": "QQP-clean", "mnli": "MNLI"}
MRPC = {"senteval/senteval_data/msr_paraphrase_train.txt": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
        "glue/data/mrpc_dev_ids.tsv": "971d7767d81b997fd9060ade0ec23c4fc31cbb226a55d1bd4a1bac474eb81dc7"}  # file: SHA-256
LARGEST = 2**29  # bytes of an unpacked GLUE file: far more than any should have


def splits(name, data_dir):
    """-> paths of the train and the dev file of a GLUE task"""
    return [os.path.join(data_dir, GLUE[name][0], f"{split}.tsv") for split in ("train", "dev_matched" if name == "mnli" else "dev")]


def unpack(archive, member):
    """A member of a zip file -> bytes; nothing is extracted by the names in it. Raises DataError."""
    try:
        with zipfile.ZipFile(archive) as file:
            size = file.getinfo(member).file_size  # zipfile gives no more bytes than are announced here
            raw = file.read(member) if size <= LARGEST else None
    except Exception as error:  # zipfile raises many types for a damaged file
        raise DataError(f"{archive}: {member} cannot be read from it: {error}") from None
    if raw is None:
        raise DataError(f"{archive}: {member} has {size} bytes: no GLUE file is that large")
    return raw


def split_mrpc(text, dev_ids):
    """The two files of the Microsoft Research Paraphrase Corpus, bytes -> GLUE's train.tsv and dev.tsv, bytes: the pairs that dev_ids does not
    name, and those that it does. Raises DataError."""
    try:
        (header, *rows), ids = ([line for line in raw.decode("utf-8-sig").replace("\r\n", "\n").split("\n") if line] for raw in (text, dev_ids))
        named = {tuple(line.split("\t")) for line in ids}
        parts = {where: [row for row in rows if (tuple(row.split("\t")[1:3]) in named) == where] for where in (False, True)}
    except ValueError as error:
        raise DataError(f"MRPC as downloaded cannot be read: {error}") from None
    return ["\n".join([header, *parts[where], ""]).encode() for where in (False, True)]


def download_glue(name):
    """A GLUE task from dl.fbaipublicfiles.com, or $GLUE_ENDPOINT, into the cache, once -> data_dir for splits. Raises InputError."""
    if name != "mrpc" and name not in ZIPS:
        raise DataError(f"task {name} cannot be downloaded: give --data-dir, the folder that holds {GLUE[name][0]}/train.tsv")
    data_dir, endpoint = files.cache_path("glue"), (os.environ.get("GLUE_ENDPOINT") or "https://dl.fbaipublicfiles.com").rstrip("/")
    paths, sources = splits(name, data_dir), MRPC if name == "mrpc" else {f"glue/data/{ZIPS[name]}.zip": None}
    if all(map(os.path.isfile, paths)):
        return data_dir
    with files.lock(files.cache_path("lock")):
        if not all(map(os.path.isfile, paths)):
            try:
                raw = [files.fetch(f"{endpoint}/{source}", os.path.join(os.path.dirname(paths[0]), os.path.basename(source)), sha256) for source, sha256 in sources.items()]
            except files.DownloadError as error:
                raise DataError(f"{error}; --data-dir takes GLUE files that are here already") from None
            try:
                contents = [unpack(raw[0], f"{GLUE[name][0]}/{os.path.basename(path)}") for path in paths] if name != "mrpc" else split_mrpc(*(open(p, "rb").read() for p in raw))
                for path, content in zip(paths, contents):
                    files.write(path, content)
            finally:  # a bad file must not be in the way of the next attempt
                for path in raw:
                    os.remove(path)
    return data_dir


def load_task(name, data_dir=None):
    """A built-in task, or a GLUE task from data_dir (MRPC/train.tsv and so on below it; None: downloaded) -> Task. Raises InputError."""
    if name in BUILT_IN:
        return built_in_task(name)
    if name not in GLUE:
        raise DataError(f"no task {name!r}; there are: {', '.join((*BUILT_IN, *GLUE))}")
    folder, *columns, metric = GLUE[name]
    if data_dir is not None and not os.path.isdir(os.path.join(data_dir, folder)):
        raise DataError(f"{data_dir} has no folder {folder} in it: --data-dir is the folder above {folder}/train.tsv")
    train, dev = splits(name, download_glue(name) if data_dir is None else data_dir)
    return Task(read_glue(train, *columns), read_glue(dev, *columns), len(columns[-1]), metric, columns[-1])


def pad(sequences, pad_id, at_least=0):
    """list of (input_ids, token_type_ids) -> input_ids, attention_mask, token_type_ids, each (B, T) int64, T the longest, or at_least"""
    T = max(at_least, *(len(ids) for ids, _ in sequences))
    rows = [(ids + [pad_id] * (T - len(ids)), [1] * len(ids) + [0] * (T - len(ids)), types + [0] * (T - len(ids))) for ids, types in sequences]
    return tuple(torch.tensor(column) for column in zip(*rows))


def batches(lengths, batch_size, generator=None):
    """Lengths of all examples -> one epoch of batches, lists of indices into `lengths`.

    With a generator: shuffled, sorted by length within groups of 50 batches, the batches shuffled again, so that a batch
    has little padding and every epoch other company. Without one (evaluation): everything sorted by length.
    """
    n = len(lengths)
    order = torch.randperm(n, generator=generator).tolist() if generator else list(range(n))
    group = 50 * batch_size if generator else max(n, 1)
    order = [i for start in range(0, n, group) for i in sorted(order[start:start + group], key=lambda i: lengths[i])]
    chunks = [order[start:start + batch_size] for start in range(0, n, batch_size)]
    return [chunks[i] for i in torch.randperm(len(chunks), generator=generator)] if generator else chunks


class Batches:
    """The examples of a split as tensors on the device"""

    def __init__(self, split, tokenizer, max_length, device):
        self.encoded = [tokenizer.encode(text, pair, max_length) for text, pair, _ in split]
        self.labels, self.lengths = [label for *_, label in split], [len(ids) for ids, _ in self.encoded]
        self.pad_id, self.max_length, self.device = tokenizer.pad_id, max_length, device

    def __getitem__(self, indices):
        """list of int -> (input_ids, attention_mask, token_type_ids), each (B, T), and labels (B,)"""
        longest = max(self.lengths[i] for i in indices)  # of every shape the libraries beneath torch keep code and memory: fewer, in steps of 8
        inputs = pad([self.encoded[i] for i in indices], self.pad_id, min(-(-longest // 8) * 8, self.max_length))
        return tuple(t.to(self.device) for t in inputs), torch.tensor([self.labels[i] for i in indices], device=self.device)

    def parts(self, indices, accumulate=1, rank=0, world=1):
        """What process `rank` of `world` does of a batch, in `accumulate` parts -> [(share of the batch's examples, batch), ...]"""
        parts = [indices[i::world * accumulate] for i in range(rank, world * accumulate, world)]
        return [(len(part) / len(indices), self[part]) for part in parts if part] or [(0.0, self[indices[:1]])]

    def sample(self, count, batch_size, generator):
        """`count` random batches, lists of indices"""
        drawn = torch.randint(len(self.labels), (count * batch_size,), generator=generator).tolist()
        return [[drawn[i] for i in chunk] for chunk in batches([self.lengths[i] for i in drawn], batch_size, generator)]

    def checksum(self):
        """int, to see whether a resumed run has the data that it began with"""
        return zlib.crc32(repr((self.labels, self.lengths)).encode())


# ------------------------------------------------------------------------------------------------ the built-in language

def _concepts(text):
    return [tuple(word.replace("_", " ") for word in concept.split("/")) for concept in text.split()]


LEXICON = {  # concept = synonyms separated by a slash; nouns and verbs are regular, so that inflection is one rule
    "person": _concepts("doctor/physician lawyer/attorney student/pupil robber/burglar author/writer cook/chef guard/warden farmer/grower"),
    "verb": _concepts("help/assist follow/trail greet/welcome attack/assault trick/fool hire/employ praise/commend call/phone"),
    "adjective": _concepts("old/elderly young/youthful rich/wealthy brave/courageous"),
    "place": _concepts("in_the_garden/in_the_yard at_the_shop/at_the_store in_the_woods/in_the_forest"),
    "time": _concepts("at_dawn/at_sunrise at_dusk/at_sunset every_day/daily"),
    "manner": _concepts("quickly/rapidly quietly/silently gladly/happily"),
    "thing": _concepts("film/movie plot/story acting/performance music/score book/novel ending/finale dialogue/script pace/tempo"),
    "good": _concepts("great/superb funny/amusing moving/touching witty/sharp fresh/original charming/delightful"),
    "bad": _concepts("dull/boring awful/terrible silly/stupid stale/trite clumsy/awkward bland/lifeless"),
}
FUNCTION_WORDS = "the a an some this these near behind is are was were do does did not never by , . but although and very really quite rather"
ARTICLES = (("the", "the"), ("a", "some"), ("this", "these"))  # singular, plural


class Language:
    """A generator of small English-like sentences with known meaning; everything follows from `rng` (random.Random).

    An event is a dict: agent and patient (noun phrases), verb, past, negated, and optional place, time, manner (concept
    numbers or None). `sentence` words it at random: synonyms, active or passive, adjuncts moved, "not" or "never".
    """

    def __init__(self, rng):
        self.rng, self.said = rng, {}

    def again(self, key, choices):
        """One of the choices: most often the one that was taken for this key before, if it was."""
        if key not in self.said or self.rng.random() < 0.3:
            self.said[key] = self.rng.choice(choices)
        return self.said[key]

    def pick(self, kind, other_than=None):
        """A random concept number of this kind, other than the given one."""
        return self.rng.choice([i for i in range(len(LEXICON[kind])) if i != other_than])

    def word(self, kind, concept):
        """One of the synonyms of a concept."""
        return self.again((kind, concept), LEXICON[kind][concept])

    def person(self, near=False):
        """A random noun phrase; with near=True some have another person beside them, who may tempt the verb to agree."""
        return {"noun": self.pick("person"), "plural": self.rng.random() < 0.5, "article": self.rng.randrange(3),
                "adjective": self.pick("adjective") if self.rng.random() < 0.3 else None,
                "near": self.person() if near and self.rng.random() < 0.4 else None}

    def event(self, near=False):
        """A random event whose agent and patient are different concepts."""
        agent, patient, chance = self.person(near), self.person(), self.rng.random
        patient["noun"] = self.pick("person", other_than=agent["noun"])
        adjuncts = {kind: self.pick(kind) if chance() < 0.3 else None for kind in ("place", "time", "manner")}
        return {"agent": agent, "patient": patient, "verb": self.pick("verb"), "past": chance() < 0.5, "negated": chance() < 0.25} | adjuncts

    def noun_phrase(self, p, fault=None):
        """-> words; fault "article" gives the article the wrong number, "order" puts the noun before it."""
        adjective = [] if p["adjective"] is None else [self.word("adjective", p["adjective"])]
        rest = [*adjective, self.word("person", p["noun"]) + "s" * p["plural"]]
        article = ARTICLES[p["article"]][p["plural"] ^ (fault == "article")]
        article = "an" if article == "a" and rest[0][0] in "aeiou" else article
        words = [rest[-1], article, *adjective] if fault == "order" else [article, *rest]
        return words + ([self.rng.choice(("near", "behind")), *self.noun_phrase(p["near"])] if p["near"] else [])

    def sentence(self, e, fault=None):
        """An event in words -> str. fault: None, or what is ungrammatical in it: article, order, agreement, form or by."""
        coin, base = self.rng.random, self.word("verb", e["verb"])
        passive = fault == "by" or self.again("voice", ("active", "active", "passive")) == "passive"
        subject, other = (e["patient"], e["agent"]) if passive else (e["agent"], e["patient"])
        plural = subject["plural"] ^ (fault == "agreement")
        participle = base + ("d" if base.endswith("e") else "ed")
        denial = [self.rng.choice(("not", "never"))] if e["negated"] else []
        manner = [] if e["manner"] is None else [self.word("manner", e["manner"])]
        early, late = (manner, []) if coin() < 0.5 else ([], manner)
        if passive:
            be = (("is", "was"), ("are", "were"))[plural][e["past"]]
            verb = [be, *denial, *early, base if fault == "form" else participle] + ["by"] * (fault != "by")
        elif denial == ["not"]:
            verb = [("did" if e["past"] else "do" if plural else "does"), *denial, *early, participle if fault == "form" else base]
        else:
            verb = [*denial, *early, "is"] * (fault == "form") + [*denial, *early] * (fault != "form")
            verb += [participle if e["past"] else base + "s" * (not plural)]
        adjuncts = [self.word(kind, e[kind]).split() for kind in ("place", "time") if e[kind] is not None]
        self.rng.shuffle(adjuncts)
        front = [*adjuncts.pop(), ","] if adjuncts and coin() < 0.4 else []
        noun_fault = fault if fault in ("article", "order") else None
        words = front + self.noun_phrase(subject, noun_fault) + verb + self.noun_phrase(other) + late + sum(adjuncts, [])
        return " ".join(words) + " ."

    def changed(self, e):
        """An event that differs in one thing: roles or adjectives swapped, one concept replaced, or negation toggled."""
        agent, patient = e["agent"], e["patient"]
        kind = self.rng.choice(("roles", "roles", "adjectives", "negation", "concept", "concept", "concept"))
        if kind == "roles":
            return e | {"agent": patient, "patient": agent}
        if kind == "adjectives" and agent["adjective"] != patient["adjective"]:
            return e | {"agent": agent | {"adjective": patient["adjective"]}, "patient": patient | {"adjective": agent["adjective"]}}
        if kind == "negation":
            return e | {"negated": not e["negated"]}
        what = self.rng.choice(["agent", "patient", "verb"] + [k for k in ("place", "time", "manner") if e[k] is not None])
        if what in ("agent", "patient"):
            new = self.rng.choice([i for i in range(len(LEXICON["person"])) if i not in (agent["noun"], patient["noun"])])
            return e | {what: e[what] | {"noun": new}}
        return e | {what: self.pick(what, other_than=e[what])}

    def paraphrase(self, label):
        """-> (text, pair): the same event in other words (1), or a changed one (0)"""
        e, self.said = self.event(), {}
        return self.sentence(e), self.sentence(e if label else self.changed(e))

    def entailment(self, label):
        """-> (text, pair): the second follows from the first (label 0, as in RTE) or does not (label 1).

        Leaving an adjunct out is safe unless the sentence is negated, adding one is safe only if it is.
        """
        e, self.said = self.event(), {}
        kinds = [kind for kind in ("place", "time", "manner") if e[kind] is not None]
        if not kinds:
            kinds = [self.rng.choice(("place", "time", "manner"))]
            e[kinds[0]] = self.pick(kinds[0])
        dropped = self.rng.sample(kinds, self.rng.randint(1, len(kinds)))
        less = e | dict.fromkeys(dropped)
        strong, weak = (less, e) if e["negated"] else (e, less)
        if label and self.rng.random() < 0.4:
            return self.sentence(weak), self.sentence(strong)
        if label:  # what both sentences say is changed, not what only the weak one says
            weak = self.changed(less) | ({kind: e[kind] for kind in dropped} if e["negated"] else {})
        return self.sentence(strong), self.sentence(weak)

    def sentiment(self, label):
        """-> (text, None): positive (1) or negative (0); in a contrast the main clause decides"""
        things = self.rng.sample(range(len(LEXICON["thing"])), 3)  # nothing is praised and blamed at once

        def clause(good):
            negated = self.rng.random() < 0.3
            kind = "good" if good != negated else "bad"
            very = [self.rng.choice(("very", "really", "quite", "rather"))] if self.rng.random() < 0.4 else []
            denial = [self.rng.choice(("not", "never"))] if negated else []
            words = ["the", self.word("thing", things.pop()), self.rng.choice(("is", "was")), *denial, *very, self.word(kind, self.pick(kind))]
            return " ".join(words)
        forms = ("{0} .", "{0} and {1} .", "{2} , but {0} .", "although {2} , {0} .", "{0} , although {2} .")
        return self.rng.choice(forms).format(clause(label), clause(label), clause(not label)), None

    def acceptability(self, label):
        """-> (text, None): grammatical (1), or with one fault (0)"""
        self.said = {}
        e = self.event(near=True) | {"past": False}  # in the past only a form of "be" would agree
        fault = None if label else self.rng.choice(("agreement", "agreement", "article", "order", "form", "by"))
        if fault == "article" or (label and self.rng.random() < 1 / 6):  # "the doctors" has no number to get wrong; good
            e["agent"]["article"] = e["patient"]["article"] = 2  # sentences say "these" as often, or it would give them away
        return self.sentence(e, fault), None


BUILT_IN = {"paraphrase": accuracy_and_f1, "entailment": accuracy, "sentiment": accuracy, "acceptability": matthews}


def built_in_task(name, train=8000, dev=1000, seed=0):
    """One of BUILT_IN -> Task. Labels alternate and are shuffled; no sentence stands in both train and dev."""
    language, seen, examples = Language(random.Random(f"{name} {seed}")), set(), []
    while len(examples) < train + dev:
        texts = getattr(language, name)(label := len(examples) % 2)
        if texts[0] != texts[1] and not seen & set(texts) - {None}:
            seen.update(texts)
            seen.discard(None)
            examples.append((*texts, label))
    split = {True: examples[:train], False: examples[train:]}
    for part in split.values():
        language.rng.shuffle(part)
    return Task(split[True], split[False], 2, BUILT_IN[name])


def built_in_tokenizer():
    """WordPiece over the words of the built-in language, with single letters for any other text."""
    words = [w for concepts in LEXICON.values() for concept in concepts for phrase in concept for w in phrase.split()] + FUNCTION_WORDS.split()
    words += [w + "s" for concept in LEXICON["person"] + LEXICON["verb"] for w in concept]
    words += [w + ("d" if w.endswith("e") else "ed") for concept in LEXICON["verb"] for w in concept]
    characters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters), *sorted(set(words) - set(characters))]
    return WordPiece({token: i for i, token in enumerate(tokens)})


def built_in_corpus(size, seed=1):
    """Unlabelled text for pre-training -> list of (text, pair or None): single sentences, and pairs that resemble each other"""
    language = Language(random.Random(f"corpus {seed}"))
    kinds = itertools.cycle(("sentiment", "event", *["pair"] * 10))
    makers = {"event": lambda: (language.sentence(language.event(near=True)), None),
              "sentiment": lambda: language.sentiment(language.rng.randrange(2)), "pair": lambda: language.paraphrase(language.rng.random() < 0.8)}
    return [makers[next(kinds)]() for _ in range(size)]
