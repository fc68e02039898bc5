"""Generation: bit-identical in any packing; other batch sizes differ only at near-ties."""

from __future__ import annotations

import dataclasses

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine import prompts
from jaxpersona.engine.generate import generate
from jaxpersona.engine.prompts import bucket
from jaxpersona.engine.sampling import uniforms
from jaxpersona.interventions import Interventions, cap, gate, steer
from jaxpersona.interventions.where import everywhere
from jaxpersona.models.batch import TEMPLATE, USER, batch
from jaxpersona.text.chat import Row
from jaxpersona.vectors.vector import Vector

MODEL = s.tiny_model(stop_ids=(3, 7))
LENGTHS = (5, 31, 12, 40, 2, 20, 9, 33, 17, 26, 3)  # in two length buckets
ROWS = s.prompts(LENGTHS, seed=11)
SHORT = [row for row in ROWS if len(row) < 32]  # in one bucket
READ = capture.mean() | s.READ
WARM = dict(temperature=1.0, top_p=0.95, seed=6)


def go(rows=ROWS, model=MODEL, **changes):
    how = {"capture": READ, "max_new_tokens": 16, "batch_size": 5, **changes}
    return generate(model, rows, **how)


def same(a, i, b, j):
    """Return whether reply i of a and reply j of b are bit-identical, including readings."""
    return (
        np.array_equal(a.tokens[i], b.tokens[j]) and a.stopped[i] == b.stopped[j]
        and s.same_bits(a.captured["mean"][i], b.captured["mean"][j])
        and s.same_bits(a.captured["full"][i], b.captured["full"][j])
    )


@pytest.mark.parametrize(("size", "how"), [(4, WARM), (5, {}), (5, WARM)],
                         ids=["4-sampled", "5-greedy", "5-sampled"])
def test_bits_do_not_depend_on_the_company(size, how):
    first = go(batch_size=size, **how)
    assert 0 < sum(map(len, first.tokens)) and len({tuple(t) for t in first.tokens}) > 8
    for i in range(0, len(ROWS), 3):  # alone, with padding
        assert same(go([ROWS[i]], batch_size=size, **how), 0, first, i)
    order = np.random.default_rng(0).permutation(len(ROWS))  # another order and packing
    mixed = go([ROWS[i] for i in order], batch_size=size, **how)
    assert all(same(mixed, at, first, i) for at, i in enumerate(order))
    part = [1, 4, 8]
    fewer = go([ROWS[i] for i in part], batch_size=size, **how)
    assert all(same(fewer, at, first, i) for at, i in enumerate(part))


def test_edited_neighbours_change_nothing():
    v = np.random.default_rng(1).normal(size=(2, 32))
    index = np.array([0, -1, 1, -1, 0, 1, -1, 0, 0, 1, -1])
    edits = cap(v, layers=[1], floor=1.0, rows=index)
    one = go(interventions=edits, **WARM)
    other = go(interventions=cap(v, layers=[1], floor=[1.0, 2.0], rows=index), **WARM)
    kept = np.flatnonzero(index <= 0)
    assert all(same(one, i, other, i) for i in kept)
    assert not all(same(one, i, other, i) for i in range(len(ROWS)))


def near_ties(seed=0):
    """Return a model with pairs of tokens with almost equal logits, so that rounding matters."""
    model = s.tiny_model(seed)
    head = np.array(model.params.head_vd)
    head[5::2] = head[4:-1:2] * (1 + 1e-7)
    return dataclasses.replace(model, params=model.params.replace(head_vd=jnp.asarray(head)),
                               stop_ids=())


def first_divergences(a, b):
    for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
        apart = np.flatnonzero(x != y)
        if apart.size:
            yield i, int(apart[0])


