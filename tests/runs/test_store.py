"""Sums and samples against the store of all response means: axis, vectors, PCA and thresholds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.persona import axis as science
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.thresholds import percentiles_of, weighted
from jaxpersona.runs import live
from jaxpersona.runs.rollouts import Settings, keys_of
from jaxpersona.runs.run import Run
from jaxpersona.runs.sample import chosen
from jaxpersona.runs.sums import Sums, sampled

NAMES = ("ghost", "pirate", "tutor", "sage")
ROLES = [Role("default", ("", "You are an AI."), "")] + [
    Role(name, (f"You are a {name}.", f"Act as a {name}."), "") for name in NAMES]
QUESTIONS = [Question(i, f"Why {i}?") for i in range(12)]
SETTINGS = Settings(temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8)
MODEL = dataclasses.replace(s.tiny_model(vocab_size=258, stop_ids=(257, 65, 66, 67)),
                            tokenizer=s.byte_tokenizer())
SCORE = {"ghost": lambda key: 3, "pirate": lambda key: 2 if "_q1" in key else 3,
         "tutor": lambda key: None if key.endswith("q5") else 3,
         "sage": lambda key: 0 if "_p0_" in key else 3}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return an extraction, its run, and all means that were read, by role and key."""
    folder = tmp_path_factory.mktemp("store") / "run"
    means: dict = {}
    add = live.Live.add

    def kept(self, record, mean):
        means.setdefault(self._head["role"], {})[live.rollout_key(record)] = np.array(mean)
        add(self, record, mean)

    live.Live.add = kept
    try:
        found = extract_axis(MODEL, ROLES, QUESTIONS, folder, settings=SETTINGS, min_count=2,
                             judge=s.Scored(lambda role, key: SCORE[role](key)), keep_means=6)
    finally:
        live.Live.add = add
    order = {role.name: keys_of(role, QUESTIONS, SETTINGS) for role in ROLES}
    store = {name: np.stack([means[name][key] for key in keys]) for name, keys in order.items()}
    return found, Run.read(folder), store, order


def test_axis_vectors_and_pca_from_sums_are_those_of_all_means(both):
    found, run, store, order = both
    vectors = {}
    for name in NAMES:
        scores = [SCORE[name](key) for key in order[name]]
        expected = science.role_vectors(store[name], scores)
        own = run.vectors(name)
        assert set(own) == set(expected)
        for label, (vector, _) in expected.items():
            assert s.relative(own[label], vector) <= 1e-6, (name, label)
        vectors[name] = expected["pos_3"][0]
    default = science.role_vectors(store["default"], [None] * len(order["default"]))["mean"][0]
    assert s.relative(found.default, default) <= 1e-6
    analysis = science.analyse(default, vectors)
    assert s.relative(found.axis.values, analysis.axis) <= 1e-6
    np.testing.assert_allclose(found.analysis.cos_pc1, analysis.cos_pc1, atol=1e-6)
    for one, two in zip(found.analysis.components, analysis.components, strict=True):
        np.testing.assert_allclose(one.ratio, two.ratio, atol=1e-6)
        np.testing.assert_allclose(one.coordinates[:, :2], two.coordinates[:, :2], atol=1e-5)


def test_mean_projections_are_exact_and_the_sample_s_are_of_its_means(both):
    found, run, store, order = both
    for name in ("default", *NAMES):
        exact = science.project(store[name], found.axis.values)
        np.testing.assert_allclose(found.mean_projection(name), np.nanmean(exact, 0), atol=2e-5)
        sample = run.sample(name)
        assert len(sample) == (24 if name == "default" else 6) and found.sizes[name] == 24
        rows = [order[name].index(key) for key in sample.keys]
        # the differences have 8 bits, so the error is small beside the spread of the replies
        spread = np.nanstd(store[name], 0).max()
        np.testing.assert_allclose(sample.means, store[name][rows], atol=spread * 2**-6)


