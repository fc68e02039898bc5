"""Bootstrap confidence intervals for statistics of a PCA of the role vectors.

The vector of a role is the mean of its N response means; the run stores a sample of m of them. In a
bootstrap sample, the vector of each role is shifted by

    m / √((m − 1)·N) · Σᵢ (tᵢ/m − 1/m)·(xᵢ − x̄),    t ~ multinomial(m; 1/m, …, 1/m),

where x₁ … xₘ are the stored response means and x̄ is their mean. The variance of this shift is
S²/N, where S² is the unbiased sample variance. The intervals are therefore valid for vectors of N
rollouts, although only m response means are stored. This is the rescaled bootstrap of Rao and Wu
1988 (Journal of the American Statistical Association 83, 231–241) for stratified samples, where the
strata are the roles. The mean activation of the default persona is shifted in the same way. Roles,
prompts and questions are fixed: the intervals describe only the randomness of the replies.

The basic bootstrap interval of a statistic has the ends 2θ − θ*, where θ is the value of the run
and θ* is the upper or the lower percentile of the bootstrap values (Davison and Hinkley 1997,
Bootstrap Methods and their Application, section 5.2). Noise in the vectors lowers the explained
variance of the first components, in the bootstrap samples as in the run; unlike the percentiles
θ*, the ends 2θ − θ* correct for this bias. For an explained variance ratio λ/T, where λ is the
variance along the components and T the total variance, θ is the inverse ratio T/λ, because noise
adds a constant to T. In simulations, the intervals of the ratios are wider than needed if a large
part of T is noise, and an interval of a cosine near 0 then covers less than 95 %.

All quantities are computed from the Gram matrix [R + 1, R + 1] of the R role vectors and the
default persona, one layer at a time.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.data.texts import DEFAULT
from jaxpersona.errors import UserError
from jaxpersona.runs.sums import Sample

DRAWS = 200
LEVEL = 95  # confidence level of the intervals in percent
COMPONENTS = 10  # maximum number of components whose explained variance is computed
_BYTES = 256 << 20  # approximate byte limit of response means, and of the vectors of several draws
_MORE = 4  # number of further eigenvectors in the Krylov space, for accuracy
_POWERS = 3  # p in `_eigen`


@dataclasses.dataclass(frozen=True)
class PcaIntervals:
    """Bootstrap confidence intervals (`LEVEL` %) for statistics of a PCA of the role vectors.

    Attributes:
      cos: [2, L], the lower and upper ends for |cos(PC1, axis)| at each of the L layers.
      variance: [2, L, C], the ends for the cumulative explained variance ratio of the first 1, 2,
        …, C components at each layer.
      fixed: the names of the roles (or "default") with fewer than two stored response means. Their
        vectors are the same in all bootstrap samples, so the intervals are too narrow.
    """

    __repr__ = brief

    cos: np.ndarray
    variance: np.ndarray
    fixed: tuple[str, ...] = ()


def averaged_rows(sample: Sample, scores: Mapping[str, int | None] | None) -> list[int]:
    """Return the indices in a role's sample of the replies that the role's vector averages.

    Args:
      sample: the stored response means of a role.
      scores: key → score; only replies with score 3 are averaged. If None, as for the default
        persona, all replies are averaged. Empty replies have no response mean and are omitted.
    """
    return [i for i, key in enumerate(sample.keys)
            if (scores is None or scores.get(key) == 3)
            and np.isfinite(sample.differences[i].astype(np.float32)).all()]


def pca_intervals(default: np.ndarray, roles: Mapping[str, np.ndarray],
                  stored: Mapping[str, int], sizes: Mapping[str, int],
                  means: Callable[[str, slice], np.ndarray], *, draws: int = DRAWS, seed: int = 0,
                  report: Callable[[int, int], None] | None = None) -> PcaIntervals | None:
    """Return bootstrap confidence intervals for |cos(PC1, axis)| and for explained variance ratios.

    Args:
      default: the mean activation [L, D] of the default persona.
      roles: role → vector [L, D], for the R roles of the axis.
      stored: role or "default" → m, the number of stored response means that its vector includes.
      sizes: role or "default" → N, the number of replies that are averaged in its vector.
      means: a function from (role or "default", slice of l layers) to the m stored response means
        at these layers, [m, l, D]. To limit the memory, it is called once per role for each of
        several groups of layers.
      draws: the number of bootstrap samples.
      seed: the seed of the bootstrap. The result depends neither on the order of the roles nor on
        the groups of layers.
      report: a function that is called with (number of finished layers, L).

    Returns:
      The intervals; None if neither the default persona nor any role has two stored response means.

    Raises:
      UserError: there are fewer than two roles, `draws` is not positive, or a role lacks an entry
        in `stored` or `sizes`.

    Examples:
      >>> import numpy as np
      >>> from jaxpersona.persona.bootstrap import pca_intervals
      >>> rng = np.random.default_rng(0)
      >>> names = ["default", "ghost", "baker", "sage"]
      >>> means = {name: rng.normal(5 * i, 1, (16, 2, 8)) for i, name in enumerate(names)}
      >>> vectors = {name: mean.mean(0) for name, mean in means.items()}
      >>> default, counts = vectors.pop("default"), dict.fromkeys(names, 16)
      >>> found = pca_intervals(default, vectors, counts, counts, lambda n, at: means[n][:, at])
      >>> found.cos.shape, found.variance.shape, bool((found.cos[0] > 0.9).all())
      ((2, 2), (2, 2, 2), True)
    """
    names = sorted(roles)
    if len(names) < 2:
        raise UserError(f"roles has {len(names)} entries; PCA needs at least two roles")
    if draws < 1:
        raise UserError(f"draws is {draws}; give a positive integer")
    every = [*names, DEFAULT]
    for what, table in (("stored", stored), ("sizes", sizes)):
        if missing := [name for name in every if name not in table]:
            raise UserError(f"{what} has no entry for {missing[0]!r:.60}; give one number per role "
                            "and one for 'default'")
    weights = {i: _weights(name, stored[name], sizes[name], draws, seed)
               for i, name in enumerate(every) if stored[name] > 1}
    if not weights:
        return None
    layers, width = default.shape
    total = sum(stored[every[i]] for i in weights)
    step = max(1, _BYTES // (total * width * 4))
    count = min(COMPONENTS, len(names) - 1, width)
    cos, variance = np.empty((2, layers)), np.empty((2, layers, count))
    for start in range(0, layers, step):
        group = slice(start, min(start + step, layers))
        known = {i: np.asarray(means(every[i], group), np.float32) for i in weights}
        for layer in range(group.start, group.stop):
            vectors = np.stack([*(roles[name][layer] for name in names), default[layer]])
            moves = {i: (weights[i], one[:, layer - start] - one[:, layer - start].mean(0))
                     for i, one in known.items()}
            cos[:, layer], variance[:, layer] = _intervals(vectors.astype(np.float64), moves,
                                                           draws, count)
            if report is not None:
                report(layer + 1, layers)
    fixed = tuple(name for i, name in enumerate(every) if i not in weights)
    return PcaIntervals(cos, variance, fixed)


def _weights(name: str, stored: int, size: int, draws: int, seed: int) -> np.ndarray:
    """Return the weights [draws, m] of a role's centered response means, float32."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8", "surrogatepass"))])
    times = rng.multinomial(stored, np.full(stored, 1 / stored), size=draws)
    scale = stored / np.sqrt((stored - 1) * max(size, stored))
    return (scale * (times - 1) / stored).astype(np.float32)


