"""Results as HTML for notebooks, as frames and as JSON."""

from __future__ import annotations

import html.parser
import json
import sys

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona import export
from jaxpersona.persona import axis as science
from jaxpersona.persona.extract import Extraction
from jaxpersona.text.chat import Row

EVIL = "<script>alert('x')</script> & $a$ \x1b[31m \"b\""


def row(text=EVIL, count=4):
    kind = np.zeros(count, np.int32)
    return Row(np.arange(count, dtype=np.int32), kind, kind, text,
               ({"role": "system", "content": "Be brief."}, {"role": "user", "content": text}))


def generated(count=2):
    applied = jp.Applied(np.arange(count), np.arange(count * 3).reshape(3, count))
    tokens = [np.arange(3, 3 + i, dtype=np.int32) for i in range(count)]
    return jp.Generated([f"{EVIL} {i}" for i in range(count)], tokens, np.ones(count, bool),
                        [row() for _ in range(count)], {"mean": np.zeros((count, 8, 16))},
                        (applied,), ["stop"] * count)


def extraction():
    rng = np.random.default_rng(0)
    vectors = {name: rng.normal(size=(2, 8)) for name in ("ghost", "pirate")}
    default = rng.normal(size=(2, 8))
    found = science.analyse(default, vectors)
    answers = {"ghost": np.array([[1.0, 2.0], [3.0, 6.0]]), "default": np.array([[5.0, 9.0]]),
               "pirate": np.array([[np.nan, np.nan], [0.0, 1.0]])}
    axis = jp.Axis(found.axis, model=EVIL)
    counts = {"ghost": {"0": 0, "3": 2}, "pirate": {"0": 1, "3": 1}}
    return Extraction(axis, found, default, vectors, answers, counts, 5, 9)


CHECK = jp.Check(False, ("sign: " + EVIL,), ("sign: " + EVIL, "layers: fine"), (4, 5),
                 np.array([3.0, 4.0], np.float32), np.array([1.0, 6.0], np.float32), None,
                 np.ones(2, np.float32), None)
SCORED = jp.Scored([row(count=4), row(count=1)],
                   [np.log(np.array([0.5, 0.25, 0.125], np.float32)), np.zeros(0, np.float32)])
RESULTS = {
    "generated": generated(), "long": generated(50), "check": CHECK, "scored": SCORED,
    "axis": jp.load_axis("mini"), "vector": jp.Vector(np.ones((2, 8)), name=EVIL),
    "caps": jp.Caps(np.full((1, 4), 2.0), (1,), np.ones(1), (EVIL,)), "extraction": extraction(),
    "extracted": jp.Extracted({"projections": [np.zeros((8, 4, 1))]}, (), [row()], 4, 4,
                              np.zeros(1, bool)),
    "reply": jp.Reply(EVIL, np.arange(2, dtype=np.int32), "stop", row(), {}, ()),
}


