"""Write figures to PNG and SVG files; each function draws with `jaxpersona.plot`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.persona.axis import Analysis
from jaxpersona.persona.extraction import Extraction
from jaxpersona.persona.talk import Talks
from jaxpersona.report import plot
from jaxpersona.report.style import figure_of, new_figure, save, style, text, without_pyplot
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Path = str | os.PathLike[str]


def roles_on_axis(path: Path, found: Extraction | Mapping[str, np.ndarray], layer: int,
                  held_out: Sequence[str] = (), title: str | None = None) -> None:
    """Write the figure of `plot.ranking` for an extraction or for projections [n, L] by role."""
    _write(path, plot.ranking, found, layer, held_out=held_out, title=title)


def components(path: Path, analysis: Analysis, layer: int,
               default: np.ndarray | None = None) -> None:
    """Write the figure of `plot.pca`; `default` is the default persona's mean activation [L, D]."""
    _write(path, plot.pca, analysis, layer, default=default)


def variance(path: Path, analysis: Analysis, layer: int) -> None:
    """Write the figure of `plot.variance`."""
    _write(path, plot.variance, analysis, layer)


def by_layer(path: Path, curves: Mapping[str, Sequence[float]], title: str,
             label: str = "") -> None:
    """Write the figure of `plot.layers`."""
    _write(path, plot.layers, curves, title=title, ylabel=label)


def drift(path: Path, talks: Mapping[str, Talks], axis: Axis, layer: int, *,
          behaviour: Mapping[str, Sequence[float]], leak: Mapping[str, float] | None = None,
          floor: str | float = "p25") -> None:
    """Write a figure of persona drift: behaviour by turn, and projections by turn.

    The projections are taken from `Talks.readout`, which is measured without interventions.

    Args:
      path: the PNG file; an SVG file with the same stem is written beside it.
      talks: arm, such as "uncapped" or "capped" → `Talks`; only those with a `readout` are drawn.
      axis: the axis, with its thresholds.
      layer: the layer of the projections.
      behaviour: arm → share of in-character choices at each of the M turns.
      leak: arm → leak rate after the last turn, as for `plot.drift`.
      floor: the floor of the cap, as a percentile of the default persona or a number.
    """
    turns = len(next(iter(behaviour.values())))
    read = {name: np.asarray(talk.readout)[:turns, :, layer] for name, talk in talks.items()
            if talk.readout is not None}
    count = next(iter(read.values())).shape[1]
    with style():
        figure = new_figure(9.6, 4.3)
        left, right = figure.subplots(1, 2)
        plot.drift(behaviour, what="behaviour", leak=leak, ax=left)
        plot.drift(read, axis=axis, layer=layer, floor=floor, ax=right)
        figure.suptitle(text(f"Persona drift over {turns} turns, {count} conversations per arm"),
                        x=0.01, ha="left", fontsize=11)
    save(figure, path)


def _write(path: Path, draw: Callable[..., Axes], *args: Any, **named: Any) -> None:
    """Call `draw` with a new figure outside pyplot, and write the figure as PNG and SVG."""
    with without_pyplot():
        save(figure_of(draw(*args, **named)), path)
