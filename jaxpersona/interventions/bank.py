"""Conversion of an operator's directions, strengths and thresholds to a canonical form.

In the shapes below, l is the number of chosen layers, L the number of layers of the model, and D
the width of the residual stream. A direction has one of these forms:

- a named direction (`Axis` or `Vector`), whose values at the chosen layers are used
- an array [D], which is used at every chosen layer, or [1, l, D], with one vector per chosen layer
- with `rows=`, a bank of n directions: an array [n, D] or [n, l, D], or a list of named directions.
  Batch row b uses direction rows[b] of the bank; an index of −1 means no edit.

A strength or threshold is a number or an array: [l] or [1, l] for one direction, and [n] or [n, l]
for a bank. With named directions, an array [L] or [n, L], with one value per layer of the model, is
also allowed.

Under a JAX transformation (grad, vmap, jit), only shapes are checked, because the values are
unknown. All operations are differentiable.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import is_integer
from jaxpersona.errors import UserError
from jaxpersona.interventions.table import SITES, Site
from jaxpersona.models.config import MAX_LAYERS
from jaxpersona.runtime import is_traced

Layers = int | slice | Sequence[int] | str
_MANTISSA, _BIAS = 23, 127  # mantissa bits and exponent bias of float32
_GREATEST = float(np.finfo(np.float32).max)
# for each bound, the invalid infinity; the infinity of the opposite sign means "no bound"
_OPEN = {"floor": np.inf, "above": np.inf, "ceiling": -np.inf, "below": -np.inf}


class Bank:
    """A bank of n directions at l layers, in canonical form.

    Attributes:
      layers, site: the layers and the site at which the directions apply.
      total: the number of layers L of the model, or None for arrays, which do not specify it.
      index: [B] integers, the index of each batch row's direction (−1 for no edit), or None if one
        direction applies to all rows.
      direction: [l, n, D], the unit vectors; a zero vector stays zero.
      norm: [l, n], the norms of the vectors before normalization.
      origin: [n] uint32, for each direction, a hash of its model's weights (`params.origin`), or 0
        if unknown.
    """

    def __init__(self, vector: Any, layers: Layers, rows: Any, site: Site,
                 name: str = "vector", zero: bool = False) -> None:
        """Convert a direction or a bank of directions to unit vectors.

        Args:
          vector: a direction or a bank, in one of the forms that the module docstring lists.
          layers: the chosen layers, in a form that `resolve_layers` accepts.
          rows: the index of each batch row's direction, or None without a bank.
          site: the site at which the directions apply.
          name: the name of the argument in error messages.
          zero: whether zero vectors are allowed.

        Raises:
          UserError: `site`, `layers` or the shape of `vector` is invalid; `vector` is empty, or
            mixes named directions with arrays; a value is not numeric or not finite; a vector is
            zero at a chosen layer and `zero` is False; a named direction was measured at another
            site; named directions have different numbers of layers; or there are several
            directions and `rows` is None.
        """
        if site not in SITES:
            raise UserError(f"site is {site!r}; it must be one of {SITES}")
        self.site: Site = site
        self.index = None if rows is None else np.asarray(rows)
        vector = plain(vector)
        named = list(vector) if isinstance(vector, (list, tuple)) else [vector]
        if not named:
            raise UserError(f"{name} is an empty list; give at least one direction")
        if all(hasattr(item, "at_layers") for item in named):
            self.total = named[0].n_layers
            self.layers = resolve_layers(layers, self.total)
            for item in named:
                item.check_site(site)
                if item.n_layers != self.total:
                    raise UserError(f"the directions have {self.total} and {item.n_layers} layers; "
                                    "use directions of the same model")
            value = np.stack([item.at_layers(self.layers) for item in named])
            origin = [item.origin for item in named]
        else:
            check_unmixed(name, named)
            self.total = None
            self.layers = resolve_layers(layers, None)
            value, origin = self._array(vector, name), None
        if rows is None and len(value) != 1:
            raise UserError(
                f"{name} is a bank of {len(value)} directions; give the index of each row's "
                "direction in `rows=`"
            )
        xp: Any = jnp if is_traced(value) else np
        if xp is np and not np.isfinite(value).all():
            raise UserError(f"{name} contains a non-finite value; all values must be finite")
        unit, norm = normalised(value)
        if xp is np and not zero and not value.any(-1).all():
            zeros = [at for i, at in enumerate(self.layers) if not value[:, i].any(-1).all()]
            raise UserError(f"{name} is zero at a chosen layer ({', '.join(map(str, zeros))}); "
                            "give nonzero vectors, or choose other layers")
        self.norm = norm.T
        self.direction = xp.moveaxis(unit, 0, 1)
        self.origin = np.array(origin or [0] * len(value), np.uint32)

    def _array(self, vector: Any, name: str) -> Any:
        """Convert directions to a floating-point array and broadcast it to [n, l, D].

        Raises:
          UserError: the array is not numeric, or its shape is invalid.
        """
        value = numbers(name, vector)
        xp: Any = jnp if is_traced(value) else np
        count = len(self.layers)
        if value.ndim == 1:
            value = value[None, None]
        elif value.ndim == 2 and self.index is not None:
            value = value[:, None]
        elif value.ndim != 3:
            raise UserError(
                f"{name} has shape {value.shape}; it must be [D] or [1, l, D], or, with "
                "`rows=`, [n, D] or [n, l, D]"
                + ("; for an array [L, D] with one vector per layer of the model, give "
                   "jp.Vector(array) or its row for the layer" if value.ndim == 2 else "")
            )
        if value.shape[1] not in (1, count):
            raise UserError(
                f"{name} has vectors for {value.shape[1]} layers, but the number of chosen layers "
                f"is {count}: {list(self.layers)}; give one vector per chosen layer"
            )
        return xp.broadcast_to(value, (value.shape[0], count, value.shape[2]))

    def spread(self, name: str, value: Any) -> Any:
        """Broadcast a strength or threshold to [l, n], for l layers and n directions.

        Raises:
          UserError: the value is not numeric, `check_finite` rejects it, or its shape is invalid
            or ambiguous.
        """
        given = numbers(name, value)
        shape = given.shape
        xp: Any = jnp if is_traced(given) else np
        n, count = self.direction.shape[1], len(self.layers)
        if xp is np:
            check_finite(name, given)
        if self.total is not None and given.ndim and given.shape[-1] == self.total:
            # one value per layer of the model: select the values of the chosen layers
            if given.ndim == 1 and self.index is not None and n == self.total > 1:
                raise UserError(f"{name} has {n} numbers, but there are {n} directions and {n} "
                                "layers, so the shape is ambiguous; give an array [n, l] with one "
                                "number per direction and chosen layer")
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
        raise UserError(
            f"{name} has shape {shape}; it must be a number or have shape "
            f"{'[n]' if self.index is not None else '[l]'} or [n, l], where l (the number of "
            f"chosen layers) is {count} and n (the number of directions) is {n}"
            + ("" if self.total is None else "; the last axis may also have one value for each of "
               f"the {self.total} layers of the model")
            + ("; to steer each row with its own strength, use jp.sweep" if name == "scale" else "")
        )


def check_unmixed(name: str, items: Sequence[Any]) -> None:
    """Check that a list of arrays contains no named direction, whose metadata would be ignored.

    Raises:
      UserError: an item is a named direction; the message names the argument.
    """
    if any(hasattr(item, "at_layers") for item in items):
        raise UserError(f"{name} contains both named directions and arrays; give only named "
                        "directions or only arrays")


def percentile(vector: Any, name: str, bound: Any, of: str) -> Any:
    """Return the thresholds [L] if `bound` is a percentile name, such as "p25", else `bound`.

    A warning is issued if `bound` is an int that is probably meant as a percentile.

    Args:
      vector: the direction, which must be an `Axis` if `bound` is a percentile name.
      name: the name of the bound in error messages.
      bound: the bound, as numbers or a percentile name.
      of: the population over which the percentile is computed (`Axis.thresholds`).

    Raises:
      UserError: `bound` is a string, and `vector` is not an `Axis` or has no thresholds for this
        percentile and population.
    """
    if not isinstance(bound, str):
        table = getattr(vector, "percentiles", {}).get(of, {})
        if type(bound) is int and f"p{bound}" in table:
            warnings.warn(f"{name} is {bound}, which is a projection; for the percentile, give "
                          f"{name}='p{bound}', or for the projection without this warning, "
                          f"{name}={float(bound)}", stacklevel=5)
        return bound
    if not hasattr(vector, "thresholds"):
        raise UserError(f"{name} is {bound!r}, but only an Axis has percentiles; give an Axis as "
                        "`vector`, or give the bound as numbers")
    return vector.thresholds(bound, of=of)


def normalised(value: Any) -> tuple[Any, Any]:
    """Normalize vectors to unit length without overflow or underflow.

    In float32, squares of numbers above 1.8e19 overflow and squares of numbers below 1.1e-19
    underflow. Each vector is therefore first multiplied by a power of two, so that the magnitude of
    its largest component is close to 1. The multiplication is exact, except for components that are
    many orders of magnitude smaller and underflow.

    Args:
      value: [..., D], finite. If `value` is traced, it must be float32, and the results are
        differentiable.

    Returns:
      The unit vectors [..., D] in the dtype of `value` (a zero vector stays zero), and the norms
      [...], in float64 unless `value` is traced.
    """
    if not is_traced(value):
        value = np.asarray(value)
        _, power = np.frexp(np.abs(value).max(-1, keepdims=True, initial=0))
        near = np.ldexp(value, -power)
        norm = np.linalg.norm(near, axis=-1, keepdims=True)
        with np.errstate(over="ignore"):  # `steer` rejects an infinite norm
            length = np.ldexp(norm.astype(np.float64), power)
        return near / np.where(norm == 0, 1, norm), length[..., 0]
    greatest = jax.lax.stop_gradient(jnp.abs(value).max(-1, keepdims=True))
    exponent = jax.lax.bitcast_convert_type(greatest, jnp.int32) >> _MANTISSA
    # Build the power of two from its bits, because exp2 may round. The clip excludes subnormal
    # powers, because XLA may flush them to 0.
    scale = jax.lax.bitcast_convert_type(
        jnp.clip(2 * _BIAS - exponent, 1, 2 * _BIAS) << _MANTISSA, jnp.float32)
    near = value * scale
    norm = jnp.linalg.norm(near, axis=-1, keepdims=True)
    return near / jnp.where(norm == 0, 1, norm), (norm / scale)[..., 0]


def numbers(name: str, value: Any) -> Any:
    """Convert numbers to a float64 array, or traced numbers to a float32 array.

    Raises:
      UserError: the values are not real numbers.
    """
    if is_traced(value):
        return jnp.asarray(value, jnp.float32)
    try:
        array = np.asarray(plain(value))
    except (RuntimeError, TypeError, ValueError):  # NumPy rejects nested lists of different lengths
        array = np.empty(0, object)
    if array.dtype.kind in "iuf" or array.dtype.name == "bfloat16":
        return array.astype(np.float64)
    raise UserError(f"{name} is {shown(value, 80)}; it must be a real number or an array of "
                    "real numbers")


def plain(value: Any) -> Any:
    """Convert a PyTorch tensor, or each tensor in a list, to a NumPy array.

    NumPy itself cannot convert tensors that require a gradient, are on a GPU or have the dtype
    bfloat16. Other values, and lists without tensors, are returned unchanged.
    """
    if isinstance(value, (list, tuple)):
        tensors = any(hasattr(item, "detach") for item in value)
        return [plain(item) for item in value] if tensors else value
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        held = value.detach().cpu()
        return (held.double() if held.is_floating_point() else held).numpy()
    return value


def check_finite(name: str, value: np.ndarray) -> None:
    """Check that numbers are finite in float32.

    A lower bound (`floor` or `above`) may also be −inf, and an upper bound (`ceiling` or `below`)
    may be inf.

    Raises:
      UserError: a value is NaN, too large for float32, or an infinity that is not allowed; the
        message names the argument.
    """
    if np.isnan(value).any():
        raise UserError(f"{name} is NaN; it must be a number")
    open_ = _OPEN.get(name)
    beyond = np.abs(value) > _GREATEST
    if (beyond if open_ is None else beyond & (value != -open_)).any():
        raise UserError(f"{name} is infinite in float32; it must be a finite number")


def resolve_layers(layers: Layers, total: int | None) -> tuple[int, ...]:
    """Return the chosen layers as an ascending tuple; slices are half-open, as in Python.

    A string is parsed by `parse_layers`: "46:54" is a slice, "16" a layer and "3,5" two layers.
    `total` is the model's number of layers, or None if it is unknown.

    Raises:
      UserError: the selection has the wrong type or form, is empty, unsorted or out of range, or
        repeats a layer. If `total` is None, a slice without a stop or with a negative bound is also
        an error.
    """
    wanted: Any = parse_layers(layers) if isinstance(layers, str) else layers
    text = shown(layers, 80)
    if isinstance(wanted, slice):
        start, stop = wanted.start, wanted.stop
        if not all(x is None or is_integer(x) for x in (start, stop, wanted.step)):
            raise UserError(f"layers is {text}; the bounds of a slice must be ints")
        if wanted.step is not None and wanted.step < 1:
            raise UserError(f"layers is {text}; the step of a slice must be at least 1")
        if total is None and (stop is None or stop < 0 or (start or 0) < 0):
            raise UserError(f"layers is {text}; without a named direction, the number of layers is "
                            "unknown, so give a slice with a nonnegative start and stop")
        highest = max(start or 0, stop or 0)
        if total is not None and (highest > total or (start or 0) < -total):
            raise UserError(f"layers is {text}, which is out of range; layers must be in "
                            f"0…{total - 1}")
        if total is None and highest > MAX_LAYERS:
            raise UserError(f"layers is {text}; a model has at most {MAX_LAYERS} layers")
        reach: Any = stop if total is None else total
        chosen = tuple(range(*wanted.indices(reach)))
    else:
        listed = np.atleast_1d(wanted) if hasattr(wanted, "ndim") else wanted
        several = isinstance(listed, Sequence) and not isinstance(listed, bytes | bytearray)
        several = several or getattr(listed, "ndim", 0) == 1
        if several and len(listed) > MAX_LAYERS:
            raise UserError(f"layers is {text}; a model has at most {MAX_LAYERS} layers")
        items: list[Any] = list(listed) if several else [wanted]
        if not all(map(is_integer, items)):
            raise UserError(f"layers is {text}; it must be an int, a slice, a list of ints or "
                            "a string such as '46:54'")
        chosen = tuple(int(i) for i in items)
    if not chosen:
        raise UserError(f"layers is {text}, which selects no layer; give at least one layer")
    if len(set(chosen)) != len(chosen):
        raise UserError(f"layers is {text}, which repeats a layer; chain two interventions "
                        "instead")
    if list(chosen) != sorted(chosen):
        raise UserError(f"layers is {text}; list the layers in ascending order, which is also the "
                        "order of arrays with one entry per layer")
    most = MAX_LAYERS if total is None else total
    if chosen[0] < 0 or chosen[-1] >= most:
        last = f"is {most - 1}" if total is not None else "of a model is config.n_layers − 1"
        raise UserError(f"layers is {text}, which is out of range; layers must be in 0…{most - 1}"
                        + (f", and the last layer {last}" if chosen[0] < 0 else ""))
    return chosen


def parse_layers(text: str) -> slice | list[int]:
    """Parse a string into a slice ("46:54", half-open) or a list of layers ("16" or "3,5").

    Raises:
      UserError: the string has none of these forms.
    """
    number = r"\s*-?[0-9]{1,9}\s*"
    if re.fullmatch(rf"{number}(,{number})*", text):
        return [int(part) for part in text.split(",")]
    if re.fullmatch(rf"({number}|\s*):({number}|\s*)", text):
        return slice(*(int(part) if part.strip() else None for part in text.split(":")))
    raise UserError(f"layers is {shown(text, 80)}; give text such as 46:54 (half-open), 16 or "
                    "3,5")
