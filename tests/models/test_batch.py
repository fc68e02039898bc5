"""Batches of tokens, and the slots at which a cache stores them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpersona.errors import UserError
from jaxpersona.models import batch as b
from jaxpersona.models import cache


def test_tokens_have_their_kinds_turns_and_positions_and_padding_has_none():
    made = b.batch([[5, 6, 7], [8]], kind=[[b.USER, b.USER, b.GENERATED], [b.SYSTEM]],
                   turn=[[1, 1, 2], [3]], row_id=[7, 9], width=4, vocabulary=9)
    assert made.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert made.position.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert made.kind.tolist() == [
        [b.VALID | b.FIRST | b.USER, b.VALID | b.USER, b.VALID | b.LAST | b.GENERATED, 0],
        [b.VALID | b.FIRST | b.LAST | b.SYSTEM, 0, 0, 0]]
    assert made.turn.tolist() == [[1, 1, 2, 0], [3, 0, 0, 0]]
    assert made.row_id.tolist() == [7, 9] and b.batch([[5], [6]]).row_id.tolist() == [0, 1]
    assert not made.chunk
    first, last = b.split(made, 3)
    assert (first.tokens.tolist(), last.tokens.tolist()) == ([[5, 6, 7], [8, 0, 0]], [[0], [0]])
    assert first.chunk and last.chunk and last.row_id.tolist() == [7, 9]
    assert [piece.chunk for piece in b.split(made, 4)] == [False]


@pytest.mark.parametrize(("options", "words"), [
    ({"vocabulary": 8}, "row 1 of tokens contains the token id 8; token ids must be in 0…7, the"),
    ({"width": 2}, "width is 2, but a row has 3 tokens"),
    ({"turn": [[0, 0], [0, 0]]}, r"turn has rows of \[2, 2\] integers; .*: \[3, 1\]"),
    ({"kind": [[0, 0, 0]]}, "kind has rows of .*; give one integer per token of every row"),
    ({"row_id": [1]}, r"row_id has shape \(1,\); its shape must be \(2,\)"),
])
def test_an_argument_that_does_not_match_the_tokens_is_named(options, words):
    with pytest.raises(UserError, match=words):
        b.batch([[5, 6, 7], [8]], **options)
    for nested in ([[[5, 6], [7, 8]]], [[5], [[6]]]):  # not flattened
        with pytest.raises(UserError, match=r"row \d of tokens is \[\[.*; give integers"):
            b.batch(nested)
    with pytest.raises(UserError, match="size is 0; it must be positive"):
        b.split(b.batch([[5]]), 0)


@pytest.mark.parametrize(("width", "slots"), [(1, 4), (2, 16), (2, 4)])
def test_keys_are_written_at_their_slots_and_nowhere_else(width, slots):
    """By a scatter of one token, by one of few tokens into many slots, and by a gather."""
    keys = np.arange(1, 2 * width * 2 * 3 + 1, dtype=np.float32).reshape(2, width, 2, 3)
    at = np.array([[1, 2], [3, slots]])[:, :width]  # the second token of row 1 is padding
    want = np.full((2, 2, slots, 3), -1, np.float32)
    for row, token in np.ndindex(at.shape):
        if at[row, token] < slots:
            want[row, :, at[row, token]] = keys[row, token]
    got = cache.write(jnp.full((2, 2, slots, 3), -1.0), jnp.asarray(keys), jnp.asarray(at))
    np.testing.assert_array_equal(got, want)
