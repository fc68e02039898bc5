"""Malformed ids, conversations and texts raise errors, and code in model folders never runs."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import json
import logging
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.tokenizer import read_tokenizer

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role, Trait
from jaxpersona.engine import prompts
from jaxpersona.interventions.where import everywhere, prompt, user
from jaxpersona.judges.judges import NoJudge
from jaxpersona.persona.extract import extract_axis
from jaxpersona.persona.talk import grow, project_conversation
from jaxpersona.text import chat
from jaxpersona.text.chat import Row
from jaxpersona.training import learn
from jaxpersona.vectors.vector import Vector

ROOT = pathlib.Path(__file__).parents[2]
TALK = [{"role": "user", "content": "hi <|tool|>"}, {"role": "assistant", "content": "so"}]


@functools.cache
def model():
    """Return a model with 258 embedding rows and a tokenizer with 259 tokens."""
    tokenizer = copy.deepcopy(s.byte_tokenizer())
    tokenizer.add_tokens(["<|tool|>"])
    return dataclasses.replace(s.tiny_model(vocab_size=258, stop_ids=(257,)), tokenizer=tokenizer)


def bare_row(ids):
    return Row(np.array(ids, np.int32), np.zeros(len(ids), np.int32), np.zeros(len(ids), np.int32),
               "")


@pytest.mark.parametrize("call", [
    lambda m: jp.encode(m, [TALK[:1]]),
    lambda m: jp.generate(m, [TALK[:1]], max_new_tokens=1, batch_size=1),
    lambda m: jp.generate(m, ["<|tool|>"], max_new_tokens=1, batch_size=1),
    lambda m: jp.extract(m, [TALK]),
    lambda m: project_conversation(m, TALK, [Vector(np.ones((3, 32)))]),
], ids=["encode", "generate", "generate a string", "extract", "project"])
def test_a_token_that_the_model_lacks_is_named(call):
    with pytest.raises(ValueError, match=r"token id 258 \('<\|tool\|>'\).*0…257"):
        call(model())


@pytest.mark.parametrize("wrong", [258, -1, 2**31 - 1])
def test_ids_outside_the_embedding_are_refused(wrong):
    m = model()
    for call in (
        lambda: jp.extract(m, [[5, wrong]]), lambda: jp.extract(m, [bare_row([5, wrong])]),
        lambda: jp.generate(m, [[5, wrong]], max_new_tokens=1, batch_size=1),
        lambda: jp.generate(m, [bare_row([5, wrong])], max_new_tokens=1, batch_size=1),
        lambda: jp.batch([[5, 6], [5, wrong]], vocabulary=258),
        lambda: jp.forward(m.params, m.config, unchecked([[5, wrong]])),
        lambda: jp.forward(m.params, m.config,
                           jax.tree.map(jnp.asarray, unchecked([[5, wrong]]))),
        lambda: learn.fit(m, learn.Direction(32, [1]), lambda out, batch: 0.0,
                          [unchecked([[5, wrong]])], steps=1),
    ):
        with pytest.raises(ValueError, match=f"token id {wrong}"):
            call()


def unchecked(ids):
    ids = np.array(ids, np.int32)
    return dataclasses.replace(jp.batch(np.zeros_like(ids)), tokens=ids)


def test_ids_that_a_compiled_program_cannot_refuse_give_nan():
    m = model()
    for wrong in (258, 10**6, -1):
        out = np.asarray(s.run(m.params, m.config, unchecked([[5, 6, wrong], [5, 6, 7]])).logits)
        assert np.isnan(out[0, 2]).all() and np.isfinite(out[1]).all()


@pytest.mark.parametrize(("tokens", "wanted"), [
    ([1, 2, 3], "single row of ids; give a list of rows"), (np.arange(3), "single row of ids"),
    ("hello", "tokens is 'hello'"), (["hello"], "row 0 of tokens is 'hello'"),
    ([[1], ["2"]], "row 1 of tokens"), ([[1.5]], "give integers"), (None, "tokens is None"),
    (5, "tokens is 5"), ([[2**31]], "token id 2147483648"), ([[2**32 + 5]], "token id 4294967301"),
    ([[1], [-1]], "row 1 of tokens contains the token id -1"), ([None], "row 0 of tokens"),
    ([[True, False]], "give integers"), ([[[1], [2, 3]]], "give integers"),
])
def test_a_batch_takes_token_ids_alone(tokens, wanted):
    with pytest.raises(ValueError, match=wanted):
        jp.batch(tokens)


ONE = (
    ("hello", "a single string"), (b"hello", "a single string"), (None, "is None"), (5, "is 5"),
    (TALK, "a single conversation; wrap it in a list"), (TALK[0], "is a single message"),
    ([5, 6, 7], "a single conversation"), (np.arange(5), "a single conversation"),
    (np.array(5), "array"),
    ([], "is empty"), ((x for x in ()), "is empty"), ({"a", "b"}, "give a list"),
    (bare_row([5]), "a single Row"), (object(), "give a list"),
)


@pytest.mark.parametrize(("given", "wanted"), ONE, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("call", [jp.encode, jp.extract, jp.generate])
def test_one_conversation_in_place_of_several_is_refused(call, given, wanted):
    with pytest.raises(ValueError, match=wanted) as caught:
        call(model(), given)
    assert "conversations" in str(caught.value)


@pytest.mark.parametrize("item", [None, b"hi", 1.5, {5, 6}, object(), {"role": "user"}, [[5], [6]],
                                  [[5], [6, 7]], ["a", "b"], [TALK[0], "x"], [1.5], np.array(5.0)],
                         ids=lambda x: type(x).__name__)
def test_no_other_form_of_a_conversation_is_taken(item):
    for call in (jp.extract, jp.generate):
        with pytest.raises(ValueError):
            call(model(), [item])


def test_any_iterable_of_conversations_is_taken():
    m = model()
    talks = [[{"role": "user", "content": "hi"}], "so"]
    for call, read in (
        (lambda c: jp.encode(m, c), lambda out: out.tokens),
        (lambda c: jp.extract(m, c, capture=jp.capture.mean(user)),
         lambda out: out.captured["mean"]),
        (lambda c: jp.generate(m, c, max_new_tokens=2, batch_size=2, ids=iter([1, 2])),
         lambda out: np.array([t.size for t in out.tokens])),
    ):
        want = np.asarray(read(call(talks)))
        for form in (tuple(talks), iter(talks), dict(enumerate(talks)).values()):
            assert np.array_equal(want, np.asarray(read(call(form))))
    assert prompts.encode(m, iter([5, 6])).tokens.tolist() == [5, 6]
    for ids in ("ab", 5, [1.5, 2.5]):
        with pytest.raises(ValueError, match="ids"):
            jp.generate(m, talks, ids=ids, max_new_tokens=1, batch_size=2)


def test_one_text_in_place_of_several_is_refused():
    m, vector = model(), Vector(np.ones((3, 32)))
    role, asked = Role("pirate", ("You are a pirate.",), ""), Question(0, "Who?")
    default = Role("default", ("",), "")
    for call, wanted in (
        (lambda: Role("pirate", "You are a pirate.", ""), "prompts of role 'pirate'"),
        (lambda: Role("pirate", (None,), ""), "prompts of role 'pirate'"),
        (lambda: Trait("kind", (("a", "b"),), "Who?", ""), "questions of trait 'kind'"),
        (lambda: Trait("kind", ("ab",), ("Who?",), ""), "pair 0 of trait 'kind'"),
        (lambda: Trait("kind", (("a", "b", "c"),), ("Who?",), ""), "length 3"),
        (lambda: extract_axis(m, role, [asked], "x", judge=NoJudge()), "roles is Role"),
        (lambda: extract_axis(m, [default, role], "Who?", "x", judge=NoJudge()),
         "questions is 'Who"),
        (lambda: extract_axis(m, [default, role], ["Who?"], "x", judge=NoJudge()),
         r"questions\[0\] is 'Who"),
        (lambda: extract_axis(m, "ab", [asked], "x", judge=NoJudge()), "roles is 'ab'"),
        (lambda: extract_axis(m, [default, role], None, "x", judge=NoJudge()), "questions is None"),
        (lambda: extract_axis(m, [default, role], [asked], "x", judge=NoJudge(),
                              held_out="pirate"), "held_out is one string"),
        (lambda: grow(m, [[]], "hi", vector), "messages is a single string"),
        (lambda: grow(m, [[]], ["hi"], vector), r"messages\[0\] is 'hi'"),
        (lambda: grow(m, ["You are"], [["hi"]], vector), r"openings\[0\] is 'You are'"),
        (lambda: grow(m, [[], []], [["hi"]], vector), "openings has 2 entries"),
        (lambda: grow(m, [[], []], [["a"], ["b", "c"]], vector), "the same number of messages"),
        (lambda: grow(m, [[]], [[]], vector), "at least one"),
        (lambda: project_conversation(m, None, [vector]), "is None"),
        (lambda: project_conversation(m, "hi", [vector]), "no assistant message"),
        (lambda: learn.fit(m, learn.Direction(32, [1]), None, None, steps=1), "batches is None"),
        (lambda: learn.fit(m, learn.Direction(32, [1]), None, ["x"], steps=1), r"batches\[0\]"),
    ):
        with pytest.raises(ValueError, match=wanted):
            call()


def test_a_reading_without_tokens_is_said(caplog):
    m = model()
    asked, said = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "hi"},
                                                        {"role": "assistant", "content": "so"}]
    for capture in (None, jp.capture.last(jp.response), jp.capture.moments(np.ones((1, 32)))):
        with pytest.raises(ValueError, match=r"selects no token in conversations 0, 1 \(2 of 2\)"):
            jp.extract(m, [asked, "so"], capture=capture)
    with pytest.raises(ValueError, match="where="):
        jp.extract(m, [[5, 6, 7]])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jaxpersona"):
        out = jp.extract(m, [said, asked, said])
        assert ("capture 'mean' selects no token in conversation 1 (1 of 3), so its value is NaN; "
                "add tokens that where= selects (by default") in caplog.text
        assert np.isnan(out.captured["mean"][1]).all()
        assert np.isfinite(out.captured["mean"][[0, 2]]).all()
        caplog.clear()
        jp.extract(m, [said], capture=jp.capture.mean() | jp.capture.norms(user))
        jp.extract(m, [asked], capture=jp.capture.mean(prompt))
        assert not caplog.text
        # a batch without replies
        batch = jp.encode(m, [asked, asked])
        for name, read in (("mean", jp.capture.mean()), ("last", jp.capture.last(jp.response)),
                           ("mean", jp.capture.mean(turns=2)),
                           ("moments", jp.capture.moments(np.ones((1, 32))))):
            caplog.clear()
            found = s.run(m.params, m.config, batch, capture=read).captured[name]
            assert not caplog.text
            _ = found.value
            assert (f"capture {name!r} selects no token in rows 0, 1 (2 of 2), so their values are "
                    "NaN; add tokens that where= selects (by default, the content of assistant "
                    "messages; for last, any token)") in caplog.text
        # an empty reply
        caplog.clear()
        stop = dataclasses.replace(m, stop_ids=tuple(range(258)))
        out = jp.generate(stop, [asked, asked], capture=jp.capture.mean(), batch_size=4,
                          max_new_tokens=3)
        assert out.text == ["", ""] and np.isnan(out.captured["mean"]).all()
        assert "capture 'mean' selects no token in conversations 0, 1 (2 of 2)" in caplog.text


@pytest.mark.parametrize(("tokens", "reading"), [
    ([5, 6, 7], jp.capture.mean(everywhere, turns=2)),  # the second message has no tokens
    ([5], jp.capture.last(everywhere)),  # the last token is also the first of its row
], ids=["one message of two", "one token"])
def test_a_reading_with_tokens_is_not_said_to_have_none(caplog, tokens, reading):
    tiny = s.tiny_model()
    rows = jp.batch([tokens], turn=[[0] * len(tokens)])
    (found,) = s.run(tiny.params, tiny.config, rows, capture=reading).captured.values()
    value = np.asarray(found.value)
    assert np.isfinite(value[:, :, 0]).all()
    assert not np.asarray(found.empty).any() and not caplog.text


CODE = ("import pathlib\npathlib.Path({!r}).write_text('run')\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n")


@pytest.mark.parametrize("native", [True, False], ids=["with a class of transformers", "without"])
def test_no_code_of_a_tokenizers_folder_is_run_or_asked_for(tmp_path, native):
    """The terminal would answer "y", and the folder's module would write a file."""
    folder, trace = tmp_path / "m", tmp_path / "trace"
    s.byte_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(str(trace)))
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    if not native:
        own["tokenizer_class"] = "Own"
        (folder / "config.json").write_text(json.dumps({
            "model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoTokenizer": [
                "own.Own", "own.Own"]}}))
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    code = ("import pathlib, sys; from jaxpersona.ckpts.tokenizer import read_tokenizer\n"
            f"try: print('read', len(read_tokenizer(pathlib.Path({str(folder)!r}))))\n"
            "except ValueError as error: print('refused', error)")
    out = subprocess.run([sys.executable, "-c", code], input="y\ny\ny\n", text=True, timeout=120,
                         capture_output=True)
    assert not trace.exists() and "[y/N]" not in out.stdout + out.stderr
    assert out.stdout.startswith("read 258" if native else ("read", "refused")), out.stderr
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("template", [5, True, ["a"]])
def test_a_template_that_is_no_text_is_refused_with_its_file(tmp_path, template):
    s.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)  # otherwise it would be read instead
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with pytest.raises(ValueError, match="chat_template|cannot be read") as caught:
        read_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_code_that_a_tokenizer_needs_is_refused_in_one_line(tmp_path, monkeypatch):
    import transformers

    def needs(folder, **options):
        assert options["trust_remote_code"] is False and options["local_files_only"] is True
        raise ValueError("execute the file\nset the option `trust_remote_code=True`")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="needs remote code.*never run") as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_from_pretrained_forbids_remote_code():
    """Without `trust_remote_code=False`, transformers may ask at the terminal."""
    found = 0
    for folder in ("jaxpersona", "kernels", "ckpts", "bench", "examples", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                        "from_pretrained",):
                    given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                    assert given.get("trust_remote_code", None) is False, f"{path}:{node.lineno}"
                    found += 1
    assert found >= 3


def test_encode_takes_a_bare_tokenizer():
    ids = chat.encode(model().tokenizer, [TALK[:1]]).tokens
    assert 258 in np.asarray(ids)  # without a model, ids are not limited


def test_commands_work_without_a_home_folder(tmp_path):
    """Containers run as a user that the user database lacks, and without HOME."""
    code = """
import os, pwd, sys
def absent(uid):
    raise KeyError("uid not found")
pwd.getpwuid = absent
from jaxpersona.cli.main import main
for arguments in (["--version"], ["data", "show", "role", "mirror"],
                  ["plan", "--model", "~/model", "--topology", "v5e:2x2"],
                  ["generate", "Hello", "--max-new-tokens", "2", "--adapter", "~/adapter"],
                  ["generate", "Hello", "--max-new-tokens", "2"]):
    try:
        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    print("code", code)
"""
    known = {name: value for name, value in os.environ.items()
             if name not in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME")}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           timeout=300, check=False, cwd=tmp_path, env=known)
    assert found.returncode == 0 and "Traceback" not in found.stderr, found.stderr
    codes = [line for line in found.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 0", "code 0", "code 2", "code 2", "code 0"]
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all("~/" in line for line in errors)