def test_other_batch_sizes_part_only_at_near_ties():
    # Even rows are greedy and odd rows are sampled. Draws are the same for all batch sizes, but
    # logits are rounded differently.
    model, ids = near_ties(), np.arange(len(SHORT)) + 7
    warm = np.arange(len(SHORT)) % 2 * 1.0
    runs = [go(SHORT, model, max_new_tokens=32, batch_size=size, ids=ids, temperature=warm, seed=2,
               capture=None) for size in (3, 5, 16)]
    parted = [0, 0]
    for other in runs[1:]:
        for i, at in first_divergences(runs[0], other):
            parted[i % 2] += 1
            text = [*SHORT[i], *runs[0].tokens[i][:at]]
            logits = s.residuals(model, batch([text], width=64))[1][0, len(text) - 1]
            margin = s.top2_margin(logits)
            if warm[i]:  # the two tokens nearly tie, or the draw is at the edge between two tokens
                p = np.asarray(jax.nn.softmax(logits))
                one, two = (p[r.tokens[i][at]] for r in (runs[0], other))
                key = ((2, jnp.uint32), (ids[i], jnp.uint32), (len(text), jnp.int32))
                draw = uniforms(*(jnp.asarray([value], kind) for value, kind in key))
                edge = np.abs(np.cumsum(np.sort(p)[::-1]) - float(draw[0])).min()
                margin = min(abs(one - two), edge)
            assert margin < 1e-4, f"row {i}, token {at}"
    assert parted[0], "no near-tie occurred, so nothing was tested"
    print(f"divergences, greedy and sampled: {parted}, each at a near tie")


def test_draws_follow_seed_and_row():
    rows = [ROWS[0]] * 5
    out = go(rows, **WARM)
    assert len({tuple(t) for t in out.tokens}) > 2  # duplicate prompts get different samples
    again = go(rows, ids=[8, 9, 8, 9, 1], **WARM)
    assert same(again, 0, again, 2) and same(again, 1, again, 3) and not same(again, 0, again, 1)
    other = go(rows, ids=[8, 9, 8, 9, 1], **{**WARM, "seed": [6, 6, 7, 6, 6]})
    assert same(other, 0, again, 0) and not same(other, 2, again, 2)


def test_one_call_mixes_greedy_and_sampled_rows():
    """A row's temperature does not affect its neighbors."""
    ids, warm = np.arange(len(ROWS)), np.arange(len(ROWS)) % 2 * 1.0
    cold = go(ids=ids, capture=None)
    sampled = go(ids=ids, capture=None, temperature=1.0, seed=6)
    mixed = go(ids=ids, capture=None, temperature=warm, seed=6)
    for i, hot in enumerate(warm):
        np.testing.assert_array_equal(mixed.tokens[i], (sampled if hot else cold).tokens[i])
    apart = [not np.array_equal(a, b) for a, b in zip(cold.tokens, sampled.tokens, strict=True)]
    assert sum(apart) >= len(ROWS) - 2, "sampled replies must differ from greedy ones"


def test_stops_limits_and_context():
    free = go(SHORT, dataclasses.replace(MODEL, stop_ids=()), max_new_tokens=16)
    assert all(len(t) == 16 for t in free.tokens) and not free.stopped.any()
    used = sorted({int(t) for row in free.tokens for t in row})
    stops = tuple(used[1:6])
    out = go(SHORT, dataclasses.replace(MODEL, stop_ids=stops))
    for i, said in enumerate(free.tokens):
        at = np.flatnonzero(np.isin(said, stops))
        n = int(at[0]) if at.size else 16
        np.testing.assert_array_equal(out.tokens[i], said[:n])
        assert out.stopped[i] == bool(at.size)
        assert out.captured["full"][i].shape[1] == len(SHORT[i]) + n
    assert out.stopped.any()
    tight = dataclasses.replace(MODEL, stop_ids=(), params=MODEL.params,
                                config=dataclasses.replace(MODEL.config, max_context=41))
    short = go(SHORT, tight)
    assert [len(t) for t in short.tokens] == [min(16, 41 - len(row)) for row in SHORT]
    for i, said in enumerate(short.tokens):
        np.testing.assert_array_equal(said, free.tokens[i][: len(said)])
    with pytest.raises(ValueError, match="prompt 1 has 41 tokens, .* is limited to 41 "):
        go([[5], [5] * 41], model=tight)


