"""A small built-in language: four classification tasks that need no download.

Sentences whose meaning is known are worded at random, in the form of GLUE tasks: paraphrase (MRPC),
entailment (RTE), sentiment (SST-2) and acceptability (CoLA). Everything follows from the seed.
"""

import functools
import random

from data import Task, accuracy, accuracy_and_f1, matthews

LEXICON = {  # concepts; a slash stands between synonyms, _ for a space. All inflection is regular.
    "person": "doctor/physician lawyer/attorney student/pupil robber/burglar author/writer "
    "cook/chef guard/warden farmer/grower",
    "verb": "help/assist follow/trail greet/welcome attack/assault trick/fool hire/employ "
    "praise/commend call/phone",
    "adjective": "old/elderly young/youthful rich/wealthy brave/courageous",
    "place": "in_the_garden/in_the_yard at_the_shop/at_the_store in_the_woods/in_the_forest",
    "time": "at_dawn/at_sunrise at_dusk/at_sunset every_day/daily",
    "manner": "quickly/rapidly quietly/silently gladly/happily",
    "thing": "film/movie plot/story acting/performance music/score book/novel ending/finale "
    "dialogue/script pace/tempo",
    "good": "great/superb funny/amusing moving/touching witty/sharp fresh/original "
    "charming/delightful",
    "bad": "dull/boring awful/terrible silly/stupid stale/trite clumsy/awkward bland/lifeless",
    "function": "the a an some this these near behind is are was were do does did not never by "
    ", . but although and very really quite rather",
}
ADJUNCTS = ("place", "time", "manner")
SINGULAR, PLURAL = 0, 1  # which one of a pair of forms
ARTICLES = (("the", "the"), ("a", "some"), ("this", "these"))
BE = {"present": ("is", "are"), "past": ("was", "were")}
DO = {"present": ("does", "do"), "past": ("did", "did")}
# What stands here twice is drawn twice as often.
CHANGES = ("roles", "roles", "adjectives", "negation", "concept", "concept", "concept")
FAULTS = (
    "agreement",  # the verb has not the number of its subject: "the doctors helps"
    "agreement",
    "article",  # the article has not the number of its noun: "these doctor"
    "order",  # the noun comes first: "doctor the old"
    "form",  # the verb has a wrong form: "is help", "is helps", "does not helped"
    "by",  # a passive lacks "by": "is helped the doctor"
)
# Clauses 0 and 1 are of one opinion, 2 of the other: the main clause decides.
FORMS = "{0} . / {0} and {1} . / {2} , but {0} . / although {2} , {0} . / {0} , although {2} ."
TASKS = dict(
    paraphrase=accuracy_and_f1, entailment=accuracy, sentiment=accuracy, acceptability=matthews
)


@functools.cache
def concepts(kind):
    """Return the concepts of a kind, each a list of synonyms."""
    return [concept.replace("_", " ").split("/") for concept in LEXICON[kind].split()]


