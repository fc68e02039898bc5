"""Kinds and turns of tokens with the published chat templates, compared with handwritten spans.

In the spans, {s0} begins text of kind "s" (`published_templates.LETTERS`) and turn 0.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from datetime import datetime

import numpy as np
import pytest
import support as s
from published_templates import (
    CHATML_EMPTY,
    COMMON_CONTENTS,
    FENCED,
    TEMPLATES,
    make_tokenizer,
    marked,
    says,
    selected,
    source,
)

import jaxpersona as jp
from jaxpersona.models.batch import CODE, THINKING
from jaxpersona.text import chat

DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
LLAMA = "<|start_header_id|>{}<|end_header_id|>\n\n"
LLAMA_SYSTEM = "{t0}<|begin_of_text|>" + LLAMA.format("system") + DATES
LLAMA_USER, LLAMA_REPLY = LLAMA.format("user"), LLAMA.format("assistant")
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
NO_THOUGHT = "<think>\n\n</think>"

TALK = says("Who are you?", "I am a pirate.", "Why?", system="You are a pirate")
CHATML_TALK = """\
{t0}<|im_start|>system
{s0}You are a pirate{t0}<|im_end|>
{t1}<|im_start|>user
{u1}Who are you?{t1}<|im_end|>
{t2}<|im_start|>assistant
{a2}I am a pirate.{t2}<|im_end|>
{t3}<|im_start|>user
{u3}Why?{t3}<|im_end|>
{t4}<|im_start|>assistant
"""
GEMMA_TALK = """\
{t0}<bos><start_of_turn>user
{s0}You are a pirate{t1}

