"""Parts of prompts, rows of lanes and finished rows, by hand."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures.activations import LastState
from jaxpersona.captures.projections import ProjectionState
from jaxpersona.engine.edits import RowEdits, SharedEdits, for_one_row, row_count
from jaxpersona.engine.replies import so_far, unpack
from jaxpersona.engine.rows import axis_of_rows, put_rows, side_by_side, take_row, take_rows
from jaxpersona.engine.tasks import Shape, Task, cut, prefix_key
from jaxpersona.models.batch import FIRST, LAST, SYSTEM, USER, VALID
from jaxpersona.text.chat import Row

pytestmark = pytest.mark.usefixtures("compile_fast")

V = np.eye(32)


def task(tokens, number=0, prefix=0, system=0, edits=None, turn=0, kind=0):
    tokens = np.array(tokens, np.int32)
    kinds = np.where(np.arange(tokens.size) < system, SYSTEM | kind, USER).astype(np.int32)
    row = Row(tokens, kinds, np.full(tokens.size, turn, np.int32), "")
    return Task(number, row, 90 + number, 9, None, Shape(prefix, 4, 16), "lane", edits)


def test_a_part_of_a_prompt_keeps_its_positions_and_has_no_last_token():
    """Tokens 2 and 3 of a prompt of four, an empty row, and a whole prompt."""
    made = cut([task([5, 6, 7, 8]), None, task([9], number=2)], [2, 0, 0], [4, 0, 1], 3, 4, True)
    assert made.tokens.tolist() == [[7, 8, 0], [0] * 3, [9, 0, 0], [0] * 3]
    assert made.position.tolist() == [[2, 3, 0], [0] * 3, [0] * 3, [0] * 3]
    assert made.row_id.tolist() == [90, 0, 92, 0] and made.chunk
    user, first = USER | VALID | LAST, FIRST
    assert made.kind.tolist() == [[USER | VALID, user, 0], [0] * 3, [user | first, 0, 0], [0] * 3]
    assert not cut([task([5])], [0], [1], 1, 1, False).chunk
    # a row of an earlier batch may mark a token in the middle as the last one
    marked = cut([task([5, 6, 7], system=2, kind=LAST)], [0], [3], 3, 1, True)
    assert [int(kind) & LAST for kind in marked.kind[0]] == [0, 0, LAST]


def test_prompts_share_a_prefix_if_its_ids_kinds_and_turns_are_equal():
    """What follows the prefix is no part of the key."""
    head = list(range(5, 25))

    def key(tail, **options):
        return prefix_key(task([*options.pop("head", head), *tail], **{
            "prefix": 32, "system": 20, **options}))

    assert key([30]) == key([31, 32]) != ()
    others = [key([30], head=[*head[:-1], 99]), key([30], turn=1), key([30], kind=1 << 10)]
    assert key([30]) not in others and len(set(others)) == 3
    assert key([30], prefix=0) == () == key([30], system=15)


def test_interventions_of_rows_are_known_by_their_values():
    """By index in shared tables, and by content in tables of rows."""
    edits = jp.steer(V[:2], layers=[1], rows=[0, 1, 0, -1])
    shared = SharedEdits(jp.chain(edits, jp.steer(V[3], layers=[2])))
    keys = [shared.key(task([5], number=i)) for i in range(4)]
    assert keys == [(0,), (1,), (0,), (-1,)]
    made = shared.of([task([5], number=1), None], 3)
    assert made.edits[0].index.tolist() == [1, -1, -1] and made.edits[1].index is None
    one, same, other = (for_one_row(jp.steer(v, layers=[1]), None) for v in (V[0], V[0], V[1]))
    rows = RowEdits(one, 3)
    first, second, third = (rows.key(task([5], edits=x)) for x in (one, same, other))
    assert first == second != third


def test_interventions_are_written_to_the_rows_of_a_lane():
    """A row index beyond the lane is padding; as many rows as the lane has replace all of them."""
    own = [for_one_row(jp.steer(v, layers=[1], where="user"), None) for v in V[:3]]
    made = RowEdits(own[0], 4)
    assert row_count(made.table, made.axes) == 4
    two = made.of([task([5], edits=own[1]), None], 2)
    assert row_count(two, made.axes) == 2
    made.assign(two, np.array([2, 4], np.int32))
    table = made.table.edits[0]
    assert table.direction[0].argmax(-1).tolist() == [0, 0, 1, 0]
    every = made.of([task([5], edits=x) for x in (*own, own[0])], 4)
    made.assign(every, np.zeros(0, np.int32))
    assert made.table is every
    assert made.of_rows([None] * 4) is every and made.structure(2).edits[0].direction.shape[1] == 2


def test_rows_of_trees_are_replaced_taken_and_joined():
    """A leaf without a batch axis is that of the first tree."""
    one, two = ({"a": np.zeros((n, 2)), "b": np.zeros((3, n)), "c": np.zeros(5)} for n in (1, 2))
    axes = tuple(jax.tree.leaves(jax.tree.map(axis_of_rows, one, two)))
    assert axes == (0, 1, -1)

    def tree(rows, first):
        own = jnp.arange(first, first + rows, dtype=jnp.float32)
        return {"a": jnp.stack([own, own], 1), "b": jnp.stack([own] * 3),
                "c": jnp.full(5, own[0])}

    put = put_rows(tree(4, 0), tree(2, 10), np.array([3, 9], np.int32), axes=axes)
    assert put["a"][:, 0].tolist() == put["b"][2].tolist() == [0, 1, 2, 10] and not put["c"].any()
    taken = take_rows(tree(4, 1), np.array([2, 0, 9], np.int32), axes=axes)
    assert taken["a"][:, 1].tolist() == taken["b"][0].tolist() == [3, 1, 4]
    joined = side_by_side((tree(2, 1), tree(1, 7)), axes=axes)
    assert joined["a"][:, 0].tolist() == joined["b"][1].tolist() == [1, 2, 7]
    assert joined["c"].tolist() == [1] * 5
    assert take_row(jnp.arange(12.0).reshape(2, 3, 2), np.int32(1)).tolist() == [[2, 3], [8, 9]]


def state():
    """Return a state of three rows: 2, 1 and 0 tokens, after prompts of 2, 1 and 3 tokens."""
    full = ProjectionState(np.arange(3 * 6, dtype=np.float32).reshape(1, 3, 1, 6))
    last = LastState(np.arange(12, dtype=np.float32).reshape(2, 3, 2), np.array([3, -1, 2]))
    carry = types.SimpleNamespace(
        cache=types.SimpleNamespace(next=np.array([4, 1, 3])), captured={"p": full, "last": last},
        applied=(jp.Applied(np.array([3, 4, 5]), np.arange(6).reshape(2, 3)),),
        finite=np.array([True, False, True]))
    return types.SimpleNamespace(
        tokens=np.array([[7, 8, -1], [9, -1, -1], [-1] * 3], np.int32), length=np.array([2, 1, 0]),
        matched=np.array([2, 5, 5]), carry=carry)


def test_a_finished_row_is_copied_with_its_own_values():
    """Values per token end with the last token that ran."""
    first, second = unpack(state(), np.array([2, 0]), 5)
    assert [x.tokens.tolist() for x in (first, second)] == [[], [7, 8]]
    assert [x.matched for x in (first, second)] == [True, False]
    assert [x.nonfinite for x in unpack(state(), np.arange(3))] == [False, True, False]
    assert not any(x.matched for x in unpack(state(), np.arange(3)))
    assert second.captured["p"][0, :, 0].tolist() == [0, 1, 2, 3]  # four tokens in the cache
    assert first.captured["p"][0, :, 0].tolist() == [12, 13, 14]
    assert second.captured["last"].tolist() == [[0, 1], [6, 7]]
    assert second.per_token == {"p"} and second.empty == set()
    assert unpack(state(), np.array([1]))[0].empty == {"last"}
    (applied,) = first.applied
    assert (int(applied.seen), applied.changed.tolist()) == (5, [2, 5])


@pytest.mark.parametrize(("names", "stops", "wanted"), [
    ([], (), [[7, 8], [9], []]), ([], (8,), [[7], [9], []]), ([], (9,), [[7, 8], [], []]),
    (["p"], (), [[7, 8], [], []]),  # the second row's token has not run yet
], ids=str)
def test_tokens_are_streamed_once_their_projections_are_known(names, stops, wanted):
    """A stop token is never streamed."""
    lengths = (2, 1, 3)
    given = [(i, task(range(5, 5 + n)), names) for i, n in enumerate(lengths)]
    made = state()
    if names:
        made.carry.captured = {"p": jax.tree.map(jnp.asarray, made.carry.captured["p"])}
    found = so_far(made, given, stops)
    assert [tokens.tolist() for tokens, _ in found] == wanted
    if names:
        assert [values["p"][:, 0, 0].tolist() for _, values in found] == [[2, 3], [], []]


def test_a_name_without_captures_streams_none():
    """Only projections are streamed, not means or moments."""
    request = jp.Request([5], capture=[jp.capture.projections(V[:1]), jp.capture.mean(),
                                       jp.capture.moments(V[:1])])
    from jaxpersona.engine.request import projected

    assert projected(request) == ["projections"] and projected(jp.Request([5])) == []
    assert s.same_bits(request.capture, jp.capture.projections(V[:1]) | jp.capture.mean()
                       | jp.capture.moments(V[:1]))
