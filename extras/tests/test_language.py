"""Claims about the built-in language and its encoder. A parser in this file is the judge."""

import os
import random
import types
import zlib

import pytest
import torch
import torch.nn.functional as F

import data
from extras import language, make_builtin
from model import load_pretrained

BUILTIN = os.path.join(os.path.dirname(data.__file__), "builtin")
NUMBERS = {"a": "one", "an": "one", "this": "one", "some": "many", "these": "many"}
NUMBERS |= {"is": "one", "was": "one", "does": "one", "are": "many", "were": "many", "do": "many"}
SAME_ARTICLE = {"an": "a", "some": "a", "these": "this"}
ARTICLES = ("the", "a", "an", "some", "this", "these")
AUXILIARIES = ("is", "are", "was", "were", "do", "does", "did")


def concept_of(kind):
    """Return {synonym: the first synonym of its concept}."""
    found = {}
    for concept in language.LEXICON[kind].split():
        synonyms = concept.replace("_", " ").split("/")
        found |= dict.fromkeys(synonyms, synonyms[0])
    return found


def verb_forms():
    """Return {form: (concept, name of the form)}."""
    found = {}
    for verb, concept in concept_of("verb").items():
        past = verb + "d" if verb[-1] == "e" else verb + "ed"
        forms = {verb: "base", verb + "s": "third", past: "past"}
        found |= {form: (concept, name) for form, name in forms.items()}
    return found


PERSONS = concept_of("person")
ADJECTIVES = concept_of("adjective")
VERBS = verb_forms()


# ----------------------------------------------------------------------------------- the parser


def parse(sentence):
    """Return the parts of a sentence about two persons."""
    text = f" {sentence} ".replace(" , ", " ").removesuffix(" . ") + " "
    adjuncts = set()
    for kind in ("place", "time", "manner"):
        for phrase, concept in concept_of(kind).items():
            if f" {phrase} " in text:
                adjuncts.add(concept)
                text = text.replace(f" {phrase} ", " ")
    words = [word for word in text.split() if word not in ("not", "never")]
    at = next(i for i, word in enumerate(words) if word in VERBS)
    verb, form = VERBS[words[at]]
    return types.SimpleNamespace(
        subject=[word for word in words[:at] if word not in AUXILIARIES],
        auxiliary=[word for word in words[:at] if word in AUXILIARIES],
        verb=verb,
        form=form,
        by=words[at + 1] == "by",
        object=[word for word in words[at + 1 :] if word != "by"],
        negated=" not " in text or " never " in text,
        adjuncts=adjuncts,
    )


def person(words):
    """Return the meaning of a noun phrase: article, adjectives, noun and number."""
    article, *adjectives, noun = words
    singular = noun.removesuffix("s")
    kinds = [ADJECTIVES[adjective] for adjective in adjectives]
    return SAME_ARTICLE.get(article, article), kinds, PERSONS[singular], singular != noun


def meaning(sentence):
    """Return what a grammatical sentence says, in two parts: who did what to whom, and adjuncts."""
    parts = parse(sentence)
    agent, patient = parts.subject, parts.object
    past = parts.auxiliary in (["was"], ["were"], ["did"])
    if parts.by:
        agent, patient = patient, agent
    elif not parts.auxiliary:
        past = parts.form == "past"
    return [person(agent), parts.verb, person(patient), past, parts.negated], parts.adjuncts


def noun_faults(words):
    """Return the faults of one noun phrase."""
    if words[0] not in ARTICLES:
        return ["order"]
    faults = []
    number = "many" if words[-1].endswith("s") else "one"
    if NUMBERS.get(words[0], number) != number:
        faults.append("article")
    if words[0] in ("a", "an") and (words[0] == "an") != (words[1][0] in "aeiou"):
        faults.append("a or an")
    return faults


def noun_phrases(words):
    """Return the noun phrases that "near" and "behind" join."""
    phrases = [[]]
    for word in words:
        if word in ("near", "behind"):
            phrases.append([])
        else:
            phrases[-1].append(word)
    return phrases


