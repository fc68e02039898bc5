"""The end of a block as one operation: residual add, rank-one edits, projections and next norm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxpersona.captures.projections import OnDirections
from jaxpersona.captures.reading import Reading
from jaxpersona.distributed.sharding import Axes, by_shard
from jaxpersona.errors import UserError
from jaxpersona.interventions.edit import PreparedEdit
from jaxpersona.interventions.table import Prepared
from jaxpersona.kernels.edit import Implementation, Norm, Site, SiteEdit, refusal, site

_RESIDUAL: Axes = ("batch", None, None)


@dataclasses.dataclass(frozen=True)
class Fusion:
    """The operations at the end of a block, run by the chosen implementation.

    Attributes:
      implementation: "xla", "pallas" or "interpret" (see `forward`).
      platform: the platform of the devices: "cpu", "gpu" or "tpu".

    Raises:
      UserError: the implementation is unknown.
    """

    implementation: Implementation
    platform: str

    def __post_init__(self) -> None:
        if self.implementation not in get_args(Implementation):
            raise UserError(f"residual is {self.implementation!r}; it must be one of "
                            f"{', '.join(get_args(Implementation))}")

    def run(self, layer: int, x: jax.Array, added: jax.Array, edits: Sequence[Prepared],
            active: Sequence[jax.Array], readings: Mapping[str, tuple[Reading, int]],
            norm: Norm | None) -> tuple[Site, dict[str, jax.Array]]:
        """Run the kernel at one layer, on each device's shard of the rows.

        Args:
          layer: the block's index.
          x: the residual stream [B, T, D] before the MLP's output is added.
          added: the MLP's output [B, T, D].
          edits: the tables of the site "residual" at this layer, in order.
          active: for each table, a mask [B, T] of the tokens that it edits.
          readings: for each reading name, the reading and the index of `layer` among its layers.
          norm: the next block's first norm, which is applied to the result, or None after the last
            block.

        Returns:
          The result of `kernels.edit.site`, and a dict from the name of each projection reading to
          its projections [B, T, K] onto its K directions.

        Raises:
          UserError: the kernel does not support an edit, a reading, the platform, the width or the
            number of directions; the message gives the reason.
        """
        found = [edit.at(layer, where) for edit, where in zip(edits, active, strict=True)
                 if isinstance(edit, PreparedEdit)]
        if len(found) < len(edits):
            other = next(edit for edit in edits if not isinstance(edit, PreparedEdit))
            self._refuse(f"layer {layer} has a {type(other).__name__.removeprefix('Prepared')}, "
                         "which is not a rank-one edit")
        late = [name for name, (reading, _) in readings.items()
                if edits and not reading.edited and not _projects(reading)]
        if late:
            self._refuse(f"the reading {late[0]!r} reads layer {layer} before the edits, which the "
                         "kernel supports only for projections")
        # `kernels.edit.site` requires that the directions of readings before the edits come first
        names = sorted((name for name, (reading, _) in readings.items() if _projects(reading)),
                       key=lambda name: readings[name][0].edited)
        tables = {name: reading.at(index) for name in names
                  for reading, index in [readings[name]] if isinstance(reading, OnDirections)}
        before = sum(tables[name].shape[0] for name in names if not readings[name][0].edited)
        directions = jnp.concatenate([tables[name] for name in names]) if names else None
        reason = refusal(self.platform, x.shape[-1],
                         sum(1 + (edit.push is not None) for edit in found),
                         0 if directions is None else directions.shape[0], x.dtype.itemsize)
        if reason is not None and self.implementation == "pallas":
            self._refuse(reason)
        done = _by_rows(x, added, found, directions, before, norm, self.implementation)
        projected, start = {}, 0
        for name in names:
            end = start + tables[name].shape[0]
            assert done.read is not None
            projected[name] = done.read[..., start:end]
            start = end
        return done, projected

    def _refuse(self, reason: str) -> None:
        raise UserError(f"residual is {self.implementation!r}, but {reason}; use 'xla'")


def _projects(reading: Reading) -> bool:
    """Return whether a reading depends on the activations only through their projections."""
    return isinstance(reading, OnDirections) and type(reading).read is OnDirections.read


def _by_rows(x: jax.Array, added: jax.Array, edits: Sequence[SiteEdit],
             directions: jax.Array | None, before: int, norm: Norm | None,
             implementation: Implementation) -> Site:
    """Call `kernels.edit.site` on each device's shard of the rows."""
    def axes(array: jax.Array) -> Axes:
        per_row = array.shape[0] == x.shape[0]
        return ("batch" if per_row else None, *(None,) * (array.ndim - 1))

    weight = None if norm is None else norm.weight
    shared, tree = jax.tree.flatten((directions, weight))
    leaves, form = jax.tree.flatten((x, added, list(edits)))

    def local(*arrays: Any) -> tuple[jax.Array, ...]:
        directions, weight = jax.tree.unflatten(tree, arrays[:len(shared)])
        x, added, edits = jax.tree.unflatten(form, arrays[len(shared):])
        done = site(x, added, edits, directions=directions, before=before,
                    norm=None if norm is None else norm._replace(weight=weight),
                    implementation=implementation)
        return tuple(part for part in done if part is not None)

    results = [_RESIDUAL, (None, "batch")] + [_RESIDUAL] * (
        (directions is not None) + (norm is not None))
    given = [(None,) * array.ndim for array in shared] + [axes(array) for array in leaves]
    made = iter(by_shard(local, given, results)(*shared, *leaves))
    return Site(next(made), next(made), None if directions is None else next(made),
                None if norm is None else next(made))
