"""The weight layouts: each multiplies like the dense array, on one device and on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jax.sharding import NamedSharding, PartitionSpec

from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.engine.generate import generate
from jaxpersona.models import int8, prepared, weight
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward
from jaxpersona.models.model import Model

pytestmark = pytest.mark.usefixtures("compile_fast")

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def wanted(x, w, inner):
    """Return x [..., *in] times w [*out, *in] in float64."""
    axes = list(range(-inner, 0))
    return np.tensordot(x.astype(np.float64), w.astype(np.float64), (axes, axes))


SHAPES = [((2, 3, 8), (5, 8), 1), ((1, 1, 8), (4, 3, 8), 1), ((2, 1, 4, 6), (7, 4, 6), 2),
          ((9, 8), (1, 8), 1)]


@pytest.mark.parametrize("x, w, inner", SHAPES)
@pytest.mark.parametrize("form", ["array", "in_out", "int8"])
def test_every_form_multiplies_like_float64(x, w, inner, form):
    x, w = normal(*x), normal(*w)
    forms = {"array": lambda w: w, "in_out": lambda w: weight.transposed(w, inner),
             "int8": lambda w: int8.quantized(w, inner)}
    made = forms[form](jnp.asarray(w))
    if form == "int8":
        w = np.asarray(made.value) * np.expand_dims(
            np.asarray(made.scale), tuple(range(w.ndim - inner, w.ndim)))
    got = weight.dot(jnp.asarray(x), made, inner=inner)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted(x, w, inner), rtol=2e-5, atol=2e-5)


def test_int8_values_are_the_nearest_of_each_channel():
    w = normal(6, 50) * np.array([1e-6, 1, 1e6, 0, 3, 1e-3], np.float32)[:, None]
    made = int8.quantized(jnp.asarray(w))
    scale, value = np.asarray(made.scale), np.asarray(made.value)
    assert value.dtype == np.int8 and np.abs(value.astype(int)).max() == 127
    np.testing.assert_allclose(scale, np.abs(w).max(1) / 127, rtol=1e-6)
    assert (np.abs(value * scale[:, None] - w) <= scale[:, None] / 2 * 1.001).all()
    assert not value[3].any() and scale[3] == 0  # a channel of zeros remains zero instead of NaN


@pytest.mark.parametrize("form", [weight.Dense, weight.transposed, int8.quantized])
def test_joined_weights_give_each_product(form):
    ws = [normal(*out, 8) for out in ((4, 3), (2, 3), (5,))]
    x = jnp.asarray(normal(2, 3, 8))
    made = weight.joined([jnp.asarray(w) for w in ws], form)
    apart = weight.dots(x, [form(jnp.asarray(w)) if form is int8.quantized else jnp.asarray(w)
                            for w in ws])
    together = weight.dots(x, made)
    assert [y.shape for y in together] == [(2, 3, 4, 3), (2, 3, 2, 3), (2, 3, 5)]
    for one, other in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [("model", None), (None, "model"), ("fsdp", None)])
def test_int8_on_a_mesh_is_the_same(spec):
    mesh = make_mesh(model=2, fsdp=2, devices=jax.devices()[:4])
    w = int8.quantized(jnp.asarray(normal(8, 16)))
    x = jnp.asarray(normal(4, 3, 16))
    alone = weight.dot(x, w)
    with_mesh = w.replace(
        value=jax.device_put(w.value, NamedSharding(mesh, PartitionSpec(*spec))),
        scale=jax.device_put(w.scale, NamedSharding(mesh, PartitionSpec(None))))
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(
        None, None, "model" if spec[1] else None)))
    got = weight.dot(x, with_mesh, axes=("batch", None, None))
    np.testing.assert_allclose(jax.device_get(got), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "tied"), [
    ("qwen3", False), ("gemma2", True), ("qwen2", True),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("qwen3", True), ("gemma2", False), ("qwen2", False)))])
def test_joined_parameters_compute_the_same(family, tied):
    model = s.tiny_model(family=family, tied_embeddings=tied)
    rows, run = batch([[5, 6, 7, 8], [3, 4]]), jax.jit(forward)
    plain, got = (run(p, model.config, rows, capture=s.READ)
                  for p in (model.params, prepared.with_joined(model.params)))
    assert s.relative(got.logits, plain.logits)[..., :2].max() < 1e-5
    assert s.relative(got.captured["full"].value[:, :, :2],
                      plain.captured["full"].value[:, :, :2]).max() < 1e-5


@pytest.mark.parametrize("join", [True, False])
def test_int8_parameters_are_close(join):
    model = s.tiny_model(d_model=64)
    rows, run = batch([[5, 6, 7, 8], [3, 4, 9, 1]]), jax.jit(forward)
    plain = run(model.params, model.config, rows).logits
    got = run(prepared.in_int8(model.params, join=join), model.config, rows).logits
    assert 1e-4 < s.relative(got, plain).max() < 0.1


def test_a_gpu_joins_weights_where_the_copy_fits(monkeypatch):
    tiny = s.tiny_model()
    model = Model(tiny.config, tiny.params, None, None, "m", tiny.fingerprint, (), False)
    monkeypatch.setattr(prepared, "platform", lambda *_: "gpu")
    monkeypatch.setattr(prepared, "_memory", lambda _: 0)
    assert prepared.fast_params(model, 8) is model.params
    layer = model.params.layers[0]
    copied = model.config.n_layers * sum(w.nbytes for w in (
        layer.wq_nhd, layer.wk_khd, layer.wv_khd, layer.w_gate_fd, layer.w_up_fd))
    needed = 2 * (model.config.bytes(4) + copied)
    monkeypatch.setattr(prepared, "_memory", lambda _: needed - 1)
    assert prepared.fast_params(model, 8) is model.params
    monkeypatch.setattr(prepared, "_memory", lambda _: needed)
    fast = prepared.fast_params(model, 1)
    assert fast.layers[0].joined_qkv is not None and fast.layers[0].wq_nhd is None
    assert fast.layers[0].wo_dnh is layer.wo_dnh  # not copied
    assert prepared.fast_params(model, 32) is fast


def test_joined_weights_generate_the_same_tokens(monkeypatch):
    tiny = s.tiny_model()
    model = Model(tiny.config, tiny.params, None, None, "m", tiny.fingerprint, (), False)
    prompts, how = s.prompts((5, 9, 3)), dict(max_new_tokens=8, batch_size=4)
    before = generate(model, prompts, **how)
    calls = []

    def fast(model, rows):
        calls.append(rows)
        return prepared.with_joined(model.params)

    monkeypatch.setattr("jaxpersona.engine.generate.fast_params", fast)
    after = generate(model, prompts, **how)
    assert calls and s.same_bits(before.tokens, after.tokens)
