"""Read the files of a tokenizer: vocab.txt or vocab.json, merges.txt, tokenizer_config.json."""

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
            if vocab.setdefault(token, number) != number:
                raise InputError(f"{path}, line {number + 1}: {token!r} for the second time")
    missing = [token for token in specials if token not in vocab]
    if missing:
        raise InputError(f"{path}: the vocabulary has no {' '.join(missing)}")
    owners = {}
    for token, number in vocab.items():
        if type(number) is not int or number < 0 or owners.setdefault(number, token) != token:
            raise InputError(f"{path}: {token!r} has id {number!r}; ids differ, and count from 0")
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
    """Return {name: True or False} of a tokenizer_config.json. Without the file it is empty.

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


def refuse_more_tokens(folder, specials):
    """Raise InputError if a tokenizer was given tokens beside its vocabulary and `specials`."""
    added = []
    for name in ("tokenizer_config.json", "added_tokens.json"):
        path = os.path.join(folder, name)
        given = read_json(path) if os.path.isfile(path) else {}
        if name == "added_tokens.json":
            added += given
            continue
        if given.get("tokenizer_class") == "BertJapaneseTokenizer":
            raise InputError(f"{path}: BertJapaneseTokenizer is not supported")
        try:
            added += [entry["content"] for entry in given.get("added_tokens_decoder", {}).values()]
            added += given.get("additional_special_tokens") or []
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{path}: tokens of an unknown form: {error!r}") from None
    more = sorted(set(map(str, added)) - set(specials))
    if more:
        raise InputError(f"{folder}: tokens that were added are not supported: {', '.join(more)}")
