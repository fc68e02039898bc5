"""What a run keeps of a role's response means: sums by judge score, and a sample of the means."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxpersona.brief import brief
from jaxpersona.errors import UserError

EMPTY, UNDECIDED = "empty", "none"


@dataclasses.dataclass
class Sums:
    """The sums of a role's response means by judge score.

    Attributes:
      totals: group → sum [L, D] float64, added in the order of the rollouts; a group is a score, or
        "none" for a reply without a score.
      groups: key of each summed rollout → its group; "empty" for an empty reply, which has no mean.
    """

    __repr__ = brief

    totals: dict[str, np.ndarray]
    groups: dict[str, str]

    def count(self, group: str) -> int:
        """Return the number of rollouts in a group."""
        return sum(each == group for each in self.groups.values())

    def add(self, key: str, score: int | None, mean: np.ndarray) -> None:
        """Add the mean [L, D] of a rollout; all NaN for an empty reply.

        Raises:
          UserError: the mean is infinite or partly NaN.
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

    def agrees(self, scores: Mapping[str, int | None]) -> bool:
        """Return whether all summed rollouts have the group of their score."""
        return all(key in scores and group in (
            EMPTY, UNDECIDED if scores[key] is None else str(scores[key]))
            for key, group in self.groups.items())

    def vectors(self, labels: Mapping[int, str]) -> dict[str, tuple[np.ndarray, int]]:
        """Return the means of groups: label → (vector [L, D] float32, count).

        "mean" is that of every non-empty reply. Empty groups are omitted.

        Args:
          labels: score → label, such as {3: "pos_3"}.
        """
        out = {}
        if self.totals:
            every = sum(self.totals[name] for name in sorted(self.totals))
            count = sum(group != EMPTY for group in self.groups.values())
            out["mean"] = ((every / count).astype(np.float32), count)
        for score, label in labels.items():
            if str(score) in self.totals:
                count = self.count(str(score))
                out[label] = ((self.totals[str(score)] / count).astype(np.float32), count)
        return out

    def stored(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the tensors and the metadata of the file."""
        return dict(self.totals), {"groups": json.dumps(self.groups)}

    @classmethod
    def read(cls, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> Sums:
        """Return the sums in a file."""
        return cls(dict(tensors), json.loads(about["groups"]))


@dataclasses.dataclass(frozen=True)
class Sample:
    """The response means of a sample of a role's rollouts.

    They are stored as bfloat16 differences from their mean, because a few channels of a residual
    stream are much larger than their differences.

    Attributes:
      keys: the k rollouts, in their order.
      base: [L, D] float32, the mean that the differences are from.
      differences: [k, L, D] bfloat16; NaN for an empty reply.
    """

    __repr__ = brief

    keys: list[str]
    base: np.ndarray
    differences: np.ndarray

    @property
    def means(self) -> np.ndarray:
        """The means [k, L, D] float32."""
        return self.base + self.differences.astype(np.float32)

    def __len__(self) -> int:
        return len(self.keys)


def sampled(keys: Iterable[str], before: Sample | None, mean: Callable[[str], np.ndarray | None],
            shape: tuple[int, int]) -> Sample:
    """Return a sample of rollouts.

    Args:
      keys: the rollouts to keep, in their order; those without a mean are left out.
      before: a sample from which means are taken first, and whose base stays.
      mean: returns the mean [L, D] of a rollout, or None if it is no longer known.
      shape: (L, D).
    """
    place = {key: i for i, key in enumerate(before.keys)} if before is not None else {}
    # two passes: all means in float32 may be large
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
