"""The fused end of a block: parity with plain JAX, bits, refusals, and passes through it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.kernels import edit as kernel
from jaxpersona.kernels.edit import Norm, SiteEdit, site

import jaxpersona as jp
from jaxpersona.distributed import sharding
from jaxpersona.interventions.fusion import Fusion
from jaxpersona.models.params import layout


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def draw(seed, dtype, **fixed):
    """Draw the arguments of `site` at random."""
    rng = np.random.default_rng(seed)
    case = dict(rows=int(rng.integers(1, 6)), width=int(rng.choice([1, 1, 3, 17, 40, 300])),
                size=int(rng.choice([8, 24, 128])), edits=int(rng.integers(0, 4)),
                reads=int(rng.choice([0, 1, 3, 11])), normed=bool(rng.random() < 0.8)) | fixed
    rows, width, size = case["rows"], case["width"], case["size"]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    edits = []
    for _ in range(case["edits"]):
        count = rows if rng.random() < 0.6 else 1  # each row's own setting, or one for all
        low, high = np.sort(rng.normal(size=(2, count)), 0).astype(np.float32)
        low[rng.random(count) < 0.3], high[rng.random(count) < 0.3] = -np.inf, np.inf
        edits.append(SiteEdit(
            jnp.asarray(unit(normal(count, size)), jnp.float32),
            (1 + normal(count) * float(rng.choice([0.0, 0.3])),
             normal(count) * float(rng.choice([0.0, 1.0])), jnp.asarray(low), jnp.asarray(high)),
            jnp.asarray(rng.random((rows, width)) < rng.choice([0.0, 0.6, 1.0])),
            jnp.asarray(unit(normal(count, size)), jnp.float32) if rng.random() < 0.3 else None))
    arrays = normal(rows, width, size).astype(dtype), normal(rows, width, size).astype(dtype), edits
    options = {"before": 0, "directions": None, "norm": None}
    if case["reads"]:
        options["directions"] = jnp.asarray(unit(normal(case["reads"], size)), jnp.float32)
        options["before"] = case.get("before", int(rng.integers(0, case["reads"] + 1)))
    if case["normed"]:
        options["norm"] = Norm(normal(size).astype(dtype), 1e-6, float(rng.choice([0.0, 1.0])))
    return arrays, options


def run(arrays, options, implementation):
    fixed = {**options, "implementation": implementation}
    return jax.jit(lambda *given: site(*given, **fixed))(*arrays)


def agree(seed, dtype=jnp.float32, far=1e-5, **fixed):
    arrays, options = draw(seed, dtype, **fixed)
    want, mine = (run(arrays, options, name) for name in ("xla", "interpret"))
    for one, other in zip(mine, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape and one.dtype == other.dtype
    np.testing.assert_array_equal(mine.changed, want.changed)
    for one, other in ((mine.h, want.h), (mine.read, want.read), (mine.normed, want.normed)):
        if one is not None:
            one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
            np.testing.assert_allclose(one, other, atol=far, rtol=far)
    return int(mine.changed.sum())


@pytest.mark.parametrize(("seed", "fixed"), [
    (0, dict(rows=3, width=40, edits=2, reads=3, normed=True)),
    (1, dict(rows=5, width=1, edits=3, reads=11, normed=True)),
    (2, dict(rows=2, width=300, size=24, edits=1, reads=0, normed=False)),
    (4, dict(rows=2, width=17, size=24, edits=2, reads=20, before=10, normed=False)),
    (5, dict(rows=2, width=3, size=24, edits=2, reads=6, before=3, normed=False))],
    ids=["prefill", "decode", "blocks", "products", "sums"])
def test_the_kernel_is_the_reference(seed, fixed):
    assert agree(seed, **fixed) > 0


def test_in_bfloat16_it_differs_by_rounding_only():
    agree(3, jnp.bfloat16, far=0.02, rows=3, width=17, edits=2, reads=3)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_the_kernel_is_the_reference_in_200_cases(block):
    changed = [agree(1000 + 20 * block + i) for i in range(20)]
    assert sum(changed) > 0
    for i in range(4):
        agree(5000 + 4 * block + i, jnp.bfloat16, far=0.05)
    jax.clear_caches()


@pytest.mark.parametrize("width", [1, 21])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_an_edit_that_never_binds_changes_no_bit(dtype, width):
    """The residual is that of XLA; residual and norm are those of the kernel without edits."""
    (x, added, edits), options = draw(7, dtype, rows=3, width=width, size=24, edits=2, reads=0,
                                      normed=True)
    x, added = x.at[0, 0, 0].set(-0.0), added.at[0, 0, 0].set(-0.0)
    free = tuple(jnp.full((3,), value, jnp.float32) for value in (1, 0, -np.inf, np.inf))
    wide = tuple(jnp.full((1,), value, jnp.float32) for value in (1, 0, -100, 100))
    everywhere = jnp.ones((3, width), bool)
    idle = [SiteEdit(jnp.broadcast_to(edits[0].direction[:1], (3, 24)), free, everywhere),
            SiteEdit(edits[1].direction[:1], wide, everywhere)]
    plain = run((x, added, []), options, "interpret")
    capped = run((x, added, idle), options, "interpret")
    by_xla = run((x, added, idle), options, "xla")
    assert not capped.changed.any() and plain.changed.shape == (0, 3)
    assert s.same_bits(plain.h, capped.h) and s.same_bits(capped.h, by_xla.h)
    assert s.same_bits(plain.normed, capped.normed)
    assert np.signbit(np.asarray(capped.h, np.float32)[0, 0, 0])


def test_nan_passes_through():
    (x, added, edits), options = draw(8, jnp.float32, rows=2, width=5, size=8, edits=1, reads=1)
    found = run((x.at[1, 2, 3].set(jnp.nan), added, edits), options, "interpret")
    bad = np.isnan(np.asarray(found.h)).any(-1)
    assert bad.sum() == 1 and bad[1, 2]


def interventions(model, rows):
    """Steering and a cap with a push per row, a gate, an ablation, and an edit of the MLP."""
    rng = np.random.default_rng(5)
    v = rng.normal(size=(4, model.config.d_model)).astype(np.float32)
    gated = jp.gate(jp.cap(v[1], layers=[1, 2], floor=0.5), v[0], layer=0, over="token",
                    above=-0.5)
    pushed = jp.cap(v[:2], layers=[1, 2], floor=1.0, push=v[2:], rows=[0, 1, -1, 1][:rows])
    return jp.chain(jp.steer(v[:2], layers=[0, 1], scale=0.7, rows=[1, -1, 0, 1][:rows]), gated,
                    pushed, jp.ablate(v[2], layers=2),
                    jp.steer(v[3], layers=1, scale=0.3, site="mlp"))


def readings(model):
    v = np.random.default_rng(6).normal(size=(3, model.config.d_model))
    return (jp.capture.projections(v) | jp.capture.projections(
        v[:1], layers=[1, 2], name="early").before_edits() | jp.capture.moments(v[1:])
        | jp.capture.histogram(v[:1], [-1.0, 0.0, 1.0], "everywhere")
        | jp.capture.histogram(v[:2, None], [[[-0.5, 0.5]], [[0.0, 9.0]]], "everywhere",
                               layers=[0, 2], name="of each layer") | s.READ)


def both(model, params, batch, step):
    """Run a prefill and a decode step with each implementation."""
    outs = {}
    for name in ("xla", "interpret"):
        run = jax.jit(lambda params, batch, carry, name=name, **options: jp.forward(
            params, model.config, batch, carry=carry, residual=name, logits="last",
            interventions=interventions(model, batch.tokens.shape[0]), capture=readings(model),
            **options), static_argnames="slots")
        first = run(params, batch, None, slots=24)
        outs[name] = first, run(params, step, first.carry)
    return outs


@pytest.mark.parametrize("sizes", [
    pytest.param(None, marks=pytest.mark.slow), dict(data=2, model=2)], ids=["one", "mesh"])
def test_a_pass_through_the_kernel_is_the_same_pass(sizes):
    """Edits of several kinds, gates, rows, padding and all readings, in prefill and decode."""
    model = s.tiny_model(norm_offset=1.0, post_norms=True)
    params, lengths = model.params, [11, 4, 7]
    if sizes is not None:
        lengths = lengths + [5]
        mesh = sharding.fit(sharding.make_mesh(**sizes), model.config)
        params = jax.tree.map(lambda x, of: jax.device_put(
            x, sharding.weight_sharding(of.axes, of.shape, mesh)), params, layout(model.config))
    batch = jp.batch(s.prompts(lengths))
    step = jp.batch(s.prompts([1] * len(lengths), seed=1)).replace(
        position=np.array(lengths, np.int32)[:, None])
    outs = both(model, params, batch, step)
    for mine, want in zip(outs["interpret"], outs["xla"], strict=True):
        np.testing.assert_allclose(mine.logits, want.logits, atol=2e-4)
        for one, other in zip(mine.applied, want.applied, strict=True):
            np.testing.assert_array_equal(one.changed, other.changed)
            np.testing.assert_array_equal(one.seen, other.seen)
        for name, state in want.captured.items():
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
                         mine.captured[name], state)
    assert sum(int(x.changed.sum()) for x in outs["xla"][0].applied) > 10


def test_a_cap_that_never_binds_changes_no_bit_of_a_pass():
    model = s.tiny_model(dtype=jnp.bfloat16)
    batch = jp.batch(s.prompts([9, 4]))
    idle = jp.cap(np.ones(32), layers=range(3), floor=-1e6)
    plain, capped = (jax.jit(lambda batch, edits=edits: jp.forward(
        model.params, model.config, batch, interventions=edits, residual="interpret"))(batch)
        for edits in (None, idle))
    assert s.same_bits(plain.logits, capped.logits)
    assert not np.asarray(capped.applied[0].changed).any()
    assert int(capped.applied[0].seen.sum()) == 13


def test_what_the_kernel_cannot_do_is_an_error_with_its_reason():
    model = s.tiny_model()
    batch = jp.batch(s.prompts([3]))
    v = np.eye(32, dtype=np.float32)[:2]

    def refused(words, residual="interpret", **options):
        with pytest.raises(ValueError, match=words):
            jp.forward(model.params, model.config, batch, residual=residual, **options)

    refused("residual is 'fast'; it must be one of xla, pallas, interpret", "fast")
    refused("residual is 'pallas', but the platform is cpu, and the kernel is written for TPUs; "
            "use 'xla'", "pallas")
    refused("layer 1 has a Rotation, which is not a rank-one edit",
            interventions=jp.rotate(v[0], v[1], layers=1, by=0.5))
    refused("the reading 'mean' reads layer 1 before the edits",
            interventions=jp.cap(v[0], layers=1, floor=0.0),
            capture=jp.capture.mean("everywhere").before_edits())
    # at another site, and without edits at its layer, both are computed
    jp.forward(model.params, model.config, batch, residual="interpret",
               interventions=jp.rotate(v[0], v[1], layers=1, by=0.5, site="mlp"),
               capture=jp.capture.mean("everywhere").before_edits())
    with pytest.raises(ValueError, match="implementation is 'triton'"):
        site(jnp.ones((1, 1, 8)), jnp.ones((1, 1, 8)), implementation="triton")


def test_the_limits_of_the_kernel_are_named():
    assert kernel.refusal("tpu", 4096, 1, 4) is None
    assert "the platform is gpu" in kernel.refusal("gpu", 4096, 1, 4)
    for width in (96, 192):
        assert f"{width} of the residual stream is not a multiple of 128" in kernel.refusal(
            "tpu", width, 1, 4)
    assert "exceeds" in kernel.refusal("tpu", 8192, 1, 1000)
    # in a decode step, each token of a block belongs to a row with vectors of its own
    assert kernel._block(4096, 2, 4, 0, False) == 64 and kernel._block(4096, 2, 4, 0, True) == 32
    # two inputs and two outputs are kept twice, so float32 needs 8·8·2·D bytes more
    assert kernel.refusal("tpu", 8192, 1, 250) is None
    assert "exceeds" in kernel.refusal("tpu", 8192, 1, 250, itemsize=4)
    assert kernel._block(4096, 2, 1, 0, False) > kernel._block(8192, 2, 1, 0, False)
    read = jp.capture.projections(np.eye(250, 8192)).readings["projections"]
    x = jnp.zeros((1, 8, 8192), jnp.float32)
    with pytest.raises(ValueError, match="residual is 'pallas', but a block of 8 tokens of width"):
        Fusion("pallas", "tpu").run(0, x, x, [], [], {"read": (read, 0)}, None)
