"""Read a tokenizer's vocabulary, merges and options, and refuse one of another kind."""

import os

from data import InputError, read_text
from extras.files import read_json

OPTIONS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space")


def read_vocabulary(path, specials):
    """Return {token: id} from a JSON file, or from a text file: the id is the line, from 0 on.

    Raises InputError for a missing special token, a repeated token, or a bad id.
    """
    if path.endswith(".json"):
        vocab = read_json(path)
    else:
        vocab = {}
        for number, line in enumerate(read_text(path).removesuffix("\n").split("\n")):
            token = line.rstrip("\r")
            if token == "":  # a blank line is no token, but counts as a line
                continue
            if vocab.setdefault(token, number) != number:
                raise InputError(f"{path}, line {number + 1}: {token!r} for the second time")
    missing = [token for token in specials if token not in vocab]
    if missing:
        raise InputError(f"{path}: the vocabulary has no {' '.join(missing)}")
    owners = {}
    for token, number in vocab.items():
        if type(number) is not int or number < 0 or owners.setdefault(number, token) != token:
            raise InputError(
                f"{path}: {token!r} has id {number!r}; want different numbers from 0 on"
            )
    return vocab


def read_merges(path, vocab):
    """Return the pairs of a merges.txt. Raises InputError for a line that joins no two tokens."""
    merges = []
    for line in read_text(path).split("\n"):
        line = line.rstrip("\r")
        if line and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise InputError(f"{path}: {line!r} is not a pair of tokens")
            for token in (*pair, "".join(pair)):
                if token not in vocab:
                    raise InputError(f"{path}: {line!r}: the vocabulary has no {token!r}")
            merges.append(pair)
    return merges


def read_options(path):
    """Return {name: True or False} of a file such as tokenizer_config.json; without it, {}.

    What is null counts as left out. Raises InputError for what is neither true nor false.
    """
    given = read_json(path) if os.path.isfile(path) else {}
    if set(given) == {"error"}:  # what the hub says in place of a file
        raise InputError(f"{path}: no tokenizer options, but the error {given['error']!r}")
    options = {}
    for name in OPTIONS:
        value = given.get(name)
        if value is not None:
            if not isinstance(value, bool):
                raise InputError(f"{path}: {name} is {value!r}: want true or false")
            options[name] = value
    return options


# What a tokenizer's folder may say about it, beside its vocabulary.
SETTINGS_FILES = (
    "tokenizer_config.json",
    "config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)


def check_kind(folder, classes, specials):
    """Raise InputError if a tokenizer is none of these classes, or has tokens beside `specials`.

    The first file that names a class tells it. If none does, the class is taken for granted.
    """
    tokens = set()
    named = None
    for file in SETTINGS_FILES:
        path = os.path.join(folder, file)
        given = read_json(path) if os.path.isfile(path) else {}
        named = named or given.get("tokenizer_class")
        if file == "config.json":
            continue
        try:
            tokens.update(given if file == "added_tokens.json" else named_tokens(given))
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: tokens of an unknown form: {error!r}") from None
    if named and str(named).removesuffix("Fast") not in classes:
        raise InputError(f"{folder}: tokenizer {named} is not supported: {' or '.join(classes)} is")
    more = sorted(tokens - set(specials))
    if more:
        raise InputError(
            f"{folder}: tokens beside the usual ones are not supported: {', '.join(more)}"
        )


def named_tokens(given):
    """Return the tokens that a file of a tokenizer names, such as "[CLS]" or one that was added."""
    entries = [*given.get("added_tokens", []), *given.get("added_tokens_decoder", {}).values()]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = given.get(name) or []
        entries += more.values() if isinstance(more, dict) else more
    for name, value in given.items():
        if name.endswith("_token") and isinstance(value, str | dict):  # add_bos_token is a bool
            entries.append(value)
    return [str(entry["content"] if isinstance(entry, dict) else entry) for entry in entries]
