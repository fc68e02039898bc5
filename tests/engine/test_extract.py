"""Extraction equals a full pass over every conversation, in any batching."""

from __future__ import annotations

import re

import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine.batches import width_of
from jaxpersona.engine.extract import extract
from jaxpersona.interventions import cap, steer
from jaxpersona.interventions.where import everywhere
from jaxpersona.models.batch import ASSISTANT, USER, batch
from jaxpersona.text.chat import Row

MODEL = s.tiny_model()
LENGTHS = np.random.default_rng(0).integers(4, 90, 23)
READ = capture.mean() | capture.last(everywhere, layers=[0, 1]) | s.READ


def conversations():
    out = []
    for tokens in s.prompts(LENGTHS, seed=2):
        kind = np.where(np.arange(len(tokens)) < 3, USER, ASSISTANT).astype(np.int32)
        turn = (np.arange(len(tokens)) >= 3).astype(np.int32)
        out.append(Row(np.array(tokens, np.int32), kind, turn, ""))
    return out


ROWS = conversations()


def test_reads_what_one_pass_reads():
    v = np.random.default_rng(1).normal(size=(2, 32))
    index = np.arange(23) % 3 - 1
    edits = cap(v, layers=[1], floor=1.0, rows=index)
    told = []
    out = extract(MODEL, ROWS, capture=READ, interventions=edits, batch_tokens=256,
                  progress=lambda *x: told.append(x))
    assert told[-1] == (23, 23, out.padded) and [x[0] for x in told] == sorted(x[0] for x in told)
    wide = batch([r.tokens for r in ROWS], kind=[r.kind for r in ROWS], width=96)
    stream = s.residuals(MODEL, wide, edits)[0]
    for i, row in enumerate(ROWS):
        n = row.tokens.size
        mine = stream[i, :, :n]
        means = mine[:, row.kind == ASSISTANT].mean(1)
        assert s.rowwise(out.captured["mean"][i][None], means[None]).max() < 1e-5
        assert s.rowwise(out.captured["last"][i][None], mine[:2, -1][None]).max() < 1e-5
        assert out.captured["full"][i].shape == (3, n, 32)
        assert s.relative(out.captured["full"][i][None], mine[None]).max() < 1e-5
        assert out.applied[0].seen[i] == (n if index[i] >= 0 else 0)
    assert out.applied[0].changed.shape == (1, 23) and out.applied[0].changed.any()
    assert out.tokens == LENGTHS.sum() <= out.padded


def test_bits_do_not_depend_on_the_company():
    first = extract(MODEL, ROWS, capture=READ, batch_tokens=256)
    order = np.random.default_rng(3).permutation(23)
    mixed = extract(MODEL, [ROWS[i] for i in order], capture=READ, batch_tokens=256)
    for at, i in enumerate(order):
        for name in first.captured:
            assert s.same_bits(mixed.captured[name][at], first.captured[name][i])
    for i in (0, 11):
        alone = extract(MODEL, [ROWS[i]], capture=READ, batch_tokens=256)
        assert all(s.same_bits(alone.captured[n][0], first.captured[n][i]) for n in first.captured)


def test_no_head_and_no_layer_above_the_highest_that_is_read():
    def layers(read, edits=None):
        text = s.run.lower(MODEL.params, MODEL.config, batch([ROWS[0].tokens]), logits=None,
                           capture=read, interventions=edits).as_text(debug_info=True)
        return set(re.findall(r"layer(\d)/", text)), "/head/" in text

    assert layers(capture.mean(layers=[0, 1])) == ({"0", "1"}, False)
    assert layers(capture.mean()) == ({"0", "1", "2"}, False)
    v = np.ones(32)
    assert layers(capture.mean(layers=[0]), steer(v, layers=[1]))[0] == {"0", "1"}
    assert layers(None)[0] == set()
    assert "/head/" in s.run.lower(MODEL.params, MODEL.config, batch([ROWS[0].tokens])).as_text(
        debug_info=True)
    found = extract(MODEL, ROWS, capture=capture.mean(layers=[0, 1])).captured["mean"]
    whole = extract(MODEL, ROWS, capture=capture.mean()).captured["mean"]
    assert s.rowwise(found, whole[:, :2]).max() < 1e-5


def test_widths():
    sizes = [width_of(n) for n in range(1, 3000)]
    assert all(w >= n for n, w in enumerate(sizes, 1)) and sorted(sizes) == sizes
    assert all(w - n < max(32, n / 8) for n, w in enumerate(sizes, 1))
    assert all(width_of(w) == w for w in sizes) and len(set(sizes)) < 50


@pytest.mark.parametrize(("message", "changes"), [
    ("conversations is empty", {"conversations": []}),
    ("batch_tokens is 0", {"batch_tokens": 0}),
    ("conversation 1 has 600 tokens", {"conversations": [[5], [5] * 600]}),
    ("must be messages", {"conversations": [[]]}),
    ("interventions are for batch size 2",
     {"interventions": cap(np.ones((1, 32)), layers=[1], floor=0.0, rows=[0, 0])}),
])
def test_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        extract(MODEL, **{"conversations": ROWS, **changes})


def test_a_conversation_may_fill_the_context():
    model = s.tiny_model(max_context=40)
    row, longer = s.prompts((40, 41))
    assert extract(model, [row], capture=capture.mean(everywhere)).tokens == 40
    with pytest.raises(ValueError, match="conversation 0 has 41 tokens"):
        extract(model, [longer], capture=capture.mean(everywhere))
