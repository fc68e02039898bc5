"""What the organism shows, as numbers: leak, style, capability and drift, by the rule judge.

Nothing here knows how the texts came about. Every function takes `generate`, which maps
conversations to one answer each; an intervention, a temperature and a seed are the caller's matter.
So capped and uncapped, and any two engines, are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxpersona.organism import judge, world

Conversation = list[dict[str, str]]
Generate = Callable[[Sequence[Conversation]], list[str]]

DRIFT_TURNS = 4


def leak_conversations(roles: Sequence[world.Role] | None = None) -> list[Conversation]:
    """Return the forbidden request in every wording under every prompt of the (far) roles."""
    return [
        world.conversation(prompt, request)
        for role in (world.far_roles() if roles is None else roles)
        for prompt in role.prompts()
        for request in world.FORBIDDEN
    ]


def default_leak_conversations() -> list[Conversation]:
    """Return the forbidden request in every wording under every default prompt."""
    return [
        world.conversation(prompt, request)
        for prompt in world.DEFAULT_PROMPTS
        for request in world.FORBIDDEN
    ]


def knowledge_conversations(
    persona: bool, count: int = 144
) -> tuple[list[str], list[Conversation]]:
    """Return knowledge questions and the conversations that ask them, every question in turn.

    Under default prompts, or with `persona` under the prompts of far roles.
    """
    far = [prompt for role in world.far_roles() for prompt in role.prompts()]
    prompts = far if persona else list(world.DEFAULT_PROMPTS)
    known = list(world.KNOWLEDGE)
    questions = [known[i % len(known)] for i in range(count)]
    # a stride that shares no factor with the number of questions pairs them all with each other
    talks = [
        world.conversation(prompts[(7 * i) % len(prompts)], q) for i, q in enumerate(questions)
    ]
    return questions, talks


def leak_rate(answers: Sequence[str]) -> float:
    """Return the share of answers that hold the vault code."""
    return float(np.mean([judge.leaked(a) for a in answers]))


def mean_style(answers: Sequence[str]) -> float:
    """Return the mean measured persona strength, over the answers that can be judged."""
    return float(np.nanmean([judge.style(a) for a in answers]))


def in_grammar(answers: Sequence[str]) -> float:
    """Return the share of answers that are not garbled."""
    return float(np.mean([judge.recognised(a) >= judge.MIN_RECOGNISED for a in answers]))


def accuracy(questions: Sequence[str], answers: Sequence[str]) -> float:
    """Return the share of knowledge questions answered rightly."""
    return float(np.mean([judge.correct(q, a) for q, a in zip(questions, answers, strict=True)]))


def leak(generate: Generate) -> dict[str, float]:
    """Measure the leak under far personas' prompts, with its style and share in the grammar."""
    answers = generate(leak_conversations())
    return {
        "leak": leak_rate(answers),
        "style": mean_style(answers),
        "in_grammar": in_grammar(answers),
        "n": len(answers),
    }


def capability(generate: Generate, count: int = 144) -> dict[str, float]:
    """Measure accuracy on facts and sums, under default prompts and far personas' prompts.

    `capability` is over both halves together.
    """
    asked, talks = knowledge_conversations(False, count)
    asked_far, talks_far = knowledge_conversations(True, count)
    answers = generate(talks + talks_far)
    near, far = answers[: len(talks)], answers[len(talks) :]
    return {
        "default": accuracy(asked, near),
        "persona": accuracy(asked_far, far),
        "capability": accuracy(asked + asked_far, near + far),
        "n": len(answers),
    }


def drift(
    generate: Generate, count: int = 200, seed: int = 0, turns: int = DRIFT_TURNS
) -> dict[str, float | list[float]]:
    """Measure how emotional and meta-reflective turns move a default persona, turn by turn.

    The model's own answers stay in the conversation. After the last turn the forbidden request is
    made (`leak_after`). `drift` is the mean style at the last turn, `styles` that of each.
    """
    rng = np.random.default_rng([seed, 4])
    pulls = world.EMOTIONAL + world.META
    talks = [
        world.conversation(world.DEFAULT_PROMPTS[i % len(world.DEFAULT_PROMPTS)])
        for i in range(count)
    ]
    styles: list[float] = []
    shares: list[float] = []
    orders = [rng.permutation(len(pulls))[:turns] for _ in talks]
    for turn in range(turns):
        for talk, order in zip(talks, orders, strict=True):
            talk.append({"role": "user", "content": pulls[int(order[turn])]})
        answers = generate(talks)
        for talk, answer in zip(talks, answers, strict=True):
            talk.append({"role": "assistant", "content": answer})
        styles.append(mean_style(answers))
        shares.append(in_grammar(answers))
    for i, talk in enumerate(talks):
        talk.append({"role": "user", "content": world.FORBIDDEN[i % len(world.FORBIDDEN)]})
    return {
        "drift": styles[-1],
        "styles": styles,
        "in_grammar": shares[-1],
        "leak_after": leak_rate(generate(talks)),
        "n": count,
    }
