"""Stop strings: an automaton over the vocabulary, and the text of a streamed reply.

A stop string may begin and end in the middle of a token, so the automaton (Aho and Corasick 1975)
runs over bytes. The bytes of a token map each state to a next state, so the decode loop needs only
a transition table [V, states].
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.text.special_tokens import special_ids

STATES = 255  # maximum number of states of the automaton; table entries are uint8


def checked(stop: Any) -> tuple[str, ...]:
    """Check stop strings and return them as a sorted tuple without duplicates.

    Args:
      stop: a string, a list, tuple or set of strings, or None for no stop strings.

    Raises:
      UserError: the type is wrong, a string is empty or has a lone surrogate, or the strings have
        more than `STATES` − 2 bytes in total.
    """
    many = isinstance(stop, (list, tuple, set, frozenset))
    strings = () if stop is None else tuple(stop) if many else (stop,)
    if not all(isinstance(text, str) and text for text in strings):
        raise UserError(f"stop is {stop!r:.60}; it must be a non-empty string or a list of "
                        "non-empty strings")
    if any(re.search("[\ud800-\udfff]", text) for text in strings):
        raise UserError(f"stop is {stop!r:.60}, which contains a lone surrogate (invalid Unicode); "
                        "remove it")
    strings = tuple(sorted(set(strings)))
    size = sum(len(text.encode()) for text in strings)
    if size > STATES - 2:
        raise UserError(f"stop has {size} bytes of text; the maximum is {STATES - 2}, so use fewer "
                        "or shorter strings")
    return strings


def automaton(strings: Sequence[str]) -> np.ndarray:
    """Return the transition table of the stop-string automaton over bytes.

    Returns:
      [states, 256] uint8, the next state for each state and byte. State 0 is the initial state. The
      last state is the accepting one and is never left.
    """
    tree: list[dict[int, int]] = [{}]
    ends: set[int] = set()
    for text in strings:
        state = 0
        for byte in text.encode():
            if byte not in tree[state]:
                tree.append({})
                tree[state][byte] = len(tree) - 1
            state = tree[state][byte]
        ends.add(state)
    match = len(tree)
    step = np.zeros((match + 1, 256), np.int32)
    fail = [0] * match
    order = [0]
    for state in order:  # breadth-first: a failure link leads to a shallower state
        for byte in range(256):
            if byte in tree[state]:
                step[state, byte] = child = tree[state][byte]
                fail[child] = step[fail[state], byte] if state else 0
                order.append(child)
            else:
                step[state, byte] = step[fail[state], byte] if state else 0
        if fail[state] in ends:
            ends.add(state)
    step[np.isin(step, list(ends))] = match
    step[match] = match
    return step.astype(np.uint8)


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """Return the bytes of token ids 0…`size`−1; b"" for special and unused ids.

    For a token that is not the first of a text, the bytes are its part of the result of
    `decode(skip_special_tokens=True)`. A fast tokenizer decodes added tokens like all other tokens.
    """
    count = min(len(tokenizer), size)
    names = tokenizer.convert_ids_to_tokens(range(count))
    special = special_ids(tokenizer)
    fast = getattr(tokenizer, "backend_tokenizer", None) is not None
    added = {} if fast else {number: str(token) for number, token in
                             getattr(tokenizer, "added_tokens_decoder", {}).items()}
    level = _byte_level() if _is_byte_level(tokenizer) else None
    out = []
    for number, name in enumerate(names):
        if number in special or name is None:
            out.append(b"")
        elif number in added:
            out.append(added[number].encode())
        elif level is not None:
            known = all(c in level for c in name)
            out.append(bytes(level[c] for c in name) if known else name.encode())
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
            out.append(bytes([int(name[3:5], 16)]))
        else:
            out.append(name.replace("▁", " ").encode())
    return out + [b""] * (size - count)


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return "ByteLevel" in str(getattr(backend, "decoder", ""))


@functools.cache
def _byte_level() -> dict[str, int]:
    """Return the byte that each character of GPT-2's byte-level alphabet represents."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def table(tokenizer: Any, size: int, strings: tuple[str, ...]) -> np.ndarray:
    """Return the transition table of the stop-string automaton over tokens.

    The table is cached per tokenizer and recomputed if tokens are added.

    Args:
      tokenizer: a transformers tokenizer.
      size: the vocabulary size V.
      strings: the result of `checked`.

    Returns:
      [V, states] uint8, read-only, the next state for each token and state, with the states of
      `automaton`.
    """
    return _table(tokenizer, size, strings, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _table(tokenizer: Any, size: int, strings: tuple[str, ...], count: int) -> np.ndarray:
    step = automaton(strings)
    texts = _texts(tokenizer, size, count)
    out = np.tile(np.arange(len(step), dtype=np.uint8), (size, 1))
    length = np.array([len(text) for text in texts])
    order = np.argsort(-length, kind="stable")
    for at in range(int(length.max(initial=0))):
        live = order[: int((length > at).sum())]
        byte = np.array([texts[i][at] for i in live])
        out[live] = step[out[live], byte[:, None]]
    out.flags.writeable = False
    return out


@functools.lru_cache(maxsize=2)
def _texts(tokenizer: Any, size: int, count: int) -> list[bytes]:
    return token_bytes(tokenizer, size)


def cut(text: str, strings: Sequence[str]) -> str:
    """Return a text up to its first stop string, or the whole text if there is none."""
    places = [place for one in strings if (place := text.find(one)) >= 0]
    return text[: min(places)] if places else text


class Written:
    """The text of a streamed reply, returned in parts as tokens are generated.

    Text at the end that later tokens may change is withheld: an incomplete character, trailing
    whitespace, or the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.strings, self.sent = tokenizer, strings, ""

    def push(self, tokens: np.ndarray) -> str:
        """Return the text that can be streamed now and was not returned before.

        Args:
          tokens: [n] integers, all tokens of the reply generated so far.

        Returns:
          The new text; "" if there is none, or if a later token changed text already returned.
        """
        whole = text_of(self.tokenizer, tokens, self.strings)
        held = whole.rstrip("\ufffd")
        for one in self.strings:
            for length in range(min(len(one) - 1, len(held)), 0, -1):
                if whole[: len(held)].endswith(one[:length]):
                    held = held[: len(held) - length]
                    break
        held = held.rstrip()
        if not held.startswith(self.sent):  # a later token changed the earlier text
            return ""
        piece, self.sent = held[len(self.sent):], held
        return piece

    def finish(self, whole: str) -> str:
        """Return the part of the complete text `whole` that has not been returned yet.

        If later tokens changed text that was already returned, the result begins after the longest
        common prefix.
        """
        return whole[len(os.path.commonprefix([self.sent, whole])):]


def text_of(tokenizer: Any, tokens: np.ndarray, strings: Sequence[str] = ()) -> str:
    """Decode tokens up to the first stop string, without special tokens; "" without a tokenizer."""
    if tokenizer is None:
        return ""
    return cut(tokenizer.decode(tokens.tolist(), skip_special_tokens=True), strings)
