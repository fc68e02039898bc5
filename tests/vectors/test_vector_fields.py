"""Fields, representations and limits of directions and caps, by small numbers."""

from __future__ import annotations

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.vectors.caps import Caps, fitted
from jaxpersona.vectors.vector import CONTROL_VECTOR, Axis, Vector

PRINT = "0123456789abcdef"


@pytest.mark.parametrize(("found", "wanted"), [
    (Vector(np.ones((2, 3)), "warm"), "Vector('warm', [2, 3])"),
    (Vector(np.ones((2, 3)), "warm", "tiny", site="mlp"),
     "Vector('warm', [2, 3], of 'tiny', mlp)"),
    (Axis(np.ones((2, 3)), "a", "tiny"), "Axis('a', [2, 3], of 'tiny', no thresholds)"),
    (Axis(np.ones((2, 3)), "a", percentiles={"all": {"p5": np.ones(2), "p9": np.ones(2)},
                                             "default": {"p25": np.ones(2)}}),
     "Axis('a', [2, 3], percentiles: all 2, default 1)"),
    (Caps(np.ones((3, 2)), (5, 2, 3), np.zeros(3), ("x", "y", "z"), model="tiny"),
     "Caps('caps', 3 floors, layers 2 to 5, of 'tiny')")])
def test_a_representation_has_the_name_the_shape_and_what_is_not_the_default(found, wanted):
    """The model, the site and the percentiles appear only where they are set."""
    assert repr(found) == wanted


def test_the_calls_of_caps_have_their_directions_floors_and_metadata():
    """Three caps, two of them at layer 1: the second call has only the later one."""
    values = np.array([[1, 0], [0, 2], [3, 3]], np.float32)
    caps = Caps(values, (1, 0, 1), np.array([5, 6, 7.0]), ("a", "b", "c"), "mine", "tiny", PRINT,
                {"n": 1}, 1)
    (first, layers, floors), (second, later, last) = caps.tables()
    assert (layers, floors.tolist(), later, last.tolist()) == ((0, 1), [6, 5], (1,), [7])
    assert first.values.tolist() == [[0, 2], [1, 0]] and second.values.tolist() == [[0, 0], [3, 3]]
    for vector in (first, second):
        assert (vector.name, vector.model, vector.fingerprint, vector.fingerprint_scheme,
                vector.notes) == ("mine", "tiny", PRINT, 1, {"n": 1})
    edits = Caps(values, (1, 0, 1), np.zeros(3), ("a", "b", "c")).interventions(where="user").edits
    assert [repr(one) for one in edits] == ["cap(user, layers 0–1, residual)",
                                            "cap(user, layer 1, residual)"]


def test_records_and_facts_of_caps_and_axes():
    """One record per cap or layer; facts are the metadata and the notes."""
    caps = Caps(np.array([[3.0, 4.0], [0.0, 2.0]]), (7, 4), np.array([1.5, -2]), ("x", "y"), "c",
                "tiny", PRINT, {"percentile": 25})
    assert caps.records() == [{"layer": 7, "label": "x", "floor": 1.5, "norm": 5.0},
                              {"layer": 4, "label": "y", "floor": -2.0, "norm": 2.0}]
    assert caps.facts() == {"name": "c", "model": "tiny", "fingerprint": PRINT, "percentile": 25}
    axis = Axis(np.array([[3.0, 4.0], [0.0, 0.0]]), "a", "tiny", PRINT, "mlp", {"roles": 2})
    assert axis.records() == [{"layer": 0, "norm": 5.0}, {"layer": 1, "norm": 0.0}]
    assert axis.facts() == {"name": "a", "model": "tiny", "fingerprint": PRINT, "site": "mlp",
                            "roles": 2}
    assert axis.n_layers == 2 and axis.at_layers((1, 0)).tolist() == [[0, 0], [3, 4]]
    assert axis.unit.tolist() == pytest.approx(np.array([[0.6, 0.8], [0, 0]]))


def test_only_three_percentiles_of_an_axis_are_columns_of_a_printed_table():
    """The others are in the records, and names without a space are always printed."""
    axis = jp.load_axis("mini")
    kept = [name for name in axis.records()[0] if not axis._left_out(name)]
    assert kept == ["layer", "norm", "default p25", "default p50", "default p75"]


def test_an_integer_of_the_notes_has_at_most_1024_bits():
    """The limit keeps the conversion to text short."""
    for sign in (1, -1):
        assert Vector(np.ones((1, 1)), notes={"x": sign * (2**1024 - 1)}).notes["x"] == sign * (
            2**1024 - 1)
        with pytest.raises(jp.UserError, match="has 1,025 bits; an integer may have up to 1,024"):
            Vector(np.ones((1, 1)), notes={"x": sign * 2**1024})


