"""Fenced code detected token by token, compared with line-wise parsing, and during decoding."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import support as s
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpersona.captures import capture
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import gate, reserve, steer
from jaxpersona.interventions.where import Where, generated, response
from jaxpersona.models.batch import CODE
from jaxpersona.text import chat, fences
from jaxpersona.text.template import fences as whole

LINES = ["```", "```py", "  ```", "   ~~~", "~~~", "~~~ py", "    ```", "x", "", "say `x` there",
         "x ```", "``", "~~", "  y", "``` ", "~~~  "]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=8), st.integers(1, 5), st.booleans())
def test_agrees_with_the_whole_text_but_for_a_fence_not_yet_known(lines, size, end):
    text = "\n".join(lines) + "\n" * end
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = fences.walk(pieces)
    inside = np.zeros(len(text) + 1, int)
    for low, high in whole(text):
        opening = min(i for i in range(low, len(text)) if text[i : i + 3] in ("```", "~~~"))
        inside[opening + 2 : high] = 1  # recognized at the third mark
    wanted = [inside[i * size : i * size + len(p)].any() for i, p in enumerate(pieces)]
    np.testing.assert_array_equal(found, wanted, err_msg=repr(text))


def test_what_it_cannot_know_is_as_documented():
    assert fences.walk(["```", "one", "``` two", "\n", "x"]).tolist() == [
        True, True, False, False, False]  # inline code counts as a block up to its end
    assert fences.walk(["````\n", "```\n", "x"]).tolist() == [True, True, False]


@pytest.fixture(scope="module")
def model():
    tokenizer = s.byte_tokenizer()
    made = s.tiny_model(vocab_size=258, stop_ids=())
    return dataclasses.replace(made, tokenizer=tokenizer)


def test_returns_and_tabs_end_a_line_as_blanks_do():
    pieces = ["```\r\n", "x\r\n", "```\r\n", "hi"]
    assert fences.walk(pieces).tolist() == [True, True, True, False]
    assert fences.walk(["```\n", "x\n", "```\t\n", "hi"]).tolist() == [True, True, True, False]


def test_a_tab_indents_by_four_spaces_so_it_opens_no_block():
    assert fences.walk(["\t```\n", "x"]).tolist() == [False, False]


@pytest.mark.parametrize("blanks", range(10))
def test_a_line_with_four_or_more_blanks_is_no_fence(blanks):
    """Also if all blanks are one token, whose text is shortened."""
    line, known = " " * blanks + "```\n", blanks < 4
    assert fences.walk([line, "x"]).tolist() == [known, known]
    assert fences.walk(["```\n", line, "x"]).tolist() == [True, True, not known]


@pytest.mark.parametrize("mark", "`~\n x\t\r")
def test_a_run_in_one_token_is_walked_as_its_characters(mark):
    for before in ("", "``", "~", "say `", "```\n", "```\nx", "```\n``", "~~~\n~", "~~~\n  "):
        for count in range(1, 10):
            run = [*before, mark * count, *"```\nx\n~~~\nx"]
            each = [*before, *mark * count, *"```\nx\n~~~\nx"]
            found, wanted = fences.walk(run), fences.walk(each)
            at = len(before)
            assert found[at] == wanted[at : at + count].any(), (before, count)
            np.testing.assert_array_equal(found[at + 1 :], wanted[at + count :])


def test_a_longer_fence_closes_a_block():
    for mark in "`~":
        pieces = [3 * mark + "\n", "a\n", 5 * mark + "\n", "b"]
        assert fences.walk(pieces).tolist() == [True, True, True, False]


def test_code_is_followed_where_a_test_may_ask_for_it():
    from jaxpersona.engine.generate import asks_for_code

    plain, nothing = steer(np.ones(32), layers=[1]), capture.Capture()
    aside = response.without("code")
    assert not asks_for_code(plain, nothing | capture.mean())
    assert not asks_for_code(steer(np.ones((3, 32)), layers=[1], rows=[0, 1, 2]), nothing)
    for edits, read in (
        (gate(plain, np.ones(32), layer=0, above=0, over="token", where=aside), nothing),
        (steer(np.ones(32), layers=[1], where=aside), nothing), (plain, capture.mean(aside)),
        (reserve(2, 32, [1]), nothing),  # reserved slots may need it later
    ):
        assert asks_for_code(edits, read)


def followed(table, ids):
    """Return for each token whether it contains code."""
    state, found = 0, []
    for token in ids:
        entry = int(table[token, state])
        found.append(bool(entry & fences.CODE_BIT))
        state = entry & ~fences.CODE_BIT
    return found


def test_table_follows_a_tokenizer(model):
    table = fences.table(model.tokenizer, 300)
    assert table.shape == (300, fences.STATES)
    text = "a\n```py\r\nx = 1\n```\t\r\nb ~~~\n~~~\nc"
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    found = followed(table, ids)
    np.testing.assert_array_equal(found, fences.walk(list(text)))
    assert 0 < sum(found) < len(found)


def test_a_table_follows_sentencepiece_tokens():
    """Spaces and bytes have names of their own; ids beyond the vocabulary are plain text."""
    names = ["```", "<0x0A>", "▁▁▁▁```", "▁```", "x", "<0x09>", "<0x0D>"]
    texts = ["```", "\n", "    ```", " ```", "x", "\t", "\r"]

    class Tokenizer:
        def __len__(self):
            return len(names)

        def convert_ids_to_tokens(self, ids):
            return [names[i] for i in ids]

    table = fences.table(Tokenizer(), 9)
    for ids in ([3, 1, 4, 1, 2, 1, 4, 1, 0, 6, 1, 4], [0, 1, 0, 5, 1, 4], [2, 1, 5, 0, 1, 4]):
        np.testing.assert_array_equal(followed(table, ids), fences.walk([texts[i] for i in ids]))
    for beyond in (7, 8):
        np.testing.assert_array_equal(table[beyond], table[4])


def test_code_that_is_being_generated_can_be_left_out(model, monkeypatch):
    """Captures and edits use the same kinds during decoding as in a later forward pass."""
    from jaxpersona.engine import programs

    text = "so:\n```py\nx = 1\n```\nthat is all"
    ids = jax.numpy.asarray(model.tokenizer.encode(text, add_special_tokens=False), "int32")
    row = chat.encode_row(model.tokenizer, "write it")
    start = row.tokens.size

    def say(logits, how, row_id, position):
        return ids.at[position - start].get(mode="clip")

    monkeypatch.setattr(programs, "choose", say)
    jax.clear_caches()
    code = Where(need=CODE)
    out = generate(
        model, [row], temperature=1.0, max_new_tokens=len(ids), batch_size=1,
        interventions=steer(np.ones(32), layers=[1], scale=0.1, where=code & generated),
        capture=s.READ | capture.mean(response.without("code")) | capture.mean(code, name="code"))
    jax.clear_caches()
    assert out.text[0] == text
    inside = fences.walk(list(text))
    h = out.captured["full"][0][:, start:]
    assert s.rowwise(out.captured["code"][0], h[:, inside].mean(1)).max() <= 1e-5
    assert s.rowwise(out.captured["mean"][0], h[:, ~inside].mean(1)).max() <= 1e-5
    assert out.applied[0].seen[0] == out.applied[0].changed[0, 0] == inside.sum()
    later = chat.continue_row(model.tokenizer, row, out.tokens[0], "go on",
                               stopped=False)
    np.testing.assert_array_equal(
        (later.kind[start : start + len(ids)] & CODE) != 0, inside)


def test_a_table_follows_tokens_that_are_added_later():
    import support as s

    tokenizer = s.byte_tokenizer()
    count = len(tokenizer)
    before = fences.table(tokenizer, count + 2)
    assert fences.table(tokenizer, count + 2) is before and not before.flags.writeable
    tokenizer.add_tokens(["```"])
    after = fences.table(tokenizer, count + 2)
    assert after[count, 0] & fences.CODE_BIT and not before[count, 0] & fences.CODE_BIT
