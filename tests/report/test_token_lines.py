"""How the figure of a text breaks its tokens into lines, and names the messages."""

from __future__ import annotations

import numpy as np

from jaxpersona.models.batch import ASSISTANT, SYSTEM, USER
from jaxpersona.report import tokens
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
