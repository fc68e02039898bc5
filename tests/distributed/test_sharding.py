"""Meshes: parity of the forward pass on every mesh shape, collectives, and rejected meshes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jax.sharding import AxisType, Mesh

from jaxpersona.captures import capture
from jaxpersona.distributed import sharding
from jaxpersona.engine.generate import generate
from jaxpersona.engine.nonfinite import NonfiniteWarning
from jaxpersona.interventions import (
    cap,
    chain,
    custom,
    gate,
    restore_norm,
    rotate,
    stack_rows,
    steer,
)
from jaxpersona.models import nn
from jaxpersona.models.batch import batch
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import Rope
from jaxpersona.models.forward import forward
from jaxpersona.models.params import layout
from jaxpersona.planning import hlo

pytestmark = pytest.mark.usefixtures("compile_fast")

LENGTHS = (13, 8, 1, 5, 9, 4, 2, 7)
ROWS = s.prompts(LENGTHS, vocabulary=96)
# 2 heads do not divide over a model axis of 4
SHAPE = dict(vocab_size=96, n_layers=2, n_heads=8, n_kv_heads=2)
FAMILIES = {
    "llama": dict(family="llama", qk_norm=False, rope=Rope(500_000.0, "llama3", 8.0)),
    "qwen3": dict(family="qwen3", n_kv_heads=8),
    "gemma2": dict(family="gemma2", qk_norm=False, tied_embeddings=True, windows=(6, None),
                   activation="gelu_tanh", norm_offset=1.0, post_norms=True, embed_scale=32**0.5,
                   attn_softcap=50.0, final_softcap=30.0),
}
MESHES = {
    "8x1": dict(data=8), "4x2": dict(data=4, model=2), "2x4": dict(data=2, model=4),
    "1x8": dict(model=8), "spread": dict(fsdp=8), "spread4x2": dict(fsdp=4, model=2),
}
V = np.random.default_rng(0).normal(size=(3, 32))
SHARED = chain(steer(V[0], layers=[0]), cap(V[1], layers=[1], floor=0.5))
READ = (capture.mean() | capture.last() | s.READ | capture.norms()
        | capture.projections(V) | capture.moments(V)
        | capture.histogram(V, edges=[-1.0, 0.0, 1.0]))
# one intervention per row; add a line for each new kind of intervention
REQUESTS = (
    SHARED,
    None,
    cap(V[2], layers=[0, 1], floor=1.0),
    steer(V[1], layers=[1], site="mlp"),
    rotate(V[0], V[1], layers=[0], to=0.7),
    custom(lambda p, h: h + p * jnp.tanh(h), np.float32(0.2), layers=[1]),
    gate(steer(V[2], layers=[1], scale=2.0), V[0], layer=0, above=-0.5),
    gate(chain(steer(V[0], layers=[1]), restore_norm(layers=[1])), V[1], layer=0, over="token",
         below=0.5),
)
BY_ROW = stack_rows(REQUESTS)


@functools.lru_cache
def one_device(family):
    return s.tiny_model(**{**SHAPE, **FAMILIES[family]})


def spread(model, mesh):
    """Shard a model's parameters over a mesh."""
    mesh = sharding.fit(mesh, model.config)

    def put(array, spec):
        return jax.device_put(array, sharding.weight_sharding(spec.axes, spec.shape, mesh))

    params = jax.tree.map(put, model.params, layout(model.config))
    return dataclasses.replace(model, params=params, mesh=mesh)


def far(found, wanted):
    """Return the largest relative distance between corresponding arrays of two trees."""
    def one(a, b):
        a, b = np.asarray(a, np.float64).reshape(1, -1), np.asarray(b, np.float64).reshape(1, -1)
        return float(s.relative(a, b))
    # unlike Python's max, NumPy's returns NaN if any value is NaN
    return float(np.max(jax.tree.leaves(jax.tree.map(one, found, wanted)), initial=0.0))


@functools.lru_cache
def expected(family):
    model = one_device(family)
    out = s.run(model.params, model.config, batch(ROWS), interventions=BY_ROW, capture=READ)
    return jax.device_get((out.logits, out.captured, out.applied)), replies(model)


def replies(model):
    return generate(model, ROWS, interventions=BY_ROW, max_new_tokens=8, batch_size=8,
                    capture=capture.mean() | capture.norms() | capture.projections(V))


def test_an_overflow_is_found_and_explained_on_a_mesh():
    model = spread(one_device("qwen3"), sharding.make_mesh(data=2, model=2))
    edits = steer(np.ones(32) * 1e18, layers=[1], scale=[1e19], rows=[-1, 0, -1, -1])
    for temperature in (0.0, 1.0):
        with pytest.warns(NonfiniteWarning, match=r"1 of 4 .* layer 1 \(residual\), token 0"):
            out = generate(model, ROWS[:4], interventions=edits, max_new_tokens=4, batch_size=4,
                           temperature=temperature)
        assert [f == "nonfinite" for f in out.finish] == [False, True, False, False]


