"""Directions and bounds at the limits of float32; the length of a direction has no effect."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.interventions import (
    ablate,
    cap,
    gate,
    mean_ablate,
    rotate,
    scale,
    set_projection,
    steer,
)
from jaxpersona.interventions.bank import normalised
from jaxpersona.models.batch import batch
from jaxpersona.persona.axis import project
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Vector

MODEL = s.tiny_model()
BATCH = batch(s.prompts((5, 7, 3)))
V, W = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
V[:, 0] = 1.5  # no component becomes subnormal when the vector is scaled
HUGE, TINY = np.float32(2.0**120), np.float32(2.0**-100)  # their squares overflow and underflow


def named(value):
    return Vector(np.asarray(value, np.float32))


MAKE = {
    "cap": lambda v: cap(v, layers=[1, 2], floor=2.0),
    "ceiling": lambda v: cap(v, layers=[1], ceiling=-1.0),
    "push": lambda v: cap(named(W), layers=[1], floor=2.0, push=v),
    "ablate": lambda v: ablate(v, layers=[1, 2]),
    "mean_ablate": lambda v: mean_ablate(v, named(W), layers=[1]),
    "scale": lambda v: scale(v, 0.5, layers=[1]),
    "set": lambda v: set_projection(v, 1.0, layers=[1]),
    "rotate": lambda v: rotate(v, named(W), layers=[1], by=0.5),
    "gate": lambda v: gate(cap(named(W), layers=[2], floor=9.0), v, layer=1, above=0.0),
}


@pytest.mark.parametrize("size", (HUGE, TINY), ids=("huge", "tiny"))
@pytest.mark.parametrize("kind", MAKE)
def test_the_length_of_a_direction_changes_no_bit(kind, size):
    one, two = (MAKE[kind](named(x)) for x in (V, V * size))
    assert s.differing(one, two) == []
    hidden, _ = s.residuals(MODEL, BATCH, one)
    assert not s.same_bits(hidden, s.residuals(MODEL, BATCH)[0])  # the edit has an effect


def test_a_bare_array_beyond_float32_has_a_direction():
    wide = V[1].astype(float)
    one, two = (cap(x, layers=[1], floor=2.0) for x in (wide, wide * 2.0**700))
    assert s.differing(one, two) == []


@pytest.mark.parametrize("size", (1.0, HUGE, TINY))
def test_units_and_readings_of_named_directions(size):
    vector = Vector(V * size)
    unit = vector.unit.astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    assert s.same_bits(vector.unit, Vector(V).unit)
    for read in (capture.projections, capture.moments):
        one, two = (next(iter(read(x).readings.values())) for x in (vector, Vector(V)))
        assert s.differing(one, two) == []
    means = np.random.default_rng(1).normal(size=(4, 3, 32)).astype(np.float32)
    assert s.same_bits(project(means, V * size), project(means, V))
    caps = [Caps(x, (0, 1, 2), np.ones(3), ("a", "b", "c")) for x in (V, V * size)]
    assert s.differing(*(c.interventions() for c in caps)) == []


@pytest.mark.parametrize("power", (-149, -126, -100, 0, 60, 127))
def test_normalised_is_exact_and_the_same_when_traced(power):
    value = np.ldexp(np.array([[1.0, -0.5, 0.25, 0.0]], np.float32), power)  # subnormal at -149
    unit, norm = normalised(value)
    wanted = value.astype(np.float64) / np.linalg.norm(value.astype(np.float64))
    np.testing.assert_allclose(unit, wanted, rtol=1e-6)
    np.testing.assert_allclose(norm, np.linalg.norm(value.astype(np.float64)), rtol=1e-6)
    if abs(power) <= 100:  # XLA flushes subnormal numbers and gradients to zero
        traced = jax.jit(normalised)(value)
        np.testing.assert_allclose(traced[0], wanted, rtol=1e-6)
        np.testing.assert_allclose(traced[1], norm, rtol=1e-6)
        slope = jax.jacobian(lambda x: normalised(x)[0])(jnp.asarray(value[0]))
        v = wanted[0]
        expected = (np.eye(4) - np.outer(v, v)) / float(norm[0])
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_length_beyond_float32_steers_where_the_product_fits():
    huge = np.full((3, 32), 3e38, np.float32)
    small = steer(Vector(huge), layers=[1], scale=1e-38).edits[0].coefficients
    np.testing.assert_allclose(small[0, 0, 1], 3 * 32**0.5, rtol=1e-6)
    with pytest.raises(ValueError, match="infinite in float32"):
        steer(Vector(huge), layers=[1])


@pytest.mark.parametrize("bound", ({"floor": -np.inf}, {"ceiling": np.inf},
                                   {"floor": -np.inf, "ceiling": np.inf}))
def test_an_infinite_bound_is_no_bound(bound):
    changed = s.run(MODEL.params, MODEL.config, BATCH, interventions=cap(V[1], layers=[1], **bound),
                    capture=s.READ)
    assert not np.asarray(changed.applied[0].changed).any()
    hidden, logits = s.residuals(MODEL, BATCH)
    assert s.same_bits(changed.captured["full"].value, hidden)
    assert s.same_bits(changed.logits, logits)


def test_an_infinite_bound_of_some_layers_leaves_those_alone():
    some = cap(V[1], layers=[1, 2], floor=[-np.inf, 2.0])
    out = s.run(MODEL.params, MODEL.config, BATCH, interventions=some, logits=None)
    seen = np.asarray(out.applied[0].changed).sum(1)
    assert seen[0] == 0 and seen[1] > 0

    def loss(floor):
        edits = cap(V[1], layers=[1, 2], floor=floor)
        return s.run(MODEL.params, MODEL.config, BATCH, interventions=edits).logits.sum()

    slope = jax.grad(loss)(jnp.asarray([-jnp.inf, 2.0]))
    assert np.isfinite(slope).all() and slope[0] == 0 and slope[1] != 0


@pytest.mark.parametrize(("name", "make"), [
    ("floor", lambda: cap(V[1], layers=[1], floor=np.inf)),
    ("ceiling", lambda: cap(V[1], layers=[1], ceiling=-np.inf)),
    ("above", lambda: gate(cap(V[1], layers=[2], floor=1.0), V[1], layer=1, above=np.inf)),
    ("scale", lambda: steer(V[1], layers=[1], scale=np.inf)),
    ("caps 'caps' contain a non-finite value", lambda: Caps(V[:1], (0,), [-np.inf], ("a",))),
])
def test_an_infinite_number_that_is_no_open_bound_is_refused(name, make):
    with pytest.raises(ValueError, match=name) as error:
        make()
    assert "\n" not in str(error.value)
