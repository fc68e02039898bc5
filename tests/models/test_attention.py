"""Selection of the attention implementation, its messages, and parity of flash attention."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.kernels import attention as kernel
from jaxpersona.kernels.probe import definition

import jaxpersona as jp
from jaxpersona.models import blocks, nn
from jaxpersona.models import forward as model_module

FITS = dict(platform="gpu", dtype=jnp.bfloat16, tokens=2048, fresh=True, capability=9.0)
BIG = s.tiny_config(head_dim=128)


def choice(config=BIG, **changes):
    options = {**FITS, **changes}
    return kernel.attention_implementation(config, options.pop("platform"), **options)


def test_cudnn_is_chosen_where_it_fits():
    """Long half-precision prompts on a GPU use cuDNN, also with windows and large heads."""
    assert choice() == ("cudnn", "it is supported")
    assert choice(dtype=jnp.float16)[0] == "cudnn"
    assert choice(s.tiny_config(head_dim=64, windows=(16, None, 16)))[0] == "cudnn"
    assert choice(s.tiny_config(head_dim=256))[0] == "cudnn"
    assert choice(tokens=8, asked="cudnn")[0] == "cudnn"


@pytest.mark.parametrize(("config", "changes", "words"), [
    (BIG, {"platform": "cpu"}, "the platform is cpu"),
    (BIG, {"capability": 7.5}, "capability 7.5 is below 8"),
    (s.tiny_config(head_dim=128, attn_softcap=50.0), {}, "soft-caps"),
    (BIG, {"dtype": jnp.float32}, "float32, not bfloat16"),
    (s.tiny_config(head_dim=12), {}, "12 is not a multiple of 8 up to 256"),
    (s.tiny_config(head_dim=256), {"capability": 8.0}, "256 is not a multiple of 8 up to 128"),
    (BIG, {"fresh": False}, "earlier tokens"), (BIG, {"sharded": True}, "over a mesh"),
])
def test_what_does_not_fit_goes_to_xla_with_its_reason(config, changes, words):
    """Each reason by itself makes "auto" select XLA, and "cudnn" raise an error."""
    found, reason = choice(config, **changes)
    assert found == "xla" and words in reason
    assert choice(config, **changes, asked="xla") == ("xla", "it was requested")
    with pytest.raises(ValueError, match="attention is 'cudnn', but") as caught:
        choice(config, **changes, asked="cudnn")
    assert words in str(caught.value) and "use 'auto' or 'xla'" in str(caught.value)


def test_short_prompts_stay_and_nonsense_is_refused():
    """"auto" uses XLA for few tokens; other names of implementations are rejected."""
    assert choice(tokens=kernel.LONG)[0] == "xla" and choice(tokens=kernel.LONG + 1)[0] == "cudnn"
    with pytest.raises(ValueError, match="is 'flash'; it must be auto, xla, cudnn or splash"):
        choice(asked="flash")
    with pytest.raises(ValueError, match="attention is 'cudnn', but the platform is tpu"):
        choice(platform="tpu", asked="cudnn")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_flash_is_the_reference_within_each_row(window, groups):
    """The masks of `flash` (causal, lengths, window, groups) equal those of `nn.attention`."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 17, n, 8)), jnp.float32)
               for n in (2 * groups, 2, 2))
    length = jnp.asarray([17, 9, 0], jnp.int32)
    got = kernel.flash(q, k, v, length, scale=0.3, window=window, implementation="xla")
    at = jnp.broadcast_to(jnp.arange(17, dtype=jnp.int32), (3, 17))
    inside = at < length[:, None]
    want = nn.attention(q, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), at,
                        jnp.where(inside, at, -1), scale=0.3, window=window)
    np.testing.assert_allclose(got[inside], want[inside], atol=1e-5)
    assert not np.asarray(got[~inside]).any()


