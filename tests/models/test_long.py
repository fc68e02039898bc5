"""Long prompts: chunked attention equals unchunked attention, and memory grows linearly."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.models import nn
from jaxpersona.models.batch import batch
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.forward import forward
from jaxpersona.models.params import abstract_params


# 32 is a multiple of the chunk size 16; the others are not
@pytest.mark.parametrize("t", [32, 33, 37, 63])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (None, 2.0), (20, 2.0)])
def test_chunks_equal_the_plain_form(t, window, softcap, monkeypatch):
    draw = np.random.default_rng(t)
    n, k, h, slots = 4, 2, 8, 80
    q, keys, values = (jnp.asarray(draw.normal(0, 2, shape), jnp.float32)
                       for shape in ((2, t, n, h), (2, k, slots, h), (2, k, slots, h)))
    # five tokens precede the queries; slots after the row's end are empty
    position = jnp.asarray(np.tile(np.arange(t) + 5, (2, 1)), jnp.int32)
    held = np.tile(np.arange(slots), (2, 1))
    held[held >= t + 5] = -1
    args = (q, keys, values, position, jnp.asarray(held, jnp.int32))
    how = dict(scale=0.4, window=window, softcap=softcap)
    assert t < nn.QUERY_CHUNK
    plain = np.asarray(nn.attention(*args, **how))
    # unchunked attention, computed from its equation
    scores = np.einsum("btkgh,bksh->bkgts", np.asarray(q).reshape(2, t, k, n // k, h), keys) * 0.4
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    gap = np.asarray(position)[:, :, None] - held[:, None]
    seen = (held[:, None] >= 0) & (gap >= 0) & (gap < (window or 1000))
    weights = np.where(seen[:, None, None], np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("bkgts,bksh->btkgh", weights, values).reshape(2, t, n, h)
    np.testing.assert_allclose(plain, wanted, atol=2e-5)
    monkeypatch.setattr(nn, "QUERY_CHUNK", 16)
    np.testing.assert_allclose(nn.attention(*args, **how), plain, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("fields", [{}, {"windows": (96, None, 96), "attn_softcap": 50.0}])
def test_a_prefill_s_temporaries_grow_linearly(fields, cached):
    config = s.tiny_config(max_context=8192, **fields)
    params = abstract_params(config, jnp.float32)
    sizes = {}
    for t in (1024, 4096):
        cache = jax.eval_shape(lambda t=t: init_cache(config, 1, t)) if cached else None
        rows = batch([np.full(t, 5)])
        program = jax.jit(forward, static_argnames=("logits",)).lower(
            params, config, rows, carry=Carry(cache=cache), logits="last").compile()
        sizes[t] = program.memory_analysis().temp_size_in_bytes
        shapes = set(re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", program.as_text()))
        assert shapes
        # at T = 1,024, a chunk of two groups has the same size
        square = [x for x in shapes if sum(int(n) >= 4096 for n in x.split(",")) > 1]
        assert not square, f"arrays of T × T: {square}"
    assert sizes[4096] <= 4.5 * sizes[1024], sizes


def test_a_prefill_s_temporaries_do_not_grow_with_the_depth():
    sizes = []
    for layers in (2, 8):
        config = s.tiny_config(max_context=2048, n_layers=layers)
        program = jax.jit(forward, static_argnames=("logits",)).lower(
            abstract_params(config, jnp.float32), config, batch([np.full(1100, 5)] * 2),
            logits="last").compile()
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= 1.02 * sizes[0], sizes
