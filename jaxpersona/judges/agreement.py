"""Agreement of two judges: a confusion table and Cohen's kappa with linear weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.errors import UserError

_SAMPLES = 2000  # of the bootstrap
_SHOWN = 12  # largest scale whose table is by score; larger ones are in tens


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two judges agree on the replies that both read.

    Attributes:
      labels: the scores, or their tens on a long scale; "none" for an undecided reply.
      table: [K, K] numbers of replies, by the label of judge A (row) and B (column).
      both: the number of replies that both scored; the following are about these.
      equal: the share with equal scores.
      kappa: Cohen's kappa with linear weights: 1 − Σ|a − b| / Σ|a − b| of all pairs of the two
        judges' scores; NaN if that is undefined, as where both give one score only.
      interval: 95 % bootstrap interval of kappa over replies.
      difference: the mean of A's score minus B's.
      roles: role → (replies that both scored, share of equal scores, kappa, difference).
      only: the numbers of replies that only A, and only B, has read.
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
      a, b: scores by "role/key" of the reply; None is an undecided reply.
      seed: of the bootstrap.

    Raises:
      UserError: no reply was read by both.

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
        raise UserError("the two judges have no reply in common; compare judges of one run")
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
    """Return Cohen's kappa with linear weights of two arrays [n] of scores; NaN if undefined."""
    levels, counts = _counts(a, b)
    return float(_kappa(levels, counts))


def _counts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the K different scores of two arrays, and the numbers of their pairs [K, K]."""
    levels, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    counts = np.zeros((len(levels), len(levels)), int)
    np.add.at(counts, (place[: len(a)], place[len(a) :]), 1)
    return levels, counts


def _kappa(levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return kappa [*B] of numbers of pairs [*B, K, K]; NaN where it is undefined."""
    far = np.abs(levels[:, None] - levels)
    total = np.maximum(counts.sum((-2, -1)), 1)
    seen = (counts * far).sum((-2, -1)) / total
    chance = np.einsum("...i,ij,...j->...", counts.sum(-1), far, counts.sum(-2)) / total**2
    return np.where(chance > 0, 1.0 - seen / np.where(chance > 0, chance, 1.0), np.nan)


def _interval(a: np.ndarray, b: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 2.5th and 97.5th percentile of kappa over resampled replies."""
    if len(a) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    levels, counts = _counts(a, b)
    chances = counts.ravel() / counts.sum()
    # resampling replies is a multinomial draw of the table
    known = [value for _ in range(_SAMPLES) if not np.isnan(value := float(
        _kappa(levels, rng.multinomial(len(a), chances).reshape(counts.shape))))]
    if len(known) < _SAMPLES // 2:
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