def verb_faults(parts):
    """Return the faults of a verb in the present tense."""
    nouns = [word for word in noun_phrases(parts.subject)[0] if word.removesuffix("s") in PERSONS]
    number = "many" if nouns[0].endswith("s") else "one"
    auxiliary = "".join(parts.auxiliary)
    faults = []
    agreeing = NUMBERS.get(auxiliary)
    if auxiliary in ("is", "are"):
        if parts.form == "past" and not parts.by:
            faults.append("by")
        if parts.form != "past":
            faults.append("form")
            if not parts.by:  # "is helps": of these two the second should agree
                agreeing = "one" if parts.form == "third" else "many"
    elif auxiliary:
        if parts.form != "base":
            faults.append("form")
    else:
        agreeing = "one" if parts.form == "third" else "many"
        if parts.form == "past":
            faults.append("form")
    if agreeing != number:
        faults.append("agreement")
    return faults


def faults_of(sentence):
    parts = parse(sentence)
    faults = verb_faults(parts)
    for phrase in noun_phrases(parts.subject) + noun_phrases(parts.object):
        faults += noun_faults(phrase)
    return faults


def opinion(clause):
    """Return whether a clause about a film or a book is praise."""
    words = clause.split()
    is_good = words[-1] in concept_of("good")
    assert is_good != (words[-1] in concept_of("bad"))
    return is_good != ("not" in words or "never" in words)


# ------------------------------------------------------------------------------------ the tasks


@pytest.fixture(scope="module")
def tasks():
    return {name: language.make_task(name, train=600, dev=200) for name in language.TASKS}


def every_text(task):
    """Return the sentences of a task, those of pairs one by one."""
    return [text for *texts, _ in task.train + task.dev for text in texts if text is not None]


def test_the_parser_of_this_file_tells_right_from_wrong():
    event, adjuncts = meaning("at sunset , the authors were not quickly hired by an old pupil .")
    agent = ("a", ["old"], "student", False)
    assert event == [agent, "hire", ("the", [], "author", True), True, True]
    assert adjuncts == {"at dusk", "quickly"}
    assert faults_of("the doctors near this cook help a guard .") == []
    for wrong, fault in {
        "the doctors near this cook helps a guard .": "agreement",
        "these doctor helps a guard .": "article",
        "doctor the old helps a guard .": "order",
        "the doctor is helps a guard .": "form",
        "the doctor is help by a guard .": "form",
        "the doctor does not helped a guard .": "form",
        "the doctor is helped a guard .": "by",
    }.items():
        assert faults_of(wrong) == [fault]


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_half_of_each_split_has_each_label_in_no_order(tasks, name):
    for part, size in ((tasks[name].train, 600), (tasks[name].dev, 200)):
        labels = [label for *_, label in part]
        assert len(labels) == size and sum(labels) == size / 2
        repeated = sum(labels[i] == labels[i + 1] for i in range(size - 1))
        assert 0.3 * size < repeated < 0.7 * size


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_no_sentence_occurs_twice_so_none_stands_in_train_and_dev(tasks, name):
    texts = every_text(tasks[name])
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", data.BUILT_IN)
def test_the_seed_alone_decides(tasks, name):
    random.seed(5)
    language.make_parts.cache_clear()
    assert language.make_task(name, train=600, dev=200) == tasks[name]
    assert language.make_task(name, train=600, dev=200, seed=1).train != tasks[name].train


def test_sentences_are_paraphrases_if_and_only_if_they_share_their_meaning(tasks):
    for first, second, label in tasks["paraphrase"].train:
        assert (meaning(first) == meaning(second)) == (label == 1), (first, second)


def test_the_second_sentence_follows_from_the_first_if_and_only_if_the_label_says_so(tasks):
    for first, second, label in tasks["entailment"].train:
        event, adjuncts = meaning(first)
        other_event, other_adjuncts = meaning(second)
        says_less, says_more = other_adjuncts, adjuncts
        if event[-1]:  # "he never sang" says more than "he never sang at dawn"
            says_less, says_more = adjuncts, other_adjuncts
        follows = event == other_event and says_less <= says_more
        assert follows == (label == 0), (first, second)


def test_the_main_clause_decides_the_sentiment_and_the_other_one_contradicts_it(tasks):
    contrasts = 0
    for text, _, label in tasks["sentiment"].train:
        text = text.removesuffix(" .")
        concession = ""
        if text.startswith("although "):
            concession, text = text.removeprefix("although ").split(" , ")
        elif " , although " in text:
            text, concession = text.split(" , although ")
        elif " , but " in text:
            concession, text = text.split(" , but ")
        assert {opinion(clause) for clause in text.split(" and ")} == {label == 1}, text
        if concession:
            contrasts += 1
            assert opinion(concession) == (label == 0)
    assert 0.5 < contrasts / 600 < 0.7