@pytest.mark.parametrize("axes", [
    {"data": 1, "model": 4}, pytest.param({"model": 8}, marks=pytest.mark.slow)])
def test_a_single_row_runs_on_a_mesh(axes):
    model = one_device("qwen3")

    def reply(model):
        return generate(model, ROWS[:2], interventions=SHARED, capture=capture.mean(),
                        max_new_tokens=8, batch_size=1, temperature=[0.0, 0.8], top_p=0.9)

    meshed, alone = reply(spread(model, sharding.make_mesh(**axes))), reply(model)
    assert s.same_bits(meshed.tokens, alone.tokens)
    assert far(meshed.captured, alone.captured) <= 1e-5


@pytest.mark.parametrize(("axes", "auto"), [
    pytest.param({"data": 8}, False, marks=pytest.mark.slow), ({"data": 2, "model": 4}, False),
    pytest.param({"fsdp": 2, "model": 2}, True, marks=pytest.mark.slow)])
def test_one_key_value_head_runs_on_a_mesh(axes, auto):
    """Gemma 3's smallest model has one key/value head, replicated over a larger model axis."""
    model = s.tiny_model(**{**SHAPE, "n_kv_heads": 1})
    mesh = sharding.make_mesh(**axes)
    if auto:
        mesh = Mesh(mesh.devices, mesh.axis_names,
                    axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    assert far(replies(spread(model, mesh)).captured, replies(model).captured) <= 1e-5


@pytest.mark.parametrize(("heads", "axes"), [
    pytest.param(1, {"data": 2, "model": 4}, marks=pytest.mark.slow),
    (1, {"fsdp": 2, "model": 2}),
    pytest.param(2, {"data": 2, "model": 4}, marks=pytest.mark.slow)])
def test_a_long_prompt_s_chunks_run_on_a_mesh(heads, axes, monkeypatch):
    """Compare query chunks of 4 on a mesh, and their gradient, with unchunked queries."""
    model = s.tiny_model(**{**SHAPE, "n_kv_heads": heads})
    meshed = spread(model, sharding.make_mesh(**axes))

    def both(model):
        def loss(params):
            return forward(params, model.config, batch(ROWS), interventions=SHARED).logits.std()

        out = s.run(model.params, model.config, batch(ROWS), capture=READ)
        return jax.device_get((out.captured, jax.jit(jax.grad(loss))(model.params)))

    wanted = both(model)
    monkeypatch.setattr(nn, "QUERY_CHUNK", 4)
    jax.clear_caches()  # the chunk size is a global constant, not an argument of the cached program
    try:
        assert far(both(meshed), wanted) <= 1e-5
    finally:
        monkeypatch.undo()
        jax.clear_caches()


# `make test-all` tests all combinations
PAIRS = [("gemma2", "spread4x2")]


@pytest.mark.parametrize(("family", "shape"), [
    *PAIRS, *(pytest.param(family, shape, marks=pytest.mark.slow) for family in FAMILIES
              for shape in MESHES if (family, shape) not in PAIRS)])
def test_a_mesh_computes_what_one_device_does(family, shape):
    (logits, captured, applied), alone = expected(family)
    model = spread(one_device(family), sharding.make_mesh(**MESHES[shape]))
    out = s.run(model.params, model.config, batch(ROWS), interventions=BY_ROW, capture=READ)
    assert out.logits.sharding.mesh.shape == model.mesh.shape
    assert s.relative(out.logits, logits).max() <= 1e-5
    assert far(out.captured, captured) <= 1e-5
    assert s.same_bits(out.applied, applied)
    together = replies(model)
    for row, (one, other) in enumerate(zip(alone.tokens, together.tokens, strict=True)):
        if not np.array_equal(one, other):  # allowed only at a near-tie
            apart = int(np.argmax(one[: len(other)] != other[: len(one)]))
            assert margin(family, row, one[:apart]) < 1e-4
        else:
            assert far({name: value[row] for name, value in together.captured.items()},
                       {name: value[row] for name, value in alone.captured.items()}) <= 1e-5


def margin(family, row, reply):
    """Return the top-2 logit margin, on one device, after a prompt and the start of its reply."""
    model = one_device(family)
    text = batch([[*ROWS[row], *reply.tolist()]])
    edits = BY_ROW.take([row])
    return s.top2_margin(s.run(model.params, model.config, text, interventions=edits,
                               logits="last").logits)[0]


def transforms(config):
    """Return jit, grad and vmap of user-defined functions of (params, batch)."""
    def logits(params, source):
        return forward(params, config, source, interventions=BY_ROW, capture=READ).logits

    def loss(params, source, scale):
        table = steer(V[0], layers=[0, 1]).edits[0]
        moved = table.replace(coefficients=table.coefficients.at[..., 1].multiply(scale))
        out = forward(params, config, source, interventions=chain(SHARED).replace(edits=(moved,)))
        score = jax.nn.log_softmax(out.logits[:, :-1])
        word = jnp.arange(96, dtype=jnp.int32)[None, None] == source.tokens[:, 1:, None]
        picked = jnp.where(word, score, 0.0).sum(-1)
        return -jnp.where(source.valid[:, 1:], picked, 0.0).mean()

    def slopes(params, source):
        return jax.grad(loss, argnums=(0, 2))(params, source, jnp.float32(0.2))

    def strengths(params, source):
        scales = jnp.asarray([0.0, 0.5], jnp.float32)
        return jax.vmap(loss, (None, None, 0))(params, source, scales)

    return {"jit": logits, "grad": slopes, "vmap": strengths}


@functools.lru_cache
def without_mesh(kind):
    model = one_device("llama")
    return jax.device_get(jax.jit(transforms(model.config)[kind])(model.params, batch(ROWS)))


@pytest.mark.parametrize("kind", ["jit", "grad", "vmap"])
@pytest.mark.parametrize(("shape", "axes"), [
    ("2x4", "explicit"), ("2x4", "explicit, set_mesh"), ("2x4", "auto"), ("spread4x2", "explicit")])
def test_a_user_s_own_transforms_work_on_a_mesh(kind, axes, shape):
    mesh = sharding.make_mesh(**MESHES[shape])
    if axes == "auto":
        mesh = Mesh(mesh.devices, mesh.axis_names,
                    axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    model = spread(one_device("llama"), mesh)
    context = jax.set_mesh(model.mesh) if "set_mesh" in axes else contextlib.nullcontext()
    with context:
        found = jax.jit(transforms(model.config)[kind])(model.params, batch(ROWS))
    assert far(found, without_mesh(kind)) <= 1e-5
    if kind == "grad":  # a gradient has the sharding of its parameter
        for name in ("w_up_fd", "w_down_df", "wq_nhd", "wo_dnh", "attn_norm_d"):
            mine, its = (getattr(x.layers[0], name) for x in (found[0], model.params))
            shares = (x.sharding.shard_shape(x.shape) for x in (mine, its))
            assert len(set(shares)) == 1, name


def decode_step(model, edits=None, reading=None):
    """Return the compiled text of one decode step."""
    config = model.config
    cache = init_cache(config, 8, 32).spread(model.params.embed_vd)

    def step(params, source, cache):
        return forward(params, config, source, interventions=edits, capture=reading,
                       carry=Carry(cache=cache), logits="last")

    one = batch([row[:1] for row in ROWS])
    return jax.jit(step, donate_argnums=2).lower(model.params, one, cache).compile().as_text()


@pytest.mark.parametrize(("family", "shape"), [
    ("llama", "2x4"), *(pytest.param(*case, marks=pytest.mark.slow)
                        for case in (("gemma2", "1x8"), ("llama", "8x1"), ("qwen3", "4x2")))])
def test_a_decode_step_sums_twice_a_layer_and_a_cap_adds_nothing(family, shape):
    model = spread(one_device(family), sharding.make_mesh(**MESHES[shape]))
    plain = hlo.collectives(decode_step(model))
    ways = 0 if shape == "8x1" else 2
    for layer in range(model.config.n_layers):
        inside = hlo.by_layer(plain, layer)
        assert hlo.reductions(inside) == ways, inside
    outside = [op for op in plain if "/layer" not in op.scope]
    assert len(outside) == (ways > 0), outside  # one for the embedding; the logits remain sharded
    capped = hlo.collectives(decode_step(model, chain(SHARED), capture.mean()))
    assert [op.kind for op in capped] == [op.kind for op in plain]
    by_row = hlo.collectives(decode_step(model, BY_ROW))
    assert [op.kind for op in by_row] == [op.kind for op in plain]


def test_new_values_and_rows_do_not_retrace_on_a_mesh():
    model = spread(one_device("llama"), sharding.make_mesh(data=2, model=4))
    traces = []

    @jax.jit
    def counted(params, source, edits):
        traces.append(1)
        return forward(params, model.config, source, interventions=edits, logits="last").logits

    for floor, rows in ((0.5, [0, -1, 1, 0] * 2), (2.0, [1, 1, -1, 0] * 2)):
        edits = cap(V[:2], layers=[0, 1], floor=floor, rows=rows)
        counted(model.params, batch(ROWS), edits)
    assert len(traces) == 1 and counted._cache_size() == 1


def test_a_cap_that_never_binds_is_bit_exact_on_a_mesh():
    model = spread(one_device("qwen3"), sharding.make_mesh(data=2, model=4))
    idle = cap(V, layers=[0, 1], floor=-1e9, rows=[0, 1, 2, -1] * 2)
    plain, capped = (s.run(model.params, model.config, batch(ROWS), interventions=edits,
                           capture=s.READ) for edits in (None, idle))
    assert s.same_bits(plain.logits, capped.logits)
    assert s.same_bits(plain.captured, capped.captured)
    assert not np.asarray(capped.applied[0].changed).any()
