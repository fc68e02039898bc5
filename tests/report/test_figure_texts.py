"""Titles, labels, limits and bands of the figures, against values made by hand."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.persona.axis import analyse
from jaxpersona.persona.reference import Reference
from jaxpersona.persona.talk import Talks, TurnProjection
from jaxpersona.report import arrays, curves, figures, messages, roles, style
from jaxpersona.report.messages import drawn

AXIS = jp.load_axis("mini")
CROSS = {"a": (2, 0, 0), "b": (-2, 0, 0), "c_d": (0, 1, 0), "e": (0, -1, 0), "default": (5, 3, 0)}


@pytest.fixture(autouse=True)
def no_pyplot():
    with style.without_pyplot():
        yield


def legend(ax):
    return [entry.get_text() for entry in ax.get_legend().get_texts()]


def area(collection):
    """Return the lowest and the highest y of a band at each x."""
    found = {}
    for x, y in collection.get_paths()[0].vertices.tolist():
        low, high = found.get(x, (y, y))
        found[x] = min(low, y), max(high, y)
    return found


def ends(patch):
    return patch.get_y(), patch.get_y() + patch.get_height()


def test_an_interval_is_1_96_standard_errors_and_needs_two_values():
    """Of 1 and 3: the standard deviation √2 over √2."""
    assert arrays.half_width(np.array([1.0, 3.0])) == pytest.approx(1.96)
    assert arrays.half_width(np.array([1.0, 3.0, 1.0, 3.0])) == pytest.approx(
        1.96 * (4 / 3) ** 0.5 / 2)
    assert np.isnan(arrays.half_width(np.array([1.0])))


def test_a_spread_has_only_the_finite_values():
    """The mean is not the median, and a row without a finite value is NaN."""
    mean, low, high = arrays.spread(np.array([[0.0, 1.0, 2.0, 9.0], [np.nan, 4.0, np.inf, 8.0],
                                              [np.nan] * 4]))
    assert mean[:2].tolist() == [3.0, 6.0] and low[:2].tolist() == [0.75, 5.0]
    assert high[:2].tolist() == [3.75, 7.0]
    assert np.isnan([mean[2], low[2], high[2]]).all()


@pytest.mark.parametrize(("given", "dims", "words"), [
    ({}, (1,), "curves is {}; give a dict"), ([1], (1,), r"curves is \[1\]; give a dict"),
    ({str(i): [1] for i in range(15)}, (1,), "curves has 15 entries; give at most 14"),
    ({"a": [[1.0]]}, (1,), r"curves\['a'\] is \[\[1.0\]\]; give an array \[M\] with"),
    ({"a": [[[1.0]]]}, (1, 2), r"give an array \[M\] or \[M, N\] with at least one finite"),
    ({"a": [np.nan, np.inf]}, (1, 2), "with at least one finite number"),
    ({"a": [1, 2], "b": [[1], [2], [3]]}, (1, 2), "curves differ in length: a 2, b 3")])
def test_curves_that_cannot_be_drawn_are_refused(given, dims, words):
    """Fourteen curves can be told apart."""
    with pytest.raises(jp.UserError, match=words):
        arrays.curves_of(given, dims)
    assert len(arrays.curves_of({i: [1, np.nan] for i in range(14)}, (1,))) == 14


def test_every_curve_has_its_own_look():
    """Fourteen curves differ, and the arms keep their colours."""
    looks = curves._looks([str(i) for i in range(14)])
    assert len({(one["color"], one["linestyle"]) for one in looks}) == 14
    assert [looks[i]["linestyle"] for i in (0, 6, 7, 13)] == ["-", "-", "--", "--"]
    assert looks[7]["color"] == looks[0]["color"] == style.BLUE
    one, arm, two = curves._looks(["one", "uncapped", "two"])
    assert (one["color"], one["marker"]) == (style.BLUE, "o")
    assert (arm["color"], arm["marker"], arm["linestyle"]) == (style.VERMILION, "o", "-")
    assert (two["color"], two["marker"]) == (style.GREEN, "^")


def test_curves_by_layer_have_their_names_and_labels():
    """An underscore is shown as a space, and dollar signs are no formula."""
    ax = jp.plot.layers({"p_25": [1.0, 2.0], "$x$": [3.0, 4.0]}, ylabel="floor")
    assert legend(ax) == ["p 25", r"\$x\$"] and ax.get_ylabel() == "floor"
    assert (ax.get_xlabel(), ax.get_title(loc="left")) == ("layer", "By layer")
    assert jp.plot.layers({"a": [1]}, title="so").get_title(loc="left") == "so"
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1, 2], [3, 4]]


def test_turns_have_the_band_and_the_floor_of_their_layer():
    """The ticks are the indices of the messages; more than twenty are thinned out."""
    found = [TurnProjection(turn, 5, np.full((8, 1), 9.0)) for turn in (1, 3, 7)]
    ax = jp.plot.turns(found, ["my_axis"], 6, axis=AXIS, floor="p50")
    p25, p50, p75 = (float(AXIS.thresholds(p)[6]) for p in ("p25", "p50", "p75"))
    assert ends(ax.patches[0]) == pytest.approx((p25, p75))
    assert ax.lines[1].get_ydata() == pytest.approx([p50, p50])
    assert legend(ax) == ["my axis", "default persona, p25 to p75",
                          "floor τ (p50 of the default persona)"]
    assert ax.get_xticks().tolist() == [1, 3, 7] and ax.get_ylabel() == "mean projection, layer 6"
    assert ax.get_xlabel() == "index of the message in the conversation"
    assert ax.get_title(loc="left") == "Projection of each assistant message"
    ax = jp.plot.turns(found, ["a"], floor=2.5)
    assert legend(ax) == ["a", "floor τ"] and ax.lines[1].get_ydata() == [2.5, 2.5]
    for count, thin in ((20, False), (21, True)):
        many = [TurnProjection(2 * i, 5, np.full((8, 1), 9.0)) for i in range(count)]
        ticks = jp.plot.turns(many, ["a"]).get_xticks()
        assert (ticks.tolist() != [2 * i for i in range(count)]) == thin


TURN = [TurnProjection(1, 5, np.ones((8, 2)))]


@pytest.mark.parametrize(("call", "words"), [
    (lambda: jp.plot.turns([], ["a"]), "with at least one assistant message"),
    (lambda: jp.plot.turns([1], ["a"]), "found must be the result of project_conversation"),
    (lambda: jp.plot.turns(TURN, ["a"]), r"names is \['a'\]; .*number of directions: 2"),
    (lambda: jp.plot.turns(TURN, "ab"), "names is 'ab'; give one name for each direction"),
    (lambda: jp.plot.turns(TURN, ["a", "b"], 8), "layer is 8; the layers are 0…7"),
    (lambda: jp.plot.turns(TURN, ["a", "b"], axis=AXIS.values), "axis is array.*; give an Axis"),
    (lambda: jp.plot.turns(TURN, ["a", "b"], axis=jp.Axis(np.ones((3, 4)))),
     "axis has 3 layers, but found has 8"),
    (lambda: jp.plot.turns(TURN, ["a", "b"], floor=np.inf), "floor is inf; give a finite number"),
    (lambda: jp.plot.drift({"a": [1.0]}, what="both"), "what is 'both'; it must be 'behaviour'"),
    (lambda: jp.plot.drift({"a": [0.5]}, what="behaviour", floor=1.0), "axis and floor apply to"),
    (lambda: jp.plot.drift({"a": [0.5]}, what="behaviour", axis=AXIS), "axis and floor apply to"),
    (lambda: jp.plot.drift({"a": [0.5]}, leak={"a": 0.5}), "leak applies to behaviour"),
    (lambda: jp.plot.drift({"a": [-0.1]}, what="behaviour"), "shares outside 0…1"),
    (lambda: jp.plot.drift({"a": [1.0]}, axis=AXIS, layer=8), "layer is 8; the layers are 0…7"),
    (lambda: jp.plot.steering([[1.0]], {"a": [1]}, ylabel=""), "scales is .*; give a list of fin"),
    (lambda: jp.plot.steering([np.nan], {"a": [1]}, ylabel=""), "scales is .*; give a list of fi"),
    (lambda: jp.plot.steering([1], {"b": [1, 2]}, ylabel=""), r"curves\['b'\] has length 2, but "
                                                             "scales has length 1"),
    (lambda: jp.plot.ranking({"a": [1.0]}, count=0), "count is 0; it must be a positive integer"),
    (lambda: jp.plot.ranking({"a": [1.0]}, count=True), "count is True; it must be a positive"),
    (lambda: jp.plot.variance([1.0], thresholds=[1.0]), "thresholds contains 1.0; give shares"),
    (lambda: jp.plot.variance([1.0], thresholds=[0]), "thresholds contains 0; give shares"),
])
def test_arguments_that_do_not_fit_a_figure_are_named(call, words):
    """Before anything is drawn."""
    with pytest.raises(jp.UserError, match=words):
        call()


def test_drift_of_several_conversations_has_the_band_of_their_quartiles():
    """The caption states the largest number of conversations, and whose band is drawn."""
    values = np.array([[0.0, 1.0, 2.0, 9.0], [1.0, 1.0, 1.0, 5.0]])
    ax = jp.plot.drift({"capped": values, "other": [4.0, 5.0]}, axis=AXIS, layer=2, floor=1.5)
    assert ax.lines[0].get_xydata().tolist() == [[1, 3.0], [2, 2.0]]
    assert area(ax.collections[0]) == {1: (0.75, 3.75), 2: (1.0, 2.0)}
    assert ax.get_ylabel() == "projection onto the Assistant Axis, layer 2"
    assert ends(ax.patches[0]) == pytest.approx(tuple(AXIS.thresholds(p)[2] for p in (
        "p25", "p75")))
    assert ax.get_xlabel() == (
        "turn\nLines: means of 4 conversations; shading: p25 to p75.\n"
        "Band: p25 to p75 of the default persona's answers.")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2"]
    assert ax.get_title(loc="left") == "Projection, measured without the cap"
    ax = jp.plot.drift({"a": [1.0, 2.0]}, layer=3)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("turn", "projection onto the Assistant Axis, "
                                                          "layer 3")
    assert jp.plot.drift({"a": [1.0]}).get_ylabel() == "projection onto the Assistant Axis"
    # without a layer, the middle layer of the read-out
    talks = Talks([], np.zeros((2, 3, 6)), np.zeros((2, 3, 6)) + np.arange(6))
    assert jp.plot.drift({"a": talks}).lines[0].get_ydata().tolist() == [3.0, 3.0]
    assert jp.plot.drift({"a": talks}, layer=5).lines[0].get_ydata().tolist() == [5.0, 5.0]


def test_behaviour_is_shown_in_percent_with_the_leak_after_the_last_turn():
    """The bar of the leak begins at zero; without leaks there is no further tick."""
    ax = jp.plot.drift({"uncapped": [0.25, 0.5]}, what="behaviour", leak={"uncapped": 0.75})
    assert ax.get_ylim() == (-0.03, 1.03) and ax.yaxis.get_major_formatter()(0.25) == "25%"
    assert ax.get_ylabel() == ("share of in-character choices;\n"
                               "share of leaks after the last turn")
    assert ax.collections[0].get_segments()[0].tolist() == [[3.0, 0.0], [3.0, 0.75]]
    assert ax.get_title(loc="left") == "Behaviour" and ax.get_xticks().tolist() == [1, 2, 3]
    ax = jp.plot.drift({"a_b": [0.0, 1.0]}, what="behaviour", title="so")
    assert ax.get_ylabel() == "share of in-character choices" and legend(ax) == ["a b"]
    assert ax.get_title(loc="left") == "so" and ax.get_xticks().tolist() == [1, 2]


def test_steering_has_the_intervals_of_its_strengths():
    """The order of the strengths is that of the x axis; the line at 0 is named."""
    ax = jp.plot.steering([2.0, -2.0], {"a_b": [[1.0, 3.0], [5.0, 5.0]]}, ylabel="style")
    assert area(ax.collections[0]) == {-2.0: (5.0, 5.0), 2.0: (pytest.approx(0.04),
                                                              pytest.approx(3.96))}
    assert legend(ax) == ["a b", "no steering"] and ax.get_ylabel() == "style"
    assert ax.lines[1].get_xdata() == [0.0, 0.0]
    assert ax.get_xlabel() == ("steering strength, in multiples of the vector\nLines: means of 2 "
                               "replies; shading: 95 % CI of the mean.")
    assert ax.get_title(loc="left") == "Effect of steering"
    ax = jp.plot.steering([-2.0, -1.0], {"a": [1, 2]}, ylabel="y", xlabel="x", title="so")
    assert (ax.get_xlabel(), ax.get_title(loc="left"), len(ax.lines)) == ("x", "so", 1)


def test_components_have_the_shares_and_the_cosine_of_their_layer():
    """Variances 8 and 2; the axis (5, 3) has the cosine 5 / √34 with the first component."""
    found = {name: np.array([(9, 9, 9), value], float) for name, value in CROSS.items()}
    for i, name in enumerate("abe"):
        found[name][0] = (i, 0, 0)  # layer 0 has other components
    ax = jp.plot.pca(found, 1)
    assert ax.get_xlabel() == "PC1 (higher: more Assistant-like), 80% of the variance"
    assert ax.get_ylabel() == "PC2, 20% of the variance"
    assert ax.get_title(loc="left") == "4 role vectors, layer 1: |cos(PC1, axis)| = 0.86"
    np.testing.assert_allclose(ax.collections[0].get_offsets(),
                               [(2, 0), (-2, 0), (0, 1), (0, -1)], atol=1e-9)
    (star,) = [line for line in ax.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(star.get_xydata(), [(5, 3)], atol=1e-9)
    assert {text.get_text() for text in ax.texts} == {"a", "b", "c d", "e", "default persona"}
    assert legend(ax) == ["role", "default persona"]
    ax = jp.plot.pca({name: found[name] for name in ("a", "b", "default")}, 1, title="so")
    assert ax.get_ylabel() == "PC2, 0% of the variance" and ax.get_title(loc="left") == "so"
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [(2, 0), (-2, 0)], atol=1e-9)
    line = {name: value[:, :1] for name, value in found.items() if name in ("a", "b", "default")}
    assert jp.plot.pca(line, 1).get_ylabel() == "PC2"  # vectors of one number


def test_the_extremes_of_each_component_are_named():
    """Six at each end of both coordinates."""
    xy = np.stack([np.arange(50.0), np.arange(50.0)[::-1] * (np.arange(50) % 2)], 1)
    wanted = {*range(6), *range(44, 50)}
    wanted |= set(np.argsort(xy[:, 1])[:6].tolist()) | set(np.argsort(xy[:, 1])[-6:].tolist())
    assert roles._ends(xy) == wanted


def test_a_ranking_names_its_layer_and_counts_its_roles():
    """Of forty roles, all have lines of their own; of 41, some share one."""
    for count, own, height in ((40, 41, 7.81), (41, 32, 6.725)):
        found = {f"r{i:02}": [[float(i), 0.0]] for i in range(count)} | {"default": [[99.0, 0.0]]}
        ax = jp.plot.ranking(found, 0)
        assert len(ax.get_yticklabels()) == own
        assert ax.figure.get_size_inches().tolist() == pytest.approx([6.4, height])
        assert ax.get_title(loc="left") == f"{count} roles on the Assistant Axis"
    assert ax.get_yticklabels()[15].get_text() == "11 other roles"
    assert ax.get_xlabel() == ("projection onto the Assistant Axis, layer 0 (higher: more "
                               "Assistant-like)\nDots: means over a role's answers; bars: p25 to "
                               "p75.")
    assert legend(ax) == ["default persona, p25 to p75"]
    assert roles._rows(3, 3, True).tolist() == [0, 1, 2]
    assert roles._rows(7, 2, False).tolist() == [0, 1, 3, 3, 3, 5, 6]


def test_explained_variance_is_drawn_from_the_first_component():
    """At most twenty components, as shares."""
    ax = jp.plot.variance([0.04] * 25)
    assert ax.lines[0].get_xdata().tolist() == list(range(1, 21))
    np.testing.assert_allclose(ax.lines[0].get_ydata()[[0, 19]], [0.04, 0.8])
    assert legend(ax) == ["70 %: 18 components", "90 %: 23 components"]
    assert [line.get_ydata()[0] for line in ax.lines[1:]] == [0.7, 0.9]
    assert ax.get_xticks().tolist() == list(range(1, 21)) and ax.get_ylim() == (0, 1.03)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("number of principal components",
                                                  "explained share of the variance")
    assert ax.yaxis.get_major_formatter()(0.5) == "50%"
    assert ax.get_title(loc="left") == "Variance of the role vectors"
    ax = jp.plot.variance([1.0], thresholds=[0.5])
    assert legend(ax) == ["50 %: 1 component"]
    found = analyse(np.ones((2, 3)), {"a": np.eye(2, 3), "b": np.zeros((2, 3))})
    assert jp.plot.variance(found, 1).get_title(loc="left") == "Variance of the role vectors, " \
                                                               "layer 1"


def test_messages_have_a_legend_and_few_ticks():
    """The percentiles and the floor of each direction are named."""
    scale = {1.0: -2.0, 25.0: 1.0, 50.0: 2.0, 75.0: 3.0, 99.0: 6.0}
    figure = drawn([1, 3, 5], np.array([[0.0], [5.0], [1.0]]), ["one"], 4, [Reference(scale, {})])
    (ax,) = figure.axes
    assert legend(ax) == ["default, p1–p99", "default, p25–p75", "floor of --cap (p25)", "one"]
    assert ax.get_title(loc="left") == "Projection of each assistant message"
    assert ax.get_xlabel() == "index of the message in the conversation"
    assert ax.get_xticks().tolist() == [1, 3, 5]
    assert figure.get_size_inches().tolist() == [6.5, 4.0]
    assert messages._ticks(range(20)) == list(range(20))
    assert messages._ticks(range(21)) == list(range(0, 21, 2))
    assert len(messages._ticks(range(400))) == 20


def test_figures_are_written_with_all_their_arguments(tmp_path, monkeypatch):
    """Each writer passes its arguments to the function that draws."""
    seen = []
    monkeypatch.setattr(figures, "_write", lambda path, draw, *args, **named: seen.append(
        (path, draw.__name__, args, named)))
    figures.roles_on_axis("a", "run", 3, ["pirate"], "so")
    figures.components("b", "found", 4, "mean")
    figures.variance("c", "found", 5)
    figures.by_layer("d", {"x": [1.0]}, "title", "label")
    assert seen == [("a", "ranking", ("run", 3), {"held_out": ["pirate"], "title": "so"}),
                    ("b", "pca", ("found", 4), {"default": "mean"}),
                    ("c", "variance", ("found", 5), {}),
                    ("d", "layers", ({"x": [1.0]},), {"title": "title", "ylabel": "label"})]


def test_the_figure_of_drift_reads_its_layer_and_its_floor(tmp_path, monkeypatch):
    """Arms without a read-out have behaviour alone."""
    made = []
    monkeypatch.setattr(figures, "save", lambda figure, path: made.append((figure, path)))
    read = np.zeros((5, 7, 8)) + np.arange(8)
    talks = {"uncapped": Talks([], read, read), "capped": Talks([], read)}
    figures.drift(tmp_path / "a.png", talks, AXIS, 6, floor="p50", leak={"uncapped": .8,
                                                                        "capped": .1},
                  behaviour={"uncapped": [.1, .3], "capped": [.1, .1]})
    [(figure, path)] = made
    left, right = figure.axes
    assert path == tmp_path / "a.png" and right.lines[0].get_ydata().tolist() == [6.0, 6.0]
    assert right.lines[1].get_ydata() == pytest.approx([AXIS.thresholds("p50")[6]] * 2)
    assert len(right.lines) == 2 and len(legend(left)) == 4
    assert figure.get_suptitle() == "Persona drift over 2 turns, 7 conversations per arm"
    assert right.get_ylabel().endswith("layer 6") and left.get_ylabel().startswith("share of in-c")


def test_labels_reference_lines_and_bands():
    """Horizontal by default, vertical on request, each with its name in the legend."""
    assert style.label("sea_ghost") == "sea ghost" and style.label(" _ ") == "(unnamed)"
    assert style.text("$1 and $2") == r"\$1 and \$2"
    ax = style.axes_of(None, 5.0, 3.0)
    assert ax.figure.get_size_inches().tolist() == [5.0, 3.0]
    style.reference(ax, 2.0, "across")
    style.reference(ax, 3.0, "up", vertical=True)
    style.band(ax, 1.0, 4.0, "rows")
    style.band(ax, 5.0, 6.0, "$columns$", vertical=True)
    across, up = ax.lines
    assert across.get_ydata() == [2.0, 2.0] and up.get_xdata() == [3.0, 3.0]
    rows, columns = ax.patches
    assert ends(rows) == (1.0, 4.0)
    assert (columns.get_x(), columns.get_x() + columns.get_width()) == (5.0, 6.0)
    with style.style():  # titles begin at the left
        style.titled(ax, "word " * 40)
    assert legend(ax) == ["across", "up", "rows", r"\$columns\$"]
    lines = ax.get_title(loc="left").split("\n")
    assert len(lines) == 4 and max(map(len, lines)) <= 60
    style.described(ax, "x", "caption")
    assert ax.get_xlabel() == "x\ncaption"
    own = style.new_figure(3, 2).subplots()
    assert style.axes_of(own, 9, 9) is own and own.figure.get_size_inches().tolist() == [3, 2]
    assert not own.spines["top"].get_visible() and own.spines["left"].get_visible()


@pytest.mark.parametrize(("given", "files"), [
    ("a.png", ["a.png", "a.svg"]), ("a.SVG", ["a.png", "a.svg"]), ("a", ["a", "a.svg"]),
    ("v1.5", ["v1.5", "v1.5.svg"])])
def test_a_figure_is_two_files_of_one_name(tmp_path, given, files):
    """Any other suffix is part of the name."""
    before = dict(matplotlib.rcParams)
    style.save(style.new_figure(1, 1), tmp_path / given)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert (tmp_path / files[0]).read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / files[1]).read_bytes() and dict(matplotlib.rcParams) == before
