"""Training of a steering vector on the embedded model: its effect, checkpoints and file."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import support as s
from flax import nnx
from jaxpersona.ckpts.vectors import load_vector

import jaxpersona as jp
from jaxpersona.models.batch import batch
from jaxpersona.training import learn

pytestmark = pytest.mark.usefixtures("compile_fast")

ASKED = ("Tell me about the sea.", "How do you feel about time?", "What is friendship?")


@pytest.fixture(scope="module")
def model():
    return jp.load("mini")


def scene(model):
    """Return prompts and the target token after each."""
    rows = jp.encode(model, [[{"role": "user", "content": text}] for text in ASKED])
    target = model.tokenizer.encode(" thee", add_special_tokens=False)[-1]

    def loss(output, rows):
        last = jnp.take_along_axis(output.logits, (rows.length - 1)[:, None, None], 1)[:, 0]
        return -jax.nn.log_softmax(last)[:, target].mean()

    return jax.tree.map(jnp.asarray, rows), loss


def test_fifty_steps_move_the_target_and_the_export_acts_the_same(model, tmp_path):
    rows, loss = scene(model)
    direction = learn.Direction(128, layers=[3, 5])
    told = []
    before = jax.tree.map(np.asarray, model.params)
    losses = learn.fit(model, direction, loss, [rows], steps=50, folder=tmp_path / "kept",
                       optimizer=optax.adam(0.2), progress=lambda *x: told.append(x))
    assert losses[0] > 8 and losses[-1] < 0.5, losses[::10]
    assert len(told) == 50 and told[-1][:2] == (50, 50)
    assert s.differing(model.params, before) == []  # the model is unchanged

    def measure(edits):
        out = jax.jit(jp.forward)(model.params, model.config, rows, interventions=edits)
        return float(loss(out, rows)), np.asarray(out.logits)

    own, logits = measure(direction.interventions())
    assert own < losses[-1] + 0.1 < measure(None)[0] / 2
    # a new direction, restored from the checkpoint alone
    again = learn.Direction(128, layers=[3, 5], seed=9)
    assert learn.fit(model, again, loss, [rows], steps=50, folder=tmp_path / "kept",
                     optimizer=optax.adam(0.2)) == []
    assert s.same_bits(again.vector[...], direction.vector[...])
    # saved as a file, applied with the ordinary operator
    jp.save_vector(tmp_path / "v.safetensors", direction.to_vector(model, "thee"))
    found = load_vector(tmp_path / "v.safetensors")
    assert found.fingerprint == model.fingerprint and found.name == "thee"
    assert s.rowwise(measure(jp.steer(found, layers=[3, 5]))[1], logits).max() < 1e-5
    said = jp.generate(model, [ASKED[0]], interventions=jp.steer(found, layers=[3, 5]),
                       max_new_tokens=1)
    assert said.text[0].strip() == "thee"


def test_a_stopped_training_ends_in_the_same_vector(tmp_path):
    model = s.tiny_model()
    rows = [batch(s.prompts((6, 6), seed=i), width=8) for i in range(2)]

    def loss(output, rows):
        return (output.logits[:, 3] ** 2).mean()

    whole, parts = learn.Direction(32, layers=1), learn.Direction(32, layers=1)
    alone = learn.fit(model, whole, loss, rows, steps=70)
    # the two batches alternate, so each loss is compared with earlier losses on the same batch
    assert alone[68] < 0.9 * alone[0] and alone[69] < 0.9 * alone[1], alone[::10]
    first = learn.fit(model, parts, loss, rows, steps=60, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["50", "60"]
    parts = learn.Direction(32, layers=1, seed=4)
    more = learn.fit(model, parts, loss, rows, steps=70, folder=tmp_path)
    assert len(first) == 60 and len(more) == 10 and [*first, *more] == alone
    assert s.same_bits(parts.vector[...], whole.vector[...])
    for other in (learn.Direction(32, layers=2), learn.Direction(32, layers=1, site="mlp"),
                  learn.Direction(32, layers=1, where=jp.generated)):
        with pytest.raises(ValueError, match="does not match this direction"):
            learn.fit(model, other, loss, rows, steps=80, folder=tmp_path)
    with pytest.raises(ValueError, match="written with a different optimizer"):
        learn.fit(model, learn.Direction(32, layers=1), loss, rows, steps=80, folder=tmp_path,
                  optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="is 30, but the last checkpoint in .* is at step 70"):
        learn.fit(model, learn.Direction(32, layers=1), loss, rows, steps=30, folder=tmp_path)


def test_batches_are_taken_in_turn_and_a_resumed_training_goes_on_with_the_next(tmp_path):
    model, firsts = s.tiny_model(), [5, 17, 40]
    rows = [batch([[first, 9, 8]]) for first in firsts]

    def loss(output, rows):  # identifies the batch
        return rows.tokens[0, 0].astype(jnp.float32) + 0.0 * output.logits.sum()

    def fit(steps):
        return learn.fit(model, learn.Direction(32, layers=1), loss, rows, steps=steps,
                         folder=tmp_path)

    assert fit(4) == [5, 17, 40, 5]
    assert fit(9) == [17, 40, 5, 17, 40]


def test_a_step_follows_the_slope_of_the_loss():
    """One step of gradient descent is v - rate * dloss/dv, with finite-difference gradients."""
    model, rows = s.tiny_model(), batch(s.prompts((6, 6)), width=8)
    direction = learn.Direction(32, layers=1, size=1.0)
    v = np.asarray(direction.vector[...])

    @jax.jit
    def value(v):
        out = jp.forward(model.params, model.config, rows,
                         interventions=jp.steer(v[None], layers=[1]))
        return (out.logits[:, 3] ** 2).mean()

    losses = learn.fit(model, direction, lambda out, _: (out.logits[:, 3] ** 2).mean(), [rows],
                       steps=1, optimizer=optax.sgd(0.5))
    assert losses == [pytest.approx(float(value(v)), rel=1e-5)]
    found = (v - np.asarray(direction.vector[...])) / 0.5
    rng = np.random.default_rng(0)
    for _ in range(3):
        d = rng.normal(size=v.shape).astype(np.float32)
        slope = (float(value(v + 0.01 * d)) - float(value(v - 0.01 * d))) / 0.02
        assert slope == pytest.approx(float((found * d).sum()), rel=0.02, abs=1e-3)


def test_a_gradient_that_is_not_finite_leaves_the_direction():
    model, direction = s.tiny_model(), learn.Direction(32, layers=1)
    before = np.asarray(direction.vector[...])
    with pytest.raises(ValueError, match="gradient is not finite"):
        learn.fit(model, direction, lambda out, rows: jnp.sqrt(0.0 * out.logits.sum()),
                  [batch(s.prompts((6,)))], steps=1)
    np.testing.assert_array_equal(direction.vector[...], before)


def test_an_update_that_overflows_is_not_blamed_on_the_loss():
    model, direction = s.tiny_model(n_layers=1), learn.Direction(32, layers=0)
    before = np.asarray(direction.vector[...])
    with pytest.raises(ValueError, match="at step 0, the optimizer's update of the vector is not "
                                         "finite; use a smaller learning rate"):
        learn.fit(model, direction, lambda out, rows: (1e3 * out.logits).sum(),
                  [batch(s.prompts((6,)))], steps=1, optimizer=optax.sgd(3e38))
    np.testing.assert_array_equal(direction.vector[...], before)


def test_a_loss_that_is_not_finite_keeps_the_steps_before_it():
    model, rows = s.tiny_model(), [batch([[first, 9, 8]]) for first in (5, 17, 40)]

    def loss(output, rows):
        return jnp.where(rows.tokens[0, 0] == 40, jnp.nan, (output.logits ** 2).mean())

    two, three = (learn.Direction(32, layers=1) for _ in range(2))
    first = np.asarray(two.vector[...])
    learn.fit(model, two, loss, rows, steps=2)
    with pytest.raises(ValueError, match=r"at step 2, the loss .nan. or its gradient"):
        learn.fit(model, three, loss, rows, steps=3)
    np.testing.assert_array_equal(three.vector[...], two.vector[...])
    assert np.abs(np.asarray(two.vector[...]) - first).max() > 1e-3


def test_refused():
    model = s.tiny_model()
    rows = [batch(s.prompts((6,)))]
    for message, call in {
        "size is 0": lambda: learn.Direction(32, layers=1, size=0),
        "size is nan": lambda: learn.Direction(32, layers=1, size=float("nan")),
        "batches is a single Batch": lambda: learn.fit(model, learn.Direction(32, layers=1), None,
                                                  rows[0], steps=1),
        "the loss has shape": lambda: learn.fit(
            model, learn.Direction(32, layers=1), lambda out, rows: out.logits[0, 0], rows,
            steps=1),
        "cannot be written": lambda: learn.fit(
            model, learn.Direction(32, layers=1), lambda out, rows: out.logits.sum(), rows,
            steps=1, folder=__file__),
        "site is 'head'": lambda: learn.Direction(32, layers=1, site="head"),
        "out of range": lambda: learn.Direction(32, layers=-1),
        "steps is 0": lambda: learn.fit(model, learn.Direction(32, layers=1), None, rows, steps=0),
        "width 31": lambda: learn.fit(model, learn.Direction(31, layers=1), None, rows, steps=1),
        "the model has layers 0…": lambda: learn.fit(
            model, learn.Direction(32, layers=7), None, rows, steps=1),
        r"at step 0, the loss \(nan\) or its gradient is not finite": lambda: learn.fit(
            model, learn.Direction(32, layers=1),
            lambda output, rows: output.logits.sum() * jnp.nan, rows, steps=2,
            optimizer=optax.sgd(0.1)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("given", "message"), [
    ({"width": 2.5}, "width is 2.5; it must be a positive integer"), ({"width": 0}, "width is 0"),
    ({"size": float("inf")}, "size is inf"), ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
    ({"fit": {"steps": 1.5}}, "steps is 1.5; it must be an integer"),
    ({"fit": {"batches": []}}, "the number of batches is 0"),
    ({"fit": {"batches": [batch([[5, 9]]), "text"]}}, r"batches\[1\] is 'text'"),
    ({"fit": {"batches": [batch([[5, 9]]), batch([[5, 500]])]}}, "contains the token id 500"),
    ({"fit": {"loss": 3}}, "loss is 3; give a function"),
    ({"fit": {"optimizer": "adam"}}, "optimizer is 'adam'; give an optax optimizer"),
    ({"fit": {"direction": "v"}}, "direction is 'v'; give a `Direction`"),
    ({"fit": {"model": "mini"}}, "model is 'mini'; give the result of"),
], ids=range(12))
def test_arguments_of_the_wrong_kind_are_named(given, message):
    direction = {"width": 32, "layers": 1} | given
    fit = {"model": s.tiny_model(), "loss": abs, "batches": [batch([[5, 9]])], "steps": 1} | (
        direction.pop("fit", {}))
    with pytest.raises(ValueError, match=message):
        learn.fit(direction=fit.pop("direction", None) or learn.Direction(**direction), **fit)


def test_a_direction_starts_small_and_is_exported_at_its_layers_alone():
    direction = learn.Direction(32, layers=[0, 2], size=0.25, seed=3, site="mlp")
    values = np.asarray(direction.vector[...])
    np.testing.assert_allclose(np.linalg.norm(values, axis=1), 0.25, rtol=1e-6)
    assert not s.same_bits(values, learn.Direction(32, layers=[0, 2], size=0.25).vector[...])
    model = s.tiny_model()
    found = direction.to_vector(model)
    assert found.values.shape == (3, 32) and not found.values[1].any()
    assert s.same_bits(found.values[[0, 2]], values)
    assert (found.name, found.site, found.model) == ("learned", "mlp", model.name)
    assert found.notes["learned_at"] == "0,2"


def test_a_training_that_is_cut_off_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(learn, "_SAVE_EVERY", 2)
    model = s.tiny_model(n_layers=1)
    rows = [batch([[first, 9, 8]]) for first in (5, 17, 40)]

    def loss(output, rows):  # identifies the batch
        return rows.tokens[0, 0].astype(jnp.float32) + 0.0 * output.logits.sum()

    def fit(progress=None):
        return learn.fit(model, learn.Direction(32, layers=0), loss, rows, steps=8,
                         folder=tmp_path, progress=progress)

    def cut(done, *_):
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(cut)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["4", "6"]
    assert fit() == [5, 17]  # steps 6 and 7


def test_a_folder_of_checkpoints_is_checked_before_it_is_read(tmp_path):
    model, rows = s.tiny_model(), [batch([[5, 9, 8]])]

    def fit(steps):
        return learn.fit(model, learn.Direction(32, layers=1), lambda out, _: out.logits.sum(),
                         rows, steps=steps, folder=tmp_path)

    fit(1)
    pipe = tmp_path / "1" / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe: cannot be read .it is a pipe"):
        fit(2)
    pipe.unlink()
    large = next(path for path in tmp_path.rglob("_METADATA"))
    os.truncate(large, 40 << 30)
    with pytest.raises(ValueError, match="_METADATA has .* bytes; the limit is"):
        fit(2)
    (tmp_path / "direction.json").write_text("[1]")
    with pytest.raises(ValueError, match="direction.json: contains a list, not a JSON object"):
        fit(2)
    (tmp_path / "direction.json").write_text(json.dumps({"layers": [1], "site": "\ud800" * 99}))
    with pytest.raises(ValueError, match=r"because its site is '[\\ud80]*, not 'residual'") as at:
        fit(2)
    assert len(str(at.value)) < 400


def test_a_damaged_checkpoint_is_named(tmp_path):
    model, rows = s.tiny_model(n_layers=1), [batch([[5, 9, 8]])]
    direction = learn.Direction(32, layers=0)

    def fit():
        return learn.fit(model, direction, lambda out, _: out.logits.sum(), rows, steps=3,
                         folder=tmp_path, optimizer=optax.sgd(0.1))

    _, learned = nnx.split(direction)
    with learn._checkpoints(tmp_path, direction, model) as checkpoints:
        checkpoints.save(1, (learned, optax.sgd(0.1).init(learned)))
    path = tmp_path / "1" / "_CHECKPOINT_METADATA"
    whole = path.read_text()
    for damage in ({"performance_metrics": 0.5}, {"init_timestamp_nsecs": ["x"]}):
        path.write_text(json.dumps(json.loads(whole) | damage))
        with pytest.raises(ValueError, match="the checkpoint cannot be used .*delete") as at:
            fit()
        assert str(at.value).startswith(f"{tmp_path}: ") and "\n" not in str(at.value)
    path.write_text(whole)
    with learn._checkpoints(tmp_path, direction, model) as checkpoints:
        checkpoints.save(2, jax.tree.map(lambda x: x * jnp.nan, (learned, ())))
    with pytest.raises(ValueError, match="cannot be used .it contains values that are not finite"):
        fit()


def test_a_training_is_not_resumed_with_another_model(tmp_path):
    def train(model):
        return learn.fit(model, learn.Direction(32, layers=1), lambda out, _: out.logits.sum(),
                         [batch([[5, 9, 8]])], steps=1, folder=tmp_path)

    train(s.tiny_model())
    with pytest.raises(ValueError, match="does not match this direction, because its model is"):
        train(s.tiny_model(seed=1))


def test_a_training_has_its_documented_defaults():
    """Adam with a rate of 0.05; a vector of norm 0.1 at every token of the residual stream."""
    model, direction = s.tiny_model(n_layers=1), learn.Direction(32, layers=0)
    before = np.asarray(direction.vector[...])
    assert np.linalg.norm(before) == pytest.approx(0.1, rel=1e-5)
    assert (direction.site, direction.layers) == ("residual", (0,))
    assert s.same_bits(direction.where.encode(), jp.everywhere.encode())
    assert s.same_bits(before, learn.Direction(32, layers=0, seed=0).vector[...])
    told = []
    losses = learn.fit(model, direction, lambda out, _: (out.logits ** 2).mean(),
                       [batch(s.prompts((6,)))], steps=1, progress=lambda *x: told.append(x))
    assert told == [(1, 1, losses[0])] and losses[0] > 0
    # the first step of Adam is the rate in every coordinate
    np.testing.assert_allclose(np.abs(np.asarray(direction.vector[...]) - before), 0.05, rtol=1e-2)
    assert repr(learn.Direction(8, layers=[1, 2], site="mlp")) == "Direction(2 layers × 8, mlp)"


def test_a_direction_acts_at_its_site_and_tokens():
    """The interventions have the layers, the site and the test of tokens of the direction."""
    direction = learn.Direction(32, layers=[1, 2], site="mlp", where=jp.generated)
    wanted = jp.steer(np.asarray(direction.vector[...])[None], layers=[1, 2], site="mlp",
                      where=jp.generated)
    assert s.same_bits(direction.interventions(), wanted)


def test_a_folder_of_other_files_is_refused_and_the_settings_are_stored(tmp_path):
    """Before the first step."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("kept")
    with pytest.raises(ValueError, match="full: the folder is not empty and has no direction.json"):
        learn._check_settings(tmp_path / "full", {"layers": [1]})
    settings = {"layers": [1], "site": "mlp"}
    (tmp_path / "new").mkdir()
    learn._check_settings(tmp_path / "new", settings)
    assert json.loads((tmp_path / "new" / "direction.json").read_text()) == settings
    learn._check_settings(tmp_path / "new", settings)
    with pytest.raises(ValueError, match=r"because its layers is \[1\], not \[2\]; use another"):
        learn._check_settings(tmp_path / "new", settings | {"layers": [2]})
