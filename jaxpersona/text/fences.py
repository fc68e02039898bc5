"""Fenced code, recognised token by token while a reply is being written.

A text of lines is in or out of a code block by an automaton over five kinds of character: a
backtick, a tilde, a newline, a blank, anything else. A token's text takes the automaton from one
state to another, so the whole of it is one table [V, states] that the decode loop looks up.

A fence is known at its third mark; a longer one closes at three marks too, and an opening line
with a second backtick further on (code within a line) counts as code up to there. Lists are not
followed: a fence behind a list's mark is text. A finished text is read by `template.fences`, which
sees whole lines.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

CODE_BIT = 0x80  # of a table's entry: some of the token's text is code
_LINE, _TEXT = 0, 4  # outside: at a line's start (1 to 3: after as many blanks), within a line
_INSIDE = 9  # states from here on are code


def _machine() -> dict[tuple[int, str], int]:
    """Build the automaton: (state, character) → state."""
    step: dict[tuple[int, str], int] = {}

    def line(start: int, text: int, marks: str, runs: dict[str, int],
             after: dict[str, int]) -> None:
        """A line's beginning: up to three blanks (start + 1 …), then a run of three marks."""
        for blanks in range(4):
            state = start + blanks
            step[state, " "] = state + 1 if blanks < 3 else text
            for c in "`~x":
                step[state, c] = runs[c] if c in marks else text
            step[state, "\n"] = start
        for c in marks:
            for length in range(2):
                state = runs[c] + length
                for d in "`~ x":
                    step[state, d] = text
                step[state, "\n"] = start
                step[state, c] = state + 1 if length == 0 else after[c]
        for c in "`~ x":
            step[text, c] = text
        step[text, "\n"] = start

    # outside 0…8; a backtick's opening line 9 (marks), 10 (what follows); a tilde's 11
    inside = {"`": 12, "~": 21}  # then 4 starts, 2 runs, 1 closing run, 1 blanks after it, 1 text
    line(_LINE, _TEXT, "`~", {"`": 5, "~": 7}, {"`": 9, "~": 11})
    for state in (9, 10, 11):
        for c in "`~ x":
            step[state, c] = 11 if state == 11 else 10
        step[state, "\n"] = inside["~" if state == 11 else "`"]
    step[9, "`"], step[10, "`"] = 9, _TEXT
    for mark, start in inside.items():
        closing, blanks, text = start + 6, start + 7, start + 8
        line(start, text, mark, {mark: start + 4}, {mark: closing})
        for state in (closing, blanks):
            for c in "`~ x":
                step[state, c] = text
            step[state, " "], step[state, "\n"] = blanks, _LINE
        step[closing, mark] = closing
    return step


_STEP = _machine()
STATES = 1 + max(state for state, _ in _STEP)


@functools.lru_cache(maxsize=1 << 16)
def _walk(text: str) -> np.ndarray:
    """Return where a reduced text leads from every state, [states] uint8, with its `CODE_BIT`."""
    out = np.zeros(STATES, np.uint8)
    for begin in range(STATES):
        state, code = begin, False
        for c in text:
            state = _STEP[state, c]
            code |= state >= _INSIDE
        out[begin] = state | CODE_BIT * code
    out.flags.writeable = False  # it is shared by all who ask
    return out


def _reduced(text: str) -> str:
    """Keep of a text what the automaton can tell apart."""
    # a carriage return before a newline is no more than a blank at a line's end
    text = re.sub(r"[^`~\n ]+", "x", text.replace("\t", "    ").replace("\r", " "))
    return re.sub(r"(.)\1{4,}", r"\1\1\1\1", text, flags=re.DOTALL)


def _written(token: str) -> str:
    """Put white space for its stand-ins in byte-level and in sentencepiece vocabularies."""
    for marks, text in (("[Ġ▁]", " "), ("Ċ|<0x0A>", "\n"), ("ĉ|<0x09>", "\t"), ("č|<0x0D>", "\r")):
        token = re.sub(marks, text, token)
    return token


def walk(texts: list[str]) -> np.ndarray:
    """Say which of a reply's tokens hold fenced code: [T] bool for T texts."""
    state, out = _LINE, []
    for text in texts:
        entry = int(_walk(_reduced(text))[state])
        out.append(bool(entry & CODE_BIT))
        state = entry & ~CODE_BIT
    return np.array(out, bool)


def table(tokenizer: Any, size: int) -> np.ndarray:
    """Return the automaton of a tokenizer's vocabulary, [size, states] uint8, read-only.

    An entry is the state that a token leads to from a state, with `CODE_BIT` where some of its text
    is code. The table is kept for the tokenizer as it is: with a token added it is made anew.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    known = tuple(sorted((number, str(token)) for number, token in added.items()))
    return _table(tokenizer, size, len(tokenizer), known)


@functools.lru_cache(maxsize=4)
def _table(tokenizer: Any, size: int, count: int, added: tuple[tuple[int, str], ...],
           ) -> np.ndarray:
    texts = (_written(token or "")
             for token in tokenizer.convert_ids_to_tokens(range(min(count, size))))
    rows = [_walk(_reduced(text)) for text in texts]
    made = np.stack([*rows, *[_walk("x")] * (size - len(rows))])
    made.flags.writeable = False
    return made
