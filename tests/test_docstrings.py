"""The examples in the docstrings of the public names run, and every name has one."""

from __future__ import annotations

import doctest
import functools
import inspect
import logging

import pytest

import jaxpersona as jp
from jaxpersona.persona.monitor import Monitor

FUNCTIONS = {f"plot.{name}": getattr(jp.plot, name) for name in jp.plot.__all__} | {
    f"capture.{name}": getattr(jp.capture, name) for name in jp.capture.__all__
    if name != "chosen_layers"} | {
    "capture.Capture.before_edits": jp.capture.Capture.before_edits, "Monitor": Monitor}
# token tests are values of one class, and a module of them; `Where` has the example
NAMES = {name: getattr(jp, name) for name in jp.__all__
         if not isinstance(getattr(jp, name), jp.Where) and name not in ("where", "plot")}


@pytest.fixture(autouse=True, scope="module")
def one_model():
    """Examples load `mini` each; here they share it, and its compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jp, "load", functools.cache(jp.load))
        logger = logging.getLogger("jaxpersona")
        before = logger.level
        logger.setLevel(logging.ERROR)
        from jaxpersona.report import style

        with style.without_pyplot():
            yield
        logger.setLevel(before)


@pytest.mark.parametrize("name", [*NAMES, *FUNCTIONS])
def test_the_example_of_a_public_name_runs(name):
    value = {**NAMES, **FUNCTIONS}[name]
    text = inspect.getdoc(value) if inspect.ismodule(value) else value.__doc__
    assert text and ">>>" in text, f"jp.{name} has no example"
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    report: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(example, out=report.append)
    assert tried and not failed, "".join(report)


@pytest.mark.parametrize("name", NAMES)
def test_help_has_no_addresses(name):
    value = NAMES[name]
    if callable(value) and value.__doc__:
        try:
            shown = str(inspect.signature(value))
        except ValueError:  # an exception class
            return
        assert " at 0x" not in shown and "<class" not in shown and "object object" not in shown
