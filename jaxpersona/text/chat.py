"""Tokenize conversations with the checkpoint's chat template and assign a kind to every token.

The rendered text is tokenized once. `template.locate` returns the kind of every character, and the
kind of a token follows from the kinds of its characters. Generated tokens are never re-encoded.

Token kinds:
- Message content is SYSTEM, USER or ASSISTANT. Text from the template, including a default system
  prompt, is TEMPLATE. A token with both kinds of text is TEMPLATE, unless it consists of template
  whitespace and the start of the content's first word. Such a token has the kind of the content.
- A thinking block in an assistant message, including its tags, is ASSISTANT | THINKING. A thinking
  block that the template adds is TEMPLATE | THINKING. The last prompt token has the bit THINKING if
  and only if the reply starts inside an open thinking block.
- Fenced code in message content, including its fences, also has the bit CODE.

If the template has no system role, the system prompt is prepended to the first user message,
separated by a blank line. The tokens of the system prompt keep the kind and turn of the system
message. An empty system message is omitted in this case, but is rendered by other templates.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpersona.brief import brief, shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.models.batch import (
    ASSISTANT,
    CODE,
    GENERATED,
    LAST,
    SYSTEM,
    TEMPLATE,
    THINKING,
    USER,
    Batch,
    check_ids,
)
from jaxpersona.models.batch import batch as make_batch
from jaxpersona.text import fences, sandbox
from jaxpersona.text.special_tokens import special_ids
from jaxpersona.text.template import CLOSE, OPEN, PRIVATE, ROLES, Template, locate


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One tokenized conversation.

    Attributes:
      tokens: the token ids, [T] int32.
      kind: [T] int32, bits of `batch.KINDS` (`batch.batch` adds VALID, FIRST and LAST).
      turn: [T] int32, each token's message index; the generation prompt has the next index.
      text: the tokenized text; empty for a row built from token ids or by `answered`.
      messages: the conversation, or None for a row built from token ids or by `answered`.
    """

    tokens: np.ndarray
    kind: np.ndarray
    turn: np.ndarray
    text: str
    messages: tuple[dict[str, str], ...] | None = None

    __repr__ = brief


