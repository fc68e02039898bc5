"""The names of operators, layers and tests in representations, and messages that choose a fix."""

from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.brief import shown
from jaxpersona.interventions import bank
from jaxpersona.interventions.compose import given
from jaxpersona.interventions.describe import call, host_array, layer_range
from jaxpersona.interventions.describe import tests as written
from jaxpersona.interventions.edit import _operator
from jaxpersona.interventions.gates import Gate

INF = np.inf
NOBODY = (-1, 0, 0, 0, 0)


@pytest.mark.parametrize(("numbers", "name"), [
    ((1, 2, -INF, INF), "steer"), ((1, 0, 1, INF), "cap"), ((1, 0, -INF, 1), "cap"),
    ((1, 0, -1, 1), "cap"), ((1, 2, 1, INF), "rank_one"), ((0, 0, -INF, INF), "ablate"),
    ((0, 2, -INF, INF), "set_projection"), ((0, 0, 1, INF), "rank_one"),
    ((3, 0, -INF, INF), "scale"), ((3, 1, -INF, INF), "rank_one"),
    ((3, 0, -INF, 1), "rank_one"), ((-1, 0, -INF, INF), "scale"),
], ids=str)
def test_the_coefficients_name_an_operator(numbers, name):
    """A combination that no operator has is a rank-one edit."""
    assert _operator(*map(float, numbers)) == name


def test_entries_that_change_nothing_do_not_name_an_operator():
    """A row that is steered by 0 has the identity, as padding has."""
    v = np.eye(8)
    assert jp.steer(v[0], layers=1, scale=0).edits[0].operator() == "steer"
    assert jp.cap(v[:3], layers=[0, 1], floor=[[1, -INF], [-INF] * 2, [2, 3]],
                  rows=[0, 1, 2]).edits[0].operator() == "cap"
    mixed = jp.stack_rows([jp.cap(v[0], layers=1, floor=0.0), jp.steer(v[0], layers=1), None])
    assert mixed.edits[0].operator() == "rank_one"
    assert jp.reserve(1, 8, [0]).edits[0].operator() == "reserve"


@pytest.mark.parametrize(("layers", "text"), [
    ((4,), "layer 4"), ((4, 5), "layers 4–5"), ((4, 5, 6), "layers 4–6"), ((0, 2), "layers 0, 2"),
    ((1, 2, 4), "layers 1, 2, 4"), ((0,), "layer 0")])
def test_layers_are_a_range_unless_there_are_gaps(layers, text):
    """Ranges are inclusive."""
    assert layer_range(layers) == text


def test_several_tests_are_counted_and_padding_is_not():
    """Arrays of another shape have no description."""
    user, last = jp.user.encode(), jp.where.last.encode()
    assert written(user) == written(np.stack([user, user, NOBODY])) == "user"
    assert written(np.stack([user, last, NOBODY, user])) == "2 selections"
    assert written(np.array([NOBODY] * 2)) == "nowhere"
    for shape in ((2, 4), (1, 1, 5)):
        assert written(np.zeros(shape, np.int32)) == "traced"
    assert call("f", "a", "", "b") == "f(a, b)" and call("f") == "f()"
    assert host_array(jnp.ones(2)).tolist() == [1, 1] and host_array([1, 2]) is None


def test_a_gate_names_its_place():
    """The site "residual" is omitted."""
    v = np.eye(8)[0]
    edit = jp.steer(v, layers=[4])
    for options, text in (({}, "Gate(layer 2, prompt)"),
                          ({"over": "token"}, "Gate(layer 2, token)"),
                          ({"site": "mlp"}, "Gate(layer 2, mlp, prompt)")):
        assert repr(jp.gate(edit, v, layer=2, above=0, **options).edits[0].gate) == text
    gate = jp.gate(edit, v, layer=2, above=0, within=True).edits[0].gate
    assert gate.key == (2, "residual", "prompt", True)


@pytest.mark.parametrize(("layer", "site", "before"), [
    (1, "mlp", True), (2, "attention", True), (2, "mlp", False), (2, "residual", False),
    (3, "attention", False)])
def test_a_gate_is_evaluated_before_later_sites_alone(layer, site, before):
    """The order within a layer is attention, MLP, residual."""
    made = Gate(direction=None, bounds=None, where=None, origin=None, layer=layer, site=site,
                over="token")
    assert made.precedes(2, "mlp") is before


@pytest.mark.parametrize(("value", "words"), [
    ({"a": 1}, "is a dict; give .interventions.. of one of its items$"),
    ({"a": 1, "b": 2}, r"is a dict; give .*of one of its items, or jp.chain\(…\) of several$"),
    ([1], r"is a list; chain its items with jp.chain\(a, b, …\), or apply one item per row with"),
    ((1,), "is a tuple; chain its items"), (5, "is an int; give the result of jp.steer, jp.cap"),
    (2.5, "is a float; give the result of jp.steer"),
    (types.SimpleNamespace(interventions=1), "is a SimpleNamespace; call its method .interv"),
], ids=str)
def test_what_is_no_intervention_is_named_with_a_fix(value, words):
    """The fix depends on the type of the value."""
    with pytest.raises(ValueError, match=f"^interventions {words}"):
        given(value)