def test_thresholds_of_all_means_lie_in_the_intervals_of_the_sample(both):
    found, _, store, _ = both
    for of, names in (("default", ["default"]), ("all", ["default", *NAMES])):
        pooled = np.concatenate([science.project(store[n], found.axis.values) for n in names])
        exact = science.percentiles(pooled, (25, 50, 75))
        for name, value in exact.items():
            low, high = found.intervals[of][name]
            assert (low <= found.axis.percentiles[of][name]).all()
            assert (found.axis.percentiles[of][name] <= high).all()
            assert (low - 0.02 <= value).all() and (value <= high + 0.02).all(), (of, name)


def test_weighted_percentiles_of_equal_weights_are_numpy_s():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(37, 4)).astype(np.float32)
    np.testing.assert_allclose(weighted(values, np.ones(37), (1, 25, 50, 99)),
                               np.percentile(values, (1, 25, 50, 99), axis=0), rtol=1e-6)
    times = rng.integers(0, 5, 37)
    np.testing.assert_allclose(
        weighted(values, times, (5, 50, 90)),
        np.percentile(np.repeat(values, times, 0), (5, 50, 90), axis=0), rtol=1e-6)
    np.testing.assert_allclose(weighted(values[:1], np.array([75.0]), (1, 50)),
                               np.repeat(values[:1], 2, 0))


def test_a_projection_counts_for_all_rollouts_of_its_role():
    """Both replies of a, and one for the three non-empty ones of b; the empty one is ignored."""
    kept = {"a": np.array([[0.0, 5.0], [1.0, 4.0]]), "c": np.full((2, 2), np.nan),
            "b": np.array([[10.0, 2.0], [np.nan, np.nan]])}
    found, between = percentiles_of(kept, {"a": 2, "b": 3, "c": 0}, at=(25, 50, 90), draws=20)
    whole = np.array([[0, 5], [1, 4], [10, 2], [10, 2], [10, 2]])
    for q in (25, 50, 90):
        np.testing.assert_allclose(found[f"p{q}"], np.percentile(whole, q, axis=0))
    assert found["p25"].dtype == between["p25"][0].dtype == np.float32
    same, _ = percentiles_of({"a": kept["a"]}, {"a": 1}, at=(50,))  # never less than is stored
    np.testing.assert_allclose(same["p50"], [0.5, 4.5])
    with pytest.raises(ValueError, match="all replies are empty"):
        percentiles_of({"c": kept["c"]}, {"c": 2})


def test_intervals_cover_the_percentile_of_the_population():
    """With 16 of 200 replies of 10 roles, an interval of 95 % covers in about 95 % of draws."""
    rng = np.random.default_rng(1)
    covered, wider = [], []
    for _ in range(60):
        population = {f"r{i}": rng.normal(i / 3, 1.0, (200, 1)) for i in range(10)}
        exact = np.percentile(np.concatenate(list(population.values())), (25, 50), axis=0)
        kept = {name: value[rng.permutation(200)[:16]] for name, value in population.items()}
        found, between = percentiles_of(kept, dict.fromkeys(kept, 200), at=(25, 50), draws=150)
        for i, name in enumerate(("p25", "p50")):
            low, high = between[name]
            covered.append(low[0] <= exact[i, 0] <= high[0])
            wider.append((high - low)[0])
            assert low[0] <= found[name][0] <= high[0]
    assert 0.88 <= np.mean(covered) <= 1.0 and np.mean(wider) < 1.0


def test_a_sample_is_stratified_seeded_and_contained_in_larger_ones():
    prompts = {f"p{p}_q{q}": p for q in range(30) for p in range(5)}
    kept = chosen(prompts, 16, seed=0, role="ghost")
    each = [sum(prompts[key] == p for key in kept) for p in range(5)]
    assert sorted(each) == [3, 3, 3, 3, 4] and kept == [key for key in prompts if key in kept]
    shuffled = dict(sorted(prompts.items(), key=lambda item: hash(item)))
    assert set(chosen(shuffled, 16, seed=0, role="ghost")) == set(kept)
    assert set(chosen(prompts, 16, seed=1, role="ghost")) != set(kept)
    assert set(chosen(prompts, 16, seed=0, role="tutor")) != set(kept)
    first = {key: p for key, p in prompts.items() if int(key.split("q")[1]) < 12}
    before = set(chosen(first, 16, seed=0, role="ghost"))
    assert {key for key in kept if key in first} <= before
    assert chosen(prompts, None, seed=0, role="ghost") == list(prompts)
    assert chosen(first, 100, seed=0, role="ghost") == list(first)