@checked_call
def encode(model: Any, conversations: Iterable[Any], *, reply: bool = True, thinking: bool = False,
           width: int | None = None, variables: Mapping[str, Any] | None = None) -> Batch:
    """Encode B conversations as a batch.

    Args:
      model: a `Model` or another object with a `tokenizer` attribute, or a tokenizer.
      conversations: an iterable of lists of {"role", "content"}, or strings (one user message).
      reply: whether to append the generation prompt.
      thinking: the value of the template variable `enable_thinking`.
      width: the padded length of all rows in tokens; default: the length of the longest row.
      variables: additional template variables, such as {"date_string": "26 Jul 2024"}.

    Returns:
      A batch. Each `row_id` is a hash of the row's tokens and of the number of earlier equal rows.

    Raises:
      UserError: the model has no tokenizer, a token id is outside the model's vocabulary, or as for
        `listed`, `encode_row` and `batch.batch`.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.encode(jp.load("mini"), ["Who are you?", "Hello."]).tokens.shape[0]
      2
    """
    tokenizer = _tokenizer(model)
    rows = [encode_row(tokenizer, c, reply=reply, thinking=thinking, variables=variables)
            for c in listed(conversations)]
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    seen: dict[bytes, int] = {}
    ids = []
    for i, row in enumerate(rows):
        check_ids(row.tokens, vocabulary, f"conversation {i}", tokenizer)
        key = row.tokens.tobytes()
        ids.append(row_id(row.tokens, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return make_batch([r.tokens for r in rows], kind=[r.kind for r in rows],
                   turn=[r.turn for r in rows], row_id=ids, width=width)


def listed(given: Any, name: str = "conversations") -> list[Any]:
    """Convert an iterable of conversations to a list.

    Args:
      given: the value to check and convert.
      name: the name of the caller's argument, for error messages.

    Raises:
      UserError: `given` is empty, or it is not an iterable of conversations.
    """
    if isinstance(given, (str, bytes)):
        raise UserError(f"{name} is a single string ({given[:40]!r}); wrap it in a list")
    if isinstance(given, (Mapping, Row)):
        noun, more = (("message", " (from a tokenizer's output, give .input_ids)")
                      if isinstance(given, Mapping) else ("Row", ""))
        raise UserError(f"{name} is a single {noun}; give a list of {name}{more}")
    try:
        items = list(given) if not isinstance(given, (set, frozenset)) else None
    except TypeError:  # not iterable, such as a 0-d array
        items = None
    if items is None:
        raise UserError(f"{name} is {shown(given, 60)}; give a list of {name}")
    if not items:
        raise UserError(f"{name} is empty; give at least one")
    if any(isinstance(item, (Mapping, int, np.integer)) for item in items):
        raise UserError(f"{name} is a single conversation; wrap it in a list")
    return items


@sandbox.one_conversation()
def encode_row(tokenizer: Any, conversation: Any, *, reply: bool = True, thinking: bool = False,
               variables: Mapping[str, Any] | None = None) -> Row:
    """Encode one conversation; see `encode` for the arguments.

    Raises:
      UserError: the conversation is malformed or has no tokens, the template cannot render it or
        changes its contents in an unsupported way, or the tokenizer returns no character offsets.
    """
    messages = check_conversation(conversation, reply=reply)
    template = Template(tokenizer, thinking, variables)
    text, kind, turn, _ = locate(template, messages, reply)
    row = dataclasses.replace(_tokenise(template, text, kind, turn), messages=tuple(messages))
    if row.tokens.size == 0:
        raise UserError("the conversation renders to zero tokens; add text to a message")
    if reply and text.endswith(CLOSE):
        row.kind[-1] &= ~THINKING
    return row


@sandbox.one_conversation()
def continue_row(tokenizer: Any, row: Row, generated: np.ndarray, message: str, *, stopped: bool,
                 thinking: bool = False, variables: Mapping[str, Any] | None = None) -> Row:
    """Append a reply and the next user message to a prompt; return the next prompt.

    The token ids of the prompt and the reply are kept, not re-encoded. Only the tokens after the
    reply are encoded, from a rendering of the whole conversation.

    Args:
      row: the prompt of the reply, from `encode_row`, `generate` or this function.
      generated: the token ids of the reply, [n], with or without the stop token.
      message: the next user message.
      stopped: True if the reply ended at a stop token, False if it ended at the length limit. If
        the text after the reply begins with this stop token, the token is not repeated.
      tokenizer, thinking, variables: as for `encode_row`.

    Raises:
      UserError: as for `encode_row`; or `row` has no messages or does not end with a user message.
    """
    check_conversation([{"role": "user", "content": message}])
    if row.messages is None:
        raise UserError("row was built from token ids and has no messages; pass a row from "
                        "`encode_row`, or append the token ids yourself")
    if row.messages[-1]["role"] != "user":
        raise UserError(f"the row's last message has role {row.messages[-1]['role']!r}; it must "
                        "be 'user'")
    reply = np.asarray(generated, np.int32).reshape(-1)
    template = Template(tokenizer, thinking, variables)
    answered = len(row.messages)
    written = tokenizer.decode(reply.tolist(), skip_special_tokens=True)
    messages = [*row.messages, {"role": "assistant", "content": written},
                {"role": "user", "content": message}]
    text, kind, turn, start = _after_reply(template, messages)
    tail = _tokenise(template, text, kind, turn, start)
    if text.endswith(CLOSE):
        tail.kind[-1] &= ~THINKING
    reply_kind = _reply_kinds(tokenizer, row, reply)
    special, text = special_ids(tokenizer, added=True), tail.text
    if reply.size and tail.tokens.size and reply[-1] == tail.tokens[0] and (
            stopped or int(reply[-1]) in special):
        reply_kind[-1] = TEMPLATE | GENERATED
        text = text.removeprefix(tokenizer.decode(reply[-1:].tolist()))
        tail = Row(tail.tokens[1:], tail.kind[1:], tail.turn[1:], text)
    elif reply.size and stopped and int(reply[-1]) in special:
        reply_kind[-1] = TEMPLATE | GENERATED
    return Row(
        np.concatenate([row.tokens, reply, tail.tokens]),
        np.concatenate([row.kind & ~LAST, reply_kind, tail.kind]),
        np.concatenate([row.turn, np.full(reply.size, answered, np.int32), tail.turn]),
        row.text + _decoded_after(tokenizer, row.tokens, reply) + text,
        tuple(messages),
    )


def _after_reply(template: Template, messages: list[dict[str, str]],
                 ) -> tuple[str, np.ndarray, np.ndarray, int]:
    """Render a conversation; return (text, kind, turn, end of the last reply's content).

    If the template changes the reply, so that its end cannot be located, a private-use character is
    rendered in its place. This is sufficient, because only the text after the reply is used.
    """
    *before, reply, message = messages
    used = "".join(m["content"] for m in messages)
    mark = next(chr(code) for code in PRIVATE if chr(code) not in used)
    for content in (reply["content"], mark):
        candidate = [*before, {"role": "assistant", "content": content}, message]
        try:
            text, kind, turn, ends = locate(template, candidate, True)
        except UserError:
            if content == mark:
                raise
            continue
        if len(before) in ends:
            return text, kind, turn, ends[len(before)]
    raise UserError("the chat template omits a reply before the next user message, so the "
                    "conversation cannot be continued; use another template")


def _decoded_after(tokenizer: Any, before: np.ndarray, ids: np.ndarray) -> str:
    """Decode token ids in the context of the last token of `before`, to keep a leading space."""
    context = before[-1:].tolist()
    head, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids.tolist()])
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(ids.tolist())


