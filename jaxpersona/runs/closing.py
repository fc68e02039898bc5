"""Closing a role: its rollouts, sample, scores and sums are written, and its live files removed.

A role may be closed again, with further questions, other verdicts or another judge. Each step
writes whole files and can be repeated, so a process killed between two steps leaves nothing that a
later call counts twice: sums name the rollouts that they contain.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.data.texts import DEFAULT
from jaxpersona.runs.live import Live
from jaxpersona.runs.rollouts import place_of, rollout_key
from jaxpersona.runs.run import Run
from jaxpersona.runs.sample import chosen
from jaxpersona.runs.sums import Sums, sampled

Reread = Callable[[Sequence[Mapping[str, Any]]], Iterator[np.ndarray]]
PLAIN = {"score": None, "expected": None, "mass": None, "refused": False, "error": None, "raw": ""}


@dataclasses.dataclass
class State:
    """What the folder contains of a role.

    Attributes:
      records: all rollouts by key; `close` sorts them into their order.
      live: the role's appended files.
      verdicts: key → verdict of the judge, as JSON values (`PLAIN`); without those that failed in
        an earlier call.
      sums: the sums by the judge's scores, or None.
      closed: whether the files of all records are written.
    """

    __repr__ = brief

    records: dict[str, dict[str, Any]]
    live: Live
    verdicts: dict[str, dict[str, Any]]
    sums: Sums | None
    closed: bool

    def unjudged(self, role: str) -> list[str]:
        """Return the rollouts without a verdict; none for the default."""
        return [] if role == DEFAULT else [k for k in self.records if k not in self.verdicts]


def state_of(run: Run, role: str, judge: str, rubric: str, shape: tuple[int, int], *,
             texts: bool = True, repair: bool = True) -> State:
    """Read and verify all files of a role.

    Args:
      run: the open run.
      role: the role.
      judge: name of the judge.
      rubric: digest of what the judge reads besides the rollouts.
      shape: (L, D) of a mean.
      texts: whether the records of a closed role are needed; otherwise they are empty.
      repair: whether files may be changed: scores by another rubric are deleted, and the invalid
        end of a live file; otherwise both are ignored.

    Raises:
      Damaged: a file differs from what the run wrote.
    """
    data, live = run.rollouts_bytes(role), run.live(role, shape, repair=repair)
    stored, sums = run.verdicts(role, judge), run.sums(role, judge)
    if stored is not None and stored["rubric"] != rubric:
        if repair:
            run.forget(role, judge, "scores")
        stored = None
    verdicts = {} if stored is None else {
        key: {"score": score, **stored["details"].get(key, {})}
        for key, score in stored["scores"].items()}
    verdicts |= live.verdicts.get(f"{judge}/{rubric}", {})
    verdicts = {k: verdict for k, verdict in verdicts.items() if verdict.get("error") is None}
    closed = False
    if data is not None and sums is not None and not live.records and not live.verdicts:
        known = list(sums.groups if role == DEFAULT else verdicts)
        closed = data.count(b"\n") == len(known) == len(sums.groups) and (
            role == DEFAULT or sums.agrees(_scores(verdicts)))
        if closed and not texts:
            return State({key: {} for key in known}, live, verdicts, sums, True)
    kept = [] if data is None else run.parsed(data)
    records = {rollout_key(record): record for record in [*kept, *live.records.values()]}
    records = dict(sorted(records.items(), key=lambda item: place_of(item[1])))
    return State(records, live, verdicts, sums, closed)


def close(run: Run, role: str, state: State, *, judge: str, rubric: str, keep: int | None,
          seed: int, reread: Reread) -> Sums:
    """Write the files of a role, all of whose rollouts have a verdict or a failed one.

    Args:
      run, role, judge, rubric: as for `state_of`.
      state: the role's state; its live files are removed, but for failed verdicts' rollouts.
      keep: the number of single means to keep; None keeps all.
      seed: seed of the sample.
      reread: returns the means of rollouts whose means are no longer there, in the given order.

    Returns:
      The sums.
    """
    # rollouts were added in the order in which they finished
    records = state.records = dict(sorted(state.records.items(),
                                          key=lambda item: place_of(item[1])))
    live = state.live
    text = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
                   for record in records.values())
    before = run.sample(role) if run.path("samples", role).exists() else None
    wanted = chosen({key: record["prompt_index"] for key, record in records.items()},
                    None if role == DEFAULT else keep, seed=seed, role=role)
    run.save_sample(role, sampled(
        wanted, before, lambda key: live.mean(key) if live.has_mean(key) else None, live.shape),
        text)
    run.save_rollouts(role, text)
    scores: dict[str, int | None] = dict.fromkeys(records)
    if role != DEFAULT:
        scores = save_verdicts(run, role, state, judge, rubric)
    sums = _usable(state.sums, scores)
    again = reread(needed(state, role))
    for key in [key for key in records if key in scores and key not in sums.groups]:
        sums.add(key, scores[key], live.mean(key) if live.has_mean(key) else next(again))
    run.save_sums(role, judge, sums)
    live.keep_only({key for key in live.records if key not in scores})
    return sums


def needed(state: State, role: str) -> list[dict[str, Any]]:
    """Return the rollouts that the sums lack and whose means are no longer in the folder."""
    scores = dict.fromkeys(state.records) if role == DEFAULT else _scores(state.verdicts)
    sums = _usable(state.sums, scores)
    records = sorted(state.records.items(), key=lambda item: place_of(item[1]))
    return [record for key, record in records
            if key in scores and key not in sums.groups and not state.live.has_mean(key)]


def _usable(sums: Sums | None, scores: Mapping[str, int | None]) -> Sums:
    """Return sums, or empty ones if there are none or they are of other scores."""
    return sums if sums is not None and sums.agrees(scores) else Sums({}, {})


def save_verdicts(run: Run, role: str, state: State, judge: str, rubric: str) -> dict[str, Any]:
    """Write the verdicts on a role's rollouts in the folder; return those that did not fail."""
    ordered = {key: state.verdicts[key] for key in state.records if key in state.verdicts}
    run.save_verdicts(role, judge, rubric, {k: v["score"] for k, v in ordered.items()},
                      {k: {n: x for n, x in v.items() if n != "score" and x != PLAIN.get(n)}
                       for k, v in ordered.items()})
    return _scores(ordered)


def _scores(verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the scores of the verdicts that did not fail."""
    return {k: v["score"] for k, v in verdicts.items() if v.get("error") is None}
