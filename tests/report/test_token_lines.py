"""How the figure of a text breaks its tokens into lines, names the messages, and is coloured."""

from __future__ import annotations

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.models.batch import ASSISTANT, SYSTEM, USER
from jaxpersona.report import style, tokens
from jaxpersona.text.chat import Row


def test_lines_of_tokens_break_at_messages_newlines_and_the_last_column():
    starts = [True, False, True, False, False, False]
    assert tokens._wrapped(["a↵", "b", "c", "d" * 86, "e", "ff"], starts) == [
        (0, 0), (1, 0), (2, 0), (2, 1), (2, 87), (3, 0)]
    assert tokens._wrapped(["a" * 200, "b"], [True, False]) == [(0, 0), (1, 0)]
    assert (tokens._cells("a世e\u0301"), tokens._piece("a\n\tb\x1b"), tokens._piece("")) == (
        4, "a↵⇥b\\x1b", "∅")
    kind = np.array([0, SYSTEM, 0, USER, 0, ASSISTANT, 0])
    turn = np.array([0, 0, 1, 1, 2, 2, 2])
    row = Row(np.zeros(7, np.int32), kind, turn, "")
    asked = Row(np.zeros(5, np.int32), kind[:5], turn[:5], "")
    roles = [(0, "system")] * 2 + [(1, "user")] * 2
    assert tokens._messages(row, 7) == roles + [(2, "assistant")] * 3
    # a reply continues the message that the prompt opens, or is a new one
    assert tokens._messages(asked, 7) == roles + [(2, "assistant")] * 3
    bare = Row(np.zeros(4, np.int32), kind[:4], turn[:4], "")
    assert tokens._messages(bare, 6) == roles + [(2, "assistant")] * 2


def test_the_colours_reach_the_farther_percentile_and_the_default_persona_s_quartiles():
    """Without an axis, the second or the 98th percentile, whichever is farther from the centre."""
    model, axis = jp.load("mini"), jp.load_axis("mini")
    row = Row(np.arange(40, 61, dtype=np.int32), np.full(21, USER), np.zeros(21, np.int32), "")
    values = np.tile(np.linspace(-1, 1, 21)[:, None], (8, 1, 1))
    found = jp.Extracted({"projections": [values]}, (), [row], 21, 0, np.zeros(1, bool))

    def limits(**more):
        bar = jp.plot.projections(found, model, layer=4, **more).figure.axes[-1]
        return bar.get_xlim(), [line.get_xdata() for line in bar.lines]

    with style.without_pyplot():
        for centre, ends in ((None, (-0.96, 0.96)), (0.5, (-0.96, 1.96)), (-0.5, (-1.96, 0.96))):
            assert limits(centre=centre) == (pytest.approx(ends), [])
        low, high = (float(axis.thresholds(name, of="default")[4]) for name in ("p25", "p75"))
        assert high > 2  # beyond the projections of the tokens
        ends, (mark,) = limits(axis=axis)
        assert ends == pytest.approx((-high, high)) and list(mark) == [low, high]
