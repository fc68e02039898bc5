"""`Engine` on a mesh: replies belong to their own requests, in whatever order they end."""

from __future__ import annotations

import numpy as np
import pytest
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
