"""Labels beside points: where they are placed, and which are left out."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from jaxpersona.report import labels, style


def axes(width=6.0, height=6.0):
    ax = style.new_figure(width, height).subplots()
    ax.set(xlim=(0, 10), ylim=(0, 10))
    return ax


def offsets(ax):
    return {note.get_text(): tuple(np.round(note.xyann, 2).tolist()) for note in ax.texts}


def at(angle, radius=7.0):
    return (round(radius * np.cos(np.radians(angle)), 2),
            round(radius * np.sin(np.radians(angle)), 2))


def test_boxes_that_only_touch_do_not_overlap():
    """And a box inside another overlaps it."""
    box = np.array([[0.0, 0.0, 2.0, 2.0]])
    others = np.array([[2.0, 0.0, 3.0, 1.0], [1.9, 1.9, 3.0, 3.0], [0.5, 0.5, 1.0, 1.0],
                       [0.0, 2.0, 1.0, 3.0], [-2.0, 0.0, 0.0, 1.0], [-1.0, -1.0, 0.1, 0.1]])
    assert labels._overlap(box, others).tolist() == [[False, True, True, False, False, True]]


def test_places_near_the_point_are_tried_first():
    """Twelve angles at each of six distances, from 7 to 46 points."""
    found = labels._offsets()
    assert found.shape == (72, 2)
    np.testing.assert_allclose(np.hypot(*found.T).reshape(6, 12),
                               np.linspace(7, 46, 6)[:, None].repeat(12, 1))
    np.testing.assert_allclose(found[0], at(20), atol=0.01)


def test_a_label_is_to_the_right_of_its_point_unless_a_marker_is_there():
    """Then it is to the left; a label beside its point has no line."""
    ax = axes()
    assert labels.place(ax, [("$a$", 5.0, 5.0)], np.array([[5.0, 5.0]])) == ["$a$"]
    (note,) = ax.texts
    assert offsets(ax) == {r"\$a\$": at(20)} and note.get_ha() == "left"
    assert note.arrow_patch is None and note.get_fontsize() == style.TINY
    ax = axes()
    ring = [[5.0 + 0.3, 5.0 + y] for y in np.linspace(-1, 1, 41)]
    labels.place(ax, [("a", 5.0, 5.0)], np.array([[5.0, 5.0], *ring]), [9.0])
    (note,) = ax.texts
    assert note.get_ha() == "right" and note.get_fontsize() == 9.0 and note.xyann[0] < 0


def test_labels_of_one_place_move_apart_and_the_first_is_nearest():
    """The farther ones have lines to their points; no two labels overlap."""
    ax = axes()
    names = [f"label {i}" for i in range(20)]
    written = labels.place(ax, [(name, 5.0, 5.0) for name in names], np.array([[5.0, 5.0]]))
    assert written == names[: len(written)] or set(written) < set(names)
    far = {note.get_text(): float(np.hypot(*note.xyann)) for note in ax.texts}
    assert far["label 0"] == pytest.approx(7.0) and max(far.values()) > 20
    assert all((note.arrow_patch is not None) == (far[note.get_text()] > 1.6 * 7)
               for note in ax.texts)
    renderer = style.renderer_of(ax)
    extent = matplotlib.text.Text.get_window_extent  # of an annotation: without its line
    boxes = [np.array(extent(note, renderer).extents) for note in ax.texts]
    for i, a in enumerate(boxes):
        assert not labels._overlap(a[None], np.array(boxes[:i]).reshape(-1, 4)).any()


def test_a_label_that_would_leave_the_axes_is_left_out():
    """The important labels come first; the limits of the axes stay."""
    ax = axes(1.2, 1.2)
    written = labels.place(ax, [("x" * 60, 5.0, 5.0), ("ab", 5.0, 5.0)], np.array([[5.0, 5.0]]))
    assert written == ["ab"] and [note.get_text() for note in ax.texts] == ["ab"]
    assert ax.get_xlim() == (0, 10) and not ax.get_autoscale_on()
    assert labels.place(ax, [], np.zeros((0, 2))) == [] and len(ax.texts) == 1


def test_a_point_at_the_edge_has_its_label_inside():
    """At the right edge, the label is on the left."""
    ax = axes()
    labels.place(ax, [("a name", 9.9, 5.0), ("other", 5.0, 9.99)], np.array([[9.9, 5.0]]))
    notes = {note.get_text(): note for note in ax.texts}
    assert notes["a name"].get_ha() == "right" and notes["other"].xyann[1] < 0
