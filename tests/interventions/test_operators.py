"""Arguments that operators and their composition reject, and the tables that they create."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.engine.generate import generate
from jaxpersona.interventions import (
    ablate,
    cap,
    chain,
    custom,
    gate,
    mean_ablate,
    restore_norm,
    rotate,
    scale,
    set_projection,
    stack_rows,
    steer,
    turns,
)
from jaxpersona.interventions.bank import resolve_layers
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.edit import table
from jaxpersona.interventions.where import (
    Where,
    everywhere,
    from_last,
    generated,
    holds,
    last,
    prompt,
    response,
    user,
)
from jaxpersona.models.batch import ASSISTANT, CODE, GENERATED, TEMPLATE, THINKING, USER, batch
from jaxpersona.vectors.vector import Axis, Vector

V, ZERO = np.ones(8), np.zeros(8)
AXIS = Axis(np.ones((4, 8)), fingerprint="0" * 8 + "0000002a",
            percentiles={"default": {"p25": np.arange(4.0)}})
NAN = np.array([np.nan] * 8)
REFUSED = {
    "neither a floor": lambda: cap(V, layers=1),
    "floor is above ceiling": lambda: cap(V, layers=1, floor=2, ceiling=1),
    "site is 'head'": lambda: cap(V, layers=1, floor=0, site="head"),
    "give the index of each row's direction in `rows=`": lambda: steer([AXIS, AXIS], layers=1),
    "vector contains a non-finite value": lambda: steer(NAN, layers=1),
    "vector is zero at a chosen layer .*; give nonzero vectors": lambda: steer(ZERO, layers=1),
    "vector has shape \\(2, 8\\)": lambda: steer(np.ones((2, 8)), layers=1),
    "vector has shape \\(\\)": lambda: steer(np.float32(2), layers=1),
    "3 layers, but the number of chosen .* 2": lambda: steer(np.ones((1, 3, 8)), layers=[1, 2]),
    "scale is infinite": lambda: steer(V, layers=1, scale=np.inf),
    "factor is infinite": lambda: scale(V, -np.inf, layers=1),
    "value is NaN": lambda: set_projection(V, np.nan, layers=1),
    "scale is NaN": lambda: steer(V, layers=1, scale=np.nan),
    "floor is NaN": lambda: cap(V, layers=1, floor=np.nan),
    "floor has shape \\(3,\\)": lambda: cap(V, layers=[1, 2], floor=[1, 2, 3]),
    "scale has shape \\(2, 2\\)": lambda: steer(V, layers=[1, 2], scale=np.ones((2, 2))),
    "without a named direction": lambda: steer(V, layers=slice(1, None)),
    "out of range; layers must be in 0…3": lambda: steer(AXIS, layers=slice(2, 5)),
    "must be an int, a slice": lambda: steer(V, layers=[1.5]),
    "selects no layer": lambda: steer(V, layers=slice(3, 3)),
    "in ascending order": lambda: cap(V, layers=[2, 1], floor=[1.0, 2.0]),
    "floor is infinite": lambda: cap(V, layers=1, floor=np.inf),
    "vector is an empty list": lambda: steer([], layers=1),
    "which repeats a layer": lambda: steer(V, layers=[1, 1]),
    "out of range; layers must be in 0…1023": lambda: steer(V, layers=-1),
    "layers is 4, which is out of range; layers must be in 0…3": lambda: steer(AXIS, layers=4),
    "bank has entries 0…1": lambda: steer(np.ones((2, 8)), layers=1, rows=[0, 2]),
    "measured at site 'residual'": lambda: steer(AXIS, layers=1, site="mlp"),
    "of is 'all'": lambda: AXIS.thresholds("p25", of="all"),
    "percentile is 'p50'": lambda: AXIS.thresholds("p50", of="default"),
    "percentile is 25 \\(write p25\\); this axis has p25": lambda: AXIS.thresholds(25),
    "'vector' has no thresholds: only an Axis has them": lambda: Vector(np.ones((4, 8)))
    .thresholds("p25"),
    "axis 'vector' has no thresholds; give the floor as numbers": lambda: Axis(np.ones((4, 8)))
    .thresholds("p25"),
    "needs at least one row": lambda: stack_rows([]),
    "the interventions of row 1 were made with rows=": lambda: stack_rows(
        [None, steer(V[None], layers=1, rows=[0, 0])]),
    "different widths": lambda: stack_rows([steer(V, layers=1), steer(np.ones(9), layers=1)]),
    "different numbers of rows": lambda: chain(
        steer(V[None], layers=1, rows=[0, 0]), steer(V[None], layers=1, rows=[0])).rows,
    "row 2 is out of range": lambda: steer(V[None], layers=1, rows=[0, 0]).take([2]),
    "row -2 is out of range": lambda: steer(V[None], layers=1, rows=[0, 0]).take([0, -2]),
    "rows is \\[0.5\\]; it must be a list of integers": lambda: steer(V, layers=1).take([0.5]),
    "width 8, but the model": lambda: steer(V, layers=1).check(layers=4, width=9, rows=1),
    "the model has layers 0…0": lambda: steer(V, layers=1).check(layers=1, width=8, rows=1),
    "for batch size 2, but .* is 3": lambda: steer(V[None], layers=1, rows=[0, 0]).check(
        layers=4, width=8, rows=3),
    "role is 'tool'": lambda: turns("tool"),
    "kind 'sink' is unknown": lambda: everywhere.without("sink"),
    "from_last & Where.* is not a single test": lambda: from_last & Where(any=USER),
    "\\[L, D\\]": lambda: Vector(np.ones(3)),
    "vector 'x' contains a non-finite value": lambda: Vector(NAN[None], name="x"),
}
REFUSED["cap needs a bound; give floor, ceiling or both"] = REFUSED.pop("neither a floor")
REFUSED |= {f"layers is {text!r}; give text such as 46:54":
            lambda text=text: steer(AXIS, layers=text)
            for text in ("", ":a", "1:2:3", "1-3", "1,", "1.0")}
REFUSED |= {
    "layers is '4', which is out of range": lambda: steer(AXIS, layers="4"),
    "layers is '2:'; without a named direction": lambda: steer(V, layers="2:"),
    "layers is '3:3', which selects no layer": lambda: steer(V, layers="3:3"),
    "the bounds of a slice must be ints": lambda: steer(AXIS, layers=slice(1.0, 3.0)),
    "layers is array\\(2\\.\\); it must be an int": lambda: steer(AXIS, layers=np.array(2.0)),
    "layers is b'46'; it must be": lambda: steer(AXIS, layers=b"46"),
    "layers is '1_0'; give text": lambda: steer(AXIS, layers="1_0"),
    "layers is '٤'; give text": lambda: steer(AXIS, layers="٤"),
    "the step of a slice must be at least 1": lambda: steer(AXIS, layers=slice(0, 4, 0)),
    "layers is '-9:2', which is out of range": lambda: steer(AXIS, layers="-9:2"),
    "'2:5', which is out of range; layers must be in 0…3": lambda: steer(AXIS, layers="2:5"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


@pytest.mark.parametrize(("text", "layers"), [
    ("1:3", (1, 2)), (":2", (0, 1)), ("2:", (2, 3)), (":", (0, 1, 2, 3)), ("3", (3,)),
    ("0, 2,3", (0, 2, 3)), ("1 : 3", (1, 2))])
def test_layers_as_text(text, layers):
    """Strings from commands and files have the same meaning in Python."""
    assert steer(AXIS, layers=text).edits[0].layers == layers


def test_another_site_is_refused_by_check():
    edit = steer(V, layers=1).edits[0].replace(site="head")
    with pytest.raises(ValueError, match="site is 'head'"):
        Interventions((edit,)).check(layers=4, width=8, rows=1)


def test_tables():
    edit = cap(2 * AXIS.values[0], layers=[0, 2], floor=[1, 3]).edits[0]
    np.testing.assert_allclose(np.linalg.norm(edit.direction, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(edit.coefficients[:, 0, 2], [1, 3])
    assert edit.direction.shape == (2, 1, 8) and edit.layers == (0, 2)
    # a model's thresholds, one per layer, are selected for the chosen layers
    edit = cap(AXIS, layers=slice(1, 3), floor=AXIS.thresholds("p25", of="default")).edits[0]
    np.testing.assert_array_equal(edit.coefficients[:, 0, 2], [1, 2])
    assert edit.origin[0] == 0x2A
    # the scale multiplies v, not its unit vector
    edit = steer(3 * V, layers=1, scale=2).edits[0]
    np.testing.assert_allclose(edit.coefficients[0, 0], [1, 6 * np.sqrt(8), -np.inf, np.inf])
    edit = steer(np.ones((3, 2, 8)), layers=[0, 1], scale=np.arange(6).reshape(3, 2),
                 rows=[0, 2]).edits[0]
    assert edit.entries == 4 and {x.dtype.name for x in (
        edit.direction, edit.coefficients, edit.where, edit.origin, edit.index)} == {
        "float32", "int32", "uint32"}
    np.testing.assert_allclose(edit.coefficients[1, :3, 1], np.array([1, 3, 5]) * np.sqrt(8))
    assert not any(x.weak_type for x in (edit.direction, edit.coefficients))


def test_layers():
    assert resolve_layers(np.int64(3), None) == (3,)
    assert resolve_layers(slice(-2, None), 6) == (4, 5)
    assert resolve_layers([1, 4], 6) == (1, 4)
    assert resolve_layers(slice(46, 54), None) == tuple(range(46, 54))
    assert resolve_layers(np.array(2), 6) == (2,)
    assert resolve_layers(slice(0, 1024), None) == tuple(range(1024))
    for layers, total, words in (
        ([True], None, "True"),
        (slice(9, None), 4, "layers must be in 0…3"), (slice(4, None), 4, "selects no layer"),
        (slice(0, 5), 4, "must be in 0…3"), (slice(-5, 2), 4, "must be in 0…3"),
        (slice(3, 0, -1), 4, "the step of a slice must be at least 1"),
        ([0, 1, 2, 3, 4, 5, 6, 99], 9, r"6, 99\], which is out of range; layers must be in 0…8"),
        (slice(0, 10**9), None, "a model has at most 1024 layers"),
        ("0:999999999", None, "a model has at most 1024 layers"),
        (slice(0, 1025), None, "a model has at most 1024 layers"),
        (range(10**9), 8, "a model has at most 1024 layers"),
        ("1024", None, "out of range; layers must be in 0…1023"),
    ):
        with pytest.raises(ValueError, match=words):
            resolve_layers(layers, total)
    with pytest.raises(ValueError, match="which repeats a layer") as caught:
        resolve_layers([0] * 999, 4)
    assert len(str(caught.value)) < 150  # truncated


def test_chain_keeps_order_and_stack_merges_slots():
    a, b = steer(V, layers=1), cap(V, layers=2, floor=0)
    assert chain(a, None, b).edits == (*a.edits, *b.edits)
    stacked = stack_rows([chain(a, b), None, b, chain(b, a)])
    assert [e.layers for e in stacked.edits] == [(1, 2), (1, 2)]
    np.testing.assert_array_equal(stacked.edits[0].index >= 0, [True, False, True, True])
    np.testing.assert_array_equal(stacked.edits[1].index >= 0, [True, False, False, True])
    assert stack_rows([None, None]).edits == ()


@pytest.mark.parametrize("index", [np.array([0.5]), np.array([[0]]), np.array([2])])
def test_table_refuses_an_index(index):
    with pytest.raises(ValueError, match="rows"):
        table(np.ones((1, 2, 8)), np.ones((1, 2, 4)), np.zeros((2, 5)), np.zeros(2), (0,),
              "residual", index)


def test_where_asks_kind_and_turn():
    kinds = [USER, TEMPLATE, ASSISTANT | THINKING, ASSISTANT | CODE, ASSISTANT,
             ASSISTANT | GENERATED]
    row = batch([[5] * 6, [5]], kind=[kinds, [USER]], turn=[[0, 1, 1, 1, 3, 5], [0]])

    def at(where):
        found = np.asarray(holds(where.encode(), types.SimpleNamespace(
            kind=row.kind, turn=row.turn)))
        assert not found[1, 1:].any()  # padding is never selected
        return np.flatnonzero(found[0]).tolist()

    assert at(everywhere) == [0, 1, 2, 3, 4, 5] and at(prompt) == [0, 1, 2, 3, 4]
    assert at(response) == [3, 4, 5] and at(generated) == [5] and at(last) == [5]
    assert at(turns("assistant")) == [2, 3, 4, 5] and at(turns("user")) == [0]
    assert at(response.without("code")) == [4, 5] and at(everywhere.without("first"))[0] == 1
    # the union of two roles, as a test
    user, system, assistant = map(turns, ("user", "system", "assistant"))
    assert at(user | assistant) == at(assistant | user) == [0, 2, 3, 4, 5]
    assert at(user | system) == [0] and at(user | system | assistant) == [0, 2, 3, 4, 5]
    assert at((user | assistant) & assistant) == at(assistant)
    # "any of" is kept on either side of &
    assert at(from_last & turns("assistant")) == at(turns("assistant") & from_last) == [5]
    assert at(from_last & from_last) == [5]
    assert np.asarray(holds(from_last.encode(), row))[1].tolist() == [True] + [False] * 5
    assert at(everywhere.within(1, 3)) == [1, 2, 3] and at(response.within(3)) == [4, 5]
    # ranges of messages overlap, in either order
    assert everywhere.within(1).within(0, 3) == everywhere.within(0, 3).within(1, 9) == \
        everywhere.within(1, 9) & Where(hi=3) == everywhere.within(1, 3)
    assert everywhere.within(np.int64(1), np.int32(3)) == everywhere.within(1, 3)
    for bounds in ((1.5,), (1, 2.5), ("1",), (0, None), (-1,), (0, True)):
        with pytest.raises(ValueError, match="needs nonnegative integers"):
            everywhere.within(*bounds)
    for lo, hi in ((2, 2), (2, 9), (0, 0)):
        with pytest.raises(ValueError, match="contains no message"):
            everywhere.within(0, 2).within(lo, hi)


def test_a_direction_of_another_model_is_refused():
    model = s.tiny_model()
    mine = Vector(np.ones((3, 32)), fingerprint=model.fingerprint)
    other = Vector(np.ones((3, 32)), fingerprint="ab" * 8)
    with pytest.raises(ValueError, match="made for another model"):
        generate(model, [[5]], interventions=steer(other, layers=1))
    generate(model, [[5]], interventions=steer(mine, layers=1), max_new_tokens=2, batch_size=1)


@pytest.mark.parametrize(("made", "expected"), [
    (lambda v: ablate(v, layers=0), lambda p: 0 * p),
    (lambda v: scale(v, 3.0, layers=0), lambda p: 3 * p),
    (lambda v: scale(v, [-1.0], layers=[0]), lambda p: -p),
    (lambda v: set_projection(v, -2.5, layers=0), lambda p: 0 * p - 2.5),
])
def test_linear_operators_follow_their_equations(made, expected):
    """Each operator changes only the projections of selected tokens, by its equation."""
    rng = np.random.default_rng(4)
    h, v = rng.normal(size=(3, 5, 8)).astype(np.float32), rng.normal(size=8)
    active = rng.random((3, 5)) < 0.6
    edit = made(v).prepare(3, jnp.asarray(h)).edits[0]
    out, changed = edit.apply(0, jnp.asarray(h), jnp.asarray(active), jnp.asarray(h))
    unit = v / np.linalg.norm(v)
    p = h @ unit
    wanted = h + np.where(active, expected(p) - p, 0)[..., None] * unit
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_array_equal(changed, active)
    np.testing.assert_array_equal(np.asarray(out)[~active], h[~active])


def test_equal_bounds_set_the_projection():
    """A cap whose floor and ceiling are equal is accepted, also per layer."""
    h = np.random.default_rng(6).normal(size=(2, 3, 8)).astype(np.float32)
    v, active = np.eye(8)[0], jnp.ones((2, 3), bool)
    for bound in (0.5, np.array([0.5])):
        edit = cap(v, layers=[1], floor=bound, ceiling=bound).prepare(2, active).edits[0]
        out, _ = edit.apply(1, jnp.asarray(h), active, jnp.asarray(h))
        np.testing.assert_allclose(out[..., 0], 0.5, atol=1e-6)
        np.testing.assert_array_equal(out[..., 1:], h[..., 1:])


def test_push_displaces_as_far_as_the_cap_elsewhere():
    """With a push, h moves by the cap's deficit along a different direction, also per row."""
    rng = np.random.default_rng(5)
    h = rng.normal(size=(2, 4, 8)).astype(np.float32)
    v, u = rng.normal(size=(2, 8))
    active = jnp.ones((2, 4), bool)
    moved = cap(v, layers=1, floor=1.0, push=u)
    deficit = np.maximum(1.0 - h @ (v / np.linalg.norm(v)), 0)
    wanted = h + deficit[..., None] * (u / np.linalg.norm(u))
    ready = moved.prepare(2, active).edits[0]
    out, changed = ready.apply(1, jnp.asarray(h), active, jnp.asarray(h))
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_array_equal(changed, deficit > 0)
    both = stack_rows([moved, cap(v, layers=1, floor=1.0)])
    assert len(both.edits) == 2  # one table with a push and one without
    x = jnp.asarray(h)
    for edit in both.prepare(2, jnp.zeros(())).edits:
        x, _ = edit.apply(1, x, edit.seen(batch([[5] * 4] * 2)), x)
    np.testing.assert_allclose(x[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(x[1], (h + deficit[..., None] * (v / np.linalg.norm(v)))[1],
                               atol=1e-5)
    with pytest.raises(ValueError, match="push has shape"):
        cap(v, layers=1, floor=1.0, push=np.ones(9))


def test_a_push_may_differ_between_layers():
    v = Axis(np.eye(3, 8))
    pushed = cap(v, layers=[0, 2], floor=2.0, push=Axis(np.eye(8)[5:]))
    h = jnp.zeros((1, 1, 8), jnp.float32)
    ready = pushed.prepare(1, h).edits[0]
    for layer, moved in ((0, 5), (2, 7)):
        out, _ = ready.apply(layer, h, jnp.ones((1, 1), bool), h)
        np.testing.assert_array_equal(out[0, 0], 2 * np.eye(8)[moved])


def test_values_that_could_belong_to_directions_or_to_layers_are_refused():
    axis = Axis(np.ones((4, 8)))
    with pytest.raises(ValueError, match="4 numbers, but there are 4 directions and 4 layers"):
        steer([axis] * 4, layers=[1], scale=[1, 2, 3, 4], rows=[0, 1, 2, 3])


TWO_LAYERS = np.stack([V, ZERO])[None]  # zero at the second layer
ONE_NAN = np.where(np.arange(8) == 3, np.nan, 1.0)
E = np.eye(8)
BANK = steer(E[:2], layers=1, rows=[0, 1])


@pytest.mark.parametrize(("message", "made"), [
    ("floor is above ceiling", lambda: cap(V, layers=[1, 2], floor=[0, 2], ceiling=1)),
    ("floor is above ceiling", lambda: cap(E[:2], layers=1, floor=0, ceiling=[-1, 1], rows=[0, 1])),
    ("vector is zero at a chosen layer", lambda: steer(TWO_LAYERS, layers=[1, 2])),
    ("vector is zero at a chosen layer", lambda: steer([V, ZERO], layers=1, rows=[0, 1])),
    ("vector contains a non-finite value", lambda: steer(ONE_NAN, layers=1)),
    ("scale is NaN", lambda: steer(V, layers=[1, 2], scale=[1, np.nan])),
    ("scale is infinite", lambda: steer(V, layers=[1, 2], scale=[1, 1e39])),
    ("‖vector‖ is infinite", lambda: steer(V, layers=[1, 2], scale=[1, 3e38])),
    ("are collinear", lambda: rotate(E[0], E[None, 1::-1], layers=[1, 2], by=1)),
    ("above= is greater", lambda: gate(BANK, V, layer=0, above=[0, 2], below=[1, 1])),
    ("have 4 and 3 layers", lambda: steer([AXIS, Vector(np.ones((3, 8)))], layers=1, rows=[0, 1])),
    ("measured at site 'mlp'", lambda: steer([AXIS, Vector(np.ones((4, 8)), site="mlp")], layers=1,
                                             rows=[0, 1])),
    ("vector contains both named directions and arrays",
     lambda: steer([AXIS, np.ones((4, 8))], layers=range(4), rows=[0, 1])),
    ("mean contains both named directions and arrays",
     lambda: mean_ablate([AXIS, AXIS], [AXIS, np.ones((4, 8))], layers=range(4), rows=[0, 1])),
    ("vector 'vector' contains a non-finite value", lambda: Vector([V, ONE_NAN])),
    ("p25 contains a non-finite value",
     lambda: Axis([V, V], percentiles={"all": {"p25": [1, np.nan]}})),
])
def test_one_wrong_value_among_several_is_refused(message, made):
    with pytest.raises(ValueError, match=message):
        made()


def shifted(params, h):
    return h + params


MLP = [Vector(E[i : i + 4], site="mlp") for i in (0, 4)]


@pytest.mark.parametrize("made", [
    lambda v, w, **more: steer([v], **more),
    lambda v, w, **more: cap([v], floor=0, push=[w], **more),
    lambda v, w, **more: ablate([v], **more),
    lambda v, w, **more: mean_ablate([v], [w], **more),
    lambda v, w, **more: scale([v], 2, **more),
    lambda v, w, **more: set_projection([v], 2, **more),
    lambda v, w, **more: rotate([v], [w], by=1, **more),
    lambda v, w, **more: restore_norm(**more),
    lambda v, w, **more: custom(shifted, np.ones((1, 8)), **more),
])
def test_every_operator_takes_layers_tokens_rows_and_a_site(made):
    (edit,) = made(*MLP, layers=[1, 3], where=user, rows=[0, -1], site="mlp").edits
    assert (edit.layers, edit.site, edit.index.tolist()) == ((1, 3), "mlp", [0, -1])
    np.testing.assert_array_equal(edit.where, [user.encode()])


def test_thresholds_of_all_layers_are_cut_to_the_chosen_ones_in_a_bank():
    """One row of thresholds holds for every direction; a matrix has a row per direction."""
    for floor, wanted in ((np.arange(4.0), [[1, 1], [3, 3]]),
                          (np.arange(8.0).reshape(2, 4), [[1, 5], [3, 7]]),
                          ([8, 9], [[8, 9], [8, 9]]), ([[1, 2], [3, 4]], [[1, 3], [2, 4]])):
        (edit,) = cap([AXIS, AXIS], layers=[1, 3], floor=floor, rows=[0, 1]).edits
        np.testing.assert_array_equal(edit.coefficients[..., 2], wanted)


def test_a_percentile_is_that_of_the_named_population():
    axis = Axis(np.ones((3, 8)), percentiles={
        "default": {"p25": [0, 1, 2], "p75": [3, 4, 5]}, "all": {"p25": [6, 7, 8]}})
    for options, column, wanted in (({"floor": "p25"}, 2, [1, 2]), ({"ceiling": "p75"}, 3, [4, 5]),
                                    ({"floor": "p25", "of": "all"}, 2, [7, 8]),
                                    ({"ceiling": "p25", "of": "all"}, 3, [7, 8])):
        (edit,) = cap(axis, layers=[1, 2], **options).edits
        np.testing.assert_array_equal(edit.coefficients[:, 0, column], wanted)
