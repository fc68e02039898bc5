"""Captures compared with NumPy on all activations: in one pass, in chunks and during generation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.captures.missing import describe_empty
from jaxpersona.engine.extract import extract
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import gate, steer
from jaxpersona.interventions.where import NAMED, everywhere, generated, prompt, response
from jaxpersona.models.batch import ASSISTANT, GENERATED, TEMPLATE, USER, batch, split
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.forward import forward
from jaxpersona.vectors.vector import Axis

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = s.tiny_model()
LENGTHS, WIDTH, TURNS = (14, 9, 3), 14, 3
RNG = np.random.default_rng(7)
KIND = [RNG.choice([USER, TEMPLATE, ASSISTANT, ASSISTANT | GENERATED], n) for n in LENGTHS]
KIND[2][:] = USER  # a row without response tokens
TURN = [np.sort(RNG.integers(0, TURNS + 1, n)) for n in LENGTHS]  # one more turn than is captured
ROWS = batch(s.prompts(LENGTHS), kind=KIND, turn=TURN)
K = RNG.normal(size=(4, 32))
EACH = RNG.normal(size=(2, 1, 32))
AXIS = Axis(RNG.normal(size=(3, 32)))
SITES = ("residual", "attention", "mlp")
EDGES = np.linspace(-1.5, 1.5, 7)
OWN = np.sort(RNG.normal(size=(2, 1, 5)), -1)  # different edges for each layer and direction
READ = (
    capture.mean() | capture.mean(everywhere, layers=[0, 2], name="two")
    | capture.mean(response, turns=TURNS, name="turns")
    | capture.last() | capture.last(response, layers=1, name="last response")
    | capture.projections(K) | capture.projections(EACH, response, layers=[0, 2], name="each")
    | capture.projections(AXIS, layers=slice(1, 3), name="axis")
    | capture.norms(response, layers=[1]) | capture.moments(K) | capture.histogram(K, EDGES)
    | capture.moments(EACH, everywhere, layers=[0, 2], name="each moments")
    | capture.histogram(EACH, OWN, everywhere, layers=[0, 2], name="each bins")
)
for site in SITES:
    READ = READ | capture.full(site=site, name=f"full {site}")
READ = READ | capture.mean(everywhere, site="mlp", name="mlp") | capture.full(response, name="some")


def unit(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def mean_of(h, chosen):
    """Return [B, L, D]: the mean of h [B, L, T, D] over chosen [B, T]; NaN if none is chosen."""
    return np.stack([h[b][:, chosen[b]].mean(1) if chosen[b].any()
                     else np.full(h.shape[1:2] + h.shape[3:], np.nan) for b in range(len(h))])


def expected(h, mlp):
    """Compute every reading in READ with NumPy from residuals h and MLP outputs, [B, L, T, D]."""
    kind, turn = np.asarray(ROWS.kind), np.asarray(ROWS.turn)
    valid = kind & 1 > 0
    said = valid & (kind & ASSISTANT > 0) & (kind & TEMPLATE == 0)

    def last_of(chosen):
        at = [np.flatnonzero(c)[-1] if c.any() else None for c in chosen]
        return np.stack([h[b][:, i] if i is not None else np.full_like(h[b][:, 0], np.nan)
                         for b, i in enumerate(at)])

    def only(x, chosen):
        return np.where(chosen[:, None, :, None], x, np.nan)

    def moments_of(p, chosen):
        """Return (count, mean, variance) of p [B, L, T, K] over chosen [B, T]."""
        rows = [p[b][:, chosen[b]] if chosen[b].any() else np.full_like(p[b][:, :1], np.nan)
                for b in range(len(p))]
        return (chosen.sum(1), np.stack([x.mean(1) for x in rows]),
                np.stack([x.var(1) for x in rows]))

    def bins_of(p, chosen, edges):
        """Compute bins [B, L, K, E + 1] with NumPy."""
        b, n, _, k = p.shape
        edges = np.broadcast_to(edges, (n, k, edges.shape[-1]))
        out = np.zeros((b, n, k, edges.shape[-1] + 1), int)
        for i, j, c in np.ndindex(b, n, k):
            inner = [-np.inf, *edges[j, c].astype(np.float32), np.inf]
            out[i, j, c] = np.histogram(p[i, j, chosen[i], c].astype(np.float32), inner)[0]
        return out

    by_k, by_each = h @ unit(K).T, np.einsum("bltd,lkd->bltk", h[:, [0, 2]], unit(EACH))
    return {
        "norms": only(np.linalg.norm(h, axis=-1)[..., None], said)[:, 1:2, :, 0],
        "moments": moments_of(by_k, said), "each moments": moments_of(by_each, valid),
        "histogram": bins_of(by_k, said, EDGES), "each bins": bins_of(by_each, valid, OWN),
        "mean": mean_of(h, said), "two": mean_of(h, valid)[:, [0, 2]],
        "turns": np.stack([mean_of(h, said & (turn == m)) for m in range(TURNS)], 2),
        "last": last_of(valid), "last response": last_of(said)[:, [1]],
        "projections": only(h @ unit(K).T, valid),
        "each": only(np.einsum("bltd,lkd->bltk", h[:, [0, 2]], unit(EACH)), said),
        "axis": only(np.einsum("bltd,ld->blt", h[:, 1:], unit(AXIS.values)[1:])[..., None], valid),
        "mlp": mean_of(mlp, valid), "some": only(h, said),
    }


def check(captured):
    found = {name: x.value for name, x in captured.items()}
    bins = {name: np.asarray(found.pop(name)) for name in ("histogram", "each bins")}
    moments = {name: found.pop(name) for name in ("moments", "each moments")}
    found = {name: np.asarray(x, np.float64) for name, x in found.items()}
    found["norms"] = found["norms"][:, :, :WIDTH]
    cut = {n: v[:, :, :WIDTH] for n, v in found.items() if v.ndim == 4 and n != "turns"}
    h, mlp = cut["full residual"], cut["full mlp"]
    wanted = expected(h, mlp)
    for name, counts in bins.items():
        np.testing.assert_array_equal(counts, wanted.pop(name), err_msg=name)
    for name, got in moments.items():
        count, mean, variance = wanted.pop(name)
        np.testing.assert_array_equal(got.count, count)
        for a, b in ((got.mean, mean), (got.variance, variance)):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b), err_msg=name)
            assert np.nanmax(np.abs(a - b)) <= 1e-5 * np.nanmax(np.abs(b)), name
    for name, want in wanted.items():
        got = cut.get(name, found[name])
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
        far = np.abs(np.nan_to_num(got - want)).max() / np.nanmax(np.abs(want))
        assert far <= 1e-5, f"{name}: {far}"
    return h


def test_one_pass():
    out = s.run(MODEL.params, MODEL.config, ROWS, capture=READ)
    h = check(out.captured)
    plain, _ = s.residuals(MODEL, ROWS)
    assert s.relative(h, plain).max() <= 1e-5
    parts = {n: np.asarray(out.captured[f"full {n}"].value, np.float64) for n in SITES}
    grown = parts["residual"][:, :-1] + parts["attention"][:, 1:] + parts["mlp"][:, 1:]
    assert s.relative(grown, parts["residual"][:, 1:]).max() <= 1e-5


@pytest.mark.parametrize("size", [1, 5])
def test_in_pieces(size):
    carry = Carry(cache=init_cache(MODEL.config, 3, 20))
    for piece in split(ROWS, size):
        out = s.run(MODEL.params, MODEL.config, piece, capture=READ, carry=carry)
        carry = out.carry
    plain, _ = s.residuals(MODEL, ROWS)
    assert s.relative(check(carry.captured), plain).max() <= 1e-5


def test_while_generating_equals_a_second_pass():
    model = dataclasses.replace(MODEL, stop_ids=(3, 5, 6, 7))
    rows = s.prompts((12, 7, 30, 3, 20, 9), seed=3)
    read = capture.mean() | s.READ | capture.mean(generated, turns=2, name="turns")
    read = read | capture.last(name="last") | capture.mean(prompt, name="prompt")
    read = read | capture.moments(K) | capture.histogram(K, EDGES) | capture.norms()
    edits = steer(np.ones(32), layers=[1], scale=0.1, where=generated)
    out = generate(model, rows, interventions=edits, capture=read, max_new_tokens=12, batch_size=4,
                   temperature=1.0, seed=1)
    assert 0 < out.stopped.sum() < len(rows), "both ends of a reply must occur"
    for b, row in enumerate(rows):
        said = out.tokens[b]
        n = len(row) + len(said)
        kind = [[USER] * len(row) + [ASSISTANT | GENERATED] * len(said)]
        whole = s.residuals(model, batch([[*row, *said]], kind=kind, width=48), edits)[0][0, :, :n]
        # the model ran on every token of the reply, including the last one at the limit, but not on
        # a stop token
        full = out.captured["full"][b]
        assert full.shape == whole.shape and s.relative(full, whole).max() <= 1e-5
        if len(said):
            want = whole[:, len(row) :].mean(1)
            assert s.rowwise(out.captured["mean"][b], want).max() <= 1e-5
            assert s.rowwise(out.captured["turns"][b][:, 1], want).max() <= 1e-5
        else:
            assert np.isnan(out.captured["mean"][b]).all()
        p = whole[:, len(row) :] @ unit(K).T
        got = out.captured["moments"]
        assert got.count[b] == len(said) == out.captured["histogram"][b, 0, 0].sum()
        if len(said):
            np.testing.assert_allclose(got.mean[b], p.mean(1), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got.variance[b], p.var(1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out.captured["norms"][b], np.linalg.norm(whole, axis=-1),
                                   rtol=1e-5)
        # a prompt of bare ids is message 0, so its reply is message 1
        assert np.isnan(out.captured["turns"][b][:, 0]).all()
        assert s.rowwise(out.captured["last"][b], whole[:, -1]).max() <= 1e-5
        assert s.rowwise(out.captured["prompt"][b], whole[:, : len(row)].mean(1)).max() <= 1e-5


def test_before_the_edits_of_its_layer():
    """The difference is the edit of that layer, in the prompt and in generated tokens."""
    push = np.zeros(32)
    push[5] = 2.0
    edits = steer(push, layers=[1], where=everywhere)
    after, before = capture.full(name="after"), capture.full(name="before").before_edits()
    assert repr(before) == "full(everywhere).before_edits()" and repr(after) == "full(everywhere)"
    out = generate(MODEL, s.prompts((7, 4)), interventions=edits, capture=after | before,
                   max_new_tokens=5, batch_size=2)
    for a, b in zip(out.captured["after"], out.captured["before"], strict=True):
        assert a.shape[1] > 7 and s.same_bits(a[[0, 2]], b[[0, 2]])  # also after an edit below
        np.testing.assert_allclose(a[1] - b[1], np.broadcast_to(push, a[1].shape), atol=1e-5)


def test_a_value_on_an_edge_belongs_to_the_bin_above():
    """A bin includes its lower edge but not its upper edge, as in NumPy."""
    edges, values = np.float32([-0.5, 0.0, 1.0]), np.float32([-0.5, 0.0, 1.0, 1.0, 0.5, -0.75])
    h = jnp.zeros((1, 6, 32)).at[0, :, 3].set(values)
    part = capture.histogram(np.eye(32)[3:4], edges, everywhere).readings["histogram"]
    found = part.read(h, part.weights(batch([[5] * 6])), 0)
    np.testing.assert_array_equal(found[0, 0], [1, 1, 2, 2])
    np.testing.assert_array_equal(found[0, 0], np.histogram(values, [-9, *edges, 9])[0])


def needed(read, width, dtype):
    """Return the bytes of a forward pass's temporaries and of its results."""
    model = s.tiny_model(dtype=dtype, d_ff=128)
    rows = batch([[5] * width] * 2)
    lowered = s.run.lower(model.params, model.config, rows, capture=read, logits="last")
    found = lowered.compile().memory_analysis()
    return np.array([found.temp_size_in_bytes, found.output_size_in_bytes])


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_mean_needs_no_memory_that_grows_with_the_text(dtype):
    state = 4 * 2 * 3 * 32  # bytes of a mean's sums, [L, B, D] float32
    for width in (256, 512):
        more = needed(capture.mean(everywhere), width, dtype) - needed(None, width, dtype)
        assert (more <= 8 * state).all(), f"{more} bytes at {width} tokens"
    more = needed(capture.full(everywhere), 512, dtype) - needed(None, 512, dtype)
    assert more[1] >= 512 * state, "the comparison sees nothing"


