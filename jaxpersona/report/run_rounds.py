"""The rounds of a run with `--precision`, for the page of the run (`run_page`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.persona.precision import Reliability
from jaxpersona.persona.rounds import shown

if TYPE_CHECKING:
    from jaxpersona.report.run_values import Notes


@dataclasses.dataclass(frozen=True)
class Curve:
    """The reliabilities after each of K rounds, as stored in `analysis.json`.

    Attributes:
      target: the target reliability. A role is settled only if the lower end of its interval
        reaches the target (`persona.rounds`); it then gets no more questions.
      layer: the layer of the measurements.
      questions: the cumulative number of questions after each round.
      axis: [3, K], the reliability of the axis and the ends of its interval; NaN if unknown.
      roles: [3, K], median, 25th and 75th percentile over the roles of each role's last known
        reliability; NaN if none is known.
      settled: [K], the share of settled roles.
      open: the names of the roles that are not settled after the last round.
      rollouts, quota: as in `persona.rounds.Rounds`.
      final: [3], the reliability of the axis of all rollouts in the folder, and its interval.
    """

    __repr__ = brief

    target: float
    layer: int
    questions: list[int]
    axis: np.ndarray
    roles: np.ndarray
    settled: np.ndarray
    open: list[str]
    rollouts: int
    quota: int
    final: np.ndarray

    @classmethod
    def read(cls, about: Any) -> Curve:
        """Convert the field "precision" of `analysis.json`.

        Raises:
          AttributeError, KeyError, OverflowError, TypeError, ValueError: a value is missing or
            invalid.
        """
        names = sorted(str(name) for name in about["asked"] if name != "default")
        if not names:
            raise ValueError("asked contains no role")
        known: dict[str, float] = {}
        axis, roles, questions, settled = [], [], [], []
        for one in about["rounds"]:
            axis.append(_three(one["axis"]))
            known |= {name: _three(value)[0] for name, value in one["roles"].items()
                      if value is not None}
            values = [value for value in known.values() if np.isfinite(value)]
            roles.append(np.percentile(values, [50, 25, 75]) if values else np.full(3, np.nan))
            questions.append(int(one["questions"]))
            settled.append(int(one["settled"]) / len(names))
        rollouts, quota = int(about["rollouts"]), int(about["quota"])
        if not axis or not 0 < rollouts <= quota:
            raise ValueError("precision needs at least one round, and at most `quota` rollouts")
        done = {str(name) for name in about["settled"]}
        return cls(float(about["target"]), int(about["layer"]), questions, np.transpose(axis),
                   np.transpose(roles), np.array(settled),
                   [name for name in names if name not in done], rollouts, quota,
                   _three(about["axis"]) if "axis" in about else axis[-1])

    def value(self, notes: Notes) -> dict[str, Any]:
        """Return the numbers of the figure as a JSON object."""
        more = {"unit": "round", "first": 1}
        return {
            "target": notes.number("target of the precision", self.target), "layer": self.layer,
            "questions": self.questions,
            "axis": [notes.series("reliability of the axis", row, **more) for row in self.axis],
            "roles": [notes.series("reliability of the roles", row, **more) for row in self.roles],
            "settled": notes.series("share of settled roles", self.settled, **more)}

    def facts(self) -> list[tuple[str, str]]:
        """Return the results as (name, value) pairs."""
        saved = self.quota - self.rollouts
        return [(f"reliability of the axis at layer {self.layer}",
                 shown(Reliability(*map(float, self.final)))),
                ("rollouts saved", f"{saved:,} of {self.quota:,} ({saved / self.quota:.0%})")]

    def caption(self) -> str:
        """Return the sentences of the figure's caption that contain numbers."""
        return (f"The target is {self.target:g}, at layer {self.layer}. The run needed "
                f"{self.rollouts:,} of {self.quota:,} rollouts.")


def _three(value: Any) -> np.ndarray:
    if value is None:
        return np.full(3, np.nan)
    return np.array(value, np.float64).reshape(3)
