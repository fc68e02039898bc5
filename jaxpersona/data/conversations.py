"""Read prompts from a file: one user message per line, or conversations as JSON Lines."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxpersona.data.reading import Faults, kind, parse, read_text
from jaxpersona.errors import UserError
from jaxpersona.text import chat

Conversation = list[dict[str, str]]


def read_prompts(file: pathlib.Path, system: str | None = None) -> list[Conversation]:
    """Read the prompts in a file, each as a conversation to be continued by one reply.

    In a file named `*.jsonl`, each line is a JSON string (one user message), a list of messages
    {"role": …, "content": …}, or an object with such a list as `messages`, as in OpenAI's request
    format. Other keys of the object are ignored. In any other file, each line is a user message.
    Blank lines are skipped.

    Args:
      file: the file, in UTF-8.
      system: a system prompt to add to every conversation, or None.

    Raises:
      UserError: the file cannot be read, contains no prompt or has invalid lines; the message
        lists all invalid lines. If `system` is given, a conversation with a system message is
        invalid.
    """
    faults = Faults()
    text = read_text(file, faults)
    faults.raise_if_any(file)
    assert text is not None
    as_json = file.suffix == ".jsonl"
    # `str.splitlines` would also split at U+2028, which JSON allows inside strings
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    found: list[Conversation] = []
    for number, line in lines:
        at, before = f"line {number}", len(faults)
        value = parse(line, at, faults) if as_json else line.strip()
        if len(faults) == before:
            found.append(_conversation(value, system, at, faults))
    faults.raise_if_any(file)
    if not found:
        raise UserError(f"{file}: contains no prompt; write one prompt per line")
    return found


def _conversation(value: Any, system: str | None, at: str, faults: Faults) -> Conversation:
    """Return the messages of a line's value, `system` first if given; record errors in `faults`."""
    if isinstance(value, dict):
        if "messages" not in value:
            faults.append(f"{at}: the object has no messages; give {{\"messages\": […]}}")
            return []
        value = value["messages"]
    if not isinstance(value, (str, list)):
        faults.append(f"{at}: contains {kind(value)}; give a string, a list of messages, or an "
                      "object with messages")
        return []
    try:
        messages = chat.check_conversation(value)
    except UserError as error:
        faults.append(f"{at}: {error}")
        return []
    if not messages[-1]["content"].strip():
        faults.append(f"{at}: the last message is blank")
    if system is not None and messages[0]["role"] == "system":
        faults.append(f"{at}: has a system message; omit --system, or remove the message")
    elif system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return messages
