"""The program that renders chat templates: its answers, limits and messages, without a process."""

from __future__ import annotations

import io
import json
import types

import numpy as np
import pytest

from jaxpersona.text import sandbox, sandbox_worker

LIMITS = {"memory": 400 << 20, "characters": 3, "seconds": 1.0}


def answer(template, **variables):
    return sandbox_worker.answer({"template": template, "variables": variables}, {}, LIMITS)


def test_a_rendering_may_have_the_largest_length():
    """One character more is an error that is no refusal."""
    assert answer("{{ a }}", a="abc") == {"text": "abc"}
    assert answer("{{ a }}", a="abcd") == {
        "error": "the rendering has 4 characters; the limit is 3", "refused": False}


@pytest.mark.parametrize(("template", "wanted"), [
    ("{{ raise_exception('no') }}", ("no", True)), ("{{ 1 / 0 }}", ("ZeroDivisionError: ", True)),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", ("infinite recursion", False)),
    ("{{ boom() }}", ("'boom' is undefined", True))])
def test_errors_of_a_template_are_refusals_and_limits_are_not(template, wanted):
    """`takes_system` takes a refusal as an answer."""
    found = answer(template)
    assert found["error"].startswith(wanted[0]) and found["refused"] is wanted[1]


def test_too_little_memory_is_a_limit(monkeypatch):
    """The message has the limit in MiB."""
    class Full:
        def render(self, **_):
            raise MemoryError

    assert sandbox_worker.answer({"template": "t", "variables": {}}, {"t": Full()}, LIMITS) == {
        "error": "rendering needs more than 400 MiB of memory", "refused": False}


def test_one_compiled_template_is_kept():
    """That of the last request."""
    known = {}
    for template in ("{{ 1 }}", "{{ 2 }}", "{{ 2 }}"):
        sandbox_worker.answer({"template": template, "variables": {}}, known, LIMITS)
        assert list(known) == [template]


def test_messages_have_their_length_first():
    """The end of the stream, or of its last message, is no message."""
    stream = io.BytesIO()
    sandbox_worker.write(stream, {"text": "é\ud800"})
    sandbox_worker.write(stream, [1])
    data = stream.getvalue()
    assert int.from_bytes(data[:8], "little") == len('{"text": "é'.encode()) + 3 + 2
    stream = io.BytesIO(data + b"\3\0\0")
    assert sandbox_worker.read(stream) == {"text": "é\ud800"} and sandbox_worker.read(stream) == [1]
    assert sandbox_worker.read(stream) is None


def test_a_table_is_built_as_by_python():
    """From pairs and from keys; private names of a namespace are refused."""
    table = sandbox_worker.Table()
    assert table([("a", 1)], b=2) == {"a": 1, "b": 2}
    assert table.fromkeys("ab", 0) == {"a": 0, "b": 0}
    made = sandbox_worker.Namespace({"a": 1}, self=2)
    made["b"] = 3
    with pytest.raises(Exception, match="namespace attribute '_c' is not allowed"):
        made["_c"] = 4


@pytest.mark.parametrize(("template", "varies"), [
    ("{{ strftime_now('%Y') | length }}", True), ("{{ [1] | random }}", True), ("{{ 1 }}", False)])
def test_the_program_answers_until_its_input_ends(monkeypatch, template, varies):
    """Each answer has its time, and whether the clock or chance was used."""
    source, sink = io.BytesIO(), io.BytesIO()
    for message in (LIMITS | {"characters": 10_000}, {"template": template, "variables": {}},
                    {"template": "{{ raise_exception('x' * 3000) }}", "variables": {}}):
        sandbox_worker.write(source, message)
    source.seek(0)
    timed = []
    monkeypatch.setattr(sandbox_worker.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sandbox_worker, "limit_process", lambda memory: timed.append(memory))
    monkeypatch.setattr(sandbox_worker, "limit_time", timed.append)
    monkeypatch.setattr(sandbox_worker.sys, "stdin", types.SimpleNamespace(buffer=source))
    monkeypatch.setattr(sandbox_worker.sys, "stdout", types.SimpleNamespace(buffer=sink))
    sandbox_worker.main()
    monkeypatch.undo()
    assert timed == [400 << 20, 1.0, 0, 1.0, 0]
    sink.seek(0)
    ready, first, second = (sandbox_worker.read(sink) for _ in range(3))
    assert ready == {"ready": True} and first["varies"] is varies and first["seconds"] >= 0
    assert first["text"] == ("4" if "now" in template else "1")
    assert second["error"] == "x" * 2000 and second["refused"] and second["varies"] is False


def test_json_is_written_as_transformers_writes_it():
    """Letters beyond ASCII as they are, without a change of the order of keys."""
    known = sandbox_worker.environment().from_string("{{ a | tojson }}")
    assert known.render(a={"b": "é<", "a": 1}) == '{"b": "é<", "a": 1}'


def test_values_that_json_does_not_know_are_converted_or_named():
    """NumPy's values and added tokens; any other object is an error with its name."""
    class AddedToken:
        def __str__(self):
            return "<s>"

    given = {"n": np.float32(0.5), "t": AddedToken(), "a": np.arange(2)}
    assert json.loads(sandbox._encoded({"variables": given})[8:]) == {
        "variables": {"n": 0.5, "t": "<s>", "a": [0, 1]}}
    with pytest.raises(ValueError, match="the template variable 'x' is .1.; use strings"):
        sandbox._encoded({"variables": {"a": 1, "x": {1}}})
    with pytest.raises(ValueError, match="the template variables are not JSON-serializable"):
        sandbox._encoded({"variables": {}, "other": {1}})


def test_nested_blocks_share_the_time_of_one_conversation(monkeypatch):
    """A later conversation has its own; a used budget is an error that is no refusal."""
    monkeypatch.setattr(sandbox, "SECONDS", 2.5)
    with sandbox.one_conversation():
        outer = sandbox._budget.get()
        assert outer == [2.5]
        with sandbox.one_conversation():
            assert sandbox._budget.get() is outer
        monkeypatch.setattr(sandbox, "_answer", lambda _: {"text": "a", "seconds": 2.5})
        assert sandbox.render("{{ 1 }}", {}) == "a" and outer == [0.0]
        with pytest.raises(ValueError, match="take more than 2.5 s in total") as used:
            sandbox.render("{{ 1 }}", {}, "some/model")
        assert not isinstance(used.value, sandbox.Refused)
        assert "(some/model); use another" in str(used.value)
    assert sandbox._budget.get() is None
    with sandbox.one_conversation():
        assert sandbox._budget.get() == [2.5]
