"""The timed sample of `generate`: lengths of replies that are cut short, and the time of a run."""

from __future__ import annotations

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.engine.pace import Pace, measure, occupancy, survival
from jaxpersona.interventions.where import response

SETTINGS = {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "seed": 0, "batch_size": 4}


def pace(finished, unfinished=(), waiting=0, seconds=10.0, limit=100, rows=2):
    return Pace(np.array(finished, int), np.array(unfinished, int), waiting, np.array([5]), seconds,
                1.0, limit, rows)


def test_survival_equals_kaplan_meier_by_hand():
    """One of four ends at 2; one is cut at 3; of the two others one ends at 5."""
    at, alive = survival(np.array([2, 5]), np.array([3, 7]), 10)
    assert at.tolist() == [0, 2, 5, 10]
    np.testing.assert_allclose(alive, [1, 3 / 4, 3 / 4 * 1 / 2])
    # 2 · 1 + 3 · 3/4 + 5 · 3/8
    assert pace([2, 5], [3, 7], limit=10).mean_length() == pytest.approx(2 + 2.25 + 1.875)


def test_a_reply_that_is_cut_where_another_ends_was_still_at_risk_there():
    """As Kaplan and Meier count: of four replies one ends at 3; of the two left, one ends at 5."""
    at, alive = survival(np.array([3, 5]), np.array([3, 6]), 10)
    assert at.tolist() == [0, 3, 5, 10]
    np.testing.assert_allclose(alive, [1, 3 / 4, 3 / 4 * 1 / 2])


def test_mean_length_of_whole_and_of_no_replies():
    assert pace([4, 6, 11]).mean_length() == pytest.approx(7)
    assert pace([100, 100]).mean_length() == 100
    assert pace([], [3, 3], 5).mean_length() == 100  # an upper bound


def test_occupancy_is_the_busy_share_of_a_schedule():
    """Rows end at 3 and at 1 + 1 + 2 = 4: 7 of 8 row-steps are busy."""
    assert occupancy([3, 1, 1, 2], 2) == pytest.approx(7 / 8)
    assert occupancy([5], 4) == pytest.approx(1 / 4)


def test_the_time_of_a_run():
    whole = pace([4, 6, 10])
    assert whole.complete and whole.seconds_for(300, 256) == pytest.approx(1000)
    # 20 tokens in 10 s; 256 replies of 100 tokens fill two rows evenly: no loss at the end
    cut = pace([], [10, 10], 50)
    assert not cut.complete and cut.seconds_for(512, 256) == pytest.approx(512 * 100 / 2)
    # with 256 rows of which one call fills 3, the other 253 are idle
    few = pace([], [10, 10], 50, rows=256)
    assert few.seconds_for(3, 256) == pytest.approx(3 * 100 / 2 * 256 / 3)
    # half of the replies have 1 token, half 3: on one row the mean counts alone
    half = pace([1, 3, 1, 3], [2, 2], 1, seconds=12.0, rows=1)
    assert half.seconds_for(40, 4) == pytest.approx(40 * half.mean_length() * 12 / 12)
    assert pace([], [], 3).seconds_for(10, 4) == np.inf


def test_a_sample_runs_the_programs_and_draws_of_generate():
    model = s.tiny_model()
    talks = s.prompts([5, 9, 40, 7, 6, 11, 3])  # two widths
    ids, read = [7, 6, 5, 4, 3, 2, 1], jp.capture.mean(response)
    out = jp.generate(model, talks, ids=ids, capture=read, **SETTINGS)
    found = measure(model, talks, seconds=600, capture=read, ids=ids, **SETTINGS)
    lengths = [t.size + stop for t, stop in zip(out.tokens, out.stopped, strict=True)]
    assert found.complete and sorted(found.finished) == sorted(lengths)
    assert found.tokens == sum(lengths) and found.prompts.tolist() == [5, 9, 40, 7, 6, 11, 3]
    assert found.mean_length() == pytest.approx(np.mean(lengths))
    assert (found.limit, found.rows) == (8, 4) and found.seconds > 0 < found.compile_seconds
    cut = measure(model, talks, seconds=1e-9, capture=read, ids=ids, **SETTINGS)
    assert cut.waiting and cut.unfinished.size and not cut.complete
    assert cut.finished.size + cut.unfinished.size + cut.waiting == len(talks)
    assert cut.unfinished.max() <= 2  # one step after the prompt


@pytest.mark.parametrize(("unfinished", "waiting", "complete"), [
    ((), 0, True), ((3,), 0, False), ((), 1, False), ((3, 4), 2, False)])
def test_a_sample_is_complete_without_unfinished_and_waiting_replies(unfinished, waiting, complete):
    """Either kind alone makes the sample incomplete."""
    found = pace([4, 6], unfinished, waiting)
    assert found.complete is complete and found.tokens == 10 + sum(unfinished)


def test_the_time_of_more_replies_than_a_call_has_is_that_of_full_calls():
    """A call has at most `per_call` replies, and the idle rows at its end count."""
    found = pace([], [5, 5], 9, seconds=4.0, limit=10, rows=4)
    # 10 tokens in 4 s; a call of 2 replies of 10 tokens keeps 2 of 4 rows busy
    assert found.seconds_for(6, 2) == pytest.approx(6 * 10 * 4 / 10 / 0.5)
    assert found.seconds_for(6, 4) == pytest.approx(6 * 10 * 4 / 10)
    assert found.seconds_for(1, 4) == pytest.approx(1 * 10 * 4 / 10 / 0.25)
