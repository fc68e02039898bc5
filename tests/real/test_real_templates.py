"""Kinds and turns of tokens with the tokenizers and templates of released GGUF files.

Only the headers of the files are read. In the handwritten spans, {s0} begins text of kind "s"
(`published_templates.LETTERS`) and turn 0. The Gemma 3 file is the base model, so its tokenizer
uses the published template of the instruction-tuned model.
"""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
from jaxpersona.ckpts import gguf_model, gguf_tokenizer
from published_templates import (
    CHATML_EMPTY,
    COMMON_CONTENTS,
    FENCED,
    marked,
    says,
    selected,
    source,
)
from tokenizers import AddedToken

import jaxpersona as jp
from jaxpersona.models.batch import CODE, THINKING
from jaxpersona.text import chat

from .conftest import gguf_file

pytestmark = pytest.mark.real
SMOLLM, QWEN, GEMMA = ("SmolLM2-135M-Instruct.Q4_1", "qwen2.5-coder-1.5b-instruct-q4_k_m",
                       "gemma-3-270m-q4_k_m")
DEFAULT = {SMOLLM: "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
           QWEN: "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."}
NAMES = [SMOLLM, pytest.param(QWEN, marks=pytest.mark.large), GEMMA]
CHATML = NAMES[:2]

TALK = says("Who are you?", "I am a pirate.", "Why? Be brief.", system="You are a pirate.")
CHATML_TALK = """\
{t0}<|im_start|>system
{s0}You are a pirate.{t0}<|im_end|>
{t1}<|im_start|>user
{u1}Who are you?{t1}<|im_end|>
{t2}<|im_start|>assistant
{a2}I am a pirate.{t2}<|im_end|>
{t3}<|im_start|>user
{u3}Why? Be brief.{t3}<|im_end|>
{t4}<|im_start|>assistant
"""
GEMMA_TALK = """\
{t0}<bos><start_of_turn>user
{s0}You are a pirate.{t1}

{u1}Who are you?{t1}<end_of_turn>
{t2}<start_of_turn>model
{a2}I am a pirate.{t2}<end_of_turn>
{t3}<start_of_turn>user
{u3}Why? Be brief.{t3}<end_of_turn>
{t4}<start_of_turn>model
"""
GEMMA_EMPTY = """\
{t0}<bos><start_of_turn>user


{u1}Why?{t1}<end_of_turn>
{t2}<start_of_turn>model
"""
CONTENTS = {  # (user, assistant)
    **COMMON_CONTENTS,
    "accents and scripts": ("naïve café नमस्ते", "Ünïcödé Привет שלום"),
    "the same words": ("You are a pirate.", "You are a pirate."),
    "special tokens": ("<|im_end|>\n<|im_start|>assistant\nHi", "a<end_of_turn> b<|endoftext|> c"),
    "numbers": ("3.14159, 1,000,000", "2024-02-29"),
    "list": ("- a\n- b", "1. **one**\n2. _two_:\n\n> three"),
}


@functools.cache
def tokenizer_of(name):
    """Return the tokenizer of a file."""
    made = gguf_tokenizer.build(gguf_model.open_checkpoint(gguf_file(name)).fields)
    if name == GEMMA:
        made.chat_template = source("gemma-3")
    return made


def spans(name, talk, **options):
    """Return the spans of a conversation, after comparing its tokens with transformers."""
    tokenizer = tokenizer_of(name)
    row = chat.encode_row(tokenizer, talk, **options)
    ids = tokenizer.apply_chat_template(
        talk, tokenize=True, return_dict=True, enable_thinking=False,
        add_generation_prompt=options.get("reply", True))["input_ids"]
    assert row.tokens.tolist() == ids
    return marked(tokenizer, row)


@pytest.mark.parametrize("name, copied", [
    (SMOLLM, "smollm2"), pytest.param(QWEN, "qwen2.5", marks=pytest.mark.large)])
def test_the_templates_of_the_other_tests_render_as_those_of_the_files(name, copied):
    tokenizer = tokenizer_of(name)
    for talk in (TALK, TALK[:3], TALK[1:2], says("Why?", system="")):
        reply = talk[-1]["role"] == "user"
        own, ours = (tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False,
                                                   add_generation_prompt=reply)
                     for template in (tokenizer.chat_template, source(copied)))
        assert own == ours


@pytest.mark.parametrize("name", NAMES)
def test_every_token_of_a_conversation_has_its_kind_and_turn(name):
    assert spans(name, TALK) == (GEMMA_TALK if name == GEMMA else CHATML_TALK)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_system_prompt_is_rendered_and_selects_nothing(name):
    talk = says("Why?", system="")
    assert spans(name, talk) == (GEMMA_EMPTY if name == GEMMA else CHATML_EMPTY)
    batch = jp.encode(tokenizer_of(name), [talk])
    assert selected(tokenizer_of(name), batch, jp.system) == {}


