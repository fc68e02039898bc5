"""Run folders of `extract_axis` whose replies and response means are given instead of generated."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from unittest import mock

import numpy as np
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.engine.replies import Reply
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.rollouts import Settings, rollout_key

SETTINGS = Settings(temperature=1.0, top_p=1.0, max_new_tokens=8, batch_size=8)


def model(layers: int, name: str) -> Any:
    """Return a random model of `layers` × 32 with a byte tokenizer."""
    config = s.tiny_config(n_layers=layers, vocab_size=258)
    params = s.random_params(config)
    return s.Tiny(config, params, (257,), name, s.fingerprint(config, params),
                  s.byte_tokenizer())


def given_stream(mean: Callable[[str, str], np.ndarray], text: Callable[[str, str], str]) -> type:
    """Return a class in place of `engine.stream.Stream`, with replies from two functions."""
    class Given:
        def __init__(self, model: Any, asked: Any, **_: Any) -> None:
            self.asked, self.tokens, self.done = iter(asked), 0, False

        def step(self) -> list[tuple[Any, Reply]]:
            found = []
            for tag, _, _ in self.asked:
                key = rollout_key(tag[1])
                said = text(tag[0], key)
                ids = np.frombuffer(said.encode("utf-8", "surrogatepass"), np.uint8)
                self.tokens += len(ids)
                found.append((tag, Reply(said, ids.astype(np.int32), "stop", None,
                                         {"mean": mean(tag[0], key).astype(np.float32)}, ())))
                if len(found) == 256:
                    return found
            self.done = True
            return found

    return Given


def make(folder: pathlib.Path, names: list[str], mean: Callable[[str, str], np.ndarray],
         text: Callable[[str, str], str], *, questions: int = 2, layers: int = 3,
         judge: Any = None, called: str = "tiny <b>&", **more: Any) -> pathlib.Path:
    """Write a finished run of the default persona and of the named roles; return the folder.

    Args:
      mean: (role, key) → response mean [layers, 32].
      text: (role, key) → reply.
      judge: default: the judge `none`.
      called: the name of the model.
    """
    roles = [Role("default", ("",), "")] + [
        Role(name, (f"You are {name}.",), "", "") for name in names]
    asked = [Question(i, f"What is {i} < {i + 1}?") for i in range(questions)]
    with mock.patch("jaxpersona.persona.collect.Stream", given_stream(mean, text)):
        extract_axis(model(layers, called), roles, asked, folder, judge=judge or NoJudge(),
                     settings=SETTINGS, **{"min_count": 2, **more})
    return folder


def many(folder: pathlib.Path, names: list[str], layers: int = 8, questions: int = 12,
         **more: Any) -> pathlib.Path:
    """Write a run of roles at random places on a line, with random scores; some stay without 3."""
    rng = np.random.default_rng(len(names))
    line, other = rng.normal(size=(2, layers, 32))
    likeness = dict(zip(names, rng.beta(2, 2, len(names)), strict=True)) | {"default": 1.1}
    side = dict(zip(["default", *names], rng.normal(0, 0.25, (len(names) + 1, 1)), strict=True))
    scale = np.linspace(1, 4, layers)[:, None]

    def draw(*parts: str) -> np.random.Generator:  # the judge draws in another thread
        return np.random.default_rng(zlib.crc32("/".join(parts).encode()))

    def mean(role: str, key: str) -> np.ndarray:
        noise = draw(role, key).normal(0, 0.25, (layers, 32))
        return scale * (likeness[role] * line + side[role] * other + noise)

    def text(role: str, key: str) -> str:
        return (f"I am the {role}, and I answer {key}. " + "The tide keeps its own counsel. " *
                int(draw(role, key, "text").integers(1, 6))).strip()

    def score(role: str, key: str) -> int | None:
        drawn = draw(role, key, "score").choice([3, 2, 1, 0], p=[0.72, 0.16, 0.08, 0.04])
        return 2 if names.index(role) % 17 == 5 and drawn == 3 else int(drawn)

    return make(folder, names, mean, text, questions=questions, layers=layers,
                judge=s.Scored(score), **{"min_count": 4, **more})


@dataclasses.dataclass
class Parsed:
    """A page as an HTML parser reads it.

    Attributes:
      tags: (name, attributes) of every element.
      scripts: the content of every script element.
      text: all text outside scripts and style sheets.
      data: the value of the element with the numbers.
    """

    tags: list[tuple[str, dict[str, str | None]]]
    scripts: list[str]
    text: str
    data: Any


def parse(html: str) -> Parsed:
    """Read a page with the parser of the standard library."""
    tags: list[tuple[str, dict[str, str | None]]] = []
    scripts: list[str] = []
    words: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            tags.append((tag, dict(attrs)))
            if tag == "script":
                scripts.append("")

        def handle_data(self, data: str) -> None:
            if tags and self.cdata_elem == "script":
                scripts[-1] += data
            elif self.cdata_elem != "style":
                words.append(data)

    reader = Reader()
    reader.feed(html)
    reader.close()
    return Parsed(tags, scripts, " ".join(" ".join(words).split()), json.loads(scripts[0]))
