"""Conversations to tokens, with what is known of each token, through the checkpoint's own template.

The rendering is tokenised once, and character offsets carry the spans that `template` locates to
tokens; text is never searched for, and what a model has generated is never encoded again.

What a token counts as:
- content of a message is SYSTEM, USER or ASSISTANT; everything that the template writes, a default
  system prompt included, and every token that straddles the two is TEMPLATE;
- a thinking block of an assistant message is ASSISTANT | THINKING with its tags, one that the
  template itself writes is TEMPLATE | THINKING. The last token of a prompt is THINKING exactly
  when the reply begins inside an open block;
- fenced code, fences included, is CODE.

An empty system message is not a missing one: it is rendered as the template renders it. Where the
template has no system role, the system prompt is put before the first user message, a blank line
between, and keeps its kind and its turn; an empty one adds nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona import fences
from jaxpersona.batch import (
    ASSISTANT,
    CODE,
    GENERATED,
    LAST,
    SYSTEM,
    TEMPLATE,
    THINKING,
    USER,
    Batch,
)
from jaxpersona.batch import batch as make_batch
from jaxpersona.template import CLOSE, OPEN, ROLES, Template, locate


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One conversation as tokens.

    Attributes:
      tokens: [T] int32.
      kind: [T] int32, bits of `batch.KINDS` (valid, first and last are set by `batch.batch`).
      turn: [T] int32, the number of the message that a token belongs to, from 0 as they were given;
        the generation prompt belongs to the coming message.
      text: what was tokenised.
    """

    tokens: np.ndarray
    kind: np.ndarray
    turn: np.ndarray
    text: str


