"""`Engine` on a mesh: replies belong to their own requests, in whatever order they end."""

from __future__ import annotations

import numpy as np
import pytest
import support as s
from test_sharding import ROWS, V, one_device, spread

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.distributed import sharding

pytestmark = pytest.mark.usefixtures("compile_fast")


def test_each_request_gets_its_own_reply_when_a_later_row_ends_first():
    model = spread(one_device("llama"), sharding.make_mesh(data=2, model=2))
    limits = [9, 2, 7, 3, 5, 1]  # row 5 ends first, then 1, 3, 4, 2, 0
    cap = jp.cap(V[0], layers=[1], floor=0.5)
    requests = [jp.Request(row, max_new_tokens=n, interventions=cap, capture=capture.mean())
                for row, n in zip(ROWS, limits, strict=False)]
    engine = jp.Engine(model, rows=8, chunk=2)
    handles = [engine.submit(request) for request in requests]
    together = [engine.result(handle) for handle in handles]
    assert [reply.tokens.size for reply in together] == limits
    for request, reply in zip(requests, together, strict=True):
        engine = jp.Engine(model, rows=8, chunk=2)
        alone = engine.result(engine.submit(request))
        np.testing.assert_array_equal(reply.tokens, alone.tokens)
        np.testing.assert_array_equal(reply.captured["mean"], alone.captured["mean"])
        assert reply.applied[0].seen == alone.applied[0].seen


def test_later_requests_wait_for_a_running_one():
    """On a mesh, a prefill replaces all rows of a lane, so no row may be in use."""
    model = spread(one_device("llama"), sharding.make_mesh(data=2, model=2))
    requests = [jp.Request(row, max_new_tokens=n, capture=capture.mean())
                for row, n in zip(ROWS, [9, 2, 7], strict=False)]
    engine = jp.Engine(model, rows=8, chunk=2)
    first = engine.submit(requests[0])
    engine.step()
    assert not first.done
    handles = [first, *(engine.submit(request) for request in requests[1:])]
    together = [engine.result(handle) for handle in handles]
    for request, reply in zip(requests, together, strict=True):
        engine = jp.Engine(model, rows=8, chunk=2)
        alone = engine.result(engine.submit(request))
        np.testing.assert_array_equal(reply.tokens, alone.tokens)
        np.testing.assert_array_equal(reply.captured["mean"], alone.captured["mean"])


def test_a_batch_without_refill_waits_before_prompts_of_another_shape():
    """The three prompts need two prefills, and the second one starts after the first replies."""
    model = spread(one_device("llama"), sharding.make_mesh(data=2, model=2))
    prompts = [*ROWS[:2], s.prompts((70,), vocabulary=96, seed=4)[0]]
    how = dict(max_new_tokens=9, batch_size=8, capture=capture.mean(), refill=False)
    together = jp.generate(model, prompts, ids=[1, 2, 3], **how)
    for i, prompt in enumerate(prompts):
        alone = jp.generate(model, [prompt], ids=[i + 1], **how)
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0])
        np.testing.assert_array_equal(together.captured["mean"][i], alone.captured["mean"][0])