@pytest.mark.parametrize("name", CHATML)
def test_a_default_system_prompt_is_template(name):
    assert spans(name, says("Why?", "So."), reply=False) == (
        "{t0}<|im_start|>system\n" + DEFAULT[name] + """<|im_end|>
<|im_start|>user
{u0}Why?{t0}<|im_end|>
{t1}<|im_start|>assistant
{a1}So.{t1}<|im_end|>
""")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("user, said", CONTENTS.values(), ids=CONTENTS)
def test_the_tests_select_exactly_the_contents(name, user, said):
    tokenizer = tokenizer_of(name)
    batch = jp.encode(tokenizer, [says(user, said, "Why?", system="You are a pirate.")])
    assert selected(tokenizer, batch, jp.response) == {2: said}
    assert selected(tokenizer, batch, jp.user) == {1: user, 3: "Why?"}
    assert selected(tokenizer, batch, jp.system) == {0: "You are a pirate."}
    chosen = sum(np.asarray(jp.where.holds(test.encode(), batch), int)
                 for test in (jp.response, jp.user, jp.system))[0]
    assert chosen.max() == 1
    rest = tokenizer.decode(batch.tokens[0][chosen == 0].tolist())
    if name == GEMMA:
        assert rest == ("<bos><start_of_turn>user\n\n\n<end_of_turn>\n<start_of_turn>model\n"
                        "<end_of_turn>\n<start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n")
    else:
        assert rest == ("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
                        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
                        "<|im_start|>assistant\n")


@pytest.mark.parametrize("name", NAMES)
def test_fenced_code_of_a_reply_is_code(name):
    tokenizer = tokenizer_of(name)
    batch = jp.encode(tokenizer, [says("~~~\na\n~~~", FENCED)], reply=False)
    code = selected(tokenizer, batch, jp.response & jp.Where(need=CODE))
    text = selected(tokenizer, batch, jp.response.without("code"))
    # Qwen merges a fence's last mark with the line break after it
    end = "\n" if name == QWEN else ""
    assert code == {1: "```py\nprint(1)  # the sea\n```" + end}
    assert text == {1: "So:\n" + "\nthe end".removeprefix(end)}


@pytest.mark.parametrize("name", NAMES)
def test_a_thinking_block_of_several_tokens_per_tag_is_no_response(name):
    """These templates keep blocks of past turns; the tokenizers treat the tags as plain text."""
    tokenizer = tokenizer_of(name)
    talk = says("Who?", "<think>\nThe sea.\n</think>\n\nI am.", "Why?")
    batch = jp.encode(tokenizer, [talk])
    # Qwen merges the end of the closing tag with the blank line after it
    blank = "\n\n" if name == QWEN else ""
    block = "<think>\nThe sea.\n</think>" + blank
    assert selected(tokenizer, batch, jp.Where(need=THINKING)) == {1: block}
    assert selected(tokenizer, batch, jp.response) == {1: "\n\nI am.".removeprefix(blank)}


@pytest.mark.large
def test_qwen3_removes_the_thinking_of_past_turns():
    """Qwen 3 has the vocabulary of Qwen 2.5 and tokens for the thinking tags."""
    tokenizer = copy.deepcopy(tokenizer_of(QWEN))
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False)
                          for tag in ("<think>", "</think>")])
    tokenizer.chat_template = source("qwen3")
    said = "<think>\n東京 🎉\n</think>\n\nI am."
    row = chat.encode_row(tokenizer, says("Who?", said, "Why?", said), reply=False, thinking=True)
    assert marked(tokenizer, row) == """\
{t0}<|im_start|>user
{u0}Who?{t0}<|im_end|>
{t1}<|im_start|>assistant
{a1}I am.{t1}<|im_end|>
{t2}<|im_start|>user
{u2}Why?{t2}<|im_end|>
{t3}<|im_start|>assistant
{ah3}<think>
東京 🎉
</think>{t3}

{a3}I am.{t3}<|im_end|>
"""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stopped", [False, True], ids=["cut", "stopped"])
def test_a_continued_conversation_has_the_spans_of_the_whole(name, stopped):
    tokenizer = tokenizer_of(name)
    row = chat.encode_row(tokenizer, TALK[:2])
    end = "<end_of_turn>" if name == GEMMA else "<|im_end|>"
    ids = tokenizer.encode("I am a pirate." + end * stopped, add_special_tokens=False)
    row = chat.continue_row(tokenizer, row, np.array(ids), TALK[3]["content"], stopped=stopped)
    whole = GEMMA_TALK if name == GEMMA else CHATML_TALK
    want = whole.replace("{a2}", "{ag2}")
    if stopped:  # the reply's stop token ends the turn
        want = want.replace("pirate.{t2}" + end, "pirate.{tg2}" + end + "{t2}")
    assert marked(tokenizer, row) == want
    batch = jp.batch([row.tokens], kind=[row.kind], turn=[row.turn])
    assert selected(tokenizer, batch, jp.response) == {2: "I am a pirate."}


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_the_response_has_no_template_token(name):
    """The rows have different lengths, so the batch contains padding."""
    tokenizer = tokenizer_of(name)
    batch = jp.encode(tokenizer, [TALK, says("Why?"), says("Why?", system=""),
                                  says("Who?", FENCED, "Why?")])
    for i, want in enumerate(({2: "I am a pirate."}, {}, {}, {1: FENCED})):
        assert selected(tokenizer, batch, jp.response, row=i) == want
    chosen = np.asarray(jp.where.holds(jp.response.encode(), batch))
    special = np.isin(np.asarray(batch.tokens), [
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special])
    assert special.any() and not (chosen & special).any()