def by_numpy(q, k, v, length, scale, window):
    """Compute attention in float64, query by query over its visible keys; zero at padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    groups, out = q.shape[2] // k.shape[2], np.zeros(q.shape)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        for t in range(int(length[b])):
            first = 0 if window is None else max(0, t - window + 1)
            scores = scale * (k[b, first : t + 1, n // groups] @ q[b, t, n])
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights / weights.sum() @ v[b, first : t + 1, n // groups]
    return out


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_both_forms_are_attention_by_numpy(window, groups):
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.normal(size=(3, 11, n, 8)), jnp.float32)
               for n in (2 * groups, 2, 2))
    length = np.array([11, 6, 0], np.int32)
    want = by_numpy(q, k, v, length, 0.3, window)
    flash = kernel.flash(q, k, v, jnp.asarray(length), scale=0.3, window=window,
                         implementation="xla")
    np.testing.assert_allclose(flash, want, atol=1e-5)
    at = np.broadcast_to(np.arange(11, dtype=np.int32), (3, 11))
    inside = at < length[:, None]
    ours = nn.attention(q, jnp.moveaxis(k, 2, 1), jnp.moveaxis(v, 2, 1), jnp.asarray(at),
                        jnp.asarray(np.where(inside, at, -1)), scale=0.3, window=window)
    np.testing.assert_allclose(np.asarray(ours)[inside], want[inside], atol=1e-5)
    # the reference for the cuDNN test uses the scale 1/√H
    np.testing.assert_allclose(
        definition(*(np.asarray(x) for x in (q, np.repeat(k, groups, 2),
                                             np.repeat(v, groups, 2))), length, window),
        by_numpy(q, k, v, length, 8**-0.5, window), atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_what_cudnn_is_asked_for_and_its_padding_is_zero(monkeypatch, window):
    """cuDNN's output at padding is undefined and must not be returned."""
    asked = []

    def cudnn(q, k, v, **options):
        asked.append(options)
        return jnp.full(q.shape, jnp.nan).at[0].set(1.0).at[1, :4].set(2.0).astype(q.dtype)

    monkeypatch.setattr(kernel.jax.nn, "dot_product_attention", cudnn)
    q, k = (jnp.ones((2, 7, n, 8), jnp.bfloat16) for n in (4, 2))
    length = jnp.asarray([7, 4], jnp.int32)
    got = np.asarray(kernel.flash(q, k, k, length, scale=0.3, window=window), np.float32)
    np.testing.assert_array_equal(got[:, :, 0, 0], [[1] * 7, [2] * 4 + [0] * 3])
    said = asked[0]
    assert said["implementation"] == "cudnn" and said["is_causal"] and said["scale"] == 0.3
    assert said["local_window_size"] == (None if window is None else (4, 0))
    for name in ("query_seq_lengths", "key_value_seq_lengths"):
        np.testing.assert_array_equal(said[name], length)


@pytest.fixture
def pretend(monkeypatch):
    """Make the forward pass use `flash`, computed by XLA."""
    def chosen(config, asked, **said):
        chosen.said = said
        return "cudnn" if asked == "auto" and said["fresh"] else "xla"

    def flash(*arrays, **options):
        return kernel.flash(*arrays, **options, implementation="xla")

    monkeypatch.setattr(model_module, "choose", chosen)
    monkeypatch.setattr(blocks, "flash", flash)
    return chosen


@pytest.mark.parametrize("windows", [
    pytest.param((None,) * 3, marks=pytest.mark.slow), (4, None, 4)])