def test_a_number_that_may_be_meant_as_a_percentile_is_named():
    """Only an integer that is the number of a percentile of the axis."""
    axis = jp.Axis(np.ones((3, 8)), percentiles={"default": {"p25": np.arange(3.0)},
                                                 "all": {"p75": np.arange(3.0)}})
    with pytest.warns(UserWarning, match=r"^floor is 25, which is a projection; for the "
                                         r"percentile, give floor='p25', or .*, floor=25.0$"):
        jp.cap(axis, layers=1, floor=25)
    with pytest.warns(UserWarning, match="^ceiling is 75, .*ceiling='p75'"):
        jp.cap(axis, layers=1, ceiling=75, of="all")
    for options in ({"floor": 25.0}, {"floor": 26}, {"floor": 25, "of": "all"},
                    {"ceiling": [25, 25, 25]}):  # warnings are errors
        jp.cap(axis, layers=1, **options)
    jp.cap(axis.values[1], layers=1, floor=25)


def test_long_values_are_cut_at_eighty_characters():
    """The ellipsis counts as one of them."""
    assert shown("x" * 78, 80) == repr("x" * 78)
    assert shown("x" * 79, 80) == "'" + "x" * 78 + "…"


@pytest.mark.parametrize(("name", "value", "good"), [
    ("floor", -INF, True), ("floor", INF, False), ("above", -INF, True), ("above", INF, False),
    ("ceiling", INF, True), ("ceiling", -INF, False), ("below", INF, True), ("below", -INF, False),
    ("scale", INF, False), ("scale", -INF, False), ("floor", -3.5e38, False),
    ("ceiling", 3.5e38, False), ("scale", 3.4e38, True), ("floor", np.nan, False)])
def test_a_bound_may_be_open_on_one_side(name, value, good):
    """Minus infinity is no lower bound, and infinity no upper bound."""
    if good:
        bank.check_finite(name, np.array([0.0, value]))
    else:
        with pytest.raises(ValueError, match=f"^{name} is (infinite in float32|NaN)"):
            bank.check_finite(name, np.array([0.0, value]))


def test_a_row_of_strength_zero_has_no_entry_and_counts_no_token():
    """Unless every strength is zero."""
    edits = jp.sweep(np.eye(8)[0], [-2.0, 0, 1.0, 0.0], layers=1)
    (table,) = edits.edits
    assert [int(i) >= 0 for i in table.index] == [True, False, True, False]
    assert sorted(table.coefficients[0, :2, 1].tolist()) == [-2.0, 1.0]
    assert all(int(i) >= 0 for i in jp.sweep(np.eye(8)[0], [0, 0], layers=1).edits[0].index)


def test_the_entries_of_a_row_are_those_of_its_index():
    """Indices that are out of range are listed once and in order."""
    v = np.eye(8)
    with pytest.raises(ValueError, match=r"rows contains \[-2, 2, 5\], but the bank has entries 0"):
        jp.steer(v[:2], layers=1, rows=[5, 0, 2, -2, 5, -1, 1])
    assert jp.steer(v[:2], layers=1, rows=[0, -1, 1]).edits[0].index.tolist() == [0, -1, 1]


@pytest.mark.parametrize(("bounds", "wanted"), [
    ({"above": 1}, [[1, INF]] * 3), ({"below": [2]}, [[-INF, 2]] * 3),
    ({"above": [0, 1, 2], "below": 5}, [[0, 5], [1, 5], [2, 5]]),
    ({"above": 5, "below": 5}, [[5, 5]] * 3), ({"above": [0, 1]}, None),
    ({"below": np.ones((3, 1))}, None),
], ids=str)
def test_a_bank_has_one_bound_for_all_or_one_for_each_of_its_edits(bounds, wanted):
    """The fourth entry of the table is padding."""
    v = np.eye(8)
    edits = jp.steer(v[:3], layers=[2], rows=[0, 1, 2])
    if wanted is None:
        with pytest.raises(ValueError, match=r"has shape .*; it must be a number or an arr"):
            jp.gate(edits, v[0], layer=1, **bounds)
    else:
        gate = jp.gate(edits, v[:3], layer=1, **bounds).edits[0].gate
        assert gate.bounds[:3].tolist() == wanted and gate.direction.shape == (4, 8)
        assert gate.direction[:3].argmax(-1).tolist() == [0, 1, 2]


def test_vectors_of_several_layers_and_directions_are_one_bank():
    """[n, l, D] gives n directions at l layers; strengths multiply the norms."""
    value = np.arange(1, 2 * 3 * 4 + 1, dtype=float).reshape(2, 3, 4)
    made = bank.Bank(value, [1, 4, 6], [1, 0, -1], "mlp")
    assert (made.direction.shape, made.norm.shape, made.layers) == ((3, 2, 4), (3, 2), (1, 4, 6))
    np.testing.assert_allclose(made.norm[2, 1], np.linalg.norm(value[1, 2]))
    np.testing.assert_allclose(made.direction[1, 0] * made.norm[1, 0], value[0, 1])
    assert made.spread("scale", [5, 7]).tolist() == [[5, 7]] * 3  # one per direction
    assert made.spread("scale", [[1, 2, 3], [4, 5, 6]]).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert made.index.tolist() == [1, 0, -1] and made.total is None and made.site == "mlp"
    one = bank.Bank(value[:1], [1, 4, 6], None, "residual")
    assert one.spread("scale", [5, 6, 7]).tolist() == [[5], [6], [7]]  # one per layer
