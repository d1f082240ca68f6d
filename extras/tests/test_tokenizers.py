"""Claims about tokenizers: they give the reference's ids, in linear time, or refuse the files."""

import itertools
import json
import random
import re
import time
import unicodedata
import zlib

import pytest

from data import InputError
from extras import tokenizers

BERT_WORDS = "the cat ##s un ##aff ##able naive cafe i ' , ? \u4f60 \u597d \u03c3 a b < ~ ##b $ \u0301 \u0300"
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *BERT_WORDS.split()]
LETTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
MERGES = [("l", "o"), ("lo", "w"), ("\u0120", "low"), ("e", "r"), ("n", "e"), ("low", "er")]
SPECIAL_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
# Texts on which tokenizers often differ.
NASTY = [
    *("", "   ", "  many    spaces  here ", "emoji 😀👩‍👩‍👧 🏳️‍🌈 done", "naïve café Ångström ÀÉÎ ß İstanbul"),
    *("ΟΔΟΣ Σίσυφος ς", "你好世界 mixed中文text", "日本語のテキスト ｶﾀｶﾅ"),
    *("\x00\x01a\x7fb\x85c\u200bd\ufeffe\u00ade", "tab\tnew\nline\r\nx", "a" * 100, "a" * 101),
    *("don't can't we'll I'D 's 'T", "$100+5=<>^`|~ ©®™", "١٢٣ ½ Ⅷ ²³ 一二三"),
    *("[MASK] is [SEP] x[UNK]y [mask]", "hello <mask> world<mask>!<s></s>  <mask>"),
    *("\u00a0nb\u2003sp\u3000ideo", "e\u0301 a\u0308 \u0327c", "\u2019s \u201cquoted\u201d"),
    *("\n\n\nx", "x  \n", "#\x1c's \x1f"),
]


def bert(**options):
    return tokenizers.WordPiece({token: i for i, token in enumerate(BERT_TOKENS)}, **options)


def roberta(merges=MERGES, **options):
    tokens = [*SPECIAL_IDS, *LETTERS, *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return tokenizers.BPE(vocab, merges, **options)


def tokens_of(tokenizer, text):
    names = {number: token for token, number in tokenizer.vocab.items()}
    return [names[number] for number in tokenizer.ids(text)]


def random_texts(count, seed=0):
    """Return texts of nasty characters and of any characters, with and without accents."""
    rng = random.Random(seed)
    alphabet = "".join(NASTY) + "\ud800\udfff\U0010ffff\u302e\u0315\u1dce\u034f"
    alphabet += "".join(chr(rng.randrange(0x3000)) for _ in range(300))
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(count)]


# BERT


@pytest.mark.parametrize(
    "text,tokens",
    [
        ("The  cats\n", "the cat ##s"),
        ("unaffable unaffables!", "un ##aff ##able un ##aff ##able ##s [UNK]"),
        ("unaffablecat", "[UNK]"),
        ("Na\u00efve CAFE\u0301,cat?", "naive cafe , cat ?"),
        ("the\u4f60\u597dcat", "the \u4f60 \u597d cat"),
        ("c\x00a\u200bt\ufffds \u03a3", "cat ##s \u03c3"),
        ("a<b~$", "a < b ~ $"),
        ("b" * 100 + " " + "b" * 101, " ".join(["b"] + ["##b"] * 99 + ["[UNK]"])),
        ("a [MASK]cat[SEP] [mask]", "a [MASK] cat [SEP] [UNK] [MASK] [UNK]".replace("[MASK] [UNK]", "[UNK] [UNK]")),
    ],
)
def test_bert_splits_into_words_and_words_into_pieces(text, tokens):
    assert tokens_of(bert(), text) == tokens.split()
