"""Names beside points, placed so that no two names overlap.

A greedy search over fixed offsets is enough: only extremes are named, at most a few dozen, so no
iterative solver (such as the package adjustText) is needed, and equal data give equal figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.report.style import GREY, TINY, renderer_of, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARGIN = 1.0  # pixels between two names
_NEAR, _FAR = 7.0, 46.0  # points from the point to its name
_MARKER = 2.5  # points: the radius of a marker
_ANGLES = (20, -20, 160, 200, 60, -60, 120, 240, 0, 180, 90, 270)


def place(ax: Axes, points: Sequence[tuple[str, float, float]], markers: np.ndarray,
          sizes: Sequence[float] | float = TINY) -> list[str]:
    """Write each point's name near it, with a thin line to the point where they are apart.

    Args:
      ax: the axes, whose contents are complete and whose limits are kept from now on.
      points: (name, x, y) in order of importance.
      markers: [n, 2], the coordinates of all markers, which names cover only if they must.
      sizes: the font size of all names or of each, in points.

    Returns:
      The names that were written. A name that overlaps another one everywhere is left out.
    """
    if not points:
        return []
    renderer = renderer_of(ax)
    scale = renderer.dpi / 72
    ax.set(xlim=ax.get_xlim(), ylim=ax.get_ylim())  # fix the limits: autoscaling stops here
    pixels = ax.transData.transform(np.asarray(markers, float).reshape(-1, 2))
    frame = np.array([ax.bbox.x0, ax.bbox.y0, ax.bbox.x1, ax.bbox.y1])
    offsets = _offsets()
    away = np.hypot(*offsets.T)
    side = np.sign(np.where(np.abs(offsets[:, 0]) < 1, 0, offsets[:, 0]))  # −1, 0, 1
    taken, written = np.zeros((0, 4)), []
    each = [sizes] * len(points) if isinstance(sizes, (int, float)) else list(sizes)
    probe = ax.text(0, 0, "")
    for (name, x, y), size in zip(points, each, strict=True):
        probe.set(text=text(name), fontsize=size)
        extent = probe.get_window_extent(renderer)
        middle = ax.transData.transform((x, y)) + offsets * scale  # of the name's near edge
        left = middle[:, 0] + (side - 1) / 2 * extent.width
        low = middle[:, 1] - extent.height / 2
        boxes = np.stack([left, low, left + extent.width, low + extent.height], 1)
        boxes += np.array([-_MARGIN, -_MARGIN, _MARGIN, _MARGIN])
        free = (boxes[:, :2] >= frame[:2]).all(1) & (boxes[:, 2:] <= frame[2:]).all(1)
        free &= ~_overlap(boxes, taken).any(1)
        if not free.any():
            continue
        near = _MARKER * scale  # a name does not touch a marker
        dots = np.concatenate([pixels - near, pixels + near], 1)
        cost = np.where(free, away + 12.0 * _overlap(boxes, dots).sum(1), np.inf)
        best = int(np.argmin(cost))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        note = ax.annotate(
            text(name), (x, y), xytext=(float(offsets[best, 0]), float(offsets[best, 1])),
            textcoords="offset points", fontsize=size, va="center", zorder=5,
            ha=("right", "center", "left")[int(side[best]) + 1],
            arrowprops=line if away[best] > 1.6 * _NEAR else None)
        note.set_in_layout(False)  # it is inside the axes: the layout need not measure it
        taken = np.concatenate([taken, boxes[best : best + 1]])
        written.append(name)
    probe.remove()
    return written


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return which boxes (x0, y0, x1, y1) of [n, 4] and [m, 4] overlap, [n, m]."""
    ends = np.concatenate([b[None, :, 2:] - a[:, None, :2], a[:, None, 2:] - b[None, :, :2]], -1)
    return np.asarray((ends > 0).all(-1))


def _offsets() -> np.ndarray:
    """Return offsets of a name from its point in points, [n, 2], the nearest first."""
    angles, radii = np.radians(_ANGLES), np.linspace(_NEAR, _FAR, 6)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.concatenate([radius * circle for radius in radii])
