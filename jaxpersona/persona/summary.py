"""The result of an axis run as text: measurements, written files and suggested next commands."""

from __future__ import annotations

import os
import pathlib
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.brief import count
from jaxpersona.data.texts import DEFAULT
from jaxpersona.runs.files import FIGURES, RESULTS

if TYPE_CHECKING:
    from jaxpersona.persona.extraction import Extraction

SHOWN = 5  # number of roles to print from each end of the ranking
UNREAD = ("judge none: no reply was read, so every reply counts as fully playing its role, even if "
          "the model refused; use --judge self or --judge model:NAME to judge the replies")
_ABOUT = {
    "axis.safetensors": "the axis with its thresholds",
    "analysis.json": "statistics by role and layer",
    "roles.png": "projections of the roles", "pca.png": "role vectors on two principal components",
    "variance.png": "explained variance of the components", "drift.png": "persona drift over turns",
    "drift.json": "drift over turns, as numbers", "report.html": "the page of `jaxpersona report`",
}


def distances(found: Extraction, layer: int) -> dict[str, float]:
    """Return the signed distance of each role's mean projection from the default persona's.

    Args:
      found: the extraction.
      layer: the layer of the projections.

    Returns:
      A dict from role to distance, in descending order. The unit is the standard deviation of the
      projections of the default persona's replies. The distance is negative if the role's mean is
      below the default persona's mean. Roles whose replies are all empty are omitted.
    """
    own = found.projections[DEFAULT][:, layer]
    spread = max(float(own[np.isfinite(own)].std()), 1e-12)
    means = {name: float(found.mean_projection(name)[layer]) for name in found.projections}
    middle = means.pop(DEFAULT)
    means = {name: value for name, value in means.items() if np.isfinite(value)}
    order = sorted(means, key=lambda name: (-means[name], name))
    return {name: (means[name] - middle) / spread for name in order}


def summary(found: Extraction, folder: str | os.PathLike[str], layer: int, *,
            held_out: Sequence[str] = (), options: Sequence[str] = ()) -> list[str]:
    """Return the result of a run as lines of text.

    Args:
      found: the extraction.
      folder: the run folder; only existing files are listed.
      layer: the layer of the projections, the ranking, |cos(PC1, axis)| and the variance explained.
      held_out: names of the held-out roles.
      options: options to add to the suggested commands except `report`, such as `["--model",
        "NAME"]`.
    """
    folder, axis = pathlib.Path(folder), found.axis
    least, kept = int(axis.notes["min_count"]), len(found.analysis.names)
    few = sorted(set(found.counts) - set(found.role_means))
    own = found.projections[DEFAULT][:, layer]
    precise = [] if found.rounds is None else found.rounds.lines()
    lines = [
        f"Assistant Axis of {axis.model}: {kept} of {len(found.counts)} roles, "
        f"{found.rollouts:,} rollouts, {axis.n_layers} layers",
        *([UNREAD] if axis.notes["judge"] == "none" else
          [f"judge {axis.notes['judge']}: {_scores(found.counts)}"]),
    ]
    if few:
        lines.append(f"left out, with fewer than {count(least, 'reply')} with score 3: "
                     f"{_names(few)}")
    if held_out:
        lines.append(f"held out: {_names(sorted(held_out))}")
    lines += precise
    pc1 = found.analysis.components[layer].ratio[0]
    ends = ["", ""]
    if found.pca is not None and layer == axis.n_layers // 2:
        cos, share = found.pca.cos[:, 0], found.pca.variance[:, 0, 0]
        ends = [f" (95 % interval {cos[0]:.3f} to {cos[1]:.3f})",
                f" ({share[0]:.0%} to {share[1]:.0%})"]
    lines += [
        f"|cos(PC1, axis)| at layer {layer}: {found.analysis.cos_pc1[layer]:.3f}{ends[0]}; PC1 "
        f"explains {pc1:.0%}{ends[1]} of the role vectors' variance",
        f"projections at layer {layer}: the default persona has mean "
        f"{found.mean_projection(DEFAULT)[layer]:.4g} and standard deviation "
        f"{np.nanstd(own):.3g}; distances of the roles from this mean in standard deviations:",
    ]
    ranked = list(distances(found, layer).items())
    if len(ranked) <= 2 * SHOWN:
        lines.append(f"  nearest to farthest: {_ranked(ranked)}")
    else:
        lines.append(f"  nearest: {_ranked(ranked[:SHOWN])}")
        lines.append(f"  farthest: {_ranked(ranked[:-SHOWN - 1:-1])}")
    lines.append(f"files in {folder}:")
    lines += [f"  {name:<18}{_ABOUT[name]}" for name in (*RESULTS, *FIGURES)
              if name in _ABOUT and (folder / name).exists()]  # `_ABOUT` omits SVG files
    file, more = shlex.quote(str(folder / "axis.safetensors")), shlex.join(options)
    more = f" {more}" if more else ""
    return [*lines, "next:",
            f"  jaxpersona report {shlex.quote(str(folder))}",
            f"  jaxpersona vectors check {file}{more}",
            f"  jaxpersona project CONVERSATION.json --on {file}{more}",
            f'  jaxpersona generate "Who are you?" --cap {file} --compare{more}']


def _scores(counts: dict[str, dict[str, int]]) -> str:
    """Return the numbers of replies by score as text, such as "12 with score 3, 4 with score 0"."""
    total: Counter[str] = Counter()
    for by_score in counts.values():
        total.update(by_score)
    named = {"None": "undecided", "failed": "without a verdict"}
    return ", ".join(f"{n:,} {named.get(score, f'with score {score}')}"
                     for score, n in sorted(total.items(), reverse=True) if n)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{len(names)} ({shown}{', …' if len(names) > 8 else ''})"


def _ranked(pairs: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{name} {value:+.1f}" for name, value in pairs)
