"""The numbers on the page of a run (`run_page`), as a JSON value.

A value that is not finite becomes null, which is not drawn, and a note lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import count
from jaxpersona.data.texts import DEFAULT
from jaxpersona.persona import axis as science
from jaxpersona.persona.bootstrap import PcaIntervals
from jaxpersona.persona.check import normal_spread
from jaxpersona.report.run_drift import Drift
from jaxpersona.report.run_read import Contents
from jaxpersona.vectors.vector import Axis

COMPONENTS = (1, 2, 3, 10)  # numbers of components whose cumulative explained variance is drawn
SCORES = ("3", "2", "1", "0", "None", "failed")  # in the order of the stacked bars
_REPLY = 280  # maximum number of characters of a question or reply in the details of a role
Values = dict[str, Any]


class Notes:
    """Convert arrays and numbers to JSON, and record those that have non-finite values.

    Attributes:
      lines: one line of text for each recorded array or number.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def series(self, name: str, values: Any, unit: str = "layer", first: int = 0,
               ) -> list[float | None]:
        """Round N values to five significant digits, and replace non-finite values by None.

        Args:
          name: the name of the array in the note.
          values: the array, of N numbers.
          unit: the word for an index of the array in the note, such as "layer" or "turn".
          first: the index of the first value in the note.
        """
        array = np.asarray(values, np.float64)
        missing = [str(first + i) for i in np.nonzero(~np.isfinite(array))[0].tolist()]
        if missing:
            where = f"every {unit}" if len(missing) == len(array) else (
                f"{unit}{'s' * (len(missing) > 1)} {', '.join(missing)}")
            self._add(f"{name}: not finite at {where}, and not drawn there")
        return [_rounded(value) for value in array.tolist()]

    def number(self, name: str, value: float) -> float | None:
        """Round a number like `series`."""
        if not np.isfinite(value):
            self._add(f"{name}: not finite, and not drawn")
        return _rounded(value)

    def _add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if np.isfinite(value) else None


def values(found: Contents, notes: Notes, drift: Drift | None,
           report: Callable[[str, int, int, int], None] | None = None,
           bars: PcaIntervals | None = None) -> Values:
    """Return the numbers of the page, and the names and sample replies of the roles.

    Args:
      found: the content of the run folder.
      notes: the object that records arrays with non-finite values.
      drift: the content of drift.json, or None.
      bars: the intervals of the values by layer, or None.
      report: a progress function, called with ("components", done, total, 0) for each layer.
    """
    layers = int(found.manifest.get("model", {}).get("layers", 1))
    out: Values = {
        "layers": layers, "middle": layers // 2, "scores": list(SCORES),
        "unread": found.judge == "none", "pca": None, "byLayer": None, "thresholds": None,
        "reliability": None, "order": None, "rounds": None,
        "drift": None if drift is None else drift.value(notes)}
    measured = {} if found.analysis is None else found.analysis.roles
    names = [name for name in found.roles if name in found.closed or name in measured]
    out["roles"] = [_role(found, name, notes) for name in names]
    out["default"] = _role(found, DEFAULT, notes)
    if found.axis is None or found.analysis is None:
        return out
    out["default"] |= _scale(found.axis, notes)
    out["order"] = order(out["roles"], layers)
    out["byLayer"] = {
        "cos": notes.series("|cos(PC1, axis)|", found.analysis.cos),
        "variance": {str(n): notes.series(
            f"explained variance of {count(n, 'component')}",
            [row[:n].sum() for row in found.analysis.variance]) for n in COMPONENTS},
        "bars": None if bars is None else _bars(bars, notes)}
    out["thresholds"] = {
        of: {name: _threshold(f"{name} of {of}", value,
                              found.analysis.intervals.get(of, {}).get(name), notes)
             for name, value in table.items()}
        for of, table in found.axis.percentiles.items()}
    places = coordinates(found, report)
    if places is not None:
        shares, points = places
        out["pca"] = {"ratio": [notes.series(f"share of PC{i + 1}", row)
                                for i, row in enumerate(shares)]}
        for one in [*out["roles"], out["default"]]:
            if one["name"] in points:
                one["x"], one["y"] = (
                    notes.series(f"{one['name']!r:.60}, PC{i + 1}", row)
                    for i, row in enumerate(points[one["name"]]))
    if found.analysis.rounds is not None:
        out["rounds"] = found.analysis.rounds.value(notes)
    agreement = None if found.halves is None else found.halves.agreement()
    if agreement is not None:
        out["reliability"] = {
            name: notes.series(f"split-half agreement ({name})", getattr(agreement, name))
            for name in ("mean", "low", "high")}
    return out


