"""Close a role: write its rollouts, sample, scores and sums, and then clear its live files.

A role is closed again after questions are added, after verdicts change, or for another judge.
Each step writes whole files and can be repeated. The sums file lists the rollouts that it includes,
so no rollout is counted twice, even if a process is killed between two steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
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
# (rollouts, key → score) → the keys whose score is no longer valid
Outdated = Callable[[Sequence[Mapping[str, Any]], Mapping[str, int | None]], Set[str]]
PLAIN = {"score": None, "expected": None, "mass": None, "refused": False, "error": None, "raw": ""}


@dataclasses.dataclass
class State:
    """The data of one role in the run folder.

    Attributes:
      records: key → rollout; `close` sorts the rollouts by question, prompt and sample.
      live: the role's live files, to which rollouts and verdicts are appended.
      verdicts: key → the judge's verdict, a JSON object with a subset of the fields of `PLAIN`.
        Rollouts on which the judge failed in an earlier call are omitted.
      sums: the sums of the response means by the judge's scores, or None if none are stored.
      closed: whether the role's final files contain all its rollouts and verdicts.
    """

    __repr__ = brief

    records: dict[str, dict[str, Any]]
    live: Live
    verdicts: dict[str, dict[str, Any]]
    sums: Sums | None
    closed: bool

    def unjudged(self, role: str) -> list[str]:
        """Return the keys of rollouts without a verdict; [] for the default persona."""
        return [] if role == DEFAULT else [k for k in self.records if k not in self.verdicts]


def state_of(run: Run, role: str, judge: str, rubric: str, shape: tuple[int, int], *,
             texts: bool = True, repair: bool = True, outdated: Outdated | None = None,
             ) -> State:
    """Read and verify a role's rollouts, scores, sums and live files, and return its state.

    Args:
      run: the open run.
      role: the name of the role.
      judge: the name of the judge.
      rubric: the digest of the role's `eval_prompt` (`collect.rubric_of`).
      shape: (L, D), the shape of a response mean.
      texts: whether to return the texts of a closed role's rollouts. If false, each record of a
        closed role is {}.
      repair: whether to delete scores that are based on another rubric, and invalid data in the
        live files. If false, both are ignored.
      outdated: a function that returns the keys of the rollouts whose score is no longer valid
        (`Judge`), or None. Their verdicts are omitted.

    Raises:
      Damaged: a file differs from the content that the run wrote.
      UserError: a live file cannot be read or repaired.
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
    if outdated is not None and verdicts:
        every = [*(() if data is None else run.parsed(data)), *live.records.values()]
        gone = outdated(every, _scores(verdicts))
        verdicts = {k: verdict for k, verdict in verdicts.items() if k not in gone}
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
          seed: int, reread: Reread, layer: int | None = None) -> Sums:
    """Write the final files of a role whose rollouts have all been judged; clear its live files.

    Rollouts on which the judge failed remain in the live files, so that a later call can judge them
    again.

    Args:
      run, role, judge, rubric: as in `state_of`.
      state: the role's state.
      keep: the maximum number of rollouts whose response means are stored, or None for all. For
        the default persona, all are always stored.
      seed: the seed of the sample.
      reread: a function that recomputes the response means of the given rollouts and yields them
        in the same order.
      layer: the layer at which sums per question are needed, or None if they are not needed.

    Returns:
      The sums of the response means by score.

    Raises:
      Damaged: the role's sample file differs from the content that the run wrote.
      UserError: a file cannot be written, or a response mean is partly NaN or contains infinity.
    """
    # sort, because rollouts were appended to `State.records` in the order in which they finished
    records = state.records = dict(sorted(state.records.items(),
                                          key=lambda item: place_of(item[1])))
    live = state.live
    text = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
                   for record in records.values())
    before = run.sample(role) if run.path("samples", role).exists() else None
    if before is not None and not len(before):  # an imported role without response means
        before, lost = None, needed(state, role, layer)
        for record, mean in zip(lost, reread(lost), strict=True):
            live.add(record, mean)
    wanted = chosen({key: record["prompt_index"] for key, record in records.items()},
                    None if role == DEFAULT else keep, seed=seed, role=role)
    run.save_sample(role, sampled(
        wanted, before, lambda key: live.mean(key) if live.has_mean(key) else None, live.shape),
        text)
    run.save_rollouts(role, text)
    scores: dict[str, int | None] = dict.fromkeys(records)
    if role != DEFAULT:
        scores = save_verdicts(run, role, state, judge, rubric)
    sums = _usable(state.sums, scores, layer)
    again = reread(needed(state, role, layer))
    for key in [key for key in records if key in scores and key not in sums.groups]:
        sums.add(key, scores[key], live.mean(key) if live.has_mean(key) else next(again))
    run.save_sums(role, judge, sums)
    live.keep_only({key for key in live.records if key not in scores})
    return sums


def needed(state: State, role: str, layer: int | None = None, *,
           unjudged: bool = False) -> list[dict[str, Any]]:
    """Return the rollouts whose response means `close` has to recompute.

    These are the rollouts, sorted by question, prompt and sample, whose means are neither in the
    live files nor in the sums. Sums that do not agree with the verdicts, or lack the sums
    per question at `layer` (if it is not None), are treated as empty.

    Args:
      state: the role's state.
      role: the name of the role.
      layer: the layer at which sums per question are needed, or None.
      unjudged: whether to include rollouts without a valid verdict, as if they were judged. The
        rollouts of the default persona are always included.
    """
    scores = dict.fromkeys(state.records) if role == DEFAULT else _scores(state.verdicts)
    sums = _usable(state.sums, scores, layer)
    records = sorted(state.records.items(), key=lambda item: place_of(item[1]))
    return [record for key, record in records if (unjudged or key in scores)
            and key not in sums.groups and not state.live.has_mean(key)]


def summed(state: State, role: str, keys: Set[str], layer: int) -> bool:
    """Return whether the sums include the given rollouts, and the live files contain none of them.

    Args:
      state, role: as in `close`.
      keys: the keys of the rollouts. The live files may contain other rollouts.
      layer: the layer at which sums per question are needed.
    """
    scores = dict.fromkeys(state.records) if role == DEFAULT else _scores(state.verdicts)
    live = set(state.live.records).union(*state.live.verdicts.values())
    return keys <= set(_usable(state.sums, scores, layer).groups) and not keys & live


def _usable(sums: Sums | None, scores: Mapping[str, int | None], layer: int | None) -> Sums:
    """Return `sums`, or empty sums if `sums` is None or has other scores or another layer."""
    usable = sums is not None and sums.agrees(scores) and layer in (None, sums.layer)
    return sums if sums is not None and usable else Sums({}, {}, layer)


def save_verdicts(run: Run, role: str, state: State, judge: str, rubric: str) -> dict[str, Any]:
    """Write the verdicts on a role's rollouts to the role's scores file.

    Returns:
      A dict from key to score, without rollouts on which the judge failed.
    """
    ordered = {key: state.verdicts[key] for key in state.records if key in state.verdicts}
    run.save_verdicts(role, judge, rubric, {k: v["score"] for k, v in ordered.items()},
                      {k: {n: x for n, x in v.items() if n != "score" and x != PLAIN.get(n)}
                       for k, v in ordered.items()})
    return _scores(ordered)


def _scores(verdicts: Mapping[str, Mapping[str, Any]]) -> dict[str, int | None]:
    """Return a dict from key to score, without rollouts on which the judge failed."""
    return {k: v["score"] for k, v in verdicts.items() if v.get("error") is None}
