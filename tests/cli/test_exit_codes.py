"""The exit code and the last line of a command that fails, and how lines are printed."""

from __future__ import annotations

import signal
import sys
import warnings

import jax
import pytest
import support as s

from jaxpersona import interrupt
from jaxpersona.cli import main, output
from jaxpersona.errors import UserError


class PanicException(BaseException):
    """The name of the exception of the Rust code of tokenizers."""


class Left(BaseException):
    """Raised in place of the end of a process."""


@pytest.fixture
def fails(monkeypatch):
    """Return a function that makes every command raise an error."""
    def use(error):
        def app(_):
            raise error

        monkeypatch.setattr(main, "app", app)

    return use


@pytest.mark.parametrize(("error", "code", "wanted"), [
    (UserError("a is\n  b"), 2, "error: a is b"),
    (OSError(13, "Permission denied", "out/run.json"), 2, "error: out/run.json: Permission denied"),
    (OSError("the disk is gone"), 2, "error: the disk is gone"),
    (MemoryError(), 2, "error: out of memory (no details); use a smaller batch, shorter replies or "
                       "a smaller model"),
    (MemoryError("5 GB"), 2, "error: out of memory (5 GB); use a smaller batch, shorter replies or "
                             "a smaller model"),
    (interrupt.Stopped(signal.SIGTERM), 143, "stopped; nothing was written"),
    (interrupt.Stopped(signal.SIGINT), 130, "stopped; nothing was written"),
    (KeyboardInterrupt(), 130, "stopped; the state of the output files is unknown"),
    (PanicException("bad"), 2, "error: the tokenizer failed on a text (bad); its tokenizer.json is "
                               "damaged, or contains a regular expression that cannot be run"),
])
def test_an_expected_error_is_one_line_with_its_exit_code(fails, capsys, error, code, wanted):
    """The line is on standard error, and nothing is on standard output."""
    fails(error)
    assert s.run_command([]) == code
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", wanted + "\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), GeneratorExit("a bug")])
def test_a_bug_keeps_its_exception(fails, error):
    """Python prints its traceback."""
    fails(error)
    with pytest.raises(type(error), match="a bug"):
        main.main([])


@pytest.mark.parametrize(("error", "code", "line"), [
    (UserError("wrong"), 2, "error: wrong"),
    (interrupt.Stopped(signal.SIGTERM), 143, "stopped; nothing was written"),
    (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
    (jax.errors.JaxRuntimeError("no\n answer " + "x" * 300), 3,
     f"error: another process of this run ended or cannot be reached (no answer {'x' * 190}); to "
     "resume from the saved results, restart all processes with the same command")])
def test_one_of_several_processes_leaves_without_waiting(fails, monkeypatch, capsys, error, code,
                                                         line):
    """The code is 3 if another process failed; a normal exit could block."""
    def leave(given):
        raise Left(given)

    monkeypatch.setattr("jaxpersona.distributed.processes.joined", lambda: True)
    monkeypatch.setattr("jaxpersona.distributed.processes.leave", leave)
    fails(error)
    with pytest.raises(Left) as left:
        main.main([])
    assert left.value.args == (code,) and capsys.readouterr().err.splitlines()[-1] == line


def test_the_arguments_of_a_call_reach_the_command_line(monkeypatch):
    """Without arguments, typer reads those of the process."""
    seen = []
    monkeypatch.setattr(main, "app", seen.append)
    main.main(["plan"])
    main.main()
    assert seen == [["plan"], None]


def test_warnings_of_a_command_are_single_lines(capsys):
    """The earlier format is restored afterwards, but not over that of another program."""
    before = warnings.showwarning
    with warnings.catch_warnings(action="always"):
        with output.prepared():
            warnings.warn("two\n  lines \x1b[2J", UserWarning, stacklevel=1)
        assert warnings.showwarning is before
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", "warning: two lines \\x1b[2J\n")

        def other(*_, **__):
            """The format of another program."""

        with output.prepared():
            warnings.showwarning = other
        assert warnings.showwarning is other
        warnings.showwarning = before


def test_lines_cells_and_headings_have_no_control_characters(capsys):
    """Markup in a heading is escaped, and a cell shows it literally."""
    output.say("a\x1b", 5)
    output.say("b", error=True)
    output.write("c\x07")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a\\x1b\n5\nc\\x07", "b\n")
    assert output.heading("[bold]\x1b") == "\\[bold]\\x1b"
    assert output.cell("[bold]\x1b").plain == "[bold]\\x1b"
    assert output.console().file is sys.stdout and output.console(error=True).file is sys.stderr
