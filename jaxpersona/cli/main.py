"""The command `jaxpersona`, its subcommands, and its exit codes."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from jaxpersona import interrupt, progress
from jaxpersona.cli import output
from jaxpersona.cli.axis import axis
from jaxpersona.cli.chat import chat
from jaxpersona.cli.data import app as data_app
from jaxpersona.cli.demo import demo
from jaxpersona.cli.generate import generate
from jaxpersona.cli.judge import app as judge_app
from jaxpersona.cli.plan import plan
from jaxpersona.cli.project import project
from jaxpersona.cli.report import report
from jaxpersona.cli.runs import app as runs_app
from jaxpersona.cli.status import status
from jaxpersona.cli.vectors import app as vectors_app
from jaxpersona.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Measure, steer and cap a language model's persona.")


def _version(wanted: bool) -> None:
    if wanted:
        import jax

        import jaxpersona

        output.say(f"jaxpersona {jaxpersona.__version__} (jax {jax.__version__})")
        raise typer.Exit


@app.callback()
def _before(version: Annotated[bool, typer.Option(
        "--version", is_eager=True, callback=_version,
        help="Print the versions of jaxpersona and JAX, and exit.")] = False) -> None:
    """Handle the options that precede a command."""


app.add_typer(vectors_app, name="vectors")
app.add_typer(data_app, name="data")
app.add_typer(judge_app, name="judge")
app.add_typer(runs_app, name="runs")
for command in (axis, status, report, generate, chat, project, demo, plan):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    If an argument is invalid, a file cannot be read or written, the tokenizer fails on a text, or
    memory is exhausted, the program prints an error message to standard error and exits with code
    2. After SIGINT or SIGTERM, it prints which results were saved and exits with code 128 plus the
    signal number. If another process of the same run fails, the exit code is 3. Any other exception
    is a bug: its traceback is printed, and the exit code is 1.

    Args:
      arguments: the command-line arguments; None uses `sys.argv[1:]`.
    """
    with output.prepared(), interrupt.raised(), progress.muted():
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    from jaxpersona.distributed import processes

    try:
        app(arguments)
    except (UserError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {error.strerror}"
        _fail(message)
    except MemoryError as error:
        _fail(f"out of memory ({str(error) or 'no details'}); use a smaller batch, shorter "
              "replies or a smaller model")
    except (interrupt.Stopped, KeyboardInterrupt) as stop:
        kept = getattr(stop, "kept", "the state of the output files is unknown")
        output.say(f"stopped; {kept}", error=True)
        code = getattr(stop, "code", 130)
        if processes.joined():  # a normal exit would wait for processes that may be blocked
            processes.leave(code)
        sys.exit(code)
    except Exception as error:
        if not processes.joined():
            raise
        import traceback

        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            traceback.print_exc()
            processes.leave(1)
        reason = " ".join(str(error).split())[:200]
        output.say(f"error: another process of this run ended or cannot be reached ({reason}); "
                   "to resume from the saved results, restart all processes with the same command",
                   error=True)
        processes.leave(3)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by the Rust code of `tokenizers`
            raise
        _fail(f"the tokenizer failed on a text ({error}); its tokenizer.json is damaged, or "
              "contains a regular expression that cannot be run")


def _fail(message: str) -> NoReturn:
    """Print an error as one line and exit with code 2."""
    from jaxpersona.distributed import processes

    output.say(f"error: {' '.join(message.split())}", error=True)
    if processes.joined():
        processes.leave(2)
    sys.exit(2)


if __name__ == "__main__":
    main()
