"""Operators: the named edits, each one row of numbers (s, c, lo, hi) of the rank-one edit.

Every constructor takes a direction in one of these forms:
  a named direction (`Axis`, `Vector`), whose own layers are used;
  an array [D], the same at every layer; [1, l, D], one for each of the chosen layers;
  with `rows=`, a bank [n, D] or [n, l, D], or a list of named directions: row b of the batch uses
  entry rows[b], and −1 leaves it alone.
Strengths and thresholds are a number, one a layer [l], or for a bank [n] or [n, l].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.edit import SITES, Site, table
from jaxpersona.interventions.where import Where, everywhere

Layers = int | slice | Sequence[int]


def steer(
    vector: Any,
    *,
    layers: Layers,
    scale: Any = 1.0,
    where: Where = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Add a direction: h ← h + scale·v, v as given and not normalised.

    Source: activation addition (Turner et al. 2023); Chen et al. 2025, §3.

    Args:
      vector: a direction or a bank of them (see the module).
      layers: zero-based; an int, a half-open slice, or several ints.
      scale: multiples of v.
      where: which tokens.
      rows: the bank's entry for each row, −1 for none.
      site: "residual" (after the block), "attention" or "mlp" (their outputs).

    Raises:
      ValueError: a direction, strength, layer or row that does not fit; field, value and mend.
    """
    bank = _Bank(vector, layers, rows, site)
    amount = bank.spread("scale", scale) * bank.norm
    return bank.finish(where, c=amount)


def cap(
    vector: Any,
    *,
    layers: Layers,
    floor: Any = None,
    ceiling: Any = None,
    where: Where = everywhere,
    rows: Any = None,
    site: Site = "residual",
    push: Any = None,
) -> Interventions:
    """Hold the projection on a direction within bounds: h ← h + v̂·max(τ − ⟨h, v̂⟩, 0) for a floor.

    Source: activation capping, Lu et al. 2026, §5. A ceiling is the same in reverse:
    h ← h − v̂·max(⟨h, v̂⟩ − τ, 0). The part of h orthogonal to v̂ is left as it is.

    Args:
      vector, layers, where, rows, site: as for `steer`; the direction's length does not matter.
      floor: the least projection τ, in units of the residual stream.
      ceiling: the greatest.
      push: a direction (or bank) in the same form as `vector` to move along instead: the control
        that displaces h exactly as far as the cap would, but elsewhere. It caps nothing.

    Raises:
      ValueError: neither bound, a floor above the ceiling, a floor on an axis that does not point
        toward the Assistant, or anything that `steer` refuses.
    """
    if floor is None and ceiling is None:
        raise ValueError("cap needs a floor, a ceiling or both")
    bank = _Bank(vector, layers, rows, site)
    lo = bank.spread("floor", -np.inf if floor is None else floor)
    hi = bank.spread("ceiling", np.inf if ceiling is None else ceiling)
    if (lo > hi).any():
        raise ValueError("floor is above ceiling; a projection cannot satisfy both")
    along = None if push is None else _Bank(push, layers, rows, site)
    if along is not None and along.direction.shape != bank.direction.shape:
        raise ValueError(f"push has shape {along.direction.shape}; vector {bank.direction.shape}")
    return bank.finish(where, lo=lo, hi=hi, push=None if along is None else along.direction)