def answered(tokenizer: Any, row: Row, reply: np.ndarray) -> Row:
    """Append a reply's token ids [n] to a prompt, with the same kinds as during generation.

    If `tokenizer` is None, the bits THINKING and CODE are not set in the reply.
    """
    reply = np.asarray(reply, np.int32).reshape(-1)
    kind = np.full(reply.size, ASSISTANT | GENERATED, np.int32)
    if tokenizer is not None and reply.size:
        kind = _reply_kinds(tokenizer, row, reply)
    turn = int(row.turn[-1]) + (not row.kind[-1] & TEMPLATE)  # + 1 if there is no generation prompt
    return Row(np.concatenate([row.tokens, reply]),
               np.concatenate([row.kind & ~LAST, kind]) if reply.size else row.kind,
               np.concatenate([row.turn, np.full(reply.size, turn, np.int32)]), "")


def row_id(tokens: Any, sample: int = 0, salt: str = "") -> int:
    """Return a deterministic 32-bit hash of token ids, a sample number and a salt."""
    ids = np.ascontiguousarray(tokens, "<i4").reshape(-1)
    head = f"{salt}\0{int(sample)}\0".encode()
    return int.from_bytes(hashlib.sha256(head + ids.tobytes()).digest()[:4], "little")


def thinking_ids(tokenizer: Any) -> tuple[int, int]:
    """Return the ids of <think> and </think>; (-1, -1) unless the tags are two different tokens."""
    ids = [tokenizer.encode(tag, add_special_tokens=False) for tag in (OPEN, CLOSE)]
    if any(len(one) != 1 for one in ids) or ids[0] == ids[1]:
        return -1, -1
    return ids[0][0], ids[1][0]


