"""Plotting writes files and leaves matplotlib's global state unchanged."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from jaxpersona.persona import axis as science
from jaxpersona.report import figures


def test_drawing_leaves_the_back_end_and_the_list_of_figures_alone(tmp_path):
    code = f"""
import sys
import matplotlib
matplotlib.use("svg")
import numpy as np
import pytest
from jaxpersona.persona import axis as science
from jaxpersona.report import figures
figures.conversation({str(tmp_path / "a.png")!r}, [1, 3], np.ones((2, 1)), ["v"], 4)
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["svg", "False"], done
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_held_out_roles_are_open_circles(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    values = {name: np.full((2, 1), at) for at, name in enumerate(("ghost", "pirate", "default"))}
    figures.roles_on_axis(tmp_path / "a.png", values, 0, ["pirate"])
    points = [line for line in drawn[0].axes[0].lines if line.get_marker() == "o"]
    assert [line.get_fillstyle() for line in points] == ["full", "none", "full"]


def drawings(monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    return drawn


def test_of_many_roles_the_extremes_have_a_row_and_the_others_a_tick(tmp_path, monkeypatch):
    drawn = drawings(monkeypatch)
    count = figures.NAMED + 60
    values = {f"role_{i:03}": np.full((3, 2), float(i)) for i in range(count)}
    values["default"] = np.full((3, 2), 1e3)
    figures.roles_on_axis(tmp_path / "a.png", values, 1)
    axes = drawn[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[: figures.EXTREMES] == [f"role {i:03}" for i in range(figures.EXTREMES)]
    assert labels[-1] == "default" and labels[-2] == f"role {count - 1:03}"
    assert labels[figures.EXTREMES] == f"{count - 2 * figures.EXTREMES} other roles"
    assert len(labels) == 2 * figures.EXTREMES + 2
    (ticks,) = [line for line in axes.lines if line.get_marker() == "|"]
    assert sorted(ticks.get_xdata()) == list(range(figures.EXTREMES, count - figures.EXTREMES))


def analysis(count, seed=0):
    rng = np.random.default_rng(seed)
    default = rng.normal(size=(1, 24)).astype(np.float32)
    roles = {f"r{i:03}": rng.normal(size=(1, 24)).astype(np.float32) for i in range(count)}
    return default, science.analyse(default, roles)


def test_the_default_persona_is_drawn_at_its_coordinates(tmp_path, monkeypatch):
    drawn = drawings(monkeypatch)
    _, found = analysis(30)
    # one role serves as the default
    figures.components(tmp_path / "a.png", found, 0, found.vectors[7])
    (star,) = [line for line in drawn[0].axes[0].lines if line.get_marker() == "*"]
    np.testing.assert_allclose([star.get_xdata()[0], star.get_ydata()[0]],
                               found.components[0].coordinates[7, :2], rtol=1e-5)


@pytest.mark.parametrize("count", [30, 275])
def test_no_two_names_overlap(count, tmp_path, monkeypatch):
    drawn = drawings(monkeypatch)
    default, found = analysis(count)
    figures.components(tmp_path / "a.png", found, 0, default)
    axes = drawn[0].axes[0]
    renderer = drawn[0].canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    names = {text.get_text() for text in axes.texts}
    ends = np.argsort(found.components[0].coordinates[:, 0])
    assert {found.names[i] for i in (ends[0], ends[-1])} <= names
    assert len(names) <= (count + 1 if count <= figures.NAMED else 33)
