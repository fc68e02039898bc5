"""Interventions compared with PyTorch hooks written from the equations, and caps without effect."""

from __future__ import annotations

import re

import hf
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine.generate import generate
from jaxpersona.engine.programs import Stops, decode, prefill
from jaxpersona.engine.sampling import sampling
from jaxpersona.interventions import Interventions, cap, chain, steer, trace
from jaxpersona.interventions.where import everywhere, generated
from jaxpersona.models.batch import batch

NEW = 64
LENGTHS = (31, 5, 18, 2, 11)
CONFIGS = {
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8,
             "tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 1e-3},
}
RNG = np.random.default_rng(0)
U, V, W = RNG.normal(size=(3, 48))
W = W - V  # at an obtuse angle to V, so that the second of two caps partly reverses the first


CASES = {  # our interventions, and the equivalent hooks by layer, in order
    "none": (lambda where: None, {}),
    "steer": (lambda where: steer(U, layers=1, scale=0.5, where=where), {1: [hf.steered(U, 0.5)]}),
    "two caps": (
        lambda where: chain(cap(V, layers=1, floor=3.0, where=where),
                            cap(W, layers=1, floor=1.0, where=where)),
        {1: [hf.capped(V, 3.0), hf.capped(W, 1.0)]}),
    "two caps, swapped": (
        lambda where: chain(cap(W, layers=1, floor=1.0, where=where),
                            cap(V, layers=1, floor=3.0, where=where)),
        {1: [hf.capped(W, 1.0), hf.capped(V, 3.0)]}),
    "cap of two layers after a steer": (
        lambda where: chain(steer(U, layers=0, scale=-0.4, where=where),
                            cap(V, layers=slice(1, 3), floor=1.0, where=where)),
        {0: [hf.steered(U, -0.4)], 1: [hf.capped(V, 1.0)], 2: [hf.capped(V, 1.0)]}),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request, tmp_path_factory):
    made = hf.model("qwen3", seed=1, **CONFIGS[request.param])
    made.generation_config.eos_token_id = None
    params, config = hf.params(made, tmp_path_factory.mktemp("qwen3"))
    return made, s.Tiny(config, params, stop_ids=(), fingerprint="0" * 16)


@pytest.mark.parametrize(("case", "where"), [
    ("none", everywhere), ("steer", everywhere), ("two caps", generated),
    ("two caps, swapped", everywhere), ("cap of two layers after a steer", generated),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("steer", generated), ("two caps", everywhere),
        ("cap of two layers after a steer", everywhere))),
])
def test_equals_hooks(models, case, where):
    made, model = models
    rows = hf.prompts(list(LENGTHS), 199)
    make, hooks = CASES[case]
    tokens, stream = hf.generate(made, rows, hooks, NEW, decode_only=where is generated)
    ours = generate(model, rows, interventions=make(where), capture=s.READ, max_new_tokens=NEW,
                    batch_size=len(rows))
    worst = hf.same_run(ours, rows, tokens, stream)
    for counts in ours.applied:
        assert (counts.changed > 0).any(), "an intervention never acted"
    print(f"{case}: {worst:.1e}")


def test_order_of_two_caps_matters(models):
    _, model = models
    rows = batch(hf.prompts(list(LENGTHS), 199))
    one, other = (s.residuals(model, rows, CASES[name][0](everywhere))[0]
                  for name in ("two caps", "two caps, swapped"))
    assert s.relative(one, other)[:, 1].min() > 1e-2
    # the condition of the last cap holds
    for found, v, floor in ((one, W, 1.0), (other, V, 3.0)):
        p = found[:, 1] @ (v / np.linalg.norm(v))
        assert np.nanmin(p) >= floor - 1e-4


def _state(model, rows, edits):
    """Run prefill and eight decode steps with every kind of capture."""
    read = s.READ | capture.mean(everywhere) | capture.last(everywhere)
    how, limit = sampling(4), jnp.full((4,), 8, jnp.int32)
    stops = Stops(jnp.full((4,), -1, jnp.int32), jnp.full((2,), -1, jnp.int32))
    args = (edits, read, how, stops)
    first = prefill(model.params, model.config, rows, *args, limit, slots=32, max_new=8,
                    greedy=True)
    kept = {name: np.asarray(x.value) for name, x in first.carry.captured.items()}
    kept["k"] = [np.asarray(x.astype(jnp.float32)) for x in first.carry.cache.k]
    end = decode(model.params, model.config, first, *args, jnp.int32(8), greedy=True)
    without = end.replace(carry=end.carry.replace(applied=()))
    return (kept, without), end.carry.applied


