"""Collect the rollouts of a run in rounds over its questions, until the axis is precise enough.

Each round adds questions (`precision.ordered`). After a round, `precision.measure` computes the
reliability of the axis and of each role's centred vector at the middle layer from sums per
question, which the run folder keeps (`runs.sums`). The axis is settled if the lower end of its
interval is at least the target; a role is settled if the axis is, if the same holds for the role's
vector, and if the role has `min_count` rollouts with score 3. A settled role gets no more
questions. The default persona is asked all questions of the last round.

The decisions after a round depend only on the rollouts of this round and of earlier ones. A
resumed run therefore makes the same decisions, even if the folder already contains more rollouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.distributed import processes
from jaxpersona.errors import UserError
from jaxpersona.persona.collect import Collection, Report
from jaxpersona.persona.precision import (
    Cells,
    Reliability,
    check_precision,
    measure,
    ordered,
    question_slope,
)
from jaxpersona.runs.older import Older
from jaxpersona.runs.rollouts import Settings, place_of_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.sums import Sums

if TYPE_CHECKING:
    from jaxpersona.judges.protocol import Judge
    from jaxpersona.models.model import Model

PLAYED = "3"  # the group of sums (score 3) for role vectors


@dataclasses.dataclass(frozen=True)
class Round:
    """The measurements after one round.

    Attributes:
      questions: the number of questions that the roles of this round have been asked so far.
      axis: the reliability of the axis.
      roles: role → reliability of its centred vector, for the roles that were not settled before.
      settled: the number of settled roles after this round.
    """

    __repr__ = brief

    questions: int
    axis: Reliability
    roles: dict[str, Reliability]
    settled: int


@dataclasses.dataclass(frozen=True)
class Rounds:
    """The rounds of a run with a precision.

    Attributes:
      target: the reliability at which a vector is settled.
      layer: the layer of the measurements.
      rounds: the measurements, one entry per round.
      asked: role or "default" → number of questions that it was asked.
      settled: the names of the settled roles, sorted.
      rollouts: the number of rollouts of all roles in these rounds.
      quota: the number of rollouts if all roles were asked all questions.
      slope: the fraction of a question's effect that all personas share
        (`precision.question_slope`).
    """

    __repr__ = brief

    target: float
    layer: int
    rounds: list[Round]
    asked: dict[str, int]
    settled: list[str]
    rollouts: int
    quota: int
    slope: float

    @property
    def saved(self) -> int:
        """The number of rollouts that were not needed."""
        return self.quota - self.rollouts

    def last(self) -> dict[str, Reliability]:
        """Return the last measurement of each role."""
        found: dict[str, Reliability] = {}
        for one in self.rounds:
            found |= one.roles
        return found

    def value(self) -> dict[str, Any]:
        """Return the rounds as a JSON object; a reliability is [value, low, high] or null."""
        return {
            "target": self.target, "layer": self.layer, "rollouts": self.rollouts,
            "quota": self.quota, "slope": round(self.slope, 6), "asked": self.asked,
            "settled": self.settled,
            "rounds": [{"questions": one.questions, "axis": _listed(one.axis),
                        "settled": one.settled,
                        "roles": {name: _listed(own) for name, own in one.roles.items()}}
                       for one in self.rounds]}

    def brief_value(self) -> dict[str, Any]:
        """Return the result without the individual rounds as a JSON object."""
        return {"target": self.target, "layer": self.layer,
                "axis": _listed(self.rounds[-1].axis), "rounds": len(self.rounds),
                "settled": len(self.settled), "roles": len(self.asked) - 1,
                "rollouts_saved": self.saved, "quota": self.quota}

    def lines(self) -> list[str]:
        """Return the result as lines of text for the user."""
        axis, roles = self.rounds[-1].axis, len(self.asked) - 1
        open_ = sorted(set(self.asked) - {DEFAULT, *self.settled})
        lines = [
            f"precision {self.target:g} at layer {self.layer}: the axis has reliability "
            f"{shown(axis)} after {len(self.rounds)} rounds; "
            f"{len(self.settled):,} of {roles:,} roles are settled",
            f"rollouts saved: {self.saved:,} of {self.quota:,} ({self.saved / self.quota:.0%})"]
        if open_:
            names = ", ".join(open_[:8]) + (", …" if len(open_) > 8 else "")
            lines.append(f"not settled after all questions: {len(open_):,} ({names})")
        return lines


def shown(found: Reliability) -> str:
    """Format a reliability with its interval, such as "0.981 (0.975 to 0.985)"."""
    if not math.isfinite(found.value):
        return "unknown"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def rounds_and_quota(precision: float | None, rounds: Sequence[int] | None,
                     questions: Sequence[Question], after: bool,
                     ) -> tuple[list[int], dict[str, Any]]:
    """Check the arguments `precision` and `rounds` of `extract_axis`.

    Args:
      precision, rounds, questions: as for `extract_axis`.
      after: whether the judge scores only after all rollouts are generated.

    Returns:
      (the number of questions after each round, the fields to record in the manifest's "last").

    Raises:
      UserError: an argument is invalid (see `check_precision`), `rounds` is given without
        `precision`, or the judge scores only after all rollouts are generated.
    """
    if precision is None:
        if rounds is not None:
            raise UserError(f"rounds is {rounds!r:.40}, but precision is None; give both or omit "
                            "rounds")
        return [], {}
    if after:
        raise UserError("the judge scores only after all rollouts (--judge-after), but precision "
                        "needs scores after each round; omit one of the two")
    sizes = check_precision(precision, rounds, len(questions))
    return sizes, {"precision": float(precision), "rounds": sizes}


def collect(model: Model, run: Run, roles: Sequence[Role], questions: Sequence[Question],
            judge: Judge, settings: Settings, *, precision: float, rounds: Sequence[int],
            min_count: int, held_out: Sequence[str], keep: int | None, older: Older | None = None,
            report: Report | None = None, notice: Callable[[str], None] = lambda _: None,
            ) -> tuple[Collection, Rounds]:
    """Generate and judge rollouts in rounds, until all roles are settled or all are generated.

    Args:
      model, run, roles, questions, judge, settings, keep, older, report: as for `Collection`.
      precision: the reliability at which a vector is settled.
      rounds: the number of questions after each round, in ascending order, up to all questions.
      min_count, held_out: as for `extract_axis`.
      notice: a function that is called with a line of text after each round.

    Returns:
      (the work of the last round, the measurements).

    Raises:
      UserError: as for `Collection` and `Collection.work`.
    """
    names = sorted(role.name for role in roles if role.name != DEFAULT)
    order, layer = ordered(questions, settings.seed), model.config.n_layers // 2
    asked, active, done = dict.fromkeys([DEFAULT, *names], 0), set(names), []
    work: Collection | None = None
    cells: dict[str, Cells] = {}
    for size in rounds:
        asked |= dict.fromkeys([DEFAULT, *active], size)
        work = Collection(model, run, roles, {name: order[:n] for name, n in asked.items()}, judge,
                          settings, keep=keep, older=older, report=report, layer=layer,
                          before=None if work is None else work.status)
        work.work()
        cells = _cells(run, roles, judge.name, {name: [one.id for one in order[:n]]
                                                for name, n in asked.items()})
        enough = [name for name in names if cells[name].counts.sum() >= min_count]
        axis, found = measure(cells[DEFAULT], {name: cells[name] for name in names},
                              [name for name in enough if name not in held_out])
        now = {name: found[name] for name in names if name in active}
        if axis.reached(precision):
            active -= {name for name in enough if found[name].reached(precision)}
        done.append(Round(size, axis, now, len(names) - len(active)))
        notice(f"round {len(done)}, {size:,} questions: the axis has reliability {shown(axis)}; "
               f"{done[-1].settled:,} of {len(names):,} roles are settled")
        if not active:
            break
    assert work is not None
    each = {role.name: len(role.prompts) * settings.samples for role in roles}
    return work, Rounds(
        float(precision), layer, done, dict(sorted(asked.items())), sorted(set(names) - active),
        sum(each[name] * n for name, n in asked.items()), sum(each.values()) * len(questions),
        question_slope(cells[DEFAULT], {name: cells[name] for name in names}))


def _cells(run: Run, roles: Sequence[Role], judge: str, asked: Mapping[str, Sequence[int]],
           ) -> dict[str, Cells]:
    """Return the sums per question of all roles; `asked` maps roles to the ids of questions."""
    own = {}
    for i, role in enumerate(roles):
        if processes.owns(i):
            sums = run.sums(role.name, judge)
            assert sums is not None, f"{role.name} is not closed"
            group = None if role.name == DEFAULT else PLAYED
            own[role.name] = sums.by_question(group, asked[role.name])
    cells = {name: Cells(*found) for name, found in processes.merge(own).items()}
    width = max(found.totals.shape[1] for found in cells.values())
    return {name: found if found.totals.shape[1] else  # without replies, D is unknown
            Cells(np.zeros((len(found.counts), width), np.float32), found.counts)
            for name, found in cells.items()}


def question_shifts(run: Run, sums: Mapping[str, Sums], slope: float) -> dict[str, np.ndarray]:
    """Return the corrections of role vectors for questions that the roles were not asked.

    For a role that was asked other questions than the default persona, the correction is `slope`
    times the difference between the default persona's mean over all its replies and its mean over
    the replies to the role's questions ("Unequal questions" in `persona.precision`).

    Args:
      run: the open run.
      sums: role → sums, of the roles that this process owns.
      slope: the fraction of a question's effect that all personas share.

    Returns:
      role → correction [L, D] float64, for the roles whose questions differ from the default
      persona's.
    """
    asked = processes.merge({name: tuple(sorted({place_of_key(key)[0] for key in one.groups}))
                             for name, one in sums.items()})
    own: dict[Any, np.ndarray] = {}
    if DEFAULT in sums:
        sample = run.sample(DEFAULT)
        finite = [i for i, value in enumerate(sample.differences)
                  if np.isfinite(value.astype(np.float32)).all()]
        # the differences are relative to a base, which cancels out below
        means = sample.differences[finite].astype(np.float64)
        of = np.array([place_of_key(sample.keys[i])[0] for i in finite])
        for some in set(asked.values()) - {asked[DEFAULT]}:
            if (inside := np.isin(of, some)).any():
                own[some] = slope * (means.mean(0) - means[inside].mean(0))
    shifts = processes.merge(own)
    return {name: shifts[some] for name, some in asked.items() if some in shifts}


def _listed(found: Reliability) -> list[float] | None:
    values = [found.value, found.low, found.high]
    return [round(value, 6) for value in values] if all(map(math.isfinite, values)) else None
