"""Correct role vectors for questions that a role was not asked.

Roles of a run can have rollouts of different questions, for example after a run with a precision
(`persona.rounds`). A question changes the response means of all personas, so a role's vector
depends on the role's questions. For a role with other questions than the default persona, the
correction is b · (v(default) − u(role)): v is the default persona's mean over all its replies, u
its mean over the replies to the role's questions, and b the slope of the regression of the roles'
means per question on the default persona's means (`precision.question_slope`). b is computed from
all rollouts that the vectors average. This computation needs sums per question, which are kept only
by runs with a precision and by imports of such runs.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief, named
from jaxpersona.data.texts import DEFAULT
from jaxpersona.distributed import processes
from jaxpersona.persona.precision import Cells, question_slope, rank
from jaxpersona.runs.rollouts import place_of_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.sums import Sums

PLAYED = "3"  # the group of sums that role vectors use


@dataclasses.dataclass(frozen=True)
class Correction:
    """The corrections of role vectors for questions that a role was not asked.

    Attributes:
      slope: the fraction of a question's effect that all personas share; None if it was not
        computed, for example because the run has no sums per question.
      shifts: role → correction [L, D] float64; roles that need no correction, or for which it
        cannot be computed, are missing.
      problem: a sentence about roles that are not corrected for all their questions; "" if there
        are none.
    """

    __repr__ = brief

    slope: float | None
    shifts: dict[str, np.ndarray]
    problem: str


def questions_of(run: Run, name: str, judge: str, sums: Sums) -> Counter[int]:
    """Return the number of a role's rollouts for each question id.

    The role must be closed (`runs.closing`). Its rollouts are those with a verdict of `judge` or,
    without a file of verdicts, those in `sums`.
    """
    verdicts = run.verdicts(name, judge)
    keys = sums.groups if verdicts is None else verdicts["scores"]
    return Counter(place_of_key(key)[0] for key in keys)


def order_of(asked: Mapping[str, Iterable[int]], seed: int) -> list[int]:
    """Return the ids of all questions in the order in which a run with this seed asks them."""
    return sorted({i for some in asked.values() for i in some}, key=lambda i: rank(seed, i))


def cells_of(sums: Sums, name: str, order: Sequence[int], asked: Iterable[int] | None = None,
             ) -> Cells | None:
    """Return a role's sums per question, or None if the run does not keep them.

    The sums include the role's rollouts with score 3, or all rollouts of the default persona.

    Args:
      sums: the sums of the role.
      name: the name of the role.
      order: the ids of n questions.
      asked: the ids of the questions that the role was asked; default: all.
    """
    if sums.layer is None:
        return None
    totals, counts = sums.by_question(None if name == DEFAULT else PLAYED, order)
    return Cells(totals, counts, None if asked is None else np.isin(order, list(asked)))


def same_width(cells: Mapping[str, Cells]) -> dict[str, Cells]:
    """Return the cells with equal widths; cells of width 0, without replies, become zeros."""
    width = max(one.totals.shape[1] for one in cells.values())
    return {name: one if one.totals.shape[1] else dataclasses.replace(
        one, totals=np.zeros((len(one.counts), width), np.float32)) for name, one in cells.items()}


def merged_cells(own: Mapping[str, Cells | None]) -> dict[str, Cells] | None:
    """Merge the cells of all processes, with equal widths; return None if a role has none."""
    found = processes.merge({name: (one, ) for name, one in own.items()})
    cells = {name: one for name, (one,) in found.items() if one is not None}
    return same_width(cells) if len(cells) == len(found) else None


def correction(run: Run, asked: Mapping[str, Iterable[int]], cells: Mapping[str, Cells] | None, *,
               owns_default: bool = True) -> Correction:
    """Return the corrections of role vectors for questions that the roles were not asked.

    Args:
      run: the open run.
      asked: role → ids of its questions (`questions_of`); it includes the role "default".
      cells: role → sums per question (`cells_of`), all with the same questions; None if unknown.
      owns_default: whether this process reads the files of the default persona.
    """
    sets = {name: frozenset(some) for name, some in asked.items()}
    others = sorted(name for name in sets if sets[name] != sets[DEFAULT])
    slope = None if cells is None else question_slope(
        cells[DEFAULT], {name: cells[name] for name in sorted(cells) if name != DEFAULT})
    if not others:
        return Correction(slope, {}, "")
    if slope is None:
        return Correction(None, {}, (
            f"{named(others, 'role')}: asked other questions than the default persona; the run "
            "keeps no sums per question, so the vectors are not corrected for this; give all "
            "questions, or a precision (--precision)"))
    own: dict[Any, np.ndarray] = {}
    if owns_default:
        sample = run.sample(DEFAULT)
        finite = [i for i, value in enumerate(sample.differences)
                  if np.isfinite(value.astype(np.float32)).all()]
        # without the sample's base, which cancels in the difference of two means below
        means = sample.differences[finite].astype(np.float64)
        of = np.array([place_of_key(sample.keys[i])[0] for i in finite])
        for some in {sets[name] for name in others}:
            if (inside := np.isin(of, sorted(some))).any():
                own[tuple(sorted(some))] = slope * (means.mean(0) - means[inside].mean(0))
    by_set = processes.merge(own)
    shifts = {name: by_set[key] for name in others
              if (key := tuple(sorted(sets[name]))) in by_set}
    more = [name for name in others if sets[name] - sets[DEFAULT]]
    return Correction(slope, shifts, "" if not more else (
        f"{named(more, 'role')}: has rollouts of questions that the default persona was not asked; "
        "the vectors are not corrected for these; give all questions of the run"))


def corrected(vectors: Mapping[str, tuple[np.ndarray, int]], shift: np.ndarray | None,
              ) -> dict[str, tuple[np.ndarray, int]]:
    """Return the vectors of a role (`Sums.vectors`), each plus the correction of the role."""
    if shift is None:
        return dict(vectors)
    return {label: ((vector + shift).astype(np.float32), n)
            for label, (vector, n) in vectors.items()}
