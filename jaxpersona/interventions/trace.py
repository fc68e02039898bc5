"""The class `Trace`, which applies interventions and records captures at the sites of a block."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import brief
from jaxpersona.captures.capture import Capture, chosen_layers
from jaxpersona.captures.projections import OnDirections
from jaxpersona.captures.reading import Reading, State
from jaxpersona.distributed.sharding import spread_rows
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import PreparedInterventions
from jaxpersona.interventions.fusion import Fusion
from jaxpersona.interventions.table import Prepared, Site
from jaxpersona.kernels.edit import Norm
from jaxpersona.models import nn
from jaxpersona.models.batch import Batch
from jaxpersona.models.config import ModelConfig

if TYPE_CHECKING:
    from jaxtyping import Array, Int

_BITS = 32
Gates = dict[str, Any]  # index of a gated table (as a string) → state of its gate


class Applied(flax.struct.PyTreeNode):
    """The numbers of tokens that one table of interventions selected and changed.

    B is the number of rows or conversations, and l is the number of layers of the table.

    Attributes:
      seen: [B] int32, the number of tokens that the table's `where` selected.
      changed: [l, B] int32, the number of tokens changed at each layer. For a rank-one edit, a
        token is counted if δ ≠ 0, even if rounding to the model's dtype leaves h unchanged.

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> cap = jp.cap(jp.load_axis("mini"), layers=4, floor="p25")
      >>> found = jp.extract(jp.load("mini"), [talk], interventions=cap).applied[0]
      >>> found.seen.shape, found.changed.shape  # [B], [l, B]
      ((1,), (1, 1))
    """

    __repr__ = brief

    seen: Int[Array | np.ndarray, " B"]
    changed: Int[Array | np.ndarray, "l B"]


class Trace:
    """The state of the edits, gates and readings during one call of `forward`.

    Args:
      config: the model's configuration.
      batch: the tokens of this call.
      edits, capture: the interventions and the readings.
      gates: the states of the gates after the earlier calls, or None if this is the first call.
      before: [B] int32 or None, the number of tokens in the cache of each row (`Gate.init`).
      fusion: the implementation of the end of a block.

    Raises:
      UserError: `gates` belongs to other interventions, or a reading does not match the model.
    """

    def __init__(self, config: ModelConfig, batch: Batch, edits: PreparedInterventions,
                 capture: Capture, gates: Gates | None, before: jax.Array | None,
                 fusion: Fusion) -> None:
        self.config, self.batch, self.edits, self.capture = config, batch, edits, capture
        self.fusion = fusion
        rows = batch.tokens.shape[0]
        with jax.named_scope("intervention"):
            self.active = [edit.seen(batch) for edit in edits.edits]

        def spread(state: Any) -> Any:
            return jax.tree.map(lambda x: spread_rows(x, 0, batch.tokens), state)

        self.gates: Gates = {
            str(number): spread(edit.gate.init(rows, before)) if gates is None
            else gates.get(str(number))
            for number, edit in enumerate(edits.edits) if edit.gate is not None
        }
        if gates is not None and set(gates) != set(self.gates):
            raise UserError(f"carry.gates has states for the tables {sorted(gates)}, but the "
                            f"tables with a gate are {sorted(self.gates)}; continue with the "
                            "interventions of the earlier call")
        self.opened: dict[int, jax.Array] = {}
        self.changed: list[list[jax.Array]] = [[] for _ in edits.edits]
        self.layers = {name: chosen_layers(reading, config)
                       for name, reading in capture.readings.items()}
        with jax.named_scope("capture"):
            self.weights = {name: reading.weights(batch)
                            for name, reading in capture.readings.items()}
        # for each reading name, one reduction per layer
        self.reductions: dict[str, list[Any]] = {name: [] for name in capture.readings}

    @property
    def highest(self) -> int:
        """The highest layer that is read or edited, or −1 if there is none."""
        used = [*self.layers.values(), *(edit.layers for edit in self.edits.edits)]
        return max((layers[-1] for layers in used), default=-1)

    def visit(self, site: Site, layer: int, h: jax.Array) -> jax.Array:
        """Edit h [B, T, D] at one site of one layer, then evaluate gates and read activations.

        Returns:
          The edited h.
        """
        before = h
        for number, edit in self.edits.at(site, layer):
            with jax.named_scope("intervention"):
                h, changed = edit.apply(layer, h, self._active(number, edit), before)
                h = nn.round_residual(h)
                self.changed[number].append(changed)
        self._measure(site, layer, h)
        for name, reading in self._readings(site, layer):
            with jax.named_scope("capture"):
                index = self.layers[name].index(layer)
                read = h if reading.edited else before
                self.reductions[name].append(reading.read(read, self.weights[name], index))
        return h

    def finish(self, layer: int, x: jax.Array, added: jax.Array,
               norm: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Add the MLP's output to the residual stream x, and visit the site "residual".

        Args:
          layer: the block's index.
          x: the residual stream [B, T, D] before the MLP's output is added.
          added: the MLP's output [B, T, D].
          norm: the weight [D] of the next block's first norm, or None after the last block.

        Returns:
          The residual stream after the block, and the output of the next block's first norm (None
          unless the kernel of `kernels.edit` computed it).

        Raises:
          UserError: the kernel is requested, but does not support an edit or a reading at this
            layer, the platform, the width or the number of directions.
        """
        if self.fusion.implementation == "xla":
            return self.visit("residual", layer, nn.round_residual(x + added)), None
        edits = list(self.edits.at("residual", layer))
        readings = list(self._readings("residual", layer))
        active = [self._active(number, edit) for number, edit in edits]
        following = (None if norm is None else
                     Norm(norm, self.config.norm_eps, self.config.norm_offset))
        with jax.named_scope("intervention"):
            done, projected = self.fusion.run(
                layer, x, added, [edit for _, edit in edits], active,
                {name: (reading, self.layers[name].index(layer)) for name, reading in readings},
                following)
        for (number, _), changed in zip(edits, done.changed, strict=True):
            self.changed[number].append(changed)
        self._measure("residual", layer, done.h)
        for name, reading in readings:
            with jax.named_scope("capture"):
                index, weights = self.layers[name].index(layer), self.weights[name]
                self.reductions[name].append(
                    reading.reduce(projected[name], weights, index)
                    if isinstance(reading, OnDirections) and name in projected
                    else reading.read(done.h, weights, index))
        return done.h, done.normed

    def _active(self, number: int, edit: Prepared) -> jax.Array:
        """Return a mask [B, T] of the tokens that `where` selects and at which the gate is open."""
        active = self.active[number]
        return active if edit.gate is None else active & self.opened[number]

    def _readings(self, site: Site, layer: int) -> Iterator[tuple[str, Reading]]:
        """Yield (name, reading) for each reading at one site of one layer."""
        for name, reading in self.capture.readings.items():
            if reading.site == site and layer in self.layers[name]:
                yield name, reading

    def _measure(self, site: Site, layer: int, h: jax.Array) -> None:
        """Evaluate the gates at one site of one layer, and update their states."""
        for number, gate in self.edits.gates_at(site, layer):
            with jax.named_scope("intervention"):
                self.opened[number], self.gates[str(number)] = gate.measure(
                    h, self.batch, self.gates[str(number)])

    def captured(self, state: dict[str, State] | None, slots: jax.Array) -> dict[str, State]:
        """Add the reductions of this call to the states of the capture.

        Args:
          state: the state of each reading before this call, by name, or None without a capture.
          slots: [B, T] int32, the cache slot of each token.

        Returns:
          The state of each reading after this call, by name; {} if `state` is None.

        Raises:
          UserError: the states belong to another capture.
        """
        if state is not None and set(state) != set(self.capture.readings):
            raise UserError(f"carry.captured has the readings {sorted(state)}, but the capture "
                            f"has {sorted(self.capture.readings)}; pass the same capture as in "
                            "the earlier call")
        with jax.named_scope("capture"):
            return {
                name: reading.update(state[name], jax.tree.map(lambda *x: jnp.stack(x),
                                                               *self.reductions[name]),
                                     self.weights[name], self.batch, slots)
                for name, reading in self.capture.readings.items()
                if state is not None
            }

    def applied(self) -> tuple[Applied, ...]:
        """Return one `Applied` per table, in order."""
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
    """Return the number of changed tokens at each layer, [l, B] int32.

    In a decode step (T = 1), the masks of up to 32 layers are packed into the bits of one word,
    because stacking them would launch one kernel per layer.

    Args:
      changed: for each layer, a mask [B, T] of the changed tokens, or counts [B] if the kernel of
        `kernels.edit` applied the edits.
    """
    if changed[0].ndim == 1:
        return jnp.stack(changed)
    if changed[0].shape[1] > 1:
        return jnp.stack(changed).sum(-1, dtype=jnp.int32)
    counts = []
    for at in range(0, len(changed), _BITS):
        packed = changed[at : at + _BITS]
        words = functools.reduce(jnp.bitwise_or, (
            jax.lax.shift_left(layer.astype(jnp.uint32), jnp.full(layer.shape, i, jnp.uint32))
            for i, layer in enumerate(packed)))
        bits = jnp.arange(len(packed), dtype=jnp.uint32)[:, None]
        counts.append((words.T >> bits & 1).astype(jnp.int32))
    return jnp.concatenate(counts)
