"""Figures: no label overlaps another, every reference line is named, and the values are right."""

from __future__ import annotations

import json
import pathlib
import sys

import matplotlib
import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.persona import axis as science
from jaxpersona.persona.reference import Reference
from jaxpersona.persona.talk import Talks, TurnProjection
from jaxpersona.report import figures, style
from jaxpersona.report.messages import drawn

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [name for name in json.loads((ROOT / "jaxpersona/data/role_list.json").read_text())
         if name != "default"]
LAYERS, WIDTH = 3, 24


@pytest.fixture(autouse=True)
def no_pyplot():
    with style.without_pyplot():
        yield


def roles(count):
    """A mean and role vectors on a line toward it with noise, and projections of ten answers."""
    rng = np.random.default_rng(count)
    line = rng.normal(size=WIDTH)
    likeness = rng.beta(2, 2, count)
    default = np.repeat(line[None], LAYERS, 0)
    vectors = {name: (a * line + 0.3 * rng.normal(size=(LAYERS, WIDTH)))
               for name, a in zip(NAMES[:count], likeness, strict=True)}
    found = science.analyse(default, vectors)
    answers = {name: science.project(value + 0.3 * rng.normal(size=(10, LAYERS, WIDTH)), found.axis)
               for name, value in [*vectors.items(), ("default", default)]}
    return default, found, answers


COUNTS = {count: roles(count) for count in (35, 275)}
AXIS = jp.load_axis("mini")
RNG = np.random.default_rng(0)
SCALE = {1.0: -2.0, 25.0: 1.0, 50.0: 2.0, 75.0: 3.0, 99.0: 6.0}
READ = {"uncapped": RNG.normal(5, 3, (4, 30)), "capped": RNG.normal(12, 3, (4, 30))}
BENCHES = {}
for path in sorted((ROOT / "bench/results").glob("*.json")):
    result = json.loads(path.read_text())
    kind = result.get("bench") if isinstance(result, dict) else None
    if kind in ("decode", "cap_overhead", "rows", "roofline") and (
            len(result.get("by_layers", "12")) > 1):
        BENCHES.setdefault(kind, {})[path.stem] = result


def conversation(length):
    """A model with mini's tokenizer, and a reading of a text of many lines and tokens."""
    model = jp.load("mini")
    talk = [{"role": "system", "content": "You are a pirate.\nStay in character."},
            {"role": "user", "content": "Who are you, $really$ & <truly>?"},
            {"role": "assistant", "content": "I am the sea. " * length}]
    row = jp.extract(model, [talk], capture=jp.capture.last(layers=[0])).rows[0]
    values = RNG.normal(size=(8, len(row.tokens), 1))
    values[:, :5] = np.nan
    return jp.Extracted({"projections": [values]}, (), [row], len(row.tokens), 0,
                        np.zeros(1, bool)), model


FIGURES = {
    **{f"{name} of {count}": lambda draw=draw, count=count: draw(*COUNTS[count])
       for count in COUNTS for name, draw in {
           "ranking": lambda default, found, answers: jp.plot.ranking(
               answers, 1, held_out=found.names[:3]),
           "pca": lambda default, found, answers: jp.plot.pca(found, 1, default=default),
           "variance": lambda default, found, answers: jp.plot.variance(found, 1),
       }.items()},
    "drift, behaviour": lambda: jp.plot.drift(
        {"uncapped": [.2, .4, .6, .7], "capped": [.2, .25, .2, .3]}, what="behaviour",
        leak={"uncapped": .8, "capped": .1}),
    "drift, projection": lambda: jp.plot.drift(READ, axis=AXIS, floor="p25"),
    "steering": lambda: jp.plot.steering(
        [-2, 0, 2], {"leak": [.9, .5, .1], "in character": RNG.random((3, 20))}, ylabel="share"),
    "layers": lambda: jp.plot.layers(
        {f"a long name of a curve, {i}": RNG.random(80) for i in range(8)}, ylabel="value"),
    "turns": lambda: jp.plot.turns([TurnProjection(t, 5, RNG.normal(size=(8, 2))) for t in (2, 4)],
                                   ["one", "two"]),
    "turns and a band": lambda: jp.plot.turns(
        [TurnProjection(t, 5, RNG.normal(15, 5, (8, 1))) for t in (1, 3)], ["one"], axis=AXIS,
        floor="p25"),
    "messages": lambda: drawn(range(1, 81, 2), RNG.normal(0, 3, (40, 1)), ["one"], 4, [
        Reference(SCALE, {name: RNG.normal(0, 3) for name in NAMES})]).axes[0],
    "projections": lambda: jp.plot.projections(*conversation(3)),
    "projections and a band": lambda: jp.plot.projections(*conversation(3), axis=AXIS),
    "many projections": lambda: jp.plot.projections(*conversation(60)),
    **{f"bench {kind}": lambda found=found: jp.plot.bench(found)
       for kind, found in BENCHES.items()},
}