def test_a_forward_pass_through_flash_is_the_same_pass(pretend, windows):
    """Logits, activations and cache of right-padded rows agree, with and without a new cache."""
    model = s.tiny_model(windows=windows)
    batch = jp.batch(s.prompts([11, 4, 7]))
    run = jax.jit(lambda *arrays, **options: jp.forward(model.params, model.config, *arrays,
                                                        **options),
                  static_argnames=("slots", "attention"))
    for slots in (None, 16):
        outs = {asked: run(batch, slots=slots, capture=s.READ, attention=asked)
                for asked in ("xla", "auto")}
        assert pretend.said == {"dtype": jnp.float32, "tokens": 11, "fresh": True, "sharded": False,
                                "platform": "cpu"}
        valid = np.asarray(batch.valid)
        plain, flash = (outs[name] for name in ("xla", "auto"))
        np.testing.assert_allclose(flash.logits[valid], plain.logits[valid], atol=2e-4)
        full = [np.asarray(out.captured["full"].value) for out in (flash, plain)]
        np.testing.assert_allclose(*full, atol=2e-4)  # NaN at padding in both
        if slots is not None:
            chex.assert_trees_all_close(flash.cache, plain.cache, rtol=1e-7, atol=2e-4)
            step = jp.batch(s.prompts([1, 1, 1], seed=1))
            said = [run(step, carry=jp.Carry(cache=out.cache), attention="auto")
                    for out in (flash, plain)]
            assert not pretend.said["fresh"]
            np.testing.assert_allclose(said[0].logits, said[1].logits, atol=2e-4)


def test_a_new_cache_is_the_one_that_was_given_before():
    """`slots` gives the same bits as `init_cache` (float32); giving both raises an error."""
    model = s.tiny_model()
    batch = jp.batch(s.prompts([5, 9]))
    made = jp.forward(model.params, model.config, batch, slots=16)
    given = jp.forward(model.params, model.config, batch,
                       carry=jp.Carry(cache=jp.init_cache(model.config, 2, 16)))
    assert s.same_bits((made.logits, made.cache), (given.logits, given.cache))
    with pytest.raises(ValueError, match="9 tokens per row, .*but the cache has 8 slots"):
        jp.forward(model.params, model.config, batch, slots=8)
    with pytest.raises(ValueError, match="a carry with a cache, to continue it, or slots"):
        jp.forward(model.params, model.config, batch, carry=given.carry, slots=16)


@pytest.mark.parametrize(("slots", "barriers"), [(640, 3), (None, 0)])
def test_cudnn_s_cache_is_written_layer_by_layer(monkeypatch, slots, barriers):
    """In each of three layers, a barrier forces the cache write before attention."""
    from jaxpersona.models import forward as engine

    monkeypatch.setattr(engine, "choose", lambda *_, **__: "cudnn")
    monkeypatch.setattr(blocks, "flash", lambda q, *_, **__: q)  # cuDNN is not available here
    model = s.tiny_model(dtype=jnp.bfloat16, head_dim=16)
    text = jax.make_jaxpr(lambda params, batch: jp.forward(
        params, model.config, batch, slots=slots, logits="last"))(
            model.params, jp.batch(s.prompts([600, 40])))
    held = [eqn for eqn in text.jaxpr.eqns if eqn.primitive.name == "optimization_barrier"
            and len(eqn.outvars) == 4]
    assert len(held) == barriers


def test_a_cpu_is_never_changed_and_never_warned(recwarn):
    """On a CPU, "auto" equals "xla" and gives no warning, and "cudnn" raises an error."""
    model = s.tiny_model(dtype=jnp.bfloat16, head_dim=16)
    batch = jp.batch(s.prompts([kernel.LONG + 1, 40]))
    run = jax.jit(jp.forward, static_argnames=("attention", "slots"))
    auto, xla = (run.lower(model.params, model.config, batch, slots=640, attention=asked)
                 .as_text() for asked in ("auto", "xla"))
    assert auto == xla
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    with pytest.raises(ValueError, match="the platform is cpu"):
        jp.forward(model.params, model.config, batch, attention="cudnn")


