"""Kinds of requests; all requests in a lane have the same kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import shown
from jaxpersona.captures.capture import Capture
from jaxpersona.engine import stopping
from jaxpersona.engine.edits import for_one_row, neutral_row
from jaxpersona.engine.generate import asks_for_code, stops_of
from jaxpersona.engine.prompts import widths
from jaxpersona.engine.request import Request
from jaxpersona.engine.tasks import Setting, Shape, piece_of
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions

if TYPE_CHECKING:
    from jaxpersona.models.model import Model


def plain_shapes(model: Model, sizes: Sequence[int], capacity: Interventions | None,
                 rows: int) -> Iterator[tuple[Kind, Shape]]:
    """Yield all kinds and shapes of requests without captures or stop strings.

    Args:
      model: the model.
      sizes: the cache sizes S, in slots.
      capacity: the result of `reserve`, or None.
      rows: the number of rows B of a lane.

    Yields:
      For each kind and padded prompt length (with chunked prefill, for each kind), the kind and
      the static sizes of the prefill. There are separate kinds for greedy and sampled decoding.
    """
    edits, capture = for_one_row(None, capacity), Capture()
    code, neutral = asks_for_code(edits, capture), neutral_row(edits)
    piece = piece_of(model.config, model.params.like, neutral, rows)
    for slots in sizes:
        wide = widths(slots, model.config.max_context) if piece is None else [piece]
        for greedy in (True, False):
            for width in wide:
                yield Kind(slots, greedy, code, (), capture, neutral), Shape(0, width, slots)


class Kind:
    """The kind of a request, compared by value; requests of the same kind share a lane.

    Attributes:
      slots: the number of cache slots S.
      greedy: whether the temperature is 0.
      code: whether an intervention or a capture may select tokens in fenced code blocks.
      strings: the stop strings (`stopping.checked`).
      capture: the capture of the request.
      neutral: interventions on one row that change nothing, with the structure of the request's
        interventions.
    """

    def __init__(self, slots: int, greedy: bool, code: bool, strings: tuple[str, ...],
                 capture: Capture, neutral: Interventions) -> None:
        self.slots, self.greedy, self.code, self.strings = slots, greedy, code, strings
        self.capture, self.neutral = capture, neutral
        readings, readings_structure = jax.tree.flatten(jax.device_get(capture))
        edits, edits_structure = jax.tree.flatten(neutral)
        self.key = (slots, greedy, code, strings, readings_structure,
                    tuple((x.shape, x.dtype, x.tobytes()) for x in map(np.asarray, readings)),
                    edits_structure, tuple((x.shape, x.dtype) for x in edits))
        self._hash = hash(self.key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and self.key == other.key

    def setting(self, model: Model) -> Setting:
        """Return the settings of a lane for requests of this kind."""
        stops = stops_of(model, self.code)
        if self.strings:
            table = stopping.table(model.tokenizer, model.config.vocab_size, self.strings)
            stops = stops.replace(strings=jnp.asarray(table))
        return Setting(self.slots, self.slots, self.greedy, self.capture, stops)


def examples(requests: Any) -> list[Request]:
    """Check the examples for `Engine.warm_up`, and return them as a list.

    Raises:
      UserError: the argument is not a list of requests.
    """
    if isinstance(requests, Request) or not isinstance(requests, Iterable):
        raise UserError(f"requests is {shown(requests, 60)}; give a list, such as [jp.Request(…)]")
    requests = list(requests)
    for i, one in enumerate(requests):
        if not isinstance(one, Request):
            raise UserError(f"requests[{i}] is {shown(one, 60)}; give a jp.Request")
    return requests
