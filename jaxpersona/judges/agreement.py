"""Agreement between two judges: a confusion matrix and Cohen's kappa with linear weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.errors import UserError

_SAMPLES = 2000  # number of bootstrap samples
# up to this highest score, the matrix has a row and a column for each score that occurs; if a score
# is higher, each row and column covers a range of ten scores
_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The agreement between judges A and B on the replies that both judged.

    `equal`, `kappa`, `interval`, `difference` and `roles` use only the replies that both judges
    scored, and ignore undecided replies.

    Attributes:
      labels: the K labels of the confusion matrix: the scores that occur, or, if a score is greater
        than 12, the ranges of ten scores that occur; the last label is "none", for undecided
        replies.
      table: [K, K], the confusion matrix; entry (i, j) is the number of replies with label i by A
        and label j by B.
      both: the number of replies with a score from both judges.
      equal: the fraction of these replies with equal scores; NaN if `both` is 0.
      kappa: Cohen's kappa with linear weights, 1 − d / e, where d is the mean over replies of
        |a − b| for the scores a by A and b by B, and e is the mean of |a − b| if the scores of A
        and B are paired at random. NaN if e is 0.
      interval: (low, high), the 95 % confidence interval of kappa from a bootstrap over the
        replies; NaN for fewer than two replies, or if kappa is undefined in most bootstrap samples.
      difference: the mean over replies of the score of A minus the score of B; NaN if `both` is 0.
      roles: role → (`both`, `equal`, `kappa`, `difference`) for the replies of this role; roles
        without a reply that both judges scored are omitted.
      only: (number of replies that only A judged, number of replies that only B judged).
    """

    __repr__ = brief

    labels: tuple[str, ...]
    table: np.ndarray
    both: int
    equal: float
    kappa: float
    interval: tuple[float, float]
    difference: float
    roles: dict[str, tuple[int, float, float, float]]
    only: tuple[int, int]


def agreement(a: Mapping[str, int | None], b: Mapping[str, int | None], *,
              seed: int = 0) -> Agreement:
    """Compare two judges' scores.

    Args:
      a, b: the scores of judges A and B, as "role/key" → score; None if the judge could not
        decide.
      seed: the seed of the bootstrap.

    Raises:
      UserError: no reply was judged by both judges.

    Examples:
      >>> from jaxpersona.judges.agreement import agreement
      >>> found = agreement({"ghost/0": 3, "ghost/1": 0, "seer/0": 2},
      ...                   {"ghost/0": 3, "ghost/1": 1, "seer/0": 2})
      >>> replies, equal, *_ = found.roles["ghost"]
      >>> print(f"kappa {found.kappa:.3f}; ghost: {replies} replies, {equal:.0%} equal")
      kappa 0.727; ghost: 2 replies, 50% equal
    """
    shared = sorted(set(a) & set(b))
    if not shared:
        raise UserError("the two judges have no reply in common; compare judges of the same run")
    values = [v for scores in (a, b) for key in shared if (v := scores[key]) is not None]
    width = 1 if max(values, default=0) <= _SHOWN else 10
    bins = sorted({value // width for value in values})
    names = [str(i) if width == 1 else f"{i * width}–{i * width + width - 1}" for i in bins]
    place: dict[int | None, int] = {value: i for i, value in enumerate(bins)}
    place[None] = len(bins)
    table = np.zeros((len(bins) + 1, len(bins) + 1), int)
    for key in shared:
        table[tuple(place[None if (v := s[key]) is None else v // width] for s in (a, b))] += 1
    scored = [key for key in shared if a[key] is not None and b[key] is not None]
    x, y = (np.array([s[key] for key in scored], float) for s in (a, b))
    by_role: dict[str, list[int]] = {}
    for i, key in enumerate(scored):
        by_role.setdefault(key.partition("/")[0], []).append(i)
    return Agreement(
        (*names, "none"), table, len(scored), _mean(x == y), kappa(x, y), _interval(x, y, seed),
        _mean(x - y), {role: (len(at), _mean(x[at] == y[at]), kappa(x[at], y[at]),
                              _mean(x[at] - y[at])) for role, at in by_role.items()},
        (len(set(a) - set(b)), len(set(b) - set(a))))


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Return Cohen's kappa with linear weights for two arrays [n] of scores; NaN if undefined."""
    levels, counts = _counts(a, b)
    return float(_kappa(levels, counts))


def _counts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the K distinct scores in two arrays [n], and the counts of score pairs, [K, K]."""
    levels, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    counts = np.zeros((len(levels), len(levels)), int)
    np.add.at(counts, (place[: len(a)], place[len(a) :]), 1)
    return levels, counts


def _kappa(levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return kappa [*B] for K scores and counts of score pairs [*B, K, K]; NaN where undefined."""
    far = np.abs(levels[:, None] - levels)
    total = np.maximum(counts.sum((-2, -1)), 1)
    seen = (counts * far).sum((-2, -1)) / total
    chance = np.einsum("...i,ij,...j->...", counts.sum(-1), far, counts.sum(-2)) / total**2
    return np.where(chance > 0, 1.0 - seen / np.where(chance > 0, chance, 1.0), np.nan)


def _interval(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentiles of kappa over bootstrap samples.

    Both percentiles are NaN if there are fewer than two replies, or if kappa is undefined in more
    than half of the samples.
    """
    if len(a) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    levels, counts = _counts(a, b)
    chances = counts.ravel() / counts.sum()
    # resampling the replies is equivalent to a multinomial draw of the confusion matrix
    known = [value for _ in range(_SAMPLES) if not np.isnan(value := float(
        _kappa(levels, rng.multinomial(len(a), chances).reshape(counts.shape))))]
    if len(known) < _SAMPLES // 2:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
