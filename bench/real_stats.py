"""Split-half statistics of an axis and its role vectors: held-out AUC and reliability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from jaxpersona.data import texts
from jaxpersona.persona import axis as science


def halves_of(records: Sequence[dict[str, Any]], questions: Sequence[texts.Question]) -> np.ndarray:
    """Return a mask of the rollouts in the second half: those of questions with an odd index."""
    second = {question.id for question in questions[1::2]}
    return np.array([record["question_index"] in second for record in records], bool)


def _half_vectors(means: dict[str, np.ndarray], halves: dict[str, np.ndarray],
                  second: bool) -> dict[str, np.ndarray]:
    """Return each role's mean [L, D] over the non-empty answers to one half of the questions."""
    out = {}
    for name, value in means.items():
        kept = value[(halves[name] == second) & np.isfinite(value).all((1, 2))]
        if len(kept):
            out[name] = kept.mean(0, dtype=np.float64)
    return out


def _half_axis(vectors: dict[str, np.ndarray]) -> np.ndarray:
    roles = np.stack([v for name, v in vectors.items() if name != "default"])
    return vectors["default"] - roles.mean(0)


def auc(means: dict[str, np.ndarray], halves: dict[str, np.ndarray]) -> list[float]:
    """Return the held-out AUC between default answers and role answers at every layer, [L].

    AUC is the area under the ROC curve of the projections onto the axis. The axis is computed from
    one half of the questions and the AUC from the answers to the other half. The result is the
    mean over both assignments of the halves.
    """
    found = []
    for second in (False, True):
        axis = _half_axis(_half_vectors(means, halves, second))
        values, labels = [], []
        for name, value in means.items():
            kept = value[(halves[name] != second) & np.isfinite(value).all((1, 2))]
            values.append(science.project(kept, axis.astype(np.float32)))
            labels += [name == "default"] * len(kept)
        pooled = np.concatenate(values)
        found.append([roc_auc_score(labels, pooled[:, layer]) for layer in range(pooled.shape[1])])
    return [round(float(x), 4) for x in np.mean(found, 0)]


def reliability(means: dict[str, np.ndarray], halves: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the split-half reliability of the axis and of the role vectors at every layer.

    `axis_reliability` is the cosine between the axes of the two halves. `role_reliability` is the
    mean over roles of the cosine between a role's two vectors, after the mean over all roles in the
    same half is subtracted from each vector.
    """
    one, two = (_half_vectors(means, halves, second) for second in (False, True))
    a, b = _half_axis(one), _half_axis(two)
    names = sorted((set(one) & set(two)) - {"default"})
    u, v = (np.stack([half[name] for name in names]) for half in (one, two))
    u, v = u - u.mean(0), v - v.mean(0)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v)]
    roles = (unit[0] * unit[1]).sum(-1).mean(0)
    axes = [science.cosine(x, y) for x, y in zip(a, b, strict=True)]
    return {"axis_reliability": [round(x, 4) for x in axes],
            "role_reliability": [round(float(x), 4) for x in roles]}