@pytest.mark.parametrize(("make", "wanted"), [
    (lambda: Vector(np.ones((1, 2), complex)), "values is complex; give real numbers"),
    (lambda: Vector(np.ones((1, 2)), fingerprint="0" * 15), "it must be sixteen hexadecimal"),
    (lambda: Vector(np.ones((1, 2)), fingerprint="0" * 17), "it must be sixteen hexadecimal"),
    (lambda: Vector(np.ones((1, 2)), fingerprint="A" * 16), "it must be sixteen hexadecimal"),
    (lambda: Vector(np.ones((1, 2)), fingerprint_scheme=0), "scheme is 0; it must be a positive"),
    (lambda: Vector(np.ones((1, 2)), site="head"), "site is 'head'; it must be one of"),
    (lambda: Axis(np.ones((1, 2)), percentiles={"default": {25: np.ones(1)}}),
     "percentiles/default/25 has a name that is not a string"),
    (lambda: Axis(np.ones((1, 2)), percentiles={5: {"p25": np.ones(1)}}),
     "percentiles/5/p25 has a name that is not a string"),
    (lambda: Axis(np.ones((1, 2)), percentiles={"default": {"a/b": np.ones(1)}}),
     "percentiles/default/a/b has a / in a name"),
    (lambda: Vector(np.ones((1, 2)), "a") / 0, "vector 'a' was divided by 0; use another"),
    (lambda: Axis(np.ones((1, 2)), "a") / 0.0, "axis 'a' was divided by 0.0; use another"),
    (lambda: Vector(np.ones((1, 2)), "a").check_site("mlp"),
     "vector 'a' was measured at site 'residual'; to use it at 'mlp', pass its values"),
    (lambda: Vector(np.ones((1, 2)), "a") + Vector(np.ones((3, 2)), "b"),
     r"'a' and 'b' differ in shape \(\[1, 2\] and \[3, 2\]\); use directions of the same"),
    (lambda: Axis(np.ones((1, 2)), "a").thresholds("p25"), "axis 'a' has no thresholds; give the"),
    (lambda: Caps(np.ones((1, 2)), (0,), [np.inf], ("a",)), "caps 'caps' contain a non-finite")])
def test_a_field_that_is_not_valid_is_named_with_its_value(make, wanted):
    """Each message has one line with the field, the value and a fix."""
    with pytest.raises(jp.UserError, match=wanted) as error:
        make()
    assert "\n" not in str(error.value)


def test_only_the_integer_zero_is_the_start_of_a_sum():
    """Other numbers cannot be added to a direction, from either side."""
    vector = Vector(np.ones((1, 2)))
    assert 0 + vector is vector
    for other in (1, 0.0, False, "a"):
        with pytest.raises(TypeError):
            other + vector  # pyright: ignore
    for act in (lambda: vector * "a", lambda: vector / "a", lambda: vector - 1):
        with pytest.raises(TypeError):
            act()


def test_a_direction_is_known_by_its_weights_only_in_the_present_scheme():
    """The second half of the fingerprint; 0 if it is unknown or has another scheme."""
    assert Vector(np.ones((1, 2)), fingerprint=PRINT).origin != 0
    assert Vector(np.ones((1, 2)), fingerprint=PRINT, fingerprint_scheme=1).origin == 0
    assert Vector(np.ones((1, 2))).origin == 0


def test_the_cosine_is_a_float32_and_unknown_where_either_direction_is_zero():
    """Cosines 0.6, NaN and NaN, with the zero on either side."""
    one, two = Vector([[1, 0], [0, 0], [1, 1]]), Vector([[3, 4], [1, 1], [0, 0]])
    for found in (one.cosine(two), two.cosine(one)):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, [0.6, np.nan, np.nan], rtol=1e-6)


def test_a_direction_of_another_model_is_named_with_both_shapes():
    """Only a direction can be given as an array instead."""
    config = s.tiny_config()  # three layers of width 32
    with pytest.raises(jp.UserError) as error:
        fitted(Vector(np.ones((2, 5)), "a"), config, "tiny")
    assert str(error.value) == (
        "vector 'a', made for another model (layers: 2, width: 5), cannot be used with tiny "
        "(layers: 3, width: 32); use the vector of this model")
    for found, named, wanted in (
            (Axis(np.ones((3, 32)), "a", "big", PRINT), "axis 'a', made for another model (big), ",
             "use the axis of this model, or pass the values as an array"),
            (Caps(np.ones((1, 32)), (2,), [0.0], ("x",), "c", fingerprint=PRINT),
             "caps 'c', made for another model (unnamed), ", "use the caps of this model")):
        with pytest.raises(jp.UserError) as error:
            fitted(found, config, "tiny")
        assert str(error.value) == f"{named}cannot be used with tiny; {wanted}"
    short = Vector(np.ones((2, 32)), notes={"source": CONTROL_VECTOR})
    assert fitted(short, config, "tiny").values[:, 0].tolist() == [1, 1, 0]
    long = Vector(np.ones((4, 32)), notes={"source": CONTROL_VECTOR})
    with pytest.raises(jp.UserError, match="layers: 4, width: 32"):
        fitted(long, config, "tiny")
