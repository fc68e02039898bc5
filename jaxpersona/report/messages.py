"""The figure of `jaxpersona project`: projections of messages and of the default persona."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from jaxpersona.ckpts.files import atomic
from jaxpersona.extras import require
from jaxpersona.inputs import printable
from jaxpersona.persona.reference import Reference
from jaxpersona.report.style import new_figure, text

_DEFAULT, _MESSAGE = "#1b7f5c", "#4a6fa5"


def messages(path: pathlib.Path, turns: Sequence[int], values: np.ndarray, names: Sequence[str],
             layer: int, references: Sequence[Reference | None]) -> None:
    """Write a PNG figure of the projections of M assistant messages onto K directions.

    Args:
      path: the file to write.
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
    figure = new_figure(6.5, 1 + 3 * len(names))
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for k, (panel, name) in enumerate(zip(panels, names, strict=True)):
        panel.spines[["top", "right"]].set_visible(False)
        if (known := references[k]) is not None:
            for low, high, alpha in ((1, 99, 0.08), (25, 75, 0.16)):
                panel.axhspan(known.percentiles[low], known.percentiles[high], color=_DEFAULT,
                              alpha=alpha, linewidth=0, label=f"default, p{low}–p{high}")
            panel.axhline(known.floor, color="black", linewidth=0.8, linestyle="--",
                          label="floor of --cap (p25)")
            for turn, value in zip(turns, values[:, k], strict=True):
                for role in known.nearest(float(value), 1):
                    panel.annotate(_plain(role.replace("_", " ")), (turn, value), fontsize=6.5,
                                   xytext=(0, 6), textcoords="offset points", ha="center")
        panel.plot(turns, values[:, k], "o-", color=_MESSAGE, label=_plain(name))
        panel.set_ylabel(f"mean projection, layer {layer}", fontsize=8)
        panel.legend(frameon=False, fontsize=7)
    panels[-1].set_xticks(list(turns))
    panels[-1].set_xlabel("index of the message in the conversation")
    roles = any(known is not None and known.roles for known in references)
    panels[0].set_title("Projection of each assistant message"
                        + (", with its nearest role" if roles else ""), fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, metadata={"Software": None})


def _plain(name: str) -> str:
    """Escape control characters and dollar signs in a name that was read from a file."""
    return text(printable(name))
