"""Every public object prints as one line of at most 120 characters, without its array values."""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import pkgutil
import re

import jax
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona import brief
from jaxpersona.data.texts import Question, Role, Trait
from jaxpersona.judges.digits import DigitJudge
from jaxpersona.judges.endpoint import Endpoint
from jaxpersona.judges.http import HttpJudge
from jaxpersona.judges.human import HumanJudge
from jaxpersona.judges.judges import NoJudge, SelfJudge
from jaxpersona.judges.limits import Batch, Budget
from jaxpersona.judges.protocol import Item, Verdict
from jaxpersona.judges.rubric import TRAITS
from jaxpersona.organism.method import RuleJudge
from jaxpersona.persona.precision import Reliability
from jaxpersona.runs.rollouts import Settings
from jaxpersona.training.learn import Direction

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def session():
    """Return the objects of an interactive session by name."""
    model, axis = jp.load("mini"), jp.load_axis("mini")
    cap = jp.cap(axis, layers=slice(4, 8), floor=1.0)
    read = jp.capture.mean() | jp.capture.last() | jp.capture.projections(axis)
    batch = jp.encode(model, ["hi", "x" * 500])
    out = jp.forward(model.params, model.config, batch, interventions=cap, capture=read, slots=640)
    generated = jp.generate(model, ["hi"] * 2, max_new_tokens=4, capture=read, interventions=cap)
    engine = jp.Engine(model, rows=2)
    handle = engine.submit(request := jp.Request("x" * 500, max_new_tokens=4))
    events = list(engine.stream(handle))
    return {
        "model": model, "config": model.config, "params": model.params,
        "layer": model.params.layers[0], "axis": axis, "vector": 2 * axis,
        "long": dataclasses.replace(axis, name="n" * 300),
        "batch": batch, "output": out, "carry": out.carry, "cache": out.cache,
        "applied": out.applied[0], **{f"state {k}": v for k, v in out.captured.items()},
        "generated": generated, "row": generated.rows[0],
        "extracted": jp.extract(model, ["hi"], capture=jp.capture.last()), "engine": engine,
        "request": request, "handle": handle, "event": events[0], "reply": events[-1].reply,
        "check": (check := jp.check(model, axis)),
        "failed": dataclasses.replace(check, ok=False, faults=("the sign is wrong",) * 20),
        "caps": jp.Caps(np.ones((1, 8)), (1,), np.ones(1), ("a",)), "capture": read, "edits": cap,
        "chain": jp.chain(*[cap] * 40), "where": jp.response.without("first").within(2, 30),
        "scored": jp.logprobs(model, ["hi"]),
        "verdict": Verdict("pos_p0_q0", 3, 2.5, 0.9, raw="3" * 300),
        "role": Role("ghost" * 40, ("x" * 900,) * 5, "y" * 900, "z" * 90),
        "trait": Trait("odd", (("x" * 900, "y"),) * 5, ("Why?",) * 40, "z" * 900),
        "question": Question(7, "Why?" * 90), "settings": Settings(), "budget": Budget(500),
        "judge limits": Batch(price=(0.2, 0.8)), "none": NoJudge(), "self": SelfJudge(model),
        "digits": DigitJudge(model), "later": DigitJudge(lambda: model), "rules": RuleJudge(),
        "human": HumanJudge("long/" * 90 + "file.csv"), "traits": TRAITS,
        "endpoint": (endpoint := Endpoint("m" * 90, url=f"http://localhost:80/{'v' * 90}")),
        "http": HttpJudge(endpoint, "verdicts.jsonl"), "learned": Direction(128, slice(0, 8)),
        "reliability": Reliability(1 / 3, 1e-9 / 3, float("nan")),
        "moments": jp.capture.moments(axis), "stats": generated.stats,
        "item": Item("pos_p0_q0", Role("ghost", ("x" * 300,), ""), "Why?" * 90,
                     "So.\n" * 90),
    }


def check(name, value):
    text = repr(value)
    assert len(text) <= brief.LENGTH and "\n" not in text, f"{name}: {len(text)} characters"
    assert "array(" not in text.lower() and " at 0x" not in text, f"{name}: {text}"
    assert str(value) == text or isinstance(value, Budget)  # its text is "500 calls"


def test_every_object_is_one_short_line_without_numbers(session):
    for name, value in session.items():
        check(name, value)


def public_classes():
    """The classes of `jp.__all__` and of the pages of the reference, without exceptions."""
    entries = [name for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
               for name in re.findall(r"^::: jaxpersona\.([\w.]+)$", page.read_text(), re.M)]
    found = {name: pkgutil.resolve_name(f"jaxpersona.{name}") for name in {*entries, *jp.__all__}}
    return {name: value for name, value in found.items() if inspect.isclass(value)
            and not issubclass(value, BaseException) and not getattr(value, "_is_protocol", False)}