def test_a_reply_to_token_ids_is_the_message_after_them():
    model = dataclasses.replace(MODEL, stop_ids=())
    out = go(SHORT, model, capture=s.READ | capture.mean(everywhere, turns=3))
    for row, full, mean in zip(SHORT, out.captured["full"], out.captured["mean"], strict=True):
        parts = [full[:, : len(row)].mean(1), full[:, len(row) :].mean(1)]  # [L, D] each
        assert s.relative(mean[:, :2], np.stack(parts, 1)).max() < 1e-5
        assert np.isnan(mean[:, 2]).all()
    # a generation prompt, here the last token, already belongs to the reply's message
    cued = [Row(np.array(row, np.int32), np.array([USER] * (len(row) - 1) + [TEMPLATE]),
                np.array([0] * (len(row) - 1) + [1]), "") for row in SHORT]
    out = go(cued, model, capture=s.READ | capture.mean(everywhere, turns=3))
    for row, full, mean in zip(SHORT, out.captured["full"], out.captured["mean"], strict=True):
        parts = [full[:, : len(row) - 1].mean(1), full[:, len(row) - 1 :].mean(1)]
        assert s.relative(mean[:, :2], np.stack(parts, 1)).max() < 1e-5
        assert np.isnan(mean[:, 2]).all()


def test_a_limit_of_any_size_is_limited_by_the_context():
    for given, wanted in ((10**12, [512] * 3), ([10**12, 5, 512], [512, 5, 512]),
                          (np.int64(600), [512] * 3), (np.array([1, 2, 600]), [1, 2, 512])):
        found = prompts.reply_limits(given, 3, 512)
        assert found.tolist() == wanted and found.dtype == np.int32


def test_a_shared_prefix_needs_one_device():
    prompts.check_rows(MODEL, 5, True)
    with pytest.raises(ValueError, match="share_prefix needs a model on one device"):
        prompts.check_rows(dataclasses.replace(MODEL, mesh=object()), 5, True)


FOREIGN = Vector(np.ones((3, 32)), fingerprint="0123456789abcdef")


@pytest.mark.parametrize(("edits", "read"), [
    (steer(FOREIGN, layers=1), None), (Interventions(), capture.projections(FOREIGN)),
    (gate(steer(np.ones(32), layers=1), FOREIGN, layer=0, above=0.0), None),
], ids=["edit", "capture", "gate"])
def test_a_direction_of_another_model_is_refused_wherever_it_is(edits, read):
    with pytest.raises(ValueError, match="made for another model, not for tiny") as caught:
        prompts.check_edits(MODEL, edits, 1, read)
    assert "float16" not in str(caught.value)
    half = dataclasses.replace(MODEL, params=jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16), MODEL.params))
    with pytest.raises(ValueError, match="a model loaded in float16"):
        prompts.check_edits(half, edits, 1, read)


def test_longer_than_a_chunk_of_steps():
    model = dataclasses.replace(MODEL, stop_ids=())
    long = go(ROWS[:2], model=model, max_new_tokens=70, capture=None)
    assert [len(t) for t in long.tokens] == [70, 70]
    text = batch([[*r, *t] for r, t in zip(ROWS[:2], long.tokens, strict=True)], width=128)
    logits = s.residuals(model, text)[1]
    for i, n in enumerate(LENGTHS[:2]):
        row = logits[i, n - 1 : n + 69]
        sure = s.top2_margin(row) > 1e-4
        np.testing.assert_array_equal(row.argmax(-1)[sure], long.tokens[i][sure])
        assert sure.sum() > 60


