"""Recompute the response means of stored rollouts without generating the replies again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.captures.capture import mean
from jaxpersona.engine import prompts
from jaxpersona.engine.extract import extract
from jaxpersona.interventions.where import response
from jaxpersona.text import chat

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

_TOGETHER = 64  # maximum number of rollouts whose response means are in memory at the same time


def encoded(model: Model, text: str) -> list[int]:
    """Return the token ids of a reply's text, without special tokens."""
    return list(model.tokenizer.encode(text, add_special_tokens=False))


def reply_ids(model: Model, text: str, tokens: np.ndarray) -> dict[str, Any]:
    """Return {"reply_ids": ids} if encoding a reply's text does not give its token ids, else {}.

    Args:
      model: the model.
      text: the text of the reply.
      tokens: the generated token ids of the reply.
    """
    ids = tokens.tolist()
    return {} if encoded(model, text) == ids else {"reply_ids": ids}


def reread(model: Model, records: Sequence[Mapping[str, Any]]) -> Iterator[np.ndarray]:
    """Yield the response mean [L, D] float32 of each rollout, in the given order.

    The response means equal those computed during generation up to rounding. The response mean of
    an empty reply is NaN.

    Args:
      model: the model that generated the replies.
      records: the rollouts, with their replies.

    Raises:
      UserError: activations are not finite.
    """
    for begin in range(0, len(records), _TOGETHER):
        rows = []
        for record in records[begin : begin + _TOGETHER]:
            *start, reply = record["conversation"]
            ids = record.get("reply_ids", None)
            ids = encoded(model, reply["content"]) if ids is None else ids
            rows.append(chat.answered(model.tokenizer, prompts.encode(model, start),
                                      np.array(ids, np.int32)))
        yield from extract(model, rows, capture=mean(response),
                           on_nonfinite="raise").captured["mean"]
