"""Interventions on rows are merged by value, not by object identity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.engine.generate import generate
from jaxpersona.engine.programs import TRACES
from jaxpersona.interventions import (
    cap,
    chain,
    custom,
    gate,
    reserve,
    rotate,
    stack_rows,
    steer,
)
from jaxpersona.interventions.where import everywhere
from jaxpersona.vectors.vector import Vector

V = np.random.default_rng(0).normal(size=(3, 32))


def bend(amount, h):
    return h + amount * jnp.tanh(h)


KINDS = {
    "cap": lambda x: cap(V[0], layers=[0, 1], floor=x),
    "steer": lambda x: chain(steer(V[1], layers=[1], scale=x), cap(V[0], layers=[2], floor=0.5)),
    "gate": lambda x: gate(steer(V[2], layers=[2]), V[0], layer=0, above=x),
    "rotate": lambda x: rotate(V[0], V[1], layers=[0], to=x),
    "custom": lambda x: custom(bend, {"a": np.float32(x)}, layers=[1]),
}


def shapes(edits):
    return jax.tree.structure(edits), [x.shape for x in jax.tree.leaves(edits)]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_parts_share_an_entry_as_one_object_does(kind):
    make = KINDS[kind]
    one, other = make(0.5), make(0.7)
    same = stack_rows([one, one, None, other])
    apart = stack_rows([make(0.5), make(0.5), None, make(0.7)])
    mapped = stack_rows(jax.tree.map(jnp.copy, [one, one, None, other]))
    for found in (apart, mapped):
        assert shapes(found) == shapes(same) and s.same_bits(found, same)
    assert {edit.entries for edit in same.edits} <= {1, 2}


def test_equal_values_at_other_layers_or_of_another_function_stay_apart():
    def bend_too(amount, h):
        return h + amount * jnp.tanh(h)

    found = stack_rows([cap(V[0], layers=[0], floor=0.5), cap(V[0], layers=[1], floor=0.5),
                        cap(V[0], layers=[0], floor=0.5, where=everywhere.without("first"))])
    assert found.edits[0].index.tolist() == [0, 1, 2]
    with_functions = stack_rows([custom(bend, np.float32(1), layers=[0]),
                                 custom(bend_too, np.float32(1), layers=[0])])
    assert len(with_functions.edits) == 2


def test_a_mapped_copy_runs_the_same_program():
    model = s.tiny_model()
    parts = [KINDS["cap"](0.5)] * 3 + [KINDS["cap"](0.9)]
    texts = s.prompts((5, 6, 7, 8))

    def reply(parts):
        return generate(model, texts, interventions=stack_rows(parts), max_new_tokens=3,
                        batch_size=4).tokens

    wanted, before = reply(parts), dict(TRACES)
    copies = [jax.tree.map(jnp.copy, part) for part in parts]
    assert s.same_bits(reply(copies), wanted) and dict(TRACES) == before


def test_reserved_entries_are_counted_by_content():
    into = reserve(4, 32, [0, 1], entries=1)
    filled = stack_rows([KINDS["cap"](0.5) for _ in range(4)], into=into)
    assert filled.edits[0].index.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"distinct: 2.* do not fit .*entries: 1"):
        stack_rows([*(KINDS["cap"](x) for x in (0.5, 0.5, 0.6)), None], into=into)


def test_traced_parts_have_an_entry_each():
    def loss(x):
        edits = stack_rows([cap(V[0], layers=[0], floor=x), cap(V[0], layers=[0], floor=x),
                            cap(V[0], layers=[0], floor=0.5)])
        assert edits.edits[0].index.tolist() == [0, 1, 2] and edits.edits[0].entries == 4
        return edits.edits[0].coefficients[..., 2].sum(where=jnp.isfinite(
            edits.edits[0].coefficients[..., 2]))

    assert float(jax.grad(loss)(jnp.float32(0.5))) == 2.0


def test_an_emptied_slot_forgets_the_model_of_its_direction():
    mine = steer(Vector(np.ones((3, 32)), fingerprint="ab" * 8), layers=[0])
    filled = stack_rows([mine, None], into=reserve(2, 32, [0]))
    assert np.asarray(filled.edits[0].origin).any()
    nobody = stack_rows([None, None], into=filled)
    assert not np.asarray(nobody.edits[0].origin).any()
    generate(s.tiny_model(), [[5], [6]], interventions=nobody, max_new_tokens=1, batch_size=2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_tree_has_the_same_structure_and_compiles_nothing(kind):
    """`jax.tree.map` creates new objects, which JAX and `stack_rows` treat as equal."""
    edits = stack_rows([KINDS[kind](0.5), KINDS[kind](0.5), KINDS[kind](0.7)])
    mapped = jax.tree.map(lambda x: x, edits)
    traces = []

    @jax.jit
    def count(edits):
        traces.append(1)
        ready = edits.prepare(3, jnp.zeros(()))
        return [edit.where for edit in ready.edits]

    assert jax.tree.structure(mapped) == jax.tree.structure(edits)
    assert s.same_bits(count(mapped), count(edits)) and len(traces) == 1
    copied = [jax.tree.map(lambda x: x, KINDS[kind](x)) for x in (0.5, 0.5, 0.7)]
    again = stack_rows(copied)
    assert s.same_bits(again, edits) and {e.entries for e in again.edits} <= {1, 2}
    assert s.same_bits(count(again), count(edits)) and len(traces) == 1


def test_reserved_tables_have_the_size_and_the_site_that_were_asked_for():
    tables = reserve(5, 32, [0, 2], slots=2, entries=3, site="mlp").edits
    assert [(t.rows, t.entries, t.width, t.layers, t.site) for t in tables] == [
        (5, 4, 32, (0, 2), "mlp")] * 2
    (table,) = reserve(5, 32, [0]).edits
    assert (table.entries, table.site) == (8, "residual")
    with pytest.raises(ValueError, match="row 0 do not fit"):
        stack_rows([steer(V[0], layers=[0]), *[None] * 4], into=reserve(5, 32, [0], site="mlp"))
