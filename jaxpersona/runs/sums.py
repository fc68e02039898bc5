"""The stored forms of a role's response means: their sums by score, and a sample of the means.

A run with a target precision (`persona.rounds`) also keeps sums per question at one layer.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxpersona.brief import brief
from jaxpersona.errors import UserError
from jaxpersona.runs.rollouts import place_of_key

EMPTY, UNDECIDED = "empty", "none"


@dataclasses.dataclass
class Sums:
    """The sums of a role's response means, grouped by the judge's score.

    Attributes:
      totals: group → sum of the response means, [L, D] float64. A group is a score as text, or
        "none" for replies without a score: all replies of the default persona, and the replies on
        which the judge was undecided.
      groups: rollout key → group, for each rollout that was added. The group of an empty reply,
        which has no response mean, is "empty".
      layer: the layer of `cells`, or None if sums per question are not kept.
      cells: (group, question id) → sum, [D] float32, of the response means at `layer` over all
        replies to the question that are in the group.
    """

    __repr__ = brief

    totals: dict[str, np.ndarray]
    groups: dict[str, str]
    layer: int | None = None
    cells: dict[tuple[str, int], np.ndarray] = dataclasses.field(default_factory=dict)

    def count(self, group: str) -> int:
        """Return the number of rollouts in a group."""
        return sum(each == group for each in self.groups.values())

    def add(self, key: str, score: int | None, mean: np.ndarray) -> None:
        """Add the response mean [L, D] of a rollout; the mean of an empty reply is all NaN.

        Raises:
          UserError: the mean contains infinite values, or both NaN and other values.
        """
        finite = np.isfinite(mean)
        if np.isnan(mean).all():
            self.groups[key] = EMPTY
            return
        if not finite.all():
            raise UserError(f"the response mean of rollout {key} has non-finite values; regenerate "
                            "the role's rollouts")
        group = UNDECIDED if score is None else str(score)
        if group not in self.totals:
            self.totals[group] = np.zeros(mean.shape, np.float64)
        self.totals[group] += mean
        self.groups[key] = group
        if self.layer is not None:
            cell = group, place_of_key(key)[0]
            before = self.cells.get(cell, np.float32(0))
            self.cells[cell] = (before + mean[self.layer]).astype(np.float32)

    def agrees(self, scores: Mapping[str, int | None]) -> bool:
        """Return whether the group of each added rollout matches its score in `scores`.

        The group "empty" matches every score. A rollout that is missing from `scores` does not
        match.
        """
        return all(key in scores and group in (
            EMPTY, UNDECIDED if scores[key] is None else str(scores[key]))
            for key, group in self.groups.items())

    def vectors(self, labels: Mapping[int, str]) -> dict[str, tuple[np.ndarray, int]]:
        """Return averages of the response means.

        The result is a dict from label to (vector [L, D] float32, number of rollouts). The vector
        with the label "mean" is the average over all non-empty replies. Labels without non-empty
        replies are omitted.

        Args:
          labels: score → label, such as {3: "pos_3"}.
        """
        out = {}
        if self.totals:
            every = np.sum([self.totals[name] for name in sorted(self.totals)], axis=0)
            count = sum(group != EMPTY for group in self.groups.values())
            out["mean"] = ((every / count).astype(np.float32), count)
        for score, label in labels.items():
            if str(score) in self.totals:
                count = self.count(str(score))
                out[label] = ((self.totals[str(score)] / count).astype(np.float32), count)
        return out

    def by_question(self, group: str | None, questions: Sequence[int],
                    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, for each question, the sum of the response means at `layer` and the reply count.

        Args:
          group: the group to sum, or None for all non-empty replies.
          questions: the ids of n different questions.

        Returns:
          (sums [n, D] float32, counts [n] int of the group's non-empty replies), in the order of
          `questions`. Without such a reply, both are 0. If `cells` is empty, the sums have the
          shape [n, 0].
        """
        place = {question: i for i, question in enumerate(questions)}
        counts = np.zeros(len(place), int)
        for key, found in self.groups.items():
            question = place_of_key(key)[0]
            if question in place and found != EMPTY and group in (None, found):
                counts[place[question]] += 1
        width = next((len(value) for value in self.cells.values()), 0)
        sums = np.zeros((len(place), width), np.float32)
        for (found, question), value in sorted(self.cells.items()):
            if question in place and group in (None, found):
                sums[place[question]] += value
        return sums, counts

    def stored(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the tensors and the metadata from which `read` restores the sums."""
        about = {"groups": json.dumps(self.groups)}
        if self.layer is None:
            return dict(self.totals), about
        cells = {f"{group}/{question}": value for (group, question), value in self.cells.items()}
        return self.totals | cells, about | {"layer": str(self.layer)}

    @classmethod
    def read(cls, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> Sums:
        """Restore the sums from the tensors and the metadata that `stored` returned."""
        groups = json.loads(about["groups"])
        if "layer" not in about:
            return cls(dict(tensors), groups)
        totals, cells = {}, {}
        for name, value in tensors.items():
            group, _, question = name.partition("/")
            if question:
                cells[group, int(question)] = value
            else:
                totals[group] = value
        return cls(totals, groups, int(about["layer"]), cells)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The response means of a sample of a role's rollouts.

    A response mean is stored as its bfloat16 difference from a common base. In some channels of the
    residual stream, the differences between rollouts are much smaller than the values themselves.
    Rounding the values to bfloat16 would lose these differences.

    Attributes:
      keys: the keys of the k rollouts, in the order of the rollouts.
      base: [L, D] float32, the average of the finite means in the role's first sample; later
        samples of the role reuse it.
      differences: [k, L, D] bfloat16, each mean minus `base`; NaN for an empty reply.
    """

    __repr__ = brief

    keys: list[str]
    base: np.ndarray
    differences: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """The response means, [k, L, D] float32."""
        return self.base + self.differences.astype(np.float32)

    def __len__(self) -> int:
        return len(self.keys)


def sampled(keys: Iterable[str], before: Sample | None, mean: Callable[[str], np.ndarray | None],
            shape: tuple[int, int]) -> Sample:
    """Return a sample with the response means of the given rollouts.

    Args:
      keys: the keys of the rollouts; those without a known mean are omitted.
      before: an earlier sample, whose base and means are reused, or None.
      mean: a function from a rollout's key to its response mean [L, D], or to None if unknown.
      shape: (L, D), the shape of a response mean.
    """
    place = {key: i for i, key in enumerate(before.keys)} if before is not None else {}
    # call `mean` again below instead of keeping the float32 means of all rollouts in memory
    kept = [key for key in keys if key in place or mean(key) is not None]
    base = np.zeros(shape, np.float32) if before is None else before.base
    if before is None:
        total, count = np.zeros(shape), 0
        for key in kept:
            if np.isfinite(value := _given(mean(key))).all():
                total, count = total + value, count + 1
        base = (total / max(count, 1)).astype(np.float32)
    differences = np.empty((len(kept), *shape), ml_dtypes.bfloat16)
    for i, key in enumerate(kept):
        if before is not None and key in place:
            differences[i] = before.differences[place[key]]
        else:
            differences[i] = _given(mean(key)) - base
    return Sample(kept, base, differences)


def _given(value: Any) -> np.ndarray:
    assert value is not None
    return value
