"""Directions and numbers in every form that a constructor accepts, brought into one.

A direction may be
  a named one (`Axis`, `Vector`), whose own layers are used;
  an array [D], the same at every layer; [1, l, D], one for each of the chosen layers;
  with `rows=`, a bank [n, D] or [n, l, D], or a list of named directions: row b of the batch uses
  entry rows[b], and −1 leaves it alone.
Strengths and thresholds are a number, one a layer [l], or for a bank [n] or [n, l].

Under a transformation of JAX (grad, vmap, jit) values cannot be looked at; then their shapes alone
are checked, and everything stays differentiable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.interventions.table import SITES, Site, traced
from jaxpersona.models.config import MAX_LAYERS

Layers = int | slice | Sequence[int] | str
_MANTISSA, _BIAS = 23, 127  # of float32
_GREATEST = float(np.finfo(np.float32).max)
_OPEN = {"floor": np.inf, "above": np.inf, "ceiling": -np.inf, "below": -np.inf}  # no bound at all


class Bank:
    """Directions of the accepted forms, and numbers spread to fit them.

    Attributes:
      layers, site, index: the structure, and the entry of each row.
      direction: unit vectors [l, n, D].
      norm: [l, n], the lengths they were given with.
      origin: [n] uint32, half their models' fingerprints.
    """

    def __init__(self, vector: Any, layers: Layers, rows: Any, site: Site,
                 name: str = "vector", zero: bool = False) -> None:
        """Read a direction or a bank of them; `zero` lets it be zero (then so is its unit)."""
        if site not in SITES:
            raise ValueError(f"site is {site!r}; it must be one of {SITES}")
        self.site: Site = site
        self.index = None if rows is None else np.asarray(rows)
        named = list(vector) if isinstance(vector, (list, tuple)) else [vector]
        if not named:
            raise ValueError(f"{name} is an empty list; give at least one direction")
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
            value, origin = self._array(vector, name), None
        if rows is None and len(value) != 1:
            raise ValueError(
                f"{name} is a bank of {len(value)} directions; say with `rows=` which row uses "
                "which"
            )
        xp: Any = jnp if traced(value) else np
        if xp is np and not np.isfinite(value).all():
            raise ValueError(f"{name} holds a value that is not finite")
        unit, norm = normalised(value)
        if xp is np and not zero and not value.any(-1).all():
            raise ValueError(f"{name} is zero at a chosen layer; it has no direction")
        self.norm = norm.T
        self.direction = xp.moveaxis(unit, 0, 1)
        self.origin = np.array(origin or [0] * len(value), np.uint32)

    def _array(self, vector: Any, name: str) -> Any:
        """Read a bare array as [n, l, D]."""
        value = numbers(name, vector)
        xp: Any = jnp if traced(value) else np
        count = len(self.layers)
        if value.ndim == 1:
            value = value[None, None]
        elif value.ndim == 2 and self.index is not None:
            value = value[:, None]
        elif value.ndim != 3:
            raise ValueError(
                f"{name} has shape {value.shape}; it must be [D], [1, l, D], or with `rows=` "
                "[n, D] or [n, l, D]"
            )
        if value.shape[1] not in (1, count):
            raise ValueError(
                f"{name} has {value.shape[1]} layers, but {count} were chosen: {list(self.layers)}"
            )
        return xp.broadcast_to(value, (value.shape[0], count, value.shape[2]))

    def spread(self, name: str, value: Any) -> Any:
        """Broadcast a strength or threshold to [l, n].

        Raises:
          ValueError: not a number, of another shape, or one that could be meant in two ways.
        """
        given = numbers(name, value)
        xp: Any = jnp if traced(given) else np
        n, count = self.direction.shape[1], len(self.layers)
        if xp is np:
            check_finite(name, given)
        if self.total is not None and given.ndim and given.shape[-1] == self.total:
            # one a layer of the model
            if given.ndim == 1 and self.index is not None and n == self.total > 1:
                raise ValueError(f"{name} has {n} numbers, for {n} directions or {n} layers; give "
                                 "[n, l], one a direction and chosen layer")
            given = given[..., np.array(self.layers)]
            if given.ndim == 1 and self.index is not None:
                given = xp.broadcast_to(given[None], (n, count))
        if given.ndim == 0:
            return xp.broadcast_to(given[None, None], (count, n))
        if given.ndim == 1 and self.index is not None and given.size == n:
            return xp.broadcast_to(given[None, :], (count, n))
        if given.ndim == 1 and self.index is None and given.size == count:
            return xp.broadcast_to(given[:, None], (count, n))
        if given.shape == (n, count):
            return given.T
        raise ValueError(
            f"{name} has shape {given.shape}; with {count} layers and {n} directions it must be a "
            f"number, {'[n]' if self.index is not None else '[l]'} or [n, l]"
        )


def normalised(value: Any) -> tuple[Any, Any]:
    """Divide vectors by their length, whatever its size.

    A square overflows float32 beyond 1.8e19 and vanishes below 1e-23. So every vector is first
    multiplied by the power of two that brings its greatest number between 1/2 and 1, which changes
    no bit of its direction.

    Args:
      value: [..., D], finite; under a transformation of JAX it stays differentiable.

    Returns:
      The unit vectors [..., D] in the dtype of `value` (a zero vector stays zero) and the lengths
      [...], in float64 unless they are traced.
    """
    if not traced(value):
        value = np.asarray(value)
        _, power = np.frexp(np.abs(value).max(-1, keepdims=True, initial=0))
        near = np.ldexp(value, -power)
        norm = np.linalg.norm(near, axis=-1, keepdims=True)
        with np.errstate(over="ignore"):  # a length beyond float64 is infinite, and is refused
            length = np.ldexp(norm.astype(np.float64), power)
        return near / np.where(norm == 0, 1, norm), length[..., 0]
    greatest = jax.lax.stop_gradient(jnp.abs(value).max(-1, keepdims=True))
    exponent = jax.lax.bitcast_convert_type(greatest, jnp.int32) >> _MANTISSA
    # a power of two as its bits, because exp2 may round; never subnormal, which XLA may take for 0
    scale = jax.lax.bitcast_convert_type(
        jnp.clip(2 * _BIAS - exponent, 1, 2 * _BIAS) << _MANTISSA, jnp.float32)
    near = value * scale
    norm = jnp.linalg.norm(near, axis=-1, keepdims=True)
    return near / jnp.where(norm == 0, 1, norm), (norm / scale)[..., 0]


def numbers(name: str, value: Any) -> Any:
    """Read numbers as float64, or float32 where they are traced.

    Raises:
      ValueError: something else.
    """
    if traced(value):
        return jnp.asarray(value, jnp.float32)
    try:
        found = np.asarray(value)
    except (TypeError, ValueError):  # no array at all, so no numbers
        found = np.empty(0, object)
    if found.dtype.kind in "iuf" or found.dtype.name == "bfloat16":
        return found.astype(np.float64)
    raise ValueError(f"{name} is {_said(value)}; it must be a real number or an array of them")


def _said(value: Any) -> str:
    """Write a value for an error; a long one is cut short."""
    said = repr(value)
    return said if len(said) <= 80 else said[:79] + "…"


def check_finite(name: str, value: np.ndarray) -> None:
    """Refuse NaN, and what is infinite in float32 but for a bound that stands open.

    Raises:
      ValueError: with the field's name.
    """
    if np.isnan(value).any():
        raise ValueError(f"{name} is NaN")
    open_ = _OPEN.get(name)
    beyond = np.abs(value) > _GREATEST
    if (beyond if open_ is None else beyond & (value != -open_)).any():
        raise ValueError(f"{name} is infinite in float32; it must be a finite number")


def resolve_layers(layers: Layers, total: int | None) -> tuple[int, ...]:
    """Return the chosen layers as a tuple from low to high; a slice is half-open, as in Python.

    Text says the same as numbers do: "46:54" a slice, "16" and "3,5" single layers.

    Raises:
      ValueError: none, a negative one, one beyond `total` (the ends of a slice too), a repeated
        one, another order than from low to high, an open slice where the number of layers is not
        known, more than any model has, or text of another form.
    """
    wanted: Any = parse_layers(layers) if isinstance(layers, str) else layers
    said = _said(layers)
    if isinstance(wanted, slice):
        start, stop = wanted.start, wanted.stop
        if not all(x is None or _whole(x) for x in (start, stop, wanted.step)):
            raise ValueError(f"layers is {said}; a slice of layers is of ints")
        if wanted.step is not None and wanted.step < 1:
            raise ValueError(f"layers is {said}; a slice of layers goes up, by 1 or more")
        if total is None and (stop is None or stop < 0 or (start or 0) < 0):
            raise ValueError(f"layers is {said}; without a named axis give its start and stop")
        highest = max(start or 0, stop or 0)
        if total is not None and (highest > total or (start or 0) < -total):
            raise ValueError(f"layers is {said}, which reaches beyond 0…{total - 1}")
        if total is None and highest > MAX_LAYERS:
            raise ValueError(f"layers is {said}; no model has more than {MAX_LAYERS}")
        reach: Any = stop if total is None else total
        chosen = tuple(range(*wanted.indices(reach)))
    else:
        held = np.atleast_1d(wanted) if hasattr(wanted, "ndim") else wanted
        several = isinstance(held, Sequence) and not isinstance(held, bytes | bytearray)
        several = several or getattr(held, "ndim", 0) == 1
        if several and len(held) > MAX_LAYERS:
            raise ValueError(f"layers is {said}; no model has more than {MAX_LAYERS}")
        items: list[Any] = list(held) if several else [wanted]
        if not all(map(_whole, items)):
            raise ValueError(f"layers is {said}; it must be an int, a slice, several ints or "
                             "text such as 46:54")
        chosen = tuple(int(i) for i in items)
    if not chosen:
        raise ValueError(f"layers is {said}, which chooses none")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"layers is {said}, which repeats one; chain two instead")
    if list(chosen) != sorted(chosen):
        raise ValueError(f"layers is {said}; give them from low to high, the order in "
                         "which arrays with one entry a layer are read")
    most = MAX_LAYERS if total is None else total
    if chosen[0] < 0 or chosen[-1] >= most:
        raise ValueError(f"layers is {said}, out of range; they are 0…{most - 1}")
    return chosen


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def parse_layers(text: str) -> slice | list[int]:
    """Read layers as text, "46:54" (half-open), "16" or "3,5".

    Raises:
      ValueError: text of another form.
    """
    number = r"\s*-?[0-9]{1,9}\s*"
    if re.fullmatch(rf"{number}(,{number})*", text):
        return [int(part) for part in text.split(",")]
    if re.fullmatch(rf"({number}|\s*):({number}|\s*)", text):
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    raise ValueError(f"layers is {_said(text)}; write 46:54 (half-open), 16 or 3,5")