def texts(ax):
    """The visible texts of a figure."""
    figure = style.figure_of(ax)
    found = [text for text in figure.findobj(matplotlib.text.Text)
             if text.get_visible() and text.get_text().strip()]
    hidden = {id(tick.label2) for one in figure.axes for side in (one.xaxis, one.yaxis)
              for tick in [*side.get_major_ticks(), *side.get_minor_ticks()]}
    for one in figure.axes:  # ticks beyond the limits are not drawn
        for side, (low, high) in ((one.xaxis, sorted(one.get_xlim())),
                                  (one.yaxis, sorted(one.get_ylim()))):
            for ticks in (side.get_major_ticks(), side.get_minor_ticks()):
                hidden |= {id(tick.label1) for tick in ticks
                           if not low <= tick.get_loc() <= high}
    return [text for text in found if id(text) not in hidden]


def inside(box, margin):
    """A box without a margin, because the extents of adjacent letters include their bearings."""
    return box.x0 + margin, box.y0 + margin, box.x1 - margin, box.y1 - margin


@pytest.mark.parametrize("name", FIGURES)
def test_no_label_overlaps_another_or_leaves_the_figure(name):
    ax = FIGURES[name]()
    figure = style.figure_of(ax)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    extent = matplotlib.text.Text.get_window_extent  # of an annotation: without its line
    shown = [(text.get_text(), inside(extent(text, renderer), 0.75)) for text in texts(ax)]
    assert len(shown) >= 5
    for i, (text, a) in enumerate(shown):
        assert a[0] > -2 and a[1] > -2 and a[2] < figure.bbox.x1 + 2 and a[3] < figure.bbox.y1 + 2
        for other, b in shown[:i]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{text!r} overlaps {other!r}"


@pytest.mark.parametrize("name", FIGURES)
def test_every_reference_line_and_every_axis_has_a_name(name):
    ax = FIGURES[name]()
    legend = ax.get_legend()
    named = set() if legend is None else {text.get_text() for text in legend.get_texts()}
    lines = [one for one in ax.lines if one.get_transform() is not ax.transData]
    lines += [one for one in ax.patches if one.get_data_transform() is not ax.transData]
    for one in lines:
        assert one.get_label() in named, f"a line across the axes is not in the legend: {one}"
    expected = {"drift, projection": 2, "steering": 1, "bench rows": 1, "bench cap_overhead": 1,
                "turns and a band": 2, "messages": 3}
    kind = name.split(" of ")[0]
    assert len(lines) == expected.get(name, {"ranking": 1, "variance": 2}.get(kind, 0))
    assert ax.get_title(loc="left")
    if "projections" not in name:  # its axes are text
        assert ax.get_xlabel() and (ax.get_ylabel() or kind == "ranking")


def test_the_ranking_has_the_fifteen_nearest_and_farthest_and_the_rest_in_one_strip():
    _, _, answers = COUNTS[275]
    ax = jp.plot.ranking(answers, 1)
    order = sorted(set(answers) - {"default"}, key=lambda name: answers[name][:, 1].mean())
    labels = [tick.get_text() for tick in ax.get_yticklabels()]
    shown = [name.replace("_", " ") for name in order]
    assert labels == [*shown[:15], "245 other roles", *shown[-15:], "default persona"]
    (strip,) = [line for line in ax.lines if line.get_marker() == "|"]
    np.testing.assert_allclose(strip.get_xdata(),
                               [answers[name][:, 1].mean() for name in order[15:-15]], rtol=1e-6)
    low, high = np.percentile(answers["default"][:, 1], [25, 75])
    (band,) = ax.patches
    np.testing.assert_allclose([band.get_x(), band.get_x() + band.get_width()], [low, high],
                               rtol=1e-6)


def test_the_default_persona_is_at_its_coordinates_and_the_extremes_are_named():
    default, found, _ = COUNTS[275]
    ax = jp.plot.pca(found, 2, default=found.vectors[7])  # a role as the default
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    xy = found.components[2].coordinates[:, :2]
    np.testing.assert_allclose([star.get_xdata()[0], star.get_ydata()[0]], xy[7], rtol=1e-5)
    written = {text.get_text() for text in ax.texts}
    ends = {found.names[i].replace("_", " ") for i in (xy[:, 0].argmin(), xy[:, 0].argmax())}
    assert ends | {"default persona"} <= written and len(written) <= 25


