"""A compiled decode step on a CPU must not copy whole buffers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine.programs import Stops, decode, prefill
from jaxpersona.engine.sampling import sampling
from jaxpersona.interventions import Interventions, cap
from jaxpersona.models.batch import batch
from jaxpersona.planning import hlo

SLOTS, VOCABULARY, WIDTH = 64, 512, 32
V = np.random.default_rng(0).normal(size=(3, WIDTH))
READ = (capture.mean() | capture.full() | capture.projections(V) | capture.norms()
        | capture.last())
EDITS = cap(V[0], layers=[0, 1], floor=0.5)


def traced(rows, dtype, edits=EDITS):
    """Return the config, and the traced prefill and decode."""
    model = s.tiny_model(vocab_size=VOCABULARY)
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    given = jax.tree.map(jnp.asarray, batch(s.prompts((5,) * rows, vocabulary=VOCABULARY)))
    how, limit = sampling(rows), jnp.full((rows,), 8, jnp.int32)
    stops = Stops(jnp.full((4,), -1, jnp.int32), jnp.full((2,), -1, jnp.int32))
    first = prefill.lower(params, model.config, given, edits, READ, how, stops, limit, slots=SLOTS,
                          max_new=8, greedy=True)
    return model.config, first, decode.lower(params, model.config, first.out_info, edits, READ, how,
                                             stops, jnp.int32(8), greedy=True)


def run(rows, dtype):
    """Return the config and all operations of a compiled decode, inside and outside its loop."""
    config, _, second = traced(rows, dtype)
    return config, [op for op in hlo.operations(second.compile().as_text())
                    if op.kind not in ("parameter", "tuple", "get-tuple-element", "while")]


@pytest.mark.parametrize(("rows", "dtype"), [
    (1, jnp.float32), (5, jnp.bfloat16),
    *(pytest.param(rows, dtype, marks=pytest.mark.slow) for rows, dtype in (
        (2, jnp.float32), (5, jnp.float32), (1, jnp.bfloat16), (2, jnp.bfloat16)))])
def test_a_step_copies_no_buffer(rows, dtype):
    config, found = run(rows, dtype)
    found = [op for op in found if op.looped]
    written = [op for op in found if "scatter" in op.scope]
    # bytes of the smallest buffer (positions); `full` has 64 times as many
    least = rows * SLOTS * 4
    assert sum(op.bytes >= least for op in written) >= 2 * config.n_layers  # the writes exist
    assert not [op for op in found if op.kind in ("copy", "transpose", "convert")
                and op.bytes >= least]


def test_low_precision_widens_neither_table_nor_cache():
    config, found = run(2, jnp.bfloat16)
    made = [op for op in found if "scatter" not in op.scope]
    cache = 4 * 2 * config.n_kv_heads * SLOTS * config.head_dim  # one layer's cache in float32
    assert cache < 4 * VOCABULARY * WIDTH
    assert len(made) > 50 and max(op.bytes for op in made) < cache


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_an_edit_of_a_prompt_may_fuse_with_its_neighbours(dtype):
    """A barrier at the edit would keep residual streams alive: 7 % of the temporaries."""
    capped, plain = (traced(2, dtype, edits)[1].as_text() for edits in (EDITS, Interventions()))
    assert len(capped) > len(plain)
    assert capped.count("optimization_barrier") == plain.count("optimization_barrier")