@pytest.mark.parametrize("dtype", [
    pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_a_cap_that_never_binds_is_bit_exact_with_none(dtype):
    model = s.tiny_model(dtype=dtype)
    rows = batch(s.prompts((13, 8, 1, 16)), width=16)
    v = np.random.default_rng(2).normal(size=(5, 32))
    plain, _ = _state(model, rows, Interventions())
    shared = chain(*(cap(v[0], layers=slice(0, 3), floor=-1e6, ceiling=1e6, site=site)
                     for site in ("attention", "mlp", "residual")))
    by_row = cap(v, layers=slice(0, 3), floor=-1e6, rows=[3, -1, 0, 4])
    for edits in (shared, by_row):
        found, applied = _state(model, rows, edits)
        assert s.differing(found, plain) == []
        assert all((x.changed == 0).all() for x in applied)
        assert all((x.seen > 0).any() for x in applied)
    found, applied = _state(model, rows, cap(v, layers=slice(0, 3), floor=0.5, rows=[3, -1, 0, 4]))
    assert len(s.differing(found, plain)) > 5, "the comparison detects no change"


def test_applied_counts_what_was_done():
    model = s.tiny_model()
    rows = s.prompts((9, 21, 4), seed=2)
    v = np.random.default_rng(3).normal(size=32)
    unit = v / np.linalg.norm(v)
    edits = chain(cap(v, layers=[0, 2], floor=0.8), cap(v, layers=[1], floor=0.4, where=generated))
    out = generate(model, rows, interventions=edits, max_new_tokens=20, batch_size=3)
    below = chain(cap(v, layers=[0], floor=0.8))
    for b, row in enumerate(rows):
        said = out.tokens[b]
        made = np.arange(len(row) + len(said)) >= len(row)
        text = batch([[*row, *said]], kind=[np.where(made, 1 << 6, 0)], width=48)
        n = made.size
        # each table receives the stream of a run with only the earlier tables
        first = s.residuals(model, text)[0][0, 0, :n] @ unit < 0.8
        second = (s.residuals(model, text, below)[0][0, 1, :n] @ unit < 0.4) & made
        both = chain(below, cap(v, layers=[1], floor=0.4, where=generated))
        third = s.residuals(model, text, both)[0][0, 2, :n] @ unit < 0.8
        assert 0 < first.sum() < n and 0 < second.sum() < made.sum()
        np.testing.assert_array_equal(out.applied[0].changed[:, b], [first.sum(), third.sum()])
        assert out.applied[1].changed[0, b] == second.sum()
        assert (out.applied[0].seen[b], out.applied[1].seen[b]) == (n, made.sum())


def test_layers_without_an_edit_carry_none_in_the_compiled_program():
    model = s.tiny_model()
    text = s.run.lower(model.params, model.config, batch(s.prompts((5, 3))), interventions=chain(
        cap(np.ones(32), layers=[1], floor=0.0))).compile().as_text()
    assert set(re.findall(r"layer(\d+)/intervention", text)) == {"1"}
    assert {"0", "1", "2"} <= set(re.findall(r"layer(\d+)/", text))
    bare = s.run.lower(model.params, model.config, batch(s.prompts((5, 3)))).compile().as_text()
    assert not re.search(r'op_name="[^"]*/(intervention|capture)', bare)  # except in file paths
    assert re.search(r'op_name="[^"]*/intervention', text)


@pytest.mark.parametrize("layers", [1, 32, 33, 70])
@pytest.mark.parametrize("tokens", [1, 3])
def test_counts_are_exact_for_any_number_of_layers(layers, tokens):
    masks = np.random.default_rng(layers).random((layers, 4, tokens)) < 0.5
    found = trace._counts([jnp.asarray(mask) for mask in masks])
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, masks.sum(-1))
