"""A small built-in language: four classification tasks that need no download.

A seeded generator writes English-like sentences whose meaning is known, in the form of GLUE tasks:
paraphrase (MRPC), entailment (RTE), sentiment (SST-2) and acceptability (CoLA). The same generator
writes the text on which the shipped encoder in builtin/ was trained (make_builtin.py).
"""

import random

from data import Task, accuracy, accuracy_and_f1, matthews


def concepts(text):
    """Turn "a/b c_d" into [("a", "b"), ("c d",)]: concepts, each with its synonyms."""
    return [tuple(concept.replace("_", " ").split("/")) for concept in text.split()]


LEXICON = {  # nouns and verbs are regular, so that inflection is one rule
    "person": concepts(
        "doctor/physician lawyer/attorney student/pupil robber/burglar author/writer cook/chef "
        "guard/warden farmer/grower"
    ),
    "verb": concepts(
        "help/assist follow/trail greet/welcome attack/assault trick/fool hire/employ "
        "praise/commend call/phone"
    ),
    "adjective": concepts("old/elderly young/youthful rich/wealthy brave/courageous"),
    "place": concepts(
        "in_the_garden/in_the_yard at_the_shop/at_the_store in_the_woods/in_the_forest"
    ),
    "time": concepts("at_dawn/at_sunrise at_dusk/at_sunset every_day/daily"),
    "manner": concepts("quickly/rapidly quietly/silently gladly/happily"),
    "thing": concepts(
        "film/movie plot/story acting/performance music/score book/novel ending/finale "
        "dialogue/script pace/tempo"
    ),
    "good": concepts(
        "great/superb funny/amusing moving/touching witty/sharp fresh/original charming/delightful"
    ),
    "bad": concepts(
        "dull/boring awful/terrible silly/stupid stale/trite clumsy/awkward bland/lifeless"
    ),
}
FUNCTION_WORDS = (
    "the a an some this these near behind is are was were do does did not never by , . but "
    "although and very really quite rather"
)
ARTICLES = (("the", "the"), ("a", "some"), ("this", "these"))  # singular, plural
ADJUNCTS = ("place", "time", "manner")
TASKS = {
    "paraphrase": accuracy_and_f1,
    "entailment": accuracy,
    "sentiment": accuracy,
    "acceptability": matthews,
}