class Language:
    """A generator of sentences; everything follows from `rng` (random.Random).

    An event is a dict: agent and patient (persons), tense, negated, and numbers of concepts: verb,
    place, time and manner (or None). `sentence` words it at random: synonyms, active or passive,
    adjuncts moved, "not" or "never". Methods named as a task give (text, second text or None).
    """

    def __init__(self, rng):
        self.rng = rng
        self.said = {}  # the words chosen so far, which are most often repeated

    def chance(self, probability):
        return self.rng.random() < probability

    def optional(self, is_there, words):
        """Return a list with one of the words, or an empty one."""
        return [self.rng.choice(words)] if is_there else []

    def again(self, key, options):
        """Return one of the options: most often the one that was taken for this key before."""
        if key not in self.said or self.chance(0.3):
            self.said[key] = self.rng.choice(options)
        return self.said[key]

    def word(self, kind, concept):
        """Return one of the synonyms of a concept."""
        return self.again((kind, concept), concepts(kind)[concept])

    def words(self, kind, concept):
        """Return a list with one of the synonyms of a concept, or an empty one for None."""
        return [] if concept is None else [self.word(kind, concept)]

    def pick(self, kind, *taken):
        """Return the number of a random concept, but none of those taken."""
        return self.rng.choice([i for i in range(len(concepts(kind))) if i not in taken])

    def person(self, near=False):
        """Return a random person. near: maybe with another beside, who may mislead the verb."""
        person = {"noun": self.pick("person"), "number": PLURAL if self.chance(0.5) else SINGULAR}
        person["article"] = self.rng.choice(ARTICLES)
        person["adjective"] = self.pick("adjective") if self.chance(0.3) else None
        person["near"] = self.person() if near and self.chance(0.4) else None
        return person

    def event(self, near=False):
        """Return a random event whose agent and patient are different concepts."""
        event = {"agent": self.person(near), "patient": self.person()}
        event["patient"]["noun"] = self.pick("person", event["agent"]["noun"])
        for kind in ADJUNCTS:
            event[kind] = self.pick(kind) if self.chance(0.3) else None
        event["verb"] = self.pick("verb")
        event["tense"] = "past" if self.chance(0.5) else "present"
        event["negated"] = self.chance(0.25)
        return event

    def changed(self, event):
        """Return a copy of an event that differs from it in one thing: one of CHANGES."""
        agent, patient = dict(event["agent"]), dict(event["patient"])
        new = event | {"agent": agent, "patient": patient}
        change = self.rng.choice(CHANGES)
        if change == "roles":
            new["agent"], new["patient"] = patient, agent
        elif change == "adjectives" and agent["adjective"] != patient["adjective"]:
            agent["adjective"], patient["adjective"] = patient["adjective"], agent["adjective"]
        elif change == "negation":
            new["negated"] = not event["negated"]
        else:
            what = self.rng.choice(["agent", "patient", "verb", *adjuncts(event)])
            if what in ("agent", "patient"):
                new[what]["noun"] = self.pick("person", agent["noun"], patient["noun"])
            else:
                new[what] = self.pick(what, event[what])
        return new

    def noun_phrase(self, person, fault=None):
        """Return the words for a person."""
        adjective = self.words("adjective", person["adjective"])
        noun = self.word("person", person["noun"])
        if person["number"] == PLURAL:
            noun += "s"
        article = person["article"][person["number"]]
        if fault == "article":
            article = person["article"][1 - person["number"]]
        words = [article, *adjective, noun]
        if article == "a" and words[1][0] in "aeiou":
            words[0] = "an"
        if fault == "order":
            words = [noun, *words[:-1]]
        if person["near"]:
            words += [self.rng.choice(("near", "behind")), *self.noun_phrase(person["near"])]
        return words

    def sentence(self, event, fault=None):
        """Return an event in words. fault: None, or what shall be ungrammatical, one of FAULTS."""
        verb = self.word("verb", event["verb"])
        subject, other, verb_phrase = event["agent"], event["patient"], active
        if fault == "by" or self.again("voice", ("active", "active", "passive")) == "passive":
            subject, other, verb_phrase = event["patient"], event["agent"], passive
        before = self.optional(event["negated"], ("not", "never"))
        last = self.words("manner", event["manner"])
        if self.chance(0.5):
            before, last = before + last, []
        number = subject["number"]
        if fault == "agreement":
            number = 1 - number
        middle = verb_phrase(verb, event["tense"], number, before, fault)
        where_and_when = self.words("place", event["place"]) + self.words("time", event["time"])
        self.rng.shuffle(where_and_when)
        first = []
        if where_and_when and self.chance(0.4):
            first = [where_and_when.pop(), ","]
        words = first + self.noun_phrase(subject, fault) + middle + self.noun_phrase(other)
        return " ".join([*words, *last, *where_and_when, "."])

    def paraphrase(self, label):
        """Return two sentences: of one event (label 1), or of an event and a changed one (0)."""
        event = self.event()
        self.said = {}
        return self.sentence(event), self.sentence(event if label else self.changed(event))

    def entailment(self, label):
        """Return two sentences: the second follows from the first (0, as in RTE) or not (1)."""
        event = self.event()
        self.said = {}
        kinds = adjuncts(event)
        if not kinds:
            kinds = [self.rng.choice(ADJUNCTS)]
            event[kinds[0]] = self.pick(kinds[0])
        dropped = self.rng.sample(kinds, self.rng.randint(1, len(kinds)))
        less = event | dict.fromkeys(dropped)
        # "He sang at dawn" says more than "he sang", but "he never sang" says the most.
        strong, weak = (less, event) if event["negated"] else (event, less)
        if label and self.chance(0.4):
            return self.sentence(weak), self.sentence(strong)
        if label:  # change what both sentences say, not what only one of them says
            weak = self.changed(less)
            if event["negated"]:
                weak |= {kind: event[kind] for kind in dropped}
        return self.sentence(strong), self.sentence(weak)

    def sentiment(self, label):
        """Return a sentence of praise (1) or blame (0), and None."""
        things = self.rng.sample(range(len(concepts("thing"))), 3)  # three different ones
        form = self.rng.choice(FORMS.split(" / "))
        main = self.opinion(things.pop(), label == 1)
        also = self.opinion(things.pop(), label == 1)
        contrary = self.opinion(things.pop(), label == 0)
        return form.format(main, also, contrary), None

    def opinion(self, thing, is_praise):
        """Return a clause that praises or blames a thing."""
        negated = self.chance(0.3)
        very = self.optional(self.chance(0.4), ("very", "really", "quite", "rather"))
        denial = self.optional(negated, ("not", "never"))
        words = ["the", self.word("thing", thing), self.rng.choice(("is", "was")), *denial, *very]
        kind = "good" if is_praise != negated else "bad"
        return " ".join([*words, self.word(kind, self.pick(kind))])

    def acceptability(self, label):
        """Return a grammatical sentence (1), or one with a single fault (0), and None."""
        self.said = {}
        event = self.event(near=True)
        event["tense"] = "present"  # in the past only a form of "be" would agree
        fault = None if label else self.rng.choice(FAULTS)
        # "The doctors" has no number to get wrong: use "these". Good sentences say it as often.
        if fault == "article" or (label and self.chance(1 / 6)):
            event["agent"]["article"] = event["patient"]["article"] = ("this", "these")
        return self.sentence(event, fault), None


