"""The carry of a forward pass: values summed over calls, and rejected combinations."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.interventions import steer
from jaxpersona.interventions.where import everywhere
from jaxpersona.models.batch import batch, split
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry

MODEL = s.tiny_model()
ROWS = batch(s.prompts((9, 4), seed=1))
EDITS = steer(np.ones(32), layers=[1], scale=0.1)
READ = capture.mean(everywhere)


def run(source, **options):
    return s.run(MODEL.params, MODEL.config, source, **options)


def test_counts_and_means_of_pieces_are_those_of_the_whole():
    whole = run(ROWS, interventions=EDITS, capture=READ)
    carry = Carry(cache=init_cache(MODEL.config, 2, 16))
    for piece in split(ROWS, 3):
        out = run(piece, interventions=EDITS, capture=READ, carry=carry)
        carry = out.carry
    assert s.same_bits(out.applied, whole.applied) and out.applied[0].seen.tolist() == [9, 4]
    assert out.finite.tolist() == [True, True]
    assert s.rowwise(out.captured["mean"].value, whole.captured["mean"].value).max() < 1e-5
    again = run(ROWS, interventions=EDITS, carry=carry.replace(cache=None, captured=None))
    # does not need a cache
    assert again.applied[0].seen.tolist() == [18, 8] and again.cache is None


def test_a_row_that_was_not_finite_stays_so():
    carry = Carry(finite=jnp.array([True, False]))
    assert run(ROWS, carry=carry).finite.tolist() == [True, False]


@pytest.mark.parametrize(("options", "message"), [
    ({"slots": 16, "carry": Carry(cache=init_cache(MODEL.config, 2, 16))}, "either a carry with"),
    ({"carry": Carry(cache=init_cache(MODEL.config, 3, 16))},
     "rows is 3 in the carry's cache and 2 in the batch"),
    ({"carry": init_cache(MODEL.config, 2, 16)}, r"carry is of type Cache; .*jp.Carry\(cache"),
    ({"carry": Carry(applied=())}, r"layers \[\], but the tables of this call have \[1\]"),
    ({"carry": Carry(captured={})}, "captured has the readings"),
    ({"carry": Carry(gates={"7": 1})}, "gates has states for the tables"),
])
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(jp.UserError, match=message):
        jp.forward(MODEL.params, MODEL.config, ROWS, interventions=EDITS, capture=READ, **options)