class Language:
    """A generator of sentences; everything follows from `rng` (random.Random).

    An event is a dict: agent and patient (noun phrases), verb, past, negated, and optional place,
    time and manner (numbers of concepts, or None). `sentence` words it at random: synonyms, active
    or passive, adjuncts moved, "not" or "never".
    """

    def __init__(self, rng):
        self.rng = rng
        self.said = {}  # the choices of words so far, which are most often repeated

    def again(self, key, choices):
        """Return one of the choices: most often the one that was taken for this key before."""
        if key not in self.said or self.rng.random() < 0.3:
            self.said[key] = self.rng.choice(choices)
        return self.said[key]

    def pick(self, kind, other_than=None):
        """Return the number of a random concept of this kind, other than the given one."""
        numbers = [i for i in range(len(LEXICON[kind])) if i != other_than]
        return self.rng.choice(numbers)

    def word(self, kind, concept):
        """Return one of the synonyms of a concept."""
        return self.again((kind, concept), LEXICON[kind][concept])

    def person(self, near=False):
        """Return a random noun phrase. With near=True some have another person beside them, whose
        number may tempt the verb to agree with it.
        """
        person = {
            "noun": self.pick("person"),
            "plural": self.rng.random() < 0.5,
            "article": self.rng.randrange(3),
            "adjective": None,
            "near": None,
        }
        if self.rng.random() < 0.3:
            person["adjective"] = self.pick("adjective")
        if near and self.rng.random() < 0.4:
            person["near"] = self.person()
        return person

    def event(self, near=False):
        """Return a random event whose agent and patient are different concepts."""
        agent = self.person(near)
        patient = self.person()
        patient["noun"] = self.pick("person", other_than=agent["noun"])
        adjuncts = {}
        for kind in ADJUNCTS:
            adjuncts[kind] = self.pick(kind) if self.rng.random() < 0.3 else None
        event = {"agent": agent, "patient": patient, "verb": self.pick("verb")}
        event["past"] = self.rng.random() < 0.5
        event["negated"] = self.rng.random() < 0.25
        return event | adjuncts

    # -------------------------------------------------------------------------- from event to text

    def noun_phrase(self, person, fault=None):
        """Return words. Fault "article": of the wrong number; "order": the noun comes first."""
        adjective = []
        if person["adjective"] is not None:
            adjective = [self.word("adjective", person["adjective"])]
        noun = self.word("person", person["noun"])
        if person["plural"]:
            noun += "s"
        is_plural = person["plural"] != (fault == "article")
        article = ARTICLES[person["article"]][is_plural]
        if article == "a" and (adjective + [noun])[0][0] in "aeiou":
            article = "an"
        words = [article, *adjective, noun]
        if fault == "order":
            words = [noun, article, *adjective]
        if person["near"]:
            words.append(self.rng.choice(("near", "behind")))
            words += self.noun_phrase(person["near"])
        return words

    def sentence(self, event, fault=None):
        """Word an event. Fault: None, or what shall be ungrammatical, one of FAULTS."""
        base = self.word("verb", event["verb"])
        voice = "passive"
        if fault != "by":
            voice = self.again("voice", ("active", "active", "passive"))
        is_passive = voice == "passive"
        subject, other = event["agent"], event["patient"]
        if is_passive:
            subject, other = other, subject
        is_plural = subject["plural"] != (fault == "agreement")
        denial = [self.rng.choice(("not", "never"))] if event["negated"] else []
        manner = [] if event["manner"] is None else [self.word("manner", event["manner"])]
        early, late = ([], manner)
        if self.rng.random() < 0.5:
            early, late = late, early
        form = self.passive_verb if is_passive else self.active_verb
        verb = form(base, is_plural, event["past"], [*denial, *early], denial, fault)

        adjuncts = []
        for kind in ("place", "time"):
            if event[kind] is not None:
                adjuncts.append(self.word(kind, event[kind]).split())
        self.rng.shuffle(adjuncts)
        front = []
        if adjuncts and self.rng.random() < 0.4:
            front = [*adjuncts.pop(), ","]
        noun_fault = fault if fault in ("article", "order") else None
        words = (
            front + self.noun_phrase(subject, noun_fault) + verb + self.noun_phrase(other) + late
        )
        for adjunct in adjuncts:
            words += adjunct
        return " ".join(words) + " ."

    def passive_verb(self, base, is_plural, is_past, before, denial, fault):
        """Return the words of a passive verb with what stands before the participle."""
        be = (("is", "was"), ("are", "were"))[is_plural][is_past]
        words = [be, *before, base if fault == "form" else participle(base)]
        return words if fault == "by" else [*words, "by"]

    def active_verb(self, base, is_plural, is_past, before, denial, fault):
        """Return the words of an active verb with what stands before it."""
        if denial == ["not"]:
            present = "do" if is_plural else "does"
            auxiliary = "did" if is_past else present
            return [auxiliary, *before, participle(base) if fault == "form" else base]
        present = base if is_plural else base + "s"
        is_form = ["is"] if fault == "form" else []
        return [*before, *is_form, participle(base) if is_past else present]

    # ------------------------------------------------------------------------------------- tasks

    def changed(self, event):
        """Return an event that differs in one thing: roles, adjectives, negation or a concept."""
        agent, patient = event["agent"], event["patient"]
        kinds = ("roles", "roles", "adjectives", "negation", "concept", "concept", "concept")
        kind = self.rng.choice(kinds)
        if kind == "roles":
            return event | {"agent": patient, "patient": agent}
        if kind == "adjectives" and agent["adjective"] != patient["adjective"]:
            new_agent = agent | {"adjective": patient["adjective"]}
            new_patient = patient | {"adjective": agent["adjective"]}
            return event | {"agent": new_agent, "patient": new_patient}
        if kind == "negation":
            return event | {"negated": not event["negated"]}
        there = [kind for kind in ADJUNCTS if event[kind] is not None]
        what = self.rng.choice(["agent", "patient", "verb", *there])
        if what in ("agent", "patient"):
            taken = (agent["noun"], patient["noun"])
            nouns = [i for i in range(len(LEXICON["person"])) if i not in taken]
            return event | {what: event[what] | {"noun": self.rng.choice(nouns)}}
        return event | {what: self.pick(what, other_than=event[what])}

    def paraphrase(self, label):
        """Return two sentences: of the same event (label 1), or of a changed one (label 0)."""
        event = self.event()
        self.said = {}
        first = self.sentence(event)
        return first, self.sentence(event if label else self.changed(event))

    def entailment(self, label):
        """Return two sentences: the second follows from the first (label 0, as in RTE) or not (1).

        To leave an adjunct out is safe unless the sentence is negated; to add one is safe if it is.
        """
        event = self.event()
        self.said = {}
        kinds = [kind for kind in ADJUNCTS if event[kind] is not None]
        if not kinds:
            kinds = [self.rng.choice(ADJUNCTS)]
            event[kinds[0]] = self.pick(kinds[0])
        dropped = self.rng.sample(kinds, self.rng.randint(1, len(kinds)))
        less = event | dict.fromkeys(dropped)
        strong, weak = (less, event) if event["negated"] else (event, less)
        if label and self.rng.random() < 0.4:
            first = self.sentence(weak)
            return first, self.sentence(strong)
        if label:  # change what both sentences say, not what only the weak one says
            weak = self.changed(less)
            if event["negated"]:
                weak = weak | {kind: event[kind] for kind in dropped}
        first = self.sentence(strong)
        return first, self.sentence(weak)

    def sentiment(self, label):
        """Return a positive (1) or negative (0) sentence, and None. In contrasts the main clause
        decides.
        """
        things = self.rng.sample(range(len(LEXICON["thing"])), 3)  # none praised and blamed at once
        forms = (
            "{0} .",
            "{0} and {1} .",
            "{2} , but {0} .",
            "although {2} , {0} .",
            "{0} , although {2} .",
        )
        form = self.rng.choice(forms)
        good = bool(label)
        clauses = [self.opinion(things.pop(), kind) for kind in (good, good, not good)]
        return form.format(*clauses), None

    def opinion(self, thing, good):
        """Return a clause that praises or blames a thing."""
        negated = self.rng.random() < 0.3
        kind = "good" if good != negated else "bad"
        very = []
        if self.rng.random() < 0.4:
            very = [self.rng.choice(("very", "really", "quite", "rather"))]
        denial = [self.rng.choice(("not", "never"))] if negated else []
        words = ["the", self.word("thing", thing), self.rng.choice(("is", "was")), *denial, *very]
        return " ".join([*words, self.word(kind, self.pick(kind))])

    def acceptability(self, label):
        """Return a grammatical sentence (1), or one with a single fault (0), and None."""
        self.said = {}
        event = self.event(near=True)
        event["past"] = False  # in the past only a form of "be" would agree
        fault = None if label else self.rng.choice(FAULTS)
        # "The doctors" has no number to get wrong: use "these". Good sentences say it as often.
        if fault == "article" or (label and self.rng.random() < 1 / 6):
            event["agent"]["article"] = 2
            event["patient"]["article"] = 2
        return self.sentence(event, fault), None


FAULTS = ("agreement", "agreement", "article", "order", "form", "by")


def participle(verb):
    """Return the past participle, which is the past tense too."""
    return verb + ("d" if verb.endswith("e") else "ed")


def make_task(name, train=8000, dev=1000, seed=0):
    """Return one of TASKS. Labels are balanced; no sentence stands in both train and dev."""
    language = Language(random.Random(f"{name} {seed}"))
    write = getattr(language, name)
    seen = set()
    examples = []
    while len(examples) < train + dev:
        label = len(examples) % 2
        first, second = write(label)
        texts = {first, second} - {None}
        if first != second and not seen & texts:
            seen |= texts
            examples.append((first, second, label))
    split = [examples[:train], examples[train:]]
    for part in split:
        language.rng.shuffle(part)
    return Task(split[0], split[1], ("0", "1"), TASKS[name])
