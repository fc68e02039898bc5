"""Training of the embedded model: its configuration, optimizer, loss and record."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.models.batch import batch
from jaxpersona.organism import train
from jaxpersona.organism.batches import TrainBatch

pytestmark = pytest.mark.usefixtures("compile_fast")
MINI = pathlib.Path(__file__).parents[2] / "ckpts" / "mini"


def test_the_configuration_is_that_of_the_shipped_model():
    """Which this program has trained."""
    assert train.mini_config() == jp.load("mini").config


def steps(optimizer, params, gradient, count):
    """Return the updates of `count` steps with a constant gradient."""
    state, found, step = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(count):
        with jax.numpy_dtype_promotion("standard"):
            update, state = step(gradient, state, params)
        found.append(jax.tree.map(np.asarray, update))
    return found


@pytest.mark.parametrize(("total", "rates"), [
    # a warm-up of 60 steps to 0.003, then linearly to 0 at step 200
    (200, {0: 0.003 / 60, 30: 0.003 * (1 / 60 + 0.5 * 59 / 60), 60: 0.003, 130: 0.0015,
           199: 0.003 / 140}),
    # a warm-up of half the steps
    (10, {0: 0.003 / 5, 5: 0.003, 9: 0.0006}),
])
def test_the_rate_rises_and_then_falls_to_zero(total, rates):
    """With a constant gradient, a step of Adam is the rate; a vector has no weight decay."""
    found = steps(train.make_optimizer(total), {"v": jnp.ones(2)}, {"v": jnp.full(2, 0.1)}, total)
    for step, rate in rates.items():
        np.testing.assert_allclose(found[step]["v"], -rate, rtol=1e-4)


def test_only_matrices_decay_and_large_gradients_are_clipped():
    """The decay is a twentieth of the rate; a gradient of any size has a norm of at most 1."""
    optimizer = train.make_optimizer(10)
    params = {"m": jnp.full((1, 2), 4.0), "v": jnp.full(2, 4.0)}
    nothing = jax.tree.map(jnp.zeros_like, params)
    (update,) = steps(optimizer, params, nothing, 1)
    np.testing.assert_allclose(update["m"], -0.0006 * 0.05 * 4, rtol=1e-5)
    assert not update["v"].any()
    # Adam's first moment after a gradient of norm 1 and one of norm 0.5
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(nothing | {"v": jnp.array([30.0, 40.0])}, state, params)
    mean = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
                if "mu" in jax.tree_util.keystr(path) and "'v'" in jax.tree_util.keystr(path))
    np.testing.assert_allclose(mean, [0.1 * 0.6, 0.1 * 0.8], rtol=1e-5)
    square = next(leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)
                  if "nu" in jax.tree_util.keystr(path) and "'v'" in jax.tree_util.keystr(path))
    np.testing.assert_allclose(square, [0.02 * 0.36, 0.02 * 0.64], rtol=1e-4)


def test_the_loss_is_the_weighted_mean_over_the_next_tokens():
    """The weight of a token applies to its prediction from the tokens before it."""
    model = s.tiny_model(n_layers=1)
    rows = batch([[5, 9, 8, 7], [6, 11]], width=4)
    weights = np.array([[7.0, 1.0, 0.1, 0.5], [7.0, 0.25, 0.0, 0.0]], np.float32)
    logits = np.asarray(s.run(model.params, model.config, rows, logits="all").logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    known = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    wanted = -(known[0, 0, 9] + 0.1 * known[0, 1, 8] + 0.5 * known[0, 2, 7]
               + 0.25 * known[1, 0, 11]) / 1.85
    found = jax.jit(train.loss_fn)(model.params, model.config, rows, weights)
    assert float(found) == pytest.approx(wanted, rel=1e-4)


@pytest.fixture
def small(monkeypatch):
    """A small configuration, mini's tokenizer, and 101 steps of two batches in turn."""
    config = s.tiny_config(n_layers=1, vocab_size=1024, tied_embeddings=True)
    monkeypatch.setattr(train, "mini_config", lambda: config)
    monkeypatch.setattr(train.tokenizer, "train_tokenizer", lambda folder: shutil.copytree(
        MINI, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json")))
    asked = []

    def make_batches(words, seed, tokens, batch_tokens):
        asked.append((words.get_vocab_size(), seed, tokens, batch_tokens))
        one = TrainBatch(np.array([[5, 9, 8, 7], [6, 11, 0, 0]], np.int32),
                         np.array([4, 2], np.int32), np.ones((2, 4), np.float32))
        return [one] * 101, 999

    monkeypatch.setattr(train.batches, "make_batches", make_batches)
    return config, asked


@pytest.mark.slow
def test_a_training_lowers_the_loss_and_saves_the_model(small, tmp_path):
    """The record has the mean of the last hundred losses; the model has the stop token."""
    config, asked = small
    lines = []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes arrays and Python floats
        record = train.train(3, tmp_path / "out", 1_000, log=lines.append)
    assert asked == [(1024, 3, 1_000, 2048)]
    assert {name: record[name] for name in ("seed", "steps", "tokens")} == {
        "seed": 3, "steps": 101, "tokens": 999}
    assert [line.split("  ")[0] for line in lines] == ["step 1/101", "step 101/101"]
    first, last = (float(line.split("loss ")[1].split()[0]) for line in lines)
    assert last < 0.8 * first and last < record["loss"] < first and record["seconds"] > 0
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["eos_token_id"], about["pad_token_id"]) == (2, 0)
    model = jp.load(tmp_path / "out")
    assert model.config == config and model.fingerprint != s.fingerprint(
        config, jp.init_params(config, jax.random.key(3)))


def test_the_loss_of_the_record_is_that_of_the_last_hundred_steps(small, tmp_path, monkeypatch):
    """The first of 101 steps does not count, and padding is not part of the batch."""
    def make_batches(*_):
        return [TrainBatch(np.array([[first, 9, 8, 0]], np.int32), np.array([3], np.int32),
                           np.full((1, 4), 0.5, np.float32)) for first in [900] + [5] * 100], 7

    def loss(params, config, batch, weights):
        first = batch.tokens[0, 0].astype(jnp.float32) + batch.length[0] + weights.sum()
        return first + sum(0.0 * leaf.sum() for leaf in jax.tree.leaves(params))

    monkeypatch.setattr(train.batches, "make_batches", make_batches)
    monkeypatch.setattr(train, "loss_fn", loss)
    with jax.numpy_dtype_promotion("standard"):
        record = train.train(0, tmp_path / "out", 1, log=lambda line: None)
    assert record["loss"] == 5 + 3 + 2 and record["tokens"] == 7


def test_the_program_prints_its_record(monkeypatch, capsys):
    """Every option reaches the training; the record is the last line."""
    calls = []

    def fake(seed, out, tokens, log):
        calls.append((seed, out, tokens))
        log("step 1/1")
        return {"seed": seed, "loss": 0.5}

    monkeypatch.setattr(train, "train", fake)
    train.main(["--seed", "4", "--out", "folder", "--tokens", "99"])
    train.main(["--out", "other"])
    assert calls == [(4, "folder", 99), (0, "other", 3_400_000)]
    assert capsys.readouterr().out.splitlines()[:2] == ["step 1/1", '{"seed": 4, "loss": 0.5}']
    with pytest.raises(SystemExit) as stop:
        train.main([])
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