class Parsed(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text, self.rows = set(), [], "", 0

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.rows += tag == "tr"
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", RESULTS)
def test_html_is_well_formed_and_every_text_is_escaped(name):
    shown = Parsed()
    shown.feed(text := RESULTS[name]._repr_html_())
    shown.close()
    assert not shown.open and shown.tags <= {
        "div", "p", "br", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert "\x1b" not in text and "mathjax_ignore" in text
    if name != "axis":
        assert "<script>alert('x')</script>" in shown.text  # as text
    assert 2 <= shown.rows <= export.ROWS + 1 and len(text) < 60_000
    if name == "long":
        assert "… rows not shown: 30" in shown.text


@pytest.mark.parametrize("name", RESULTS)
def test_json_has_the_records_and_only_numbers_that_json_knows(name):
    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(RESULTS[name].to_json(), parse_constant=refuse)
    assert read["kind"] == type(RESULTS[name]).__name__
    assert len(read["records"]) == len(RESULTS[name].records())
    assert len({tuple(record) for record in read["records"]}) == 1  # the same keys


class Endless(export.Table):
    def records(self):
        return [{"value": float("inf"), "list": [np.float32(-np.inf), 2.5]}]

    def facts(self):
        return {"bound": -np.inf, "ok": True}


def test_infinity_is_null_in_records_and_facts():
    assert Endless().to_json() == (
        '{"kind": "Endless", "bound": null, "ok": true, '
        '"records": [{"value": null, "list": [null, 2.5]}]}')
    given = {3: np.array([[1.5, np.inf], [np.nan, 2]]), "b": (np.int64(2), None, frozenset())}
    assert export.plain(given) == {"3": [[1.5, None], [None, 2.0]], "b": [2, None, "frozenset()"]}


def test_cells_of_a_notebook_are_short():
    text = export.page("a", {"ok": True, "bad": np.bool_(False), "shift": None},
                       [{"rate": 0.123456, "list": [1.0, None, "x"], "long": "y" * 401},
                        {"rate": 2, "list": np.array([0.5]), "long": "z" * 400}], 2)
    assert "ok: yes<br>bad: no<br>shift: </p>" in text
    for cell in ("0.1235", "1, , x", "y" * 400 + " …", "2", "0.5", "z" * 400):
        assert f">{cell}</td>" in text
    assert "rows not shown" not in text
    assert "rows not shown: 1,234" in export.page("a", {}, [{"b": 1}], 1235)
    shown = {name: RESULTS[name]._repr_html_() for name in ("generated", "scored", "axis")}
    for name, column, there in (("generated", "reply", True), ("generated", "messages", False),
                                ("generated", "ids", False), ("scored", "logprobs", False),
                                ("scored", "perplexity", True), ("axis", "default p25", True),
                                ("axis", "default p1", False)):
        assert (f">{column}</th>" in shown[name]) is there, (name, column)


def test_captured_arrays_are_listed_by_shape():
    found = {"full": [np.zeros((3, 4))] * 2, "mean": np.zeros((2, 8)), "none": [], "other": 5}
    assert export.shapes(found) == {
        "captured": "full 2 × [3, 4], mean [2, 8], none list, other int"}
    assert export.shapes({}) == {}


def test_the_records_of_replies_have_what_was_said_and_changed():
    second = generated().records()[1]
    assert second == {"prompt": EVIL, "reply": f"{EVIL} 1", "tokens": 1, "finish": "stop",
                      "messages": list(row().messages), "ids": [3], "seen": [1], "changed": [5]}
    assert json.loads(generated().to_json())["captured"] == "mean [2, 8, 16]"


def test_scores_axes_checks_and_rankings():
    first, empty = json.loads(SCORED.to_json())["records"]
    assert first["logprob"] == pytest.approx(2 * np.log(0.5)) and first["perplexity"] == (
        pytest.approx(4.0)) and first["tokens"] == 4 and len(first["logprobs"]) == 3
    assert empty["perplexity"] is None and empty["logprobs"] == []
    axis = jp.load_axis("mini")
    fifth = axis.records()[5]
    names = [f"default p{q}" for q in (1, 5, 10, 25, 50, 75, 90, 95, 99)]
    assert [name for name in fifth if name.startswith("default")] == names
    assert fifth["default p25"] == axis.thresholds("p25")[5]
    assert fifth["norm"] == pytest.approx(np.linalg.norm(axis.values[5]), rel=1e-6)
    assert CHECK.records()[1] == {"layer": 5, "default": 4.0, "roles": 6.0, "difference": -2.0}
    assert CHECK.facts() == {"ok": False, "sign": EVIL, "layers": "fine", "shift": None}
    ranked = extraction().ranking(0)
    assert [(r["role"], r["projection"], r["p25"], r["answers"], r["in_axis"], r["scores"])
            for r in ranked] == [("default", 5.0, 5.0, 1, False, []),
                                 ("ghost", 2.0, 1.5, 2, True, [0, 2]),
                                 ("pirate", 0.0, 0.0, 2, True, [1, 1])]
    assert extraction().records()[1]["projection"] == 4.0  # the middle of two layers is 1
    assert RESULTS["caps"].records() == [{"layer": 1, "label": EVIL, "floor": 1.0, "norm": 4.0}]


def test_a_frame_has_the_records_as_rows():
    pandas = pytest.importorskip("pandas")
    frame = generated(3).to_frame()
    assert isinstance(frame, pandas.DataFrame) and list(frame["tokens"]) == [0, 1, 2]
    assert list(frame.columns) == list(generated().records()[0])
    assert list(extraction().to_frame()["role"]) == ["default", "ghost", "pirate"]


def test_a_missing_pandas_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(jp.UserError, match=r"pip install 'jaxpersona\[frames\]'") as caught:
        generated().to_frame()
    assert "\n" not in str(caught.value)


class Named(export.Table):
    def records(self):
        return [{"a": 1}]

    def facts(self):
        return {"kind": "mine", "records": 3, "é": "世"}


def test_facts_cannot_replace_the_fields_of_a_result():
    """They get a prefix; letters beyond ASCII are written as they are."""
    assert Named().to_json() == ('{"kind": "Named", "notes.kind": "mine", "notes.records": 3, '
                                 '"é": "世", "records": [{"a": 1}]}')
    shown = Named()._repr_html_()
    assert "kind: mine<br>records: 3<br>é: 世" in shown and ">a</th>" in shown
    assert export.page("a", {}, [], 0).count("<p>") == 1  # neither facts nor rows nor a rest