def check_conversation(conversation: Any, *, reply: bool = True) -> list[dict[str, str]]:
    """Check a conversation and return the messages; a string is a single user message.

    Raises:
      UserError: a message is malformed, or `reply` is true and the last role is not "user".
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    if not isinstance(conversation, Sequence) or not len(conversation):
        raise UserError(f"conversation is {shown(conversation, 60)}; give a list of "
                        '{"role", "content"} dicts or a string')
    out = []
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise UserError(f"message {i} is {shown(message)}; give a dict with role and content")
        if missing := [field for field in ("role", "content") if field not in message]:
            raise UserError(f"message {i} has no {missing[0]!r}; give role and content")
        if extra := sorted(set(message) - {"role", "content"}, key=str):
            raise UserError(f"message {i} has the field {extra[0]!r}, which is not supported; "
                            "give only role and content")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(f"message {i} has role {role!r}; give system, user or assistant")
        if not isinstance(content, str):
            raise UserError(f"message {i} has content {shown(content, 60)}; it must be a string")
        if re.search("[\ud800-\udfff]", content):
            raise UserError(f"message {i} contains a lone surrogate (invalid Unicode); remove it")
        if role == "system" and i:
            raise UserError(f"message {i} has role 'system'; only message 0 can have it")
        out.append({"role": role, "content": content})
    if reply and out[-1]["role"] != "user":
        raise UserError(f"the last message has role {out[-1]['role']!r}; it must be 'user' "
                        "(or pass reply=False)")
    return out


def _tokenizer(model: Any) -> Any:
    own = hasattr(model, "apply_chat_template")
    tokenizer = model if own else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise UserError("the model has no tokenizer; pass token ids to jp.batch instead")
    return tokenizer


def _tokenise(template: Template, text: str, kind: np.ndarray, turn: np.ndarray,
              begin: int = 0) -> Row:
    """Tokenize a rendering; derive each token's kind and turn from its characters.

    Args:
      text, kind, turn: the rendering, with the kind and turn of each character.
      begin: the character at which the returned tokens start. The whole text is tokenized, because
        a tokenizer may add a space at the start of a text. If a token crosses `begin`, the text
        after `begin` is tokenized instead, preceded by a guard character that is then removed.
    """
    tokens, start, stop = _spans(template, text)
    at = int(np.searchsorted(start, begin)) if begin else 0
    offset = 0
    if begin and at and stop[at - 1] > begin:
        for guard in ("x", "0", ".", ""):
            tokens, start, stop = _spans(template, guard + text[begin:], lead=False)
            at = int(np.searchsorted(start, len(guard)))
            if not at or stop[at - 1] <= len(guard):
                offset = begin - len(guard)
                break
    tokens, start, stop = tokens[at:], start[at:] + offset, stop[at:] + offset
    if not tokens.size:
        return Row(tokens, np.zeros(0, np.int32), np.zeros(0, np.int32), text[begin:])

    def share(bits: int) -> np.ndarray:
        count = np.concatenate([[0], np.cumsum((kind & bits) != 0)])
        return count[stop] - count[start]

    out_kind = np.full(tokens.size, TEMPLATE, np.int32)
    out_turn = turn[start]
    for role in (TEMPLATE, SYSTEM, USER, ASSISTANT):
        out_kind[share(role) == stop - start] = role
    mixed = (share(TEMPLATE) > 0) & (share(TEMPLATE) < stop - start)
    for i in np.flatnonzero(mixed).tolist():
        first = int(start[i]) + int(np.argmax(kind[start[i] : stop[i]] & TEMPLATE == 0))
        roles = set((kind[first : stop[i]] & (TEMPLATE | SYSTEM | USER | ASSISTANT)).tolist())
        if len(roles) == 1 and text[start[i] : first].isspace() and text[first : stop[i]].strip():
            out_kind[i], out_turn[i] = roles.pop(), turn[first]
    out_kind |= np.where(share(THINKING) > 0, THINKING, 0)
    code = (share(CODE) > 0) & (out_kind & TEMPLATE == 0)
    return Row(tokens, out_kind | np.where(code, CODE, 0), out_turn, text[begin:])


def _spans(template: Template, text: str, *, lead: bool = True,
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize a text; return the ids, [T] int32, and each token's start and end character offsets.

    If a token starts after the end of the previous token, its start is moved back to that end,
    because some tokenizers exclude whitespace from the offsets. For base models, the result begins
    with the tokens that the tokenizer prepends (such as BOS) if `lead` is true.
    """
    before = template.lead if lead else []
    size = len(template.lead_text) if before else 0
    try:
        out = template.tokenizer(text[size:], add_special_tokens=False,
                                 return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise UserError("the tokenizer has no character offsets; use the model's fast "
                        "tokenizer (tokenizer.json)") from error
    tokens = np.asarray([*before, *out["input_ids"]], np.int32)
    if not tokens.size:
        return tokens, np.zeros(0, np.int64), np.zeros(0, np.int64)
    offsets = np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2) + size
    offsets = np.concatenate([np.full((len(before), 2), (0, size), np.int64), offsets])
    reached = np.maximum.accumulate(np.concatenate([[0], offsets[:-1, 1]]))
    start = np.minimum(np.minimum(offsets[:, 0], reached), len(text) - 1)
    return tokens, start, np.maximum(offsets[:, 1], start + 1)


def _reply_kinds(tokenizer: Any, row: Row, reply: np.ndarray) -> np.ndarray:
    """Return the kinds of a reply's tokens, [n] int32, as assigned during generation."""
    begin, end = thinking_ids(tokenizer)
    inside = bool(row.kind[-1] & THINKING)
    kind = np.full(reply.size, ASSISTANT | GENERATED, np.int32)
    for i, token in enumerate(reply.tolist()):
        if inside or (begin >= 0 and token in (begin, end)):
            kind[i] |= THINKING
        inside = (inside or token == begin) and token != end
    kind[fences.walk([tokenizer.decode([token]) for token in reply.tolist()])] |= CODE
    return kind
