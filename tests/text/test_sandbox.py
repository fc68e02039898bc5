"""Untrusted chat templates: resource limits, and one-line errors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time

import chat_templates
import numpy as np
import pytest

from jaxpersona.text import chat, sandbox

ENDLESS = ("{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
           "{% endfor %}{% endfor %}{% endfor %}")
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}" \
           "{% endfor %}{{ n.s }}"
NESTED = "{% set n = namespace(s=['x']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}" \
         "{% endfor %}{{ n.s }}"


@pytest.fixture(autouse=True)
def empty_cache():
    sandbox._cache.clear()


@pytest.fixture(scope="module")
def tokenizer():
    return chat_templates.make_tokenizer("chatml")


def with_template(tokenizer, template):
    out = copy.deepcopy(tokenizer)
    out.chat_template = template
    return out


@pytest.fixture
def bounds(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    monkeypatch.setattr(sandbox, "MEMORY", 400 << 20)
    monkeypatch.setattr(sandbox, "CHARACTERS", 1 << 20)


@pytest.mark.parametrize(("template", "wanted"), [
    (ENDLESS, "takes more than 0.5 s"),
    ("{{ 10 ** (10 ** 9) }}", "takes more than 0.5 s|MiB of memory"),
    ("{{ '%9999999999d' % 1 }}", "memory|OverflowError|width too big"),
    ("{{ 'x' * 30000000000 }}", "MiB of memory"),
    ("{{ 'x'.center(30000000000) }}", "MiB of memory"),
    ("{{ 'x' | center(30000000000) }}", "MiB of memory"),
    ("{{ [0] * 30000000000 }}", "MiB of memory"),
    (DOUBLING, "memory|rendering takes more"), (NESTED, "memory|rendering takes more"),
    ("{{ 'x' * 2000000 }}", "has 2,000,000 characters; the limit is 1,048,576"),
])
def test_no_template_runs_for_ever_or_fills_memory(tokenizer, bounds, template, wanted):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=wanted) as caught:
        chat.encode_row(with_template(tokenizer, template), "Who?")
    assert "chat template" in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - started < 60
    # the next template renders normally
    assert chat.encode_row(tokenizer, "Who?").text.startswith("<|im_start|>user\nWho?")


def test_the_renderings_of_one_conversation_are_bounded_together(tokenizer, monkeypatch):
    """The time limit applies to all renderings of one conversation together."""
    slow = chat_templates.CHATML + ("{% for a in range(300) %}{% for b in range(3000) %}"
                                    "{% endfor %}{% endfor %}")
    asked, real = [], sandbox._Worker.ask

    def ask(self, request, wait=None):
        reply = real(self, request, wait)
        asked.append(reply.get("seconds"))
        return reply

    monkeypatch.setattr(sandbox._Worker, "ask", ask)
    t = with_template(tokenizer, slow)
    chat.encode_row(t, "Who?")
    used = [seconds for seconds in asked if seconds is not None]
    assert len(used) > 1 and min(used) > 1e-3
    monkeypatch.setattr(sandbox, "SECONDS", sum(used) / len(used) * 1.5)
    chat.encode_row(tokenizer, "Who?")  # starts a new process with the new limit
    asked.clear()
    sandbox._cache.clear()
    with pytest.raises(ValueError, match="renderings of one conversation take more|"
                       "rendering takes more"):
        chat.encode_row(t, "Who?")
    assert len(asked) < len(used)
    chat.encode_row(tokenizer, "Who?")  # the next conversation has a new time limit


def test_an_error_of_a_template_names_where_it_comes_from(tokenizer):
    t = with_template(tokenizer, "{{ raise_exception('no') }}")
    t.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"rejects the conversation: no \(some/model\)"):
        chat.encode_row(t, "Who?")


@pytest.mark.parametrize("template", [
    "{{ 1 / 0 }}", "{{ 'x' + 1 }}", "{{ messages[9].role.x }}", "{% for %}", "{{ x | absent }}",
    "{{ 'x'.encode('utf-9') }}", "{{ '{'.format() }}", "{{ int('x') }}", "{{ [].pop() }}",
    "{{ ().__class__.__bases__ }}", "{{ raise_exception('line one\nline two') }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ range(10 ** 9) | list }}",
    "{{ strftime_now(5) }}", "{{ messages | tojson(indent=[]) }}", "{{ 'x' | int(base=99) }}",
    "{% include 'x' %}", "{{ namespace(_x=1) }}", "{{ '\udc80' }}",
])
def test_any_error_of_a_template_is_one_line(tokenizer, template):
    with pytest.raises(ValueError) as caught:
        chat.encode_row(with_template(tokenizer, template), "Who?")
    assert "\n" not in str(caught.value)


def test_renders_what_transformers_renders(tokenizer):
    """Filters, globals, blocks, variables and whitespace match transformers exactly."""
    template = (
        "{%- set n = namespace(k=0) -%}\n  {% for m in messages %}\n{% if m.role == 'tool' %}"
        "{% continue %}{% endif %}{% set n.k = n.k + 1 %}{{ n.k }}{{ m.content | trim }}\n"
        "{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}\n"
        "{{ {'a<b': 'é'} | tojson }}{{ {'b': [1], 'a': 2} | tojson(indent=1, sort_keys=true) }}"
        "{{ {'b': 'é', 'a': 2} | tojson(ensure_ascii=true, separators=(';', '=')) }}"
        "{{ dict(a=1).items() | list }}{{ day }}{{ tools is none }}"
        "{% generation %}[{{ messages[0].role }}]{% endgeneration %}{{ eos_token }}"
        "{{ strftime_now('%Y') }}{{ enable_thinking }}{{ missing is defined }}\n\n")
    t = with_template(tokenizer, template)
    talk = [{"role": "user", "content": " Who?\n"}, {"role": "assistant", "content": "é🎉"},
            {"role": "user", "content": "Why?"}]
    row = chat.encode_row(t, talk, variables={"day": "26 Jul"})
    assert row.text == t.apply_chat_template(talk, tokenize=False, add_generation_prompt=True,
                                             day="26 Jul", enable_thinking=False)
    named = with_template(tokenizer, {"default": chat_templates.CHATML, "other": "x" + template})
    assert chat.encode_row(named, "Who?").text == chat.encode_row(tokenizer, "Who?").text
    with pytest.raises(ValueError, match="variable 'day' is <object"):
        chat.encode_row(t, talk, variables={"day": object()})


def test_values_of_numpy_are_those_of_python():
    given = {"n": np.int64(3), "x": np.float32(0.5), "on": np.bool_(False), "a": np.arange(2)}
    assert sandbox.render("{{ n + 1 }} {{ x }} {{ on }} {{ a }}", given) == "4 0.5 False [0, 1]"


def test_a_conversation_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "CHARACTERS", 100)
    with pytest.raises(ValueError, match=r"have \d+ characters, but the limit is 100; shorten"):
        sandbox.render("{{ a }}", {"a": "x" * 100})
    assert len(sandbox._encoded("x" * 98)) == 8 + 100  # with its quotes


def test_the_process_is_started_again_and_left_to_the_parent(tokenizer):
    chat.encode_row(tokenizer, "Who?")
    first = sandbox._current
    first.process.kill()
    first.process.wait()
    sandbox._cache.clear()
    chat.encode_row(tokenizer, "Who?")
    assert sandbox._current is not first
    kept = sandbox._current
    sandbox._forget()  # as in a forked child
    sandbox._cache.clear()
    try:
        chat.encode_row(tokenizer, "Who?")
        assert sandbox._current is not kept and kept.process.poll() is None
    finally:
        sandbox._current.end()
        sandbox._current = kept
    assert chat.encode_row(tokenizer, "Who?").tokens.size


def test_a_process_that_cannot_be_started_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(sandbox, "_current", None)
    monkeypatch.setattr(sandbox.sys, "executable", os.devnull)
    with pytest.raises(ValueError, match="could not be started"):
        chat.encode_row(tokenizer, "Who?")


def talk(count, content, last=()):
    said = [content] * count + list(last)
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(said)]


@pytest.mark.parametrize("template", [
    None, chat_templates.CHATML, chat_templates.GEMMA2, chat_templates.QWEN3,
    "{% for m in messages %}{{ m.content.strip('\n') + '\n\n' }}{% endfor %}"],
    ids=["base", "chatml", "gemma2", "qwen3", "strips"])
def test_encoding_takes_time_in_proportion_to_the_conversation(tokenizer, template, monkeypatch):
    """The test counts renderings and search steps instead of measuring time."""
    from jaxpersona.text import template as module

    t = with_template(tokenizer, template)
    rendered = [0]
    real = module.Template.__call__

    def counted(self, messages, reply):
        rendered[0] += len(messages)
        return real(self, messages, reply)

    monkeypatch.setattr(module.Template, "__call__", counted)
    for content, last in (("\n\n\n\n", [""]), (" \n \n", [""]), ("the sea", []), ("\n\na\n", []),
                          ("<think>a</think>b", [])):
        counts, took = [], []
        for count in (200, 800):
            rendered[0], begun = 0, time.process_time()
            chat.encode_row(t, talk(count, content, last), reply=False)
            counts.append(rendered[0])
            took.append(time.process_time() - begun)
        assert counts[1] < 6 * counts[0]
        assert took[1] < 1.5, content  # about 0.1 s, or minutes if quadratic


def answering(script):
    """Return a worker whose process runs a different program."""
    made = object.__new__(sandbox._Worker)
    made.limits = (0.5, sandbox.MEMORY, sandbox.CHARACTERS)
    made.process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE)
    made.sink, made.source = made.process.stdin, made.process.stdout
    return made


def test_an_answer_is_bounded_in_time_and_size():
    """A slow answer times out, and an oversized one is rejected."""
    slow = answering("import sys, time\n"
                     "sys.stdout.buffer.write((100).to_bytes(8, 'little'))\n"
                     "for _ in range(100): sys.stdout.buffer.write(b' '); sys.stdout.flush(); "
                     "time.sleep(0.2)")
    began = time.monotonic()
    assert "takes more than" in slow.ask(b"", 3.0)["error"]
    assert time.monotonic() - began < 10 and slow.process.poll() is not None
    large = answering("import sys\nout = sys.stdout.buffer\n"
                      "out.write((1 << 40).to_bytes(8, 'little'))\n"
                      "while True: out.write(bytes(1 << 20))")
    assert "process exited" in large.ask(b"", 60.0)["error"]
    assert large.process.poll() is not None


def test_an_interrupted_rendering_gives_its_answer_to_no_later_one(monkeypatch):
    assert sandbox.render("{{ a }}", {"a": "first"}) == "first"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sandbox._Worker, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sandbox.render("{{ a }}", {"a": "second"})
    assert sandbox.render("{{ a }}", {"a": "third"}) == "third"


@pytest.mark.parametrize("template", ["{% set n = namespace() %}{% set n._x = 1 %}x",
                                      "{% set n = namespace(_x=1) %}x"])
def test_a_namespace_holds_no_name_with_a_leading_underscore(tokenizer, template):
    with pytest.raises(ValueError, match="namespace attribute '_x' is not allowed"):
        chat.encode_row(with_template(tokenizer, template), "Who?")


def asked(monkeypatch):
    """Count the requests that reach the worker."""
    count, ask = [], sandbox._Worker.ask

    def counted(self, request, wait=None):
        count.append(request)
        return ask(self, request, wait)

    monkeypatch.setattr(sandbox._Worker, "ask", counted)
    return count


@pytest.mark.parametrize("family", ["chatml", "gemma2", "mistral"])
def test_conversations_of_one_form_share_all_but_one_rendering(family, monkeypatch):
    tokenizer = chat_templates.make_tokenizer(family)
    talks = [[{"role": "system", "content": f"You are {i}."},
              {"role": "user", "content": f"Who is {i} times {i}?"}] for i in range(20)]
    alone = []
    for talk in talks:
        sandbox._cache.clear()
        alone.append(chat.encode_row(tokenizer, talk))
    sandbox._cache.clear()
    count = asked(monkeypatch)
    chat.encode_row(tokenizer, talks[0])
    first = len(count)
    together = [chat.encode_row(tokenizer, talk) for talk in talks[1:]]
    assert len(count) - first == len(talks) - 1 < first * 19
    for one, other in zip(alone[1:], together, strict=True):
        assert one.text == other.text
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.kind.tolist() == other.kind.tolist()
        assert one.turn.tolist() == other.turn.tolist()


@pytest.mark.parametrize("expression", [
    "strftime_now('%H:%M:%S.%f')", "lipsum(n=1)",
    "(range(99999) | random) ~ (range(99999) | random) ~ (range(99999) | random)"])
def test_a_rendering_by_the_clock_or_by_chance_is_not_cached(expression, monkeypatch):
    count = asked(monkeypatch)
    template = "{{ " + expression + " }}"
    assert sandbox.render(template, {}) != sandbox.render(template, {})
    assert not sandbox._cache and len(count) >= 2


def test_a_refusal_is_cached_and_a_limit_is_not(monkeypatch, bounds):
    count = asked(monkeypatch)
    for _ in range(2):
        with pytest.raises(sandbox.Refused, match="no system"):
            sandbox.render("{{ raise_exception('no system') }}", {})
    refused = [request for request in count if b"no system" in request]
    assert len(refused) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="characters"):
            sandbox.render("{{ 'x' * 2000000 }}", {})
    assert len([request for request in count if b"2000000" in request]) == 2


def test_the_cache_is_bounded(monkeypatch):
    asked(monkeypatch)
    for i in range(sandbox._CACHED + 40):
        assert sandbox.render("{{ i }}", {"i": i}) == str(i)
    assert len(sandbox._cache) == sandbox._CACHED
    sandbox.render("{{ i }}", {"i": "x" * sandbox._CACHED_BYTES})
    assert all(len(request) <= sandbox._CACHED_BYTES for request in sandbox._cache)
    for request in list(sandbox._cache)[-3:]:
        assert sandbox._cache[request]["seconds"] == 0
