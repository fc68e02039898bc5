"""The result of an axis extraction, and the file `analysis.json` with its statistics."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.ckpts.files import write_json
from jaxpersona.export import Table
from jaxpersona.persona import axis as science
from jaxpersona.persona.bootstrap import PcaIntervals
from jaxpersona.persona.rounds import Rounds
from jaxpersona.persona.thresholds import Intervals
from jaxpersona.vectors.vector import Axis


@dataclasses.dataclass(frozen=True)
class Extraction(Table):
    """The result of `extract_axis`.

    Attributes:
      axis: the axis with its thresholds.
      analysis: the role vectors that define the axis, and their principal components.
      default: the mean [L, D] of the default persona's response means.
      role_means: role → mean [L, D] of the response means of its rollouts with score 3, corrected
        for unequal questions (`persona.unequal`), for roles with at least `min_count` such
        rollouts, including held-out roles.
      projections: role or "default" → projections [k, L] of the k stored response means, which
        belong to a sample of the role's rollouts, or to all rollouts of the default persona.
      counts: role → number of replies per score, as returned by `verdict_counts`; without the
        default persona.
      rollouts: the number of rollouts in the run.
      tokens: the number of tokens that this call generated.
      mean_projections: role or "default" → mean projection [L] over all non-empty replies. For
        roles without an entry, `mean_projection` averages `projections`.
      sizes: role or "default" → number of rollouts.
      intervals: "default" or "all" → a dictionary such as {"p25": (low [L], high [L])} with the
        ends of the 95 % bootstrap interval of each threshold.
      rounds: the rounds of a run with a precision, or None.
      pca: bootstrap intervals for the PCA of the role vectors at the middle layer, `n_layers // 2`;
        its arrays contain only this layer (L = 1). None for a run with several processes, or if
        neither the default persona nor any role has two stored response means.
    """

    __repr__ = brief

    axis: Axis
    analysis: science.Analysis
    default: np.ndarray
    role_means: dict[str, np.ndarray]
    projections: dict[str, np.ndarray]
    counts: dict[str, dict[str, int]]
    rollouts: int
    tokens: int
    mean_projections: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    intervals: dict[str, Intervals] = dataclasses.field(default_factory=dict)
    rounds: Rounds | None = None
    pca: PcaIntervals | None = None

    def mean_projection(self, name: str) -> np.ndarray:
        """Return the mean projection [L] of a role's replies; NaN if all replies are empty."""
        if name in self.mean_projections:
            return self.mean_projections[name]
        values = self.projections[name]
        known = values[np.isfinite(values).all(1)].astype(np.float64)
        return known.mean(0) if len(known) else np.full(values.shape[1], np.nan)

    def records(self) -> list[dict[str, Any]]:
        """Return `ranking` at the middle layer."""
        return self.ranking(self.axis.n_layers // 2)

    def ranking(self, layer: int) -> list[dict[str, Any]]:
        """Return one record per role, including "default", by descending mean projection.

        Each record has the keys `role`, `projection` (the mean projection of the role's replies at
        the layer), `p25` and `p75` (percentiles of `projections` at the layer), `answers` (the
        number of rollouts), `in_axis` (whether the role's vector is included in the axis) and
        `scores` (the values of the role's dictionary in `counts`; [] for the default persona).
        Roles whose replies are all empty have NaN projections and come last.
        """
        found = []
        for name, values in self.projections.items():
            known = values[np.isfinite(values).all(1), layer].astype(np.float64)
            low, high = np.percentile(known, [25, 75]) if known.size else (np.nan, np.nan)
            found.append({"role": name, "projection": float(self.mean_projection(name)[layer]),
                          "p25": float(low), "p75": float(high),
                          "answers": self.sizes.get(name, len(values)),
                          "in_axis": name in self.analysis.names,
                          "scores": list(self.counts.get(name, {}).values())})
        return sorted(found, key=lambda row: (np.isnan(row["projection"]), -row["projection"]))

    def facts(self) -> dict[str, Any]:
        """Return a dict of the model's name, the layer of `records` and the number of rollouts."""
        return {"model": self.axis.model, "layer": self.axis.n_layers // 2,
                "rollouts": self.rollouts}


def save_analysis(folder: pathlib.Path, found: Extraction, held_out: Sequence[str]) -> None:
    """Write the statistics of an extraction to `analysis.json` in a folder.

    For each layer, the file contains |cos(PC1, axis)|, the explained variance ratios of the first
    20 components, and the thresholds with their bootstrap intervals. For each role and the default
    persona, it contains two statistics by layer (the mean projection of all replies, and the 25th
    and 75th percentiles of the projections of the stored response means), the numbers of rollouts
    (in total, per score, and with a stored response mean), and whether the role is held out or
    included in the axis. A run with a precision adds its rounds (`Rounds.value`).
    """
    analysis = found.analysis
    write_json(folder / "analysis.json", {
        "layers": len(analysis.axis),
        "cos_pc1_axis": [round(float(c), 6) for c in analysis.cos_pc1],
        "variance_ratio": [[round(float(r), 6) for r in c.ratio[:20]]
                           for c in analysis.components],
        "thresholds": {
            of: {name: {"value": _rounded(found.axis.percentiles[of][name]),
                        "low": _rounded(low), "high": _rounded(high)}
                 for name, (low, high) in table.items()}
            for of, table in found.intervals.items()},
        "roles": {
            name: {"mean_projection": _rounded(found.mean_projection(name)),
                   "quartiles": [_rounded(row) for row in _quartiles(value)],
                   "rollouts": found.sizes.get(name, len(value)), "kept_means": len(value),
                   "held_out": name in held_out, "in_axis": name in analysis.names,
                   "scores": found.counts.get(name)}
            for name, value in found.projections.items()
        },
        **({} if found.rounds is None else {"precision": found.rounds.value()}),
    })


def _quartiles(values: np.ndarray) -> np.ndarray:
    """Return the 25th and 75th percentiles [2, L] of the finite rows [k, L]; NaN without one."""
    known = values[np.isfinite(values).all(1)]
    return np.percentile(known, [25, 75], 0) if len(known) else np.full(
        (2, values.shape[1]), np.nan)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(x), 6) for x in values]