def adjuncts(event):
    """Return the kinds of adjuncts that an event has."""
    return [kind for kind in ADJUNCTS if event[kind] is not None]


def participle(verb):
    """Return the past participle, which is the past tense too."""
    return verb + ("d" if verb.endswith("e") else "ed")


def passive(verb, tense, number, before, fault):
    """Return the words of a passive verb. Those in `before` stand before the participle."""
    faulty = {"form": [verb, "by"], "by": [participle(verb)]}
    end = faulty.get(fault, [participle(verb), "by"])
    return [BE[tense][number], *before, *end]


def active(verb, tense, number, before, fault):
    """Return the words of an active verb. Those in `before` stand before the verb."""
    past = participle(verb)
    if "not" in before:
        return [DO[tense][number], *before, past if fault == "form" else verb]
    main = {"present": (verb + "s", verb), "past": (past, past)}[tense][number]
    too_much = ["is"] if fault == "form" else []
    return [*before, *too_much, main]


def make_task(name, train=8000, dev=1000, seed=0):
    """Return one of TASKS as a Task. Labels are balanced, and no sentence occurs twice."""
    return Task(*make_parts(name, train, dev, seed), ("0", "1"), TASKS[name])


@functools.cache  # a comparison needs the same task for every run
def make_parts(name, train, dev, seed):
    """Return the examples to train on, and those of dev."""
    language = Language(random.Random(f"{name} {seed}"))
    seen = set()
    examples = []
    while len(examples) < train + dev:
        label = len(examples) % 2
        first, second = getattr(language, name)(label)
        texts = {first, second} - {None}
        if first != second and not seen & texts:
            seen |= texts
            examples.append((first, second, label))
    parts = [examples[:train], examples[train:]]
    for part in parts:
        language.rng.shuffle(part)
    return parts