def ablate(
    vector: Any,
    *,
    layers: Layers,
    where: Where = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Remove the component along a direction: h ← h − v̂·⟨h, v̂⟩ (Arditi et al. 2024).

    Args and errors are those of `steer`; the direction's length does not matter.
    """
    return scale(vector, 0.0, layers=layers, where=where, rows=rows, site=site)


def scale(
    vector: Any,
    factor: Any,
    *,
    layers: Layers,
    where: Where = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Multiply the projection on a direction: h ← h + (factor − 1)·⟨h, v̂⟩·v̂.

    Args and errors are those of `steer`, with `factor` a number, one a layer or one an entry.
    """
    bank = _Bank(vector, layers, rows, site)
    return bank.finish(where, s=bank.spread("factor", factor))


def set_projection(
    vector: Any,
    value: Any,
    *,
    layers: Layers,
    where: Where = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Put the projection on a direction at a value: h ← h + (value − ⟨h, v̂⟩)·v̂.

    With the mean projection of some texts as `value` it is a mean-ablation along v̂ (the rest of h
    is left as it is). Args and errors are those of `steer`; `value` is in units of the residual
    stream.
    """
    bank = _Bank(vector, layers, rows, site)
    return bank.finish(where, s=0.0, c=bank.spread("value", value))


_GREATEST = float(np.finfo(np.float32).max)


class _Bank:
    """Directions read from any of the accepted forms, and numbers spread to fit them."""

    def __init__(self, vector: Any, layers: Layers, rows: Any, site: Site) -> None:
        if site not in SITES:
            raise ValueError(f"site is {site!r}; it must be one of {SITES}")
        self.site: Site = site
        self.index = None if rows is None else np.asarray(rows)
        named = list(vector) if isinstance(vector, (list, tuple)) else [vector]
        if not named:
            raise ValueError("vector is an empty list; give at least one direction")
        if all(hasattr(item, "at_layers") for item in named):
            self.total = named[0].n_layers
            self.layers = resolve_layers(layers, self.total)
            for item in named:
                item.check_site(site)
                if item.n_layers != self.total:
                    raise ValueError(f"the directions have {self.total} and {item.n_layers} layers")
            value = np.stack([item.at_layers(self.layers) for item in named])
            origin = [item.origin for item in named]
        else:
            self.total = None
            self.layers = resolve_layers(layers, None)
            value, origin = self._array(vector), None
        if rows is None and len(value) != 1:
            raise ValueError(
                f"vector is a bank of {len(value)} directions; say with `rows=` which row uses "
                "which"
            )
        if not np.isfinite(value).all():
            raise ValueError("vector holds a value that is not finite")
        self.norm = np.linalg.norm(value, axis=-1).T  # [l, n]
        if (self.norm == 0).any():
            raise ValueError("vector is zero at a chosen layer; it has no direction")
        self.direction = np.moveaxis(value, 0, 1) / self.norm[..., None]
        self.origin = np.array(origin or [0] * len(value), np.uint32)

    def _array(self, vector: Any) -> np.ndarray:
        """Read a bare array as [n, l, D]."""
        value = np.asarray(vector, np.float64)
        count = len(self.layers)
        if value.ndim == 1:
            value = value[None, None]
        elif value.ndim == 2 and self.index is not None:
            value = value[:, None]
        elif value.ndim != 3:
            raise ValueError(
                f"vector has shape {value.shape}; it must be [D], [1, l, D], or with `rows=` "
                "[n, D] or [n, l, D]"
            )
        if value.shape[1] not in (1, count):
            raise ValueError(
                f"vector has {value.shape[1]} layers, but {count} were chosen: {list(self.layers)}"
            )
        return np.broadcast_to(value, (value.shape[0], count, value.shape[2]))

    def spread(self, name: str, value: Any) -> np.ndarray:
        """Broadcast a strength or threshold to [l, n]."""
        given = np.asarray(value, np.float64)
        n, count = self.direction.shape[1], len(self.layers)
        if np.isnan(given).any():
            raise ValueError(f"{name} is NaN")
        worst = {"floor": np.inf, "ceiling": -np.inf}.get(name)
        bad = np.abs(given) > _GREATEST if worst is None else given == worst
        if bad.any():
            raise ValueError(f"{name} is infinite in float32; it must be a finite number")
        if given.ndim and given.shape[-1] == self.total and (given.ndim == 2 or self.index is None):
            given = given[..., list(self.layers)]  # one a layer of the model
        if given.ndim == 0:
            return np.full((count, n), float(given))
        if given.ndim == 1 and self.index is not None and given.size == n:
            return np.broadcast_to(given[None, :], (count, n))
        if given.ndim == 1 and self.index is None and given.size == count:
            return np.broadcast_to(given[:, None], (count, n))
        if given.shape == (n, count):
            return given.T
        raise ValueError(
            f"{name} has shape {given.shape}; with {count} layers and {n} directions it must be a "
            f"number, {'[n]' if self.index is not None else '[l]'} or [n, l]"
        )

    def finish(self, where: Where, *, s: Any = 1.0, c: Any = 0.0, lo: Any = -np.inf,
               hi: Any = np.inf, push: np.ndarray | None = None) -> Interventions:
        """Make the table."""
        count, n = self.norm.shape
        numbers = [np.broadcast_to(x, (count, n)) for x in (s, c, lo, hi)]
        test = np.broadcast_to(where.encode(), (n, 5))
        edit = table(self.direction, np.stack(numbers, -1), test, self.origin, self.layers,
                     self.site, self.index, push)
        return Interventions((edit,))


def resolve_layers(layers: Layers, total: int | None) -> tuple[int, ...]:
    """Return the chosen layers as a tuple from low to high; a slice is half-open, as in Python.

    Raises:
      ValueError: none, a negative one, one beyond `total`, a repeated one, another
        order than from low to high, or an open slice where the number of layers is not known.
    """
    if isinstance(layers, slice):
        if total is None and (layers.stop is None or layers.stop < 0 or (layers.start or 0) < 0):
            raise ValueError(f"layers is {layers}; without a named axis give its start and stop")
        if total is not None and layers.stop is not None and layers.stop > total:
            raise ValueError(f"layers {layers.start}:{layers.stop} reach beyond 0…{total - 1}")
        end: int = total if total is not None else layers.stop  # pyright: ignore
        chosen = tuple(range(*layers.indices(end)))
    else:
        items = [layers] if isinstance(layers, (int, np.integer)) else list(layers)
        if any(isinstance(i, bool) or not isinstance(i, (int, np.integer)) for i in items):
            raise ValueError(f"layers is {layers!r}; it must be an int, a slice or several ints")
        chosen = tuple(int(i) for i in items)
    if not chosen:
        raise ValueError(f"layers is {layers!r}, which chooses none")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers is {layers!r}, which repeats one; chain two instead")
    if list(chosen) != sorted(chosen):
        raise ValueError(f"layers is {layers!r}; give them from low to high, the order in "
                         "which arrays with one entry a layer are read")
    if chosen[0] < 0 or (total is not None and chosen[-1] >= total):
        beyond = "" if total is None else f"; they are 0…{total - 1}"
        raise ValueError(f"layers is {layers!r}, out of range{beyond}")
    return chosen