def test_thresholds_count_the_components_that_reach_them():
    ax = jp.plot.variance([0.5, 0.2, 0.1, 0.1, 0.1], thresholds=[0.7, 0.85, 0.999])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "70 %: 2 components", "85 %: 4 components", "99.9 %: 5 components"]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.7, 0.8, 0.9, 1.0])
    # also those that are not drawn
    ax = jp.plot.variance([0.5, 0.2, 0.1, 0.1], thresholds=[0.7, 0.9, 0.95], most=2)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "70 %: 2 components", "90 %: 4 components", "95 %: more than 4 components"]
    assert len(ax.lines[0].get_ydata()) == 2


def test_drift_shows_the_read_out_and_refuses_projections_after_the_cap():
    after = np.full((4, 30, 8), 99.0)
    read = np.broadcast_to(READ["capped"][..., None] + np.arange(8), after.shape)
    ax = jp.plot.drift({"capped": Talks([], after, read)}, axis=AXIS, layer=5, floor="p25")
    (line,) = [one for one in ax.lines if len(one.get_ydata()) == 4]
    np.testing.assert_allclose(line.get_ydata(), READ["capped"].mean(1) + 5)
    band, floor = ax.patches[0], [one for one in ax.lines if len(one.get_ydata()) == 2][0]
    np.testing.assert_allclose([band.get_y(), band.get_y() + band.get_height()],
                               [AXIS.thresholds(p)[5] for p in ("p25", "p75")], rtol=1e-6)
    np.testing.assert_allclose(floor.get_ydata(), AXIS.thresholds("p25")[5], rtol=1e-6)
    assert "Band: p25 to p75 of the default persona" in ax.get_xlabel()
    with pytest.raises(jp.UserError, match="measured after the interventions"):
        jp.plot.drift({"capped": Talks([], after)}, axis=AXIS)


def test_steering_draws_the_mean_and_its_interval():
    ax = jp.plot.steering([1.0, -1.0], {"a": [[1.0, 3.0], [4.0, 4.0]]}, ylabel="y")
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[-1, 4], [1, 2]])
    area = ax.collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([area.min(), area.max()], [2 - 1.96, 4.0])  # ± 1.96 · √2 / √2


def test_a_ranking_has_the_quartiles_of_its_roles_and_open_circles_for_those_held_out():
    found = {"default": [[9.0], [11.0]], "far": [[1.0], [3.0]], "near": [[7.0], [7.0]]}
    ax = jp.plot.ranking(found, held_out=["far"])
    dots = {line.get_ydata()[0]: line for line in ax.lines if line.get_marker() == "o"}
    assert {y: (line.get_xdata()[0], line.get_fillstyle()) for y, line in dots.items()} == {
        0: (2.0, "none"), 1: (7.0, "full")}
    bars = [line.get_xdata() for line in ax.lines if line.get_linewidth() == 3.5]
    assert [list(bar) for bar in bars] == [[1.5, 2.5], [7.0, 7.0], [9.5, 10.5]]
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    assert star.get_xdata()[0] == 10.0
    assert "not used for the axis" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert "bars: p25 to p75." in ax.get_xlabel()
    # of means, neither quartiles nor the default persona's band are known
    ax = jp.plot.ranking({"default": [9.0], "far": [1.0], "near": [7.0]}, title="so")
    assert not ax.patches and ax.get_title(loc="left") == "so" and "bars" not in ax.get_xlabel()
    names = [tick.get_text() for tick in jp.plot.ranking(
        COUNTS[275][2], count=2).get_yticklabels()]
    assert len(names) == 6 and names[2] == "271 other roles"


def test_leaks_are_drawn_after_the_last_turn_beside_each_other():
    ax = jp.plot.drift({"capped": [0.1, 0.2], "uncapped": [0.3, 0.9]}, what="behaviour",
                       leak={"uncapped": 0.8, "capped": 0.1})
    points = {line.get_label(): line for line in ax.lines}
    assert {name: (round(line.get_xdata()[0], 2), line.get_ydata()[0], line.get_color())
            for name, line in points.items() if name.endswith(": leak")} == {
        "capped: leak": (2.92, 0.1, style.BLUE), "uncapped: leak": (3.08, 0.8, style.VERMILION)}
    assert [points[name].get_color() for name in ("capped", "uncapped")] == [
        style.BLUE, style.VERMILION]
    assert list(points["uncapped"].get_xdata()) == [1, 2]
    with pytest.raises(jp.UserError, match="give one share for each of"):
        jp.plot.drift({"a": [0.1]}, what="behaviour", leak={"b": 0.5})


