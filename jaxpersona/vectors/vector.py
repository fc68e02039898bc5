"""Named directions with metadata: the model, site and layers that they belong to.

Interventions check the metadata of a `Vector`. A bare array has none, so its use with another model
or site is not detected.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import normalised
from jaxpersona.interventions.compose import Interventions, chain
from jaxpersona.interventions.operators import cap
from jaxpersona.interventions.table import SITES, Site
from jaxpersona.interventions.where import Where, everywhere
from jaxpersona.models.config import MAX_LAYERS, ModelConfig
from jaxpersona.models.params import SCHEME, origin

POPULATIONS = ("default", "all")
CONTROL_VECTOR = "GGUF control vector"  # notes["source"] of a vector written by another program


def _float32(values: Any, field: str) -> np.ndarray:
    if np.iscomplexobj(values):
        raise UserError(f"{field} is complex; give real numbers")
    try:
        # overflow gives infinity, which the caller rejects
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32)
    except (OverflowError, TypeError, ValueError) as error:  # an integer of 400 digits, None, text
        raise UserError(f"{field} cannot be converted to float32 ({error})") from None


def _check_names(found: Vector | Caps) -> None:
    """Check the text metadata of a direction, and convert its notes to plain Python values."""
    for field in ("name", "model", "fingerprint"):
        value = getattr(found, field)
        if not isinstance(value, str):
            raise UserError(f"{field} is {value!r}; it must be a string")
    if not re.fullmatch(r"([0-9a-f]{16})?", found.fingerprint):
        raise UserError(f"fingerprint is {found.fingerprint!r}; it must be sixteen hexadecimal "
                        "digits or empty")
    scheme = found.fingerprint_scheme
    if type(scheme) is not int or scheme < 1:
        raise UserError(f"fingerprint_scheme is {scheme!r}; it must be a positive integer, "
                        f"{SCHEME} for fingerprints of this version")
    object.__setattr__(found, "notes", _plain(found.notes))


def _plain(notes: Any) -> dict[str, Any]:
    """Return notes with NumPy and JAX scalars converted to Python's, which all formats support."""
    if not isinstance(notes, Mapping):
        raise UserError(f"notes is a {type(notes).__name__}; it must be a dict")
    plain = {}
    for name, value in notes.items():
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if not isinstance(name, str) or not isinstance(value, (str, int, float)):
            raise UserError(f"notes[{str(name)[:40]!r}] is a {type(value).__name__}; keys must be "
                            "strings and values strings or numbers")
        plain[name] = value
    return plain


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A direction in the residual stream at every layer of one model.

    Attributes:
      values: [L, D] float32, not normalized; values[l] belongs to block l (zero-based), for the
        site "residual" to the residual stream after it.
      name: the name of the direction.
      model: the model's name.
      fingerprint: the model's fingerprint (sixteen hexadecimal digits), or "" if unknown.
      site: the site in the block at which the direction was measured.
      notes: further metadata (strings and numbers), saved in the vector's file.
      fingerprint_scheme: the version of the fingerprint (`params.SCHEME`). Fingerprints of
        different versions cannot be compared; the direction is then checked only by its shape.

    Raises:
      UserError: values that are not [L, D] or not finite, or a field of an invalid type.
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
        values = _float32(self.values, "values")
        if values.ndim != 2 or not values.size:
            raise UserError(f"values has shape {values.shape}; it must be [L, D], both nonzero")
        if not np.isfinite(values).all():
            raise UserError(f"{self.kind} {self.name!r} contains a non-finite value")
        _check_names(self)
        if self.site not in SITES:
            raise UserError(f"site is {self.site!r}; it must be one of {SITES}")
        object.__setattr__(self, "values", values)

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
        """The hash of the weights in the fingerprint; 0 if unknown or not comparable."""
        return origin(self.fingerprint) if self.fingerprint_scheme == SCHEME else 0

    def at_layers(self, layers: tuple[int, ...]) -> np.ndarray:
        """Return the values of the given layers, [l, D]."""
        return self.values[list(layers)]

    def thresholds(self, percentile: str, *, of: str = "default") -> np.ndarray:
        """Raise an error: only an `Axis` has thresholds.

        Raises:
          UserError: always.
        """
        raise UserError(f"{self.kind} {self.name!r} has no thresholds; an Axis has them: read one "
                        "with jp.load_axis, or give the floor as numbers")

    def check_site(self, site: Site) -> None:
        """Check that the direction was measured at `site`.

        Raises:
          UserError: it was measured at another site.
        """
        if site != self.site:
            raise UserError(
                f"{self.kind} {self.name!r} was measured at site {self.site!r}; to use it at "
                f"{site!r}, pass its values as an array"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Axis(Vector):
    """The Assistant Axis, oriented so that a higher projection is more Assistant-like.

    Attributes:
      percentiles: population → percentile such as "p25" → [L] float32: percentiles of the
        projections of the population's mean response activations on the unit axis.

    Raises:
      UserError: as for `Vector`, or percentiles that are not one finite number per layer.
    """

    percentiles: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    kind = "axis"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.percentiles, Mapping):
            raise UserError(f"percentiles is a {type(self.percentiles).__name__}; it must be a "
                            "dict by population, such as default")
        object.__setattr__(self, "percentiles", {
            population: _percentiles(population, table, self.n_layers)
            for population, table in self.percentiles.items()})

    def thresholds(self, percentile: str, *, of: str = "default") -> np.ndarray:
        """Return the projection at a percentile for every layer, [L] float32.

        Args:
          percentile: such as "p25": a quarter of the population has a lower projection.
          of: the population: "default" (rollouts of the default persona) or "all" (all rollouts).

        Raises:
          UserError: a population or percentile that the axis was not calibrated for.
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
            raise UserError(f"percentile is {percentile!r}; "
                            + (f"write {meant}; " if meant in known else "")
                            + f"this axis has {', '.join(sorted(known, key=_by_number))}")
        return known[percentile]


def _by_number(name: str) -> tuple[float, str]:
    """Return a key that sorts p5 before p25, and names without a number last."""
    number = re.fullmatch(r"p(\d+(?:\.\d+)?)", name)
    return float(number.group(1)) if number else np.inf, name


def _percentiles(population: str, table: Any, layers: int) -> dict[str, np.ndarray]:
    """Return a population's percentiles as float32; raise unless each is finite and [L]."""
    if not isinstance(table, Mapping):
        raise UserError(f"percentiles[{population!r}] is a {type(table).__name__}; it must be a "
                        "dict of [L] by percentile, such as p25")
    checked = {}
    for name, given in table.items():
        field = f"percentiles/{population}/{name}"
        if not isinstance(population, str) or not isinstance(name, str):
            raise UserError(f"{field} has a name that is not a string; use names such as p25")
        if field.count("/") != 2:
            raise UserError(f"{field} has a / in a name, which the file format does not allow")
        checked[name] = value = _float32(given, field)
        if value.shape != (layers,):
            raise UserError(f"{field} has shape {list(value.shape)}; it must have one value per "
                            f"layer, [{layers}]")
        if not np.isfinite(value).all():
            raise UserError(f"{field} contains a non-finite value; calibrate the axis again")
    return checked


