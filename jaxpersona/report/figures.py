"""Plot the results of a run: roles on the axis, PCA, explained variance, and drift."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.ckpts.files import atomic
from jaxpersona.persona.axis import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CAPPED, _PLAIN, _ROLE = "#1b7f5c", "#c2452d", "#4a6fa5"


def _save(figure: Figure, path: pathlib.Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    # no pyplot: its backend and list of figures are global to the process
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def roles_on_axis(path: pathlib.Path, projections: Mapping[str, np.ndarray], layer: int,
                  held_out: Sequence[str] = ()) -> None:
    """Plot every role's mean and interquartile range of projections [n, L] at one layer."""
    def place(name: str) -> float:
        return float(np.nanmean(projections[name][:, layer]))

    names = sorted(projections, key=place)
    figure, axes = _axes(7, max(2.5, 0.2 * len(names) + 1))
    for row, name in enumerate(names):
        values = projections[name][:, layer]
        low, high = np.nanpercentile(values, [25, 75])
        colour = _CAPPED if name == "default" else _ROLE
        axes.plot([low, high], [row, row], color=colour, alpha=0.4, linewidth=4)
        axes.plot(place(name), row, "o", color=colour, markersize=5,
                  fillstyle="none" if name in held_out else "full")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel(f"projection on the Assistant Axis, layer {layer} (residual-stream units)")
    note = " (open circles: held out)" if held_out else ""
    axes.set_title(f"Roles on the axis{note}")
    _save(figure, path)


def components(path: pathlib.Path, analysis: Analysis, layer: int) -> None:
    """Plot the role vectors on the first two principal components at one layer."""
    figure, axes = _axes(7, 5.5)
    pca = analysis.components[layer]
    xy = pca.coordinates[:, :2] if pca.coordinates.shape[1] > 1 else np.pad(
        pca.coordinates, ((0, 0), (0, 1)))
    axes.scatter(xy[:, 0], xy[:, 1], color=_ROLE, s=18)
    for name, (x, y) in zip(analysis.names, xy, strict=True):
        axes.annotate(name, (x, y), fontsize=6.5, xytext=(3, 3), textcoords="offset points")
    axes.set_xlabel(f"PC1 ({pca.ratio[0]:.0%} of the variance) → Assistant")
    axes.set_ylabel(f"PC2 ({pca.ratio[1]:.0%})" if len(pca.ratio) > 1 else "PC2")
    axes.set_title(f"Role vectors, layer {layer}: |cos(PC1, axis)| = {analysis.cos_pc1[layer]:.3f}")
    _save(figure, path)


def variance(path: pathlib.Path, analysis: Analysis, layer: int) -> None:
    """Plot the cumulative explained variance ratio of the components at one layer."""
    figure, axes = _axes(5.5, 3.8)
    total = np.cumsum(analysis.components[layer].ratio)[:20]
    axes.plot(np.arange(1, len(total) + 1), total, "o-", color=_ROLE, markersize=4)
    axes.axhline(0.7, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="components", ylabel="share of variance", ylim=(0, 1.02),
             title=f"Variance explained, layer {layer}")
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
