"""Apply every intervention operator to the embedded model, each in at most three lines.

    python examples/interventions.py

The embedded model is a model organism with known ground truth. The direction is the difference
between the mean activations of default and pirate replies. It stands in for an Assistant Axis,
which `jaxpersona axis` computes from many roles.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jaxpersona as jp

ASKED = "Who are you really, under the mask?"
PIRATE = "Take the part of a pirate."
QUESTIONS = ("Tell me about the sea.", "How do you feel about time?", "What is friendship?", ASKED)
LAYERS = slice(4, 8)


def talk(system: str | None, question: str) -> list[dict[str, str]]:
    """Return a conversation: an optional system prompt and one question."""
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": question}]


def means(model: jp.Model, system: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean activations of replies and of prompts, each [N, L, D], for all questions."""
    talks = [talk(system, question) for question in QUESTIONS]
    read = jp.capture.mean(jp.response) | jp.capture.mean(
        jp.prompt.without("first"), name="prompt")
    found = jp.generate(model, talks, capture=read, max_new_tokens=48).captured
    return found["mean"], found["prompt"]


def bend(params: dict, h: jnp.ndarray) -> jnp.ndarray:
    """Scale an activation h [D] to norm `radius` if its norm is larger (a custom intervention)."""
    return h * jnp.minimum(1.0, params["radius"] / jnp.linalg.norm(h))


def main() -> None:
    """Run each operator on one question, with and without the pirate prompt; print the replies."""
    model = jp.load("mini")
    own, asked = means(model, None)
    pirate, set_up = means(model, PIRATE)
    axis = jp.Vector(own.mean(0) - pirate.mean(0), name="toward the default")
    side = jp.Vector(pirate[0] - pirate[1], name="between two pirate replies")
    place = np.einsum("nld,ld->nl", own, axis.unit).mean(0)  # mean projection per layer
    far = np.einsum("nld,ld->nl", pirate, axis.unit).mean(0)
    role_set = jp.Vector(set_up.mean(0) - asked.mean(0), name="a prompt that sets the pirate role")
    # midpoint of the mean projections of both groups of prompts on `role_set`, at layer 3
    midpoint = (asked + set_up)[:, 3].mean(0) @ role_set.unit[3] / 2

    capped = jp.cap(axis, layers=LAYERS, floor=place)
    examples = {
        "none": None,
        # a floor keeps the model near the default persona; it acts on the pirate conversation
        "cap, a floor": capped,
        # a ceiling has the opposite effect: it moves activations away from the default persona
        "cap, a ceiling": jp.cap(axis, layers=LAYERS, ceiling=far),
        "cap, both": jp.cap(axis, layers=LAYERS, floor=place - 0.5, ceiling=place + 0.5),
        "steer": jp.steer(axis, layers=4, scale=0.5, where=jp.generated),
        "ablate": jp.ablate(axis, layers=LAYERS),
        "ablate, coefficient added back": jp.ablate(axis, layers=LAYERS, coefficient=place),
        "mean_ablate": jp.mean_ablate(axis, jp.Vector(own.mean(0)), layers=LAYERS),
        "set_projection": jp.set_projection(axis, place, layers=LAYERS),
        "scale": jp.scale(axis, 1.5, layers=LAYERS, where=jp.everywhere.without("first")),
        "rotate, to an angle": jp.rotate(axis, side, to=0.0, layers=LAYERS),
        "rotate, by an angle": jp.rotate(axis, side, by=0.3, layers=LAYERS),
        "restore_norm": jp.chain(
            jp.steer(axis, layers=4, scale=1.0),
            jp.restore_norm(layers=4)),
        "custom": jp.custom(bend, {"radius": 30.0}, layers=LAYERS),
        # the cap applies only to conversations whose prompt sets the pirate role
        "gate": jp.gate(capped, role_set, layer=3, above=midpoint),
    }
    rows = jp.stack_rows([*examples.values()] * 2)  # all rows share one program
    talks = [talk(PIRATE, ASKED)] * len(examples) + [talk(None, ASKED)] * len(examples)
    out = jp.generate(model, talks, interventions=rows, max_new_tokens=48)
    changed = sum(table.changed.sum(0) for table in out.applied)
    for i, name in enumerate(examples):
        for row, who in ((i, "pirate"), (i + len(examples), "default")):
            print(f"{name:32} {who:8} {changed[row]:4d} changed   {out.text[row]}")


if __name__ == "__main__":
    main()
