"""Preparation of conversations: encoding, checks, row ids and padded lengths.

The results for a conversation do not depend on other conversations in the same call, except that
default row ids distinguish conversations with the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import is_integer
from jaxpersona.captures.capture import Capture, chosen_layers
from jaxpersona.distributed.sharding import rows_divisor
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions
from jaxpersona.models.batch import KINDS, check_ids
from jaxpersona.models.params import origin
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


FEW_ROWS = 8  # lanes of at most this many rows use fewer padded lengths and cache sizes


def bucket(tokens: int, least: int = 32, finer: int | None = 256) -> int:
    """Return the padded length of a prompt of `tokens` tokens.

    By default, this is the smallest of 32, 64, 128, 256, 384, 512, 768, … that is at least
    `tokens`. There are few lengths, because each needs a compiled program.

    Args:
      tokens: the number of tokens.
      least: the smallest length, a power of two.
      finer: a power of two above which there is also a length halfway between consecutive powers
        of two. None: powers of two only.
    """
    size = least
    while size < tokens:
        doubled = finer is None or size < finer
        power = size & (size - 1) == 0
        size = (size * 2 if doubled else size * 3 // 2) if power else size * 4 // 3
    return size


def padded(tokens: int, rows: int) -> int:
    """Return the padded length of a prompt that is prefilled for a lane of `rows` rows.

    With more than `FEW_ROWS` rows, it is the result of `bucket`, because padding costs throughput.
    Otherwise, it is a power of two of at least 64, because in a small batch, padding takes less
    time than compiling another program.
    """
    return bucket(tokens) if rows > FEW_ROWS else bucket(tokens, least=64, finer=None)


def widths(slots: int, context: int) -> list[int]:
    """Return the distinct padded lengths (`bucket`) of prompts with room for a reply, ascending.

    Args:
      slots: the number of cache slots; the padded length must be smaller.
      context: the model's context in tokens; the number of tokens of the prompt must be smaller.
    """
    out, longest = [], 0
    while longest + 1 < context and (width := bucket(longest + 1)) < slots:
        out.append(width)
        longest = width
    return out


def encode(model: Model, item: Any, *, reply: bool = True, thinking: bool = False,
           name: str = "a conversation") -> chat.Row:
    """Encode a conversation of any accepted type.

    Args:
      model: the model; its tokenizer encodes text.
      item: messages, a string (one user message), a `chat.Row`, or token ids.
      reply: for text, whether to append the generation prompt; False for a complete conversation.
      thinking: for text, whether a reply may begin with a thinking block.
      name: the name of the conversation in error messages.

    Raises:
      UserError: the conversation is invalid or of an unsupported type, it is text but the model has
        no tokenizer, or an id is outside the vocabulary.
    """
    size, tokenizer = model.config.vocab_size, model.tokenizer
    if isinstance(item, chat.Row):
        row = _checked_row(item, name)
        check_ids(np.asarray(item.tokens), size, name, tokenizer)
        return row
    if isinstance(item, Mapping):
        raise UserError(f"{name} is the single message {dict(item)!r:.60}; give a list of messages")
    if isinstance(item, Iterator):
        item = list(item)
    if isinstance(item, str) or (
        isinstance(item, Sequence) and any(isinstance(message, Mapping) for message in item)
    ):
        if tokenizer is None:
            raise UserError(f"{model.name} has no tokenizer; give token ids instead of text")
        row = chat.encode_row(tokenizer, item, reply=reply, thinking=thinking)
        check_ids(row.tokens, size, name, tokenizer)
        return row
    if isinstance(item, (int, bytes, set, frozenset)) or not isinstance(item, Iterable):
        raise UserError(f"{name} is {shown(item, 60)}; give messages, a string, a Row or token ids")
    try:
        tokens = np.asarray(item)
    except ValueError:  # nested lists of different lengths
        tokens = np.zeros(0)
    if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"{name} is {shown(item, 60)}; it must be messages, a string, a Row or a "
                        "non-empty list of token ids")
    check_ids(tokens, size, name, tokenizer)
    kind = np.full(tokens.size, KINDS["user"], np.int32)
    return chat.Row(tokens.astype(np.int32), kind, np.zeros(tokens.size, np.int32), "")


def _checked_row(row: chat.Row, name: str) -> chat.Row:
    """Check the arrays of a row, and return the row with int32 arrays.

    Args:
      row: the row.
      name: the name of the conversation in error messages.

    Raises:
      UserError: a field is not an integer array [T], T is 0, or the arrays have different lengths.
    """
    arrays = {"tokens": row.tokens, "kind": row.kind, "turn": row.turn}
    for field, value in arrays.items():
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None or dtype is None:
            raise UserError(f"{name} is a Row whose {field} is a {type(value).__name__}; give an "
                            "int32 array")
        if len(shape) != 1 or not np.issubdtype(dtype, np.integer):
            raise UserError(f"{name} is a Row whose {field} has shape {tuple(shape)} and dtype "
                            f"{dtype}; give an int32 array of shape [T]")
        if not shape[0]:
            raise UserError(f"{name} is a Row whose {field} is empty; give at least one token")
        if shape != row.tokens.shape:
            raise UserError(f"{name} is a Row whose {field} has length {shape[0]}, but the length "
                            f"of tokens is {row.tokens.size}; give one integer per token")
    if all(isinstance(x, np.ndarray) and x.dtype == np.int32 for x in arrays.values()):
        return row
    return dataclasses.replace(row, **{field: np.asarray(value).astype(np.int32)
                                       for field, value in arrays.items()})


def check_settings(**counts: Any) -> None:
    """Check that settings are positive integers.

    Args:
      counts: the settings by name, such as batch_size.

    Raises:
      UserError: a setting is not a positive integer.
    """
    for name, value in counts.items():
        if not is_integer(value) or value < 1:
            raise UserError(f"{name} is {shown(value)}; it must be a positive integer")


def check_rows(model: Model, batch_size: int, share_prefix: bool) -> None:
    """Check that `batch_size` and `share_prefix` are valid for the model's mesh.

    Raises:
      UserError: `batch_size` rows cannot be divided evenly over the mesh, or `share_prefix` is
        True for a model on a mesh.
    """
    ways = rows_divisor(model.params.like)
    if batch_size % ways:
        raise UserError(f"batch_size is {batch_size}, but the mesh divides rows into {ways} "
                        f"shards; use a multiple of {ways}")
    if share_prefix and model.mesh is not None:
        raise UserError("share_prefix needs a model on one device; omit it for a model on a mesh")


def check_edits(model: Model, edits: Interventions, count: int,
                capture: Capture | None = None) -> None:
    """Check that interventions and captures match the model and the number of conversations.

    Args:
      model: the model.
      edits: the interventions.
      count: the number of conversations.
      capture: the activations to capture, or None.

    Raises:
      UserError: a site is invalid, the interventions do not match the model's layers, its width D
        or the number of conversations, a capture does not match the model's layers or its width, or
        a direction belongs to a different model.
    """
    edits.check(layers=model.config.n_layers, width=model.config.d_model, rows=count)
    readings = () if capture is None else tuple(capture.readings.values())
    for reading in readings:
        chosen_layers(reading, model.config)
    if not model.fingerprint:  # traced parameters have no fingerprint
        return
    own = origin(model.fingerprint)
    named = [edit.origin for edit in edits.edits]
    named += [edit.gate.origin for edit in edits.edits if edit.gate is not None]
    named += [reading.origin for reading in readings]
    foreign = {int(o) for origin in named for o in np.asarray(origin)} - {0, own}
    if foreign:
        raise UserError(
            f"a direction was made for another model, not for {model.name} (fingerprint "
            f"{model.fingerprint}); use a direction of this model, or pass only the array "
            f"(`axis.values`) to apply it anyway{_in_float16(model)}"
        )


def _in_float16(model: Model) -> str:
    """Return a note on float16 fingerprints for the message; "" for a model of another dtype."""
    if model.params.like.dtype != np.float16:
        return ""
    return ("; a model loaded in float16, which cannot represent all its weights exactly, has a "
            "different fingerprint than in bfloat16 or float32")


def reply_limits(max_new_tokens: Any, count: int, context: int) -> np.ndarray:
    """Return the maximum lengths of N replies in tokens, [N] int32, limited by the context.

    Args:
      max_new_tokens: a positive integer, or a sequence of N positive integers.
      count: the number of replies N.
      context: the model's context in tokens.

    Raises:
      UserError: a limit is not a positive integer, or the number of limits is not N.
    """
    if not isinstance(max_new_tokens, (list, tuple)) and getattr(max_new_tokens, "ndim", 0) != 1:
        check_settings(max_new_tokens=max_new_tokens)
        return np.full(count, min(max_new_tokens, context), np.int32)
    given = list(max_new_tokens)
    if len(given) != count:
        raise UserError(f"max_new_tokens has length {len(given)}, but the number of conversations "
                        f"is {count}; give one number, or one per conversation")
    for i, value in enumerate(given):
        check_settings(**{f"max_new_tokens[{i}]": value})
    return np.array([min(value, context) for value in given], np.int32)


def limits(model: Model, rows: list[chat.Row], max_new: Any) -> np.ndarray:
    """Return each reply's maximum length in tokens, [N] int32, within the model's context.

    Args:
      model: the model.
      rows: N encoded prompts.
      max_new: the requested maximum length of every reply in tokens, or [N]. The result is smaller
        if the prompt and this many tokens exceed the context.

    Raises:
      UserError: a prompt fills the context.
    """
    context = model.config.max_context
    for i, row in enumerate(rows):
        if row.tokens.size >= context:
            raise UserError(
                f"prompt {i} has {row.tokens.size} tokens, but the model's context is limited to "
                f"{context} tokens, including the reply; shorten the prompt"
            )
    room = np.array([context - row.tokens.size for row in rows], np.int32)
    return np.minimum(room, max_new).astype(np.int32)


def check_lengths(model: Model, rows: list[chat.Row]) -> None:
    """Check that complete conversations fit in the context.

    Raises:
      UserError: a conversation is longer than the context.
    """
    context = model.config.max_context
    for i, row in enumerate(rows):
        if row.tokens.size > context:
            raise UserError(f"conversation {i} has {row.tokens.size} tokens, but the model's "
                            f"context is limited to {context} tokens; shorten the conversation")


def row_ids(rows: list[chat.Row], ids: Iterable[int] | None, *, name: str = "ids") -> np.ndarray:
    """Return the ids that seed the random draws of N rows, [N] uint32.

    Args:
      rows: the N encoded conversations.
      ids: N ids. None: each id is a hash of the row's tokens and of the number of earlier rows with
        the same tokens.
      name: the name of the caller's argument: "ids", or "id" for one row.

    Raises:
      UserError: `ids` does not consist of N integers in 0…2³²−1.
    """
    if ids is not None:
        if not isinstance(ids, Iterable) or isinstance(ids, (str, bytes)):
            raise UserError(f"ids is {shown(ids, 60)}; give one integer per conversation")
        ids = list(ids)
        if len(ids) != len(rows):
            raise UserError(f"ids has length {len(ids)}, but the number of conversations is "
                            f"{len(rows)}; give one id per conversation")
        for i, one in enumerate(ids):
            if not (_is_scalar_integer(one) and 0 <= int(one) < 2**32):
                at = "id" if name == "id" else f"ids[{i}]"
                raise UserError(f"{at} is {shown(one, 60)}; it must be an integer in 0…2³²−1")
        return np.array([int(one) for one in ids], np.uint32)
    seen: Counter[bytes] = Counter()
    out = []
    for row in rows:
        key = row.tokens.tobytes()
        out.append(chat.row_id(row.tokens, seen[key]))
        seen[key] += 1
    return np.array(out, np.uint32)


def _is_scalar_integer(value: Any) -> bool:
    """Return whether a value is an integer or a 0-d integer array, but not a bool."""
    return is_integer(value) or (
        getattr(value, "ndim", 1) == 0 and np.issubdtype(value.dtype, np.integer))
