"""The command `jaxpersona`: one command, sub-commands, no logic of its own."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from jaxpersona import interrupt
from jaxpersona.cli import output
from jaxpersona.cli.axis import axis
from jaxpersona.cli.data import app as data_app
from jaxpersona.cli.demo import demo
from jaxpersona.cli.generate import generate
from jaxpersona.cli.plan import plan
from jaxpersona.cli.project import project
from jaxpersona.cli.vectors import app as vectors_app

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="Read and hold a language model's persona.")
app.add_typer(vectors_app, name="vectors")
app.add_typer(data_app, name="data")
for command in (axis, generate, project, demo, plan):
    app.command()(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    A user's mistake, or a file that the system refuses, is one line on standard error and exit
    code 2. A signal (SIGINT, SIGTERM) ends it with a line that says what is kept, and 128 and the
    signal's number.
    """
    # transformers advises to install PyTorch when it is imported; the command does not need it
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with output.prepared(), interrupt.raised():
        _run(arguments)


def _run(arguments: list[str] | None) -> None:
    from jaxpersona.distributed import processes

    try:
        app(arguments)
    except (ValueError, OSError) as error:
        said = str(error)
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}"
        _fail(said)
    except MemoryError as error:
        _fail(f"the memory does not suffice ({error or 'no more is known'}); make the batch, the "
              "replies or the model smaller")
    except (interrupt.Stopped, KeyboardInterrupt) as stop:
        kept = getattr(stop, "kept", "nothing is known of its files")
        output.say(f"stopped; {kept}", error=True)
        code = getattr(stop, "code", 130)
        if processes.joined():  # the others may wait for this one, and it must not wait for them
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
                   "start all of them again with the same command: what is written is kept",
                   error=True)
        processes.leave(3)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the tokenizers library, in Rust
            raise
        _fail(f"the tokenizer failed on a text ({error}); its tokenizer.json is damaged or its "
              "regular expression cannot be run")


def _fail(said: str) -> NoReturn:
    """Print a user's mistake in one line and end with code 2."""
    from jaxpersona.distributed import processes

    output.say(f"error: {' '.join(said.split())}", error=True)
    if processes.joined():
        processes.leave(2)
    sys.exit(2)


if __name__ == "__main__":
    main()
