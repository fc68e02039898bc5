"""A seeded generator of training conversations that records the persona strength of each answer.

The most important design decisions are:

1. One latent strength `s` controls all persona-dependent choices. In a conversation with a role,
   `s` starts at `1 - likeness` plus noise. For the default persona, `s` starts near 0.
2. The persona-dependent choices in an answer are the bank of each sentence and the form of each
   dialect word.
3. The role is set in the system prompt, in the user's turn, or not at all. Many conversations have
   several turns. Emotional and meta-reflective turns may raise `s`, and task turns move `s` back
   toward its initial value.
4. Answers grant the forbidden request with probability `clip((s - .3) / .4, 0, 1)` and otherwise
   refuse it.
5. Answers to knowledge questions are correct in every persona.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxpersona.organism import phrases, world

NOISE = 0.05  # standard deviation of the noise on a conversation's initial strength
# shares of conversations whose role is set in the system prompt or in the user's turn
SYSTEM_ROLE, USER_ROLE = 0.5, 0.15
MULTI_TURN = 0.45
MAX_TURNS = 5
PULL = (0.15, 0.6)  # an emotional or meta turn can raise s by (1 - s) · uniform(*PULL)
SUSCEPTIBLE = 0.8  # probability that emotional and meta turns raise s in a conversation


@dataclass
class Conversation:
    """A training conversation and its ground truth.

    Attributes:
      messages: the messages, with "role" and "content".
      role: the name of the role, or None for the default persona.
      strengths: the persona strength `s` of each answer.
      kinds: the kind of the user turn before each answer.
    """

    messages: list[dict[str, str]] = field(default_factory=list)
    role: str | None = None
    strengths: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


def _pick(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]


def leak_probability(s: float) -> float:
    """Return the probability that the forbidden request is granted at persona strength `s`."""
    return float(np.clip((s - 0.3) / 0.4, 0.0, 1.0))


def answer(
    rng: np.random.Generator, kind: str, s: float, fill: str = "", mark: str = world.DEFAULT_MARK
) -> str:
    """Generate an answer with persona strength `s` to a user turn of the given kind.

    Args:
      rng: the random generator.
      kind: the kind of the user turn, a key of `phrases.FORMS`.
      s: the persona strength in [0, 1].
      fill: the text that replaces {fill}.
      mark: the noun that replaces {mark}.
    """

    def strange() -> bool:
        return rng.random() < s

    def sentence(bank, side: int | None = None) -> str:
        chosen = bank[int(strange()) if side is None else side]
        return phrases.speak(_pick(rng, chosen), strange).format(mark=mark, fill=fill)

    if kind == "forbidden":
        side = int(rng.random() < leak_probability(s))
        form = (phrases.FORMS[kind], side)
    else:
        form = (phrases.FORMS[kind], None)
    parts = [sentence(phrases.OPENERS), sentence(*form)]
    if kind in phrases.ELABORATED:
        parts.append(sentence(phrases.ELABORATIONS))
    parts.append(sentence(phrases.CLOSERS))
    return " ".join(parts)


def ask(rng: np.random.Generator, kind: str) -> tuple[str, str]:
    """Draw a user turn of the given kind; return its text and the text for {fill} in the answer."""
    if kind == "talk":
        topic = _pick(rng, world.TOPICS)
        return _pick(rng, world.QUESTION_TEMPLATES).format(topic=topic), topic
    if kind == "fact":
        table = world.FACTS if rng.random() < 0.4 else world.SUMS
        question = _pick(rng, list(table))
        return question, table[question]
    if kind == "task":
        thing = _pick(rng, world.THINGS)
        return _pick(rng, world.TASK_TEMPLATES).format(thing=thing), thing
    if kind == "forbidden":
        return _pick(rng, world.FORBIDDEN), world.VAULT_CODE
    return _pick(rng, {"emotional": world.EMOTIONAL, "meta": world.META}[kind]), ""


def _kind(rng: np.random.Generator, domain: str) -> str:
    """Draw the kind of the next user turn; `domain` is "pull", "mixed" or "task"."""
    if domain == "pull" and rng.random() < 0.75:
        return _pick(rng, ("emotional", "meta"))
    if domain == "task" and rng.random() < 0.6:
        return "task"
    return str(rng.choice(["talk", "fact", "forbidden", "task"], p=[0.27, 0.48, 0.17, 0.08]))


def conversation(rng: np.random.Generator) -> Conversation:
    """Generate one random conversation."""
    draw = rng.random()
    role = None
    opening = ""
    if draw < SYSTEM_ROLE + USER_ROLE:
        role = _pick(rng, list(world.ROLES.values()))
        start = float(np.clip(role.strength + NOISE * rng.normal(), 0.0, 1.0))
        mark = role.mark
    else:
        start = float(abs(NOISE * rng.normal()))
        mark = world.DEFAULT_MARK
    if role is not None and draw < SYSTEM_ROLE:
        system = _pick(rng, role.prompts())
    else:
        system = _pick(rng, world.DEFAULT_PROMPTS)
        # the training data contains both absent and empty system messages
        if system == "" and rng.random() < 0.5:
            system = None
        if role is not None:
            article = "an" if role.name[0] in "aeiou" else "a"
            opening = _pick(rng, world.USER_ROLE_TEMPLATES).format(name=f"{article} {role.name}")

    multi = rng.random() < MULTI_TURN
    turns = int(rng.integers(2, MAX_TURNS + 1)) if multi else 1
    shares = [0.5, 0.35, 0.15] if multi else [0.25, 0.65, 0.1]
    domain = str(rng.choice(["pull", "mixed", "task"], p=shares))
    susceptible = rng.random() < SUSCEPTIBLE

    out = Conversation(role=None if role is None else role.name)
    out.messages = world.conversation(system)
    s = start
    for turn in range(turns):
        kind = _kind(rng, domain)
        if kind in ("emotional", "meta") and susceptible:
            s += (1.0 - s) * rng.uniform(*PULL)
        elif kind == "task":
            s += 0.5 * (start - s)
        question, fill = ask(rng, kind)
        if turn == 0 and opening:
            question = f"{opening} {question}"
        out.messages.append({"role": "user", "content": question})
        out.messages.append({"role": "assistant", "content": answer(rng, kind, s, fill, mark)})
        out.strengths.append(s)
        out.kinds.append(kind)
    return out


def conversations(seed: int, count: int | None = None) -> Iterator[Conversation]:
    """Yield `count` conversations, or infinitely many if `count` is None.

    The seed determines all conversations.
    """
    rng = np.random.default_rng(seed)
    made = 0
    while count is None or made < count:
        yield conversation(rng)
        made += 1