@dataclasses.dataclass(frozen=True, eq=False)
class Caps:
    """Floors on directions of the residual stream, in the order in which they apply.

    A layer may have several caps.

    Attributes:
      values: [n, D] float32, not normalized.
      layers: n zero-based layers; each cap applies to the residual stream after the block.
      floors: [n] float32, the minimum projection on each unit direction.
      labels: n names, one per cap.
      name, model, fingerprint, notes, fingerprint_scheme: as for `Vector`.

    Raises:
      UserError: fields of different lengths, or an invalid value.
    """

    values: np.ndarray
    layers: tuple[int, ...]
    floors: np.ndarray
    labels: tuple[str, ...]
    name: str = "caps"
    model: str = ""
    fingerprint: str = ""
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fingerprint_scheme: int = SCHEME

    kind = "caps"

    def __post_init__(self) -> None:
        values, floors = _float32(self.values, "values"), _float32(self.floors, "floors")
        for field in ("layers", "labels"):
            if not isinstance(getattr(self, field), Sequence):
                raise UserError(f"{field} is {getattr(self, field)!r:.60}; it must be a sequence")
        count = len(self.layers)
        shapes = values.shape[:-1], floors.shape, (len(self.labels),)
        if values.ndim != 2 or not count or set(shapes) != {(count,)}:
            raise UserError(f"caps {self.name!r} have values {list(values.shape)}, floors "
                            f"{list(floors.shape)}, {count} layers and {len(self.labels)} labels; "
                            "they must be [n, D], [n], n and n")
        if not np.isfinite(values).all() or not np.isfinite(floors).all():
            raise UserError(f"caps {self.name!r} contain a non-finite value")
        if not values.any(axis=1).all():
            raise UserError(f"caps {self.name!r} contain a zero vector; give nonzero vectors")
        if any(type(layer) is not int or not 0 <= layer < MAX_LAYERS for layer in self.layers):
            raise UserError(f"layers is {list(self.layers)}; each must be in 0…{MAX_LAYERS - 1}")
        if not all(isinstance(label, str) for label in self.labels):
            raise UserError(f"labels is {str(self.labels)[:80]}; each must be a string")
        _check_names(self)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "floors", floors)

    def tables(self) -> list[tuple[Vector, tuple[int, ...], np.ndarray]]:
        """Return the arguments of successive calls of `cap`: direction, layers and floors [l].

        The second cap of a layer is in the second call, and so on, so that chaining the calls
        applies each layer's caps in order.
        """
        rounds: list[dict[int, int]] = []
        for i, layer in enumerate(self.layers):
            free = next((held for held in rounds if layer not in held), None)
            if free is None:
                rounds.append(free := {})
            free[layer] = i
        calls = []
        for held in rounds:
            layers = tuple(sorted(held))
            values = np.zeros((max(self.layers) + 1, self.values.shape[1]), np.float32)
            values[list(layers)] = self.values[[held[layer] for layer in layers]]
            vector = Vector(values, self.name, self.model, self.fingerprint, notes=self.notes,
                            fingerprint_scheme=self.fingerprint_scheme)
            calls.append((vector, layers, self.floors[[held[layer] for layer in layers]]))
        return calls

    def interventions(self, *, where: Where | str = everywhere) -> Interventions:
        """Return the caps as one intervention that acts on the tokens that `where` chooses."""
        return chain(*(cap(vector, layers=layers, floor=floors, where=where)
                       for vector, layers, floors in self.tables()))


