"""Interventions, captures and token selections have a one-line repr."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxpersona as jp

V, U = np.eye(8)[:2]


def bend(params, h):
    return h


@pytest.mark.parametrize(("made", "text"), [
    (jp.Interventions(), "Interventions()"),
    (jp.steer(V, layers=16), "steer(everywhere, layer 16, residual)"),
    (jp.cap(V, layers=slice(4, 8), floor=1.0, where=jp.assistant),
     "cap(assistant, layers 4–7, residual)"),
    (jp.cap(V, layers=[1, 3], ceiling=1.0, site="mlp"), "cap(everywhere, layers 1, 3, mlp)"),
    (jp.ablate(V, layers=1), "ablate(everywhere, layer 1, residual)"),
    (jp.scale(V, 2.0, layers=1), "scale(everywhere, layer 1, residual)"),
    (jp.set_projection(V, 2.0, layers=1), "set_projection(everywhere, layer 1, residual)"),
    (jp.rotate(V, U, layers=1, by=1.0), "rotate(everywhere, layer 1, residual)"),
    (jp.restore_norm(layers=1), "restore_norm(everywhere, layer 1, residual)"),
    (jp.custom(bend, layers=1, where="user"), "custom(user, layer 1, residual)"),
    (jp.cap(np.eye(8)[:3], layers=1, floor=0.0, rows=[2, -1, 0, 1]),
     "cap(everywhere, layer 1, residual, 4 rows)"),
    (jp.stack_rows([jp.cap(V, layers=1, floor=0.0, where="user"), jp.cap(V, layers=2, floor=0.0),
                    None]), "cap(2 selections, layers 1–2, residual, 3 rows)"),
    (jp.stack_rows([jp.steer(V, layers=1), jp.ablate(V, layers=1)]),
     "rank_one(everywhere, layer 1, residual, 2 rows)"),
    (jp.reserve(2, 8, [0, 1]), "reserve(nowhere, layers 0–1, residual, 2 rows)"),
    (jp.chain(jp.steer(V, layers=1), jp.ablate(V, layers=2)),
     "chain(steer(everywhere, layer 1, residual), ablate(everywhere, layer 2, residual))"),
    (jp.gate(jp.steer(V, layers=4), U, layer=2, above=0.0),
     "gate(steer(everywhere, layer 4, residual), layer 2, prompt)"),
    (jp.gate(jp.steer(V, layers=4), U, layer=2, site="mlp", above=0.0, over="token"),
     "gate(steer(everywhere, layer 4, residual), layer 2, mlp, token)"),
    (jp.capture.Capture(), "Capture()"),
    (jp.capture.mean(), "mean(response)"),
    (jp.capture.mean("user", layers=slice(4, 8), turns=2) | jp.capture.last(site="attention"),
     "mean(user, layers 4–7, turns=2) | last(everywhere, attention)"),
    (jp.capture.projections(np.eye(8)[:2]), "projections(everywhere, 2 directions)"),
    (jp.capture.moments(np.eye(8)[:1]), "moments(response, 1 direction)"),
    (jp.capture.histogram(np.eye(8), [0.0, 1.0]), "histogram(response, 8 directions, 3 bins)"),
    (jp.capture.norms() | jp.capture.full(layers=3),
     "norms(everywhere) | full(everywhere, layer 3)"),
    (jp.where.everywhere.without("first", "code"), "everywhere.without('first', 'code')"),
    (jp.response.within(2), "response.within(2)"),
    (jp.prompt.without("first").within(2, 5), "prompt.without('first').within(2, 5)"),
    (jp.response & jp.generated, "Where(need=97, any=0, none=132)"),
])
def test_representation(made, text):
    assert repr(made) == text


def test_every_named_selection_is_its_name():
    assert [repr(test) for test in jp.where.NAMED.values()] == list(jp.where.NAMED)
    for name, test in jp.where.NAMED.items():
        assert getattr(jp, name) is getattr(jp.where, name) is test
    assert jp.where.turns("user") is jp.user and jp.where.Where is jp.Where


def test_a_traced_object_has_a_representation():
    seen = []

    @jax.jit
    def trace(edits, read):
        seen.extend((repr(edits), repr(read)))
        return jax.tree.leaves(edits)[0]

    trace(jp.cap(V, layers=slice(4, 8), floor=1.0), jp.capture.mean())
    assert seen == ["rank_one(traced, layers 4–7, residual)", "mean(traced)"]
