"""Place point labels so that no two labels overlap.

At most a few dozen points are labelled, so a greedy search over fixed offsets is sufficient.
Unlike an iterative solver, such as the package adjustText, this search always produces the same
figure for the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.report.style import GREY, TINY, renderer_of, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN = 1.0  # margin around a label, in pixels
_NEAR, _FAR = 7.0, 46.0  # minimum and maximum distance of a label from its marker, in points
_MARKER = 2.5  # radius of a marker, in points
_ANGLES = (20, -20, 160, 200, 60, -60, 120, 240, 0, 180, 90, 270)


def place(ax: Axes, points: Sequence[tuple[str, float, float]], markers: np.ndarray,
          sizes: Sequence[float] | float = TINY) -> list[str]:
    """Write a label near each point, with a thin line to the point if the label is far away.

    Args:
      ax: the axes, on which everything else is already drawn; the function fixes their limits.
      points: (label, x, y) in order of importance.
      markers: coordinates [n, 2] of all markers, which labels should not cover.
      sizes: the font size in points, as one number or as one number per label.

    Returns:
      The labels that were written. A label is omitted if it would overlap another label or cross
      the frame of the axes at every position.
    """
    if not points:
        return []
    renderer = renderer_of(ax)
    scale = renderer.dpi / 72
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # fix the limits, which disables autoscaling
    pixels = ax.transData.transform(np.asarray(markers, float).reshape(-1, 2))
    frame = np.array([ax.bbox.x0, ax.bbox.y0, ax.bbox.x1, ax.bbox.y1])
    offsets = _offsets()
    away = np.hypot(*offsets.T)
    # the side of the label: −1 left of the marker, 0 centred, 1 right of it
    side = np.sign(np.where(np.abs(offsets[:, 0]) < 1, 0, offsets[:, 0]))
    taken, written = np.zeros((0, 4)), []
    each = [sizes] * len(points) if isinstance(sizes, (int, float)) else list(sizes)
    probe = ax.text(0, 0, "")
    for (name, x, y), size in zip(points, each, strict=True):
        probe.set(text=text(name), fontsize=size)
        extent = probe.get_window_extent(renderer)
        middle = ax.transData.transform((x, y)) + offsets * scale  # candidate positions
        left = middle[:, 0] + (side - 1) / 2 * extent.width
        low = middle[:, 1] - extent.height / 2
        boxes = np.stack([left, low, left + extent.width, low + extent.height], 1)
        boxes += np.array([-_MARGIN, -_MARGIN, _MARGIN, _MARGIN])
        free = (boxes[:, :2] >= frame[:2]).all(1) & (boxes[:, 2:] <= frame[2:]).all(1)
        free &= ~_overlap(boxes, taken).any(1)
        if not free.any():
            continue
        near = _MARKER * scale  # radius of a marker, in pixels
        dots = np.concatenate([pixels - near, pixels + near], 1)
        cost = np.where(free, away + 12.0 * _overlap(boxes, dots).sum(1), np.inf)
        best = int(np.argmin(cost))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        note = ax.annotate(
            text(name), (x, y), xytext=(float(offsets[best, 0]), float(offsets[best, 1])),
            textcoords="offset points", fontsize=size, va="center", zorder=5,
            ha=("right", "center", "left")[int(side[best]) + 1],
            arrowprops=line if away[best] > 1.6 * _NEAR else None)
        note.set_in_layout(False)  # the label is inside the axes, so the layout can ignore it
        taken = np.concatenate([taken, boxes[best : best + 1]])
        written.append(name)
    probe.remove()
    return written


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a mask [n, m] of the overlapping pairs of boxes in `a` [n, 4] and `b` [m, 4].

    A box is (x0, y0, x1, y1).
    """
    ends = np.concatenate([b[None, :, 2:] - a[:, None, :2], a[:, None, 2:] - b[None, :, :2]], -1)
    return np.asarray((ends > 0).all(-1))


def _offsets() -> np.ndarray:
    """Return candidate offsets of a label from its marker, [n, 2] in points, nearest first."""
    angles, radii = np.radians(_ANGLES), np.linspace(_NEAR, _FAR, 6)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.concatenate([radius * circle for radius in radii])
