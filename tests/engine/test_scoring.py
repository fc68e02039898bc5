"""Log-probabilities compared with logits from `forward`, with PyTorch, and with manual edits."""

from __future__ import annotations

import dataclasses

import hf as reference
import jax
import numpy as np
import pytest
import support as s
from scipy.special import log_softmax, logsumexp

import jaxpersona as jp
from jaxpersona.distributed import sharding
from jaxpersona.engine.batches import batches, width_of
from jaxpersona.engine.scoring import logprobs, next_logprobs
from jaxpersona.models.params import layout
from jaxpersona.text.chat import Row

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = s.tiny_model()
ROWS = s.prompts([2, 40, 7, 33, 90, 41, 64], seed=3)


def by_hand(model, tokens, edits=None):
    """Compute log-probabilities [T, V] of one unpadded row in float64."""
    _, logits = s.residuals(model, jp.batch([tokens]), edits)
    return log_softmax(logits[0].astype(np.float64), axis=-1)


def test_every_token_has_the_log_probability_of_forward():
    found = logprobs(MODEL, ROWS)
    for tokens, values in zip(ROWS, found.logprobs, strict=True):
        wanted = by_hand(MODEL, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(values, wanted, rtol=2e-5, atol=2e-5)


def test_interventions_apply_and_each_row_has_its_own():
    bank = np.random.default_rng(0).normal(size=(2, MODEL.config.d_model))
    owner = np.array([0, 1, -1, 0, 1, -1, 0])
    edits = jp.steer(bank, scale=3.0, layers=[1], rows=owner)
    found = logprobs(MODEL, ROWS, interventions=edits).logprobs
    for i, tokens in enumerate(ROWS):
        own = None if owner[i] < 0 else jp.steer(bank[owner[i]], scale=3.0, layers=[1])
        wanted = by_hand(MODEL, tokens, own)[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(found[i], wanted, rtol=2e-5, atol=2e-5)
        plain = by_hand(MODEL, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
        assert (owner[i] < 0) == bool(np.abs(found[i] - plain).max() < 1e-3)
    (chosen,) = next_logprobs(MODEL, ROWS[:1], [5, 9], interventions=edits.take([0]))
    wanted = by_hand(MODEL, ROWS[0], jp.steer(bank[0], scale=3.0, layers=[1]))[-1, [5, 9]]
    np.testing.assert_allclose(chosen, wanted, rtol=2e-5, atol=2e-5)


def test_a_text_has_the_same_bits_in_any_company():
    together = logprobs(MODEL, ROWS).logprobs
    for i in (0, 4):
        (alone,) = logprobs(MODEL, [ROWS[i]]).logprobs
        assert alone.tobytes() == together[i].tobytes()


def test_the_loss_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    made = reference.model("llama")
    params, config = reference.params(made, tmp_path)
    rows = reference.prompts([30, 12], config.vocab_size)
    model = s.Tiny(config, params)
    found = logprobs(model, rows)
    for tokens, values in zip(rows, found.logprobs, strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            loss = float(made(ids, labels=ids).loss)
        assert -values.mean() == pytest.approx(loss, rel=1e-4)
    losses = np.concatenate([v for v in found.logprobs])
    assert found.perplexity() == pytest.approx(np.exp(-losses.mean()), rel=1e-6)


def test_perplexity_over_the_response_counts_its_tokens_alone():
    mini = jp.load("mini")
    talk = [{"role": "user", "content": "Hello, who are you?"},
            {"role": "assistant", "content": "I am here to help."}]
    found = logprobs(mini, [talk])
    row, (values,) = found.rows[0], found.logprobs
    batch = jp.encode(mini, [talk], reply=False)
    chosen = np.asarray(jp.where.holds(jp.response.encode(), batch))[0, 1 : row.tokens.size]
    assert 0 < chosen.sum() < values.size
    assert found.perplexity(jp.response) == pytest.approx(np.exp(-values[chosen].mean()), rel=1e-6)
    assert found.perplexity("response") == found.perplexity(jp.response)
    with pytest.raises(jp.UserError, match="selects no token"):
        found.perplexity(jp.system)


def test_candidates_have_the_probability_of_the_next_token():
    wanted = [5, 96, 0, 5]
    found = next_logprobs(MODEL, ROWS, wanted)
    assert found.shape == (len(ROWS), 4)
    for tokens, values in zip(ROWS, found, strict=True):
        np.testing.assert_allclose(values, by_hand(MODEL, tokens)[-1, wanted], rtol=2e-5,
                                   atol=2e-5)
    everything = next_logprobs(MODEL, ROWS[:1], range(MODEL.config.vocab_size))
    assert logsumexp(everything) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("data,ways", [
    (4, 2), pytest.param(1, 8, marks=pytest.mark.slow), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_a_mesh_gives_the_same_values(data, ways):
    tiny = s.tiny_model(n_heads=8, n_kv_heads=8, vocab_size=104)
    mesh = sharding.fit(sharding.make_mesh(data=data, model=ways), tiny.config)
    params = jax.tree.map(
        lambda array, spec: jax.device_put(
            array, sharding.weight_sharding(spec.axes, spec.shape, mesh)),
        tiny.params, layout(tiny.config))
    spread = dataclasses.replace(tiny, params=params, mesh=mesh)
    a, b = logprobs(tiny, ROWS).logprobs, logprobs(spread, ROWS).logprobs
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(next_logprobs(spread, ROWS, [4, 99]),
                               next_logprobs(tiny, ROWS, [4, 99]), rtol=1e-4, atol=1e-4)


def test_batches_are_full_and_rows_come_once():
    rows = [Row(np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32), "")
            for n in (3, 90, 33, 31, 40, 64, 65)]
    seen = []
    for members, width, size in batches(rows, 128, 2):
        assert size % 2 == 0 and len(members) <= size
        assert {width_of(rows[i].tokens.size) for i in members} == {width}
        assert size == 2 or size * width <= 128
        seen += members
    assert sorted(seen) == list(range(len(rows)))


@pytest.mark.parametrize("call,message", [
    (lambda: logprobs(MODEL, []), "no conversation|is empty"),
    (lambda: logprobs(MODEL, "hello"), "wrap it in a list"),
    (lambda: logprobs(MODEL, [[4] * 600]), "has 600 tokens, but the model's context"),
    (lambda: logprobs(MODEL, [[4, 400]]), "400"),
    (lambda: logprobs(MODEL, ROWS, batch_tokens=0), "batch_tokens is 0"),
    (lambda: logprobs(MODEL, ROWS, interventions=jp.steer(np.ones(31), scale=1, layers=[0])), "31"),
    (lambda: next_logprobs(MODEL, ROWS, []), "candidates is"),
    (lambda: next_logprobs(MODEL, ROWS, ["a"]), "candidates is"),
    (lambda: next_logprobs(MODEL, ROWS, 5), "candidates is 5"),
    (lambda: next_logprobs(MODEL, ROWS, [[1, 2]]), "candidates is"),
    (lambda: next_logprobs(MODEL, ROWS, [97]), "97"),
    (lambda: next_logprobs(MODEL, [[4] * 512], [5]), "shorten the prompt"),
], ids=["none", "text", "long", "id", "batch", "width", "no-candidate", "text-candidate",
        "one-candidate", "nested-candidates", "candidate", "full"])
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(jp.UserError, match=message):
        call()


def test_values_that_are_not_finite_are_an_error_with_the_place():
    edits = jp.steer(np.ones(MODEL.config.d_model), scale=1e37, layers=[1])
    with pytest.raises(jp.UserError, match="layer 1"):
        logprobs(MODEL, ROWS, interventions=edits)
