"""The figure of `jaxpersona project`: projections of messages and of the default persona."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.extras import require
from jaxpersona.inputs import printable
from jaxpersona.persona.reference import Reference
from jaxpersona.report.labels import place
from jaxpersona.report.style import BLACK, DEFAULT, ROLE, new_figure, save, style, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def messages(path: pathlib.Path, turns: Sequence[int], values: np.ndarray, names: Sequence[str],
             layer: int, references: Sequence[Reference | None]) -> None:
    """Write a figure of the projections of M assistant messages onto K directions.

    Args:
      path: the PNG file; an SVG file with the same stem is written beside it.
      turns: the M indices of the messages.
      values: the projections [M, K]; each direction has a separate panel.
      names: the K names of the directions.
      layer: the layer of the projections.
      references: for each direction, the projections of the default persona and of the roles, or
        None. The default persona's percentiles are drawn as bands and the floor of `--cap` as a
        line. If the roles' projections are known, each message is labelled with the nearest role.

    Raises:
      UserError: matplotlib is not installed.
    """
    require("matplotlib", "figures need matplotlib")
    save(drawn(turns, values, names, layer, references), path)


@style()
def drawn(turns: Sequence[int], values: np.ndarray, names: Sequence[str], layer: int,
          references: Sequence[Reference | None]) -> Figure:
    """Return the figure of `messages`, in the style of all figures."""
    figure = new_figure(6.5, 1 + 3 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for k, (panel, name) in enumerate(zip(panels, names, strict=True)):
        if (known := references[k]) is not None:
            for low, high, alpha in ((1, 99, 0.08), (25, 75, 0.16)):
                panel.axhspan(known.percentiles[low], known.percentiles[high], color=DEFAULT,
                              alpha=alpha, linewidth=0, label=f"default, p{low}–p{high}")
            panel.axhline(known.floor, color=BLACK, linewidth=0.8, linestyle="--",
                          label="floor of --cap (p25)")
        panel.plot(turns, values[:, k], color=ROLE, marker="o", label=_plain(name))
        panel.set_ylabel(f"mean projection, layer {layer}")
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
    panels[-1].set_xticks(_ticks(turns))
    panels[-1].set_xlabel("index of the message in the conversation")
    roles = any(known is not None and known.roles for known in references)
    panels[0].set_title("Projection of each assistant message"
                        + (", with its nearest role" if roles else ""), pad=38)  # above the legend
    figure.draw_without_rendering()  # fix the layout before the labels are placed
    figure.set_layout_engine("none")
    for k, panel in enumerate(panels):
        points = [(role.replace("_", " "), float(turn), float(value))
                  for turn, value in zip(turns, values[:, k], strict=True)
                  for known in references[k : k + 1] if known is not None
                  for role in known.nearest(float(value), 1)]
        place(panel, [(printable(role), x, y) for role, x, y in points],
              np.stack([np.asarray(turns, float), values[:, k]], 1))
    return figure


def _ticks(turns: Sequence[int]) -> list[int]:
    """Return at most twenty of the indices, evenly spaced."""
    return list(turns)[:: -(-len(turns) // 20)]


def _plain(name: str) -> str:
    """Escape control characters and dollar signs in a name that was read from a file."""
    return text(printable(name))
