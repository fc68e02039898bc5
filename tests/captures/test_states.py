"""The states of readings: rows without a token, their warnings, and their sizes."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.captures.activations import LastState, MeanState
from jaxpersona.captures.missing import warn_of_empty
from jaxpersona.captures.projections import CountState, MomentState, ProjectionState
from jaxpersona.captures.reading import State, TokenState
from jaxpersona.models.batch import ASSISTANT, USER, batch

MEAN = MeanState(np.arange(12.0).reshape(1, 3, 4), np.array([2.0, 0.0, 1.0]))
TURNS = MeanState(np.ones((1, 3, 2, 4)), np.array([[1.0, 0.0], [0.0, 0.0], [2.0, 4.0]]))
LAST = LastState(np.ones((2, 3, 4)), np.array([0, -1, 5]))
MOMENTS = MomentState(np.array([4.0, 0.0, 1.0]), np.full((2, 3, 1), 7.0), np.full((2, 3, 1), 8.0))


@pytest.mark.parametrize(("state", "empty"), [
    (MEAN, [1]), (TURNS, [1]), (LAST, [1]), (MOMENTS, [1]),
    (TokenState(np.ones((2, 3, 5))), []), (CountState(np.zeros((2, 3, 1, 4), np.int32)), []),
    (ProjectionState(np.ones((2, 3, 1, 5))), []),
], ids=lambda x: type(x).__name__)
def test_rows_without_a_token_are_known(state, empty):
    """With turns, a row is empty only if every message is; values per token need no token."""
    found = np.asarray(state.empty)
    assert found.shape == (3,) and np.flatnonzero(found).tolist() == empty


@pytest.mark.parametrize(("state", "name"), [(MEAN, "mean"), (LAST, "last"), (MOMENTS, "moments")])
def test_the_value_of_a_state_warns_of_rows_without_a_token(state, name, caplog):
    """The warning has the name of the reading; `result` gives no warning."""
    found = state.value
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith(
        f"capture '{name}' selects no token in row 1 (1 of 3), so its value is NaN; ")
    assert jax.tree.leaves(found)[-1].shape[0] == 3
    caplog.clear()
    state.result()
    assert not caplog.records


def test_results_are_averages_by_row():
    """Sums are divided by each row's or message's number of tokens, and NaN without a token."""
    np.testing.assert_array_equal(MEAN.result()[:, 0], [[0, 0.5, 1, 1.5], [np.nan] * 4,
                                                        [8, 9, 10, 11]])
    np.testing.assert_array_equal(TURNS.result()[:, 0, :, 0], [[1, np.nan], [np.nan] * 2,
                                                               [0.5, 0.25]])
    found = MOMENTS.result()
    np.testing.assert_array_equal(found.variance[:, 0, 0], [2, np.nan, 8])
    np.testing.assert_array_equal(found.mean[:, 1, 0], [7, np.nan, 7])
    assert found.count.tolist() == [4, 0, 1]
    assert [type(x.result()) for x in (MEAN, LAST)] == [np.ndarray] * 2
    assert isinstance(jax.tree.map(jnp.asarray, LAST).result(), jax.Array)


def test_nothing_is_said_while_tracing_or_if_every_row_has_a_token(caplog):
    """JAX arrays are read like NumPy arrays."""
    warn_of_empty("x", np.zeros(3, bool))
    jax.jit(lambda empty: warn_of_empty("x", empty) or empty)(jnp.ones(3, bool))
    assert not caplog.records
    warn_of_empty("x", jnp.array([True, False, True]))
    assert "capture 'x' selects no token in rows 0, 2 (2 of 3)" in caplog.text


@pytest.mark.parametrize(("slots", "level"), [(78_125, "WARNING"), (78_124, "INFO")])
def test_a_capture_of_a_gigabyte_is_a_warning(slots, level, caplog):
    """4 bytes × 5 layers × 20 rows × slots × width 32: one gigabyte has 78,125 slots."""
    caplog.set_level(logging.INFO, "jaxpersona")
    (reading,) = s.READ.readings.values()
    jax.eval_shape(lambda: reading.init(5, 20, slots, 32))
    (record,) = caplog.records
    assert record.levelname == level and "takes 1 GB (layers: 5, rows: 20" in record.getMessage()


def test_the_last_token_is_the_one_at_the_highest_position():
    """Also where a later call has none, the token of an earlier call is kept."""
    (reading,) = capture.last("user").readings.values()
    rows = batch([[5, 6, 7], [8, 9, 4]], kind=[[USER, USER, ASSISTANT], [ASSISTANT] * 3])
    state = LastState(np.full((1, 2, 4), 3, np.float32), np.array([-1, 8], np.int32))

    @jax.jit
    def update(state, rows):
        weights = reading.weights(rows)
        return weights, reading.update(state, jnp.full((1, 2, 4), 9.0), weights, rows, None)

    weights, after = update(state, rows)
    assert weights.tolist() == [[0, 1, 0], [0, 0, 0]]
    assert after.position.tolist() == [1, 8] and after.latest[0, :, 0].tolist() == [9.0, 3.0]


def test_moments_of_two_calls_are_those_of_all_their_tokens():
    """Merged by counts: [1, 3] and [5], then nothing in the second row."""
    (reading,) = capture.moments(np.eye(4)[:1], "user").readings.values()
    kind = [[USER, USER, ASSISTANT], [USER, ASSISTANT, ASSISTANT]]

    @jax.jit
    def update(state, rows, h):
        weights = reading.weights(rows)
        parts = jax.tree.map(lambda x: x[None], reading.read(h, weights, 0))
        return reading.update(state, parts, weights, rows, None)

    state = jax.tree.map(np.asarray, reading.init(1, 2, 8, 4))
    for values, kinds in (([[1, 3, 9], [2, 9, 9]], kind), ([[5, 9, 9], [9, 9, 9]],
                                                          [kind[1], [ASSISTANT] * 3])):
        rows = batch([[5] * 3] * 2, kind=kinds)
        h = np.zeros((2, 3, 4), np.float32)
        h[..., 0] = values
        state = jax.tree.map(np.asarray, update(state, rows, h))
    found = state.result()
    assert found.count.tolist() == [3, 1]
    np.testing.assert_allclose(found.mean[:, 0, 0], [3, 2], rtol=1e-6)
    np.testing.assert_allclose(found.variance[:, 0, 0], [8 / 3, 0], rtol=1e-6, atol=1e-6)


def test_a_state_declares_a_value_for_its_base():
    """The base class has a label and no result of its own."""
    assert State.label == "capture" and not State.per_token and TokenState.per_token
    with pytest.raises(NotImplementedError):
        State().result()
