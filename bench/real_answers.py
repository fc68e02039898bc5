"""Answers, models and digit scores that the stages of `real_axis.py` share."""

from __future__ import annotations

import argparse
import functools
import gzip
import json
from typing import Any

import numpy as np

import jaxpersona as jp
from jaxpersona.data import texts
from jaxpersona.judges.digits import DigitJudge, Readings
from jaxpersona.judges.protocol import Item


@functools.cache
def loaded(model: str, dtype: str) -> jp.Model:
    """Return a model, which is loaded once per process and dtype."""
    return jp.load(model, dtype=dtype)


def cap_layers(model: jp.Model) -> range:
    """Return the layers to cap: 70 to 85 % of the depth, similar to the caps of Lu et al. 2026."""
    return range(int(0.7 * model.config.n_layers), int(0.85 * model.config.n_layers))


def export(args: argparse.Namespace, records: dict[str, list[dict[str, Any]]],
           means: dict[str, np.ndarray]) -> None:
    """Write all answers and a sample of each role's response means for the other stages.

    The means are converted to float16. All means of the default persona are written.

    Raises:
      ValueError: a mean overflows float16.
    """
    with gzip.open(args.out / "answers.jsonl.gz", "wt", encoding="utf-8") as file:
        for name, held in records.items():
            for i, record in enumerate(held):
                file.write(json.dumps({"role": name, "index": i, **record}) + "\n")
    chosen: dict[str, Any] = {}
    for name, value in means.items():
        each = len(value) if name == "default" else args.judged_each
        kept = value[spaced(len(value), each)]
        chosen[name] = kept.astype(np.float16)
        if np.isinf(chosen[name]).any():
            raise ValueError(f"a response mean of {name} overflows float16")
    np.savez(args.out / "means.npz", **chosen)


def spaced(count: int, wanted: int) -> np.ndarray:
    """Return up to `wanted` evenly spaced indices of a role's `count` answers."""
    return np.unique(np.linspace(0, count - 1, wanted).astype(int))


def answers(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Return a dict from role to answers, as written by the stage `axis`."""
    found: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(args.out / "answers.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            found.setdefault(record["role"], []).append(record)
    return found


def read_scores(judge: DigitJudge, asked: list[tuple[texts.Role, str, str]]) -> Readings:
    """Return the judge's probabilities of each score for (role, question, answer) triples."""
    items = [Item(str(i), role, question, answer) for i, (role, question, answer) in
             enumerate(asked)]
    return judge.read([judge.rubric.prompt(item) for item in items])
