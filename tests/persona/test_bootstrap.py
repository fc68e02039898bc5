"""Bootstrap intervals of the principal components: coverage, scale, and what they depend on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

import jaxpersona as jp
from jaxpersona.persona import bootstrap
from jaxpersona.persona.axis import analyse
from jaxpersona.persona.bootstrap import averaged_rows, pca_intervals
from jaxpersona.runs.sums import Sample


def given(roles=6, layers=3, width=10, stored=8, seed=0, noise=1.0):
    """Response means of roles on a line, by name, [stored, layers, width]."""
    rng = np.random.default_rng(seed)
    line = rng.normal(size=(layers, width))
    places = {f"r{i}": (i - roles / 2) * line for i in range(roles)} | {"default": roles * line}
    return {name: (place + noise * rng.normal(size=(stored, layers, width))).astype(np.float32)
            for name, place in places.items()}


def intervals(means, sizes=None, **more):
    vectors = {name: one.mean(0) for name, one in means.items()}
    stored = {name: len(one) for name, one in means.items()}
    return pca_intervals(vectors.pop("default"), vectors, stored, sizes or stored,
                         lambda name, at: means[name][:, at], **more)


def test_the_values_are_those_of_the_analysis():
    """The estimate comes from the Gram matrix, the analysis from the vectors."""
    rng = np.random.default_rng(0)
    vectors, default = rng.normal(size=(7, 1, 20)) + 300.0, rng.normal(size=(1, 20)) + 300.0
    wanted = analyse(default, {f"r{i}": one for i, one in enumerate(vectors)})
    every = np.concatenate([vectors[:, 0], default]) - vectors[:, 0].mean(0)
    cos, variance, leading = bootstrap._measured(every[None], 6, None)
    assert cos[0] == pytest.approx(wanted.cos_pc1[0], abs=1e-6)
    pca = PCA(svd_solver="full").fit(vectors[:, 0])
    assert variance[0] == pytest.approx(pca.explained_variance_ratio_[:6].cumsum(), abs=1e-9)
    again, same, _ = bootstrap._measured(every[None].astype(np.float32), 6, leading)
    assert again[0] == pytest.approx(cos[0], abs=1e-5) and same[0] == pytest.approx(variance[0],
                                                                                    abs=1e-5)


@pytest.mark.parametrize("noise", [0.1, 1.0])
def test_leading_components_of_many_roles_are_accurate(noise):
    """They come from a Krylov space of the components of the run, as the bootstrap moves them."""
    rng = np.random.default_rng(0)
    every = rng.normal(size=(161, 8)) @ rng.normal(size=(8, 200)) + rng.normal(size=(161, 200))
    _, _, leading = bootstrap._measured(every[None], 10, None)
    assert leading.shape == (160, 14)
    moved = every + noise * rng.normal(size=(3, *every.shape))
    exact, found = (bootstrap._measured(moved, 10, one) for one in (None, leading))
    assert found[0] == pytest.approx(exact[0], abs=1e-6)
    assert found[1] == pytest.approx(exact[1], rel=2e-4)
    assert found[1][:, :8] == pytest.approx(exact[1][:, :8], rel=1e-6)


def test_a_displacement_has_the_variance_of_a_mean_of_all_replies():
    x = np.random.default_rng(0).normal(size=(5, 1000))
    for size in (5, 40):
        moves = bootstrap._weights("ghost", 5, size, 4000, 0) @ (x - x.mean(0))
        assert moves.mean(0) == pytest.approx(0.0, abs=0.1)
        assert moves.var(0).mean() == pytest.approx(x.var(0, ddof=1).mean() / size, rel=0.03)


def coverage(runs, *, roles, width, replies, stored, noise, draws=200):
    """The share of runs whose intervals contain the values of the true means, and their width.

    Returns:
      [4]: for |cos(PC1, axis)|, and for the explained variance of 1, 2 and 3 components; and [4],
      the mean width, relative to 2 · 1.96 standard deviations of the values over the runs.
    """
    rng = np.random.default_rng(0)
    places = rng.normal(size=(roles, 1)) * 9 * rng.normal(size=(1, width)) / np.sqrt(width)
    true = places + 0.5 * rng.normal(size=(roles, width))
    first = np.linalg.svd(true - true.mean(0))[2][0]
    default = true.mean(0) + rng.normal(size=width) + 8 * first
    scale = noise * np.linspace(0.3, 1.5, width)  # the covariance of replies, the same for all
    every = np.concatenate([true, default[None]])
    cos, variance, _ = bootstrap._measured((every - true.mean(0))[None], 3, None)
    wanted, inside, values, widths = np.r_[cos, variance[0]], np.zeros(4), [], []
    names = [f"r{i}" for i in range(roles)] + ["default"]
    for run in range(runs):
        drawn = every[:, None] + scale * rng.normal(size=(roles + 1, replies, width))
        vectors = {name: one.mean(0)[None] for name, one in zip(names, drawn, strict=True)}
        kept = {name: one[: stored if name != "default" else replies, None]
                for name, one in zip(names, drawn, strict=True)}
        found = pca_intervals(
            vectors.pop("default"), vectors, {name: len(one) for name, one in kept.items()},
            dict.fromkeys(names, replies), lambda name, _, kept=kept: kept[name], draws=draws,
            seed=run)
        ends = np.concatenate([found.cos, found.variance[:, 0, :3]], axis=1)
        inside += (ends[0] <= wanted) & (wanted <= ends[1])
        widths.append(ends[1] - ends[0])
        means = drawn.mean(1)
        cos, variance, _ = bootstrap._measured((means - means[:-1].mean(0))[None], 3, None)
        values.append(np.r_[cos, variance[0]])
    return inside / runs, np.mean(widths, 0) / (3.92 * np.std(values, 0))


def test_the_intervals_cover_the_true_values():
    """Of 95 % intervals of 150 runs, 135 or fewer cover the value with a probability of 1 %."""
    found, width = coverage(150, roles=10, width=16, replies=60, stored=16, noise=1.0, draws=100)
    assert (found >= 0.9).all() and found[0] <= 0.99, found
    assert ((width > 0.8) & (width < 1.5)).all(), width


@pytest.mark.slow
@pytest.mark.parametrize("about", [
    dict(roles=12, width=24, replies=60, stored=16, noise=1.0),
    dict(roles=12, width=24, replies=60, stored=16, noise=3.0),
    dict(roles=40, width=64, replies=200, stored=16, noise=3.0),
    dict(roles=12, width=24, replies=16, stored=16, noise=1.0)])
def test_the_intervals_cover_the_true_values_in_several_settings(about):
    """Also if a third of the variance is noise; the intervals are then wider than needed."""
    found, width = coverage(100, **about)
    assert (found >= 0.87).all(), found
    assert ((width > 0.8) & (width < 3)).all(), width


def test_a_seed_gives_the_same_bits_for_all_groups_and_orders(monkeypatch):
    means = given()
    found = intervals(means)
    again = intervals(dict(reversed(means.items())))
    assert (again.cos == found.cos).all() and (again.variance == found.variance).all()
    steps = []
    monkeypatch.setattr(bootstrap, "_BYTES", 1)  # one layer, and one draw at a time
    single = intervals(means, report=lambda *done: steps.append(done))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert single.cos == pytest.approx(found.cos, abs=1e-6)
    assert single.variance == pytest.approx(found.variance, abs=1e-6)
    assert (intervals(means, seed=1).cos != found.cos).any()


def test_intervals_are_ordered_and_narrow_with_more_replies():
    means = given(noise=2.0)
    few, many = intervals(means), intervals(means, dict.fromkeys(means, 800))
    for found in (few, many):
        assert (found.cos[0] <= found.cos[1]).all() and found.variance.shape == (2, 3, 5)
        assert ((0 <= found.variance) & (found.variance <= 1)).all()
        assert (np.diff(found.variance[1], axis=-1) >= -1e-12).all()
    width = [found.variance[1, :, 0] - found.variance[0, :, 0] for found in (few, many)]
    assert (width[1] < 0.2 * width[0]).all()


def test_a_role_with_one_mean_does_not_move_and_is_named():
    means = given()
    means["r2"] = means["r2"][:1]
    found = intervals(means)
    assert found.fixed == ("r2",) and np.isfinite(found.cos).all()
    vectors = {name: one.mean(0) for name, one in means.items()}
    default = vectors.pop("default")
    none = dict.fromkeys(means, 0)
    assert pca_intervals(default, vectors, none, none, lambda *_: None) is None
    one = pca_intervals(default, vectors, none | {"default": 8}, none | {"default": 8},
                        lambda name, at: means[name][:, at])
    assert len(one.fixed) == 6  # only the axis moves: the explained variance is known
    assert (one.cos[0] < one.cos[1]).all()
    assert one.variance[0] == pytest.approx(one.variance[1], abs=1e-6)


def test_equal_vectors_have_no_interval():
    means = dict.fromkeys(("r0", "r1", "default"), np.ones((4, 2, 6), np.float32))
    found = intervals(means)
    assert np.isnan(found.cos).all() and np.isnan(found.variance).all()


def test_only_replies_that_the_vector_averages_are_used():
    values = np.zeros((4, 1, 2), np.float32)
    values[2] = np.nan
    sample = Sample(["a", "b", "c", "d"], np.zeros((1, 2), np.float32), values)
    assert averaged_rows(sample, None) == [0, 1, 3]
    assert averaged_rows(sample, {"a": 3, "b": 2, "c": 3}) == [0]


@pytest.mark.parametrize(("change", "wanted"), [
    (dict(roles={}), "roles has 0 entries; PCA needs at least two roles"),
    (dict(draws=0), "draws is 0; give a positive integer"),
    (dict(stored={}), "stored has no entry for 'a'; give one number per role"),
    (dict(sizes={"a": 1, "b": 1}), "sizes has no entry for 'default'")])
def test_wrong_arguments_are_refused_in_one_line(change, wanted):
    ones, counts = np.ones((1, 2)), {"a": 2, "b": 2, "default": 2}
    arguments = dict(default=ones, roles={"a": ones, "b": ones}, stored=counts, sizes=counts,
                     means=lambda *_: np.ones((2, 1, 2)))
    with pytest.raises(jp.UserError, match=wanted):
        pca_intervals(**arguments | change)
