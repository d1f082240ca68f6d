"""The tokenizers of BERT (WordPiece) and RoBERTa (BPE): from a text to the ids of its tokens.

    tokenizer = load_tokenizer("path/to/checkpoint")
    input_ids, token_type_ids = tokenizer.encode("A man ate.", "Someone ate.", max_length=128)

The ids are those of Hugging Face's fast tokenizers. No text takes quadratic time.
"""

import collections
import functools
import heapq
import itertools
import os
import re
import unicodedata

from data import InputError
from extras.vocabularies import check_kind, read_merges, read_options, read_vocabulary


class Tokenizer:
    """Do what BERT and RoBERTa share: special tokens, pairs of texts, truncation.

    A subclass defines text_ids(text), the tokens `specials` (classifier, separator, padding,
    unknown, mask), how many `separators` stand between two texts, and the type of the second text.
    """

    def __init__(self, vocab):
        self.vocab = vocab
        cls, sep, pad, unk, mask = self.specials
        self.cls_id = vocab[cls]
        self.sep_id = vocab[sep]
        self.pad_id = vocab[pad]
        self.unk_id = vocab[unk]
        self.mask_id = vocab[mask]
        # As in the reference: white space before the mask belongs to it, and \x1c to \x1f are no
        # white space. (?<!...) keeps the search for white space linear.
        space = r"[^\S\x1c-\x1f]"
        others = "|".join(map(re.escape, self.specials[:-1]))
        self.special_pattern = re.compile(rf"({others}|(?<!{space}){space}*{re.escape(mask)})")

    def ids(self, text):
        """Return the ids of a text. A special token written out in it counts as that token."""
        ids = []
        for part in self.special_pattern.split(text):
            token = part.strip()
            ids += [self.vocab[token]] if token in self.specials else self.text_ids(part)
        return ids

    def encode(self, text, pair=None, max_length=None):
        """Return (input_ids, token_type_ids) of a text or a pair of texts, with special tokens.

        The longer text is cut until there are at most max_length ids.
        Raises InputError if max_length leaves no room for the special tokens.
        """
        first = self.ids(text)
        second = [] if pair is None else self.ids(pair)
        if max_length is not None:
            specials = 2 if pair is None else 2 + self.separators
            if max_length < specials:
                raise InputError(f"max_length {max_length}: special tokens alone take {specials}")
            first, second = truncate(first, second, max_length - specials)
        first = [self.cls_id, *first, self.sep_id]
        if pair is not None:
            second = [self.sep_id] * (self.separators - 1) + second + [self.sep_id]
        return first + second, [0] * len(first) + [self.second_type] * len(second)


