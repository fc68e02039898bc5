"""Projections per turn equal those from `extract`, for any model and mesh."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.engine.extract import extract
from jaxpersona.interventions.where import everywhere
from jaxpersona.persona.talk import Talks, grow, project_conversation
from jaxpersona.vectors.vector import Vector

pytestmark = pytest.mark.usefixtures("compile_fast")

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am a ghost of the sea."},
        {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Still."}]


@pytest.fixture(scope="module")
def model(checkpoint):
    """Return a random model with a byte-level tokenizer."""
    return jp.load(str(checkpoint))


@pytest.fixture(scope="module")
def vectors(model):
    """Return two random directions of the model."""
    rng = np.random.default_rng(0)
    shape = model.config.n_layers, model.config.d_model
    return [Vector(rng.normal(size=shape).astype(np.float32), name=name, model=model.name,
                   fingerprint=model.fingerprint) for name in ("a", "b")]


def by_hand(model, vectors, edits=None):
    """Return the mean projections of assistant messages, and all activations, from `extract`."""
    read = extract(model, [TALK], capture=capture.full(everywhere), interventions=edits)
    row, full = read.rows[0], read.captured["full"][0]
    text = [model.tokenizer.decode([token]) for token in row.tokens.tolist()]
    out = []
    for turn in (2, 4):
        content = TALK[turn]["content"]
        start = "".join(text).index(content)  # each token is one byte
        at, where = 0, []
        for i, piece in enumerate(text):
            if start <= at < start + len(content):
                where.append(i)
            at += len(piece)
        means = full[:, where].mean(1)  # [L, D]
        out.append(np.stack([np.einsum("ld,ld->l", means, v.unit) for v in vectors], -1))
    return out, full


def test_each_value_is_the_mean_over_the_message(model, vectors):
    """Values equal the averages over all token activations, with and without steering."""
    edit = jp.steer(vectors[0], layers=[1], scale=3.0)
    plain, _ = by_hand(model, vectors)
    for edits in (None, edit):
        expected, _ = by_hand(model, vectors, edits)
        found = project_conversation(model, TALK, vectors, interventions=edits)
        assert [(t.turn, t.tokens) for t in found] == [(2, len(TALK[2]["content"])),
                                                       (4, len(TALK[4]["content"]))]
        for turn, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(turn.values, want, rtol=2e-4, atol=2e-4)
    assert np.abs(expected[0] - plain[0]).max() > 0.1  # steering has an effect


def test_edits_of_another_model_are_refused(model, vectors):
    other = dataclasses.replace(vectors[0], model="another", fingerprint="0" * 16)
    edit = dataclasses.replace(other, fingerprint=model.config.hash() + "00000001")
    with pytest.raises(ValueError, match="made for another model"):
        project_conversation(model, TALK, vectors, interventions=jp.steer(edit, layers=[1]))
    wide = jp.steer(np.ones(7, np.float32), layers=[1])
    with pytest.raises(ValueError, match="width"):
        project_conversation(model, TALK, vectors, interventions=wide)
    many = jp.steer(np.ones((2, 32), np.float32), layers=[1], rows=[0, 1])
    with pytest.raises(ValueError, match="batch size 2"):
        project_conversation(model, TALK, vectors, interventions=many)


def test_a_mesh_of_two_rows_gives_the_values_of_one_device(model, checkpoint, vectors):
    mesh = jp.make_mesh(data=2, model=2, devices=jax.devices()[:4])
    spread = jp.load(str(checkpoint), mesh=mesh)
    one, two = (project_conversation(m, TALK, vectors) for m in (model, spread))
    for a, b in zip(one, two, strict=True):
        assert (a.turn, a.tokens) == (b.turn, b.tokens)
        np.testing.assert_allclose(b.values, a.values, rtol=1e-4, atol=1e-4)


def test_no_assistant_message_and_too_long_a_conversation_are_refused(model, vectors):
    with pytest.raises(ValueError, match="no assistant message"):
        project_conversation(model, TALK[:2], vectors)
    long = [TALK[1], {"role": "assistant", "content": "word " * 100}]
    with pytest.raises(ValueError, match="context"):
        project_conversation(model, long, vectors)
    with pytest.raises(ValueError, match="no tokenizer"):
        project_conversation(dataclasses.replace(model, tokenizer=None), TALK, vectors)


def test_grown_conversations_are_edited(model, vectors):
    """Interventions apply in every turn; the read-out of the same replies is without them."""
    edit = jp.cap(vectors[0], layers=[2], floor=50.0)
    talks = [[], [{"role": "system", "content": "Be brief."}]], [["Hello.", "And then?"]] * 2
    held = grow(model, *talks, vectors[0], interventions=edit, max_new_tokens=5, readout=True)
    free = grow(model, *talks, vectors[0], max_new_tokens=5, readout=True)
    assert held.projections.shape == free.projections.shape == (2, 2, 3)
    assert (held.projections[..., 2] >= 49.99).all()
    assert (free.projections[..., 2] < 49).all() and (held.readout[..., 2] < 49).all()
    np.testing.assert_allclose(free.readout, free.projections, rtol=2e-4, atol=2e-4)
    assert np.abs(np.diff(free.readout, axis=0)).min() > 1e-3  # turns are not interchanged
    assert grow(model, *talks, vectors[0], max_new_tokens=5).readout is None


def test_an_arm_has_the_values_of_its_conversations():
    replies = [[f"{turn}{n}" for n in range(5)] for turn in range(2)]
    values = np.arange(30.0).reshape(2, 5, 3)
    for readout in (None, -values):
        arm = Talks(replies, values, readout).arm(1, 4)
        assert arm.replies == [["01", "02", "03"], ["11", "12", "13"]]
        np.testing.assert_array_equal(arm.projections, values[:, 1:4])
        assert (arm.readout is None) == (readout is None)
        if readout is not None:
            np.testing.assert_array_equal(arm.readout, -values[:, 1:4])


def test_conversations_with_equal_ids_share_their_draws(model):
    vector = Vector(np.ones((3, 32)))
    how = dict(max_new_tokens=12, temperature=1.5, batch_size=4)
    same = grow(model, [[], []], [["Hello."]] * 2, vector, ids=[7, 7], **how)
    apart = grow(model, [[], []], [["Hello."]] * 2, vector, ids=[7, 8], **how)
    assert same.replies[0][0] == same.replies[0][1] == apart.replies[0][0] != apart.replies[0][1]


@pytest.mark.parametrize(("given", "message"), [
    ([], r"vectors is \[\]"), ((), r"vectors is \(\)"), (None, "vectors is None"),
    (Vector(np.ones((2, 3), np.float32), name="a"), r"vectors is Vector"),
])
def test_directions_must_be_a_list_of_at_least_one(model, given, message):
    """An empty list and a single direction are refused in one line."""
    with pytest.raises(jp.UserError, match=message + ".*; give a list of at least one direction"):
        project_conversation(model, TALK, given)
