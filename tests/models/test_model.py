"""The forward pass, divided into several calls, and under jit, grad and vmap."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.interventions import cap, steer
from jaxpersona.models import nn, weight
from jaxpersona.models.batch import batch, split
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.forward import forward
from jaxpersona.models.prepared import in_out

pytestmark = pytest.mark.usefixtures("compile_fast")

LENGTHS = (13, 8, 1)
MODEL = s.tiny_model()
ROWS = s.prompts(LENGTHS)


@pytest.fixture(scope="module")
def whole():
    return s.residuals(MODEL, batch(ROWS))


def in_pieces(pieces, slots):
    carry = Carry(cache=init_cache(MODEL.config, len(ROWS), slots))
    logits = []
    for piece in pieces:
        out = s.run(MODEL.params, MODEL.config, piece, capture=s.READ, carry=carry)
        carry = out.carry
        logits.append(np.asarray(out.logits))
    return np.asarray(out.captured["full"].value), np.concatenate(logits, 1), out.cache


@pytest.mark.parametrize(("size", "slots"), [(1, 13), (3, 13), (7, 32), (13, 32)])
def test_chunks_equal_the_whole(whole, size, slots):
    wide, logits, cache = in_pieces(split(batch(ROWS), size), slots)
    assert np.isnan(wide[:, :, 13:]).all()
    assert s.relative(wide[:, :, :13], whole[0]).max() <= 1e-5
    for row, n in enumerate(LENGTHS):
        assert s.relative(logits[row, :n], whole[1][row, :n]) <= 1e-5
        # a row's slots are consecutive, even if its chunks had padding
        np.testing.assert_array_equal(cache.position[row, :n], np.arange(n))
        assert (np.asarray(cache.position[row, n:]) == -1).all()
    np.testing.assert_array_equal(cache.next, LENGTHS)


def test_prefill_then_decode_of_ragged_rows(whole):
    # prefill all tokens of each row except the last, then decode that at its own position
    source = batch(ROWS)
    kind = np.array(source.kind)
    for row, n in enumerate(LENGTHS):
        kind[row, n - 1] = 0
    head = dataclasses.replace(source, kind=kind)
    at = np.array(LENGTHS)[:, None] - 1
    tail = dataclasses.replace(source, **{
        name: np.take_along_axis(np.asarray(getattr(source, name)), at, 1)
        for name in ("tokens", "position", "kind", "turn")
    })
    wide, logits, _ = in_pieces([head, tail], 32)
    assert s.relative(wide[:, :, :13], whole[0]).max() <= 1e-5
    for row, n in enumerate(LENGTHS):
        assert s.relative(logits[row, -1:], whole[1][row, n - 1 : n]) <= 1e-5


def test_padding_content_never_matters(whole):
    source, rng = batch(ROWS), np.random.default_rng(1)
    empty = (np.asarray(source.kind) & 1) == 0
    noise = {name: np.where(empty, rng.integers(0, 90, empty.shape),
                            getattr(source, name)).astype(np.int32)
             for name in ("tokens", "position", "turn")}
    noisy = dataclasses.replace(source, **noise)
    found, logits = s.residuals(MODEL, noisy)
    assert s.same_bits(found, whole[0])
    assert s.same_bits(logits[~empty], whole[1][~empty])
    wider, _ = s.residuals(MODEL, batch(ROWS, width=16))
    assert s.relative(wider[:, :, :13], whole[0]).max() <= 1e-5
    cached = in_pieces([noisy], 32)
    assert s.same_bits(cached[2], in_pieces([source], 32)[2])


def test_which_logits(whole):
    source = batch(ROWS)
    at_end = s.run(MODEL.params, MODEL.config, source, logits="last").logits
    picked = np.stack([whole[1][row, n - 1] for row, n in enumerate(LENGTHS)])
    assert at_end.shape == (3, 97) and s.relative(at_end, picked) <= 1e-5
    lowered = s.run.lower(MODEL.params, MODEL.config, source, logits=None, capture=s.READ)
    assert "head" not in lowered.compile().as_text()
    out = s.run(MODEL.params, MODEL.config, source, logits=None, capture=s.READ)
    assert out.logits is None and s.relative(out.captured["full"].value, whole[0]).max() <= 1e-5
    assert out.cache is None and out.applied == ()


def test_rows_do_not_see_each_other(whole):
    other = [s.prompts([11], seed=9)[0], ROWS[1], s.prompts([4], seed=8)[0]]
    found, _ = s.residuals(MODEL, batch(other, width=13))
    assert s.same_bits(found[1], whole[0][1])
    assert s.relative(found[0, :, :1], whole[0][0, :, :1]).max() > 0.1


def test_queries_in_chunks(monkeypatch, whole):
    # 13 queries in chunks of 4 with padding in the last chunk, also under a gradient
    monkeypatch.setattr(nn, "QUERY_CHUNK", 4)
    source = jax.tree.map(jnp.asarray, batch(ROWS))

    def total(params):
        out = forward(params, MODEL.config, source, capture=s.READ)
        return (jax.nn.log_softmax(out.logits)[0, :, 5]).sum(), out

    (_, out), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(MODEL.params)
    assert s.relative(out.captured["full"].value, whole[0]).max() <= 1e-5
    chex.assert_tree_all_finite(grad)


def test_gradient_against_finite_differences():
    source = jax.tree.map(jnp.asarray, batch(ROWS))
    rng = np.random.default_rng(0)
    v = rng.normal(size=32)
    edits = cap(v, layers=[1], floor=0.5)
    count = float((np.asarray(source.kind)[:, 1:] != 0).sum())

    @jax.jit
    def loss(params, scale):
        bent = steer(v, layers=[0, 2])
        table = bent.edits[0]
        moved = table.replace(coefficients=table.coefficients.at[..., 1].multiply(scale))
        both = bent.replace(edits=(moved, *edits.edits))
        out = forward(params, MODEL.config, source, interventions=both)
        score = jax.nn.log_softmax(out.logits[:, :-1])
        picked = jnp.take_along_axis(score, source.tokens[:, 1:, None], -1)[..., 0]
        return -jnp.where(source.valid[:, 1:], picked, 0.0).sum() / count

    scale = jnp.float32(0.2)
    slope_params, slope_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(MODEL.params, scale)
    chex.assert_tree_all_finite(slope_params)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(slope_params)), "a parameter is unused"
    step = 1e-2
    by_hand = (loss(MODEL.params, scale + step) - loss(MODEL.params, scale - step)) / (2 * step)
    np.testing.assert_allclose(slope_scale, by_hand, rtol=2e-2, atol=2e-3)
    # along the gradient, where the difference is much larger than rounding errors
    norm = float(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(slope_params))))
    step = 2e-3 / norm

    def moved(sign):
        return jax.tree.map(lambda p, g: p + jnp.float32(sign * step) * g, MODEL.params,
                            slope_params)

    by_hand = (loss(moved(1), scale) - loss(moved(-1), scale)) / (2 * step)
    np.testing.assert_allclose(by_hand, norm**2, rtol=2e-2)


def test_one_trace_serves_equal_configurations_and_new_values():
    traces = []

    @jax.jit
    def counted(params, config, source):
        traces.append(1)
        return forward(params, config, source, logits="last").logits

    twin = dataclasses.replace(MODEL.config)
    assert twin is not MODEL.config and hash(twin) == hash(MODEL.config)
    counted(MODEL.params, MODEL.config, batch(ROWS))
    counted(s.random_params(twin, seed=1), twin, batch(s.prompts((2, 13, 5), seed=3)))
    assert len(traces) == 1 and counted._cache_size() == 1


def test_vmap_over_a_strength():
    source = jax.tree.map(jnp.asarray, batch(ROWS))
    table = steer(np.ones(32), layers=[1]).edits[0]

    def logits(scale):
        edit = table.replace(coefficients=table.coefficients.at[..., 1].multiply(scale))
        edits = steer(np.ones(32), layers=[1]).replace(edits=(edit,))
        return forward(MODEL.params, MODEL.config, source, interventions=edits,
                       logits="last").logits

    together = jax.jit(jax.vmap(logits))(jnp.asarray([0.0, 0.5], jnp.float32))
    plain = s.run(MODEL.params, MODEL.config, source, logits="last").logits
    assert s.relative(together[0], plain) <= 1e-5
    assert s.relative(together[1], plain) > 1e-2


@pytest.mark.parametrize("bad", [
    cap(np.ones(31), layers=[1], floor=0.0), cap(np.ones(32), layers=[3], floor=0.0),
    cap(np.ones((2, 32)), layers=[1], floor=0.0, rows=[0, 1]),
])
def test_forward_refuses_what_does_not_fit(bad):
    with pytest.raises(ValueError, match="width 31|layers|batch size 2"):
        forward(MODEL.params, MODEL.config, batch(ROWS), interventions=bad)


def test_a_batch_wider_than_its_cache_is_refused():
    with pytest.raises(ValueError, match="4 tokens per row, .*but the cache has 3 slots"):
        forward(MODEL.params, MODEL.config, batch([[5, 6, 7, 8]]),
                carry=Carry(cache=init_cache(MODEL.config, 1, 3)))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_stored_in_out_compute_the_same(tied):
    model = s.tiny_model(tied_embeddings=tied)
    turned = in_out(model.params)
    assert turned.layers[0].wq_nhd.value.shape == (32, 48)
    assert turned.head_vd.value.shape == (32, 97)
    run = jax.jit(forward)
    one, other = (run(p, model.config, batch(ROWS), capture=s.READ) for p in (model.params, turned))
    for row, n in enumerate(LENGTHS):
        assert s.relative(other.logits[row, :n], one.logits[row, :n]) < 1e-5
        assert s.relative(other.captured["full"].value[row, :, :n],
                          one.captured["full"].value[row, :, :n]).max() < 1e-5


def test_a_cpu_keeps_low_precision_keys_in_float32_and_nothing_changes():
    """On a CPU, the new cache contains rounded values, so a bfloat16 cache gives the same bits."""
    model, rows = s.tiny_model(dtype=jnp.bfloat16), batch(ROWS)
    run = jax.jit(forward, static_argnames=("logits", "slots"))

    def through(**how):
        first = run(model.params, model.config, rows, logits="last", **how)
        one = batch([[5]] * 3)
        one = dataclasses.replace(one, position=np.array(LENGTHS, np.int32)[:, None])
        after = run(model.params, model.config, one, logits="last", carry=first.carry)
        return first.cache, np.asarray(first.logits), np.asarray(after.logits)

    given, *wanted = through(
        carry=Carry(cache=init_cache(model.config, 3, 20, jnp.bfloat16)))
    made, *found = through(slots=20)
    assert given.k[0].dtype == jnp.bfloat16 and made.k[0].dtype == jnp.float32
    for low, high in zip(given.k + given.v, made.k + made.v, strict=True):
        np.testing.assert_array_equal(low.astype(jnp.float32), high)
    for a, b in zip(wanted, found, strict=True):
        assert a.tobytes() == b.tobytes()


def test_one_bfloat16_row_is_multiplied_as_a_row_among_others():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=n), jnp.bfloat16) for n in ((1, 1, 96), (64, 96)))
    found = jax.jit(functools.partial(weight.dot, dtype=jnp.float32))(x, w)
    assert found.shape == (1, 1, 64) and found.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-4)


def test_a_token_without_a_free_slot_is_refused_and_never_dropped_in_silence():
    """Outside jit this raises an error; under jit, only the row in question becomes NaN."""
    model = s.tiny_model()
    config, slots = model.config, 8

    def run(params, rows, cache):
        return forward(params, config, rows, carry=Carry(cache=cache), logits="last")

    step = jax.jit(run)

    def token(at):
        rows = batch([[5], [6]])
        return rows.replace(position=np.array([[at], [at - 5]], np.int32))

    out = run(model.params, batch([s.prompts((7,))[0], [4, 5]]), init_cache(config, 2, slots))
    filled = run(model.params, token(7), out.cache)  # outside jit, a full row is accepted
    assert np.isfinite(filled.logits).all()
    out = step(model.params, token(7), out.cache)  # the last free slot of row 0
    assert np.isfinite(out.logits).all() and np.asarray(out.cache.next).tolist() == [8, 3]
    with pytest.raises(ValueError, match="row 0 of the batch needs 9 slots.* the cache has 8"):
        run(model.params, token(8), out.cache)
    whole = step(model.params, token(8), out.cache)
    assert np.isnan(whole.logits[0]).all() and np.isfinite(whole.logits[1]).all()
    assert np.asarray(whole.finite).tolist() == [False, True]
    with pytest.raises(ValueError, match="row 1 of the batch needs 10 slots"):
        run(model.params, batch([[5], [6] * 7]).replace(
            kind=np.array([[0] * 7, [1] * 7], np.uint16)), out.cache)
