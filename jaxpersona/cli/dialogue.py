"""The dialogue of `jaxpersona chat`: read messages and commands, and print replies."""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxpersona import interrupt
from jaxpersona.brief import count
from jaxpersona.cli import support
from jaxpersona.cli.output import say
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.persona.session import Piece, Session, Turn

# maximum number of characters in a line of standard input, several times the length of an English
# text of a million tokens
LONGEST_LINE = 1 << 24

HELP = """\
/compare        generate the last reply again, without and with the interventions
/edits on|off   turn the interventions on or off for the next replies (also: /cap on|off)
/undo           remove the last message and its reply
/reset          remove all messages, but keep the system prompt
/system [TEXT]  set the system prompt; without TEXT, remove it
/save FILE      write the conversation, with projections and settings, as JSON
/load FILE      continue a saved conversation, or a JSON list of messages
/help           show this list
/quit           leave (also: Ctrl-D)
To send a message that begins with /, type //. Ctrl-C cancels a reply."""


class Dialogue:
    """A loop that reads messages and commands from standard input and prints replies.

    Replies are printed to standard output, and all other text to standard error. If both standard
    input and standard output are terminals, an error is printed as one line and the dialogue
    continues; otherwise, the first error ends the program.
    """

    def __init__(self, session: Session) -> None:
        """Create a dialogue for a session."""
        self.session = session
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.reading = self.cancelled = False
        self.written = "nothing was written"

    def run(self) -> None:
        """Run the dialogue until the input ends or contains /quit.

        Raises:
          UserError: standard input or standard output is not a terminal, and a line is invalid or
            its command or reply fails.
        """
        with interrupt.keeping(lambda: self.written):
            self._run()

    def _run(self) -> None:
        self._greet()
        if not self.interactive:
            for line in _lines():
                if not self._step(line):
                    return
            return
        with contextlib.suppress(ImportError):  # without readline, `input` has no history
            import readline  # noqa: F401 - `input` uses it
        with interrupt.intercepted(self._interrupt):
            while True:
                try:
                    line = self._ask()
                except EOFError:
                    say("")
                    return
                except KeyboardInterrupt:
                    say("", "(press Ctrl-D or type /quit to leave)")
                    continue
                except UserError as error:
                    say(f"error: {error}", error=True)
                    continue
                try:
                    if not self._step(line):
                        return
                except (UserError, OSError) as error:
                    say(f"error: {' '.join(str(error).split())}", error=True)

    def _ask(self) -> str:
        """Read a line from the terminal; during the call, Ctrl-C raises KeyboardInterrupt.

        Raises:
          UserError: the line is not valid text in the terminal's encoding.
        """
        self.reading = True
        try:
            return input("you> ")
        except UnicodeDecodeError as error:
            raise UserError(f"the line is not valid {error.encoding}; type it again") from None
        finally:
            self.reading = False

    def _interrupt(self) -> None:
        """Handle Ctrl-C: discard the current input line, or cancel the current reply."""
        if self.reading:
            raise KeyboardInterrupt
        self.cancelled = True

    def _step(self, line: str) -> bool:
        """Process one line of input; return whether the dialogue continues."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, *rest = text.split(None, 1)
            return self._command(name, *rest)
        if text:
            self._reply(text[1:] if text.startswith("//") else text)
        return True

    def _command(self, name: str, value: str = "") -> bool:
        """Run a command such as /save; return whether the dialogue continues.

        Raises:
          UserError: the command is unknown or fails, or its value is missing or invalid.
        """
        session = self.session
        takes = {"/save": "FILE", "/load": "FILE", "/edits": "on or off", "/cap": "on or off",
                 "/system": ""}
        if takes.get(name) and not value:
            raise UserError(f"{name} needs a value: {name} {takes[name]}")
        if value and name in ("/quit", "/help", "/compare", "/undo", "/reset"):
            raise UserError(f"{name} takes no value; to send a message that begins with /, type //")
        match name:
            case "/quit":
                return False
            case "/help":
                say(HELP, error=True)
            case "/compare":
                self._compare()
            case "/edits" | "/cap":
                self._switch(value)
            case "/undo":
                removed = session.undo()
                say(f"removed: {_short(removed.message)}", error=True)
            case "/reset":
                session.turns.clear()
                say("the conversation is empty", error=True)
            case "/system":
                session.system = value or None
                say("the system prompt is set" if value else "there is no system prompt",
                    error=True)
            case "/save":
                self._save(_path(value))
            case "/load":
                self._load(_path(value))
            case _:
                raise UserError(f"{name[:40]} is unknown; /help lists the commands")
        return True

    def _greet(self) -> None:
        """Print the model, the interventions, an explanation of projections, and a hint."""
        session, monitor = self.session, self.session.monitor
        say(repr(session.model), error=True)
        if session.edits.edits:
            say(f"interventions: {session.edits!r}", error=True)
        if monitor is not None:
            say(f"projection: {monitor.sentence}", error=True)
            usual = ", ".join(f"{low:+.2f} to {high:+.2f} at layer {layer}"
                              for layer, (low, high) in monitor.usual.items())
            if usual:
                say(f"half of the default persona's replies have projections of {usual}",
                    error=True)
        if self.interactive:
            say("/help lists the commands; press Ctrl-D to leave", error=True)

    def _reply(self, text: str) -> None:
        """Generate and print the reply to a message.

        Raises:
          UserError: the message is invalid, the conversation leaves no room for a reply in the
            model's context, or activations are not finite.
        """
        from jaxpersona.persona.session import ContextFull

        self.cancelled = False
        try:
            turn = self._print(self.session.reply(text, self._is_cancelled))
        except ContextFull as error:
            raise UserError(f"{error} (/undo, /reset)") from None
        if turn is None:
            say("(cancelled; the message is not kept)", error=True)
        else:
            say(f"  [{self._note(turn)}]", error=True)

    def _compare(self) -> None:
        """Generate the last reply again without and with the interventions, and print both."""
        self.cancelled = False
        both = self.session.compare(self._is_cancelled)
        for name in ("without", "with"):
            say(f"{name} interventions:", error=True)
            turn = self._print(_first(both))
            if turn is None:
                say("(cancelled)", error=True)
                return
            say(f"  [{self._note(turn)}]", error=True)

    def _is_cancelled(self) -> bool:
        return self.cancelled

    def _print(self, pieces: Iterator[Piece]) -> Turn | None:
        """Print a streamed reply; return the turn, or None if the reply was cancelled."""
        turns: list[Turn | None] = [None]

        def texts() -> Iterator[str]:
            for piece in pieces:
                turns[0] = piece.turn
                yield piece.text

        support.stream(texts())
        return turns[0]

    def _note(self, turn: Turn) -> str:
        """Describe a reply by its projections, length, changed activations and context length."""
        session = self.session
        context = session.model.config.max_context
        parts = []
        if session.monitor is not None:
            parts.append(session.monitor.words(turn.projections))
        ended = ""
        if turn.finish == "length":
            ended = (", ended because the context is full" if turn.context >= context else
                     ", ended by --max-new-tokens")
        parts.append(f"{count(turn.tokens, 'token')}{ended}")
        if session.edits.edits:
            changed = sum(sum(one.changed) for one in turn.edits)
            seen = sum(one.seen * len(one.layers) for one in turn.edits)
            parts.append(f"{changed} of {seen} activations changed" if turn.edited else
                         "interventions off")
        parts.append(f"context {turn.context:,} of {context:,}")
        return "; ".join(parts)

    def _switch(self, value: str) -> None:
        """Turn the interventions on or off for the next replies.

        Raises:
          UserError: the value is neither "on" nor "off", or there are no interventions.
        """
        if value not in ("on", "off"):
            raise UserError(f"{value[:40]!r} is neither on nor off; give on or off")
        if not self.session.edits.edits:
            raise UserError("there are no interventions: start the chat with --cap, --steer or "
                            "--spec")
        self.session.edited = value == "on"
        say(f"the next replies are generated with{'' if value == 'on' else 'out'} the "
            "interventions", error=True)

    def _save(self, file: pathlib.Path) -> None:
        """Write the session to a JSON file.

        Raises:
          UserError: the path contains a null character or is a folder, or the file cannot be
            written.
        """
        from jaxpersona.ckpts.files import atomic
        from jaxpersona.persona.transcript import record

        if "\0" in str(file):
            raise UserError("the file name contains a null character; remove it")
        if file.is_dir():
            raise UserError(f"{file} is a folder; give the name of a file")
        with atomic(file) as temporary:
            temporary.write_text(json.dumps(record(self.session), indent=1) + "\n", "utf-8")
        self.written = f"{file} was written"
        say(f"wrote {file}: {count(len(self.session.turns), 'turn')}", error=True)

    def _load(self, file: pathlib.Path) -> None:
        """Continue with the conversation and system prompt in a JSON file.

        Raises:
          UserError: the file cannot be read, or contains no valid conversation.
        """
        from jaxpersona.inputs import read_json
        from jaxpersona.persona.transcript import restore

        try:
            kept = restore(self.session, read_json(file))
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(f"{file}") else f"{file}: {text}") from None
        say(f"read {file}: {count(len(self.session.turns), 'turn')}"
            + ("" if kept else "; its projections were not restored, because they are missing or "
                               "belong to another model, direction or set of layers"), error=True)


def _first(both: Iterator[tuple[bool, Piece]]) -> Iterator[Piece]:
    """Yield the pieces of the next reply of a comparison (`Session.compare`)."""
    for _, piece in both:
        yield piece
        if piece.turn is not None:
            return


def _lines() -> Iterator[str]:
    """Yield the lines of standard input.

    Raises:
      UserError: the input is not valid text in its encoding, or a line has more than
        `LONGEST_LINE` characters.
    """
    try:
        while line := sys.stdin.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                raise UserError(f"standard input has a line of more than {LONGEST_LINE:,} "
                                "characters; give shorter lines")
            yield line
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not valid {error.encoding} ({error.reason}); give "
                        "text in that encoding") from None


def _path(value: str) -> pathlib.Path:
    """Return the path of a file, with a leading ~ or ~NAME replaced by the home folder.

    Raises:
      UserError: the home folder is unknown.
    """
    try:
        return pathlib.Path(value).expanduser()
    except (RuntimeError, ValueError):  # unknown user, or a null character in a user name
        raise UserError(f"{value[:80]!r}: the home folder is unknown; give the path without ~"
                        ) from None


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 60 else f"{flat[:57]}…"
