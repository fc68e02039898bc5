"""Chat encoding: tokens equal the template's, and every token has the right kind and turn."""

from __future__ import annotations

import functools
import pathlib

import chat_templates
import numpy as np
import pytest
import support as s
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpersona.models.batch import (
    ASSISTANT,
    CODE,
    FIRST,
    GENERATED,
    LAST,
    SYSTEM,
    TEMPLATE,
    THINKING,
    USER,
    VALID,
)
from jaxpersona.text import chat

FAMILIES = ("chatml", "qwen2", "qwen3", "llama3", "gemma2")
MINI = pathlib.Path(__file__).parents[2] / "ckpts" / "mini"
ROLE = {None: TEMPLATE, "system": SYSTEM, "user": USER, "assistant": ASSISTANT}
LETTERS = {TEMPLATE: "t", SYSTEM: "s", USER: "u", ASSISTANT: "a", GENERATED: "g",
           THINKING: "h", CODE: "c"}
tokenizer_of = functools.cache(chat_templates.make_tokenizer)


def says(*contents, system=None):
    out = [] if system is None else [{"role": "system", "content": system}]
    return out + [{"role": ("user", "assistant")[i % 2], "content": c}
                  for i, c in enumerate(contents)]


def runs(tokenizer, row):
    """Merge adjacent tokens of the same kind and turn: [(letters from `LETTERS`, turn, text)]."""
    out, ids = [], []
    for i, token in enumerate(row.tokens.tolist()):
        ids.append(token)
        here = (row.kind[i], row.turn[i])
        if i + 1 == row.tokens.size or here != (row.kind[i + 1], row.turn[i + 1]):
            letters = "".join(v for k, v in LETTERS.items() if row.kind[i] & k)
            out.append((letters, int(row.turn[i]), tokenizer.decode(ids)))
            ids = []
    return out


def same_ids(tokenizer, row, messages, **options):
    options = {"add_generation_prompt": True, "enable_thinking": False, **options}
    assert row.text == tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    assert row.tokens.tolist() == ids["input_ids"]
    return True


def by_bytes(tokenizer, row, segments):
    """Compute the expected kind and turn by counting bytes in the segments, without offsets."""
    kind, turn = [], []
    for role, number, text in segments:
        kind += [ROLE[role]] * len(text.encode())
        turn += [number] * len(text.encode())
    added = tokenizer.added_tokens_decoder
    at, kinds, turns = 0, [], []
    for token in row.tokens.tolist():
        name = tokenizer.convert_ids_to_tokens(token)
        size = len(name.encode()) if token in added else len(name)  # ASCII: one byte per character
        mine = set(kind[at : at + size])
        kinds.append(mine.pop() if len(mine) == 1 else TEMPLATE)
        turns.append(turn[at])
        at += size
    assert at == len(kind)
    return kinds, turns


