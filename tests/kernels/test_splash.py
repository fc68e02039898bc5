"""Splash attention: parity in interpret mode, its selection, and a pass through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.kernels import attention as kernel
from jaxpersona.kernels import splash as module
from jaxpersona.kernels.splash import splash, splash_fault

import jaxpersona as jp
from jaxpersona.distributed import sharding
from jaxpersona.models import blocks, nn
from jaxpersona.models import forward as model_module
from jaxpersona.models.params import layout

FITS = dict(dtype=jnp.bfloat16, tokens=8192, fresh=True)
BIG = s.tiny_config(head_dim=128)


def agree(seed, dtype=jnp.float32, **fixed):
    """Compare one random case with the reference; return the largest difference."""
    rng = np.random.default_rng(seed)
    kv_heads, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    case = dict(rows=int(rng.integers(1, 4)), width=int(rng.integers(1, 400)),
                head_dim=int(8 * rng.integers(1, 9)),
                window=None if rng.random() < 0.4 else int(rng.integers(1, 300)),
                softcap=None if rng.random() < 0.5 else float(rng.uniform(1, 50))) | fixed
    rows, width = case["rows"], case["width"]
    q, k, v = (jnp.asarray(rng.normal(size=(rows, width, n, case["head_dim"])), dtype)
               for n in (kv_heads * groups, kv_heads, kv_heads))
    length = jnp.asarray(rng.integers(0, width + 1, rows), jnp.int32)
    options = {name: case[name] for name in ("window", "softcap")}
    scale = float(rng.choice([0.125, 0.25]))  # powers of two, so that scaled queries are exact
    got = splash(q, k, v, length, scale=scale, interpret=True, **options)
    at = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))
    inside = at < length[:, None]
    want = nn.attention(q, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), at,
                        jnp.where(inside, at, -1), scale=scale, **options)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert not np.asarray(got, np.float32)[~np.asarray(inside)].any()  # zero at padding
    far = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))
    return float(far[np.asarray(inside)].max(initial=0))


@pytest.mark.parametrize("fixed", [
    dict(width=130, window=None, softcap=None), dict(width=150, window=9, softcap=3.0)],
    ids=["causal", "window-softcap"])
def test_the_kernel_is_the_reference(fixed):
    assert agree(0, **fixed) < 1e-5


def test_in_bfloat16_it_differs_by_rounding_only():
    assert agree(1, jnp.bfloat16, width=140) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_the_kernel_is_the_reference_in_200_cases(block):
    assert max(agree(1000 + 10 * block + i) for i in range(10)) < 1e-5
    jax.clear_caches()


@pytest.mark.slow
def test_gradients_are_those_of_the_reference():
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 140, n, 16)), jnp.float32) for n in (4, 2, 2))
    length = jnp.asarray([140, 60], jnp.int32)
    at = jnp.broadcast_to(jnp.arange(140, dtype=jnp.int32), (2, 140))
    inside = at < length[:, None]

    def by_kernel(q, k, v):
        return splash(q, k, v, length, scale=0.25, window=50, softcap=9.0, interpret=True)

    def by_xla(q, k, v):
        return nn.attention(q, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), at,
                            jnp.where(inside, at, -1), scale=0.25, window=50, softcap=9.0)

    def gradients(attend):
        def loss(*arrays):
            return (jnp.where(inside[..., None, None], attend(*arrays), 0.0) ** 2).sum()
        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for mine, want in zip(gradients(by_kernel), gradients(by_xla), strict=True):
        np.testing.assert_allclose(mine, want, atol=2e-4)


def choice(config=BIG, platform="tpu", **changes):
    return kernel.attention_implementation(config, platform, **{**FITS, **changes})


def test_a_tpu_uses_it_for_long_prompts():
    assert choice() == ("splash", "it is supported")
    assert choice(tokens=kernel.LONG_TPU + 1)[0] == "splash"
    assert choice(tokens=kernel.LONG_TPU) == (
        "xla", f"the batch has {kernel.LONG_TPU} tokens per row; 'auto' uses XLA up to "
               f"{kernel.LONG_TPU}")
    assert choice(tokens=5, asked="splash")[0] == "splash"
    assert choice(s.tiny_config(head_dim=256), dtype=jnp.float32)[0] == "splash"
    gemma = s.tiny_config(head_dim=128, attn_softcap=50.0, windows=(16, None, 16))
    assert choice(gemma, sharded=True)[0] == "splash"
    assert choice(asked="xla") == ("xla", "it was requested")


@pytest.mark.parametrize(("config", "changes", "words"), [
    (BIG, {"platform": "cpu"}, "the platform is cpu"),
    (BIG, {"platform": "gpu"}, "the platform is gpu"),
    (BIG, {"dtype": jnp.float16}, "float16, not bfloat16 or float32"),
    (s.tiny_config(head_dim=12), {}, "12 is not a multiple of 8 up to 256"),
    (s.tiny_config(head_dim=264), {}, "264 is not a multiple of 8 up to 256"),
    (BIG, {"fresh": False}, "earlier tokens")])
def test_what_it_cannot_do_is_an_error_with_its_reason(config, changes, words):
    with pytest.raises(ValueError, match="attention is 'splash', but") as caught:
        choice(config, asked="splash", **changes)
    assert words in str(caught.value) and "use 'auto' or 'xla'" in str(caught.value)
    assert choice(config, **changes)[0] != "splash"  # "auto"


def test_a_version_of_jax_without_it_is_named(monkeypatch):
    assert module.missing() is None
    monkeypatch.setattr(module, "_MODULE", "jax.experimental.no_such_module")
    assert choice()[0] == "xla" and "has no jax.experimental.no_such_module" in choice()[1]
    with pytest.raises(ValueError, match=f"jax {jax.__version__} has no jax.experimental"):
        choice(asked="splash")


def test_its_start_up_test_finds_faults(monkeypatch):
    """Without a TPU nothing is tested; a failing kernel is refused, or replaced aloud."""
    splash_fault.cache_clear()
    assert splash_fault("bfloat16", 16, 2, True, False) is None  # compiled for another machine
    options = dict(dtype=jnp.bfloat16, tokens=8192, fresh=True, sharded=False, platform="tpu")
    assert kernel.choose(BIG, "auto", **options) == "splash"

    def play(change):
        def attend(q, k, v, length, *, scale, window, softcap=None):
            at = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
            inside = at < length[:, None]
            out = nn.attention(q, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), at,
                               jnp.where(inside, at, -1), scale=scale, window=window,
                               softcap=softcap)
            return jnp.where(inside[..., None, None], out + change, 0)
        return attend

    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "splash_fault", lambda *of: asked.append(of))
        gemma = s.tiny_config(head_dim=64, n_heads=8, n_kv_heads=2, attn_softcap=5.0,
                              windows=(16, None, 16))
        for config in (BIG, gemma):
            kernel.choose(config, "auto", **options)
    assert asked == [("bfloat16", 128, 2, False, False), ("bfloat16", 64, 4, True, True)]
    monkeypatch.setattr(module, "tpu", lambda: jax.devices()[0])
    for change, words in ((0.0, None), (0.5, "max error 0.5"), (float("nan"), "max error nan")):
        splash_fault.cache_clear()
        monkeypatch.setattr(module, "splash", play(change))
        found = splash_fault("float32", 16, 2, True, True)
        assert found is None if words is None else words in found
    splash_fault.cache_clear()
    kernel._say_once.cache_clear()
    with pytest.raises(ValueError, match="attention is 'splash', but splash attention failed"):
        kernel.choose(BIG, "splash", **options)
    with pytest.warns(RuntimeWarning, match="instead of splash attention: splash attention fai"):
        assert kernel.choose(BIG, "auto", **options) == "xla"
    splash_fault.cache_clear()


@pytest.mark.parametrize("sizes", [None, dict(data=2, model=4)], ids=["one", "mesh"])
def test_a_forward_pass_through_it_is_the_same_pass(monkeypatch, sizes):
    """Residuals and cache agree, also where each device has only its rows and heads."""
    monkeypatch.setattr(model_module, "choose", lambda config, asked, **_: asked)
    monkeypatch.setattr(blocks, "splash", lambda *arrays, **options: splash(
        *arrays, **options, interpret=True))
    model = s.tiny_model(n_layers=2, windows=(4, None), attn_softcap=5.0, head_dim=16,
                         attn_scale=0.25)
    params = model.params
    if sizes is not None:
        mesh = sharding.fit(sharding.make_mesh(**sizes), model.config)
        assert dict(mesh.shape) == {"data": 2, "model": 2, "group": 2}
        params = jax.tree.map(lambda x, of: jax.device_put(
            x, sharding.weight_sharding(of.axes, of.shape, mesh)), params, layout(model.config))
    batch = jp.batch(s.prompts([11, 4]))
    run = jax.jit(lambda params, batch, attention: jp.forward(
        params, model.config, batch, slots=16, capture=s.READ, attention=attention),
        static_argnums=2)
    plain, mine = (run(params, batch, asked) for asked in ("xla", "splash"))
    full = [np.asarray(out.captured["full"].value) for out in (mine, plain)]
    np.testing.assert_allclose(*full, atol=2e-4)  # NaN at padding in both
    for one, other in zip(jax.tree.leaves(mine.cache), jax.tree.leaves(plain.cache), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
