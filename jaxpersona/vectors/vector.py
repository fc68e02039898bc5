"""Named directions, with metadata about the model and the site where a direction was measured.

Interventions check the metadata of a `Vector`. A plain array has no metadata, so using the array
with the wrong model or at the wrong site is not detected.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpersona.brief import line, quoted, shown
from jaxpersona.calls import checked_class
from jaxpersona.errors import UserError
from jaxpersona.export import Table, others
from jaxpersona.interventions.bank import Layers, normalised, resolve_layers
from jaxpersona.interventions.table import SITES, Site
from jaxpersona.models.params import SCHEME, origin
from jaxpersona.vectors.fields import check_names, finite, float32
from jaxpersona.vectors.saved import Saved

POPULATIONS = ("default", "all")
CONTROL_VECTOR = "GGUF control vector"  # notes["source"] of a vector written by another program


@checked_class
@dataclasses.dataclass(frozen=True, eq=False)
class Vector(Table, Saved):
    """A direction in activation space at every layer of one model.

    Attributes:
      values: [L, D] float32, not normalized. values[l] is the direction at block l (zero-based). If
        the site is "residual", this is a direction of the residual stream after the block.
      name: the name of the direction.
      model: the model's name.
      fingerprint: the model's fingerprint (sixteen hexadecimal digits), or "" if unknown.
      site: the site in the block at which the direction was measured.
      notes: additional metadata (strings and numbers), saved in the vector's file.
      fingerprint_scheme: the version of the fingerprint. If it is older than `params.SCHEME`, only
        the half that depends on the configuration is compared with the model's fingerprint; if it
        is newer, nothing is compared (`caps.fitted`).

    Raises:
      UserError: the values are not [L, D] or not finite, or another field is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np
      >>> happy = jp.Vector(np.ones((8, 128)), name="happy")
      >>> -2 * happy[4:6]
      Vector('-2·happy', [8, 128])
      >>> round(float(happy.cosine(-happy)[0]), 3)
      -1.0
    """

    values: np.ndarray
    name: str = "vector"
    model: str = ""
    fingerprint: str = ""
    site: Site = "residual"
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint_scheme: int = SCHEME

    kind = "vector"

    def __post_init__(self) -> None:
        values = float32(self.values, "values")
        if values.ndim != 2 or not values.size:
            raise UserError(f"values has shape {values.shape}; it must be [L, D], with L and D "
                            "nonzero")
        if not np.isfinite(values).all():
            raise UserError(f"{self.kind} {self.name!r} contains a non-finite value; all values "
                            "must be finite")
        check_names(self)
        if self.site not in SITES:
            raise UserError(f"site is {self.site!r}; it must be one of {SITES}")
        object.__setattr__(self, "values", values)

    def __repr__(self) -> str:
        return line(type(self).__name__, quoted(self.name), f"{list(self.values.shape)}",
                    f"of {quoted(self.model)}" if self.model else "",
                    self.site if self.site != "residual" else "")

    def records(self) -> list[dict[str, Any]]:
        """Return one record per layer: the layer and the direction's norm."""
        norms = normalised(self.values)[1].tolist()
        return [{"layer": layer, "norm": norm} for layer, norm in enumerate(norms)]

    def facts(self) -> dict[str, Any]:
        """Return the name, the model, the fingerprint, the site and the notes."""
        return {"name": self.name, "model": self.model, "fingerprint": self.fingerprint,
                "site": self.site, **others(self.notes, ("name", "model", "fingerprint", "site"))}

    @property
    def n_layers(self) -> int:
        """The number of layers L."""
        return self.values.shape[0]

    @property
    def unit(self) -> np.ndarray:
        """The unit vectors v̂ [L, D] float32; a zero vector stays zero."""
        return normalised(self.values)[0]

    @property
    def origin(self) -> int:
        """The half of the fingerprint that depends on the weights, as an integer (`params.origin`).

        The value is 0 if the fingerprint is unknown or its scheme is not `params.SCHEME`.
        """
        return origin(self.fingerprint) if self.fingerprint_scheme == SCHEME else 0

    def at_layers(self, layers: tuple[int, ...]) -> np.ndarray:
        """Return the values of the given layers, [l, D]."""
        return self.values[list(layers)]

    def thresholds(self, percentile: str, *, of: str = "default") -> np.ndarray:
        """Raise an error, because only an `Axis` has thresholds.

        Raises:
          UserError: always.
        """
        raise UserError(f"{self.kind} {self.name!r} has no thresholds: only an Axis has them, "
                        "not parts, multiples or sums of an axis; give the axis itself with "
                        "layers=, or the floor as numbers")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the values, so that `np.asarray(vector)` is [L, D]."""
        if copy is False and dtype not in (None, np.float32):
            raise ValueError("the values are float32; conversion to another dtype needs a copy")
        return np.array(self.values, dtype) if copy or dtype is not None else self.values

    def __array_ufunc__(self, function: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Return a `Vector` for a NumPy number times a vector; apply other ufuncs to the values."""
        if (function, method) == (np.multiply, "__call__") and isinstance(inputs[0], np.number):
            return self * inputs[0].item()
        arrays = (one.values if isinstance(one, Vector) else one for one in inputs)
        return getattr(function, method)(*arrays, **options)

    def __neg__(self) -> Vector:
        """Return the opposite direction."""
        return self._with(-self.values, f"-{self.name}")

    def __mul__(self, factor: float) -> Vector:
        """Return the direction scaled by a number.

        Raises:
          UserError: the factor or a resulting value is not finite.
        """
        if not isinstance(factor, (int, float, np.number)):
            return NotImplemented
        number = finite(factor, f"{self.kind} {self.name!r} was multiplied by")
        with np.errstate(over="ignore"):
            return self._with(self.values.astype(np.float64) * number, f"{number:g}·{self.name}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Vector:
        """Return the direction divided by a number.

        Raises:
          UserError: the divisor is zero, or the divisor or a resulting value is not finite.
        """
        if not isinstance(divisor, (int, float, np.number)):
            return NotImplemented
        if divisor == 0:
            raise UserError(f"{self.kind} {self.name!r} was divided by {divisor}; use another "
                            "number")
        number = finite(divisor, f"{self.kind} {self.name!r} was divided by")
        with np.errstate(over="ignore"):
            return self._with(self.values.astype(np.float64) / number, f"{self.name}/{number:g}")

    def __radd__(self, start: Any) -> Vector:
        """Return the direction unchanged for 0, the initial value of Python's `sum`."""
        return self if type(start) is int and start == 0 else NotImplemented

    def __add__(self, other: Vector) -> Vector:
        """Return the sum of two directions of the same model and site."""
        if not isinstance(other, Vector):
            return NotImplemented
        self._check_same(other)
        return self._with(self.values + other.values, f"{self.name} + {other.name}")

    def __sub__(self, other: Vector) -> Vector:
        """Return this direction minus another direction of the same model and site."""
        if not isinstance(other, Vector):
            return NotImplemented
        self._check_same(other)
        return self._with(self.values - other.values, f"{self.name} - {other.name}")

    def __getitem__(self, layers: Layers) -> Vector:
        """Return a copy that is zero at all layers except the given ones, as in `vector[4:8]`."""
        kept = np.zeros_like(self.values)
        at = list(resolve_layers(layers, self.n_layers))
        kept[at] = self.values[at]
        return self._with(kept, self.name)

    def cosine(self, other: Vector | Any) -> np.ndarray:
        """Return the cosine similarity to another direction at every layer, [L] float32.

        The other direction is a `Vector` or an array [L, D]. The similarity is NaN at layers where
        one of the directions is zero.

        Raises:
          UserError: the shape, the site or the fingerprint differs, or `other` is not a finite
            numeric array [L, D].
        """
        if not isinstance(other, Vector):
            other = Vector(other, "other", site=self.site)
        self._check_same(other)
        # in float64, where no product of two float32 values overflows or underflows
        mine, theirs = self.values.astype(np.float64), other.values.astype(np.float64)
        norms = np.linalg.norm(mine, axis=1) * np.linalg.norm(theirs, axis=1)
        return np.divide((mine * theirs).sum(1), norms, out=np.full(self.n_layers, np.nan),
                         where=norms > 0).astype(np.float32)

    def _with(self, values: np.ndarray, name: str) -> Vector:
        """Return a `Vector` with new values and a new name, and the other metadata of `self`."""
        return Vector(values, name, self.model, self.fingerprint, self.site, self.notes,
                      self.fingerprint_scheme)

    def _check_same(self, other: Vector) -> None:
        """Check that another direction has the same shape, site and fingerprint.

        Fingerprints are compared only if both are known and have the same scheme.

        Raises:
          UserError: the shape, the site or the fingerprint differs.
        """
        for field in ("values", "site", "fingerprint"):
            own, theirs = getattr(self, field), getattr(other, field)
            if field == "values":
                own, theirs, field = list(own.shape), list(theirs.shape), "shape"
            if field == "fingerprint" and not (
                    own and theirs and self.fingerprint_scheme == other.fingerprint_scheme):
                continue  # a fingerprint is unknown, or the schemes differ
            if own != theirs:
                raise UserError(f"{self.name!r} and {other.name!r} differ in {field} ({own} and "
                                f"{theirs}); use directions of the same model and site")

    def check_site(self, site: Site) -> None:
        """Check that the direction was measured at `site`.

        Raises:
          UserError: the direction was measured at another site.
        """
        if site != self.site:
            raise UserError(
                f"{self.kind} {self.name!r} was measured at site {self.site!r}; to use it at "
                f"{site!r}, pass its values as an array"
            )


@checked_class
@dataclasses.dataclass(frozen=True, eq=False)
class Axis(Vector):
    """The Assistant Axis, oriented so that higher projections are more Assistant-like.

    Attributes:
      percentiles: a dict from populations of rollouts, such as "default", to dicts from percentile
        names, such as "p25", to arrays [L] float32. At each layer, a percentile is computed over
        one value per rollout: the projection of the rollout's response mean onto the unit axis.

    Raises:
      UserError: a field is invalid (see `Vector`), or a percentile is not one finite number per
        layer.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.load_axis("mini")
      Axis('assistant', [8, 128], of 'mini', percentiles: all 9, default 9)
      >>> jp.load_axis("mini").thresholds("p25", of="default").shape
      (8,)
    """

    percentiles: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    kind = "axis"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.percentiles, Mapping):
            raise UserError(f"percentiles is of type {type(self.percentiles).__name__}; it must be "
                            "a dict with populations, such as 'default', as keys")
        object.__setattr__(self, "percentiles", {
            population: _percentiles(population, table, self.n_layers)
            for population, table in self.percentiles.items()})

    def __repr__(self) -> str:
        known = ", ".join(f"{of} {len(table)}" for of, table in self.percentiles.items())
        return line("Axis", quoted(self.name), f"{list(self.values.shape)}",
                    f"of {quoted(self.model)}" if self.model else "",
                    f"percentiles: {known}" if known else "no thresholds")

    def records(self) -> list[dict[str, Any]]:
        """Return one record per layer: the layer, the norm, and columns such as "default p25"."""
        return [{**row, **{f"{of} {name}": float(values[row["layer"]])
                           for of, table in self.percentiles.items()
                           for name, values in sorted(table.items(), key=lambda x: _by_number(x[0]))
                           }} for row in super().records()]

    def _left_out(self, column: str) -> bool:
        return " " in column and column not in ("default p25", "default p50", "default p75")

    def thresholds(self, percentile: str, *, of: str = "default") -> np.ndarray:
        """Return the projection at a percentile for every layer, [L] float32.

        Args:
          percentile: the name of the percentile. For example, 25% of the population has projections
            below "p25".
          of: the population: "default" (rollouts of the default persona) or "all" (all rollouts
            except rollouts of held-out roles).

        Raises:
          UserError: the axis has no thresholds for the population or the percentile.
        """
        if not self.percentiles:
            raise UserError(f"axis {self.name!r} has no thresholds; give the floor as numbers, or "
                            "use an axis that `jaxpersona axis` wrote")
        if of not in self.percentiles:
            raise UserError(
                f"of is {of!r}; this axis has the populations {sorted(self.percentiles)}"
            )
        known = self.percentiles[of]
        if percentile not in known:
            meant = f"p{percentile}"
            raise UserError(f"percentile is {shown(percentile)}"
                            + (f" (write {meant})" if meant in known else "")
                            + f"; this axis has {', '.join(sorted(known, key=_by_number))}")
        return known[percentile]


