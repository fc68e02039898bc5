"""Rows with different interventions in one program: equal to single runs, without retracing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine import programs
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import (
    ablate,
    cap,
    chain,
    custom,
    gate,
    restore_norm,
    rotate,
    scale,
    set_projection,
    stack_rows,
    steer,
)
from jaxpersona.interventions.where import generated
from jaxpersona.models.batch import batch

MODEL = s.tiny_model()
B, NEW = 32, 12
RNG = np.random.default_rng(5)
ROWS = s.prompts(RNG.integers(3, 30, B))
BANK = RNG.normal(size=(B, 32))
MEAN = capture.mean()
HOW = dict(capture=MEAN, max_new_tokens=NEW, batch_size=B, temperature=1.0, top_p=0.9, seed=4)


def setting(i):
    """Return different settings with nine structures; every fourth, except the first, is None."""
    v, w = BANK[i % B], BANK[(i + 1) % B]
    late = [1, 2]
    return (
        cap(v, layers=late, floor=-1e9) if i == 0 else None,
        cap(v, layers=late, floor=i / 64),
        steer(v, layers=late, scale=i / 128, where=generated),
        ablate(v, layers=late, coefficient=i / 64 - 2),
        None,
        chain(steer(v, layers=[0], scale=-0.3), cap(BANK[0], layers=late, ceiling=-i / 128)),
        rotate(v, w, by=0.5 + i / 256, layers=[1]),
        custom(bend, {"radius": 3 + i / 64, "v": w}, layers=[1]),
        None,
        gate(scale(v, -2.0, layers=late), w, layer=0, above=0.3, over="token"),
        chain(steer(v, layers=[1], scale=i / 128), restore_norm(layers=[1])),
        set_projection(BANK[3], i / 64 - 2, layers=late),
    )[i % 12]


def bend(params, h):
    return h * jnp.minimum(1.0, params["radius"] / jnp.linalg.norm(h)) + 0.1 * params["v"]


def counts():
    return (dict(programs.TRACES), s.compiled(programs.decode), s.compiled(programs.prefill))


@pytest.mark.slow
def test_256_settings_equal_their_single_runs():
    """At B = 256, tokens equal those of single runs bit for bit, and captures to 1e-5."""
    many, new = 256, 8
    rows = s.prompts(np.random.default_rng(6).integers(3, 30, many), seed=6)
    settings = [setting(i) for i in range(many)]
    ids = np.arange(many) + 100
    how = {**HOW, "batch_size": many, "max_new_tokens": new}
    together = generate(MODEL, rows, interventions=stack_rows(settings), ids=ids, **how)
    plain = generate(MODEL, rows, ids=ids, **how)
    moved = 0
    for i, own in enumerate(settings):
        alone = generate(MODEL, [rows[i]], interventions=own, ids=ids[i : i + 1], **how)
        np.testing.assert_array_equal(together.tokens[i], alone.tokens[0], err_msg=f"row {i}")
        a, b = together.captured["mean"][i : i + 1], alone.captured["mean"]
        assert s.rowwise(a, b).max() <= 1e-5, f"row {i}"
        counted = sum(int(x.changed.sum()) for x in alone.applied)
        assert counted == sum(int(x.changed[:, i].sum()) for x in together.applied), f"row {i}"
        if own is None:  # a row without edits equals a run without interventions
            np.testing.assert_array_equal(together.tokens[i], plain.tokens[i])
        moved += not np.array_equal(plain.tokens[i], alone.tokens[0])
    assert moved > many // 3, "the settings do too little for the comparison to tell"


def test_a_bank_equals_its_entries():
    index = RNG.permutation(np.arange(B) % 6 - 1)
    floor = np.linspace(0.5, 2, 5)
    both = generate(MODEL, ROWS, interventions=cap(BANK[:5], layers=[1, 2], floor=floor,
                                                   rows=index), **HOW)
    stacked = generate(MODEL, ROWS, interventions=stack_rows(
        [None if i < 0 else cap(BANK[i], layers=[1, 2], floor=floor[i]) for i in index]), **HOW)
    for i in range(B):
        np.testing.assert_array_equal(both.tokens[i], stacked.tokens[i])
    np.testing.assert_array_equal(both.applied[0].changed, stacked.applied[0].changed)
    assert (both.applied[0].changed[:, index < 0] == 0).all()
    assert (both.applied[0].seen[index < 0] == 0).all()


def test_new_values_retrace_nothing():
    def go(edits, rows=ROWS, **changes):
        generate(MODEL, rows, interventions=edits, **{**HOW, **changes})

    def bank(vectors=BANK[:4], floor=0.5, seed=0, **more):
        index = np.random.default_rng(seed).integers(-1, 3, B)
        return cap(vectors, layers=[1, 2], floor=floor, rows=index, **more)

    go(bank())
    go(cap(BANK[0], layers=[1, 2], floor=0.0))
    before = counts()
    go(bank(BANK[4:8].astype(np.float32), floor=np.float64(0.1), seed=1))
    go(bank(jnp.asarray(BANK[:3], jnp.bfloat16), floor=2, seed=2))  # 3 entries are padded to 4
    go(bank(BANK[:4].tolist(), floor=[0.1, 0.2, 0.3, 0.4], seed=3))
    go(bank(jnp.asarray(BANK[:4], jnp.float32), floor=jnp.float32(0.5), where=generated))
    go(bank(ceiling=5.0), seed=9, temperature=0.3, top_p=0.5, top_k=7)
    go(bank(), rows=s.prompts(RNG.integers(3, 32, B), seed=8))
    go(cap(jnp.asarray(BANK[1], jnp.bfloat16), layers=slice(1, 3), floor=np.float32(1)))
    go(cap(BANK[1].astype(np.float16), layers=(1, 2), floor=np.array([0.1, 0.2])))
    go(steer(BANK[2].tolist(), layers=[1, 2], scale=3))
    go(bank(), temperature=np.linspace(0.1, 1, B), seed=np.arange(B))
    assert counts() == before
    # different layers need a new program; checks the counter
    go(steer(BANK[2], layers=[1], scale=3))
    assert counts() != before


def test_minus_one_is_the_identity_and_not_the_last_entry():
    edits = cap(BANK[:4], layers=[1], floor=1.0, rows=[3, -1, 0])
    edit = edits.prepare(3, jnp.zeros(())).edits[0]
    assert edit.seen(batch([[5, 6]] * 3)).any(-1).tolist() == [True, False, True]
    np.testing.assert_allclose(edit.by_layer[0].direction[0],
                               BANK[3] / np.linalg.norm(BANK[3]), rtol=1e-6)
    taken = cap(BANK[:4], layers=[1], floor=1.0, rows=[3, -1, 0]).take([2, -1, 0, 1])
    np.testing.assert_array_equal(taken.edits[0].index, [0, -1, 3, -1])


@pytest.mark.parametrize("rows", [[0, 4], [-2, 0], [0.0, 1.0], [[0, 1]], [True, False]])
def test_wrong_rows_are_refused(rows):
    with pytest.raises(ValueError, match="rows"):
        cap(BANK[:4], layers=[1], floor=0.0, rows=rows)
