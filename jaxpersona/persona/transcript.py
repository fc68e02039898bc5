"""The JSON form of a session: its messages, projections and settings."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Annotated, Any

import pydantic
from pydantic import Field

from jaxpersona.brief import shown
from jaxpersona.errors import UserError
from jaxpersona.persona.monitor import EditCount
from jaxpersona.persona.session import Session, Turn
from jaxpersona.text import chat

FORMAT = "jaxpersona-chat 1"

_Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Edit(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)

    edit: str
    layers: list[_Count]
    seen: _Count
    changed: list[_Count]


class _Reply(pydantic.BaseModel):
    """The record of one reply, without its text, which is in `messages` of the session's record."""

    model_config = pydantic.ConfigDict(strict=True)

    finish: str
    tokens: _Count
    context: _Count
    edited: bool
    projections: dict[Annotated[int, Field(strict=False)],
                      Annotated[float, Field(allow_inf_nan=False)]]
    edits: list[_Edit]


def record(session: Session) -> dict[str, Any]:
    """Return a session as a JSON object.

    The field `messages` contains the conversation as a list that `jaxpersona project` can read. The
    field `replies` has one entry per assistant message.
    """
    replies = [dataclasses.asdict(turn) for turn in session.turns]
    for reply in replies:
        del reply["message"], reply["reply"]
    return {
        "format": FORMAT,
        "model": {"name": session.model.name, "fingerprint": session.model.fingerprint},
        "settings": session.settings,
        "interventions": [repr(table) for table in session.edits.edits],
        "axis": _axis(session),
        "messages": session.messages,
        "replies": replies,
    }


def restore(session: Session, value: Any) -> bool:
    """Replace a session's conversation and system prompt with saved ones.

    The session's model, interventions and settings do not change.

    Args:
      session: the session.
      value: the result of `record`, a list of {"role", "content"}, or an object with such a list
        as `messages` or `conversation`. After an optional system message, user and assistant
        messages alternate, and the last message is an assistant message.

    Returns:
      Whether `value` is the result of `record` for the same model and monitor (or the same model
      and no monitor). If not, the saved projections are dropped.

    Raises:
      UserError: `value` has none of these forms. The session is then unchanged.
    """
    table = value if isinstance(value, dict) else {"messages": value}
    messages = table.get("messages", table.get("conversation"))
    if not isinstance(messages, list):
        raise UserError(f"messages is {shown(messages, 60)}; give a list of messages with role and "
                        "content")
    messages = chat.check_conversation(messages, reply=False) if messages else []
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
    talk = messages[system is not None:]
    roles = [message["role"] for message in talk]
    if roles != ["user", "assistant"] * (len(talk) // 2):
        raise UserError("messages must alternate between user and assistant, and end with an "
                        "assistant message")
    turns = [Turn(asked["content"], said["content"])
             for asked, said in zip(talk[::2], talk[1::2], strict=True)]
    kept = False
    if table.get("format") == FORMAT:
        replies = _replies(table.get("replies"), len(turns))
        model = table.get("model")
        same = isinstance(model, dict) and model.get("fingerprint") == session.model.fingerprint
        kept = same and table.get("axis") == _axis(session)
        turns = [dataclasses.replace(
            turn, **(saved.model_dump(exclude={"edits"})
                     | {"edits": [EditCount(**edit.model_dump()) for edit in saved.edits]}
                     | ({} if kept else {"projections": {}})))
            for turn, saved in zip(turns, replies, strict=True)]
    session.system, session.turns = system, turns
    return kept


def _axis(session: Session) -> dict[str, Any] | None:
    monitor = session.monitor
    if monitor is None:
        return None
    directions = monitor.vector.at_layers(monitor.layers).tobytes()
    return {"name": monitor.vector.name, "layers": list(monitor.layers),
            "projections": monitor.sentence,
            "digest": hashlib.sha256(directions).hexdigest()[:16]}


def _replies(value: Any, wanted: int) -> list[_Reply]:
    """Validate the records of replies.

    Raises:
      UserError: a record is invalid (the message describes the first error), or the number of
        records is not `wanted`.
    """
    try:
        replies = pydantic.TypeAdapter(list[_Reply]).validate_python(value)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}"
                        for part in fault["loc"])
        given = "missing" if fault["type"] == "missing" else shown(fault["input"], 60)
        raise UserError(f"replies{place} is {given}: {fault['msg']}") from None
    if len(replies) != wanted:
        raise UserError(f"replies has {len(replies)} entries for {wanted} assistant messages; "
                        "give one entry per message")
    return replies
