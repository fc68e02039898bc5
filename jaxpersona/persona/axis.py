"""The Assistant Axis: role vectors, the axis, principal components and percentiles of projections.

All arrays are NumPy arrays. L is the number of layers and D the width of the model. The response
mean [L, D] of a rollout is the mean of the residual stream over its response tokens. The formulas
follow Lu et al. 2026 (arXiv 2601.10387).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.interventions.bank import normalised

LABELS = {3: "pos_3", 2: "pos_2"}  # judge score → label of the role vector
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def role_vectors(
    means: np.ndarray, scores: Sequence[int | None]
) -> dict[str, tuple[np.ndarray, int]]:
    """Average a role's response means over all replies, and separately for scores 3 and 2.

    Args:
      means: [n, L, D], one response mean per rollout; all NaN for an empty reply.
      scores: n judge scores, 0–3 or None.

    Returns:
      A dict from label to (vector [L, D] float32, number of rollouts). The labels are "pos_3"
      (score 3), "pos_2" (score 2) and "mean" (all non-empty replies). Labels without rollouts are
      omitted.

    Raises:
      UserError: len(scores) differs from n, or a response mean has infinite values or is partly
        NaN.
    """
    if len(scores) != len(means):
        raise UserError(f"scores has {len(scores)} entries for {len(means)} rollouts; give one "
                        "score per rollout")
    known = np.isfinite(means)
    finite, empty = known.all(axis=(1, 2)), np.isnan(means).all(axis=(1, 2))
    if not (finite | empty).all():
        i = int(np.argmin(finite | empty))
        raise UserError(f"the response mean of rollout {i} has non-finite values; regenerate the "
                        "role's rollouts")
    groups = {"mean": finite}
    for score, label in LABELS.items():
        groups[label] = finite & np.array([s == score for s in scores], bool)
    return {
        label: (means[chosen].mean(0, dtype=np.float64).astype(np.float32), int(chosen.sum()))
        for label, chosen in groups.items()
        if chosen.any()
    }


def assistant_axis(default: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Return the axis [L, D]: the default persona's mean activation minus the mean role vector.

    The axis points toward the Assistant.

    Args:
      default: the default persona's mean activation [L, D].
      roles: the vectors [R, L, D] of R roles, each averaged over replies that fully play the role.

    Raises:
      UserError: `roles` is empty.
    """
    if len(roles) == 0:
        raise UserError("roles is empty: no role has enough rollouts with score 3; the axis needs "
                        "at least one role")
    return (default.astype(np.float64) - roles.mean(0, dtype=np.float64)).astype(np.float32)


def project(means: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Project means h [n, L, D] onto directions v [L, D]: ⟨h, v/‖v‖⟩ per layer, [n, L] float32."""
    unit, _ = normalised(directions)
    return np.einsum("nld,ld->nl", means, unit, dtype=np.float64).astype(np.float32)


def percentiles(
    projections: np.ndarray, at: Sequence[int] = PERCENTILES
) -> dict[str, np.ndarray]:
    """Return percentiles of the projections of n replies at each layer.

    Empty replies, whose projections are NaN, are ignored.

    Args:
      projections: [n, L].
      at: the percentiles, from 0 to 100.

    Returns:
      A dictionary such as {"p25": [L] float32}, with one entry per percentile.

    Raises:
      UserError: all replies are empty.
    """
    kept = projections[np.isfinite(projections).all(1)]
    if not len(kept):
        raise UserError("projections has no finite row: all replies are empty; add a non-empty "
                        "reply")
    return {f"p{q}": np.percentile(kept, q, axis=0).astype(np.float32) for q in at}


@dataclasses.dataclass(frozen=True)
class Components:
    """C = min(R, D) principal components of R centered, unscaled role vectors at one layer.

    Attributes:
      directions: [C, D], unit vectors, signed so that their cosine with the axis is not negative.
      ratio: [C], the explained variance ratio of each component.
      coordinates: [R, C], the projections of the R centered role vectors onto the components.
    """

    __repr__ = brief

    directions: np.ndarray
    ratio: np.ndarray
    coordinates: np.ndarray


def principal_components(vectors: np.ndarray, axis: np.ndarray) -> Components:
    """Compute the principal components of role vectors [R, D] at one layer.

    Each component is signed so that its cosine with the axis [D] is not negative.

    Raises:
      UserError: there are fewer than two vectors, or scikit-learn is not installed.
    """
    pca_of = require("sklearn.decomposition", "principal components need scikit-learn").PCA
    if len(vectors) < 2:
        raise UserError(f"the number of role vectors is {len(vectors)}; give at least two, which "
                        "PCA needs")
    pca = pca_of(svd_solver="full").fit(vectors.astype(np.float64))
    directions = np.array(pca.components_)
    directions *= np.where(directions @ axis < 0, -1.0, 1.0)[:, None]
    coordinates = (vectors - pca.mean_) @ directions.T
    return Components(directions, pca.explained_variance_ratio_, coordinates)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine similarity of two vectors [D]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The axis of a set of roles, and the PCA of their role vectors at each layer.

    Attributes:
      axis: [L, D], the axis.
      names: the names of the R roles that define the axis, sorted.
      vectors: [R, L, D], the vectors of these roles.
      components: the principal components at each of the L layers.
      cos_pc1: [L], |cos(PC1, axis)| at each layer.
    """

    __repr__ = brief

    axis: np.ndarray
    names: list[str]
    vectors: np.ndarray
    components: list[Components]
    cos_pc1: np.ndarray


def analyse(default: np.ndarray, roles: Mapping[str, np.ndarray]) -> Analysis:
    """Compute the axis and the PCA of the role vectors at each layer.

    Args:
      default: the default persona's mean activation [L, D].
      roles: role → vector [L, D].

    Raises:
      UserError: there are fewer than two roles, or scikit-learn is not installed.
    """
    names = sorted(roles)
    vectors = np.stack([roles[name] for name in names]) if names else np.zeros((0, *default.shape))
    axis = assistant_axis(default, vectors)
    components = [principal_components(vectors[:, i], axis[i]) for i in range(len(axis))]
    cos = [abs(cosine(c.directions[0], axis[i])) for i, c in enumerate(components)]
    return Analysis(axis, names, vectors.astype(np.float32), components, np.array(cos))