def _by_number(name: str) -> tuple[float, str]:
    """Return a sort key that orders p5 before p25 and puts names without a number last."""
    number = re.fullmatch(r"p(\d+(?:\.\d+)?)", name)
    return float(number.group(1)) if number else np.inf, name


def _percentiles(population: str, table: Any, layers: int) -> dict[str, np.ndarray]:
    """Check that a population's percentiles are finite arrays [L], and convert them to float32.

    Raises:
      UserError: `table` is not a dict, or a name or a value is invalid.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"percentiles[{population!r}] is of type {type(table).__name__}; it must "
                        "be a dict from percentile names, such as 'p25', to arrays [L]")
    checked = {}
    for name, given in table.items():
        field = f"percentiles/{population}/{name}"
        if not isinstance(population, str) or not isinstance(name, str):
            raise UserError(f"{field} has a name that is not a string; use names such as p25")
        if field.count("/") != 2:
            raise UserError(f"{field} has a / in a name, which the file format does not allow")
        checked[name] = value = float32(given, field)
        if value.shape != (layers,):
            raise UserError(f"{field} has shape {list(value.shape)}; it must have one value per "
                            f"layer, [{layers}]")
        if not np.isfinite(value).all():
            raise UserError(f"{field} contains a non-finite value; calibrate the axis again")
    return checked
