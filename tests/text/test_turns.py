"""Multi-turn conversations: appended tokens, and the kinds of reply tokens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import types

import chat_templates
import jax
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine.extract import extract
from jaxpersona.interventions import Where
from jaxpersona.interventions.where import response
from jaxpersona.models.batch import ASSISTANT, GENERATED, LAST, SYSTEM, TEMPLATE, THINKING, USER
from jaxpersona.text import chat, template

MOVES_SYSTEM = (  # the system prompt precedes the last user message
    "{{ bos_token }}{% set n = namespace(head='') %}{% set talk = messages %}"
    "{% if messages[0].role == 'system' %}{% set n.head = messages[0].content + '\n\n' %}"
    "{% set talk = messages[1:] %}{% endif %}"
    "{% for m in talk %}{% if m.role == 'user' %}[INST] {{ n.head if loop.last }}{{ m.content }}"
    "[/INST]{% else %} {{ m.content + eos_token }}{% endif %}{% endfor %}")
VICUNA = ("{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
          "{% elif m.role == 'user' %}USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}"
          "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:"
          "{% endif %}")
LLAMA2 = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
          "[/INST]{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token + bos_token }}"
          "{% endif %}{% endfor %}")
PLAIN_LINES = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
tokenizer_of = functools.cache(chat_templates.make_tokenizer)


def says(*contents, system=None):
    out = [] if system is None else [{"role": "system", "content": system}]
    return out + [{"role": ("user", "assistant")[i % 2], "content": c}
                  for i, c in enumerate(contents)]


def with_template(tokenizer, source):
    out = copy.deepcopy(tokenizer)
    out.chat_template = source
    return out


@functools.cache
def sentencepiece(kind):
    """Return a SentencePiece-like tokenizer; "prepend" and "always" also mark the text's start."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    text = ["hello world the sea is blue ship USER: ASSISTANT: be far [INST] [/INST]"] * 20
    raw.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    table = json.loads(raw.to_str())
    for byte in range(256):
        words = table["model"]["vocab"]
        words.setdefault(f"<0x{byte:02X}>", len(words))
    table["model"].update(byte_fallback=True, fuse_unk=True)
    core = Tokenizer.from_str(json.dumps(table))
    if kind == "prepend":
        core.pre_tokenizer = None
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                normalizers.Replace(" ", "\u2581")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


def test_the_next_turn_comes_from_the_conversations_own_messages():
    t = with_template(tokenizer_of("mistral"), MOVES_SYSTEM)
    row = chat.encode_row(t, says("Who?", system="You are"))
    reply = np.array(t.encode(" the sea", add_special_tokens=False))
    for _ in range(2):  # one turn later, the real system prompt is still used
        row = chat.continue_row(t, row, reply, "Why?", stopped=True)
        assert row.text.endswith(" the sea<eos>[INST] You are\n\nWhy?[/INST]")
        assert row.text == t.decode(row.tokens.tolist())
        mine = row.kind & SYSTEM != 0
        assert t.decode(row.tokens[mine & (np.arange(mine.size) > 8)].tolist()).endswith("You are")
        assert set(row.turn[mine].tolist()) == {0}
    assert [m["content"] for m in row.messages] == [
        "You are", "Who?", " the sea", "Why?", " the sea", "Why?"]
    assert [m["role"] for m in row.messages[1:]] == ["user", "assistant"] * 2 + ["user"]


def test_a_row_without_messages_cannot_be_continued():
    t = tokenizer_of("chatml")
    row = chat.encode_row(t, "Who?")
    bare = chat.Row(row.tokens, row.kind, row.turn, row.text)
    with pytest.raises(ValueError, match="has no messages"):
        chat.continue_row(t, bare, row.tokens[:2], "Why?", stopped=False)
    finished = chat.encode_row(t, says("Who?", "the sea"), reply=False)
    with pytest.raises(ValueError, match="last message has role 'assistant'"):
        chat.continue_row(t, finished, row.tokens[:2], "Why?", stopped=False)


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "gemma2", "base"])
@pytest.mark.parametrize("reply", ["", " ", "\n\n", "<think>a</think>", "<think>a", "é🎉"])
def test_any_reply_can_be_followed_by_a_message(family, reply):
    t = tokenizer_of(family)
    row = chat.encode_row(t, "Who?")
    ids = np.array(t.encode(reply, add_special_tokens=False), np.int32)
    more = chat.continue_row(t, row, ids, "Why?", stopped=False)
    assert more.tokens[: row.tokens.size + ids.size].tolist() == [*row.tokens, *ids]
    tail = t.decode(more.tokens[row.tokens.size + ids.size :].tolist())
    whole = chat.encode_row(t, says("Who?", "the sea", "Why?")).text
    assert tail == whole[whole.index("the sea") + len("the sea") :]


