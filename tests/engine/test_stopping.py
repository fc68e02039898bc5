"""Stop strings: the automaton finds the same matches as a text search, for any tokenization."""

from __future__ import annotations

import chat_templates
import numpy as np
import pytest
import support as s

from jaxpersona.engine import stopping


def first_match(data: bytes, strings) -> int:
    """Return the number of bytes up to the end of the first complete match, or −1."""
    ends = [at + len(one.encode()) for one in strings if (at := data.find(one.encode())) >= 0]
    return min(ends, default=-1)


@pytest.mark.parametrize("strings", [
    ("a",), ("ab", "bc"), ("aab",), ("abab", "ba"), ("he", "she", "his", "hers"), ("é", "日本"),
    ("aaa", "a" * 5 + "b"), ("\n\nUser:", "\nUser"),
])
def test_the_automaton_stops_where_a_search_does(strings):
    step = stopping.automaton(stopping.checked(list(strings)))
    rng = np.random.default_rng(0)
    letters = sorted({c for one in strings for c in one} | {"x"})
    found = 0
    for _ in range(400):
        words = [*letters, *(one[: int(rng.integers(1, len(one) + 1))] for one in strings)]
        data = "".join(rng.choice(words, int(rng.integers(1, 30)))).encode()
        state, end = 0, -1
        for i, byte in enumerate(data):
            state = int(step[state, byte])
            if state == len(step) - 1 and end < 0:
                end = i + 1
        assert end == first_match(data, strings)
        found += end >= 0
    assert found > 20


def test_a_table_runs_whole_tokens_as_their_bytes():
    tokenizer = chat_templates.make_tokenizer("chatml")
    size = len(tokenizer) + 5
    strings = stopping.checked(["the", "ing ", "é"])
    table = stopping.table(tokenizer, size, strings)
    match = table.shape[1] - 1
    assert table.shape[0] == size and not table.flags.writeable
    assert (table[:, match] == match).all()
    texts = ["What is the sea?", "Sing a song", "caf\u00e9 au lait", "nothing here", "singing bird"]
    for text in texts:
        ids, state, end = tokenizer(text, add_special_tokens=False)["input_ids"], 0, None
        for i, token in enumerate(ids):
            state = int(table[token, state])
            if state == match and end is None:
                end = i + 1
        want = next((n for n in range(1, len(ids) + 1)
                     if any(one in tokenizer.decode(ids[:n]) for one in strings)), None)
        assert end == want, text


def test_the_bytes_of_tokens_join_to_the_text():
    for tokenizer in (s.byte_tokenizer(), *map(chat_templates.make_tokenizer,
                                               ("chatml", "gemma2"))):
        pieces = stopping.token_bytes(tokenizer, len(tokenizer) + 3)
        assert len(pieces) == len(tokenizer) + 3
        for text in ("Hello, world", "caf\u00e9 \u65e5\u672c \U0001f600", "a\n\nb  c"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            joined = b"".join(pieces[i] for i in ids).decode()
            assert joined.strip(" ") == tokenizer.decode(ids, skip_special_tokens=True).strip(" ")
        assert all(pieces[i] == b"" for i in tokenizer.all_special_ids)


def test_a_text_ends_before_the_first_of_several_stop_strings():
    assert stopping.cut("one two three", ("three", "two")) == "one "
    assert stopping.cut("one two three", ("one two", "two")) == ""
    assert stopping.cut("one", ("three", "two")) == "one"


def test_what_may_still_change_is_held_back():
    tokenizer = s.byte_tokenizer()
    written = stopping.Written(tokenizer, ("STOP",))
    ids = tokenizer("one \U0001f600 STORY ST", add_special_tokens=False)["input_ids"]
    pieces = [written.push(np.array(ids[:n])) for n in range(1, len(ids) + 1)]
    assert "".join(pieces) == "one \U0001f600 STORY"
    assert not any("\ufffd" in piece for piece in pieces) and sum(map(bool, pieces)) > 5
    assert written.finish("one \U0001f600 STORY ST") == " ST"


def test_no_text_is_lost_if_an_earlier_one_changes():
    written = stopping.Written(s.byte_tokenizer())
    assert written.push(np.array(s.byte_tokenizer()("one two")["input_ids"])) == "one two"
    assert written.finish("one, two, three") == ", two, three"


def test_a_stop_string_that_begins_with_its_own_beginning_is_held_back_whole():
    tokenizer = s.byte_tokenizer()
    written = stopping.Written(tokenizer, ("aab",))
    ids = tokenizer("xaab", add_special_tokens=False)["input_ids"]
    assert len(ids) == 4
    pieces = [written.push(np.array(ids[:n])) for n in range(1, 5)]
    assert pieces == ["x", "", "", ""] and written.finish("x") == ""


def test_a_table_follows_tokens_that_are_added_later():
    tokenizer = s.byte_tokenizer()
    count = len(tokenizer)
    before = stopping.table(tokenizer, count + 2, ("ab",))
    assert stopping.table(tokenizer, count + 2, ("ab",)) is before
    tokenizer.add_tokens(["xab"])
    after = stopping.table(tokenizer, count + 2, ("ab",))
    assert after[count, 0] == after.shape[1] - 1 and before[count, 0] == 0


def test_faulty_stop_strings_are_refused():
    for stop in (["a", ""], [1], "", ["x" * 254]):
        if stop == "":
            with pytest.raises(ValueError, match="stop is"):
                stopping.checked(stop)
            continue
        with pytest.raises(ValueError, match="stop"):
            stopping.checked(stop)
    assert stopping.checked(None) == () and stopping.checked("a") == ("a",)
    assert stopping.checked(["b", "a", "b"]) == ("a", "b")
