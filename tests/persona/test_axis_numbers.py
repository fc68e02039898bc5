"""Vectors, components, intervals and the summary of an axis, from numbers by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from jaxpersona.errors import UserError
from jaxpersona.persona import axis as science
from jaxpersona.persona import bootstrap
from jaxpersona.persona.reference import Reference, reference
from jaxpersona.persona.summary import distances, summary
from jaxpersona.persona.thresholds import percentiles_of
from jaxpersona.vectors.vector import Axis

NAN = np.full((1, 2), np.nan)


def test_vectors_are_the_means_by_score():
    """Replies 1 to 4 with scores 3, 2, None and 3; the fifth is empty."""
    means = np.array([[[1.0, 0]], [[2, 0]], [[3, 0]], [[6, 2]], NAN])
    found = science.role_vectors(means, [3, 2, None, 3, 3])
    assert {name: (value.tolist(), n) for name, (value, n) in found.items()} == {
        "mean": ([[3.0, 0.5]], 4), "pos_3": ([[3.5, 1.0]], 2), "pos_2": ([[2.0, 0.0]], 1)}
    assert found["mean"][0].dtype == np.float32
    assert science.role_vectors(means[4:], [3]) == {}
    assert set(science.role_vectors(means[:1], [0])) == {"mean"}
    with pytest.raises(UserError, match="scores has 4 entries for 5 rollouts; give one score per"):
        science.role_vectors(means, [3] * 4)
    for wrong in (np.inf, np.nan):
        means[1, 0, 0] = wrong
        with pytest.raises(UserError, match="the response mean of rollout 1 has non-finite"):
            science.role_vectors(means, [3] * 5)


def test_the_axis_points_from_the_mean_of_the_roles_to_the_default_persona():
    """(5, 1) minus the mean of (1, 1) and (3, 5)."""
    roles = np.array([[[1.0, 1]], [[3, 5]]])
    found = science.assistant_axis(np.array([[5.0, 1]]), roles)
    assert found.tolist() == [[3.0, -2.0]] and found.dtype == np.float32
    with pytest.raises(UserError, match="roles is empty: no role has enough rollouts with score"):
        science.assistant_axis(np.ones((1, 2)), roles[:0])
    assert science.project(np.array([[[1.0, 2]], [[3, 4]]]), np.array([[0.0, 5]])).tolist() == [
        [2.0], [4.0]]
    assert science.cosine(np.array([1.0, 0]), np.array([-3.0, 4])) == pytest.approx(-0.6)


def test_the_percentiles_of_projections_ignore_empty_replies():
    """Nine percentiles by default; 0, 1, …, 100 are their own percentiles."""
    rows = np.concatenate([np.arange(101.0)[:, None] + [0, 10], NAN])
    found = science.percentiles(rows)
    assert {name: value.tolist() for name, value in found.items()} == {
        f"p{q}": [q, q + 10] for q in (1, 5, 10, 25, 50, 75, 90, 95, 99)}
    assert found["p1"].dtype == np.float32
    assert set(percentiles_of({"a": rows}, {"a": 102}, draws=2)[0]) == set(found)
    with pytest.raises(UserError, match="projections has no finite row: all replies are empty"):
        science.percentiles(NAN)


def test_every_component_has_no_negative_cosine_with_the_axis():
    """Four roles in a plane: variances 8 and 2 along the first and the second channel."""
    vectors = np.array([[4.0, 0, 7], [-4, 0, 7], [0, 2, 7], [0, -2, 7]])
    for axis in ([1, 1, 0], [-1, 1, 0], [1, -1, 0], [-1, -1, 0]):
        found = science.principal_components(vectors, np.array(axis, float))
        for k, sign in enumerate(axis[:2]):
            np.testing.assert_allclose(found.directions[k], sign * np.eye(3)[k], atol=1e-12)
        np.testing.assert_allclose(found.ratio[:2], [0.8, 0.2])
        np.testing.assert_allclose(found.coordinates[:, 0], axis[0] * vectors[:, 0], atol=1e-12)
    with pytest.raises(UserError, match="the number of role vectors is 1; give at least two"):
        science.principal_components(vectors[:1], np.ones(3))
    roles = {name: vectors[i, None] for i, name in enumerate("dbca")}
    found = science.analyse(np.array([[-3.0, 4, 7]]), roles)
    assert found.names == ["a", "b", "c", "d"] and found.vectors[3, 0].tolist() == [4, 0, 7]
    np.testing.assert_allclose(found.axis, [[-3, 4, 0]], atol=1e-6)
    np.testing.assert_allclose(found.cos_pc1, [0.6])
    assert found.vectors.dtype == np.float32


def test_the_ends_of_an_interval_are_mirrored_at_the_value():
    """2θ minus the percentiles 97.5 and 2.5 of 0, 1, …, 100."""
    drawn = np.stack([np.arange(101.0), np.arange(101.0) + 1000], 1)
    found = bootstrap._interval(np.array([10.0, 1060]), drawn)
    np.testing.assert_allclose(found, [[20 - 97.5, 2120 - 1097.5], [20 - 2.5, 2120 - 1002.5]])


def test_a_role_has_never_fewer_replies_than_stored_means():
    """The scale of the weights depends on the larger number; roles have their own draws."""
    few, same, more = (bootstrap._weights("ghost", 4, size, 9, 0) for size in (2, 4, 16))
    np.testing.assert_array_equal(few, same)
    np.testing.assert_allclose(more, same / 2, rtol=1e-6)
    assert same.shape == (9, 4) and np.abs(same.sum(1)).max() < 1e-6
    # counts t of a draw have the weights m / √((m − 1) · N) · (t − 1) / m
    counts = same * np.sqrt(3 * 4) + 1
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-5)
    assert counts.sum(1) == pytest.approx(4)
    assert (bootstrap._weights("tutor", 4, 4, 9, 0) != same).any()
    assert (bootstrap._weights("ghost", 4, 4, 9, 1) != same).any()


def test_at_most_ten_components_have_intervals():
    """And at most one fewer than roles."""
    rng = np.random.default_rng(0)
    for roles, wanted in ((4, 3), (13, 10)):
        names = [f"r{i}" for i in range(roles)] + ["default"]
        means = {name: rng.normal(size=(3, 1, 20)) for name in names}
        vectors = {name: value.mean(0) for name, value in means.items()}
        stored = dict.fromkeys(names, 3)
        found = bootstrap.pca_intervals(vectors.pop("default"), vectors, stored, stored,
                                        lambda name, at, means=means: means[name][:, at], draws=5)
        assert found.variance.shape == (2, 1, wanted) and found.fixed == ()


TABLE = {f"p{q}": np.full(2, float(q)) for q in (1, 25, 50, 75, 99)}


@pytest.mark.parametrize("name", [*TABLE, "p5"])
def test_an_axis_needs_five_percentiles_for_a_comparison(name):
    """The median, the quartiles and the ends; others may be missing."""
    table = {key: value for key, value in {**TABLE, "p5": np.ones(2)}.items() if key != name}
    axis = Axis(np.ones((2, 3)), percentiles={"default": table, "all": TABLE})
    assert (reference(axis, 0) is None) == (name != "p5")
    found = Reference({25.0: 1.0, 50.0: 2.0, 75.0: 3.0}, dict(zip("dcba", (1, 2, 3, 4.5),
                                                                  strict=True)))
    assert found.nearest(2.6) == ["b", "c", "d"] and found.nearest(0.0, 1) == ["d"]


def run(**more):
    """An extraction of two roles at distances −1 and −4, with nothing but what is printed."""
    means = {"default": np.array([0.0, 8.0]), "far": np.array([0.0, 0.0]),
             "near": np.array([0.0, 6.0])}
    own = np.array([[0.0, 6.0], [0.0, 10.0], [np.nan, np.nan]])
    return SimpleNamespace(**{
        "rounds": None, "pca": None, "projections": dict.fromkeys(means, own),
        "mean_projection": means.__getitem__, "rollouts": 1234, "role_means": {"near": 1, "far": 1},
        "counts": {"near": {"0": 0, "2": 0, "3": 4, "failed": 2},
                   "far": {"0": 1500, "None": 1, "3": 3}},
        "axis": SimpleNamespace(model="tiny", n_layers=2,
                                notes={"min_count": 2, "judge": "rules"}),
        "analysis": SimpleNamespace(names=["near"], cos_pc1=[0.1, 0.25], components=[
            SimpleNamespace(ratio=[0.3]), SimpleNamespace(ratio=[0.5])]), **more})


def test_the_summary_line_by_line(tmp_path):
    """Only files that exist are listed, and their names are quoted in the commands."""
    folder = tmp_path / "a run"
    folder.mkdir()
    for name in ("axis.safetensors", "roles.png", "roles.svg", "drift.json", "notes.txt"):
        (folder / name).touch()
    assert distances(run(), 1) == {"near": -1.0, "far": -4.0}
    axis = f"'{folder}/axis.safetensors'"
    assert summary(run(), folder, 1) == [
        "Assistant Axis of tiny: 1 of 2 roles, 1,234 rollouts, 2 layers",
        "judge rules: 2 without a verdict, 1 undecided, 7 with score 3, 1,500 with score 0",
        "|cos(PC1, axis)| at layer 1: 0.250; PC1 explains 50% of the role vectors' variance",
        "projections at layer 1: the default persona has mean 8 and standard deviation 2; "
        "distances of the roles from this mean in standard deviations:",
        "  nearest to farthest: near -1.0, far -4.0", f"files in {folder}:",
        "  axis.safetensors  the axis with its thresholds",
        "  roles.png         projections of the roles",
        "  drift.json        drift over turns, as numbers", "next:",
        f"  jaxpersona report '{folder}'", f"  jaxpersona vectors check {axis}",
        f"  jaxpersona project CONVERSATION.json --on {axis}",
        f'  jaxpersona generate "Who are you?" --cap {axis} --compare']


def test_the_summary_has_intervals_at_the_middle_layer_and_the_lines_of_the_rounds(tmp_path):
    """The default persona without a spread gives large distances instead of a division by 0."""
    pca = SimpleNamespace(cos=np.array([[0.125], [0.5]]),
                          variance=np.array([[[0.25, 0.5]], [[0.75, 1.0]]]))
    rounds = SimpleNamespace(lines=lambda: ["precision so and so", "saved so many"])
    lines = summary(run(pca=pca, rounds=rounds), tmp_path, 1, options=["--model", "m"])
    assert lines[2:5] == [
        "precision so and so", "saved so many",
        "|cos(PC1, axis)| at layer 1: 0.250 (95 % interval 0.125 to 0.500); PC1 explains 50% (25% "
        "to 75%) of the role vectors' variance"]
    assert lines[-3:] == [
        f"  jaxpersona vectors check {tmp_path}/axis.safetensors --model m",
        f"  jaxpersona project CONVERSATION.json --on {tmp_path}/axis.safetensors --model m",
        f'  jaxpersona generate "Who are you?" --cap {tmp_path}/axis.safetensors --compare '
        "--model m"]
    assert lines[-4] == f"  jaxpersona report {tmp_path}"
    (other,) = [x for x in summary(run(pca=pca), tmp_path, 0) if x.startswith("|cos")]
    assert other == ("|cos(PC1, axis)| at layer 0: 0.100; PC1 explains 30% of the role vectors' "
                     "variance")
    flat = run(projections=dict.fromkeys(("default", "near", "far"), np.full((2, 2), 8.0)))
    assert distances(flat, 1)["near"] == pytest.approx(-2e12)
