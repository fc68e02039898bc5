"""`jp.sweep` compared with one `steer` at a time."""

from __future__ import annotations

import numpy as np
import pytest
import support as s

import jaxpersona as jp

MODEL = s.tiny_model()
V = np.random.default_rng(0).normal(size=MODEL.config.d_model)
SCALES = [-2.0, 0.0, 0.5, 3]


@pytest.mark.parametrize("layers,where", [(1, "everywhere"), ([0, 2], "last")],
                         ids=["one layer", "two layers, last"])
def test_row_b_is_steered_with_the_strength_b(layers, where):
    batch = jp.batch([[5, 6, 7]] * len(SCALES))
    rows, logits = s.residuals(MODEL, batch, jp.sweep(V, SCALES, layers=layers, where=where))
    for b, scale in enumerate(SCALES):
        edit = jp.steer(V, layers=layers, scale=scale, where=where)
        alone, alone_logits = s.residuals(MODEL, jp.batch([[5, 6, 7]]), edit)
        assert s.relative(rows[b : b + 1], alone).max() < 1e-5
        np.testing.assert_allclose(logits[b], alone_logits[0], rtol=1e-3, atol=1e-4)
    assert not s.same_bits(rows[0], rows[3])


def test_new_strengths_do_not_recompile():
    batch = jp.batch([[5, 6, 7]] * 3)
    s.run(MODEL.params, MODEL.config, batch, interventions=jp.sweep(V, [1, 2, 3], layers=1))
    before = s.run._cache_size()
    s.run(MODEL.params, MODEL.config, batch, interventions=jp.sweep(-V, [4, 5, 6], layers=1))
    assert s.run._cache_size() == before


@pytest.mark.parametrize("scales", [2.0, [], [[1.0]], ["a"], None],
                         ids=["number", "empty", "nested", "text", "none"])
def test_strengths_are_a_list_of_numbers(scales):
    with pytest.raises(jp.UserError, match="scales is "):
        jp.sweep(V, scales, layers=1)
    with pytest.raises(jp.UserError, match="finite"):
        jp.sweep(V, [1.0, np.inf], layers=1)


def test_steer_names_sweep_for_several_strengths():
    with pytest.raises(jp.UserError, match=r"scale has shape \(3,\).*jp\.sweep"):
        jp.steer(V, layers=1, scale=[-1, 0, 1])


def test_strengths_that_are_all_zero_have_a_row_each():
    assert jp.sweep(V, [0, 0.0, 0], layers=1).rows == 3


def test_a_sweep_is_at_its_site():
    (edit,) = jp.sweep(V, [1.0, 2.0], layers=1, site="mlp").edits
    assert edit.site == "mlp"