Found = TypeVar("Found", bound=Vector | Caps)


def fitted(found: Found, config: ModelConfig, name: str, fingerprint: str = "") -> Found:
    """Check that a direction or caps belong to a model, and return them.

    Without the model's fingerprint, or with one of an older scheme, only the half of the
    fingerprint that depends on the configuration is compared.

    A control vector written by another program has only the layers up to the last one that it
    steers; it is padded with zeros.

    Raises:
      UserError: another width, number of layers or fingerprint.
    """
    if isinstance(found, Caps):
        layers, wanted = max(found.layers) + 1, range(1, config.n_layers + 1)
    else:
        missing = config.n_layers - found.n_layers
        if missing > 0 and found.notes.get("source") == CONTROL_VECTOR:
            padded = np.pad(found.values, ((0, missing), (0, 0)))
            found = dataclasses.replace(found, values=padded)
        layers, wanted = found.n_layers, (config.n_layers,)
    if layers not in wanted or found.values.shape[1] != config.d_model:
        raise UserError(
            f"{found.kind} {found.name!r} is for {layers} layers of width "
            f"{found.values.shape[1]}; {name} has {config.n_layers} of {config.d_model}: it "
            "was made for another model; use one made for this model"
        )
    if found.fingerprint_scheme > SCHEME:  # a later version cannot be compared
        return found
    # the whole fingerprint, or the configuration's half, which is the same in both schemes
    known = fingerprint if fingerprint and found.fingerprint_scheme == SCHEME else config.hash()
    if found.fingerprint[: len(known)] not in ("", known):
        raise UserError(
            f"{found.kind} {found.name!r} was made for another model ({found.model or 'not named'}"
            f"), not for {name}; use one made for this model"
            + (", or pass its values as an array" if isinstance(found, Vector) else "")
        )
    return found