def test_acceptable_sentences_have_no_fault_and_the_others_exactly_one(tasks):
    kinds = set()
    for text, _, label in tasks["acceptability"].train:
        faults = faults_of(text)
        assert len(faults) == 1 - label, (text, faults)
        kinds.update(faults)
    assert kinds == {"agreement", "article", "order", "form", "by"}


@pytest.mark.parametrize(
    "name, checksum",
    [
        ("paraphrase", 2469899493),
        ("entailment", 2121056602),
        ("sentiment", 1642366904),
        ("acceptability", 923772304),
    ],
)
def test_the_texts_are_those_of_version_0_1(name, checksum):
    task = language.make_task(name)
    assert zlib.crc32(repr((task.train, task.dev)).encode()) == checksum


def test_the_corpus_is_the_one_that_the_shipped_encoder_learned_from():
    assert zlib.crc32(repr(make_builtin.corpus(2000)).encode()) == 822205416


# --------------------------------------------------------------------------- the shipped encoder


def test_every_word_is_a_token_of_the_shipped_encoder(tasks):
    tokenizer = data.load_tokenizer(BUILTIN)
    assert list(tokenizer.vocab) == make_builtin.vocabulary()
    texts = [text for pair in make_builtin.corpus(600) for text in pair if text is not None]
    for name in tasks:
        texts += every_text(tasks[name])
    for text in texts:
        words = [tokenizer.vocab[word] for word in text.split()]  # a KeyError is a missing word
        assert tokenizer.encode(text)[0] == [tokenizer.cls_id, *words, tokenizer.sep_id]


def test_the_shipped_encoder_is_a_small_ordinary_bert_folder():
    files = ["README.md", "config.json", "model.safetensors", "vocab.txt"]
    assert sorted(os.listdir(BUILTIN)) == files
    assert sum(os.path.getsize(os.path.join(BUILTIN, name)) for name in files) < 2e6
    config = load_pretrained(BUILTIN).config
    assert config.model_type == "bert"
    assert config.vocab_size == len(make_builtin.vocabulary())


def test_the_shipped_encoder_has_learned_which_words_are_synonyms():
    vocab = data.load_tokenizer(BUILTIN).vocab
    table = F.normalize(load_pretrained(BUILTIN).word.weight.detach())
    hits = []
    for kind in ("person", "verb", "adjective"):
        synonyms = concept_of(kind)
        words = table[[vocab[word] for word in synonyms]]
        nearest = (words @ words.T).fill_diagonal_(-1).argmax(1).tolist()
        concepts = list(synonyms.values())
        hits += [concepts[i] == concepts[j] for i, j in enumerate(nearest)]
    assert sum(hits) / len(hits) > 0.5  # by chance it would be one in 13


def test_the_encoder_is_written_as_a_folder_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_builtin, "TEXTS", 100)
    monkeypatch.setattr(make_builtin, "STEPS", 4)
    folder = tmp_path / "new"
    make_builtin.main([str(folder)])
    assert "step     4/4 | mean loss" in capsys.readouterr().out
    for name in ("config.json", "vocab.txt"):
        with open(os.path.join(BUILTIN, name)) as file:
            assert (folder / name).read_text() == file.read()
    assert load_pretrained(folder).config == load_pretrained(BUILTIN).config
    monkeypatch.setattr(make_builtin, "pretrain", None)  # refused before it trains
    with pytest.raises(SystemExit, match="2"):
        make_builtin.main([str(folder)])
    assert "there already" in capsys.readouterr().err


def test_of_the_predicted_words_most_are_masked_some_replaced_and_some_kept():
    torch.manual_seed(0)
    input_ids = torch.randint(5, 20, (100, 50))
    replacements = torch.full((20, make_builtin.CHOICES), 30) + torch.arange(20)[:, None]
    seen, picked = make_builtin.corrupt(input_ids, replacements, mask_id=4, first_word=10)
    assert (input_ids[picked] >= 10).all() and (seen == input_ids)[~picked].all()
    assert picked.sum() / (input_ids >= 10).sum() == pytest.approx(0.3, abs=0.03)
    is_masked = seen[picked] == 4
    is_kept = seen[picked] == input_ids[picked]
    is_replaced = (seen == 30 + input_ids.roll(1, 1))[picked]  # by what follows the word before
    for share, where in ((0.6, is_masked), (0.1, is_kept), (0.3, is_replaced)):
        assert where.float().mean() == pytest.approx(share, abs=0.05)
