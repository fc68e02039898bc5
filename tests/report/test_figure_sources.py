"""What the figures read: results, folders, dicts of arrays and benchmark files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.models.batch import TEMPLATE, USER
from jaxpersona.persona import axis as science
from jaxpersona.persona.extraction import Extraction
from jaxpersona.report import sources, style, tokens
from jaxpersona.text.chat import Row

CROSS = {"a": (2, 0, 0), "b": (-2, 0, 0), "c": (0, 1, 0), "d": (0, -1, 0)}


@pytest.fixture(autouse=True)
def no_pyplot():
    with style.without_pyplot():
        yield


@pytest.mark.parametrize(("layer", "total", "wanted"), [
    (None, 8, 4), (None, 7, 3), (None, 1, 0), (0, 8, 0), (np.int64(7), 8, 7)])
def test_the_middle_layer_is_the_default(layer, total, wanted):
    """And every layer of the model can be chosen."""
    assert sources.layer_of(layer, total) == wanted
    assert type(sources.layer_of(layer, total)) is int


@pytest.mark.parametrize("layer", [8, -1, True, 4.0, "4"])
def test_a_layer_that_no_model_has_is_refused(layer):
    """The message has the range."""
    with pytest.raises(jp.UserError, match=r"layer is .*; the layers are 0…7"):
        sources.layer_of(layer, 8)


def extraction():
    """Roles a to d define the axis; h was held out, and s has no vector."""
    vectors = {name: np.array([value[::-1], value], float) for name, value in CROSS.items()}
    default = np.array([[0, 3, 5], [5, 3, 0]], float)
    found = science.analyse(default, vectors)
    place = {"default": 9.0, "a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0, "h": 6.0, "s": 5.0}
    answers = {name: np.array([[0.0, value], [0.0, value + 2]]) for name, value in place.items()}
    return Extraction(jp.Axis(found.axis), found, default, vectors | {"h": default}, answers, {},
                      14, 9, mean_projections={"a": np.array([0.0, 2.5])})


def test_an_extraction_is_ranked_by_the_means_over_all_replies():
    """Quartiles are those of the stored replies; h has a vector, but is not in the axis."""
    found = sources.places(extraction(), 1)
    assert found.names == ["d", "a", "c", "b", "s", "h"]
    assert found.means.tolist() == [2.0, 2.5, 3.0, 4.0, 6.0, 7.0]
    assert found.quartiles[1].tolist() == [4.5, 5.5] and found.held_out == {"h"}
    assert found.default == (10.0, 9.5, 10.5) and found.layer == 1


def test_projections_that_are_not_finite_are_left_out():
    """A role without a finite projection is not ranked."""
    found = sources.places({"default": [[1.0], [3.0]], "a": [[np.nan], [4.0]], "b": [[np.inf],
                                                                                    [np.nan]]}, 0)
    assert found.names == ["a"] and found.means.tolist() == [4.0]
    assert found.quartiles.tolist() == [[4.0, 4.0]] and found.default == (2.0, 1.5, 2.5)
    means = sources.places({"default": [9.0], "b": [2.0], "a": [1.0]}, None)
    assert (means.names, means.quartiles, means.default) == (["a", "b"], None, None)


@pytest.mark.parametrize(("found", "words"), [
    (3, "found is 3; give the result of extract_axis"), ({"default": [1.0]}, "found has no role"),
    ({"a": [1.0], "b": [[1.0]]}, r"one array \[n, L\] per role or one array \[L\]"),
    ({"a": [1.0], "b": [1.0, 2.0]}, "with equal L"), ({"a": 1.0}, "found must have one array"),
    ({"a": [[np.nan]]}, "no finite projection of a role at layer 0")])
def test_what_cannot_be_ranked_is_refused(found, words):
    """With the kinds of values that are accepted."""
    with pytest.raises(jp.UserError, match=words):
        sources.places(found, 0)


def test_parts_are_those_of_the_vectors_at_a_layer():
    """From an extraction, from its analysis with a mean, and from a dict, the same numbers."""
    found = extraction()
    given = {**{name: found.role_means[name] for name in CROSS}, "default": found.default}
    for value, default in ((found, None), (found.analysis, found.default), (given, None)):
        read = sources.parts(value, 1, default)
        assert read.names == list("abcd") and read.layer == 1
        assert read.cosine == pytest.approx(5 / 34**0.5)
        np.testing.assert_allclose(read.default, [5, 3], atol=1e-9)
        np.testing.assert_allclose(read.components.ratio[:2], [0.8, 0.2], atol=1e-9)
    assert sources.parts(found.analysis, 1).default is None
    own = sources.parts(found, 1, np.zeros((2, 3)))  # a given mean replaces that of the extraction
    np.testing.assert_allclose(own.default, [0, 0], atol=1e-9)
    del given["default"]
    for wrong in (given, {"a": np.ones((2, 3)), "default": np.ones((2, 3))},
                  given | {"default": np.ones((1, 3))}, {"a": [1.0], "b": [2.0], "default": [1.0]}):
        with pytest.raises(jp.UserError, match="for at least two roles and for 'default'"):
            sources.parts(wrong, 0)
    assert sources.parts(given, 1, found.default).names == list("abcd")
    with pytest.raises(jp.UserError, match="found is 5; give the result of"):
        sources.parts(5, 0)


def test_ratios_are_shares_of_the_variance():
    """Their layer is unknown unless it is given."""
    values, layer = sources.ratios((0.5, 0.25), None)
    assert values.tolist() == [0.5, 0.25] and layer == -1
    assert sources.ratios([1.0005], 3)[1] == 3
    for wrong in (-1, 1.5, True, "2"):
        with pytest.raises(jp.UserError, match=f"layer is {wrong!r}; give an integer, at least 0"):
            sources.ratios([0.5], wrong)
    assert sources.ratios(extraction(), 1)[0][:2] == pytest.approx([0.8, 0.2])
    for wrong in ([0.5, 0.502], [-0.1, 0.5], [], [[0.5]]):
        with pytest.raises(jp.UserError, match="nonnegative numbers with a sum of at most 1"):
            sources.ratios(wrong, None)


BENCHES = {
    "decode": ({"by_batch": {"1": {"tokens_per_second": 5.0}}}, "Throughput of decoding", "rows",
               "tokens/s", ("log", "linear")),
    "cap_overhead": ({"by_layers": {"1": {"ratio": 0.9, "interval": [0.8, 1.0]}}},
                     "Speed with capped layers", "capped layers", "speed, capped ÷ uncapped",
                     ("linear", "linear")),
    "rows": ({"by_distinct": {"1": {"ratio": 0.9, "interval": [0.8, 1.0]}}},
             "Speed with distinct caps", "distinct caps in a batch",
             "speed, distinct ÷ shared caps", ("log", "linear")),
    "roofline": ({"roof": {"flops_per_second": 10.0, "bytes_per_second": 4.0},
                  "points": [{"name": "a step", "intensity": 4.0, "flops_per_second": 3.0}]},
                 "Roofline", "FLOP/byte", "FLOP/s", ("log", "log")),
}


@pytest.mark.parametrize("kind", BENCHES)
def test_a_benchmark_has_its_title_and_its_axes(kind, tmp_path):
    """From a dict, and from a file, whose name is the label."""
    fields, title, x, y, scales = BENCHES[kind]
    result = {"bench": kind, **fields}
    ax = jp.plot.bench(result)
    assert (ax.get_title(loc="left"), ax.get_xlabel(), ax.get_ylabel()) == (title, x, y)
    assert (ax.get_xscale(), ax.get_yscale()) == scales
    names = [entry.get_text() for entry in ax.get_legend().get_texts()]
    equal = ["equal speed"] * (kind in ("rows", "cap_overhead"))
    assert names == [title, *equal]
    if equal:
        assert ax.lines[1].get_ydata() == [1.0, 1.0]
    if kind == "decode":
        assert ax.get_ylim()[0] == 0 and ax.yaxis.get_major_formatter()(1500) == "1,500"
    assert [text.get_text() for text in ax.texts] == ["a step"] * (kind == "roofline")
    (tmp_path / "h100.json").write_text(json.dumps(result))
    ax = jp.plot.bench(tmp_path / "h100.json", title="so")
    assert ax.get_legend().get_texts()[0].get_text() == "h100"
    assert ax.get_title(loc="left") == "so"


def test_results_of_one_benchmark_are_drawn_together():
    """In different colours, each with its name."""
    one = {"bench": "decode", **BENCHES["decode"][0]}
    ax = jp.plot.bench({"a": one, "b": one})
    assert [line.get_color() for line in ax.lines] == [style.BLUE, style.VERMILION]
    assert [entry.get_text() for entry in ax.get_legend().get_texts()] == ["a", "b"]
    for wrong, words in (({"a": one, "b": {"bench": "rows"}}, "found has results of decode, rows"),
                         ({}, "found is {}; give a benchmark result"), ([], r"found is \[\]"),
                         ({"a": 3}, "found is {'a': 3}; give a benchmark result")):
        with pytest.raises(jp.UserError, match=words):
            jp.plot.bench(wrong)


ROW = Row(np.array([40, 41, 42], np.int32), np.array([TEMPLATE, USER, TEMPLATE], np.int32),
          np.array([0, 0, 1], np.int32), "")


def test_tokens_of_a_reply_follow_those_of_its_prompt():
    """For the result of `generate` at its index, for a reply, and for `extract` without a reply."""
    reading = np.arange(2 * 5.0).reshape(2, 5, 1)
    reply, other = np.array([50, 51], np.int32), np.array([60], np.int32)
    many = jp.Generated(["a", "b"], [other, reply], np.ones(2, bool), [ROW, ROW],
                        {"projections": [reading[:, :4], reading]}, (), ["stop"] * 2)
    row, ids, values = tokens._values(many, 1, "projections")
    assert row is ROW and ids.tolist() == [50, 51] and values.shape == (2, 5, 1)
    assert tokens._values(many, 0, "projections")[1].tolist() == [60]
    one = jp.Reply("b", reply, "stop", ROW, {"projections": reading}, ())
    assert tokens._values(one, 0, "projections")[1].tolist() == [50, 51]
    read = jp.Extracted({"mean": [reading]}, (), [ROW], 3, 0, np.zeros(1, bool))
    assert tokens._values(read, 0, "mean")[1].tolist() == []
    for found, index, words in ((many, 2, "index is 2; the indices of conversations are 0…1"),
                                (many, -1, "index is -1"), (many, 0.0, "index is 0.0"),
                                (one, 1, "index is 1; the indices of conversations are 0…0"),
                                ("text", 0, "found is 'text'; give the result of generate")):
        with pytest.raises(jp.UserError, match=words):
            tokens._values(found, index, "projections")
    flat = jp.Extracted({"mean": [reading[0]]}, (), [ROW], 3, 0, np.zeros(1, bool))
    with pytest.raises(jp.UserError, match=r"reading 'mean' has shape \[5, 1\] for a conversation"):
        tokens._values(flat, 0, "mean")
    bare = jp.Extracted({}, (), [ROW], 3, 0, np.zeros(1, bool))
    with pytest.raises(jp.UserError, match="reading is 'a'; the result has no reading; to compute"):
        tokens._values(bare, 0, "a")


def drawn(values, model=None, **more):
    found = jp.Extracted({"projections": [values]}, (), [ROW], 3, 0, np.zeros(1, bool))
    return jp.plot.projections(found, model or jp.load("mini"), **more)


@pytest.mark.parametrize(("more", "words"), [
    ({"direction": 2}, "direction is 2; it must be an integer from 0 to 1"),
    ({"direction": -1}, "direction is -1"), ({"direction": True}, "direction is True"),
    ({"direction": 0.0}, "direction is 0.0"), ({"layer": 8}, "layer is 8; the layers are 0…7"),
    ({"axis": "mini"}, "axis is 'mini'; give an Axis"),
    ({"axis": jp.Axis(np.ones((3, 4)))}, "axis has 3 layers, but the reading has 8"),
    ({"layer": 1}, "reading 'projections' selected no token of conversation 0")])
def test_a_reading_that_cannot_be_drawn_is_named(more, words):
    """An index out of range, another axis, or a layer without a value."""
    values = np.ones((8, 3, 2))
    values[1] = np.nan
    with pytest.raises(jp.UserError, match=words):
        drawn(values, **more)


def test_the_colour_bar_names_the_layer_and_the_centre():
    """An index into fewer layers than the model's is an entry of the reading."""
    values = np.tile([[0.0], [1.0], [3.0]], (8, 1, 1))
    for reading, more, wanted in (
            (values, {}, "projection onto the direction, layer 4\nwhite: the median"),
            (values, {"layer": 7, "centre": 0.25, "name": "$v$"},
             "projection onto \\$v\\$, layer 7\nwhite: 0.25"),
            (values[:3], {}, "projection onto the direction, entry 1\nwhite: the median")):
        ax = drawn(reading, **more)
        assert ax.figure.axes[-1].get_xlabel() == wanted
        assert ax.get_title(loc="left") == "Projection of every token"
        tones = [patch.get_facecolor()[:3] for patch in ax.patches]
        if more.get("centre") is None:  # the median is the second token's
            assert min(tones[1]) > 0.95 and min(tones[2]) < 0.5
    with pytest.raises(jp.UserError, match="mini has no tokenizer, so its tokens cannot be"):
        drawn(values, dataclasses.replace(jp.load("mini"), tokenizer=None))