CLASSES = public_classes()
WORST = ("n" * 300, "a\nb", np.ones((3, 4)), [np.ones(3)] * 9, {"a" * 90: np.ones(2)},
         ("x" * 50,) * 9, {f"role {i}": ("y" * 40, 1.5) for i in range(300)},
         list(range(300)), 10**40, None)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_public_class_has_a_short_line(name, session):
    """Classes with the common form are filled with long values; the others are in the session."""
    made = CLASSES[name]
    if made.__repr__ is not brief.brief:
        assert any(type(value) is made for value in session.values()), f"add one of {name}"
        return
    for value in WORST:
        one = object.__new__(made)
        for field in dataclasses.fields(made):
            object.__setattr__(one, field.name, value)
        check(name, one)


@pytest.mark.parametrize("name,expected", [
    ("model", "Model('mini', qwen3, 8 layers × 128, float32)"),
    ("axis", "Axis('assistant', [8, 128], of 'mini', percentiles: all 9, default 9)"),
    ("applied", "Applied(seen=int32[2], changed=int32[4, 2])"),
    ("generated", "Generated(2 replies, 8 tokens, captured: last, mean, projections)"),
    ("scored", "Scored(1 text, 7 tokens)"),
    ("caps", "Caps('caps', 1 floor, layers 1 to 1)"),
    ("params", "Params(embed_vd=float32[1024, 128], layers=8 × Layer, final_norm_d=float32[128])"),
], ids=lambda value: value.split("(")[0])
def test_a_line_names_what_matters(session, name, expected):
    assert repr(session[name]) == expected


def test_traced_objects_print_too():
    seen = []

    def look(batch):
        seen.append(repr(batch))
        return batch.tokens

    jax.jit(look)(jp.batch(s.prompts([3])))
    assert seen[0].startswith("Batch(tokens=int32[1, 3]")


@pytest.mark.parametrize(("found", "wanted"), [
    (brief.count(1, "reply"), "1 reply"), (brief.count(2, "reply"), "2 replies"),
    (brief.count(0, "role"), "0 roles"), (brief.count(1234, "token"), "1,234 tokens"),
    (brief.named("abcde", "role"), "5 roles (a, b, c, d, e)"),
    (brief.named("abcdef", "role"), "6 roles (a, b, c, d, e, …)"),
    (brief.quoted("x" * 40), repr("x" * 40)), (brief.quoted("x" * 41), repr("x" * 39 + "…")),
    (brief.cut(" a  b\n c"), "a b c"), (brief.cut("y" * 120), "y" * 120),
    (brief.cut("y" * 121), "y" * 119 + "…"), (brief.line("N", "a", "", "b"), "N(a, b)"),
])
def test_counts_names_and_long_texts(found, wanted):
    assert found == wanted


def test_values_of_several_kinds_are_counted():
    @dataclasses.dataclass
    class Held:
        __repr__ = brief.brief
        mixed: object = ({}, 5)
        number: object = dataclasses.field(default_factory=lambda: np.array(3))
        absent: object = None
        table: object = dataclasses.field(default_factory=lambda: {"a": np.ones((2, 3))})
        unseen: object = dataclasses.field(default=1, repr=False)

    assert repr(Held()) == "Held(mixed=2 × values, number=3, table={a: float64[2, 3]})"


def test_values_in_messages_are_cut_to_forty_characters():
    """The limit includes the quotes and the ellipsis."""
    assert brief.shown("x" * 38) == repr("x" * 38)
    assert brief.shown("x" * 39) == "'" + "x" * 38 + "…" and len(brief.shown("x" * 99)) == 40
    assert brief.shown([1, 2], 6) == "[1, 2]" and brief.shown([1, 2], 5) == "[1, …"
    assert brief.shown([10**5000]) == "a list with too many digits"


def test_parts_of_a_line_are_short():
    """Lists of arrays are counted, a dict shows eight entries, and texts are quoted and cut."""
    @dataclasses.dataclass
    class Held:
        __repr__ = brief.brief
        held: object

    for value, wanted in (([np.ones(2)] * 3, "3 × array"), ([jax.numpy.ones(2)], "1 × array"),
                          (({}, {}), "2 × dict"), ([], "[]"), ([1, 2], "[1, 2]"),
                          (("a", "b"), "('a', 'b')"), ("y" * 41, repr("y" * 39 + "…")),
                          (np.float32(0.5), "0.5"), (np.ones((2, 0)), "float64[2, 0]"),
                          ({i: i for i in range(9)}, "{" + ", ".join(
                              f"{i}: {i}" for i in range(8)) + "}")):
        assert repr(Held(value)) == f"Held(held={wanted})"
    itself = {"a": 1}
    itself["b"] = itself
    assert repr(Held(itself)) == "Held(held={a: 1})"


@pytest.mark.parametrize(("name", "expected"), [
    ("question", "Question(id=7, text="), ("learned", "Direction(8 layers × 128, residual)"),
    ("trait", "Trait('odd', 5 pairs, 40 questions)"), ("rules", "RuleJudge()")])
def test_a_line_of_texts_has_their_counts(session, name, expected):
    """Not the texts, which are long."""
    assert repr(session[name]).startswith(expected)


def test_a_role_says_whether_it_has_a_judge_s_prompt():
    """And the number of its system prompts."""
    assert repr(Role("ghost", ("a", "b"), "x")) == "Role('ghost', 2 prompts, with eval_prompt)"
    assert repr(Role("ghost", ("a",), "")) == "Role('ghost', 1 prompt, no eval_prompt)"
