"""What one traced forward pass changed and read: the visitor of a block's three sites."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpersona.captures.capture import Capture, chosen_layers
from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.table import Site
from jaxpersona.models import nn
from jaxpersona.models.batch import Batch
from jaxpersona.models.config import ModelConfig

_BITS = 32
Gates = dict[str, Any]  # a gate's state by its table's number


@flax.struct.dataclass
class Applied:
    """Proof that an intervention ran, one table's counts for every row.

    Attributes:
      seen: [B] int32, tokens that its `where` chose.
      changed: [l, B] int32, tokens that it changed, at each of its layers: where a rank-one edit's
        δ is not 0, whether or not so small a change survives rounding to the model's dtype.
    """

    seen: Any
    changed: Any


class Trace:
    """Edit and read activations on their way through a model. Lives only while it is traced."""

    def __init__(self, config: ModelConfig, batch: Batch, edits: Interventions, capture: Capture,
                 gates: Gates | None, before: jax.Array | None) -> None:
        self.batch, self.edits, self.capture = batch, edits, capture
        rows = batch.tokens.shape[0]
        with jax.named_scope("intervention"):
            self.active = [edit.seen(batch) for edit in edits.edits]

        def spread(state: Any) -> Any:
            return jax.tree.map(lambda x: spread_rows(x, 0, batch.tokens), state)

        self.gates: Gates = {
            str(number): spread(edit.gate.start(rows, before)) if gates is None
            else gates.get(str(number))
            for number, edit in enumerate(edits.edits) if edit.gate is not None
        }
        if gates is not None and set(gates) != set(self.gates):
            raise ValueError(f"gates are those of other interventions: {sorted(gates)}, not "
                             f"{sorted(self.gates)}")
        self.opened: dict[int, jax.Array] = {}
        self.changed: list[list[jax.Array]] = [[] for _ in edits.edits]
        self.layers = {name: chosen_layers(part, config) for name, part in capture.parts.items()}
        with jax.named_scope("capture"):
            self.weights = {name: part.weights(batch) for name, part in capture.parts.items()}
        self.parts: dict[str, list[Any]] = {name: [] for name in capture.parts}

    @property
    def highest(self) -> int:
        """The last layer that anything reads or edits, −1 where nothing does."""
        used = [*self.layers.values(), *(edit.layers for edit in self.edits.edits)]
        return max((layers[-1] for layers in used), default=-1)

    def visit(self, site: Site, layer: int, h: jax.Array) -> jax.Array:
        """Edit, then measure and read, the activation [B, T, D] at one site."""
        before = h
        for number, edit in self.edits.at(site, layer):
            with jax.named_scope("intervention"):
                active = self.active[number]
                if edit.gate is not None:
                    active = active & self.opened[number]
                h, changed = edit.apply(layer, h, active, before)
                h = nn.round_residual(h)
                self.changed[number].append(changed)
        for number, gate in self.edits.gates_at(site, layer):
            with jax.named_scope("intervention"):
                self.opened[number], self.gates[str(number)] = gate.measure(
                    h, self.batch, self.gates[str(number)])
        for name, part in self.capture.parts.items():
            if part.site == site and layer in self.layers[name]:
                with jax.named_scope("capture"):
                    index = self.layers[name].index(layer)
                    self.parts[name].append(part.read(h, self.weights[name], index))
        return h

    def captured(self, state: dict[str, Any] | None, slots: jax.Array) -> dict[str, Any]:
        """Add this call's readings to the state.

        Raises:
          ValueError: the state is another capture's.
        """
        if state is not None and set(state) != set(self.capture.parts):
            raise ValueError(f"captured is of another capture: {sorted(state)}, not "
                             f"{sorted(self.capture.parts)}")
        with jax.named_scope("capture"):
            return {
                name: part.add(state[name], jax.tree.map(lambda *x: jnp.stack(x),
                                                         *self.parts[name]),
                               self.weights[name], self.batch, slots)
                for name, part in self.capture.parts.items()
                if state is not None
            }

    def applied(self) -> tuple[Applied, ...]:
        """Count the tokens that each table saw and changed."""
        with jax.named_scope("intervention"):
            rows = self.batch.tokens.shape[0]
            return tuple(
                Applied(
                    seen=jnp.broadcast_to(active, self.batch.tokens.shape).sum(-1, dtype=jnp.int32),
                    changed=_counts(changed).reshape(-1, rows),
                )
                for active, changed in zip(self.active, self.changed, strict=True)
            )


def _counts(changed: list[jax.Array]) -> jax.Array:
    """Count the tokens of every layer's [B, T] bool: [l, B] int32.

    In a decode step the layers become bits of words: stacked, each would be a kernel of its own.
    """
    if changed[0].shape[1] > 1:
        return jnp.stack(changed).sum(-1, dtype=jnp.int32)
    parts = []
    for at in range(0, len(changed), _BITS):
        some = changed[at : at + _BITS]
        words = functools.reduce(jnp.bitwise_or, (
            jax.lax.shift_left(layer.astype(jnp.uint32), jnp.full(layer.shape, i, jnp.uint32))
            for i, layer in enumerate(some)))
        places = jnp.arange(len(some), dtype=jnp.uint32)[:, None]
        parts.append((words.T >> places & 1).astype(jnp.int32))
    return jnp.concatenate(parts)
