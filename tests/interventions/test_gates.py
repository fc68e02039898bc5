"""Gates: an edit applies to rows or tokens with an earlier projection within bounds."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.engine import programs
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import (
    cap,
    chain,
    custom,
    gate,
    restore_norm,
    rotate,
    stack_rows,
    steer,
)
from jaxpersona.interventions.where import everywhere, from_last, generated, marked
from jaxpersona.models.batch import GENERATED, LAST, batch, split
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.forward import forward
from jaxpersona.vectors.vector import Vector

MODEL = s.tiny_model()
B, NEW = 8, 10
ROWS = s.prompts((9, 17, 4, 30, 12, 6, 23, 2), seed=8)
RNG = np.random.default_rng(9)
C, V = RNG.normal(size=(2, 32))
UNIT = C / np.linalg.norm(C)
PLAIN = s.residuals(MODEL, batch(ROWS, width=32))[0]
MEANS = np.array([np.mean(PLAIN[b, 0, 1 : len(r)] @ UNIT) for b, r in enumerate(ROWS)])
SPLIT = float(np.mean(np.sort(MEANS)[3:5]))  # four rows are above this bound
ABOVE = MEANS > SPLIT
HOW = dict(max_new_tokens=NEW, batch_size=B, capture=s.READ)
EDIT = steer(V, layers=[1, 2], scale=2.0)


def grow(params, h):
    return h * params


def run(edits, rows=ROWS, **changes):
    return generate(MODEL, rows, interventions=edits, ids=[7] * len(rows), **{**HOW, **changes})


def moved(a, b):
    """Return the rows in which the last residuals of two runs differ."""
    pairs = zip(a.captured["full"], b.captured["full"], strict=True)
    return np.array([x.shape != y.shape or not np.array_equal(x[-1], y[-1]) for x, y in pairs])


@pytest.mark.parametrize("within", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("edit", [
    EDIT, cap(V, layers=[1, 2], floor=9.0), rotate(V, C, by=1.0, layers=[2]),
    custom(grow, 1.5, layers=[1]), chain(EDIT, restore_norm(layers=[1, 2])),
], ids=["steer", "cap", "rotate", "custom", "chain"])
def test_exactly_the_rows_above_change_and_alone_they_say_the_same(edit, within):
    plain = run(None)
    gated = run(gate(edit, C, layer=0, above=SPLIT, within=within))
    open_ = run(edit if within else gate(edit, C, layer=0, above=-1e6))
    assert moved(open_, plain).all(), "the edit must change every row"
    np.testing.assert_array_equal(moved(gated, plain), ABOVE)
    np.testing.assert_array_equal(moved(gated, open_), ~ABOVE)
    for b in range(B):
        alone = run(gate(edit, C, layer=0, above=SPLIT, within=within), [ROWS[b]])
        np.testing.assert_array_equal(alone.tokens[0], gated.tokens[b])
    counts = gated.applied[0]
    assert (counts.changed[:, ~ABOVE] == 0).all() and (counts.changed[:, ABOVE] > 0).all()
    if not within and edit is EDIT:  # from the last prompt token on
        np.testing.assert_array_equal(
            counts.changed[0, ABOVE],
            [1 + len(gated.tokens[b]) for b in np.flatnonzero(ABOVE)])


def test_bounds_may_be_above_below_or_both():
    order = np.argsort(MEANS)
    low, high = (float(np.mean(MEANS[order[i : i + 2]])) for i in (1, 5))
    plain = run(None)
    for bounds, wanted in (({"below": low}, MEANS <= low), ({"above": high}, MEANS >= high),
                           ({"above": low, "below": high}, (MEANS >= low) & (MEANS <= high))):
        found = moved(run(gate(EDIT, C, layer=0, **bounds)), plain)
        np.testing.assert_array_equal(found, wanted)


def test_a_gate_over_tokens_opens_for_each_by_itself():
    edits = gate(cap(V, layers=[2], floor=50.0), C, layer=1, above=0.3, over="token",
                 where=everywhere)
    found, _ = s.residuals(MODEL, batch(ROWS, width=32), edits)
    acts = PLAIN[:, 1] @ UNIT >= 0.3
    real = ~np.isnan(PLAIN[:, 2, :, 0])
    assert 0.2 < acts[real].mean() < 0.8
    np.testing.assert_array_equal((found[:, 2] != PLAIN[:, 2]).any(-1)[real], acts[real])
    default = gate(cap(V, layers=[2], floor=50.0), C, layer=1, above=-1e6, over="token")
    found, _ = s.residuals(MODEL, batch(ROWS, width=32), default)
    np.testing.assert_array_equal(found[:, 2, 0], PLAIN[:, 2, 0])  # the first token is not edited
    assert (found[:, 2] != PLAIN[:, 2]).any(-1)[:, 1:][real[:, 1:]].all()
    # the same during generation, compared with a full pass over prompt and reply
    out = run(edits)
    for b, row in enumerate(ROWS):
        text = batch([[*row, *out.tokens[b]]], width=48)
        whole, _ = s.residuals(MODEL, text, edits)
        n = out.captured["full"][b].shape[1]
        assert s.relative(out.captured["full"][b], whole[0, :, :n]).max() < 1e-5


@pytest.mark.parametrize("bounds", [{"below": 0.3}, {"above": -0.5, "below": 2.5}, {"above": 0.3}])
def test_each_bound_of_a_gate_over_tokens_shuts_it(bounds):
    edits = gate(cap(V, layers=[2], floor=50.0), C, layer=1, over="token", where=everywhere,
                 **bounds)
    found, _ = s.residuals(MODEL, batch(ROWS, width=32), edits)
    p, real = PLAIN[:, 1] @ UNIT, ~np.isnan(PLAIN[:, 2, :, 0])
    acts = (p >= bounds.get("above", -np.inf)) & (p <= bounds.get("below", np.inf))
    assert 0.2 < acts[real].mean() < 0.8, "the bounds must divide the tokens"
    np.testing.assert_array_equal((found[:, 2] != PLAIN[:, 2]).any(-1)[real], acts[real])


@pytest.mark.parametrize("over", ["prompt", "token"])
def test_a_projection_on_a_bound_lies_within(over):
    """Both bounds are inclusive."""
    h = jnp.zeros((1, 2, 32)).at[..., 0].set(0.5)
    rows = batch([[5, 6]])
    for at, wanted in ((0.5, True), (0.75, False), (0.25, False)):
        made = gate(EDIT, np.eye(32)[0], layer=0, above=at, below=at, over=over,
                    where=everywhere).edits[0].gate
        found, _ = made.measure(h, rows, made.init(1))
        assert bool(found[0, -1]) == wanted


def in_chunks(edits, size):
    rows = batch(ROWS, width=32)
    carry = Carry(cache=init_cache(MODEL.config, B, 32))
    for piece in split(rows, size):
        out = s.run(MODEL.params, MODEL.config, piece, interventions=edits, capture=s.READ,
                    carry=carry, logits="last")
        carry = out.carry
    return np.asarray(out.captured["full"].value), np.asarray(out.applied[0].changed)


def test_chunked_prefill_measures_the_whole_prompt():
    edits = gate(EDIT, C, layer=0, above=SPLIT)
    whole, counts = in_chunks(edits, 32)
    for size in (5, 16):
        found, counted = in_chunks(edits, size)
        assert s.relative(found, whole).max() < 1e-5
        np.testing.assert_array_equal(counted, counts)
    np.testing.assert_array_equal(counts[0], ABOVE)
    with pytest.raises(ValueError, match="whole prompt in one call"):
        in_chunks(gate(EDIT, C, layer=0, above=SPLIT, within=True), 16)
    in_chunks(gate(EDIT, C, layer=0, above=SPLIT, within=True), 32)


def test_chunks_are_refused_if_one_of_several_gates_acts_within_the_prompt():
    rows = batch(s.prompts((9, 17)), width=32)
    edits = chain(steer(V, layers=[1]),
                  gate(steer(V, layers=[2]), C, layer=0, above=0.0, within=True))
    with pytest.raises(ValueError, match="whole prompt in one call"):
        forward(MODEL.params, MODEL.config, split(rows, 16)[0], interventions=edits,
                carry=Carry(cache=init_cache(MODEL.config, 2, 32)), logits=None)


def test_rows_have_gates_of_their_own_and_new_ones_retrace_nothing():
    bank = np.stack([C, -C, V])
    index = [0, 1, 2, -1, 0, 1, 2, 0]
    floors = [SPLIT, -SPLIT, 1e6]
    edits = gate(steer(RNG.normal(size=(3, 32)), layers=[1], rows=index), bank, layer=0,
                 above=floors)
    wanted = [(i == 0 and MEANS[b] >= SPLIT) or (i == 1 and -MEANS[b] >= -SPLIT)
              for b, i in enumerate(index)]
    plain = run(None)
    np.testing.assert_array_equal(moved(run(edits), plain), wanted)
    before = dict(programs.TRACES)
    run(gate(steer(RNG.normal(size=(3, 32)), layers=[1], rows=index[::-1]), bank[::-1], layer=0,
             above=0.1, below=3.0, where=everywhere))
    assert dict(programs.TRACES) == before
    parts = [gate(EDIT, C, layer=0, above=SPLIT if b % 2 else 1e6) if b < 6 else None
             for b in range(B)]
    found = moved(run(stack_rows(parts)), plain)
    np.testing.assert_array_equal(found, ABOVE & np.array([b % 2 and b < 6 for b in range(B)]))


def test_a_gate_that_measured_nothing_is_shut():
    edits = gate(EDIT, C, layer=0, below=1e9, where=marked)
    assert not moved(run(edits), run(None)).any()
    one = run(gate(EDIT, C, layer=0, below=1e9), [[5]])  # the first token is excluded
    assert one.applied[0].changed.sum() == 0


REFUSED = {
    "needs a bound": lambda: gate(EDIT, C, layer=0),
    "over is 'row'": lambda: gate(EDIT, C, layer=0, above=0, over="row"),
    "within=True is only for": lambda: gate(EDIT, C, layer=0, above=0, over="token", within=True),
    "interventions to gate": lambda: gate(chain(), C, layer=0, above=0),
    "already have a gate": lambda: gate(gate(EDIT, C, layer=0, above=0), C, layer=0, above=0),
    "above= is greater": lambda: gate(EDIT, C, layer=0, above=2, below=1),
    "layer 1 \\(residual\\) is not before": lambda: gate(EDIT, C, layer=1, above=0),
    "above is NaN": lambda: gate(EDIT, C, layer=0, above=np.nan),
    "above is infinite": lambda: gate(EDIT, C, layer=0, above=np.inf),
    "the gate has 5 directions, but the number of edits in the bank is 8": lambda: gate(
        steer(np.ones((8, 32)), layers=[1], rows=range(8)), np.ones((5, 32)), layer=0, above=0),
    "the gate has 4 directions, but the number of edits in the bank is 3": lambda: gate(
        steer(np.ones((3, 32)), layers=[1], rows=[0, 1, 2]), np.ones((4, 32)), layer=0, above=0),
    "where= selects generated tokens": lambda: gate(EDIT, C, layer=0, above=0, where=generated),
    "contains no message": lambda: everywhere.within(3, 1),
    "gates has states for the tables": lambda: forward(
        MODEL.params, MODEL.config, batch(ROWS), interventions=gate(EDIT, C, layer=0, above=0),
        carry=Carry(gates={"7": 1})),
    "the gate has 3 directions": lambda: gate(
        steer(np.ones((2, 32)), layers=[1], rows=[0, 1]), np.ones((3, 32)), layer=0, above=0),
    "width 31": lambda: run(gate(EDIT, np.ones(31), layer=0, above=0)),
    "made for another model": lambda: run(
        gate(EDIT, Vector(np.ones((3, 32)), fingerprint="ab" * 8), layer=0, above=0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_sites_come_in_order():
    """A gate on attention can control the MLP of the same block, but not the reverse."""
    edit = steer(V, layers=[1], site="mlp")
    gate(edit, C, layer=1, above=0, site="attention")
    with pytest.raises(ValueError, match="not before"):
        gate(steer(V, layers=[1], site="attention"), C, layer=1, above=0, site="mlp")
    shut = run(gate(edit, C, layer=1, above=1e6, site="attention"))
    assert not moved(shut, run(None)).any()
    state = forward(MODEL.params, MODEL.config, batch(ROWS), interventions=gate(
        EDIT, C, layer=0, above=0.0), logits=None).gates["0"]
    np.testing.assert_allclose(state.total / state.count, MEANS, rtol=1e-5, equal_nan=True)
    assert state.count.dtype == jnp.float32


def test_the_prompt_alone_is_measured_and_what_stands_there_after_its_edits():
    """A gate measures only prompt tokens, after the edits at the same site."""
    shift = steer(C, layers=[0], scale=2.0)
    edits = chain(shift, gate(EDIT, C, layer=0, above=SPLIT + 2 * np.linalg.norm(C),
                              where=everywhere.without("first")))
    np.testing.assert_array_equal(moved(run(edits), run(shift)), ABOVE)
    rows = batch([[*ROWS[0]]], kind=[[0] * (len(ROWS[0]) - 3) + [1 << 6] * 3])
    state = forward(MODEL.params, MODEL.config, rows, interventions=gate(
        EDIT, C, layer=0, above=0.0, where=everywhere), logits=None).gates["0"]
    assert state.count[0] == len(ROWS[0]) - 3


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_measurements_that_are_not_handed_on_shut_the_gate(size):
    edits = gate(EDIT, C, layer=0, below=1e6)
    pieces = split(batch(ROWS, width=32), size)
    first = forward(MODEL.params, MODEL.config, pieces[0], interventions=edits, logits=None,
                    carry=Carry(cache=init_cache(MODEL.config, B, 32)))
    for gates, wanted in ((first.gates, 1), (None, 0)):
        out = forward(MODEL.params, MODEL.config, pieces[1], interventions=edits, logits=None,
                      carry=Carry(cache=first.cache, gates=gates))
        ends = np.array([size < len(row) <= 2 * size for row in ROWS])  # in the second piece
        assert ends.any()
        np.testing.assert_array_equal(out.applied[0].changed[0], wanted * ends)


def test_a_bound_for_each_edit_of_a_bank_on_one_direction():
    edits = gate(steer(RNG.normal(size=(3, 32)), layers=[1], rows=[0, 1, 2, -1, 0, 1, 2, 0]), C,
                 layer=0, above=[SPLIT, 1e6, -1e6])
    wanted = [(i == 0 and ABOVE[b]) or i == 2 for b, i in enumerate([0, 1, 2, -1, 0, 1, 2, 0])]
    np.testing.assert_array_equal(moved(run(edits), run(None)), wanted)


def test_a_gate_over_tokens_opens_for_generated_tokens_too():
    """All tokens except the first are capped, in the prompt and in the reply."""
    edits = gate(cap(V, layers=[2], floor=1e4), C, layer=1, above=-1e6, over="token")
    out = generate(MODEL, s.prompts((9, 4)), interventions=edits, max_new_tokens=6, batch_size=4)
    assert max(t.size for t in out.tokens) > 1
    np.testing.assert_array_equal(out.applied[0].changed[0], out.applied[0].seen - 1)


def test_gates_of_another_form_are_tables_of_their_own():
    """Rows share a table only if their gates measure and act in the same way."""
    def at(**options):
        return gate(EDIT, C, **{"layer": 0, "above": 0.0} | options)

    assert len(stack_rows([at(), at(above=1.0, where=marked)]).edits) == 1
    for other in ({"within": True}, {"over": "token"}, {"site": "mlp"}):
        tables = stack_rows([at(), at(**other)]).edits
        assert [table.index.tolist() for table in tables] == [[0, -1], [-1, 0]]


@pytest.mark.parametrize(("bounds", "wanted"), [
    ({"above": -np.inf, "below": 2}, [-np.inf, 2]), ({"above": 1, "below": np.inf}, [1, np.inf]),
    ({"above": 1}, [1, np.inf]), ({"below": 2}, [-np.inf, 2]), ({"above": [1], "below": 1}, [1, 1]),
])
def test_a_bound_may_be_open(bounds, wanted):
    np.testing.assert_array_equal(gate(EDIT, C, layer=0, **bounds).edits[0].gate.bounds, [wanted])


def test_a_prompt_gate_never_measures_generated_tokens():
    """Not even if `where` selects them: the mean would change while a reply is generated."""
    made = gate(EDIT, np.eye(32)[0], layer=0, above=1.5, where=from_last).edits[0].gate
    h = jnp.zeros((1, 3, 32)).at[0, :, 0].set(jnp.asarray([1.0, 2.0, -9.0]))
    rows = batch([[5] * 3], kind=[[0, LAST, GENERATED]])
    found, state = made.measure(h, rows, made.init(1))
    assert (float(state.total[0]), float(state.count[0])) == (2.0, 1.0)
    np.testing.assert_array_equal(found, [[False, True, True]])