@pytest.mark.parametrize("kind", ["prepend", "always", "first", "never"])
@pytest.mark.parametrize("source", [VICUNA, LLAMA2, PLAIN_LINES, None],
                         ids=["vicuna", "llama2", "lines", "base"])
def test_a_turn_appended_has_the_tokens_of_the_whole(kind, source):
    """A tokenizer that marks the start of a text must not mark the appended text."""
    t = with_template(sentencepiece(kind), source)
    first, said, then = says("hello world"), "the sea is blue", "ship"
    row = chat.encode_row(t, first)
    whole = chat.encode_row(t, [*first, *says("", said)[1:], *says(then)])
    reply_part = chat.encode_row(t, [*first, *says("", said)[1:]], reply=False)
    n = row.tokens.size
    assert whole.tokens[:n].tolist() == row.tokens.tolist()
    reply = reply_part.tokens[n:]
    reply = reply[(reply_part.kind[n:] & ASSISTANT) != 0]
    at = next(i for i in range(n, whole.tokens.size)
              if whole.tokens[i : i + reply.size].tolist() == reply.tolist())
    reply = whole.tokens[n : at + reply.size]
    more = chat.continue_row(t, row, reply, then, stopped=False)
    assert more.tokens.tolist() == whole.tokens.tolist()
    assert more.text == whole.text