def truncate(first, second, room):
    """Return both lists, cut to `room` ids together: the longer first, then both equally."""
    short = min(len(first), len(second), room // 2)
    if len(first) <= len(second):
        return first[:short], second[: room - short]
    return first[: room - short], second[:short]


class WordPiece(Tokenizer):
    """Split a text into words, and each word into the longest known pieces, as BERT does.

    Python's Unicode tables say what a mark or punctuation is. The reference has older tables.
    """

    classes = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")  # which do the same
    specials = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
    separators = 1
    second_type = 1

    def __init__(self, vocab, lower=True, strip_accents=None, split_cjk=True):
        super().__init__(vocab)
        self.lower = lower
        self.strip_accents = lower if strip_accents is None else strip_accents
        self.split_cjk = split_cjk
        self.longest_token = max(map(len, vocab))

    def text_ids(self, text):
        text = "".join(map(without_control, text))
        if self.split_cjk:
            text = CJK.sub(r" \g<0> ", text)
        if self.strip_accents:
            text = without_accents(text)
        if self.lower:  # letter by letter: in a word, str.lower gives a final sigma another form
            text = "".join(map(str.lower, text))
        ids = []
        for word in "".join(map(punctuation_apart, text)).split():
            ids += self.word_ids(word)
        return ids

    def word_ids(self, word):
        """Return the ids of the longest known pieces from the left. Later pieces begin with ##."""
        if len(word) > 100:  # BERT gives up
            return [self.unk_id]
        ids = []
        start = 0
        while start < len(word):
            prefix = "##" if start > 0 else ""
            end = min(len(word), start + self.longest_token)
            while end > start and prefix + word[start:end] not in self.vocab:
                end -= 1
            if end == start:
                return [self.unk_id]
            ids.append(self.vocab[prefix + word[start:end]])
            start = end
        return ids


CJK = re.compile(  # Unicode's blocks of Chinese characters that BERT knows
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f"
    "\U0002b740-\U0002b81f\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


@functools.cache
def without_control(character):
    control = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
    return "" if character == "\ufffd" or control and character not in "\t\n\r" else character


@functools.cache
def punctuation_apart(character):
    # BERT counts all ASCII symbols as punctuation.
    punctuation = unicodedata.category(character)[0] == "P" or character in "$+<=>^`|~"
    return f" {character} " if punctuation else character


def without_accents(text):
    """Return unicodedata.normalize("NFD", text) without its accents (category Mn).

    normalize needs quadratic time to sort a long run of accents, so they are sorted here.
    """
    if text.isascii():
        return text
    decomposed = "".join(map(functools.partial(unicodedata.normalize, "NFD"), text))
    letters = []
    for _, run in itertools.groupby(decomposed, lambda c: unicodedata.combining(c) > 0):
        letters += sorted(run, key=unicodedata.combining)
    return "".join(letter for letter in letters if unicodedata.category(letter) != "Mn")


class BPE(Tokenizer):
    """Join the bytes of each word pair by pair, as RoBERTa and GPT-2 do (arXiv 1508.07909).

    `merges` lists the pairs of tokens to join, most urgent first.
    """

    classes = ("RobertaTokenizer",)
    specials = ("<s>", "</s>", "<pad>", "<unk>", "<mask>")
    separators = 2
    second_type = 0
    # GPT-2's 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    # Python's re has no \p. After `stand_in`, [^\W\d] is a letter, and \d is any number.
    words = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[^\W\d]+| ?\d+| ?[^\s\w]+|\s+(?!\S)|\s+")

    def __init__(self, vocab, merges, add_prefix_space=False):
        super().__init__(vocab)
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.add_prefix_space = add_prefix_space
        self.word_ids = functools.lru_cache(maxsize=100_000)(self.word_ids)

    def text_ids(self, text):
        if self.add_prefix_space and text and text[0] != " ":  # also before a tab
            text = " " + text
        ids = []
        for match in self.words.finditer("".join(map(stand_in, text))):
            ids += self.word_ids(text[match.start() : match.end()])
        return ids

    def word_ids(self, word):
        letters = [BYTE_LETTERS[byte] for byte in word.encode("utf-8", "replace")]
        return [self.vocab.get(token, self.unk_id) for token in merge(letters, self.ranks)]


@functools.cache
def stand_in(character):
    """Return the character, or one of its kind if Python's re does not class it as GPT-2 does."""
    if unicodedata.category(character) in ("Nl", "No"):
        return "0"
    return "!" if character in "_\x1c\x1d\x1e\x1f" else character


# Every byte has a letter: a printable one stands for itself, the others take those from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_LETTERS = {byte: chr(byte) for byte in PRINTABLE}
BYTE_LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}


def merge(letters, ranks):
    """Return the tokens left when the pair of lowest rank is joined, everywhere, again and again.

    Neighbours are linked, and ranks wait in a heap: n letters take O(n log n) steps.
    """
    tokens = [None, *letters, None]  # None at the borders: in no pair
    left = list(range(-1, len(tokens) - 1))
    right = list(range(1, len(tokens) + 1))
    places = collections.defaultdict(list)  # rank: where its pair begins, or once began
    waiting = []  # the ranks in `places`, a heap

    def rank_at(place):
        return ranks.get((tokens[place], tokens[right[place]]))

    def note(place):
        rank = rank_at(place)
        if rank is not None:
            if rank not in places:
                heapq.heappush(waiting, rank)
            places[rank].append(place)

    for place in range(1, len(letters)):
        note(place)
    while waiting:
        rank = heapq.heappop(waiting)
        for place in sorted(places.pop(rank)):
            if rank_at(place) == rank:
                joined = right[place]
                tokens[place] += tokens[joined]
                tokens[joined] = None
                right[place] = right[joined]
                left[right[place]] = place
                note(left[place])
                note(place)
    return [token for token in tokens if token is not None]


def load_tokenizer(folder):
    """Return the tokenizer of a folder: vocab.txt (BERT) or vocab.json and merges.txt (RoBERTa).

    Raises InputError with the name of the file that is missing or wrong.
    """
    options = read_options(os.path.join(folder, "tokenizer_config.json"))
    vocab_txt = os.path.join(folder, "vocab.txt")
    vocab_json = os.path.join(folder, "vocab.json")
    merges_txt = os.path.join(folder, "merges.txt")
    if os.path.isfile(vocab_txt):
        check_kind(folder, WordPiece.classes, WordPiece.specials)
        vocab = read_vocabulary(vocab_txt, WordPiece.specials)
        strip_accents = options.get("strip_accents")
        split_cjk = options.get("tokenize_chinese_chars", True)
        return WordPiece(vocab, options.get("do_lower_case", True), strip_accents, split_cjk)
    if os.path.isfile(vocab_json) and os.path.isfile(merges_txt):
        check_kind(folder, BPE.classes, BPE.specials)
        vocab = read_vocabulary(vocab_json, BPE.specials)
        if any(token.endswith("</w>") for token in vocab):  # ends of words, as HerBERT marks them
            raise InputError(f"{folder}: BPE of letters is not supported: RoBERTa's, of bytes, is")
        merges = read_merges(merges_txt, vocab)
        return BPE(vocab, merges, options.get("add_prefix_space", False))
    raise InputError(f"{folder}: neither vocab.txt nor vocab.json with merges.txt is in it")
