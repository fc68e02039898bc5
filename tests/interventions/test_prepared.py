"""The two types of intervention tables: the user's, and the prepared one for a batch's rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.interventions import Interventions, cap, stack_rows
from jaxpersona.interventions.compose import PreparedInterventions, prepared
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward

MODEL = s.tiny_model(n_layers=2, windows=(None, None))
TEXT = batch(s.prompts((7, 4), seed=6))
G = np.random.default_rng(12).normal(size=(6, 32)).astype(np.float32)
ALL = jnp.ones((2, 5), bool)


def act(edits, h):
    x = jnp.asarray(h)
    for edit in edits.prepare(len(h), x).edits:
        x, _ = edit.apply(edit.layers[0], x, ALL, jnp.asarray(h))
    return np.asarray(x)


def test_interventions_are_taken_and_merged_before_they_are_prepared():
    """Prepared tables belong to their rows; for other rows, prepare the user's tables again."""
    like, order = jnp.zeros(()), np.array([1, 0])
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, G.shape[1])), jnp.float32)
    caps = cap(G[:2], layers=[0], floor=[5.0, 9.0], rows=[0, 1])
    wanted = cap(G[:2], layers=[0], floor=[5.0, 9.0], rows=order)
    assert act(caps.take(order), h).tobytes() == act(wanted, h).tobytes()
    assert act(caps.take(order), h).tobytes() != act(caps, h).tobytes()
    ready = caps.prepare(2, like)
    assert isinstance(ready, PreparedInterventions)
    with pytest.raises(ValueError, match="interventions is a PreparedInterventions"):
        stack_rows([ready, None])
    with pytest.raises(ValueError, match="for batch size 2, but the batch size is 3"):
        caps.prepare(3, like)


def test_forward_accepts_prepared_interventions():
    edits = cap(G[:2], layers=[0, 1], floor=[2.0, 3.0], rows=[0, 1])
    ready = edits.prepare(2, MODEL.params.embed_vd)
    found, wanted = (forward(MODEL.params, MODEL.config, TEXT, interventions=x)
                     for x in (ready, edits))
    assert s.same_bits(found.logits, wanted.logits)
    assert s.same_bits(found.applied, wanted.applied)
    assert np.asarray(wanted.applied[0].changed).any()
    with pytest.raises(ValueError, match="prepared for batch size 3, but the batch size is 2"):
        forward(MODEL.params, MODEL.config, TEXT, interventions=cap(
            G[:1], layers=[0], floor=0.0, rows=[0, 0, 0]).prepare(3, MODEL.params.embed_vd))


def test_entries_without_an_index_broadcast_over_rows():
    """Without an index, entry b applies to row b, and `take` selects entries."""
    h = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, G.shape[1])), jnp.float32)
    indexed = cap(G[:2], layers=[0], floor=[5.0, 9.0], rows=[0, 1])
    rowwise = Interventions(tuple(edit.replace(index=None) for edit in indexed.edits))
    assert rowwise.rows == 2
    assert act(rowwise, h).tobytes() == act(indexed, h).tobytes()
    order = np.array([1, -1])
    found, wanted = (x.take(order).prepare(2, h).edits[0] for x in (rowwise, indexed))
    assert s.same_bits(found.where, wanted.where)
    active = found.seen(batch([[5] * 5] * 2))
    assert s.same_bits(found.apply(0, h, active, h), wanted.apply(0, h, active, h))


def test_rows_are_permuted_before_their_entries_are_gathered():
    edits = cap(G[:3], layers=[0, 1], floor=[1.0, 2.0, 3.0], rows=[2, -1, 0, 1])
    order = np.array([3, 0, -1, 2])
    like, rows = jnp.zeros(()), batch([[5, 6]] * 4)
    found = edits.take(order).prepare(4, like).edits[0]
    wanted = cap(G[:3], layers=[0, 1], floor=[1.0, 2.0, 3.0],
                 rows=[1, 2, -1, 0]).prepare(4, like).edits[0]
    np.testing.assert_array_equal(found.seen(rows), wanted.seen(rows))
    for b in (0, 1, 3):
        np.testing.assert_array_equal(found.by_layer[0].direction[b],
                                      wanted.by_layer[0].direction[b])


def test_prepared_tables_are_for_the_layers_of_the_model():
    """A table at a layer that the model does not have would have no effect."""
    like = jnp.zeros(())
    ready = cap(G[0], layers=[0, 2], floor=0.0).prepare(2, like)
    assert prepared(ready, layers=3, width=32, rows=2, like=like) is ready
    with pytest.raises(ValueError, match="edit layer 2, but the model has layers 0…1"):
        prepared(ready, layers=2, width=32, rows=2, like=like)