def test_full_announces_its_size(caplog):
    config = s.tiny_config()
    with caplog.at_level("INFO", "jaxpersona"):
        state = jax.eval_shape(lambda: s.READ.init(config, 2, 64))
        jax.eval_shape(lambda: s.READ.init(config, 64, 100_000))
    first, second = caplog.records
    assert first.levelname == "INFO" and second.levelname == "WARNING"
    size = 4 * state["full"].values.size
    assert f"{size / 1e9:.3g} GB (layers: 3, rows: 2, slots: 64, width: 32" in first.getMessage()


REFUSED = {
    "edges must be finite": lambda: capture.histogram(K, [1.0, 1.0]),
    "edges has shape \\(\\)": lambda: capture.histogram(K, 1.0),
    "edges are for 2 layers, but": lambda: s.run(MODEL.params, MODEL.config, ROWS,
                                                   capture=capture.histogram(
        K, np.zeros((2, 1, 3)) + np.arange(3))),
    "where is 'reply'; give a test .* assistant, response, marked": lambda: capture.mean("reply"),
    r"'last'; give a capture such as jp\.capture\.last\(\)": lambda: generate(
        MODEL, [[5]], capture="last"),
    r"<function mean.*give a capture such as jp\.capture\.mean\(\)": lambda: extract(
        MODEL, [[5]], capture=capture.mean),
    r"such as jp\.capture\.moments\(directions\)": lambda: capture.mean() | capture.moments,
    r"such as jp\.capture\.norms\(\)": lambda: forward(
        MODEL.params, MODEL.config, ROWS, capture=capture.norms),
    "turns is 1.5": lambda: capture.mean(turns=1.5),
    "site is 'foo'": lambda: capture.mean(site="foo"),
    "made for different models": lambda: capture.projections(
        [Axis(np.ones((3, 32)), fingerprint=f"{i}" * 16) for i in (1, 2)]),
    "measured at site 'mlp'": lambda: capture.projections(
        [Axis(np.ones((3, 32)), site="mlp")], layers=1),
    "made for another model": lambda: generate(MODEL, [[5]], capture=capture.moments(
        Axis(np.ones((3, 32)), fingerprint="ab" * 8))),
    "captured has the readings": lambda: s.run(MODEL.params, MODEL.config, ROWS,
                                            capture=capture.mean(), carry=Carry(captured={})),
    "edges has shape \\(1, 3, 2\\)": lambda: capture.histogram(
        K, np.zeros((1, 3, 2)) + np.arange(2)),
    "names in common: \\['mean'\\]": lambda: capture.mean() | capture.mean(everywhere),
    "must be \\[K, D\\]": lambda: capture.projections(np.ones(8)),
    "contains a zero vector": lambda: capture.projections(np.eye(8)[:2] * [[1], [0]]),
    "or a non-finite value": lambda: capture.moments([[1.0, 2.0], [1.0, np.nan]]),
    "edges must be finite and strictly": lambda: capture.histogram(K, [0.0, 1e39]),
    "strictly ascending as float32": lambda: capture.histogram(
        K, [[[0.0, 1.0]], [[1.0, 1.0]]], layers=[0, 1]),
    "turns is True": lambda: capture.mean(turns=True),
    "turns is 0": lambda: capture.mean(turns=0),
    "have 3 and 2 layers": lambda: capture.projections([AXIS, Axis(np.ones((2, 32)))]),
    "directions contains both named": lambda: capture.projections(
        [AXIS, AXIS.values], layers=[0, 1]),
    "site 'mlp'; to use it": lambda: capture.moments([AXIS, Axis(np.ones((3, 32)), site="mlp")]),
    "non-finite": lambda: capture.projections(np.full((1, 8), np.inf)),
    "out of range": lambda: capture.mean(layers=-1),
    "reads layer 3": lambda: s.run(MODEL.params, MODEL.config, ROWS,
                                   capture=capture.mean(layers=3)),
    "captured layers is 3": lambda: s.run(
        MODEL.params, MODEL.config, ROWS, capture=capture.projections(np.ones((2, 1, 32)))),
    "directions have width 8": lambda: s.run(MODEL.params, MODEL.config, ROWS,
                             capture=capture.projections(np.ones((1, 8)))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_every_reading_multiplies_in_full_precision():
    """On a GPU or TPU, products with the default precision would round float32 activations."""
    v = np.random.default_rng(0).normal(size=(2, 32))
    read = (capture.mean() | capture.mean(turns=2, name="turns") | capture.last()
            | capture.projections(v) | capture.moments(v) | capture.histogram(v, [0.0]))
    model = s.tiny_model()
    state = read.init(model.config, 2, 4)
    rows = batch([[5, 6, 7], [8, 9]])
    h = jnp.ones((2, 3, 32), jnp.float32)
    for name, part in read.readings.items():
        text = jax.make_jaxpr(lambda h, part=part: part.read(h, part.weights(rows), 0))(h)
        products = [eqn for eqn in text.jaxpr.eqns if eqn.primitive.name == "dot_general"]
        assert products and name in state
        for eqn in products:
            assert eqn.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2, name


def test_a_where_may_be_a_name():
    """The names in JSON specifications select the same tokens as the Python objects."""
    for name, test in NAMED.items():
        assert s.same_bits(capture.mean(name), capture.mean(test)), name
        assert s.same_bits(steer(np.ones(8), layers=1, where=name),
                           steer(np.ones(8), layers=1, where=test)), name
    assert s.same_bits(capture.projections(K, "response"), capture.projections(K, response))
    edit = steer(np.ones(8), layers=1)
    assert s.same_bits(gate(edit, np.ones(8), layer=0, above=0.0, where="user"),
                       gate(edit, np.ones(8), layer=0, above=0.0, where=NAMED["user"]))
    with pytest.raises(ValueError, match="where= selects generated tokens"):
        gate(edit, np.ones(8), layer=0, above=0.0, where="generated")


@pytest.mark.parametrize(("call", "wanted"), [
    (lambda: forward(MODEL.params, MODEL.config, "Hi"),
     "^batch is 'Hi'; give the result of jp.encode or jp.batch$"),
    (lambda: forward(MODEL.params, MODEL.config, [[5, 6]]),
     "give the result of jp.encode or jp.batch"),
    (lambda: forward(MODEL, MODEL.config, ROWS), "^params is of type Tiny; pass model.params$"),
])
def test_forward_names_the_argument_that_it_needs(call, wanted):
    with pytest.raises(ValueError, match=wanted):
        call()


def test_a_list_of_captures_is_one_capture_with_all_of_them():
    one, other = capture.mean(), capture.last(layers=1)
    both = capture.joined([one, other])
    assert list(both.readings) == ["mean", "last"] and s.same_bits(both, one | other)
    assert capture.joined(None) is None and capture.joined(one) is one
    early = both.before_edits()
    assert [reading.edited for reading in (*early.readings.values(), *both.readings.values())] == [
        False, False, True, True]


@pytest.mark.parametrize(("make", "where"), [
    (capture.mean, response), (capture.last, everywhere), (capture.norms, everywhere),
    (capture.full, everywhere), (lambda *a, **k: capture.projections(K, *a, **k), everywhere),
    (lambda *a, **k: capture.moments(K, *a, **k), response),
    (lambda *a, **k: capture.histogram(K, EDGES, *a, **k), response)])
def test_every_reading_takes_tokens_layers_a_site_and_a_name(make, where):
    (usual,) = make().readings.values()
    np.testing.assert_array_equal(usual.where, where.encode())
    assert (usual.layers, usual.site) == (None, "residual")
    ((name, made),) = make(prompt, layers="1:3", site="mlp", name="mine").readings.items()
    assert (name, made.layers, made.site) == ("mine", (1, 2), "mlp")
    np.testing.assert_array_equal(made.where, prompt.encode())


def test_rows_without_a_token_are_listed_up_to_five():
    for count, listed in ((1, " 0 (1 of 9), so its value is"),
                          (5, "s 0, 1, 2, 3, 4 (5 of 9), so their values are"),
                          (6, "s 0, 1, 2, 3, 4, … (6 of 9), so their values are")):
        text = describe_empty(range(count), 9, "row")
        assert text.startswith(f"selects no token in row{listed} NaN; add tokens that where= se")
