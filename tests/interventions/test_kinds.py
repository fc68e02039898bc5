"""Rotation, norm restoration and custom functions: their properties and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpersona.captures import capture
from jaxpersona.engine import programs
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import (
    ablate,
    cap,
    chain,
    custom,
    gate,
    mean_ablate,
    reserve,
    restore_norm,
    rotate,
    scale,
    set_projection,
    stack_rows,
    steer,
)
from jaxpersona.interventions.where import generated
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward
from jaxpersona.vectors.vector import Vector

pytestmark = pytest.mark.usefixtures("compile_fast")

quick = settings(max_examples=40, deadline=None)
seeds, angles = st.integers(0, 999), st.floats(-7, 7, width=32)
ALL = jnp.ones((2, 5), bool)


def scene(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 5, 8)).astype(np.float32), *rng.normal(size=(2, 8))


def act(edits, h, active=ALL, before=None):
    x, changed = jnp.asarray(h), None
    before = x if before is None else before
    for edit in edits.prepare(len(h), x).edits:
        x, changed = edit.apply(edit.layers[0], x, active, before)
    return np.asarray(x), np.asarray(changed)


def plane_of(u, v):
    one = u / np.linalg.norm(u)
    two = v - (v @ one) * one
    return np.stack([one, two / np.linalg.norm(two)])


@quick
@given(seeds, angles, st.booleans())
def test_rotation_keeps_the_norm_and_what_is_outside_the_plane(seed, angle, to):
    h, u, v = scene(seed)
    edits = rotate(u, v, layers=1, **({"to": angle} if to else {"by": angle}))
    out, _ = act(edits, h)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(h, axis=-1), rtol=1e-5)
    flat = plane_of(u, v)
    rest = np.eye(8) - flat.T @ flat
    np.testing.assert_allclose(out @ rest, h @ rest, atol=1e-5)
    p, q = flat @ np.moveaxis(out, -1, 0).reshape(8, -1)
    if to:
        np.testing.assert_allclose(np.cos(np.arctan2(q, p) - angle), 1, atol=1e-4)
        twice, _ = act(edits, out)
        np.testing.assert_allclose(twice, out, atol=1e-5)
    else:
        back, _ = act(rotate(u, v, layers=1, by=-angle), out)
        np.testing.assert_allclose(back, h, atol=1e-5)


def test_rotation_by_nothing_and_unplaced_activations_keep_their_bits():
    h, u, v = scene(3)
    out, changed = act(rotate(u, v, layers=1, by=0.0), h)
    assert out.tobytes() == h.tobytes() and not changed.any()
    out, changed = act(rotate(u, v, layers=1, to=1.0), np.zeros_like(h))
    assert not out.any() and not changed.any()


@quick
@given(seeds, st.floats(-3, 3, width=32))
def test_a_restored_norm_is_the_one_before_and_the_direction_stays(seed, c):
    h, u, _ = scene(seed)
    moved, _ = act(steer(u, layers=1, scale=c), h)
    out, _ = act(chain(steer(u, layers=1, scale=c), restore_norm(layers=1)), h)
    np.testing.assert_allclose(np.linalg.norm(out, axis=-1), np.linalg.norm(h, axis=-1), rtol=1e-5)
    cosine = (out * moved).sum(-1) / np.linalg.norm(out, axis=-1) / np.linalg.norm(moved, axis=-1)
    np.testing.assert_allclose(cosine, 1, atol=1e-5)
    same, changed = act(restore_norm(layers=1), h)
    assert same.tobytes() == h.tobytes() and not changed.any()


def twist(params, h):
    return h * params["a"] + params["b"]


def test_custom_sees_a_token_and_keeps_what_it_leaves():
    h, u, _ = scene(1)
    active = jnp.asarray(np.arange(10).reshape(2, 5) % 3 > 0)
    out, changed = act(custom(twist, {"a": 2.0, "b": u}, layers=1), h, active)
    np.testing.assert_allclose(out, np.where(active[..., None], 2 * h + u.astype(np.float32), h),
                               rtol=1e-6)
    np.testing.assert_array_equal(changed, active)
    out, changed = act(custom(twist, {"a": 1.0, "b": 0 * u}, layers=1), h)
    assert out.tobytes() == h.tobytes() and not changed.any()
    bank = {"a": np.array([1.0, 3.0, 1.0]), "b": np.zeros((3, 8))}
    out, _ = act(custom(twist, bank, layers=1, rows=[1, 0]), h)
    np.testing.assert_allclose(out, h * np.array([3, 1])[:, None, None], rtol=1e-6)


def first_set(params, h):
    return h.at[0].set(params)


def test_custom_may_change_a_part_of_an_activation():
    h, _, _ = scene(1)
    out, changed = act(custom(first_set, 7.0, layers=1), h)
    np.testing.assert_array_equal(out[..., 0], 7)
    np.testing.assert_array_equal(out[..., 1:], h[..., 1:])
    assert changed.all()


def narrow(params, h):
    return h[:3]


MIXED = [Vector(np.eye(8)[:2] + i, fingerprint=f"{i}" * 16) for i in (1, 2)]


@pytest.mark.parametrize(("message", "made"), [
    ("rotate needs one angle", lambda u: rotate(u, -u, layers=1)),
    ("rotate needs one angle", lambda u: rotate(u, -u, layers=1, to=1, by=1)),
    ("are collinear at layer 1", lambda u: rotate(u, -2 * u, layers=1, to=1)),
    ("`second` has shape", lambda u: rotate(u, np.ones(9), layers=1, to=1)),
    ("to is infinite", lambda u: rotate(u, np.ones(8), layers=1, to=np.inf)),
    ("second is zero", lambda u: rotate(u, 0 * u, layers=1, to=1)),
    ("site is 'head'", lambda u: restore_norm(layers=1, site="head")),
    ("rows contains \\[1\\]", lambda u: restore_norm(layers=1, rows=[0, 1])),
    ("fn is 3", lambda u: custom(3, layers=1)),
    ("fn is not hashable", lambda u: custom([], layers=1)),
    ("with the same n", lambda u: custom(twist, {"a": np.ones(2), "b": np.ones((3, 8))}, layers=1,
                                         rows=[0, 1])),
    ("with the same n", lambda u: custom(first_set, 7.0, layers=1, rows=[0, 0])),
    ("fn returned shape \\[3\\] for a token", lambda u: act(custom(narrow, layers=1), scene(0)[0])),
    ("mean has shape", lambda u: mean_ablate(u, np.ones(9), layers=1)),
    ("rows is 0", lambda u: reserve(0, 8, [1])),
    ("width is 2.5", lambda u: reserve(1, 2.5, [1])),
    ("rows is True", lambda u: reserve(True, 8, [1])),
    ("slots is 0", lambda u: reserve(1, 8, [1], slots=0)),
    ("entries is 0", lambda u: reserve(1, 8, [1], entries=0)),
    ("site is 'head'", lambda u: reserve(1, 8, [1], site="head")),
    ("interventions is a list; chain its items", lambda u: chain([steer(u, layers=1)])),
    ("interventions must be a list", lambda u: stack_rows(steer(u, layers=1))),
    ("where is 'anywhere'; give a test .* everywhere, prompt, generated",
     lambda u: steer(u, layers=1, where="anywhere")),
    ("where is 3", lambda u: steer(u, layers=1, where=3)),
    (r"fn has the signature \(h\); it must accept \(params, h\)",
     lambda u: custom(lambda h: h, layers=1)),
    ("floor is 'p25'", lambda u: cap(u, layers=1, floor="p25")),
    ("floor is infinite in float32", lambda u: cap(u, layers=1, floor=1e39)),
    ("mean onto vector is infinite in float32",
     lambda u: mean_ablate(u, 1e200 * np.asarray(u, np.float64), layers=1)),
    ("‖vector‖ is infinite", lambda u: steer(u * 1e38, layers=1, scale=10.0)),
    ("must be an int, a slice", lambda u: steer(u, layers=3.0)),
    ("must be an int, a slice", lambda u: steer(u, layers=None)),
    ("vector is array", lambda u: steer(u * 1j, layers=1)),
    ("params contains 'x'", lambda u: custom(twist, "x", layers=1)),
    ("there are 8 directions and 8 layers", lambda u: cap(
        [Vector(np.ones((8, 8)))] * 8, layers=[3], floor=np.arange(8), rows=range(8))),
    ("different models", lambda u: rotate(*MIXED, to=1.0, layers=1)),
    ("different models", lambda u: mean_ablate(*MIXED, layers=1)),
    ("different models", lambda u: cap(MIXED[0], layers=1, floor=0.0, push=MIXED[1])),
    ("into is 'x'; give the result of jp.reserve", lambda u: stack_rows([None], into="x")),
    ("into= is for batch size 2", lambda u: stack_rows([None], into=reserve(2, 8, [1]))),
    ("the interventions of row 1 do not fit", lambda u: stack_rows(
        [None, chain(steer(u, layers=1), steer(u, layers=1))], into=reserve(2, 8, [1]))),
    ("the interventions of row 0 do not fit", lambda u: stack_rows(
        [restore_norm(layers=1)], into=reserve(1, 8, [1]))),
    ("do not fit the reserved", lambda u: stack_rows([steer(u, layers=2)],
                                                     into=reserve(1, 8, [1]))),
    ("width: 8, ", lambda u: stack_rows([steer(u, layers=1)], into=reserve(1, 9, [1]))),
])
def test_refused(message, made):
    with pytest.raises(ValueError, match=message):
        made(scene(0)[1])


def test_reserved_tables_take_any_edits_without_another_trace():
    model, rng = s.tiny_model(), np.random.default_rng(4)
    rows = s.prompts((5, 9, 12, 3), seed=1)
    empty = reserve(4, 32, range(3), slots=2)
    u, v = rng.normal(size=(2, 32))

    def go(parts):
        return generate(model, rows, interventions=stack_rows(parts, into=empty), batch_size=4,
                        max_new_tokens=6, ids=range(4))

    s.KEPT.clear()
    plain = generate(model, rows, batch_size=4, max_new_tokens=6, ids=range(4))
    nothing = go([None] * 4)
    before = (dict(programs.TRACES), s.compiled(programs.decode))
    one = [steer(u, layers=[0], scale=2), None, chain(cap(v, layers=[1, 2], floor=4.0),
                                                      ablate(u, layers=[2], where=generated)), None]
    two = [None, scale(v, -3.0, layers=[0, 1, 2]), set_projection(v, 9.0, layers=[1]),
           mean_ablate(u, 9 * v, layers=[2])]
    for parts in (one, two):
        found, free = go(parts), generate(model, rows, interventions=stack_rows(parts),
                                          batch_size=4, max_new_tokens=6, ids=range(4))
        for b in range(4):
            np.testing.assert_array_equal(found.tokens[b], free.tokens[b])
    for b in range(4):
        np.testing.assert_array_equal(nothing.tokens[b], plain.tokens[b])
    filled = stack_rows(one, into=empty)  # a full capacity can be filled again
    again = stack_rows([None, one[2], None, None], into=filled)
    assert s.same_bits(again, stack_rows([None, one[2], None, None], into=empty))
    nobody = stack_rows([None] * 4, into=filled)
    assert all((edit.index == -1).all() for edit in nobody.edits)
    go([steer(u, layers=[0], where=generated.without("code"))] * 4)
    after = (dict(programs.TRACES), s.compiled(programs.decode))
    # the programs of the two unreserved runs; none for the reserved runs
    assert after[1] - before[1] <= 2
    assert go(two) and (dict(programs.TRACES), s.compiled(programs.decode)) == after


MODEL = s.tiny_model(n_layers=2, windows=(None, None))
TEXT = batch(s.prompts((7, 4), seed=6))
G = np.random.default_rng(12).normal(size=(6, 32)).astype(np.float32)


READ = np.random.default_rng(13).normal(size=(2, 97)).astype(np.float32)


@jax.jit
def logits(edits):
    return forward(MODEL.params, MODEL.config, TEXT, interventions=edits, logits="last").logits


@jax.jit
def loss(edits):
    return (logits(edits) * READ).sum()


MADE = {
    "steer": (lambda v: steer(v, layers=[0], scale=0.7), G[0]),
    "steer's strength": (lambda c: steer(G[0], layers=[0, 1], scale=c), np.float32([0.4, -0.6])),
    # a high floor, because a cap is not differentiable there
    "cap": (lambda v: cap(v, layers=[0, 1], floor=9.0), G[0]),
    "cap's floor": (lambda f: cap(G[0], layers=[0, 1], floor=f), np.float32([9.0, 12.0])),
    "ablate": (lambda v: ablate(v, layers=[0]), G[1]),
    "scale": (lambda f: scale(G[1], f, layers=[0]), np.float32(0.3)),
    "set": (lambda x: set_projection(G[1], x, layers=[0]), np.float32(4.0)),
    "mean ablate": (lambda m: mean_ablate(G[1], m, layers=[0]), G[2]),
    "rotate": (lambda v: rotate(v, G[3], layers=[0], to=0.4), G[2]),
    "rotate's angle": (lambda a: rotate(G[2], G[3], layers=[0], by=a), np.float32(0.4)),
    "norm restored": (lambda v: chain(steer(v, layers=[0]), restore_norm(layers=[0])), G[4]),
    "custom": (lambda b: custom(twist, {"a": 1.1, "b": b}, layers=[0]), G[5]),
    "gated": (lambda v: gate(steer(v, layers=[1]), G[0], layer=0, above=-1e3, within=True), G[1]),
}


@pytest.mark.parametrize("name", MADE)
def test_gradients_agree_with_finite_differences(name):
    make, at = MADE[name]
    found = np.asarray(jax.jit(jax.grad(lambda x: loss(make(x))))(at), np.float64)
    value = jax.jit(lambda x: logits(make(x)))
    rng = np.random.default_rng(0)
    far = near = 0.0
    # Check the gradient's own and random directions, with Richardson extrapolation. Directions have
    # unit root mean square, because rounding errors would dominate a small step along a scalar.
    for d in (found, *(rng.normal(size=at.shape) for _ in range(3))):
        d = np.asarray(d / np.sqrt(np.mean(d * d)), np.float32)

        def slope(step, d=d):
            high, low = (np.asarray(value(at + np.float32(k * step) * d), np.float64)
                         for k in (1, -1))
            return ((high - low) * READ).sum() / (2 * step)

        numeric = (4 * slope(0.02) - slope(0.04)) / 3
        far += (numeric - float((found * d).sum())) ** 2
        near += numeric ** 2
    assert near > 1e-4, "the loss does not depend on it"
    assert (far / near) ** 0.5 <= 1e-3, f"{(far / near) ** 0.5:.1e}"


def test_a_cap_that_never_binds_has_no_gradient():
    found = jax.jit(jax.grad(lambda v: loss(cap(v, layers=[0, 1], floor=-1e3))))(G[0])
    assert not np.asarray(found).any()


def test_jit_vmap_and_checkpoint_over_interventions():
    vectors = jnp.asarray(G[:3])
    one = [loss(steer(v, layers=[0])) for v in G[:3]]
    found = jax.jit(jax.vmap(lambda v: loss(steer(v, layers=[0]))))(vectors)
    np.testing.assert_allclose(found, one, rtol=1e-5)
    tables = jax.tree.map(lambda *x: jnp.stack(x), *(
        chain(steer(v, layers=[0]), rotate(v, G[4], layers=[1], to=0.3)) for v in G[:3]))
    alone = [loss(chain(steer(v, layers=[0]), rotate(v, G[4], layers=[1], to=0.3))) for v in G[:3]]
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(tables), alone, rtol=1e-5)
    plain = jax.jit(jax.grad(lambda v: loss(steer(v, layers=[0]))))(vectors[0])
    kept = jax.jit(jax.grad(jax.checkpoint(lambda v: loss(steer(v, layers=[0])))))(vectors[0])
    np.testing.assert_allclose(kept, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [
    lambda x: gate(steer(G[1], layers=[1], scale=3.0), G[0], layer=0, above=x[0], within=True),
    lambda x: gate(steer(G[1], layers=[1], scale=x[0]), x, layer=0, above=-1e3, within=True),
    lambda x: stack_rows([steer(x, layers=[0]), cap(G[1], layers=[1], floor=x[0])]),
    lambda x: stack_rows([custom(twist, {"a": x[0], "b": x}, layers=[0]),
                          rotate(x, G[1], layers=[1], to=0.3)]),
], ids=["threshold", "gate's direction", "rows", "rows of kinds"])
def test_constructors_may_be_traced(make):
    whole, eager = jax.jit(lambda x: loss(make(x)))(G[0]), loss(make(G[0]))
    np.testing.assert_allclose(whole, eager, rtol=1e-4)
    slope = jax.jit(jax.grad(lambda x: loss(make(x))))(G[0])
    assert np.isfinite(slope).all()
    many = jax.jit(jax.vmap(lambda x: loss(make(x))))(jnp.asarray(G[:2]))
    np.testing.assert_allclose(many[0], eager, rtol=1e-4)


def test_a_mean_of_zero_is_an_ablation():
    h, u, _ = scene(2)
    np.testing.assert_array_equal(act(mean_ablate(u, 0 * u, layers=1), h)[0],
                                  act(ablate(u, layers=1), h)[0])


@pytest.mark.parametrize("parts", [
    [rotate(G[0], G[1], by=1.0, layers=[0]), rotate(G[2], G[1], to=1.0, layers=[1])],
    [custom(twist, {"a": 2.0, "b": G[0]}, layers=[0]),
     custom(twist, {"a": 3.0, "b": G[1]}, layers=[1])],
    [chain(steer(G[0], layers=[i]), restore_norm(layers=[i])) for i in (0, 1)],
    [chain(steer(G[0], layers=[0, 1], scale=3.0), restore_norm(layers=[i])) for i in (0, 1)],
    [gate(steer(9 * G[0], layers=[1]), G[1], layer=0, above=-1e3, over="token"),
     gate(steer(9 * G[2], layers=[1]), G[1], layer=0, site="mlp", above=-1e3, over="token")],
], ids=["rotate", "custom", "restore", "restore omits an edited layer", "gates at sites"])
def test_rows_that_name_different_layers_keep_to_them(parts):
    """Also the norms at the last layer, which do not change the logits, are equal."""
    together = s.residuals(MODEL, TEXT, stack_rows(parts))[0]
    for b, part in enumerate(parts):
        alone = s.residuals(MODEL, TEXT, part)[0]
        np.testing.assert_allclose(together[b], alone[b], rtol=1e-4, atol=1e-4)
        assert np.nanmax(np.abs(alone[1 - b] - together[1 - b])) > 1e-2, "the parts do the same"


def test_rows_measure_their_gates_at_layers_of_their_own():
    read = (capture.projections(G[1:2], layers=[0])
            | capture.projections(G[1:2], layers=[1], site="attention", name="later"))
    out = forward(MODEL.params, MODEL.config, TEXT, capture=read, logits=None).captured
    early, late = (float(out[name].value[1, 0, 3, 0]) for name in ("projections", "later"))
    # the gate is open only for the later projection
    side = {"above" if late > early else "below": (early + late) / 2}
    edit = steer(9 * G[0], layers=[1], site="mlp")
    parts = [gate(edit, G[1], layer=0, above=-1e3, over="token"),
             gate(edit, G[1], layer=1, site="attention", over="token", **side)]
    together, alone, plain = (np.asarray(logits(x)) for x in (
        stack_rows(parts), parts[1], chain()))
    np.testing.assert_allclose(together[1], alone[1], rtol=1e-4, atol=1e-4)
    assert np.abs(alone[1] - plain[1]).max() > 1e-2


@pytest.mark.parametrize("how", [{"to": 0.5}, {"by": 0.5}])
def test_a_rotation_has_a_gradient_where_nothing_lies_in_its_plane(how):
    edit = rotate(np.eye(8)[0], np.eye(8)[1], layers=[0], **how).prepare(1, ALL).edits[0]
    h = jnp.zeros((1, 2, 8)).at[0, 0, 5].set(1.0)
    slope = jax.grad(lambda h: edit.apply(0, h, jnp.ones((1, 2), bool), h)[0].sum())(h)
    assert np.isfinite(slope).all()