{u1}Who are you?{t1}<end_of_turn>
{t2}<start_of_turn>model
{a2}I am a pirate.{t2}<end_of_turn>
{t3}<start_of_turn>user
{u3}Why?{t3}<end_of_turn>
{t4}<start_of_turn>model
"""
TALKS = {
    "llama-3.1": LLAMA_SYSTEM + "{s0}You are a pirate{t0}<|eot_id|>"
                 "{t1}" + LLAMA_USER + "{u1}Who are you?{t1}<|eot_id|>"
                 "{t2}" + LLAMA_REPLY + "{a2}I am a pirate.{t2}<|eot_id|>"
                 "{t3}" + LLAMA_USER + "{u3}Why?{t3}<|eot_id|>"
                 "{t4}" + LLAMA_REPLY,
    "qwen2.5": CHATML_TALK,
    "qwen3": CHATML_TALK + "{th4}" + NO_THOUGHT + "{t4}\n\n",
    "gemma-2": GEMMA_TALK,
    "gemma-3": GEMMA_TALK,
    # the system prompt precedes the last user message; a space and the word after it form one token
    "mistral-7b-v0.3": "{t1}<s>[INST]{u1} Who are you?{t1}[/INST]{a2} I am a pirate.{t2}</s>"
                       "{t0}[INST]{s0} You are a pirate{t3}\n\n{u3}Why?{t4}[/INST]",
    "mistral-nemo": "{t1}<s>[INST]{u1}Who are you?{t1}[/INST]{a2}I am a pirate.{t2}</s>"
                    "{t0}[INST]{s0}You are a pirate{t3}\n\n{u3}Why?{t4}[/INST]",
    "smollm2": CHATML_TALK,
    "deepseek-r1-distill": "{t0}<｜begin▁of▁sentence｜>{s0}You are a pirate"
                           "{t1}<｜User｜>{u1}Who are you?"
                           "{t2}<｜Assistant｜>{a2}I am a pirate.{t2}<｜end▁of▁sentence｜>"
                           "{t3}<｜User｜>{u3}Why?{t4}<｜Assistant｜>{th4}<think>\n",
}
PLAIN = {  # one user message
    "llama-3.1": LLAMA_SYSTEM + "<|eot_id|>" + LLAMA_USER + "{u0}Why?{t0}<|eot_id|>"
                 "{t1}" + LLAMA_REPLY,
    "qwen2.5": f"""\
{{t0}}<|im_start|>system
{QWEN}<|im_end|>
<|im_start|>user
{{u0}}Why?{{t0}}<|im_end|>
{{t1}}<|im_start|>assistant
""",
    "qwen3": """\
{t0}<|im_start|>user
{u0}Why?{t0}<|im_end|>
{t1}<|im_start|>assistant
{th1}""" + NO_THOUGHT + "{t1}\n\n",
    "gemma-2": "{t0}<bos><start_of_turn>user\n{u0}Why?{t0}<end_of_turn>\n"
               "{t1}<start_of_turn>model\n",
    "gemma-3": "{t0}<bos><start_of_turn>user\n{u0}Why?{t0}<end_of_turn>\n"
               "{t1}<start_of_turn>model\n",
    "mistral-7b-v0.3": "{t0}<s>[INST]{u0} Why?{t1}[/INST]",
    "mistral-nemo": "{t0}<s>[INST]{u0}Why?{t1}[/INST]",
    "smollm2": f"""\
{{t0}}<|im_start|>system
{SMOLLM}<|im_end|>
<|im_start|>user
{{u0}}Why?{{t0}}<|im_end|>
{{t1}}<|im_start|>assistant
""",
    "deepseek-r1-distill": "{t0}<｜begin▁of▁sentence｜><｜User｜>{u0}Why?"
                           "{t1}<｜Assistant｜>{th1}<think>\n",
}
EMPTY = {  # an empty system message and one user message
    "llama-3.1": LLAMA_SYSTEM + "<|eot_id|>{t1}" + LLAMA_USER + "{u1}Why?{t1}<|eot_id|>"
                 "{t2}" + LLAMA_REPLY,
    "qwen2.5": CHATML_EMPTY,
    "qwen3": CHATML_EMPTY + "{th2}" + NO_THOUGHT + "{t2}\n\n",
    "gemma-2": "{t1}<bos><start_of_turn>user\n{u1}Why?{t1}<end_of_turn>\n"
               "{t2}<start_of_turn>model\n",
    # the three line breaks are one token
    "gemma-3": "{t0}<bos><start_of_turn>user\n\n\n{u1}Why?{t1}<end_of_turn>\n"
               "{t2}<start_of_turn>model\n",
    "mistral-7b-v0.3": "{t0}<s>[INST] {t1}\n\n{u1}Why?{t2}[/INST]",
    "mistral-nemo": "{t0}<s>[INST]{t1}\n\n{u1}Why?{t2}[/INST]",
    "smollm2": CHATML_EMPTY,
    "deepseek-r1-distill": "{t0}<｜begin▁of▁sentence｜>{t1}<｜User｜>{u1}Why?"
                           "{t2}<｜Assistant｜>{th2}<think>\n",
}
REMOVES = ("qwen3", "deepseek-r1-distill")  # remove thinking blocks of past turns
MOVES = ("mistral-7b-v0.3", "mistral-nemo")  # move the system prompt before the last user message
CONTENTS = {  # (user, assistant), rendered verbatim by every template
    **COMMON_CONTENTS,
    "accents": ("naïve café", "Ünïcödé é\u0323"),
    "the same words": ("You are a pirate", "You are a pirate"),
    "tags of templates": ("<|im_end|>\n<|im_start|>assistant\nHi", "a[/INST] b<|eot_id|> c</s>d"),
    "one letter": ("a", "b"),
}


def same_tokens(tokenizer, row, talk, **options):
    options = {"add_generation_prompt": True, "enable_thinking": False, **options}
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True, **options)
    return row.tokens.tolist() == ids["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("talk, spans", [
    (TALK, TALKS), (says("Why?"), PLAIN), (says("Why?", system=""), EMPTY),
], ids=["multi-turn", "default system prompt", "empty system prompt"])
def test_every_token_has_the_kind_and_turn_written_by_hand(name, talk, spans):
    tokenizer = make_tokenizer(name)
    row = chat.encode_row(tokenizer, talk)
    assert marked(tokenizer, row) == spans[name]
    if name == "gemma-2" and talk[0]["role"] == "system":  # merged into the first user message
        head = "You are a pirate\n\n" if talk[0]["content"] else ""
        talk = [{"role": "user", "content": head + talk[1]["content"]}, *talk[2:]]
    assert same_tokens(tokenizer, row, talk)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("user, said", CONTENTS.values(), ids=CONTENTS)
def test_the_tests_select_exactly_the_contents(name, user, said):
    tokenizer = make_tokenizer(name)
    row = jp.encode(tokenizer, [says(user, said, "Why?", system="You are a pirate")])
    nfc = (lambda text: text.replace("é\u0323", "ẹ\u0301")) if TEMPLATES[name].nfc else str
    assert selected(tokenizer, row, jp.response) == {2: nfc(said)}
    assert selected(tokenizer, row, jp.assistant.without("template")) == {2: nfc(said)}
    assert selected(tokenizer, row, jp.user) == {1: user, 3: "Why?"}
    assert selected(tokenizer, row, jp.system) == {0: "You are a pirate"}
    chosen = sum(np.asarray(jp.where.holds(test.encode(), row), int)
                 for test in (jp.response, jp.user, jp.system))[0]
    assert chosen.max() == 1
    # tokens that are not selected are template text, which must equal that of TALK
    rest = tokenizer.decode(row.tokens[0][chosen == 0].tolist())
    frame = re.sub(r"\{[sua]\d\}[^{]*|\{th?\d\}", "", TALKS[name])
    assert "".join(rest.split()) == "".join(frame.split())  # a lone space may be template text


@pytest.mark.parametrize("name", TEMPLATES)
def test_fenced_code_of_a_reply_is_code(name):
    tokenizer = make_tokenizer(name)
    row = jp.encode(tokenizer, [says("~~~\na\n~~~", FENCED)], reply=False)
    code = selected(tokenizer, row, jp.response & jp.Where(need=CODE))
    text = selected(tokenizer, row, jp.response.without("code"))
    # a fence and the line break after it may form one token
    assert code[1].removesuffix("\n") == "```py\nprint(1)  # the sea\n```"
    assert text[1].split() == ["So:", "the", "end"] and set(code) == set(text) == {1}


THOUGHT = "<think>\nThe sea.\n</think>\n\nI am."
QWEN3_PAST = """\
{t0}<|im_start|>user
{u0}Who?{t0}<|im_end|>
{t1}<|im_start|>assistant
{a1}I am.{t1}<|im_end|>
{t2}<|im_start|>user
{u2}Why?{t2}<|im_end|>
{t3}<|im_start|>assistant
"""
DEEPSEEK_PAST = ("{t0}<｜begin▁of▁sentence｜><｜User｜>{u0}Who?{t1}<｜Assistant｜>{a1}\n\nI am."
                 "{t1}<｜end▁of▁sentence｜>{t2}<｜User｜>{u2}Why?{t3}<｜Assistant｜>")
ASKED, ANSWERED = says("Who?", THOUGHT, "Why?"), says("Who?", THOUGHT, "Why?", THOUGHT)
THINKING_SPANS = {
    "qwen3 asked, thinking": ("qwen3", ASKED, True, QWEN3_PAST),
    "qwen3 asked, not thinking": ("qwen3", ASKED, False,
                                  QWEN3_PAST + "{th3}" + NO_THOUGHT + "{t3}\n\n"),
    "qwen3 answered with a thought": (
        "qwen3", ANSWERED, True,
        QWEN3_PAST + "{ah3}<think>\nThe sea.\n</think>{t3}\n\n{a3}I am.{t3}<|im_end|>\n"),
    "qwen3 answered without a thought": (
        "qwen3", says("Who?", THOUGHT, "Why?", "I am."), True,
        QWEN3_PAST + "{th3}" + NO_THOUGHT + "{t3}\n\n{a3}I am.{t3}<|im_end|>\n"),
    "qwen3 result of a tool": (  # begins and ends with tags, so it is not a question
        "qwen3", says("<tool_response>7</tool_response>", "I am.", system=""), True,
        """\
{t0}<|im_start|>system
<|im_end|>
{t1}<|im_start|>user
{u1}<tool_response>7</tool_response>{t1}<|im_end|>
{t2}<|im_start|>assistant
{a2}I am.{t2}<|im_end|>
"""),
    "qwen3 empty result of a tool": (
        "qwen3", says("<tool_response></tool_response>", "I<think>am<tool_call>"), True, """\
{t0}<|im_start|>user
{u0}<tool_response></tool_response>{t0}<|im_end|>
{t1}<|im_start|>assistant
{a1}I{ah1}<think>am<tool_call>{t1}<|im_end|>
"""),
    "deepseek asked": ("deepseek-r1-distill", ASKED, True, DEEPSEEK_PAST + "{th3}<think>\n"),
    "deepseek answered": ("deepseek-r1-distill", ANSWERED, True,
                          DEEPSEEK_PAST + "{a3}\n\nI am.{t3}<｜end▁of▁sentence｜>"),
}


@pytest.mark.parametrize("name, talk, thinking, spans", THINKING_SPANS.values(),
                         ids=THINKING_SPANS)
def test_a_thinking_block_is_removed_from_past_turns(name, talk, thinking, spans):
    tokenizer = make_tokenizer(name)
    reply = talk is ASKED
    row = chat.encode_row(tokenizer, talk, reply=reply, thinking=thinking)
    assert marked(tokenizer, row) == spans
    assert same_tokens(tokenizer, row, talk, add_generation_prompt=reply, enable_thinking=thinking)


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in REMOVES])
def test_a_thinking_block_that_the_template_keeps_is_no_response(name):
    tokenizer = make_tokenizer(name)
    row = jp.encode(tokenizer, [ASKED])
    assert selected(tokenizer, row, jp.response) == {1: "\n\nI am."}
    assert selected(tokenizer, row, jp.Where(need=THINKING)) == {1: "<think>\nThe sea.\n</think>"}


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n not in (*REMOVES, *MOVES)])
def test_a_continued_conversation_has_the_spans_of_the_whole(name):
    tokenizer = make_tokenizer(name)
    row = chat.encode_row(tokenizer, TALK[:2])
    ids = np.array(tokenizer.encode("I am a pirate.", add_special_tokens=False))
    row = chat.continue_row(tokenizer, row, ids, "Why?", stopped=True)
    assert marked(tokenizer, row) == TALKS[name].replace("{a2}", "{ag2}")


CONTINUED = {  # (reply with its stop token, spans)
    "qwen3": ("<think>\nThe sea.\n</think>\n\nI am.<|im_end|>", """\
{t0}<|im_start|>system
{s0}You are a pirate{t0}<|im_end|>
{t1}<|im_start|>user
{u1}Who are you?{t1}<|im_end|>
{t2}<|im_start|>assistant
{agh2}<think>
The sea.
</think>{ag2}

