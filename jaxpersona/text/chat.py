"""Conversations to tokens, with what is known of each token, through the checkpoint's own template.

The rendering is tokenised once, and character offsets carry the spans that `template` locates to
tokens; text is never searched for, and what a model has generated is never encoded again.

What a token counts as:
- content of a message is SYSTEM, USER or ASSISTANT; everything that the template writes, a default
  system prompt included, and every token that straddles the two is TEMPLATE. One exception: where
  blanks of the template and the beginning of a content's first word are one token, that token is
  content, as it is when the model generates it;
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
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

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
from jaxpersona.text.template import CLOSE, OPEN, PRIVATE, ROLES, Template, locate


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """One conversation as tokens.

    Attributes:
      tokens: [T] int32.
      kind: [T] int32, bits of `batch.KINDS` (valid, first and last are set by `batch.batch`).
      turn: [T] int32, the number of the message that a token belongs to, from 0 as they were given;
        the generation prompt belongs to the coming message.
      text: what was tokenised.
      messages: the messages, or None for a row that was made of token ids.
    """

    tokens: np.ndarray
    kind: np.ndarray
    turn: np.ndarray
    text: str
    messages: tuple[dict[str, str], ...] | None = None


def encode(model: Any, conversations: Iterable[Any], *, reply: bool = True, thinking: bool = False,
           width: int | None = None, variables: Mapping[str, Any] | None = None) -> Batch:
    """Encode conversations as a batch.

    Args:
      model: a tokenizer, or anything with one as `tokenizer`.
      conversations: B conversations from any iterable, each a list of {"role", "content"} or one
        user message.
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
    rows = [encode_row(tokenizer, c, reply=reply, thinking=thinking, variables=variables)
            for c in listed(conversations)]
    config = getattr(model, "config", None)  # a bare tokenizer has none
    for i, row in enumerate(rows):
        check_ids(row.tokens, getattr(config, "vocab_size", None), f"conversation {i}", tokenizer)
    seen: dict[bytes, int] = {}
    ids = []
    for row in rows:
        key = row.tokens.tobytes()
        ids.append(row_id(row.tokens, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return make_batch([r.tokens for r in rows], kind=[r.kind for r in rows],
                   turn=[r.turn for r in rows], row_id=ids, width=width)


def listed(given: Any, name: str = "conversations") -> list[Any]:
    """Return conversations, from any iterable, as a list.

    Args:
      given: the argument's value.
      name: the argument's name.

    Raises:
      ValueError: none at all, or one conversation (or a part of one) in place of several, which
        would otherwise be taken apart.
    """
    if isinstance(given, (str, bytes)):
        raise ValueError(f"{name} is one string ({given[:40]!r}); put it into a list")
    if isinstance(given, (Mapping, Row)):
        raise ValueError(f"{name} is one {'message' if isinstance(given, Mapping) else 'Row'}; "
                         f"give a list of {name}")
    try:
        found = list(given) if not isinstance(given, (set, frozenset)) else None
    except TypeError:  # an array without dimensions has no elements either
        found = None
    if found is None:
        raise ValueError(f"{name} is {given!r:.60}; give a list of {name}")
    if not found:
        raise ValueError(f"{name} is empty; give at least one")
    if any(isinstance(one, (Mapping, int, np.integer)) for one in found):
        raise ValueError(f"{name} is one conversation; put it into a list")
    return found


@sandbox.one_conversation()
def encode_row(tokenizer: Any, conversation: Any, *, reply: bool = True, thinking: bool = False,
               variables: Mapping[str, Any] | None = None) -> Row:
    """Encode one conversation; the arguments are those of `encode`.

    Raises:
      ValueError: a malformed conversation, one that the template refuses, contents that cannot be
        located in its rendering, or a tokenizer without character offsets.
    """
    messages = check_conversation(conversation, reply=reply)
    template = Template(tokenizer, thinking, variables)
    text, kind, turn, _ = locate(template, messages, reply)
    row = _tokenise(template, text, kind, turn)
    row = dataclasses.replace(row, messages=tuple(messages))
    if row.tokens.size == 0:
        raise ValueError("the conversation is empty: it renders to no token")
    if reply and text.endswith(CLOSE):
        row.kind[-1] &= ~THINKING
    return row


@sandbox.one_conversation()
def continue_row(tokenizer: Any, row: Row, generated: np.ndarray, message: str, *, stopped: bool,
                 thinking: bool = False, variables: Mapping[str, Any] | None = None) -> Row:
    """Return the next prompt of a conversation: its tokens, the reply's, then a user message.

    What the model has seen is not encoded again: the prompt and the reply keep their ids. What
    follows the reply is taken from the template's rendering of the whole conversation.

    Args:
      row: the prompt that was answered, from `encode_row`, `generate` or this function.
      generated: [n] the reply's token ids, with or without the stop token.
      message: the next user message.
      stopped: whether a stop ended the reply (else the length limit did). A stop token that begins
        the template's end of turn is not doubled.

    Raises:
      ValueError: a row without messages or whose last one is not the user's, or as `encode_row`.
    """
    check_conversation([{"role": "user", "content": message}])
    if row.messages is None:
        raise ValueError("row has no messages, because it was made of token ids; continue a row "
                         "that `encode_row` made, or append the ids yourself")
    if row.messages[-1]["role"] != "user":
        raise ValueError(f"the row's last message has the role {row.messages[-1]['role']!r}; a "
                         "reply can only follow a user message")
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
        row.text + _decoded_after(tokenizer, row.tokens, reply) + text,
        tuple(messages),
    )


def _after_reply(template: Template, messages: list[dict[str, str]],
                 ) -> tuple[str, np.ndarray, np.ndarray, int]:
    """Render a conversation; return what `locate` does and where the last reply's content ends.

    A reply that the template drops or changes is rendered as one private-use character instead:
    only what follows it is used.
    """
    *before, reply, message = messages
    used = "".join(m["content"] for m in messages)
    mark = next(chr(code) for code in PRIVATE if chr(code) not in used)
    for content in (reply["content"], mark):
        tried = [*before, {"role": "assistant", "content": content}, message]
        try:
            text, kind, turn, ends = locate(template, tried, True)
        except ValueError:
            if content == mark:
                raise
            continue
        if len(before) in ends:
            return text, kind, turn, ends[len(before)]
    raise ValueError("the chat template leaves out a reply that a user message follows; the "
                     "conversation cannot be continued")


def _decoded_after(tokenizer: Any, before: np.ndarray, ids: np.ndarray) -> str:
    """Decode ids as they stand after others; alone, a decoder may drop their first blank."""
    context = before[-1:].tolist()
    head, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids.tolist()])
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(ids.tolist())