def test_twenty_prompts_equal_transformers(tmp_path):
    import torch

    made = hf.model("qwen3", seed=2)
    made.generation_config.eos_token_id = None
    params, config = hf.params(made, tmp_path)
    model = s.Tiny(config, params, stop_ids=(), fingerprint="0" * 16)
    rows = hf.prompts(np.random.default_rng(0).integers(1, 60, 20).tolist(), 199)
    width = max(map(len, rows))
    with torch.no_grad():
        wanted = made.generate(
            torch.tensor([[0] * (width - len(r)) + r for r in rows]), do_sample=False,
            attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
            max_new_tokens=64, pad_token_id=0)[:, width:].numpy()
    ours = generate(model, rows, max_new_tokens=64, batch_size=20)
    assert [t.tolist() for t in ours.tokens] == wanted.tolist()


def test_buckets():
    sizes = sorted({bucket(n) for n in range(1, 2000)})
    assert all(bucket(n) >= n and bucket(bucket(n)) == bucket(n) for n in range(1, 2000))
    assert len(sizes) <= 16


REFUSED = {
    "temperature is -1": {"temperature": -1}, "temperature is nan": {"temperature": np.nan},
    "temperature is inf": {"temperature": np.inf}, "temperature is 'hot'": {"temperature": "hot"},
    "top_p is 0": {"top_p": 0},
    "top_p is 1.5": {"top_p": 1.5}, "top_k is -1": {"top_k": -1}, "top_k is 257": {"top_k": 257},
    "top_k is 1.5": {"top_k": 1.5}, "seed is -1": {"seed": -1},
    "seed is 4294967296": {"seed": 2**32}, "seed is 0.5": {"seed": 0.5},
    "ids\\[0\\] is 4294967296": {"ids": [2**32] * 11},
    "ids\\[1\\] is 0.5": {"ids": [7] + [0.5] * 10}, "ids is 3": {"ids": 3},
    "ids\\[9\\] is \\[2, 3\\]": {"ids": [4] * 9 + [[2, 3], 1]},
    "ids\\[0\\] is True": {"ids": [True] * 11},
    "temperature is 1e\\+39": {"temperature": 1e39},
    "^batch_size is 0; it must be a positive integer$": {"batch_size": 0},
    "^max_new_tokens is 0; it must be a positive integer$": {"max_new_tokens": 0},
    "^max_new_tokens is 8.0; it must be a positive integer$": {"max_new_tokens": 8.0},
    "^batch_size is 2.5; it must be a positive integer$": {"batch_size": 2.5},
    "^batch_size is True; it must be a positive integer$": {"batch_size": True},
    "conversations is empty": {"rows": []},
    "token ids must be in 0…96": {"rows": [[5, 97]]}, "must be messages": {"rows": [[]]},
    "has no tokenizer": {"rows": ["hello"]}, "temperature has shape": {"temperature": [1.0, 1.0]},
    "ids has length 1, but the number of conversations is 11": {"ids": [1]},
    "ids\\[0\\] is -1": {"ids": [-1] * 11},
    "are for batch size 2": {"interventions": cap(np.ones((1, 32)), layers=[1], floor=0.0,
                                                          rows=[0, 0])},
    "layers is \\[3\\]; the model has layers": {
        "interventions": cap(np.ones(32), layers=[3], floor=0.0)},
    "has width 31": {"interventions": cap(np.ones(31), layers=[1], floor=0.0)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        go(**REFUSED[message])


def test_progress_counts_the_tokens_of_replies_alone():
    """Padding rows are not counted."""
    told = []
    out = generate(s.tiny_model(), s.prompts((5, 9, 3)), batch_size=16, max_new_tokens=6,
                   progress=lambda *x: told.append(x))
    assert told[-1] == (3, 3, sum(t.size for t in out.tokens) + int(out.stopped.sum()))


def test_special_tokens_within_a_reply_are_not_in_its_text():
    model = dataclasses.replace(s.tiny_model(vocab_size=258, stop_ids=(257,)),
                                tokenizer=s.byte_tokenizer())
    out = generate(model, s.prompts((5,) * 16, 250), ids=range(16), temperature=2.0, seed=1,
                   max_new_tokens=64, batch_size=16)
    assert any(256 in reply for reply in out.tokens), "no reply contains the special token"
    assert not any("<|im_start|>" in text for text in out.text)