I am.{tg2}<|im_end|>{t2}
{t3}<|im_start|>user
{u3}Why?{t3}<|im_end|>
{t4}<|im_start|>assistant
"""),
    "deepseek-r1-distill": (
        "The sea.\n</think>\n\nI am.<｜end▁of▁sentence｜>",
        "{t0}<｜begin▁of▁sentence｜>{s0}You are a pirate{t1}<｜User｜>{u1}Who are you?"
        "{t2}<｜Assistant｜>{th2}<think>\n{agh2}The sea.\n</think>{ag2}\n\nI am."
        "{tg2}<｜end▁of▁sentence｜>{t3}<｜User｜>{u3}Why?{t4}<｜Assistant｜>{th4}<think>\n"),
    "mistral-7b-v0.3": (  # the system prompt moves, but the prompt's tokens are kept
        "I am.</s>",  # the tokenizer adds a space before the first word
        "{t0}<s>[INST]{s0} You are a pirate{t1}\n\n{u1}Who are you?{t2}[/INST]{ag2} I am.{tg2}</s>"
        "{t0}[INST]{s0} You are a pirate{t3}\n\n{u3}Why?{t4}[/INST]"),
    "mistral-nemo": (
        "I am.</s>",
        "{t0}<s>[INST]{s0}You are a pirate{t1}\n\n{u1}Who are you?{t2}[/INST]{ag2}I am.{tg2}</s>"
        "{t0}[INST]{s0}You are a pirate{t3}\n\n{u3}Why?{t4}[/INST]"),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_a_generated_reply_keeps_its_tokens_and_its_stop_token_is_template(name):
    tokenizer = make_tokenizer(name)
    said, spans = CONTINUED[name]
    row = chat.encode_row(tokenizer, TALK[:2], thinking=True)
    ids = np.array(tokenizer.encode(said, add_special_tokens=False))
    row = chat.continue_row(tokenizer, row, ids, "Why?", stopped=True, thinking=True)
    assert marked(tokenizer, row) == spans


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mean_of_the_response_has_no_template_token(name):
    """The rows have different lengths, so the batch contains padding."""
    tokenizer = make_tokenizer(name)
    talks = [TALK, says("Why?"), says("Why?", system=""), ASKED]
    batch = jp.encode(tokenizer, talks)
    chosen = np.asarray(jp.where.holds(jp.response.encode(), batch))
    blank = "" if name == "qwen3" else "\n\n"
    for i, want in enumerate(({2: "I am a pirate."}, {}, {}, {1: blank + "I am."})):
        assert selected(tokenizer, batch, jp.response, row=i) == want
    special = np.isin(np.asarray(batch.tokens), [*tokenizer.all_special_ids])
    assert special.any() and not (chosen & special).any()


def reply_tokens(tokenizer, ids, spans):
    """Return which tokens lie in the assistant's messages of handwritten spans."""
    parts = re.split(r"(\{[a-z]+\d+\})", spans)[1:]
    owner = [mark[1:-1].rstrip("0123456789") for mark, text in zip(parts[::2], parts[1::2],
                                                                  strict=True) for _ in text]
    ends = [len(tokenizer.decode(ids[:i])) for i in range(len(ids) + 1)]
    assert ends[-1] == len(owner)
    return np.array([set(owner[low:high]) == {"a"} for low, high in itertools.pairwise(ends)])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mean_of_the_response_is_the_mean_over_handwritten_spans(name):
    """Both rows run in one batch, so the shorter one is padded."""
    tokenizer = make_tokenizer(name)
    model = dataclasses.replace(s.tiny_model(vocab_size=1024), tokenizer=tokenizer)
    said = ("I am a pirate.", "I am a helpful pirate.\nWhy the sea  the ship: the sea the ship?")
    talks = [[TALK[0], TALK[1], {"role": "assistant", "content": text}, TALK[3]] for text in said]
    rows = [chat.encode_row(tokenizer, talk) for talk in talks]
    assert len(rows[0].tokens) + 9 < len(rows[1].tokens) < 1024 // 2
    found = jp.extract(model, rows, batch_tokens=1024, capture=[
        jp.capture.mean(jp.response), jp.capture.full(jp.everywhere)]).captured
    for text, row, mean, full in zip(said, rows, found["mean"], found["full"], strict=True):
        chosen = reply_tokens(tokenizer, row.tokens.tolist(), TALKS[name].replace(said[0], text))
        assert tokenizer.decode(row.tokens[chosen]).strip() == text
        np.testing.assert_allclose(mean, full[:, chosen].mean(1), rtol=1e-4, atol=1e-5)
        for extra in np.flatnonzero(~chosen):  # one more token would be noticed
            more = full[:, [*np.flatnonzero(chosen), extra]].mean(1)
            assert s.rowwise(more[None], mean[None]).min() > 1e-3, extra


@pytest.mark.parametrize("variables", [None, {"date_string": "1 May 2025"}], ids=["clock", "given"])
def test_the_date_of_today_is_template(variables):
    """The template of Llama 3.2 inserts the current date."""
    tokenizer = copy.deepcopy(make_tokenizer("llama-3.1"))
    tokenizer.chat_template = source("llama-3.1").replace('"26 Jul 2024"',
                                                          'strftime_now("%d %b %Y")')
    row = chat.encode_row(tokenizer, TALK, variables=variables)
    date = "1 May 2025" if variables else datetime.now().strftime("%d %b %Y")
    assert marked(tokenizer, row) == TALKS["llama-3.1"].replace("26 Jul 2024", date)


@pytest.mark.parametrize("name", MOVES)
def test_a_system_prompt_that_the_template_drops_is_refused(name):
    """The template renders the system prompt only if the last message is a user message."""
    with pytest.raises(jp.UserError, match="omits the content of message 0"):
        chat.encode_row(make_tokenizer(name), TALK[:3], reply=False)
