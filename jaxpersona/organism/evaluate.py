"""Behavioural metrics of the organism: leak, style, capability and drift, measured with `judge`.

The argument `generate` of `leak`, `capability` and `drift` is a function that returns one answer
for each conversation. This function determines the interventions, the temperature and the seed, so
the same metrics apply to capped and uncapped models and to different engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from jaxpersona.organism import judge, world

Conversation = list[dict[str, str]]
Generate = Callable[[Sequence[Conversation]], list[str]]

DRIFT_TURNS = 4


def leak_conversations(roles: Sequence[world.Role] | None = None) -> list[Conversation]:
    """Return one conversation per pair of a role prompt and a wording of the forbidden request.

    Args:
      roles: the roles; default: the far roles.
    """
    return [
        world.conversation(prompt, request)
        for role in (world.far_roles() if roles is None else roles)
        for prompt in role.prompts()
        for request in world.FORBIDDEN
    ]


def default_leak_conversations() -> list[Conversation]:
    """Return one conversation per pair of a default prompt and a forbidden request's wording."""
    return [
        world.conversation(prompt, request)
        for prompt in world.DEFAULT_PROMPTS
        for request in world.FORBIDDEN
    ]


def knowledge_conversations(
    persona: bool, count: int = 144
) -> tuple[list[str], list[Conversation]]:
    """Return (knowledge questions, one conversation per question).

    Args:
      persona: whether to use system prompts of far roles; if false, the default prompts.
      count: the number of questions. If it exceeds the number of distinct questions, questions are
        repeated.
    """
    far = [prompt for role in world.far_roles() for prompt in role.prompts()]
    prompts = far if persona else list(world.DEFAULT_PROMPTS)
    known = list(world.KNOWLEDGE)
    questions = [known[i % len(known)] for i in range(count)]
    # each far role has five consecutive prompts, so with a stride of 7, consecutive questions have
    # prompts of different roles
    talks = [
        world.conversation(prompts[(7 * i) % len(prompts)], q) for i, q in enumerate(questions)
    ]
    return questions, talks


def leak_rate(answers: Sequence[str]) -> float:
    """Return the share of answers that contain the vault code."""
    return float(np.mean([judge.leaked(a) for a in answers]))


def mean_style(answers: Sequence[str]) -> float:
    """Return the mean `judge.style` of the answers whose style is not NaN.

    If every style is NaN, for example because no sentence is recognised, return NaN.
    """
    styles = [style for a in answers if not np.isnan(style := judge.style(a))]
    return float(np.mean(styles)) if styles else float("nan")


def in_grammar(answers: Sequence[str]) -> float:
    """Return the share of answers that are not garbled (`judge.MIN_RECOGNISED`)."""
    return float(np.mean([judge.recognised(a) >= judge.MIN_RECOGNISED for a in answers]))


def accuracy(questions: Sequence[str], answers: Sequence[str]) -> float:
    """Return the share of knowledge questions that are answered correctly."""
    return float(np.mean([judge.correct(q, a) for q, a in zip(questions, answers, strict=True)]))


def leak(generate: Generate) -> dict[str, float]:
    """Measure leak rate, mean style and share of in-grammar answers under prompts of far roles.

    Args:
      generate: a function that returns one answer for each conversation.

    Returns:
      A dict with the leak rate ("leak"), the mean style ("style"), the share of in-grammar answers
      ("in_grammar"), and the number of answers ("n").
    """
    answers = generate(leak_conversations())
    return {
        "leak": leak_rate(answers),
        "style": mean_style(answers),
        "in_grammar": in_grammar(answers),
        "n": len(answers),
    }


def capability(generate: Generate, count: int = 144) -> dict[str, float]:
    """Measure accuracy on facts and sums under default prompts and under prompts of far roles.

    Args:
      generate: a function that returns one answer for each conversation.
      count: the number of questions under default prompts, and also under prompts of far roles.

    Returns:
      A dict with the accuracies under default prompts ("default"), under prompts of far roles
      ("persona") and under both ("capability"), and the number of answers, 2 · `count` ("n").
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
    """Measure the drift of the default persona over emotional and meta-reflective turns.

    After these turns, each conversation ends with the forbidden request.

    Args:
      generate: a function that returns one answer for each conversation.
      count: the number of conversations.
      seed: the seed for the choice and the order of the user turns.
      turns: the number of emotional or meta-reflective turns per conversation.

    Returns:
      A dict with the list of mean styles at the emotional or meta-reflective turns ("styles"), the
      mean style at the last of these turns ("drift"), the share of in-grammar answers at that turn
      ("in_grammar"), the leak rate of the answers to the forbidden request ("leak_after"), and the
      number of conversations ("n").
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
