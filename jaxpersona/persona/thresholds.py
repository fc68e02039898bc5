"""Percentiles of projections from a stratified sample, with bootstrap intervals.

For each role, the projections of a sample of k of its n non-empty rollouts are available. Each of
the k projections has the weight n / k, so that the sample represents all rollouts of the role. If
all weights are 1, the percentiles equal those of `np.percentile`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.persona.axis import PERCENTILES

DRAWS = 200
LEVEL = 95  # confidence level of the intervals in percent
Intervals = dict[str, tuple[np.ndarray, np.ndarray]]


def weighted(values: np.ndarray, weights: np.ndarray, at: Sequence[float] = PERCENTILES,
             ) -> np.ndarray:
    """Return percentiles of weighted values.

    A value with weight w counts as w equal values. As in `np.percentile`, the result is linearly
    interpolated between adjacent values.

    Args:
      values: [N, L]; the percentiles are computed over the first axis.
      weights: [N], non-negative weights.
      at: Q percentiles from 0 to 100.

    Returns:
      The percentiles, [Q, L] float64.
    """
    order = np.argsort(values, axis=0, kind="stable")
    return _of_sorted(np.take_along_axis(values, order, 0), weights[order], at)


def _of_sorted(values: np.ndarray, weights: np.ndarray, at: Sequence[float]) -> np.ndarray:
    """Return Q percentiles [Q, L] of values [N, L], sorted along axis 0, with weights [N, L]."""
    upper = np.cumsum(weights, axis=0)
    out = np.empty((len(at), values.shape[1]))
    for layer in range(values.shape[1]):
        total = upper[-1, layer]
        place = np.asarray(at, np.float64) / 100 * max(total - 1, 0)
        low = np.floor(place)
        last = len(values) - 1
        both = np.concatenate([low, np.minimum(low + 1, max(total - 1, 0))])
        found = upper[:, layer].searchsorted(both * (1 + 1e-12), "right")
        first, second = values[np.minimum(found, last), layer].reshape(2, -1).astype(np.float64)
        out[:, layer] = first + (place - low) * (second - first)
    return out


def percentiles_of(projections: Mapping[str, np.ndarray], sizes: Mapping[str, int], *,
                   at: Sequence[int] = PERCENTILES, draws: int = DRAWS, seed: int = 0,
                   ) -> tuple[dict[str, np.ndarray], Intervals]:
    """Return the percentiles of the projections of several roles, with bootstrap intervals.

    The bootstrap is stratified: in each bootstrap sample, the rollouts of each role are drawn with
    replacement.

    Args:
      projections: role → projections [k, L] of the role's sampled rollouts; rows that are not
        finite (empty replies) are ignored.
      sizes: role → number of the role's non-empty rollouts.
      at: the percentiles from 0 to 100.
      draws: the number of bootstrap samples.
      seed: the seed of the bootstrap.

    Returns:
      (percentiles, intervals): dictionaries such as {"p25": [L] float32} and {"p25": (low, high)},
      where low and high, [L] float32, are the ends of the 95 % bootstrap interval.

    Raises:
      UserError: all replies are empty.
    """
    kept = {name: value[np.isfinite(value).all(1)] for name, value in projections.items()}
    kept = {name: value for name, value in kept.items() if len(value)}
    if not kept:
        raise UserError("projections has no finite row: all replies are empty; add a non-empty "
                        "reply")
    counts = np.array([len(value) for value in kept.values()])
    share = np.array([max(sizes[name], len(value)) / len(value) for name, value in kept.items()])
    values = np.concatenate(list(kept.values()))
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, 0)
    weights = np.repeat(share, counts)
    found = _of_sorted(ordered, weights[order], at)
    rng = np.random.default_rng([seed, len(values)])
    drawn = np.empty((draws, *found.shape))
    for i in range(draws):
        times = np.concatenate([rng.multinomial(n, np.full(n, 1 / n)) for n in counts])
        drawn[i] = _of_sorted(ordered, (weights * times)[order], at)
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=0)
    return ({f"p{q}": found[i].astype(np.float32) for i, q in enumerate(at)},
            {f"p{q}": (low[i].astype(np.float32), high[i].astype(np.float32))
             for i, q in enumerate(at)})