def answered(tokenizer: Any, row: Row, reply: np.ndarray) -> Row:
    """Return a prompt with the ids [n] of its reply, marked as decode marks them.

    Args:
      tokenizer: the model's, or None; then thinking and code are not marked.
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
    if not isinstance(conversation, Sequence) or not len(conversation):
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


def _tokenise(template: Template, text: str, kind: np.ndarray, turn: np.ndarray,
              begin: int = 0) -> Row:
    """Tokenise a rendering once and give every token what its characters are.

    Args:
      text, kind, turn: the rendering, and what each character is.
      begin: return only the tokens from this character on. They are those of the whole text, so
        that a tokenizer that marks the start of a text does not mark them; where a token of the
        whole lies on both sides, what follows is tokenised behind another character.
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
    """Tokenise a text: ids [T] int32, and from where to where each token covers the text.

    A token covers what lies between the end of the one before and its own end: tokenizers cut
    blanks off the offsets they report, and a character of several tokens has one span for all.
    A base model's leading tokens are its tokenizer's own; what follows them is encoded as alone.
    """
    before = template.lead if lead else []
    size = len(template.lead_text) if before else 0
    try:
        out = template.tokenizer(text[size:], add_special_tokens=False,
                                 return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise ValueError("the tokenizer reports no character offsets; load the model's fast "
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
