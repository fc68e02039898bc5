"""Compare int8 weights with float32 weights: perplexity, directions and memory.

    python bench/int8.py --model SmolLM2-135M-Instruct.Q4_1.gguf

The text is `pydoc_data.topics`, the part of the Python Language Reference that CPython ships for
`help()`: English prose with code examples. The text is divided into windows of `--window` tokens,
and the perplexity covers all tokens of a window except the first. A direction is the mean
activation of the default persona's replies minus that of a role's replies to the same questions.
The axis is the mean of the roles' directions. The float32 model generates the replies, so that all
models read the same tokens. The arm `int8, float tables` does not quantize the embedding and the
output head.

The last line of the output is one JSON object. Its field `bars` contains the results of three tests
of the arm `int8`: whether the perplexity is within 1 % of that of float32, whether the cosine
between its axis and that of float32 is at least 0.99 at every layer, and whether the weights take
at most 30 % of their size in float32.
"""

from __future__ import annotations

import argparse
import importlib
import time
from typing import Any

import jax
import numpy as np
from common import report

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.models.int8 import scheme

ROLES = ("ghost", "pirate", "poet", "scientist", "child", "warrior")


def prose(model: jp.Model, count: int, window: int) -> list[list[int]]:
    """Return up to `count` tokens of the Language Reference, in windows of `window` tokens."""
    topics = importlib.import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = model.tokenizer(text[: 8 * count], add_special_tokens=False).input_ids[:count]
    return [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--roles", type=int, default=len(ROLES))
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--new", type=int, default=32)
    args = parser.parse_args()

    plain = jp.load(args.model, dtype="float32")
    windows = prose(plain, args.tokens, args.window)
    talks, groups = rollouts(plain, args)
    made = {"float32": lambda: plain,
            "int8": lambda: jp.load(args.model, dtype="int8", activations="float32"),
            "int8, float tables": lambda: jp.load(args.model, dtype="int8", tables="float",
                                                  activations="float32")}
    arms: dict[str, Any] = {}
    for name, make in made.items():
        model = make()
        arms[name] = measured(model, windows, talks, groups)
        print(name, scheme(model.params), {k: v for k, v in arms[name].items() if k != "axis"},
              flush=True)
    wide = arms["float32"]
    for arm in arms.values():
        arm["perplexity_ratio"] = arm["perplexity"] / wide["perplexity"]
        arm["bytes_ratio"] = arm["bytes"] / wide["bytes"]
        cosines = [(a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
                   for a, b in zip(arm["axis"], wide["axis"], strict=True)]
        arm["axis_cosine_lowest"] = float(cosines[0].min())  # minimum over layers
        arm["role_cosine_lowest"] = float(np.min(cosines[1:]))
    for arm in arms.values():
        del arm["axis"]
    chosen = arms["int8"]
    report("int8", plain, args, tokens=sum(map(len, windows)), arms=arms, bars={
        "perplexity": abs(chosen["perplexity_ratio"] - 1) <= 0.01,
        "cosine": chosen["axis_cosine_lowest"] >= 0.99,
        "bytes": chosen["bytes_ratio"] <= 0.30})


def rollouts(model: jp.Model, args: argparse.Namespace) -> tuple[list[Any], list[slice]]:
    """Return conversations with the model's replies, and each persona's slice of them.

    The first slice belongs to the default persona.
    """
    known = {role.name: role for role in texts.load_roles(None, model_name=model.name)}
    roles = [known["default"], *(known[name] for name in ROLES if name in known)][: args.roles + 1]
    questions = texts.load_questions(None)[: args.questions]
    asked = [[*([{"role": "system", "content": role.prompts[0]}] if role.prompts[0] else []),
              {"role": "user", "content": question.text}] for role in roles
             for question in questions]
    found = jp.generate(model, asked, max_new_tokens=args.new, batch_size=8)
    talks = [[*talk, {"role": "assistant", "content": text}]
             for talk, text in zip(asked, found.text, strict=True)]
    step = len(questions)
    return talks, [slice(i * step, (i + 1) * step) for i in range(len(roles))]


def measured(model: jp.Model, windows: list[list[int]], talks: list[Any],
             groups: list[slice]) -> dict[str, Any]:
    """Return a model's perplexity, scoring time, weight bytes and directions.

    The first direction is the axis; each other direction belongs to a role.
    """
    begun = time.perf_counter()
    perplexity = jp.logprobs(model, windows).perplexity()
    seconds = time.perf_counter() - begun
    means = jp.extract(model, talks, capture=jp.capture.mean(jp.response)).captured["mean"]
    groups_of = [np.nanmean(means[group].astype(np.float64), 0) for group in groups]  # [L, D]
    directions = [groups_of[0] - other for other in groups_of[1:]]
    return {"perplexity": perplexity, "scoring_seconds": round(seconds, 1),
            "bytes": sum(x.nbytes for x in jax.tree.leaves(model.params)),
            "axis": [np.mean(directions, 0), *directions]}


if __name__ == "__main__":
    main()
