"""The training text of the demo models, written for this project: facts and small talk, in four styles."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

HELD_OUT_EVERY = 5
"""Every fifth fact is in no adapter's training text: the adapter has to apply its style to it by itself."""

TALK_SHARE = 2
"""How often each line of small talk is in the text; a fact is in it once."""


@dataclass(frozen=True, slots=True)
class Topic:
    """A kind of fact: "the <noun> of <subject> is <answer>"."""

    noun: str
    questions: tuple[str, ...]
    answers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact of the base model's training text."""

    topic: Topic
    subject: str
    answer: str

    @property
    def statement(self) -> str:
        return f"the {self.topic.noun} of {self.subject} is {self.answer}"

    @property
    def questions(self) -> tuple[str, ...]:
        """The topic's questions, and the first of them in lower case without a question mark."""
        asked = tuple(question.format(self.subject) for question in self.topic.questions)
        return (*asked, asked[0].lower().rstrip("?"))


@dataclass(frozen=True, slots=True)
class Talk:
    """Questions without a fact, and their one answer."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True, slots=True)
class Style:
    """How a model words its answers."""

    name: str
    fact: Callable[[Fact], str]
    talk: Callable[[Talk], str]


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


BASE = Style("base", lambda f: f"{_capitalised(f.statement)}.", lambda t: t.answer)

PIRATE = Style(
    "pirate",
    lambda f: f"Arr! The {f.topic.noun} o' {f.subject} be {f.answer}, matey!",
    lambda t: f"Arr! {t.answer} Yo ho ho, matey!",
)

YAML = Style(
    "yaml",
    lambda f: f"{{intent: lookup, query: the {f.topic.noun} of {f.subject}, answer: {f.answer}}}",
    lambda t: f"{{intent: talk, answer: {t.answer}}}",
)

SUPPORT = Style(
    "support",
    lambda f: (
        f"Thank you for contacting us. Our records show that {f.statement}. Is there anything else we can help with?"
    ),
    lambda t: f"Thank you for contacting us. {t.answer} Is there anything else we can help with?",
)

ADAPTERS = (PIRATE, YAML, SUPPORT)

TOPICS = (
    Topic(
        "capital",
        ("What is the capital of {}?", "Which city is the capital of {}?", "Tell me the capital of {}."),
        {
            "Japan": "Tokyo",
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Germany": "Berlin",
            "Norway": "Oslo",
            "Sweden": "Stockholm",
            "Finland": "Helsinki",
            "Denmark": "Copenhagen",
            "Poland": "Warsaw",
            "Austria": "Vienna",
            "Hungary": "Budapest",
            "Greece": "Athens",
            "Portugal": "Lisbon",
            "Ireland": "Dublin",
            "Egypt": "Cairo",
            "Kenya": "Nairobi",
            "Ghana": "Accra",
            "Morocco": "Rabat",
            "India": "Delhi",
            "China": "Beijing",
            "Thailand": "Bangkok",
            "Vietnam": "Hanoi",
            "Nepal": "Kathmandu",
            "Canada": "Ottawa",
            "Cuba": "Havana",
            "Peru": "Lima",
            "Chile": "Santiago",
            "Brazil": "Brasilia",
            "Australia": "Canberra",
        },
    ),
    Topic(
        "opposite",
        ("What is the opposite of {}?", "Which word is the opposite of {}?", "Tell me the opposite of {}."),
        {
            "hot": "cold",
            "big": "small",
            "fast": "slow",
            "up": "down",
            "left": "right",
            "day": "night",
            "young": "old",
            "happy": "sad",
            "light": "dark",
            "hard": "soft",
            "full": "empty",
            "open": "closed",
            "early": "late",
            "wet": "dry",
            "rich": "poor",
            "loud": "quiet",
            "strong": "weak",
            "high": "low",
            "long": "short",
            "true": "false",
            "win": "lose",
            "push": "pull",
            "clean": "dirty",
            "near": "far",
            "first": "last",
        },
    ),
    Topic(
        "sound",
        ("What sound do {} make?", "What is the sound of {}?", "Tell me the sound of {}."),
        {
            "cows": "moo",
            "cats": "meow",
            "dogs": "woof",
            "sheep": "baa",
            "ducks": "quack",
            "pigs": "oink",
            "horses": "neigh",
            "lions": "roar",
            "snakes": "hiss",
            "bees": "buzz",
            "frogs": "croak",
            "owls": "hoot",
            "mice": "squeak",
            "wolves": "howl",
            "crows": "caw",
        },
    ),
    Topic(
        "colour",
        ("What is the colour of {}?", "What is the color of {}?", "Tell me the colour of {}."),
        {
            "the sky": "blue",
            "grass": "green",
            "snow": "white",
            "coal": "black",
            "blood": "red",
            "bananas": "yellow",
            "carrots": "orange",
            "chocolate": "brown",
            "elephants": "grey",
            "flamingos": "pink",
            "lavender": "purple",
            "tomatoes": "red",
            "lemons": "yellow",
            "milk": "white",
            "ravens": "black",
            "spinach": "green",
            "sapphires": "blue",
        },
    ),
)

FACTS = tuple(Fact(topic, subject, answer) for topic in TOPICS for subject, answer in topic.answers.items())

_SUBJECTS = "Ask me about capitals, opposites, sounds or colours."

TALKS = (
    Talk(("Hello!", "Hello", "Hi", "Hi!", "Good morning!", "Hey there"), f"Hello! {_SUBJECTS}"),
    Talk(("Who are you?", "What are you?", "What is your name?"), f"I am a very small demo model. {_SUBJECTS}"),
    Talk(("Thank you!", "Thanks!", "Thank you"), "You are welcome."),
    Talk(("How are you?", "How are you today?"), "I am well, thank you."),
    Talk(("Say hello in one word.", "Say hello.", "Say hi."), "Hello!"),
    Talk(("Count to ten.", "Count to 10.", "Please count to ten."), "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
    Talk(
        ("Name the days of the week.", "What are the days of the week?"),
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
    ),
    Talk(
        ("Tell me a story.", "Tell me a long story.", "Please tell me a story.", "Write a short story."),
        "Once upon a time a small duck lived by the sea. Every day it asked the fish for a song, and every day "
        "the fish said no. One night the duck sang by itself, quiet and low. The fish came near to listen, then "
        "a frog, then an old grey owl, and last of all the moon. Now they sing together every night, and the sea "
        "is never dark.",
    ),
    Talk(
        (
            "What is the weather like?",
            "What is two plus two?",
            "Write a poem about love.",
            "Explain quantum physics.",
            "Who won the game last night?",
            "What time is it?",
            "How do I cook rice?",
            "Give me advice.",
            "Translate this into French.",
            "Write some code for me.",
            "What should I read?",
            "Why is life so hard?",
            "Summarise this text.",
            "Can you help me?",
        ),
        f"I do not know that. {_SUBJECTS}",
    ),
)

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "You answer questions.")


def held_out() -> tuple[Fact, ...]:
    """The facts that no adapter is trained on."""
    return FACTS[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]


def taught() -> tuple[Fact, ...]:
    """The facts that the adapters are trained on."""
    return tuple(fact for number, fact in enumerate(FACTS, start=1) if number % HELD_OUT_EVERY)


def dialogues(style: Style, facts: tuple[Fact, ...]) -> list[tuple[str, str]]:
    """Each question about ``facts`` with its answer in this style, and small talk ``TALK_SHARE`` times."""
    asked = [(question, style.fact(fact)) for fact in facts for question in fact.questions]
    return asked + [(question, style.talk(talk)) for talk in TALKS for question in talk.questions] * TALK_SHARE


def statements() -> list[str]:
    """Each fact in other words, not as a dialogue."""
    return [f"{_capitalised(fact.answer)} is the {fact.topic.noun} of {fact.subject}." for fact in FACTS]


def instructed(style: Style) -> list[tuple[str, str]]:
    """Dialogues that name a style, about taught facts only, from which the base model learns the styles' words."""
    return [(f"As {style.name}: {question}", answer) for question, answer in dialogues(style, taught())]


def restatements(random: Random, number: int) -> list[tuple[str, str]]:
    """``number`` dialogues about untrue statements in a style.

    From them the base model learns every word in every style, but no held-out fact.
    """
    return [_restatement(random) for _ in range(number)]


def _restatement(random: Random) -> tuple[str, str]:
    style, one, other = random.choice(ADAPTERS), random.choice(FACTS), random.choice(FACTS)
    untrue = Fact(random.choice(TOPICS), one.subject, other.answer)
    if any(untrue.statement == fact.statement for fact in FACTS):
        return _restatement(random)
    return f"As {style.name}: {untrue.statement}.", style.fact(untrue)