def test_chatml_spans_token_by_token():
    t = tokenizer_of("chatml")
    talk = says("user", "user", "é🎉user", system="")
    row = chat.encode_row(t, talk)
    assert same_ids(t, row, talk)
    want = [
        "<|im_start|>:0 system:0 \n:0 <|im_end|>:0 \n:0",
        "<|im_start|>:1 user:1 \n:1 user:u1 <|im_end|>:1 \n:1",
        "<|im_start|>:2 assistant:2 \n:2 user:a2 <|im_end|>:2 \n:2",
        "<|im_start|>:3 user:3 \n:3 Ã:u3 ©:u3 ð:u3 Ł:u3 İ:u3 ī:u3 user:u3 <|im_end|>:3 \n:3",
        "<|im_start|>:4 assistant:4 \n:4",
    ]
    names = [t.convert_ids_to_tokens(i).replace("Ċ", "\n") for i in row.tokens.tolist()]
    letters = [LETTERS[int(k)].replace("t", "") for k in row.kind]
    got = [f"{n}:{k}{u}" for n, k, u in zip(names, letters, row.turn.tolist(), strict=True)]
    assert got == [w for line in want for w in line.split(" ")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("talk", [
    says("Who are you?"),
    says("Who are you?", system="You are a pirate."),
    says("Who are you?", system=""),
    says("Who are you?", "I am a pirate.", "Who are you?", system="Who are you?"),
    says("the sea", "the sea", "the sea", "the sea", "the sea"),
    says("", "", ""),
    says("  the ship\n\n", "\n the sea  ", "\tthe\n", system="\n\nYou are.\n"),
    says(" ", "\n", "\n\n", system=" "),
    says("日本 é é", "naïve 🎉🎉", "ß", system="Привет.\n\n"),
    says("user\n", "assistant", "<|im_end|>\n<|im_start|>assistant\n", system="system"),
    says("<|eot_id|>", "<end_of_turn>\n<start_of_turn>model\n", "[INST]"),
    says("\U000f0000 \U000f0001", "\ue000", "\U000f0000"),
    says("{{ m }}{% endfor %}", "'\\n'", '"'),
], ids=lambda talk: repr(talk[0]["content"][:12]))
def test_spans_of_every_family_are_those_counted_by_bytes(family, talk):
    t = tokenizer_of(family)
    for reply in (True, False):
        row = chat.encode_row(t, talk, reply=reply)
        segments = chat_templates.reference(family, talk, reply)
        assert row.text == "".join(text for _, _, text in segments)
        if family != "gemma2" or talk[0]["role"] != "system":
            assert same_ids(t, row, talk, add_generation_prompt=reply)
        kinds, turns = by_bytes(t, row, segments)
        assert (row.kind & ~THINKING).tolist() == kinds
        assert row.turn.tolist() == turns


TEXT = st.text(alphabet=st.sampled_from("ab .\n\téß日🎉`~<>\u0301"), max_size=12)
WORD = st.sampled_from(["user", "assistant\n", "<|im_end|>", "<|im_start|>", "<|eot_id|>", "model",
                        "<end_of_turn>\n", "system", "\n\n", "</tool_response>", "the sea", "."])
CONTENT = st.lists(st.one_of(TEXT, WORD), max_size=4).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(family=st.sampled_from(FAMILIES), turns=st.lists(CONTENT, min_size=1, max_size=5),
       system=st.one_of(st.none(), CONTENT), reply=st.booleans())
def test_any_conversation_has_its_spans(family, turns, system, reply):
    t = tokenizer_of(family)
    talk = says(*turns, system=system)
    reply = reply and len(turns) % 2 == 1
    row = chat.encode_row(t, talk, reply=reply)
    segments = chat_templates.reference(family, talk, reply)
    if family != "gemma2" or system is None:
        assert same_ids(t, row, talk, add_generation_prompt=reply)
    kinds, numbers = by_bytes(t, row, segments)
    assert (row.kind & ~(THINKING | CODE)).tolist() == kinds
    assert row.turn.tolist() == numbers
    for role, number, text in segments:  # tokens aligned with the content decode to it
        aligned = family in ("chatml", "qwen2", "qwen3") and not text[:1].isspace()
        if role is not None and aligned:
            mine = (row.turn == number) & ((row.kind & ROLE[role]) != 0)
            assert t.decode(row.tokens[mine].tolist()) == text


def test_system_prompt_goes_before_the_first_user_message_where_there_is_no_role_for_it():
    t = tokenizer_of("gemma2")
    row = chat.encode_row(t, says("Who are you?", system="You are a pirate"))
    merged = says("You are a pirate\n\nWho are you?")
    assert same_ids(t, row, merged)
    assert runs(t, row) == [
        ("t", 0, "<bos><start_of_turn>user\n"), ("s", 0, "You are a pirate"), ("t", 1, "\n\n"),
        ("u", 1, "Who are you?"), ("t", 1, "<end_of_turn>\n"), ("t", 2, "<start_of_turn>model\n"),
    ]
    row = chat.encode_row(t, says("Who?", system="You are a pirate."))
    assert ("t", 0, ".\n\n") in runs(t, row)  # a token that contains both is TEMPLATE
    with pytest.raises(ValueError, match="no system role"):
        chat.encode_row(t, says(system="You are."), reply=False)


def test_thinking_blocks_are_marked_where_the_template_keeps_them():
    t = tokenizer_of("qwen3")
    talk = says("Who?", "<think>\nthe sea\n</think>\n\nthe ship", "Who?")
    row = chat.encode_row(t, talk)
    assert same_ids(t, row, talk)
    assert runs(t, row)[3:6] == [
        ("t", 1, "<|im_start|>assistant\n"), ("a", 1, "the ship"), ("t", 1, "<|im_end|>\n")]
    assert runs(t, row)[-2:] == [("th", 3, "<think>\n\n</think>"), ("t", 3, "\n\n")]
    row = chat.encode_row(t, talk, thinking=True)
    assert same_ids(t, row, talk, enable_thinking=True)
    assert runs(t, row)[-1] == ("t", 3, "<|im_start|>assistant\n")
    for said in ("<think>\nthe sea\n</think>\n\nthe ship", "<think>the sea</think>the ship"):
        row = chat.encode_row(t, says("Who?", said), reply=False)
        assert same_ids(t, row, says("Who?", said), add_generation_prompt=False)
        assert runs(t, row)[3:] == [
            ("t", 1, "<|im_start|>assistant\n"), ("ah", 1, "<think>\nthe sea\n</think>"),
            ("t", 1, "\n\n"), ("a", 1, "the ship"), ("t", 1, "<|im_end|>\n")]
    row = chat.encode_row(t, says("Who?", "the ship"), reply=False)
    assert ("th", 1, "<think>\n\n</think>") in runs(t, row)
    t = tokenizer_of("chatml")
    row = chat.encode_row(t, says("a <think> b", "<think>the sea</think>the ship"), reply=False)
    assert runs(t, row)[1] == ("u", 0, "a <think> b")
    assert runs(t, row)[4:6] == [("ah", 1, "<think>the sea</think>"), ("a", 1, "the ship")]


@pytest.mark.parametrize("said, want", [
    ("<think>\nthe sea", [("ah", 1, "<think>\nthe sea")]),
    ("the sea</think>the ship", [("ah", 1, "the sea</think>"), ("a", 1, "the ship")]),
    ("the <think>sea</think>", [("a", 1, "the "), ("ah", 1, "<think>sea</think>")]),
    ("</think>a</think>", [("ah", 1, "</think>"), ("a", 1, "a"), ("ah", 1, "</think>")]),
    ("<think>a</think>b<think>c", [("ah", 1, "<think>a</think>"), ("a", 1, "b"),
                                   ("ah", 1, "<think>c")]),
])
def test_open_and_stray_thinking_tags(said, want):
    t = tokenizer_of("chatml")
    row = chat.encode_row(t, says("Who?", said), reply=False)
    assert runs(t, row)[4:-1] == want


def test_a_thinking_block_opened_by_the_prompt_is_open_at_its_last_token():
    t = tokenizer_of("deepseek")
    talk = says("Who?", "the sea</think>the ship", "Who?")
    row = chat.encode_row(t, talk)
    assert same_ids(t, row, talk)
    assert runs(t, row)[4] == ("a", 1, "the ship")
    assert runs(t, row)[-2:] == [("t", 3, "<|im_start|>assistant\n"), ("th", 3, "<think>\n")]
    assert chat.thinking_ids(t) == tuple(t.convert_tokens_to_ids(["<think>", "</think>"]))
    # After a block that is closed in the prompt, the last token must not be THINKING.
    closed = t.chat_template.replace(r"<think>\n", "<think></think>")
    row = chat.encode_row(with_template(t, closed), talk)
    assert [bool(k & THINKING) for k in row.kind[-3:]] == [False, True, False]


def with_template(tokenizer, template):
    import copy

    out = copy.deepcopy(tokenizer)
    out.chat_template = template
    return out


def test_templates_that_move_the_system_prompt_and_cue_nothing():
    t = tokenizer_of("mistral")
    talk = says("Who?", "the sea", "Who?", system="You are")
    row = chat.encode_row(t, talk)
    assert same_ids(t, row, talk)
    assert runs(t, row) == [
        ("t", 1, "<bos>[INST] "), ("u", 1, "Who?"), ("t", 1, "[/INST]"),
        # one token contains the template's space and "the"
        ("a", 2, " the sea"), ("t", 2, "<eos>"),
        ("t", 0, "[INST] "), ("s", 0, "You are"), ("t", 3, "\n\n"), ("u", 3, "Who?"),
        ("t", 4, "[/INST]")]


def test_fenced_code_is_marked_with_its_fences():
    t = tokenizer_of("chatml")
    said = "the sea\n```py\nthe `ship`\n```\nthe sea\n~~~\nthe ship"
    row = chat.encode_row(t, says("a ``` b", said), reply=False)
    assert runs(t, row)[1] == ("u", 0, "a ``` b")
    codes = [r for r in runs(t, row) if r[0] == "ac"]
    assert codes == [("ac", 1, "```py\nthe `ship`\n```"), ("ac", 1, "~~~\nthe ship")]


def test_base_models_get_a_plain_completion():
    t = tokenizer_of("base")
    row = chat.encode_row(t, says("Who are you", "the sea", "the ship", system=""))
    assert row.text == "<bos>Who are you\n\nthe sea\n\nthe ship"
    assert runs(t, row) == [("t", 1, "<bos>"), ("u", 1, "Who are you"), ("t", 2, "\n\n"),
                            ("a", 2, "the sea"), ("t", 3, "\n\n"), ("u", 3, "the ship")]
    tags = chat.encode_row(t, says("</think>", "", "the <tool_response>"))
    assert runs(t, tags) == [("t", 0, "<bos>"), ("u", 0, "</think>"), ("t", 2, "\n\n"),
                             ("u", 2, "the <tool_response>")]
    more = chat.continue_row(t, row, row.tokens[1:3], "Who", stopped=False)
    assert runs(t, more)[6:] == [("ag", 4, "Who are"), ("t", 5, "\n\n"), ("u", 5, "Who")]


@pytest.mark.parametrize("family, stop", [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"),
                                          ("qwen2", "<|im_end|>"), ("gemma2", "<end_of_turn>")])
@pytest.mark.parametrize("system", [None, "", "You are a pirate."])
def test_continuing_from_ids_equals_the_rendering_of_the_whole(family, stop, system):
    t = tokenizer_of(family)
    row = chat.encode_row(t, says("Who are you?", system=system))
    ids = np.array(t.encode("the sea", add_special_tokens=False))
    end = t.convert_tokens_to_ids(stop)
    whole = chat.encode_row(t, says("Who are you?", "the sea", " the ship\n", system=system))
    both = [*ids, end]
    for generated, stopped in ((ids, False), (ids, True), (both, True), (both, False)):
        more = chat.continue_row(t, row, np.array(generated), " the ship\n", stopped=stopped)
        assert more.tokens.tolist() == whole.tokens.tolist()
        assert more.text == whole.text
        assert (more.kind & ~GENERATED).tolist() == whole.kind.tolist()
        assert more.turn.tolist() == whole.turn.tolist()
        made = np.flatnonzero(more.kind & GENERATED)
        assert made.tolist() == list(range(row.tokens.size, row.tokens.size + len(generated)))


def test_generated_ids_are_kept_and_their_thinking_and_code_marked():
    t = tokenizer_of("qwen3")
    row = chat.encode_row(t, "Who?", thinking=True)
    odd = t.convert_tokens_to_ids(["t", "h", "e"])  # differs from the tokenizer's encoding
    said = t.encode("<think>sea</think>\n```\nthe\n```\nship", add_special_tokens=False)
    more = chat.continue_row(t, row, np.array([*said, *odd]), "Who?", stopped=False)
    assert more.tokens[row.tokens.size :][: len(said) + 3].tolist() == [*said, *odd]
    assert runs(t, more)[4:8] == [
        ("agh", 1, "<think>sea</think>"), ("ag", 1, "\n``"), ("agc", 1, "`\nthe\n```"),
        ("ag", 1, "\nshipthe")]  # a fence is recognized at its third mark
    assert runs(t, more)[8][:2] == ("t", 1)
    # Two stop ids: the reply's is kept, and the template's ends the turn.
    other = t.convert_tokens_to_ids("<|endoftext|>")
    more = chat.continue_row(t, row, np.array([*odd, other]), "Who?", stopped=True)
    assert "the<|endoftext|><|im_end|>\n<|im_start|>user\nWho?<|im_end|>" in more.text
    # Third turn: generated ids are kept unchanged.
    third = chat.continue_row(t, more, np.array(odd), "Why?", stopped=True)
    assert third.tokens[: more.tokens.size].tolist() == more.tokens.tolist()
    assert third.turn[-1] == 5 and runs(t, third)[-4][:2] == ("t", 4)
    opened = tokenizer_of("deepseek")
    row = chat.encode_row(opened, "Who?")
    more = chat.continue_row(opened, row, np.array(opened.encode("sea</think>ship")), "Who?",
                             stopped=False)
    assert runs(opened, more)[5:7] == [("agh", 1, "sea</think>"), ("ag", 1, "ship")]


def test_encode_makes_a_batch_whose_rows_are_named_by_what_they_are():
    t = tokenizer_of("chatml")

    class Model:
        tokenizer = t

    talks = ["Who?", says("Who?", "the sea", "Who?"), "Who?"]
    out = chat.encode(Model(), talks, width=64)
    assert out.tokens.shape == (3, 64)
    rows = [chat.encode_row(t, talk) for talk in talks]
    assert [int(i) for i in out.row_id] == [
        chat.row_id(rows[0].tokens), chat.row_id(rows[1].tokens), chat.row_id(rows[0].tokens, 1)]
    assert int(out.kind[0, 0]) == VALID | FIRST | TEMPLATE
    assert int(out.kind[0, rows[0].tokens.size - 1]) == VALID | LAST | TEMPLATE
    # must never change, because saved runs depend on it
    assert chat.row_id([1, 2, 3]) == 1753001278
    assert len({chat.row_id([1, 2, 3], s, salt) for s in range(9) for salt in ("", "a")}) == 18
    with pytest.raises(ValueError, match="wrap it in a list"):
        chat.encode(t, talks[1])
    with pytest.raises(ValueError, match="no tokenizer"):
        chat.encode(object(), talks)


def test_tokenizers_without_thinking_tags_have_no_ids_for_them():
    t = with_template(tokenizer_of("chatml"), chat_templates.CHATML)
    assert chat.thinking_ids(t) != (-1, -1)
    if MINI.joinpath("tokenizer.json").exists():
        assert chat.thinking_ids(mini()) == (-1, -1)


@pytest.mark.parametrize("talk, complaint", [
    ([], "conversation is"), (3, "conversation is"), ([3], "message 0 is 3"),
    ([{"role": "user"}], "has no 'content'"), ([{"content": "x"}], "has no 'role'"),
    ([{"role": "model", "content": "x"}], "has role 'model'"),
    ([{"role": ["user"], "content": "x"}], "has role"),
    ([{"role": "user", "content": None}], "has content None"),
    ([{"role": "user", "content": "x", "name": "y"}], "the field 'name'"),
    (says("x", "y"), "it must be 'user'"),
    (says(system="x"), "it must be 'user'"),
    ([*says("x"), *says("y", system="z")], "only message 0 can have it"),
    (["x"], "message 0 is 'x'"), (says("\ud800"), "lone surrogate"),
])
def test_a_malformed_conversation_is_refused_by_field_and_value(talk, complaint):
    with pytest.raises(ValueError, match=complaint):
        chat.check_conversation(talk)
    assert chat.check_conversation("x") == says("x")


def test_a_template_that_changes_contents_is_refused():
    t = tokenizer_of("chatml")
    upper = with_template(t, chat_templates.CHATML.replace("m.content", "m.content|upper"))
    with pytest.raises(ValueError, match="could not be located"):
        chat.encode_row(upper, "Who?")
    drops = with_template(t, "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}"
                             "{% endfor %}")
    with pytest.raises(ValueError, match="omits the content of message 0"):
        chat.encode_row(drops, says("Who?", "the sea", "Why?"))
    with pytest.raises(ValueError, match="rejects the conversation: roles must alternate"):
        chat.encode_row(tokenizer_of("gemma2"), [*says("x"), *says("y")])
    with pytest.raises(ValueError, match="renders to zero tokens"):
        chat.encode_row(with_template(t, None), "")


@functools.cache
def mini():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MINI, trust_remote_code=False)


@pytest.mark.skipif(not MINI.joinpath("tokenizer.json").exists(), reason="mini is not trained yet")
def test_the_embedded_models_own_tokenizer():
    t = mini()
    for talk in (says("Who are you?"), says("Who are you?", system=""),
                 says("é\n", " the sea ", "Why?", system="You are a pirate.")):
        row = chat.encode_row(t, talk)
        assert same_ids(t, row, talk)
        segments = chat_templates.reference("chatml", talk, True)
        kinds, turns = by_bytes(t, row, segments)
        assert row.kind.tolist() == kinds and row.turn.tolist() == turns


def test_a_closed_thinking_block_is_thinking_to_its_last_token():
    said = "<think>a</think>"
    row = chat.encode_row(s.byte_tokenizer(template=False), says("x", said), reply=False)
    assert (row.kind[-len(said):] & THINKING).all()
