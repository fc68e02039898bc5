"""Collect the rollouts of a run in rounds over its questions, until the axis is precise enough.

Each round adds questions (`precision.ordered`). After a round, `precision.measure` computes the
reliability of the axis and of each role's centred vector at the middle layer from sums per
question, which the run folder keeps (`runs.sums`). The axis is settled if the lower end of its
interval is at least the target. A role is settled if the axis is settled, the lower end of the
interval of the role's vector is also at least the target, and the role has `min_count` rollouts
with score 3. A settled role is asked no further questions. The default persona is asked all
questions of the last round, and all other questions of the call of which the folder contains
rollouts of a role.

The decisions after a round depend only on the rollouts of this round and of earlier ones. A
resumed run therefore makes the same decisions, even if the folder already contains more rollouts.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxpersona.brief import brief
from jaxpersona.brief import shown as brief_repr
from jaxpersona.data.texts import DEFAULT, Question, Role
from jaxpersona.distributed import processes
from jaxpersona.errors import UserError
from jaxpersona.persona.collect import Collection, Report
from jaxpersona.persona.precision import Cells, Reliability, check_precision, measure, ordered
from jaxpersona.persona.unequal import cells_of, merged_cells, questions_of
from jaxpersona.runs.older import Older
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.run import Run

if TYPE_CHECKING:
    from jaxpersona.judges.protocol import Judge
    from jaxpersona.models.model import Model


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
      asked: role or "default" → number of questions that it was asked in these rounds.
      settled: the names of the settled roles, sorted.
      rollouts: the number of rollouts that the vectors average, including the default persona's. If
        the run folder already contained more rollouts than the rounds need, these are included.
      quota: the number of rollouts if all roles were asked all questions of the call, plus the
        number of rollouts of other questions in the folder.
      slope: the fraction of a question's effect that all personas share
        (`precision.question_slope`), with which the vectors are corrected.
      axis: the reliability of the axis that is computed from these rollouts. It equals the
        reliability after the last round, unless the folder already contained more rollouts.
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
    axis: Reliability

    @property
    def saved(self) -> int:
        """The number of rollouts that were not needed, `quota` minus `rollouts`."""
        return self.quota - self.rollouts

    def last(self) -> dict[str, Reliability]:
        """Return a dict from role to the last measured reliability of its centred vector."""
        found: dict[str, Reliability] = {}
        for one in self.rounds:
            found |= one.roles
        return found

    def value(self) -> dict[str, Any]:
        """Return the rounds as a JSON object; a reliability is [value, low, high] or null."""
        return {
            "target": self.target, "layer": self.layer, "rollouts": self.rollouts,
            "quota": self.quota, "slope": round(self.slope, 6), "asked": self.asked,
            "settled": self.settled, "axis": _listed(self.axis),
            "rounds": [{"questions": one.questions, "axis": _listed(one.axis),
                        "settled": one.settled,
                        "roles": {name: _listed(own) for name, own in one.roles.items()}}
                       for one in self.rounds]}

    def brief_value(self) -> dict[str, Any]:
        """Return a summary as a JSON object, with the numbers of rounds and settled roles."""
        return {"target": self.target, "layer": self.layer,
                "axis": _listed(self.axis), "rounds": len(self.rounds),
                "settled": len(self.settled), "roles": len(self.asked) - 1,
                "rollouts_saved": self.saved, "quota": self.quota}

    def lines(self) -> list[str]:
        """Return the result as lines of text for the user."""
        axis, roles = self.axis, len(self.asked) - 1
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
    """Format a reliability with its interval, such as "0.981 (0.975 to 0.985)", or "unknown"."""
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
      (the number of questions after each round, the fields to record in the manifest's "last");
      both are empty without `precision`.

    Raises:
      UserError: an argument is invalid (see `check_precision`), `rounds` is given without
        `precision`, or the judge scores only after all rollouts are generated.
    """
    if precision is None:
        if rounds is not None:
            raise UserError(f"rounds is {brief_repr(rounds)}, but precision is None; "
                            "give both or omit rounds")
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
    """Generate and judge rollouts in rounds, until all roles are settled or asked all questions.

    Args:
      model, run, roles, questions, judge, settings, keep, older, report: as for `Collection`.
      precision: the reliability at which a vector is settled.
      rounds: the number of questions after each round, in ascending order, up to all questions.
      min_count, held_out: as for `extract_axis`.
      notice: a function that is called with a line of text after each round.

    Returns:
      (the last `Collection`, the `Rounds`). The fields `rollouts`, `slope` and `axis` of `Rounds`
      are final only after `measured` sets them.

    Raises:
      UserError: as for `Collection` and `Collection.work`.
    """
    names = sorted(role.name for role in roles if role.name != DEFAULT)
    order, layer = ordered(questions, settings.seed), model.config.n_layers // 2
    asked, active, done = dict.fromkeys([DEFAULT, *names], 0), set(names), []
    work: Collection | None = None
    cells: dict[str, Cells] = {}
    stored: dict[str, Counter[int]] = {}
    ids = [one.id for one in order]

    def collected(of: Mapping[str, Sequence[Question]]) -> Collection:
        found = Collection(model, run, roles, of, judge, settings, keep=keep, older=older,
                           report=report, layer=layer,
                           before=None if work is None else work.status)
        found.work()
        return found

    for size in rounds:
        asked |= dict.fromkeys([DEFAULT, *active], size)
        work = collected({name: order[:n] for name, n in asked.items()})
        cells, stored = _stored(run, roles, judge.name, {name: ids[:n]
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
    # the vectors average all rollouts in the folder, and the correction of a role for its questions
    # needs the default persona's replies to all of them
    if more := set().union(*stored.values()) & set(ids) - set(stored[DEFAULT]):
        own = [one for i, one in enumerate(order) if i < asked[DEFAULT] or one.id in more]
        work = collected({name: order[:n] for name, n in asked.items()} | {DEFAULT: own})
        asked[DEFAULT] = len(own)
    each = sum(len(role.prompts) for role in roles) * settings.samples
    others = sum(n for some in stored.values() for i, n in some.items() if i not in ids)
    return work, Rounds(
        float(precision), layer, done, dict(sorted(asked.items())), sorted(set(names) - active),
        0, each * len(questions) + others, 0.0, done[-1].axis)


def _stored(run: Run, roles: Sequence[Role], judge: str, asked: Mapping[str, Sequence[int]],
            ) -> tuple[dict[str, Cells], dict[str, Counter[int]]]:
    """Return each role's sums per question, and its number of stored rollouts per question id.

    Args:
      run, roles: as for `collect`.
      judge: the name of the judge.
      asked: role → the ids of the questions to sum over, in the order of the sums.
    """
    cells, stored = {}, {}
    for i, role in enumerate(roles):
        if processes.owns(i):
            sums = run.sums(role.name, judge)
            assert sums is not None, f"{role.name} is not closed"
            cells[role.name] = cells_of(sums, role.name, asked[role.name])
            stored[role.name] = questions_of(run, role.name, judge, sums)
    found = merged_cells(cells)
    assert found is not None, "a role has no sums per question"
    return found, processes.merge(stored)


def measured(rounds: Rounds, asked: Mapping[str, Mapping[int, int]], cells: Mapping[str, Cells],
             used: Sequence[str], slope: float) -> Rounds:
    """Return the result of `collect` with `rollouts`, `slope` and `axis` of the final vectors.

    The final vectors average all rollouts in the run folder.

    Args:
      rounds: the result of `collect`.
      asked: role or "default" → question id → number of rollouts.
      cells: role or "default" → sums per question, all with the same questions.
      used: the names of the roles that define the axis.
      slope: the slope with which the vectors were corrected (`precision.question_slope`).
    """
    axis, _ = measure(cells[DEFAULT], {name: cells[name] for name in sorted(cells)
                                       if name != DEFAULT}, sorted(used), slope)
    return dataclasses.replace(rounds, axis=axis, slope=slope,
                               rollouts=sum(sum(some.values()) for some in asked.values()))




def _listed(found: Reliability) -> list[float] | None:
    values = [found.value, found.low, found.high]
    return [round(value, 6) for value in values] if all(map(math.isfinite, values)) else None