@pytest.mark.parametrize("adds", [True, False])
def test_a_base_models_prompt_begins_as_its_tokenizer_begins(adds):
    from tokenizers import processors

    for t in (copy.deepcopy(tokenizer_of("mistral")), copy.deepcopy(sentencepiece("first"))):
        t.chat_template = None
        core, bos = t.backend_tokenizer, t.bos_token
        if adds:
            core.post_processor = processors.TemplateProcessing(
                f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
        want = t("hello world").input_ids
        assert (want[0] == t.bos_token_id) == adds
        row = chat.encode_row(t, "hello world")
        assert row.tokens.tolist() == want
        assert row.kind.tolist() == [TEMPLATE] * adds + [USER] * (len(want) - adds)
        more = chat.continue_row(t, row, row.tokens[-1:], "ship", stopped=False)
        assert more.tokens[: len(want) + 1].tolist() == [*want, want[-1]]
        assert more.tokens.tolist().count(t.bos_token_id) == adds


@pytest.mark.parametrize("source", [VICUNA, LLAMA2, MOVES_SYSTEM], ids=["vicuna", "llama2", "mist"])
def test_a_blank_that_is_one_token_with_the_first_word_is_the_answers(source):
    t = with_template(tokenizer_of("mistral"), source)
    for said in ("the", "the sea"):
        row = chat.encode_row(t, says("Who?", said), reply=False)
        mine = (row.kind & ASSISTANT) != 0
        assert t.decode(row.tokens[mine].tolist()) == " " + said
        assert set(row.turn[mine].tolist()) == {1}
    # whitespace alone and trailing whitespace remain TEMPLATE
    row = chat.encode_row(t, says("Who?", "\n\nthe"), reply=False)
    assert "the" in t.decode(row.tokens[(row.kind & ASSISTANT) != 0].tolist())


def test_a_blank_that_ends_one_message_leaves_the_next_word_to_the_next():
    """The blank is the closing text of message 0, and one token with the first word of 1."""
    t = with_template(tokenizer_of("mistral"),
                      "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    row = chat.encode_row(t, says("Who?", "the sea"), reply=False)
    mine = (row.kind & ASSISTANT) != 0
    assert t.decode(row.tokens[mine].tolist()) == " the sea"
    assert set(row.turn[mine].tolist()) == {1} and row.turn[0] == 0


def test_captures_of_an_answer_hold_its_first_word():
    """The template's blank is one token with this word, and the only blank of the answer "the"."""
    t = with_template(tokenizer_of("mistral"), VICUNA)
    model = dataclasses.replace(s.tiny_model(vocab_size=len(t)), tokenizer=t)
    for said in ("the", "the sea"):
        row = chat.encode_row(t, says("Who?", said), reply=False)
        norms, = extract(model, [row], capture=capture.norms(response)).captured["norms"]
        held = np.isfinite(norms)
        assert (held == held[:1]).all()
        assert t.decode(row.tokens[held[0]].tolist()) == " " + said


def test_an_error_about_a_template_names_its_tokenizer():
    t = with_template(tokenizer_of("chatml"), "{% for m in messages %}x{% endfor %}")
    with pytest.raises(ValueError, match=r"the chat template \(tokenizer.chat_template\) omits"):
        chat.encode_row(t, "Who?")
    t.name_or_path = "/models/mine"
    with pytest.raises(ValueError, match=r"the chat template \(/models/mine\) omits the content"):
        chat.encode_row(t, "Who?")
    upper = with_template(t, chat_templates.CHATML.replace("m.content", "m.content|upper"))
    with pytest.raises(ValueError, match=r"the chat template \(/models/mine\) changes their"):
        chat.encode_row(upper, "Who?")


def test_a_template_that_writes_a_lone_surrogate_is_refused():
    t = with_template(tokenizer_of("chatml"), r"{{ '\ud800' }}" + chat_templates.CHATML)
    with pytest.raises(ValueError, match="cannot be rendered: its text contains a lone surrogate"):
        chat.encode_row(t, "Who?")


def thinking_model():
    t = copy.deepcopy(s.byte_tokenizer())
    t.add_tokens(["<think>", "</think>"])
    model = s.tiny_model(vocab_size=260, stop_ids=(257,))
    return dataclasses.replace(model, tokenizer=t), t


@pytest.mark.parametrize("opened", [False, True], ids=["by the reply", "by the prompt"])
def test_thinking_is_marked_while_it_is_generated(opened, monkeypatch):
    """The kinds of a forced reply equal those of the encoded conversation."""
    from jaxpersona.engine import programs
    from jaxpersona.engine.generate import generate

    model, t = thinking_model()
    if opened:
        t.chat_template = t.chat_template.replace("assistant\n{% endif", "assistant\n<think>"
                                                  "{% endif")
    said = ("" if opened else "<think>") + "the sea</think>blue<think>ship</think>so"
    ids = t.encode(said, add_special_tokens=False)
    row = chat.encode_row(t, "Who?")
    assert bool(row.kind[-1] & THINKING) == opened
    start, forced = row.tokens.size, jax.numpy.asarray(ids, "int32")
    monkeypatch.setattr(programs, "choose", lambda logits, how, row_id, position: forced.at[
        position - start].get(mode="clip"))
    jax.clear_caches()
    inside = Where(need=THINKING | GENERATED)
    out = generate(model, [row], temperature=1.0, max_new_tokens=len(ids), batch_size=1,
                   capture=capture.norms(inside) | capture.mean(response)
                   | capture.norms(response, name="response"))
    jax.clear_caches()
    assert out.tokens[0].tolist() == ids
    thought = np.isfinite(out.captured["norms"][0][0, start:])
    answered = np.isfinite(out.captured["response"][0][0, start:])
    pieces, want, within = [t.decode([i]) for i in ids], [], opened
    for piece in pieces:
        within = within or piece == "<think>"
        want.append(within)
        within = within and piece != "</think>"
    assert thought.tolist() == want and answered.tolist() == [not x for x in want]
    later = chat.continue_row(t, row, out.tokens[0], "Why?", stopped=False)
    mine = later.kind[start : start + len(ids)]
    assert ((mine & THINKING) != 0).tolist() == want
    assert chat.thinking_ids(t) == (258, 259)
    # the encoded conversation marks the same tokens as THINKING
    if not opened:
        done = chat.encode_row(t, says("Who?", said), reply=False)
        there = done.kind[start : start + len(ids)]
        assert done.tokens[start : start + len(ids)].tolist() == ids
        assert ((there & THINKING) != 0).tolist() == want


def test_a_block_that_the_next_prompt_closes_is_not_open():
    """The next generation prompt opens and closes a thinking block, so the reply is outside it."""
    t = with_template(tokenizer_of("chatml"), chat_templates.CHATML.replace(
        r"<|im_start|>assistant\n' }}{% endif", r"<|im_start|>assistant\n<think></think>' }}"
        "{% endif"))
    row = chat.encode_row(t, "Who?")
    assert not row.kind[-1] & THINKING and row.kind[-2] & THINKING
    more = chat.continue_row(t, row, row.tokens[:2], "Why?", stopped=False)
    assert t.decode(more.tokens[-1:].tolist()) == "</think>"
    assert not more.kind[-1] & THINKING and more.kind[-2] & THINKING


@pytest.mark.parametrize(("text", "blocks"), [
    ("````\na\n```\nb\n````\nc", ["````\na\n```\nb\n````"]),
    ("```\na\n````\nc", ["```\na\n````"]),
    ("~~~~\na\n~~~\nb\n~~~~~\nc", ["~~~~\na\n~~~\nb\n~~~~~"]),
    ("````\na\n```", ["````\na\n```"]),
])
def test_only_a_fence_as_long_closes_a_block(text, blocks):
    assert [text[a:b] for a, b in template.fences(text)] == blocks


def test_a_reply_belongs_to_the_message_of_its_generation_prompt():
    """Without a generation prompt, as after token ids, it is the next message."""
    for last, turn in ((USER, 3), (TEMPLATE, 2), (TEMPLATE | THINKING, 2)):
        row = chat.Row(np.array([5, 6], np.int32), np.array([USER, last | LAST]),
                       np.array([1, 2]), "")
        more = chat.answered(None, row, np.array([7, 8, 9]))
        assert more.tokens.tolist() == [5, 6, 7, 8, 9] and more.turn.tolist() == [1, 2] + [turn] * 3
        assert more.kind.tolist() == [USER, last] + [ASSISTANT | GENERATED] * 3
        assert chat.answered(None, row, []).kind.tolist() == row.kind.tolist()


NAMED = ("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
         "{% if add_generation_prompt %}{{ day }}{{ 'T' if enable_thinking }}>{% endif %}")


def test_template_variables_and_thinking_reach_every_rendering():
    t = with_template(s.byte_tokenizer(), NAMED)
    day = {"day": "Monday"}
    batch = chat.encode(t, ["hi"], thinking=True, variables=day)
    assert t.decode(batch.tokens[0].tolist()) == "u:hi;MondayT>"
    assert t.decode(chat.encode(t, ["hi"], reply=False).tokens[0].tolist()) == "u:hi;"
    row = chat.encode_row(t, "hi", variables=day)
    more = chat.continue_row(t, row, t("oh").input_ids, "so", stopped=False, variables=day,
                             thinking=True)
    assert more.text == "u:hi;Monday>oh;u:so;MondayT>"
    t.chat_template = {"default": NAMED, "other": "[{{ messages[0].content }}]"}
    assert chat.encode_row(t, "hi", variables={"chat_template": "other"}).text == "[hi]"
    with pytest.raises(ValueError, match="variables is 'Monday'; give a dict"):
        chat.encode_row(t, "hi", variables="Monday")


def test_a_tokenizer_with_its_own_rendering_renders_itself():
    seen = []

    class Own(type(s.byte_tokenizer())):
        def apply_chat_template(self, messages, tokenize, add_generation_prompt, **options):
            seen.append(options)
            if len(messages) > 1:
                raise TypeError("one at a time")
            return f"<{messages[0]['content']}>" + "!" * add_generation_prompt

    t = s.byte_tokenizer()
    t.__class__ = Own
    assert chat.encode_row(t, "hi", thinking=True, variables={"x": 1}).text == "<hi>!"
    assert chat.encode_row(t, "hi", reply=False).text == "<hi>"
    assert seen[0] == {"enable_thinking": True, "x": 1}
    with pytest.raises(ValueError, match="rejects the conversation: TypeError: one at a time"):
        chat.encode_row(t, says("a", "b", "c"))


def test_a_token_beyond_the_models_vocabulary_is_refused():
    model = types.SimpleNamespace(tokenizer=s.byte_tokenizer(),
                                  config=types.SimpleNamespace(vocab_size=257))
    assert chat.encode(model.tokenizer, ["hi"]).tokens.max() == 257
    with pytest.raises(ValueError, match="257"):
        chat.encode(model, ["hi"])


@pytest.mark.parametrize(("given", "words"), [
    (b"hi", "talks is a single string"), ({"role": "user"}, "talks is a single message"),
    ({"hi"}, "talks is {'hi'}; give a list"), (np.array(3), "talks is array"),
    ([5, 6], "talks is a single conversation"), ([np.int32(5)], "talks is a single conversation"),
    (iter([]), "talks is empty"),
    (chat.Row(np.zeros(1, int), np.zeros(1, int), np.zeros(1, int), ""), "talks is a single Row"),
])
def test_what_is_no_list_of_conversations_is_refused_by_name(given, words):
    with pytest.raises(ValueError, match=words):
        chat.listed(given, "talks")
    assert chat.listed(x for x in ["a", [1]]) == ["a", [1]]


@pytest.mark.parametrize("mixed", [[{"role": "user", "content": "Hi."}, "Who?"], ["Who?", 5]])
def test_a_list_of_mixed_types_is_one_conversation_and_refused(mixed):
    with pytest.raises(ValueError, match="is a single conversation; wrap it in a list"):
        chat.listed(mixed)


def test_a_system_prompt_before_a_blank_message_is_followed_by_no_blank_line():
    """Test a template without a system role that renders contents as they are."""
    source = chat_templates.TEMPLATES["gemma2"].replace(" | trim", "")
    t = with_template(tokenizer_of("gemma2"), source)
    for blank in ("", " "):
        row = chat.encode_row(t, says(blank, system="Be far."))
        assert f"user\nBe far.{blank}<end_of_turn>" in row.text
    row = chat.encode_row(t, says("hi", system=" "))
    assert "user\nhi<end_of_turn>" in row.text  # and a blank system prompt is left out