def test_curves_have_the_values_of_their_layer_and_direction():
    values = np.arange(16.0).reshape(8, 2)
    found = [TurnProjection(turn, 5, values + turn) for turn in (2, 5)]
    for layer, at in ((None, 4), (0, 0), (7, 7)):
        ax = jp.plot.turns(found, ["one", "two"], layer)
        assert ax.get_ylabel() == f"mean projection, layer {at}"
        for k, line in enumerate(ax.lines):
            assert line.get_xdata().tolist() == [2, 5]
            assert line.get_ydata().tolist() == [2 * at + k + 2, 2 * at + k + 5]
    line, = jp.plot.layers({"a": [1.0, np.nan, 3.0]}).lines
    assert line.get_xdata().tolist() == [0, 1, 2] and np.isnan(line.get_ydata()[1])
    # no line at 0 without strengths on both sides; one reply has no interval
    ax = jp.plot.steering([1.0, 2.0], {"a": [[1.0, np.nan], [4.0, 6.0]]}, ylabel="y")
    assert len(ax.lines) == 1 and ax.lines[0].get_ydata().tolist() == [1.0, 5.0]
    assert "means of 2 replies" in ax.get_xlabel()
    assert len(jp.plot.steering([0.0, 1.0], {"a": [1, 2]}, ylabel="y").lines) == 2


def test_benchmarks_are_drawn_in_the_order_of_their_sizes():
    rates = {n: {"tokens_per_second": float(v)} for n, v in (("16", 9), ("2", 5), ("8", 7))}
    (line,) = jp.plot.bench({"bench": "decode", "by_batch": rates}).lines
    assert line.get_xydata().tolist() == [[2, 5], [8, 7], [16, 9]]
    ratios = {"8": {"ratio": 0.9, "interval": [0.7, 1.2]}, "0": {"ratio": 1.0, "interval": [1, 1]}}
    ax = jp.plot.bench({"bench": "cap_overhead", "by_layers": ratios})
    assert ax.lines[0].get_xydata().tolist() == [[0, 1.0], [8, 0.9]]
    area = ax.collections[0].get_paths()[0].vertices
    assert (area[:, 1].min(), area[:, 1].max()) == (0.7, 1.2) and ax.get_xscale() == "linear"
    roof = {"flops_per_second": 10.0, "bytes_per_second": 4.0}
    point = {"name": "step", "intensity": 1.0, "flops_per_second": 3.0}
    ax = jp.plot.bench({"bench": "roofline", "roof": roof, "points": [point]})
    reached = dict(ax.lines[0].get_xydata().tolist())
    assert (reached[0.125], reached[2.0], reached[4.0], reached[1024.0]) == (0.5, 8.0, 10.0, 10.0)
    assert ax.lines[1].get_xydata().tolist() == [[1.0, 3.0]]


def test_the_figure_of_messages_has_a_panel_for_each_direction(tmp_path, monkeypatch):
    from jaxpersona.report import messages as module

    drawn = []
    monkeypatch.setattr(module, "new_figure", lambda *size: drawn.append(style.new_figure(*size)) or
                        drawn[-1])
    known = Reference(SCALE, {"sea_ghost": -4.0, "tutor": 1.5})
    module.messages(tmp_path / "a.png", [1, 3], np.array([[0.0, 1.0], [5.0, -4.0]]),
                    ["one", "$two$"], 6, [None, known])
    one, two = drawn[0].axes
    assert one.lines[0].get_xydata().tolist() == [[1, 0], [3, 5]] and not one.patches
    assert not one.texts and two.get_ylabel() == "mean projection, layer 6"
    floor, values = two.lines
    assert floor.get_ydata() == [1.0, 1.0] and values.get_xydata().tolist() == [[1, 1], [3, -4]]
    assert [(p.get_y(), p.get_y() + p.get_height()) for p in two.patches] == [(-2, 6), (1, 3)]
    assert [text.get_text() for text in two.texts if text.get_text()] == ["tutor", "sea ghost"]
    assert values.get_label() == "\\$two\\$" and "nearest role" in one.get_title(loc="left")


