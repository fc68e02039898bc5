"""Arithmetic on directions: values, model metadata, and rejected operands."""

from __future__ import annotations

import json

import numpy as np
import pytest
import support as s

import jaxpersona as jp

RNG = np.random.default_rng(0)
ONE, TWO = (jp.Vector(RNG.normal(size=(4, 6)), name, "m", "a" * 16) for name in ("one", "two"))


def test_operators_are_those_of_the_values():
    for got, wanted, name in ((-ONE, -ONE.values, "-one"), (2 * ONE, 2 * ONE.values, "2·one"),
                              (np.float32(2) * ONE, 2 * ONE.values, "2·one"),
                              (ONE * np.float64(0.5), ONE.values / 2, "0.5·one"),
                              (ONE * 0.5, ONE.values / 2, "0.5·one"),
                              (ONE + TWO, ONE.values + TWO.values, "one + two"),
                              (ONE - TWO, ONE.values - TWO.values, "one - two")):
        assert type(got) is jp.Vector and got.name == name
        assert (got.model, got.fingerprint, got.site) == ("m", "a" * 16, "residual")
        np.testing.assert_array_equal(got.values, wanted.astype(np.float32))
    np.testing.assert_array_equal(np.asarray(ONE), ONE.values)
    assert np.asarray(ONE, np.float64).dtype == np.float64
    ones = np.ones((4, 6), np.float32)
    for found in (ones + ONE, ONE + ones, np.add(ONE, 1), np.add(ONE, 1, out=ones.copy())):
        np.testing.assert_array_equal(found, ONE.values + 1)  # an array, without metadata
    kept = ONE.values.copy()
    np.array(ONE)[:] = 0  # a copy
    np.testing.assert_array_equal(ONE.values, kept)
    with pytest.raises(ValueError, match="needs a copy"):
        ONE.__array__(np.float64, copy=False)


@pytest.mark.parametrize("layers, kept", [(1, [1]), (slice(1, 3), [1, 2]), ([0, 3], [0, 3])])
def test_layers_restrict_a_direction(layers, kept):
    got = ONE[layers].values
    for layer in range(4):
        wanted = ONE.values[layer] if layer in kept else np.zeros(6)
        np.testing.assert_array_equal(got[layer], wanted)


def test_an_axis_loses_its_thresholds():
    axis = jp.Axis(ONE.values, percentiles={"default": {"p25": np.ones(4)}})
    assert type(-axis) is jp.Vector and type(axis[1]) is jp.Vector
    with pytest.raises(jp.UserError, match="has no thresholds"):
        (2 * axis).thresholds("p25")


def test_cosine_is_that_of_every_layer():
    wanted = [a @ b / np.linalg.norm(a) / np.linalg.norm(b)
              for a, b in zip(ONE.values, TWO.values, strict=True)]
    np.testing.assert_allclose(ONE.cosine(TWO), wanted, rtol=1e-5)
    np.testing.assert_allclose(ONE.cosine(-3 * ONE), -1, rtol=1e-5)
    assert np.isnan(ONE[0].cosine(TWO)[1:]).all()
    for scale in (1e-30, 1e30):  # the product of two such norms is not a float32
        np.testing.assert_allclose((scale * ONE).cosine(scale * TWO), wanted, rtol=1e-5)


@pytest.mark.parametrize("other, field", [
    (jp.Vector(np.ones((3, 6))), "shape"),
    (jp.Vector(np.ones((4, 6)), site="mlp"), "site"),
    (jp.Vector(np.ones((4, 6)), fingerprint="b" * 16), "fingerprint"),
])
def test_directions_of_other_models_or_sites_are_refused(other, field):
    for act in (lambda: ONE + other, lambda: ONE - other, lambda: ONE.cosine(other)):
        with pytest.raises(jp.UserError, match=f"differ in {field}"):
            act()
    ONE + jp.Vector(np.ones((4, 6)))  # an unknown fingerprint is accepted
    # fingerprints of different schemes cannot be compared
    ONE + jp.Vector(np.ones((4, 6)), fingerprint="b" * 16, fingerprint_scheme=1)
    old = jp.Vector(np.ones((4, 6)), fingerprint="b" * 16, fingerprint_scheme=1)
    for made in (-old, 2 * old, old[1:3], old + old, old - 0.5 * old):
        assert (made.fingerprint, made.fingerprint_scheme) == ("b" * 16, 1)
    with pytest.raises(TypeError):
        ONE + 1  # pyright: ignore
    with pytest.raises(jp.UserError, match="layers is 4"):
        ONE[4]


def test_results_keep_the_site_and_an_array_is_taken_as_measured_there():
    """A plain array has no site, so it is compared with a direction of any site."""
    mine = jp.Vector(ONE.values, "one", "m", "a" * 16, site="mlp")
    np.testing.assert_array_equal(mine.cosine(TWO.values), ONE.cosine(TWO))
    for made in (-mine, 2 * mine, mine / 2, mine[1:3], mine + mine, mine - 0.5 * mine, sum([mine])):
        assert made.site == "mlp"