def _bars(bars: PcaIntervals, notes: Notes) -> Values:
    """Return the ends of the intervals of the values by layer.

    If there are fewer components than a number in `COMPONENTS`, all components are used.
    """
    def ends(name: str, values: np.ndarray) -> Values:
        return {end: notes.series(f"interval of {name} ({end})", row)
                for end, row in zip(("low", "high"), values, strict=True)}

    most = bars.variance.shape[2]
    return {"cos": ends("|cos(PC1, axis)|", bars.cos), "variance": {
        str(n): ends(f"explained variance of {count(n, 'component')}",
                     bars.variance[:, :, min(n, most) - 1]) for n in COMPONENTS}}


def _role(found: Contents, name: str, notes: Notes) -> Values:
    """Return the values of a role, or of the default persona."""
    own: Values = {"name": name, "counts": found.counts.get(name),
                   "answers": found.rollouts.get(name)}
    if name in found.replies:
        item, score = found.replies[name]
        own |= {"question": _cut(item.question), "reply": _cut(item.answer),
                "score": None if name == DEFAULT or found.judge == "none" else score}
    measured = None if found.analysis is None else found.analysis.roles.get(name)
    if measured is not None:
        shown = f"{name!r:.60}"
        own |= {"mean": notes.series(f"projection of {shown}", measured.mean),
                "p25": notes.series(f"projection of {shown}", measured.quartiles[0]),
                "p75": notes.series(f"projection of {shown}", measured.quartiles[1]),
                "answers": measured.rollouts, "inAxis": measured.in_axis,
                "heldOut": measured.held_out}
    return own


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _REPLY else text[: _REPLY - 1] + "…"


def _scale(axis: Axis, notes: Notes) -> Values:
    """Return the default persona's median, quartiles and standard deviation, or {} if unknown.

    The standard deviation is estimated from the quartiles.
    """
    table = axis.percentiles.get(DEFAULT, {})
    if not {"p25", "p50", "p75"} <= set(table):
        return {}
    spread = normal_spread(table["p25"], table["p75"])
    return {"median": notes.series("median of the default persona", table["p50"]),
            "spread": [_rounded(x) if x > 0 else None for x in spread.tolist()],
            "p25": notes.series("p25 of the default persona", table["p25"]),
            "p75": notes.series("p75 of the default persona", table["p75"])}


def _threshold(name: str, value: np.ndarray, interval: np.ndarray | None, notes: Notes) -> Values:
    ends = {} if interval is None else {
        "low": notes.series(f"interval of {name} (low)", interval[0]),
        "high": notes.series(f"interval of {name} (high)", interval[1])}
    return {"value": notes.series(name, value), **ends}


def order(roles: Sequence[Mapping[str, Any]], layers: int) -> list[list[int]]:
    """Return, for each layer, the indices of the roles in descending order of mean projection.

    Roles without a finite mean projection are omitted. Roles with equal means are sorted by name.
    """
    found = []
    for layer in range(layers):
        known = [i for i, role in enumerate(roles)
                 if role.get("mean") is not None and role["mean"][layer] is not None]
        found.append(sorted(known, key=lambda i: (-roles[i]["mean"][layer], roles[i]["name"])))
    return found


def unplaced(found: Contents) -> list[str]:
    """Return the roles of the axis (or "default") whose vectors are missing or not finite."""
    if found.analysis is None:
        return []
    needed = [name for name, role in found.analysis.roles.items()
              if role.in_axis or name == DEFAULT]
    return [name for name in needed if name not in found.vectors
            or not np.isfinite(found.vectors[name]).all()]


def coordinates(found: Contents, report: Callable[[str, int, int, int], None] | None = None,
                ) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """Place the roles and the default persona on the first two principal components.

    The components are computed from the vectors of the roles in the axis (`principal_components`).
    The other vectors are projected onto the same components.

    Returns:
      (shares of the variance [2, L], role or "default" → coordinates [2, L]); None if there is no
      axis, if a vector of the axis is missing or not finite, or for fewer than two roles.
    """
    if found.axis is None or found.analysis is None or unplaced(found):
        return None
    names = [name for name in sorted(found.vectors)
             if found.analysis.roles[name].in_axis and name != DEFAULT]
    if len(names) < 2:
        return None
    rest = [name for name in found.vectors if name not in names]
    layers = found.axis.n_layers
    shares = np.zeros((2, layers))
    points = {name: np.zeros((2, layers)) for name in found.vectors}
    for layer in range(layers):
        if report is not None:
            report("components", layer, layers, 0)
        vectors = np.stack([found.vectors[name][layer] for name in names])
        parts = science.principal_components(vectors, found.axis.values[layer])
        two = min(2, len(parts.ratio))
        shares[:two, layer] = parts.ratio[:two]
        for name, place in zip(names, parts.coordinates, strict=True):
            points[name][:two, layer] = place[:two]
        middle = vectors.mean(0, dtype=np.float64)
        for name in rest:
            points[name][:two, layer] = parts.directions[:two] @ (
                found.vectors[name][layer] - middle)
    if report is not None:
        report("components", layers, layers, 0)
    return shares, points
