"""How many programs a session needs, and how often its layers are traced."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import jax
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.engine import prompts
from jaxpersona.engine.compiled import KEPT
from jaxpersona.engine.generate import generate
from jaxpersona.engine.programs import TRACES
from jaxpersona.engine.tasks import shape_of
from jaxpersona.models import blocks
from jaxpersona.models.batch import USER
from jaxpersona.planning import hlo, plan
from jaxpersona.text.chat import Row


@pytest.fixture(scope="module")
def model():
    return s.tiny_model()


def row(n):
    return Row(np.zeros(n, np.int32), np.full(n, USER, np.int32), np.zeros(n, np.int32), "")


def test_a_session_of_twenty_lengths_at_two_batch_sizes_has_eight_programs(model):
    KEPT.clear()
    before = Counter(TRACES)
    ids = s.prompts(range(4, 84, 4))
    for rows in (1, 8):
        generate(model, ids, max_new_tokens=3, batch_size=rows)
    assert len(KEPT) == 8
    assert Counter(TRACES) - before == {"prefill": 4, "decode": 2}
    traced = dict(TRACES)
    for new in (2, 5, 100):  # another limit that fits the cache
        generate(model, ids[:2], max_new_tokens=new, batch_size=8)
    assert dict(TRACES) == traced and len(KEPT) == 8


def test_the_lengths_of_small_batches_are_powers_of_two():
    small = [prompts.padded(n, 8) for n in range(1, 3000)]
    assert sorted(set(small)) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert all(n <= width < max(2 * n, 65) for n, width in enumerate(small, 1))
    assert all(prompts.padded(n, 9) == prompts.bucket(n) for n in range(1, 3000))
    shapes = [shape_of(row(n), 48, False, 4096, 8) for n in range(1, 465)]
    assert {shape.slots for shape in shapes} == {256, 512}
    for n, shape in enumerate(shapes, 1):  # padding takes no slots
        assert shape.slots >= max(n + 48, shape.width)
    assert shapes[207].width == 256 == shapes[207].slots


def test_a_reply_fills_a_cache_that_its_padded_prompt_would_overflow(model):
    """128 + 192 exceed 256 slots; 65 + 190 do not."""
    ids = s.prompts((65,))
    (tokens,) = generate(model, ids, max_new_tokens=190, batch_size=1).tokens
    (wide,) = generate(model, ids, max_new_tokens=400, batch_size=1).tokens  # 512 slots
    assert tokens.size == min(wide.size, 190) and np.array_equal(tokens[:20], wide[:20])


def counting(name, function, calls):
    def part(*args, **named):
        calls[name] += 1
        return function(*args, **named)

    return part


def lowered(model, nested, monkeypatch, cap=()):
    """Lower prefill and decode; return them and the calls of each part of a block."""
    calls = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "in_program", lambda: nested)
        for name in ("attend", "transform"):
            patch.setattr(blocks, name, counting(name, getattr(blocks, name), calls))
        KEPT.clear()
        programs = plan.lowered(model.params, model.config, plan.Shapes(2, 16, 32), cap)
        KEPT.clear()
    return programs, calls


@pytest.mark.parametrize("cap", [(), (1,)], ids=["plain", "capped"])
def test_layers_are_traced_once_and_compile_to_the_same_kernels(model, monkeypatch, cap):
    (flat, calls), (nested, few) = (lowered(model, n, monkeypatch, cap) for n in (False, True))
    layers = model.config.n_layers
    assert layers > 2 and calls["attend"] % layers == 0 and calls["transform"] % layers == 0
    traces = calls["transform"] // layers
    # the first layer also tests the ids, so its attention is a trace of its own
    assert few == {"attend": 2 * traces, "transform": traces}
    for one, other in zip(flat, nested, strict=True):
        assert len(other.as_text()) < len(one.as_text())
        a, b = one.compile(), other.compile()
        assert a.cost_analysis()["bytes accessed"] == b.cost_analysis()["bytes accessed"]
        kernels = [Counter(op.kind for op in hlo.operations(x.as_text())
                           if op.kind in ("fusion", "custom-call", "copy", "dot", "sort"))
                   for x in (a, b)]
        assert kernels[0] == kernels[1] and sum(kernels[0].values())
        scopes = {name for op in hlo.operations(b.as_text())
                  for name in re.findall(r"layer\d+", op.scope)}
        assert scopes == {f"layer{i}" for i in range(layers)}


def test_nested_layers_give_the_bits_of_flat_ones(model, monkeypatch):
    def go():
        KEPT.clear()
        out = generate(model, s.prompts((5, 9)), max_new_tokens=6, batch_size=2,
                       capture=jp.capture.mean(jp.where.everywhere))
        return out.tokens, out.captured["mean"]

    nested = go()
    monkeypatch.setattr(blocks, "in_program", lambda: False)
    assert s.same_bits(go(), nested)
    KEPT.clear()


def test_single_operations_and_gradients_use_no_nested_programs(model):
    parts = blocks.parts(model.config, "xla")
    assert not isinstance(parts.attend, type(jax.jit(abs)))


def test_the_first_event_of_a_stream_is_the_first_token():
    engine = jp.Engine(s.tiny_model(stop_ids=()), rows=2, chunk=8)
    request = jp.Request(s.prompts((5,))[0], max_new_tokens=12)
    events = list(engine.stream(engine.submit(request)))
    assert [event.tokens.size for event in events[:2]] == [1, 8]
    whole = np.concatenate([event.tokens for event in events])
    assert np.array_equal(whole, engine.result(engine.submit(request)).tokens)
    # a reply that ends at this token has none
    ends = dataclasses.replace(engine.model, stop_ids=(int(whole[0]),))
    engine = jp.Engine(ends, rows=2, chunk=8)
    events = list(engine.stream(engine.submit(request)))
    assert not any(event.tokens.size for event in events) and events[-1].reply.finish == "stop"
    handle = engine.submit(request)
    handle._streamed = True
    engine.step()
    engine.cancel(handle)
    assert engine.result(handle).finish == "cancelled" and not engine.result(handle).tokens.size
