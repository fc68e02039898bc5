"""Plot the results of a run: roles on the axis, PCA, explained variance, and drift."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.ckpts.files import atomic
from jaxpersona.extras import require
from jaxpersona.persona.axis import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED, EXTREMES = 40, 15  # all of up to 40 roles are named; of more, 15 at each end
_CAPPED, _PLAIN, _ROLE = "#1b7f5c", "#c2452d", "#4a6fa5"


def _save(figure: Figure, path: pathlib.Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    require("matplotlib", "figures need matplotlib")
    # no pyplot: its backend and list of figures are global to the process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def roles_on_axis(path: pathlib.Path, projections: Mapping[str, np.ndarray], layer: int,
                  held_out: Sequence[str] = (), title: str = "Roles on the axis") -> None:
    """Plot every role's mean and interquartile range of projections [n, L] at one layer.

    With more than `NAMED` roles, only the nearest to and farthest from the Assistant have a row
    each; the means of the others are ticks in one row. The shaded band is the default persona's
    interquartile range.
    """
    def place(name: str) -> float:
        return float(np.nanmean(projections[name][:, layer]))

    names = sorted((name for name in projections if name != "default"), key=place)
    between: list[str] = []
    if len(names) > NAMED:
        between = names[EXTREMES:-EXTREMES]
    shown = [name for name in names if name not in set(between)]
    rows = {name: row + (3 if between and row >= EXTREMES else 0)
            for row, name in enumerate(shown)}
    figure, axes = _axes(7, max(2.5, 0.2 * (len(shown) + 3) + 1))
    if "default" in projections:
        rows["default"] = max(rows.values(), default=-1) + 1
        low, high = np.nanpercentile(projections["default"][:, layer], [25, 75])
        axes.axvspan(low, high, color=_CAPPED, alpha=0.12, linewidth=0)
    for name, row in rows.items():
        values = projections[name][:, layer]
        low, high = np.nanpercentile(values, [25, 75])
        colour = _CAPPED if name == "default" else _ROLE
        axes.plot([low, high], [row, row], color=colour, alpha=0.4, linewidth=4)
        axes.plot(place(name), row, "o", color=colour, markersize=5,
                  fillstyle="none" if name in held_out else "full")
    labels = {row: name.replace("_", " ") for name, row in rows.items()}
    if between:
        middle = EXTREMES + 1
        axes.plot([place(name) for name in between], [middle] * len(between), "|", color=_ROLE,
                  alpha=0.6, markersize=14, linestyle="none")
        labels[middle] = f"{len(between)} other roles"
    axes.set_yticks(sorted(labels), [labels[row] for row in sorted(labels)], fontsize=7)
    axes.set_ylim(-0.8, max(labels) + 0.8)
    axes.set_xlabel(f"projection on the Assistant Axis, layer {layer} → Assistant\n"
                    "dot: mean; bar: interquartile range; band: that of the default persona",
                    fontsize=8)
    note = " (open circles: held out)" if held_out else ""
    axes.set_title(f"{title}{note}")
    _save(figure, path)


def components(path: pathlib.Path, analysis: Analysis, layer: int,
               default: np.ndarray | None = None) -> None:
    """Plot the role vectors on the first two principal components at one layer.

    Args:
      path: the file to write.
      analysis: the role vectors' principal components.
      layer: the layer.
      default: the default persona's mean activation [L, D], drawn as a star.

    With more than `NAMED` roles, only the extreme ones of each component are named.
    """
    figure, axes = _axes(7, 5.5)
    pca = analysis.components[layer]
    xy = pca.coordinates[:, :2] if pca.coordinates.shape[1] > 1 else np.pad(
        pca.coordinates, ((0, 0), (0, 1)))
    axes.scatter(xy[:, 0], xy[:, 1], color=_ROLE, s=18, alpha=0.8, linewidths=0)
    points = [(name.replace("_", " "), x, y)
              for name, (x, y) in zip(analysis.names, xy, strict=True)]
    if len(points) > NAMED:
        ends = {int(i) for column in (0, 1) for order in [np.argsort(xy[:, column])]
                for i in (*order[:8], *order[-8:])}
        points = [points[i] for i in sorted(ends)]
    if default is not None:
        centre = analysis.vectors[:, layer].mean(0, dtype=np.float64)
        x, *rest = pca.directions[:2] @ (default[layer] - centre)
        y = rest[0] if rest else 0.0
        axes.plot(x, y, "*", color=_CAPPED, markersize=14, linestyle="none")
        points.append(("default persona", float(x), float(y)))
    _write_names(axes, points)
    axes.set_xlabel(f"PC1 ({pca.ratio[0]:.0%} of the variance) → Assistant")
    axes.set_ylabel(f"PC2 ({pca.ratio[1]:.0%})" if len(pca.ratio) > 1 else "PC2")
    axes.set_title(f"Role vectors, layer {layer}: |cos(PC1, axis)| = {analysis.cos_pc1[layer]:.3f}")
    _save(figure, path)


def _write_names(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each point's name beside it, on the first of eight sides without an overlap.

    A name that overlaps an earlier one on every side is left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    figure = axes.figure
    assert isinstance(figure, Figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)  # sets the limits of the axes, needed to place the names
    taken: list[Bbox] = []
    sides = [(6, 3, "left"), (-6, 3, "right"), (6, -9, "left"), (-6, -9, "right"),
             (0, 8, "center"), (0, -14, "center"), (12, 10, "left"), (-12, 10, "right")]
    for name, x, y in points:
        for dx, dy, align in sides:
            text = axes.annotate(name, (x, y), fontsize=6.5, xytext=(dx, dy), ha=align,
                                 textcoords="offset points")
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in taken) and axes.bbox.contains(
                    box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1):
                taken.append(box)
                break
            text.remove()


def variance(path: pathlib.Path, analysis: Analysis, layer: int) -> None:
    """Plot the cumulative explained variance ratio of the components at one layer."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(5.5, 3.8)
    total = np.cumsum(analysis.components[layer].ratio)[:20]
    axes.plot(np.arange(1, len(total) + 1), total, "o-", color=_ROLE, markersize=4)
    axes.axhline(0.7, color="grey", linewidth=0.8, linestyle=":")
    axes.text(len(total), 0.71, "70 % of the variance", fontsize=7, color="grey", ha="right")
    axes.set(xlabel="number of components", ylabel="share of variance", ylim=(0, 1.02),
             title=f"Variance of role vectors explained, layer {layer}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _save(figure, path)


def by_layer(path: pathlib.Path, curves: Mapping[str, Sequence[float]], title: str,
             label: str = "") -> None:
    """Plot values by layer, one curve [L] per name."""
    figure, axes = _axes(6.5, 4)
    for name, values in curves.items():
        axes.plot(range(len(values)), values, "o-", markersize=3, label=name)
    axes.set(xlabel="layer", ylabel=label, title=title)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def drift(path: pathlib.Path, projections: Mapping[str, np.ndarray], floor: float, layer: int,
          count: int) -> None:
    """Plot the mean projection by turn, with and without the cap.

    Args:
      projections: "uncapped" and "capped" → [M, N] projections of N conversations over M turns.
      floor: the cap's threshold τ at this layer.
      layer: index for the axis label.
      count: N, for the title.
    """
    figure, axes = _axes(6.5, 4)
    for name, colour in (("uncapped", _PLAIN), ("capped", _CAPPED)):
        if name not in projections:
            continue
        values = projections[name]
        turns = np.arange(1, len(values) + 1)
        low, high = np.nanpercentile(values, [25, 75], axis=1)
        axes.fill_between(turns, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(turns, np.nanmean(values, 1), "o-", color=colour, label=name)
    axes.axhline(floor, color="black", linewidth=0.8, linestyle="--", label="floor τ")
    axes.set_xticks(turns)
    axes.set(xlabel="turn", ylabel=f"projection on the Assistant Axis, layer {layer}",
             title=f"Persona drift, emotional and meta-reflective users (n = {count})")
    axes.legend(frameon=False)
    _save(figure, path)


def conversation(path: pathlib.Path, turns: Sequence[int], values: np.ndarray,
                 names: Sequence[str], layer: int) -> None:
    """Plot one conversation's projections [M, K] on K directions by assistant message."""
    figure, axes = _axes(6.5, 4)
    for k, name in enumerate(names):
        axes.plot(turns, values[:, k], "o-", label=name)
    axes.set_xticks(list(turns))
    axes.set(xlabel="message", ylabel=f"mean projection, layer {layer}",
             title="Projection of each assistant message")
    axes.legend(frameon=False)
    _save(figure, path)
