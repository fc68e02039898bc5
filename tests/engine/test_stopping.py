"""Stop strings: the automaton finds the same matches as a text search, for any tokenization."""

from __future__ import annotations

import dataclasses

import chat_templates
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from tokenizers import AddedToken

import jaxpersona as jp
from jaxpersona.engine import programs, stopping
from jaxpersona.text.special_tokens import special_ids


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


def with_added(tokenizer):
    """Add a special token without a role, and two ordinary tokens, to a tokenizer."""
    tokenizer.add_tokens([AddedToken("<unused0>", special=True),
                          *(AddedToken(text, special=False) for text in ("<tool>", "\u00e9!"))])
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "chatml", "gemma2", "mistral"])
def test_the_bytes_of_each_token_are_its_text_within_a_reply(kind):
    tokenizer = with_added(s.byte_tokenizer() if kind == "bytes"
                           else chat_templates.make_tokenizer(kind))
    unused, tool = tokenizer.convert_tokens_to_ids(["<unused0>", "<tool>"])
    assert unused not in tokenizer.all_special_ids
    assert special_ids(tokenizer) >= {unused, *tokenizer.all_special_ids}
    assert tool in special_ids(tokenizer, added=True) - special_ids(tokenizer)
    pieces = stopping.token_bytes(tokenizer, len(tokenizer))
    (around,) = tokenizer("a", add_special_tokens=False)["input_ids"]
    for i, data in enumerate(pieces):
        text = tokenizer.decode([around, i, around], skip_special_tokens=True)
        assert (b"a" + data + b"a").decode(errors="replace") == text, (i, data)
    assert not pieces[unused] and pieces[tool] == b"<tool>"


def test_a_special_token_within_a_reply_is_not_in_the_text_that_stop_strings_match(monkeypatch):
    tokenizer = with_added(s.byte_tokenizer())
    reply = tokenizer.convert_tokens_to_ids(["a", "<unused0>", "b", "<unused0>", "<tool>"])
    table = jnp.asarray([*reply, 257], jnp.int32)
    monkeypatch.setattr(programs, "choose", lambda logits, how, row_id, position: table[
        jnp.minimum(position - 1, table.size - 1)])
    s.KEPT.clear()
    model = dataclasses.replace(s.tiny_model(stop_ids=(257,), vocab_size=len(tokenizer)),
                                tokenizer=tokenizer)
    engine = jp.Engine(model, rows=2)
    for stop, text in (("used", "ab<tool>"), ("ab<t", "")):
        handle = engine.submit(jp.Request([5], stop=stop, max_new_tokens=9, temperature=1.0))
        events = list(engine.stream(handle))
        found = events[-1].reply
        assert (found.text, found.finish, found.tokens.tolist()) == (text, "stop", reply)
        assert "".join(event.text for event in events) == text
    s.KEPT.clear()


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


def test_stop_strings_may_have_253_bytes_in_total():
    """Letters outside ASCII have several bytes; a repeated string counts once."""
    assert stopping.checked(["x" * 253, "x" * 253]) == ("x" * 253,)
    assert stopping.checked("\u00e9" * 126)
    for stop, size in ((["x" * 253, "y"], 254), ("\u00e9" * 127, 254)):
        with pytest.raises(ValueError, match=f"stop has {size} bytes of text; the maximum is 253"):
            stopping.checked(stop)
    assert stopping.automaton(stopping.checked("x" * 253)).shape == (255, 256)
    assert stopping.checked({"b", "a"}) == stopping.checked(("b", "a")) == ("a", "b")


def test_a_stop_string_that_ends_inside_another_ends_the_reply_there():
    """The longer string has begun, but the shorter one is complete first."""
    step = stopping.automaton(("abcd", "bc"))
    state = 0
    for byte in b"abc":
        state = int(step[state, byte])
    assert state == len(step) - 1 and (step[state] == state).all()