def encode(model: Any, conversations: Sequence[Any], *, reply: bool = True, thinking: bool = False,
           width: int | None = None, variables: Mapping[str, Any] | None = None) -> Batch:
    """Encode conversations as a batch.

    Args:
      model: a tokenizer, or anything with one as `tokenizer`.
      conversations: B conversations, each a list of {"role", "content"} or one user message.
      reply: end with the generation prompt.
      thinking: what the template is told as `enable_thinking`.
      width: pad to this many tokens; default: the longest row.
      variables: more template variables, such as {"date_string": "26 Jul 2024"}.

    Returns:
      A batch whose `row_id` are hashes of the tokens; the n-th copy of a row counts as sample n.

    Raises:
      ValueError: as `encode_row` and `batch.batch`.
    """
    tokenizer = _tokenizer(model)
    if isinstance(conversations, (str, Mapping)) or (
        len(conversations) and isinstance(conversations[0], Mapping)
    ):
        raise ValueError("conversations is one conversation; put it into a list")
    rows = [encode_row(tokenizer, c, reply=reply, thinking=thinking, variables=variables)
            for c in conversations]
    seen: dict[bytes, int] = {}
    ids = []
    for row in rows:
        key = row.tokens.tobytes()
        ids.append(row_id(row.tokens, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return make_batch([r.tokens for r in rows], kind=[r.kind for r in rows],
                   turn=[r.turn for r in rows], row_id=ids, width=width)


def encode_row(tokenizer: Any, conversation: Any, *, reply: bool = True, thinking: bool = False,
               variables: Mapping[str, Any] | None = None) -> Row:
    """Encode one conversation; the arguments are those of `encode`.

    Raises:
      ValueError: a malformed conversation, one that the template refuses, contents that cannot be
        located in its rendering, or a tokenizer without character offsets.
    """
    messages = check_conversation(conversation, reply=reply)
    text, kind, turn, _ = locate(Template(tokenizer, thinking, variables), messages, reply)
    row = _tokenise(tokenizer, text, kind, turn)
    if row.tokens.size == 0:
        raise ValueError("the conversation is empty: it renders to no token")
    if reply and text.endswith(CLOSE):
        row.kind[-1] &= ~THINKING
    return row


def continue_row(tokenizer: Any, row: Row, generated: np.ndarray, message: str, *, stopped: bool,
                 thinking: bool = False, variables: Mapping[str, Any] | None = None) -> Row:
    """Return the next prompt of a conversation: its tokens, the reply's, then a user message.

    Nothing that the model has seen is encoded again: only what follows the reply is, on its own.

    Args:
      row: the prompt that was answered.
      generated: [n] the reply's token ids, with or without the stop token.
      message: the next user message.
      stopped: whether a stop ended the reply (else the length limit did). A stop token that begins
        the template's end of turn is not doubled.

    Raises:
      ValueError: as `encode_row`.
    """
    check_conversation([{"role": "user", "content": message}])
    reply = np.asarray(generated, np.int32).reshape(-1)
    template = Template(tokenizer, thinking, variables)
    answered = int(row.turn[-1])
    if not row.kind[-1] & TEMPLATE:
        answered += 1  # no generation prompt (plain completion) that would be the reply's
    roles = ["system"] * (not template.base and answered % 2 == 0)
    roles += ["user", "assistant"] * max(1, (answered + 1) // 2)
    past = [{"role": role, "content": "x"} for role in roles]
    messages = [*past, {"role": "user", "content": message}]
    text, kind, turn, ends = locate(template, messages, True)
    start = ends[len(past) - 1]
    tail = _tokenise(tokenizer, text[start:], kind[start:], turn[start:] + answered - len(past) + 1)
    if text.endswith(CLOSE):
        tail.kind[-1] &= ~THINKING
    said = _reply_kinds(tokenizer, row, reply)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    text = tail.text
    if reply.size and tail.tokens.size and reply[-1] == tail.tokens[0] and (
        stopped or int(reply[-1]) in special
    ):
        said[-1] = TEMPLATE | GENERATED
        text = text.removeprefix(tokenizer.decode(reply[-1:].tolist()))
        tail = Row(tail.tokens[1:], tail.kind[1:], tail.turn[1:], text)
    elif reply.size and stopped and int(reply[-1]) in special:
        said[-1] = TEMPLATE | GENERATED
    return Row(
        np.concatenate([row.tokens, reply, tail.tokens]),
        np.concatenate([row.kind & ~LAST, said, tail.kind]),
        np.concatenate([row.turn, np.full(reply.size, answered, np.int32), tail.turn]),
        row.text + tokenizer.decode(reply.tolist(), skip_special_tokens=False) + text,
    )


def answered(tokenizer: Any, row: Row, reply: np.ndarray) -> Row:
    """Return a prompt with the ids [n] of its reply, marked as decode marks them.

    Args:
      tokenizer: the model's, or None; then neither thinking nor code is told apart.
    """
    reply = np.asarray(reply, np.int32).reshape(-1)
    kind = np.full(reply.size, ASSISTANT | GENERATED, np.int32)
    if tokenizer is not None and reply.size:
        kind = _reply_kinds(tokenizer, row, reply)
    turn = int(row.turn[-1]) + (not row.kind[-1] & TEMPLATE)  # a bare prompt is the turn before
    return Row(np.concatenate([row.tokens, reply]),
               np.concatenate([row.kind & ~LAST, kind]) if reply.size else row.kind,
               np.concatenate([row.turn, np.full(reply.size, turn, np.int32)]), "")


def row_id(tokens: Any, sample: int = 0, salt: str = "") -> int:
    """Return a stable 32-bit hash of what a row is: its tokens, sample number and a salt."""
    ids = np.ascontiguousarray(tokens, "<i4").reshape(-1)
    head = f"{salt}\0{int(sample)}\0".encode()
    return int.from_bytes(hashlib.sha256(head + ids.tobytes()).digest()[:4], "little")


def thinking_ids(tokenizer: Any) -> tuple[int, int]:
    """Return the ids that open and close a thinking block, or (-1, -1) where they are no tokens."""
    ids = [tokenizer.encode(tag, add_special_tokens=False) for tag in (OPEN, CLOSE)]
    if any(len(one) != 1 for one in ids) or ids[0] == ids[1]:
        return -1, -1
    return ids[0][0], ids[1][0]


def check_conversation(conversation: Any, *, reply: bool = True) -> list[dict[str, str]]:
    """Return a conversation's messages (a bare string is one user message).

    Raises:
      ValueError: what is wrong, of which message, and the mend.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    if not isinstance(conversation, Sequence) or not conversation:
        raise ValueError(f"conversation is {conversation!r:.60}; give a list of "
                         '{"role", "content"} or one string')
    out = []
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {i} is {message!r:.60}; give a dict of role and content")
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(f"message {i} has no {field!r}; give role and content")
        if extra := sorted(set(message) - {"role", "content"}, key=str):
            raise ValueError(f"message {i} has the field {extra[0]!r}; only role and content are "
                             "read, so take it out")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"message {i} has the role {role!r}; it must be system, user or "
                             "assistant")
        if not isinstance(content, str):
            raise ValueError(f"message {i} has the content {content!r:.60}; it must be a string")
        if re.search("[\ud800-\udfff]", content):
            raise ValueError(f"message {i} has a lone surrogate in its content, which is no text; "
                             "replace it")
        if role == "system" and i:
            raise ValueError(f"message {i} has the role 'system'; only the first message may")
        out.append({"role": role, "content": content})
    if reply and out[-1]["role"] != "user":
        raise ValueError(f"the last message has the role {out[-1]['role']!r}; a reply can only "
                         "follow a user message (or pass reply=False)")
    return out


def _tokenizer(model: Any) -> Any:
    found = model if hasattr(model, "apply_chat_template") else getattr(model, "tokenizer", None)
    if found is None:
        raise ValueError("the model has no tokenizer; give token ids to batch.batch instead")
    return found


def _tokenise(tokenizer: Any, text: str, kind: np.ndarray, turn: np.ndarray) -> Row:
    """Tokenise a rendering once and give every token what its characters are.

    A token covers what lies between the end of the one before and its own end: tokenizers cut
    blanks off the offsets they report, and a character of several tokens has one span for all.
    """
    try:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise ValueError("the tokenizer reports no character offsets; load the model's fast "
                         "tokenizer (tokenizer.json)") from error
    tokens = np.asarray(out["input_ids"], np.int32)
    if not tokens.size:
        return Row(tokens, np.zeros(0, np.int32), np.zeros(0, np.int32), text)
    offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2)
    reached = np.maximum.accumulate(np.concatenate([[0], offsets[:-1, 1]]))
    start = np.minimum(np.minimum(offsets[:, 0], reached), len(text) - 1)
    stop = np.maximum(offsets[:, 1], start + 1)

    def share(bits: int) -> np.ndarray:
        count = np.concatenate([[0], np.cumsum((kind & bits) != 0)])
        return count[stop] - count[start]

    roles = [TEMPLATE, SYSTEM, USER, ASSISTANT]
    out_kind = np.full(tokens.size, TEMPLATE, np.int32)
    for role in roles:
        out_kind[share(role) == stop - start] = role
    out_kind |= np.where(share(THINKING) > 0, THINKING, 0)
    code = (share(CODE) > 0) & (out_kind & TEMPLATE == 0)
    return Row(tokens, out_kind | np.where(code, CODE, 0), turn[start], text)


def _reply_kinds(tokenizer: Any, row: Row, reply: np.ndarray) -> np.ndarray:
    """Return the kinds of generated ids, by the same rule as decode's."""
    begin, end = thinking_ids(tokenizer)
    inside = bool(row.kind[-1] & THINKING)
    kind = np.full(reply.size, ASSISTANT | GENERATED, np.int32)
    for i, token in enumerate(reply.tolist()):
        if inside or (begin >= 0 and token in (begin, end)):
            kind[i] |= THINKING
        inside = (inside or token == begin) and token != end
    kind[fences.walk([tokenizer.decode([token]) for token in reply.tolist()])] |= CODE
    return kind
