"""The bands of the values by layer on the page of a run."""

from __future__ import annotations

import numpy as np
import pytest
import support as s
from made_runs import make, parse

import jaxpersona as jp
from jaxpersona.persona.bootstrap import averaged_rows, pca_intervals
from jaxpersona.report.run_bars import intervals
from jaxpersona.report.run_read import read
from jaxpersona.runs.run import Run

NAMES = ["ghost", "baker", "sage", "seer"]


def mean(role, key):
    """The mean of a reply: the role's place on a line, and noise."""
    rng = np.random.default_rng([len(role), *map(ord, role + key)])
    place = 3.0 if role == "default" else NAMES.index(role)
    return place * np.linspace(1, 2, 32) * [[1.0], [2.0], [3.0]] + rng.normal(0, 1, (3, 32))


def text(role, key):
    return f"{role} {key}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 24 replies per role, 6 of which have stored means; every fourth has score 2."""
    score = s.Scored(lambda role, key: 2 if key.endswith(("3", "7")) else 3)
    return make(tmp_path_factory.mktemp("bars") / "run", NAMES, mean, text, questions=24,
                judge=score, keep_means=6)


def test_the_bands_are_the_intervals_of_the_stored_response_means(run):
    found = read(run)
    steps = []
    bars = intervals(found, lambda *step: steps.append(step))
    assert steps == [("intervals", i, 3, 0) for i in (1, 2, 3)] and bars.fixed == ()
    of = Run.read(run)
    samples = {name: of.sample(name) for name in [*NAMES, "default"]}
    means = {name: sample.means[averaged_rows(sample, of.scores(name))]
             for name, sample in samples.items()}
    assert len(means["default"]) == 24 and all(2 <= len(means[name]) <= 6 for name in NAMES)
    sizes = {name: len(one) if name == "default" else sum(
        score == 3 for score in of.scores(name).values()) for name, one in means.items()}
    assert set(sizes.values()) == {24, 19}  # five of 24 keys end in 3 or 7
    vectors = {name: of.vectors(name)["pos_3"] for name in NAMES}
    wanted = pca_intervals(of.vectors("default")["mean"], vectors,
                           {name: len(one) for name, one in means.items()}, sizes,
                           lambda name, at: means[name][:, at])
    assert (bars.cos == wanted.cos).all() and (bars.variance == wanted.variance).all()
    page = parse(jp.report.page(run))
    shown = page.data["byLayer"]["bars"]
    assert shown["cos"]["low"] == pytest.approx(bars.cos[0].tolist(), rel=1e-4)
    for n, place in (("1", 0), ("2", 1), ("3", 2), ("10", 2)):  # there are three components
        assert shown["variance"][n]["high"] == pytest.approx(
            bars.variance[1, :, place].tolist(), rel=1e-4)
    low, high = bars.cos[:, 1]
    assert f"(95 % interval {low:.3f} to {high:.3f})" in page.text
    assert page.text.count("Band: 95 % bootstrap interval over the replies.") == 2
    # the band of a quantity that the run measures is around it, up to the correction for noise
    assert (np.abs(bars.cos.mean(0) - page.data["byLayer"]["cos"]) < 0.1).all()


def test_the_summary_has_the_intervals_of_the_middle_layer(run, tmp_path):
    from unittest import mock

    from jaxpersona.persona.extract import extract_axis
    from jaxpersona.persona.summary import summary

    kept = []
    with mock.patch("jaxpersona.persona.extract.save_analysis",
                    lambda folder, found, held_out: kept.append(found)):
        make(tmp_path / "run", NAMES, mean, text, questions=24, keep_means=6)
    found = kept[0]
    assert extract_axis and found.pca.cos.shape == (2, 1)
    (low, high), share = found.pca.cos[:, 0], found.pca.variance[:, 0, 0]
    lines = "\n".join(summary(found, tmp_path, 1))
    assert (f"|cos(PC1, axis)| at layer 1: {found.analysis.cos_pc1[1]:.3f} (95 % interval "
            f"{low:.3f} to {high:.3f}); PC1 explains") in lines
    assert f" ({share[0]:.0%} to {share[1]:.0%}) of the role vectors' variance" in lines
    assert "interval" not in "\n".join(summary(found, tmp_path, 0))


def test_roles_without_two_stored_means_are_named(tmp_path):
    """Of two stored means per role, those of `sage` have score 2."""
    folder = make(tmp_path / "run", NAMES, mean, text, questions=6, keep_means=2)
    of = Run.read(folder)
    stored = set(of.sample("sage").keys)
    score = s.Scored(lambda role, key: 2 if role == "sage" and key in stored else 3)
    other = make(tmp_path / "other", NAMES, mean, text, questions=6, keep_means=2, judge=score)
    assert set(Run.read(other).sample("sage").keys) == stored
    page = parse(jp.report.page(other))
    assert "fewer than two stored replies with score 3: sage" in page.text
    assert page.data["byLayer"]["bars"] is not None


def test_a_page_without_stored_means_of_score_3_has_no_bands(tmp_path):
    found = read(make(tmp_path / "run", NAMES, mean, text, questions=6, keep_means=2))
    found.stored = {name: [] for name in found.stored}
    assert intervals(found) is None
    found.stored = {name: ["pos_p0_q99"] * 2 for name in found.stored}
    with pytest.raises(jp.UserError, match="the run changed while its page was being written"):
        intervals(found)
    found.stored = {}
    assert intervals(found) is None
