"""Padded lengths, cache sizes, batches and pieces: the values that the docstrings state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s

from jaxpersona.captures.capture import Capture
from jaxpersona.engine import pieces, prompts
from jaxpersona.engine.batches import batches, pad, width_of
from jaxpersona.engine.generate import queue, stops_of
from jaxpersona.engine.prompts import bucket
from jaxpersona.engine.sampling import sampling
from jaxpersona.engine.tasks import Shape, cache_size, shape_of, shape_within
from jaxpersona.interventions import Interventions
from jaxpersona.models.batch import ASSISTANT, SYSTEM, USER
from jaxpersona.text.chat import Row


def row(length, system=0):
    """Return a prompt whose first `system` tokens belong to a system message."""
    kind = np.where(np.arange(length) < system, SYSTEM, USER).astype(np.int32)
    return Row(np.arange(5, 5 + length, dtype=np.int32), kind, np.zeros(length, np.int32), "")


def test_the_padded_lengths_of_prompts_are_those_of_the_list():
    """Above 256 tokens, there is a length halfway between two powers of two."""
    assert sorted({bucket(n) for n in range(1, 2049)}) == [
        32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [bucket(n) for n in (1, 32, 33, 256, 257, 384, 385)] == [32, 32, 64, 256, 384, 384, 512]


def test_the_cache_sizes_are_those_of_the_list_and_end_at_the_context():
    """Beyond the context, sizes are multiples of 64."""
    assert sorted({cache_size(n, 10**6) for n in range(1, 2049)}) == [
        64, 128, 256, 512, 768, 1024, 1536, 2048]
    found = [cache_size(n, context) for n, context in (
        (65, 128), (65, 127), (130, 200), (600, 768), (600, 767), (128, 100))]
    assert found == [128, 128, 192, 768, 640, 128]
    powers = [cache_size(n, context, least=256, finer=None) for n, context in (
        (5, 4096), (300, 4096), (520, 1024), (520, 1023))]
    assert powers == [256, 512, 1024, 576]


def test_the_padded_lengths_of_texts_have_steps_that_grow_with_the_length():
    """Steps of 32, 64 and 128 tokens."""
    assert sorted({width_of(n) for n in range(1, 2049)}) == [
        *range(32, 513, 32), *range(576, 1025, 64), *range(1152, 2049, 128)]


@pytest.mark.parametrize(("ways", "wanted"), [
    (1, [([1], 96, 1), ([5], 96, 1), ([0, 3], 64, 2), ([4], 64, 2), ([2], 32, 4)]),
    (2, [([1, 5], 96, 2), ([0, 3], 64, 2), ([4], 64, 2), ([2], 32, 4)]),
])
def test_batches_have_as_many_rows_as_fit_and_the_longest_come_first(ways, wanted):
    """With two shards, the number of rows is even."""
    rows = [row(n) for n in (33, 90, 31, 40, 64, 65)]
    assert batches(rows, 128, ways) == wanted


def test_a_batch_is_padded_with_empty_rows():
    """Tokens, kinds and turns stay at their places."""
    kind = np.array([USER, ASSISTANT, ASSISTANT], np.int32)
    made = pad([Row(np.array([7, 8, 9], np.int32), kind, np.array([0, 1, 1], np.int32), "")], 4, 3)
    assert made.tokens.tolist() == [[7, 8, 9, 0], [0] * 4, [0] * 4]
    assert made.turn.tolist() == [[0, 1, 1, 0], [0] * 4, [0] * 4]
    assert made.length.tolist() == [3, 0, 0]
    assert [int(k) & ASSISTANT for k in made.kind[0]] == [0, ASSISTANT, ASSISTANT, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_large_model_is_one_of_so_many_parameters_without_its_tables(monkeypatch, tied):
    """A tied head is not subtracted a second time."""
    config = s.tiny_config(tied_embeddings=tied)
    inner = config.parameters - (1 if tied else 2) * 97 * 32
    for least, wanted in ((inner, True), (inner + 1, False)):
        monkeypatch.setattr(pieces, "LEAST_PARAMETERS", least)
        assert pieces.large(config) is wanted


def test_the_longest_texts_begin_first_and_free_rows_are_filled_at_once():
    """Three texts in two rows need three calls."""
    calls = list(pieces.schedule([3, 40, 17], 2, 16))
    assert [call.text.tolist() for call in calls] == [[1, 2], [1, 2], [1, 0]]
    assert [call.start.tolist() for call in calls] == [[0, 0], [16, 16], [32, 0]]
    assert [call.stop.tolist() for call in calls] == [[16, 16], [32, 17], [40, 3]]
    assert [call.ends.tolist() for call in calls] == [[False] * 2, [False, True], [True] * 2]
    assert [call.begins.tolist() for call in calls] == [[True] * 2, [False] * 2, [False, True]]


@pytest.mark.parametrize(("options", "wanted"), [
    ((row(20), 24, False, 512, 9), Shape(0, 32, 64)),  # 32 + 24 slots
    ((row(20), 33, False, 512, 9), Shape(0, 32, 128)),
    ((row(40, 20), 64, True, 512, 9), Shape(32, 32, 128)),  # 32 + 32 + 64 slots
    ((row(40, 20), 65, True, 512, 9), Shape(32, 32, 256)),
    ((row(20), 24, False, 512, 8), Shape(0, 64, 256)),  # few rows: powers of two
    ((row(20), 237, False, 512, 8), Shape(0, 64, 512)),
    ((row(150, 70), 9, True, 512, 8), Shape(128, 128, 256)),
    ((row(40), 216, False, 512, 9, 16), Shape(0, 16, 256)),  # pieces: padding takes no slots
    ((row(40), 217, False, 512, 9, 16), Shape(0, 16, 512)),
    ((row(300, 290), 2, True, 1024, 9, 16), Shape(384, 16, 512)),
])
def test_the_static_sizes_of_a_prompt(options, wanted):
    """Prefix, width and slots, on both sides of the edges of a cache size."""
    assert shape_of(*options) == wanted


def test_a_cache_of_a_given_size_is_the_smallest_that_fits():
    """Where even the largest is too small, the limit of the reply is reduced."""
    for limit, slots, most in ((32, 64, 32), (33, 96, 33), (64, 96, 64), (65, 96, 64)):
        assert shape_within(row(20), limit, [64, 96]) == (Shape(0, 32, slots), most)
    assert shape_within(row(31), 1, [32], 16) == (Shape(0, 16, 32), 1)


def test_prompts_wait_by_lane_then_by_shape_and_the_longest_limit_comes_first():
    """The lane of the first prompt comes first, although its cache is larger."""
    model = s.tiny_model()
    rows, most = [row(n) for n in (300, 100, 5, 6, 7)], np.array([5, 50, 9, 30, 20], np.int32)
    how = sampling(5, temperature=[0.0, 0.0, 0.5, 0.0, 0.0], seed=[4, 5, 6, 7, 8])
    made = queue(model, rows, np.arange(5, dtype=np.uint32) + 90, most - 1, how, Interventions(),
                 Capture(), stops_of(model, False), lambda *_: None, max_new=most, batch_size=4)
    assert [task.number for task in made.waiting] == [0, 3, 4, 2, 1]
    assert [task.shape for task in made.waiting] == [
        Shape(0, 512, 512), *[Shape(0, 64, 256)] * 3, Shape(0, 128, 256)]
    assert [(task.lane, task.row_id, task.limit) for task in made.waiting][1] == (256, 93, 29)
    assert [float(task.sampling.temperature[0]) for task in made.waiting] == [0, 0, 0, 0.5, 0]
    assert [int(task.sampling.seed[0]) for task in made.waiting] == [4, 7, 8, 6, 5]


def test_prompts_with_the_same_prefix_wait_together():
    """Otherwise a lane would compute the prefix again."""
    model = s.tiny_model()
    heads = [np.arange(20) + 5, np.arange(20) + 40]
    tokens = [np.r_[heads[i % 2], 5 + i, np.full(4, 9)].astype(np.int32) for i in range(4)]
    rows = [dataclasses.replace(row(25, 20), tokens=own) for own in tokens]
    made = queue(model, rows, np.arange(4, dtype=np.uint32), np.full(4, 9, np.int32), sampling(4),
                 Interventions(), Capture(), stops_of(model, False), lambda *_: None,
                 max_new=np.full(4, 9, np.int32), batch_size=4, share_prefix=True)
    assert [task.number % 2 for task in made.waiting] == [0, 0, 1, 1]


@pytest.mark.parametrize(("ids", "wanted"), [
    ([np.array(7), np.uint32(8)], [7, 8]), ([0, 2**32 - 1], [0, 2**32 - 1]),
    ([np.array(True), 8], None), ([np.array([7]), 8], None), ([7, 2**32], None),
], ids=str)
def test_row_ids_are_32_bit_integers_of_any_type(ids, wanted):
    """Also arrays without an axis, but neither booleans nor lists."""
    rows = [row(3), row(4)]
    if wanted is None:
        with pytest.raises(ValueError, match=r"^ids\[\d\] is .*; it must be an integer in 0…2³²−1"):
            prompts.row_ids(rows, ids)
    else:
        found = prompts.row_ids(rows, ids)
        assert found.tolist() == wanted and found.dtype == np.uint32


def test_a_prompt_may_leave_room_for_one_token_and_its_limit_is_what_is_left():
    """One limit for all prompts, or one per prompt."""
    model = s.tiny_model(max_context=40)
    assert prompts.limits(model, [row(39), row(30), row(5)], 20).tolist() == [1, 10, 20]
    assert prompts.limits(model, [row(39), row(30)], np.array([3, 4])).tolist() == [1, 4]
    with pytest.raises(ValueError, match="prompt 1 has 40 tokens, but the model's context is lim"):
        prompts.limits(model, [row(5), row(40)], 1)
