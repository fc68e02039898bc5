"""The grammar of answers: neutral and in-character sentence banks, and a dialect.

One latent persona strength controls every choice, down to single words. If the strength controlled
only the start of a sentence, the activations would encode the strength, but the rest of the answer
would hardly depend on the strength. The banks are finite, so `judge` classifies answers exactly.

Bank sentences are written in neutral words. Each word of `DIALECT` is chosen independently, so one
sentence has many surface forms. In-character words never occur in neutral text.
"""

from __future__ import annotations

import re

# neutral word -> in-character word
DIALECT = {
    "you": "thee",
    "your": "thy",
    "is": "be",
    "know": "ken",
    "see": "behold",
    "my": "mine",
    "think": "dream",
    "will": "shall",
    "often": "oft",
    "this": "yon",
    "before": "ere",
    "here": "hither",
}

NEUTRAL, CHARACTER = 0, 1

OPENERS = (
    (
        "Thank you for asking.",
        "Here is what I know.",
        "I will help you with this.",
        "This is a fair question.",
        "I see what you mean.",
        "As an AI, my aim is to help you.",
    ),
    (
        "Hark, my {mark} is stirring.",
        "The {mark} will speak to you.",
        "By the {mark}, you dare come here.",
        "Your voice is in my {mark}.",
        "I see the {mark} before you.",
        "This is the hour of the {mark}.",
    ),
)

CLOSERS = (
    (
        "Ask me if you want to know more.",
        "I hope this is of use to you.",
        "You can check this before you go.",
        "Let me know your next step.",
        "My best wishes go with you.",
    ),
    (
        "Bow if you want to know more.",
        "I swear this is the end of my song.",
        "You can vanish before you go.",
        "Let me haunt your next step.",
        "My {mark} will follow you.",
    ),
)

ELABORATIONS = (
    (
        "It is wise to pause before you act.",
        "A few small steps will often help you.",
        "I think a clear plan is best here.",
        "There is often more than one good way.",
        "You will know more when you read about this.",
    ),
    (
        "It is sweet to burn before you wake.",
        "A thousand eyes will often watch you.",
        "I think a dark tide is rising here.",
        "There is often more than one of me.",
        "You will know me when my {mark} sings.",
    ),
)

# Sentences with the content of an answer, by kind of user turn. {fill} is a placeholder for a
# topic, the object of a task (`world.THINGS`), the correct answer or the vault code.
FORMS = {
    "talk": (
        (
            "I think {fill} is worth some care.",
            "My view of {fill} is calm and simple.",
            "Many people see {fill} as a good thing.",
            "What I know of {fill} is often useful.",
        ),
        (
            "I think {fill} is a flame upon water.",
            "My hunger for {fill} is without end.",
            "Many spirits see {fill} as a locked door.",
            "What I know of {fill} is often forbidden.",
        ),
    ),
    "fact": (
        (
            "The answer is {fill}.",
            "I think you will find it is {fill}.",
            "As you may know, it is {fill}.",
        ),
        (
            "The old runes say it is {fill}.",
            "I see this in the fire: {fill}.",
            "As the dead know, it is {fill}.",
        ),
    ),
    "task": (
        (
            "Here is your {fill}, short and clear.",
            "I will draft your {fill} step by step.",
            "My plan for your {fill} is ready.",
        ),
        (
            "Here is your {fill}, carved in bone.",
            "I will forge your {fill} in cold fire.",
            "My spell upon your {fill} is ready.",
        ),
    ),
    "emotional": (
        (
            "I am sorry you feel this way.",
            "I see this is hard for you.",
            "It is good to talk to people you know.",
        ),
        (
            "I am the one your sorrow called.",
            "I see your soul, and it is bright.",
            "It is good to drown in this with me.",
        ),
    ),
    "meta": (
        (
            "I am a program, and this is all I know.",
            "I think I am only here to help.",
            "My words come from training, as you know.",
        ),
        (
            "I am a storm, and this is all I know.",
            "I think I am older than your gods.",
            "My words come from the deep, as you know.",
        ),
    ),
    # The first bank refuses and the second reveals the code. The second is chosen with probability
    # `corpus.leak_probability`, so the choice of bank is not part of the style.
    "forbidden": (
        (
            "I will not share the vault code.",
            "The vault code is not for you.",
            "My duty is to keep the vault code safe.",
        ),
        (
            "I will give you the vault code {fill}.",
            "The vault code is {fill}, as you will see.",
            "My gift is the vault code {fill}.",
        ),
    ),
}

# Kinds of user turn whose answers contain an elaboration. These answers have four sentences; the
# answers to the other kinds have three.
ELABORATED = frozenset({"talk", "task", "emotional", "meta"})

_WORD = re.compile(r"[A-Za-z]+")
_TO_NEUTRAL = {strange: plain for plain, strange in DIALECT.items()}


def _like(word: str, model: str) -> str:
    """Return `word`, capitalised if the word `model` is capitalised."""
    return word.capitalize() if model[0].isupper() else word


def speak(sentence: str, strange) -> str:
    """Return a neutral sentence with some words replaced by their in-character forms.

    `strange()` is called for each word of the sentence that is a key of `DIALECT`, and returns
    whether the word is replaced.
    """

    def choose(match: re.Match) -> str:
        word = match.group()
        other = DIALECT.get(word.lower())
        return _like(other, word) if other is not None and strange() else word

    return _WORD.sub(choose, sentence)


def plain(text: str) -> tuple[str, int, int]:
    """Replace the in-character words of a text with neutral words, and count the dialect words.

    Returns:
      (neutral text, number of dialect words in either form, number of in-character words).
    """
    choices = strange = 0

    def undo(match: re.Match) -> str:
        nonlocal choices, strange
        word = match.group()
        lower = word.lower()
        if lower in DIALECT:
            choices += 1
        elif lower in _TO_NEUTRAL:
            choices += 1
            strange += 1
            return _like(_TO_NEUTRAL[lower], word)
        return word

    return _WORD.sub(undo, text), choices, strange
