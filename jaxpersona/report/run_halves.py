"""Split-half agreement of the axis, computed from the response means that a run stores."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.data.texts import DEFAULT
from jaxpersona.persona.bootstrap import averaged_rows
from jaxpersona.runs.sums import Sample

SPLITS = 20
_ROWS = 16  # number of response means that are converted to float64 at a time


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The cosine similarity of the axes of two halves, over `SPLITS` random splits.

    Attributes:
      mean, low, high: [L], the mean, minimum and maximum of the cosine similarity at each layer;
        NaN if an axis is zero.
      roles: the number of roles in each half.
      replies: the minimum and the maximum number of replies of a role, in both halves together.
      default: the number of replies of the default persona, in both halves together.
    """

    __repr__ = brief

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    roles: int
    replies: tuple[int, int]
    default: int


class Halves:
    """Split the stored response means of each role into halves, and compare the axes.

    The axis of a half is the mean of the default persona's response means minus the mean of the
    role vectors. A role vector is the mean of the response means of the role's replies with score
    3. All means use only the stored response means in that half. The sums are accumulated role by
    role, so that the response means of only one role are in memory at a time.

    Attributes:
      shape, seed: the arguments of `Halves`.
      left_out: the roles (or "default") with fewer than two replies to add, which are therefore in
        neither half.
    """

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        """Create empty halves for response means of shape (L, D); `seed` determines the splits."""
        self.shape, self.seed = shape, seed
        self.left_out: list[str] = []
        self._roles = np.zeros((2, SPLITS, int(np.prod(shape))))
        self._default: np.ndarray | None = None
        self._sizes: list[int] = []
        self._own = 0

    def add(self, name: str, sample: Sample, scores: Mapping[str, int | None] | None) -> None:
        """Add the stored finite response means of a role, if there are at least two.

        Args:
          name: the role, or "default".
          sample: the stored response means.
          scores: key → score; only replies with score 3 are added. If None, all replies are added.
        """
        rows = averaged_rows(sample, scores)
        if len(rows) < 2:
            self.left_out.append(name)
            return
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        weights, half = np.zeros((2, SPLITS, len(rows))), len(rows) // 2
        for split in range(SPLITS):
            order = rng.permutation(len(rows))
            weights[0, split, order[:half]] = 1 / half
            weights[1, split, order[half:]] = 1 / (len(rows) - half)
        means = np.zeros_like(self._roles)
        for start in range(0, len(rows), _ROWS):
            part = sample.differences[rows[start : start + _ROWS]].astype(np.float64)
            means += weights[:, :, start : start + _ROWS] @ part.reshape(len(part), -1)
        means += sample.base.astype(np.float64).reshape(-1)  # each half's weights sum to 1
        if name == DEFAULT:
            self._default, self._own = means, len(rows)
        else:
            self._roles += means
            self._sizes.append(len(rows))

    def agreement(self) -> Agreement | None:
        """Return the agreement; None with fewer than two roles or without the default persona."""
        if self._default is None or len(self._sizes) < 2:
            return None
        one, two = (self._default - self._roles / len(self._sizes)).reshape(
            2, SPLITS, *self.shape)
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(two, axis=-1)
        with np.errstate(invalid="ignore"):  # 0 / 0 is NaN: an axis of length 0 has no direction
            cosines = (one * two).sum(-1) / norms
        return Agreement(cosines.mean(0), cosines.min(0), cosines.max(0), len(self._sizes),
                         (min(self._sizes), max(self._sizes)), self._own)