def _intervals(vectors: np.ndarray, moves: Mapping[int, tuple[np.ndarray, np.ndarray]],
               draws: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the intervals at one layer: [2] for |cos(PC1, axis)|, [2, C] for the variance ratios.

    Args:
      vectors: [R + 1, D], the role vectors and the default persona's mean activation.
      moves: row index of `vectors` → (weights [draws, m], centered response means [m, D]).
      draws: the number of bootstrap samples.
      count: C, the number of components.
    """
    vectors = vectors - vectors[:-1].mean(0)  # so that float32 keeps small differences
    cos, variance, leading = _measured(vectors[None], count, None)
    found_cos, found_variance = np.empty(draws), np.empty((draws, count))
    step = max(1, _BYTES // max(vectors.size * 4, 32 * len(vectors) ** 2))
    for start in range(0, draws, step):
        block = slice(start, min(start + step, draws))
        moved = np.repeat(vectors[None].astype(np.float32), block.stop - start, 0)
        for i, (weights, centered) in moves.items():
            moved[:, i] += weights[block] @ centered
        found_cos[block], found_variance[block], _ = _measured(moved, count, leading)
    with np.errstate(all="ignore"):
        inverse = _interval(1 / variance[0], 1 / found_variance)[::-1]
        return (np.clip(_interval(cos[0], found_cos), 0.0, 1.0),
                1 / np.maximum(inverse, 1.0))  # T / λ is at least 1


def _measured(vectors: np.ndarray, count: int, start: np.ndarray | None,
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return |cos(PC1, axis)| and the cumulative explained variance ratios of B sets of vectors.

    Args:
      vectors: [B, R + 1, D].
      count: C, the number of components.
      start: [R, Q], approximations of the leading eigenvectors, or None.

    Returns:
      (cosines [B], ratios [B, C], the Q leading eigenvectors [R, Q] of the first set).
    """
    gram = (vectors @ vectors.swapaxes(1, 2)).astype(np.float64)
    total = gram.shape[1] - 1
    middle = gram[:, :, :total].mean(2)  # [B, R + 1], ⟨vector, mean role vector⟩
    along = gram[:, :, total] - middle  # [B, R + 1], ⟨vector, axis⟩
    # the Gram matrix of the centered role vectors, [B, R, R]
    centered = gram[:, :total, :total] - middle[:, :total, None] - middle[:, None, :total]
    centered += middle[:, :total].mean(1)[:, None, None]
    squared = along[:, total] - along[:, :total].mean(1)  # [B], the squared length of the axis
    along = along[:, :total] - along[:, :total].mean(1, keepdims=True)
    with np.errstate(all="ignore"):  # equal vectors have no components: 0 / 0 is NaN
        values, leading = _eigen(centered, start)
        one = leading[:, :, -1]
        cosines = abs(np.einsum("br,br->b", one, along)) / np.sqrt(squared * values[:, -1])
        ratios = values[:, ::-1][:, :count].cumsum(1) / np.trace(
            centered, axis1=1, axis2=2)[:, None]
    return (np.minimum(cosines, 1.0), np.clip(ratios, 0.0, 1.0),
            leading[0, :, -(count + _MORE):])


def _eigen(matrices: np.ndarray, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return K eigenvalues [B, K], ascending, and eigenvectors [B, R, K] of symmetric matrices.

    Without `start`, or if R ≤ (p + 1)·Q with p = `_POWERS`, the result is exact and K = R.
    Otherwise K = (p + 1)·Q, and the result is the Rayleigh–Ritz approximation in the span of X, AX,
    …, A^p X, where A is a matrix and X is `start` (Golub and Van Loan 2013, Matrix Computations,
    section 10.3).

    Args:
      matrices: [B, R, R].
      start: [R, Q], approximations of the Q leading eigenvectors, or None.
    """
    if start is None or (_POWERS + 1) * start.shape[1] >= matrices.shape[1]:
        values, vectors = np.linalg.eigh(matrices)
        return values, vectors
    parts = [np.broadcast_to(start, (len(matrices), *start.shape))]
    for _ in range(_POWERS):
        parts.append(np.linalg.qr(matrices @ parts[-1])[0])
    basis = np.linalg.qr(np.concatenate(parts, axis=2))[0]
    values, inner = np.linalg.eigh(basis.swapaxes(1, 2) @ matrices @ basis)
    return values, basis @ inner


def _interval(value: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the ends [2, …] of the basic bootstrap interval.

    Args:
      value: […], the statistic θ of the run.
      drawn: [draws, …], the statistic of each bootstrap sample.
    """
    low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2], axis=0)
    return np.stack([2 * value - high, 2 * value - low])