def test_a_gpu_without_cudnn_says_so_once(monkeypatch):
    """Unsupported or failing cuDNN causes one warning and a fallback to XLA."""
    device = type("Device", (), {"compute_capability": "9.0"})()
    monkeypatch.setattr(kernel.jax, "local_devices", lambda backend: [device])
    options = dict(dtype=jnp.bfloat16, tokens=2048, fresh=True, sharded=False, platform="gpu")
    kernel._say_once.cache_clear()
    capped = s.tiny_config(head_dim=128, attn_softcap=5.0)
    with pytest.warns(RuntimeWarning, match="instead of cuDNN's: the model soft-caps"):
        assert kernel.choose(capped, "auto", **options) == "xla"
    assert kernel.choose(capped, "auto", **options) == "xla"
    # no warning for short prompts or decode steps
    for changes in ({"tokens": 64}, {"fresh": False}):
        assert kernel.choose(BIG, "auto", **{**options, **changes}) == "xla"
    monkeypatch.setattr(kernel, "cudnn_fault", lambda *of: "cuDNN's attention failed its test (x)")
    with pytest.warns(RuntimeWarning, match="instead of cuDNN's: cuDNN's attention failed"):
        assert kernel.choose(BIG, "auto", **options) == "xla"
    with pytest.raises(ValueError, match="attention is 'cudnn', but cuDNN's attention failed"):
        kernel.choose(BIG, "cudnn", **options)
    asked = []
    monkeypatch.setattr(kernel, "cudnn_fault", lambda *of: asked.append(of))
    windowed = s.tiny_config(head_dim=64, n_heads=8, n_kv_heads=2, windows=(16, None, 16))
    kernel.choose(windowed, "auto", **options)
    kernel.choose(BIG, "auto", **{**options, "dtype": jnp.float16})
    assert asked == [("bfloat16", 64, 4, True), ("float16", 128, 2, False)]
    assert {kernel.choose(BIG, asked, **options) for asked in ("auto", "cudnn")} == {"cudnn"}


def test_the_start_up_test_runs_in_a_trace_and_finds_faults(monkeypatch):
    """`cudnn_fault` detects wrong results and exceptions, and can be called while tracing."""
    true = kernel.flash
    kernel.cudnn_fault.cache_clear()
    assert "failed its test" in str(kernel.cudnn_fault("bfloat16", 16, 2, False))  # there is no GPU

    def play(change):
        def flash(*arrays, **options):
            wide = [x.astype(jnp.float32) for x in arrays[:3]]
            out = true(*wide, arrays[3], **options, implementation="xla")
            return (out + change).astype(arrays[0].dtype)
        return flash

    def in_a_trace():
        said = []
        jax.jit(lambda x: said.append(kernel.cudnn_fault("bfloat16", 16, 2, True)) or x)(1)
        return str(said[0])

    for change, fault in ((0.0, "None"), (0.5, "max error 0.5"), (float("nan"), "max error nan")):
        kernel.cudnn_fault.cache_clear()
        monkeypatch.setattr(kernel, "flash", play(change))
        assert fault in in_a_trace()
    kernel.cudnn_fault.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize(("head_dim", "groups"), [(64, 1), (128, 4), (128, 8)])
def test_cudnn_agrees_on_a_gpu(head_dim, groups, windowed):
    """On a GPU, cuDNN passes its test for the shapes of Llama, Qwen and Mistral."""
    assert kernel.cudnn_fault("bfloat16", head_dim, groups, windowed) is None


@pytest.mark.parametrize(("name", "words"), [
    ("gfx90a", "capability 0 is below 8"), ("7.5", "capability 7.5 is below 8"),
    (None, "capability 0 is below 8")])
def test_a_gpu_without_a_known_capability_uses_xla(monkeypatch, name, words):
    """The capability of an AMD GPU is a name, and a GPU may be absent while compiling for it."""
    device = type("Device", (), {"compute_capability": name})()

    def devices(backend):
        if name is None:
            raise RuntimeError("no GPU")
        return [device]

    monkeypatch.setattr(kernel.jax, "local_devices", devices)
    options = dict(dtype=jnp.bfloat16, tokens=2048, fresh=True, sharded=False, platform="gpu")
    kernel._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=words):
        assert kernel.choose(BIG, "auto", **options) == "xla"
    with pytest.raises(ValueError, match=words):
        kernel.choose(BIG, "cudnn", **options)
    assert kernel.choose(BIG, "xla", **options) == "xla"