def test_percentiles_are_listed_by_number_and_names_without_a_number_last():
    axis = jp.Axis(ONE.values, percentiles={
        "all": {name: np.full(4, i) for i, name in enumerate(("p100", "best", "p5", "p25.5"))}})
    with pytest.raises(jp.UserError, match="this axis has p5, p25.5, p100, best$"):
        axis.thresholds("p50", of="all")
    assert list(axis.records()[1])[2:] == ["all p5", "all p25.5", "all p100", "all best"]
    assert axis.records()[1]["all p5"] == 2.0


def test_division_sums_and_cosines_with_arrays():
    axis = jp.load_axis("mini")
    half = axis / 2
    assert type(half) is jp.Vector and half.model == axis.model and half.name.endswith("/2")
    np.testing.assert_array_equal(half.values, axis.values / 2)
    np.testing.assert_allclose(np.linalg.norm((axis / np.linalg.norm(axis)).values), 1, rtol=1e-6)
    np.testing.assert_array_equal(sum([axis, half]).values, (axis + half).values)
    np.testing.assert_array_equal(axis.cosine(half.values), axis.cosine(half))
    with pytest.raises(jp.UserError, match="differ in shape"):
        axis.cosine(axis.values[:, :4])


def test_a_vector_and_caps_save_themselves(tmp_path):
    axis = jp.load_axis("mini")
    assert axis.save(tmp_path / "axis.safetensors") == []
    assert repr(jp.load_axis(tmp_path / "axis.safetensors")) == repr(axis)
    lost = jp.save_vector(tmp_path / "plain.npy", axis)  # what an array cannot store
    assert lost and axis.save(tmp_path / "axis.npy") == lost
    assert axis.save(tmp_path / "axis.gguf") == jp.save_vector(tmp_path / "v.gguf", axis) != []
    caps = jp.Caps(axis.values[4:5], (4,), np.ones(1), ("a",))
    assert caps.save(tmp_path / "caps.safetensors") == []
    assert list(jp.load_caps(tmp_path / "caps.safetensors")) == ["caps"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_tensors_of_pytorch_are_accepted(dtype):
    torch = pytest.importorskip("torch")
    values = torch.ones(8, 128, dtype=getattr(torch, dtype)).requires_grad_()
    assert jp.Vector(values).values.shape == (8, 128)
    of_array = jp.steer(np.ones(128), layers=4)
    assert s.same_bits(jp.steer(values[4], layers=4), of_array)
    assert s.same_bits(jp.steer([values[4]], layers=4, rows=[0]),
                       jp.steer(np.ones((1, 128)), layers=4, rows=[0]))


def test_products_are_computed_in_float64_and_factors_are_finite_real_numbers():
    """A factor beyond float32 is no error as long as the product is in its range."""
    large = jp.Vector(np.full((2, 3), 1e20), "a")
    small = jp.Vector(np.full((2, 3), 1e-20), "a")
    for found, wanted in ((large / 1e39, 1e-19), (large * 1e-46, 1e-26), (1e50 * small, 1e30),
                          (small / 1e-50, 1e30), (np.float32(2) * large, 2e20)):
        np.testing.assert_allclose(found.values, wanted, rtol=1e-6)
        assert found.values.dtype == np.float32
    for wrong in (10**400, -10**400, np.nan, np.inf, np.complex64(1 + 1j), 10**5000):
        for act, verb in ((lambda x: large * x, "multiplied"), (lambda x: large / x, "divided")):
            with pytest.raises(jp.UserError, match=f"'a' was {verb} by .*; use a finite") as error:
                act(wrong)
            assert "\n" not in str(error.value)
    with pytest.raises(jp.UserError, match="non-finite"):
        large * 1e30


def test_notes_of_a_file_do_not_replace_the_fields_of_an_export(tmp_path, capsys):
    notes = {"name": "other", "model": "m", "kind": "k", "records": 1, "judge": "none", "site": "s",
             "shape": "x"}
    vector = jp.Vector(np.ones((2, 3)), "mine", notes=notes)
    caps = jp.Caps(np.ones((1, 3)), layers=(1,), floors=np.ones(1), labels=("a",), name="mine",
                   notes=notes)
    for one in (vector, caps):
        found = json.loads(one.to_json())
        assert (found["kind"], found["name"], found["model"]) == (type(one).__name__, "mine", "")
        assert isinstance(found["records"], list) and found["judge"] == "none"
        assert (found["notes.name"], found["notes.kind"], found["notes.records"]) == (
            "other", "k", 1)
    assert json.loads(vector.to_json())["site"] == "residual"
    vector.save(tmp_path / "v.safetensors")
    assert s.run_command(["vectors", "show", str(tmp_path / "v.safetensors")]) == 0
    said = capsys.readouterr().out
    assert "[2 layers, width 3]" in said and "notes.shape" in said and "notes.name" in said
    with pytest.raises(jp.UserError, match=r"notes\['x'\] has 16,610 bits"):
        jp.Vector(np.ones((2, 3)), notes={"x": 10**5000})
