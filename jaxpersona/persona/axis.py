"""The Assistant Axis on arrays: role vectors, the axis, its principal components, thresholds.

Everything here is NumPy on response means `[n, L, D]`; where they come from is `rollouts`.
Source of every formula: Lu et al. 2026 (arXiv 2601.10387).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpersona.interventions.bank import normalised

LABELS = {3: "pos_3", 2: "pos_2"}  # fully and somewhat role-playing
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def role_vectors(
    means: np.ndarray, scores: Sequence[int | None]
) -> dict[str, tuple[np.ndarray, int]]:
    """Average one role's response means by what the judge gave them.

    Args:
      means: [n, L, D], one for each rollout; NaN where a reply was empty.
      scores: n judged scores, 0–3 or None.

    Returns:
      "pos_3" and "pos_2" (those that occur) and "mean" (all) → (vector [L, D] float32, count).

    Raises:
      ValueError: another number of scores, or means that are infinite or NaN in part.
    """
    if len(scores) != len(means):
        raise ValueError(f"{len(scores)} scores for {len(means)} rollouts")
    known = np.isfinite(means)
    there, empty = known.all(axis=(1, 2)), np.isnan(means).all(axis=(1, 2))
    if not (there | empty).all():
        i = int(np.argmin(there | empty))
        raise ValueError(f"the mean of rollout {i} holds a value that is not finite; generate the "
                         "role's rollouts anew")
    groups = {"mean": there}
    for score, label in LABELS.items():
        groups[label] = there & np.array([s == score for s in scores], bool)
    return {
        label: (means[chosen].mean(0, dtype=np.float64).astype(np.float32), int(chosen.sum()))
        for label, chosen in groups.items()
        if chosen.any()
    }


def assistant_axis(default: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Return axis[l] = default[l] − mean over roles of roles[:, l]; it points to the Assistant.

    Args:
      default: the default persona's mean [L, D].
      roles: the fully role-playing vectors [R, L, D].

    Raises:
      ValueError: no role.
    """
    if len(roles) == 0:
        raise ValueError("no role has enough rollouts that fully play it; the axis needs one")
    return (default.astype(np.float64) - roles.mean(0, dtype=np.float64)).astype(np.float32)


def project(means: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return ⟨h, v̂⟩ for means [n, L, D] on directions [L, D] (normalised here): [n, L] float32."""
    unit, _ = normalised(directions)
    return np.einsum("nld,ld->nl", means, unit, dtype=np.float64).astype(np.float32)


def percentiles(
    projections: np.ndarray, at: Sequence[int] = PERCENTILES
) -> dict[str, np.ndarray]:
    """Return percentiles of projections [n, L] along +axis: "p25" → [L]; NaN rows skipped."""
    kept = projections[np.isfinite(projections).all(1)]
    if not len(kept):
        raise ValueError("no projection is finite; every reply was empty")
    return {f"p{q}": np.percentile(kept, q, axis=0).astype(np.float32) for q in at}


@dataclasses.dataclass(frozen=True)
class Components:
    """Principal components of role vectors at one layer, mean-centred and not scaled.

    Attributes:
      directions: [C, D], unit length; the first is turned toward the axis.
      ratio: [C], each one's share of the variance.
      coordinates: [R, C], the roles' centred coordinates.
    """

    directions: np.ndarray
    ratio: np.ndarray
    coordinates: np.ndarray


def principal_components(vectors: np.ndarray, axis: np.ndarray) -> Components:
    """Find the principal components of role vectors [R, D] at one layer; axis [D] fixes a sign.

    Raises:
      ValueError: fewer than two vectors.
    """
    from sklearn.decomposition import PCA

    if len(vectors) < 2:
        raise ValueError(f"{len(vectors)} role vectors; principal components need at least two")
    found = PCA(svd_solver="full").fit(vectors.astype(np.float64))
    directions = np.array(found.components_)
    directions *= np.where(directions @ axis < 0, -1.0, 1.0)[:, None]
    coordinates = (vectors - found.mean_) @ directions.T
    return Components(directions, found.explained_variance_ratio_, coordinates)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors [D]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a set of role vectors says, layer by layer.

    Attributes:
      axis: [L, D].
      names, vectors: the R roles it was built from and their vectors [R, L, D].
      components: for each layer.
      cos_pc1: [L], |cos(PC1, axis)|.
    """

    axis: np.ndarray
    names: list[str]
    vectors: np.ndarray
    components: list[Components]
    cos_pc1: np.ndarray


def analyse(default: np.ndarray, roles: Mapping[str, np.ndarray]) -> Analysis:
    """Build the axis from the default's mean [L, D] and the roles' vectors, and decompose them."""
    names = sorted(roles)
    vectors = np.stack([roles[name] for name in names]) if names else np.zeros((0, *default.shape))
    axis = assistant_axis(default, vectors)
    components = [principal_components(vectors[:, i], axis[i]) for i in range(len(axis))]
    cos = [abs(cosine(c.directions[0], axis[i])) for i, c in enumerate(components)]
    return Analysis(axis, names, vectors.astype(np.float32), components, np.array(cos))