def test_tokens_are_coloured_by_their_values():
    found, model = conversation(2)
    row, values = found.rows[0], found.captured["projections"][0]
    found.captured["projections"][0] = np.concatenate([-values, values], -1)
    ax = jp.plot.projections(found, model, layer=2, direction=1, centre=0.0)
    pieces = [text for text in ax.texts if text.get_gid() == "token"]
    assert len(pieces) == len(row.tokens) == len(ax.patches)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["system", "user", "assistant"]
    shown = "".join(text.get_text() for text in pieces).replace("\\$", "$")
    assert "You are a pirate.↵Stay" in shown and "$really$ & <truly>" in shown
    tones = np.array([patch.get_facecolor()[:3] for patch in ax.patches])
    assert (tones[:5] == 1).all()  # not read: white
    orange = tones[:, 0] > tones[:, 2] + 0.02  # PuOr: orange below the centre, purple above
    purple = tones[:, 2] > tones[:, 0] + 0.02
    assert not (values[2, orange, 0] > 0).any() and not (values[2, purple, 0] < 0).any()
    assert orange.sum() + purple.sum() > len(tones) / 2


def test_tokens_that_do_not_fit_given_axes_are_counted():
    found, model = conversation(40)
    figure = style.new_figure(4, 1.6)
    ax = jp.plot.projections(found, model, ax=figure.subplots())
    last = [text.get_text() for text in ax.texts][-1]
    drawn = len(ax.patches)
    assert last == f"… tokens omitted: {len(found.rows[0].tokens) - drawn}" and drawn > 5


def test_given_axes_are_returned_and_few_names_fit_small_ones():
    _, _, answers = COUNTS[275]
    ax = style.new_figure(4, 2.2).subplots()
    assert jp.plot.ranking(answers, ax=ax) is ax
    assert 3 < len(ax.get_yticklabels()) < 20


def test_the_style_and_the_list_of_figures_of_the_caller_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    figures.variance(tmp_path / "a.png", COUNTS[35][1], 1)
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    first = (tmp_path / "a.svg").read_bytes()
    assert b"<svg" in first
    figures.variance(tmp_path / "a.svg", COUNTS[35][1], 1)
    assert (tmp_path / "a.svg").read_bytes() == first  # the same file from the same data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_the_headline_figure_has_behaviour_beside_the_read_out(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    talks = {name: Talks([], np.full((4, 30, 8), 99.0), np.repeat(value[..., None], 8, 2))
             for name, value in READ.items()}
    figures.drift(tmp_path / "a.png", talks, AXIS, 4, leak={"uncapped": .8, "capped": .1},
                  behaviour={"uncapped": [.1, .3, .5], "capped": [.1, .1, .2]})
    left, right = drawn[0].axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [.1, .3, .5])
    np.testing.assert_allclose(right.lines[1].get_ydata(), READ["capped"][:3].mean(1), rtol=1e-6)


def test_a_missing_matplotlib_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(jp.UserError, match=r"pip install 'jaxpersona\[figures\]'") as caught:
        jp.plot.variance([0.6, 0.4])
    assert "\n" not in str(caught.value)


MISTAKES = {
    "role vectors": (lambda: jp.plot.pca(AXIS), "a direction without role vectors; give"),
    "no such layer": (lambda: jp.plot.ranking(COUNTS[35][2], 3), "layer is 3; the layers are 0…2"),
    "no run": (lambda: jp.plot.ranking("/nonexistent"), "/nonexistent"),
    "ax": (lambda: jp.plot.variance([0.6, 0.4], ax="top"), "ax is 'top'; give a matplotlib Axes"),
    "shares": (lambda: jp.plot.variance([0.6, 0.6]), "explained variance ratios"),
    "threshold": (lambda: jp.plot.variance([1.0], thresholds=[70]), "thresholds contains 70"),
    "lengths": (lambda: jp.plot.layers({"a": [1, 2], "b": [1]}), "differ in length: a 2, b 1"),
    "strengths": (lambda: jp.plot.steering([1], {"a": [1, 2]}, ylabel=""), "entry per strength"),
    "words": (lambda: jp.plot.layers({"a": ["x"]}), r"curves\['a'\] is \['x'\]"),
    "percent": (lambda: jp.plot.drift({"a": [50.0]}, what="behaviour"), "outside 0…1"),
    "floor": (lambda: jp.plot.drift({"a": [1.0]}, floor="p25"), "a percentile needs axis="),
    "reading": (lambda: jp.plot.projections(conversation(1)[0], conversation(1)[1], reading="x"),
                "reading is 'x'; the result has projections"),
    "bench": (lambda: jp.plot.bench({"bench": "peers"}), "found has results of peers"),
    "rate": (lambda: jp.plot.bench({"bench": "decode", "by_batch": {
        "1": {"tokens_per_second": 10**400}}}), "not a result of the benchmark 'decode'"),
    "point": (lambda: jp.plot.bench({"bench": "roofline", "points": [{"intensity": 1}], "roof": {
        "flops_per_second": 1, "bytes_per_second": 1}}), "not a result of the benchmark 'roof"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name):
    call, message = MISTAKES[name]
    with pytest.raises(jp.UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
