"""Detect fenced code token by token during decoding.

A finite automaton over five character classes (backtick, tilde, newline, space, other) tracks
whether the text is inside a Markdown code block. Each token of the vocabulary maps a state to the
next state, so the decode loop only looks up values in a transition table [V, states].

Limitations: A fence is recognized at its third mark (backtick or tilde), so three marks also close
a longer fence. If an opening line contains another backtick (inline code), the text between the
opening marks and this backtick is labeled as code. Fences after list markers are not recognized.
For complete texts, `template.fences` parses whole lines instead.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

CODE_BIT = 0x80  # bit of a table value that is set if some of the token's text is code
_LINE, _TEXT = 0, 4  # states outside code; states 1 to 3 follow 1 to 3 spaces at a line start
_INSIDE = 9  # this state and all higher states are inside code


def _machine() -> dict[tuple[int, str], int]:
    """Return the transitions of the automaton: (state, character) → next state."""
    step: dict[tuple[int, str], int] = {}

    def line(start: int, text: int, marks: str, runs: dict[str, int],
             after: dict[str, int]) -> None:
        """Add the transitions of a line: up to three spaces, then text or a fence of three marks.

        Args:
          start: the state at the start of a line.
          text: the state within a line that is not a fence.
          marks: the fence characters that are recognized.
          runs: the state after one mark, by fence character.
          after: the state after three marks, by fence character.
        """
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

    # States 0 to 8 are outside code. States 9 (marks) and 10 (rest) are in the opening line of a
    # backtick fence, and state 11 is in the opening line of a tilde fence. Inside code, there are 9
    # states for each fence character: 4 for the line start, 2 for runs of 1 and 2 marks, 1 for the
    # closing run, 1 for spaces after the closing run, and 1 for text.
    inside = {"`": 12, "~": 21}
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
    """Return the state after `text` for each initial state, [states] uint8.

    `text` consists of the automaton's five characters (see `_reduced`). `CODE_BIT` is set in an
    entry if some of the text is code when read from that initial state.
    """
    out = np.zeros(STATES, np.uint8)
    for begin in range(STATES):
        state, code = begin, False
        for c in text:
            state = _STEP[state, c]
            code |= state >= _INSIDE
        out[begin] = state | CODE_BIT * code
    out.flags.writeable = False  # cached arrays are shared by all callers
    return out


def _reduced(text: str) -> str:
    """Map a text to the automaton's characters, and shorten runs without changing the result."""
    # a carriage return before a newline is equivalent to a trailing space
    text = re.sub(r"[^`~\n ]+", "x", text.replace("\t", "    ").replace("\r", " "))
    return re.sub(r"(.)\1{4,}", r"\1\1\1\1", text, flags=re.DOTALL)


def _written(token: str) -> str:
    """Convert whitespace markers of byte-level and SentencePiece tokens (Ġ, ▁, …) to whitespace."""
    for marks, text in (("[Ġ▁]", " "), ("Ċ|<0x0A>", "\n"), ("ĉ|<0x09>", "\t"), ("č|<0x0D>", "\r")):
        token = re.sub(marks, text, token)
    return token


def walk(texts: list[str]) -> np.ndarray:
    """Return a bool mask [T]: whether each of T successive token texts contains fenced code."""
    state, out = _LINE, []
    for text in texts:
        entry = int(_walk(_reduced(text))[state])
        out.append(bool(entry & CODE_BIT))
        state = entry & ~CODE_BIT
    return np.array(out, bool)


def table(tokenizer: Any, size: int) -> np.ndarray:
    """Return the automaton's transition table over tokens, [size, states] uint8, read-only.

    The value at [token, state] is the next state, with `CODE_BIT` set if some of the token's text
    is code. The table is cached per tokenizer and recomputed if tokens are added.
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
    entries = np.stack([*rows, *[_walk("x")] * (size - len(rows))])
    entries.flags.writeable = False
    return entries
