"""Property tests of the rank-one edit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxpersona.kernels import reference

B, T, D = 3, 4, 8
INF = np.inf
edit = jax.jit(reference.rank_one_edit)
number = st.floats(-4, 4, width=32)
quick = settings(max_examples=60, deadline=None)


def scene(seed, size=1.0):
    rng = np.random.default_rng(seed)
    h = (rng.normal(size=(B, T, D)) * size).astype(np.float32)
    v = rng.normal(size=(B, D))
    v = (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)
    return h, v, rng.random((B, T)) < 0.7


def table(s=1.0, c=0.0, lo=-INF, hi=INF):
    return tuple(np.full(B, number, np.float32) for number in (s, c, lo, hi))


def project(h, v):
    return np.einsum("btd,bd->bt", h.astype(np.float64), v.astype(np.float64))


def across(h, v):
    return h - project(h, v)[..., None] * v[:, None]


@quick
@given(st.integers(0, 999), number, number, number, number)
def test_equals_the_equation(seed, s, c, a, b):
    h, v, active = scene(seed)
    lo, hi = min(a, b), max(a, b)
    out, changed = edit(h, v, table(s, c, lo, hi), active)
    p = project(h, v)
    delta = np.clip((s - 1) * p + c, lo - p, hi - p) * active
    np.testing.assert_allclose(out, h + delta[..., None] * v[:, None], atol=2e-5)
    assert not (np.asarray(changed) & ~active).any()
    assert np.asarray(changed)[np.abs(delta) > 1e-4].all()


@quick
@given(st.integers(0, 999), number, st.sampled_from([0.1, 1.0, 100.0]))
def test_floor_holds_is_idempotent_and_leaves_the_rest(seed, floor, size):
    h, v, _ = scene(seed, size)
    every = np.ones((B, T), bool)
    once, changed = edit(h, v, table(lo=floor), every)
    once, near = np.asarray(once), 1e-5 * max(size, 1)
    assert (project(once, v) >= floor - near).all()
    np.testing.assert_allclose(across(once, v), across(h, v), atol=near)
    np.testing.assert_allclose(edit(once, v, table(lo=floor), every)[0], once, atol=near)
    sure = np.abs(project(h, v) - floor) > near  # elsewhere the result depends on rounding
    np.testing.assert_array_equal(np.asarray(changed)[sure], (project(h, v) < floor)[sure])
    kept = project(h, v) > floor + near
    assert (once[kept] == h[kept]).all()
    above = np.asarray(edit(-h, v, table(hi=-floor), every)[0])
    np.testing.assert_array_equal(above, -once)  # a ceiling is a mirrored floor


@quick
@given(st.integers(0, 999))
def test_ablation_removes_and_twice_is_once(seed):
    h, v, _ = scene(seed)
    every = np.ones((B, T), bool)
    once = np.asarray(edit(h, v, table(s=0.0), every)[0])
    np.testing.assert_allclose(project(once, v), 0, atol=1e-5)
    np.testing.assert_allclose(once, across(h, v), atol=1e-5)
    np.testing.assert_allclose(edit(once, v, table(s=0.0), every)[0], once, atol=1e-5)


@quick
@given(st.integers(0, 999), number, number)
def test_additions_add(seed, a, b):
    h, v, active = scene(seed)
    first = edit(edit(h, v, table(c=a), active)[0], v, table(c=b), active)[0]
    np.testing.assert_allclose(first, edit(h, v, table(c=a + b), active)[0], atol=1e-5)


@quick
@given(st.integers(0, 999), st.sampled_from([np.float32, jnp.bfloat16]))
def test_identity_and_inactive_tokens_keep_their_bits(seed, dtype):
    h, v, active = scene(seed)
    h = jnp.asarray(h, dtype)
    out, changed = edit(h, v, table(), np.ones((B, T), bool))
    assert np.asarray(out).tobytes() == np.asarray(h).tobytes() and not np.asarray(changed).any()
    out = np.asarray(edit(h, v, table(s=0.0, c=3.0), active)[0])
    assert (out[~active] == np.asarray(h)[~active]).all() and out.dtype == h.dtype


@quick
@given(st.integers(0, 999), st.integers(0, B - 1), number)
def test_rows_never_affect_each_other(seed, row, floor):
    h, v, active = scene(seed)
    other_h, other_v, other_active = scene(seed + 1000)
    numbers, others = table(lo=floor), table(s=0.3, c=1.0)
    for mixed, own in ((other_h, h), (other_v, v), (other_active, active),
                       *zip(others, numbers, strict=True)):
        mixed[row] = own[row]
    ours = edit(h, v, numbers, active)[0]
    theirs = edit(other_h, other_v, others, other_active)[0]
    assert np.asarray(ours)[row].tobytes() == np.asarray(theirs)[row].tobytes()


def test_columns_at_hand_are_the_direction():
    h, v, active = scene(1)
    for rows in (B, 1):
        one, other = v[:rows], reference.twice(v[:rows])
        numbers = tuple(n[:rows] for n in table(s=0.5, lo=0.1))
        wanted, changed = reference.rank_one_edit(h, one, numbers, active)
        found, same = reference.rank_one_edit(h, one, numbers, active, columns=other)
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        np.testing.assert_array_equal(same, changed)
        assert np.asarray(changed).any()


def test_the_implementation_is_named():
    h, v, active = scene(0)
    ours = reference.rank_one_edit(h, v, table(c=1.0), active, implementation="xla")
    np.testing.assert_allclose(ours[0], edit(h, v, table(c=1.0), active)[0], atol=1e-6)
    try:
        reference.rank_one_edit(h, v, table(), active, **{"implementation": "cuda"})
    except ValueError as error:
        assert "cuda" in str(error)
    else:
        raise AssertionError("an unknown implementation was taken")