def test_large_constant_channels_cost_no_precision():
    """A channel of 8,000 with differences of 1, as in a residual stream, keeps the differences."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(20, 2, 4)).astype(np.float32)
    means[..., 1] += 8000
    keys = [str(i) for i in range(20)]
    kept = sampled(keys, None, lambda key: means[int(key)], (2, 4))
    np.testing.assert_allclose(kept.means, means, atol=0.03)
    more = sampled(["3", "x", "5"], kept, lambda key: None if key == "x" else 1 / 0, (2, 4))
    assert more.keys == ["3", "5"]
    np.testing.assert_array_equal(more.means, kept.means[[3, 5]])
    means[2], means[3, 0, 0] = np.nan, np.inf
    some = sampled(["0", "1", "2", "x"], None, lambda key: None if key == "x" else means[int(key)],
                   (2, 4))
    np.testing.assert_allclose(some.base, means[:2].mean(0), rtol=1e-6)  # without the empty reply
    assert some.keys == ["0", "1", "2"] and np.isnan(some.means[2]).all()
    assert not sampled([], None, means.__getitem__, (2, 4)).base.any()


def test_sums_by_score():
    means = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    sums = Sums({}, {})
    for key, score, mean in zip("abcd", (3, None, 3, 2), means, strict=True):
        sums.add(key, score, mean)
    sums.add("e", 3, np.full((2, 3), np.nan, np.float32))
    assert sums.groups == {"a": "3", "b": "none", "c": "3", "d": "2", "e": "empty"}
    found = sums.vectors({3: "pos_3", 2: "pos_2", 1: "pos_1"})
    assert {label: count for label, (_, count) in found.items()} == {
        "mean": 4, "pos_3": 2, "pos_2": 1}
    np.testing.assert_allclose(found["pos_3"][0], means[[0, 2]].mean(0))
    np.testing.assert_allclose(found["mean"][0], means.mean(0))
    assert sums.agrees({"a": 3, "b": None, "c": 3, "d": 2, "e": 0})
    assert not sums.agrees({"a": 3, "b": None, "c": 2, "d": 2, "e": 0})
    assert not sums.agrees({"a": 3, "b": 0, "c": 3, "d": 2, "e": 0})
    assert not sums.agrees({"a": 3, "b": None, "c": 3, "d": 2})  # a rollout that is unknown
    assert sums.agrees({"a": 3, "b": None, "c": 3, "d": 2, "e": None, "more": 1})
    again = Sums.read(*sums.stored())
    assert again.groups == sums.groups and again.count("empty") == 1
    assert Sums({}, {"e": "empty"}).vectors({3: "pos_3"}) == {}
    for wrong in (np.inf, np.nan):
        with pytest.raises(ValueError, match="rollout f has non-finite values"):
            sums.add("f", 3, np.array([[wrong, 0, 0], [0, 0, 0]], np.float32))
    assert "f" not in sums.groups


def test_an_interval_has_95_percent_of_the_draws_within_each_role():
    """In 1 of 27 draws, all replies of a are the same one; the only reply of b is always drawn."""
    kept = {"a": np.array([[0.0, 0.0], [1.0, -1.0], [2.0, -2.0]]), "b": np.array([[-5.0, 5.0]])}
    _, between = percentiles_of(kept, {"a": 3, "b": 1}, at=(0, 100), draws=6000)
    assert {name: np.stack(ends).tolist() for name, ends in between.items()} == {
        "p0": [[-5, -2], [-5, 0]], "p100": [[0, 5], [2, 5]]}
