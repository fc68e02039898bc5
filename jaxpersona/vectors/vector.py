"""Named directions that say what they are: of which model, site and layers, and with which sign.

A bare array can be added to the wrong model at the wrong layer with the wrong sign, and nothing
will complain. A `Vector` knows, and the interventions ask it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

from jaxpersona.interventions.bank import normalised
from jaxpersona.interventions.compose import Interventions, chain
from jaxpersona.interventions.operators import cap
from jaxpersona.interventions.table import SITES, Site
from jaxpersona.interventions.where import Where, everywhere
from jaxpersona.models.config import MAX_LAYERS, ModelConfig
from jaxpersona.models.params import SCHEME, origin

POPULATIONS = ("default", "all")
CONTROL_VECTOR = "GGUF control vector"  # the source, in its notes, of one by another program


def _float32(values: Any, field: str) -> np.ndarray:
    try:
        # what is too great becomes infinite, and is refused as such
        with np.errstate(over="ignore"):
            return np.asarray(values, np.float32)
    except (OverflowError, TypeError, ValueError) as error:  # an integer of 400 digits, None, text
        raise ValueError(f"{field} are not numbers that float32 holds ({error})") from None


def _check_names(found: Vector | Caps) -> None:
    """Check what a direction says of itself in words, and make its notes plain."""
    for field in ("name", "model", "fingerprint"):
        value = getattr(found, field)
        if not isinstance(value, str):
            raise ValueError(f"{field} is {value!r}; it must be text")
    if not re.fullmatch(r"([0-9a-f]{16})?", found.fingerprint):
        raise ValueError(f"fingerprint is {found.fingerprint!r}; it must be sixteen hexadecimal "
                         "digits or empty")
    scheme = found.fingerprint_scheme
    if type(scheme) is not int or scheme < 1:
        raise ValueError(f"fingerprint_scheme is {scheme!r}; it must be a positive integer, "
                         f"{SCHEME} for fingerprints of this version")
    object.__setattr__(found, "notes", _plain(found.notes))


def _plain(notes: Any) -> dict[str, Any]:
    """Return notes as every file can hold them: scalars of NumPy and JAX become Python's."""
    if not isinstance(notes, Mapping):
        raise ValueError(f"notes is a {type(notes).__name__}; it must be a table")
    found = {}
    for name, value in notes.items():
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if not isinstance(name, str) or not isinstance(value, (str, int, float)):
            raise ValueError(f"notes[{str(name)[:40]!r}] is a {type(value).__name__}; notes are "
                             "text and numbers, each by a name")
        found[name] = value
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Vector:
    """A direction in the residual stream at every layer of one model.

    Attributes:
      values: [L, D] float32, not normalised; row l is the residual after block l (zero-based).
      name: what it is a direction of.
      model: the model's name.
      fingerprint: the model's sixteen digits, or "" where nothing is known.
      site: where in a block it was measured.
      notes: more about its making (strings and numbers), kept with it in its file.
      fingerprint_scheme: how the fingerprint was computed (`params.SCHEME`). One of another scheme
        cannot be compared with a model's; the direction is then checked by its shape alone.

    Raises:
      ValueError: values that are not [L, D] or not finite, or a field of another kind.
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
            raise ValueError(f"values has shape {values.shape}; it must be [L, D], neither of them "
                             "0")
        if not np.isfinite(values).all():
            raise ValueError(f"{self.kind} {self.name!r} holds a value that is not finite")
        _check_names(self)
        if self.site not in SITES:
            raise ValueError(f"site is {self.site!r}; it must be one of {SITES}")
        object.__setattr__(self, "values", values)

    @property
    def n_layers(self) -> int:
        """The number of layers L."""
        return self.values.shape[0]

    @property
    def unit(self) -> np.ndarray:
        """[L, D] float32: v̂; a zero row stays zero."""
        return normalised(self.values)[0]

    @property
    def origin(self) -> int:
        """Half the fingerprint as an integer; 0 where nothing comparable is known of the model."""
        return origin(self.fingerprint) if self.fingerprint_scheme == SCHEME else 0

    def at_layers(self, layers: tuple[int, ...]) -> np.ndarray:
        """Return the rows of some layers [l, D]."""
        return self.values[list(layers)]

    def thresholds(self, percentile: str, *, of: str = "default") -> np.ndarray:
        """Raise ValueError: only an `Axis` has thresholds.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"{self.kind} {self.name!r} has no thresholds; an Axis has them: read one "
                         "with jp.load_axis, or give the floor as numbers")

    def check_site(self, site: Site) -> None:
        """Refuse to act at another site than the one it was measured at.

        Raises:
          ValueError: the sites differ.
        """
        if site != self.site:
            raise ValueError(
                f"{self.kind} {self.name!r} was measured at site {self.site!r}; to use it at "
                f"{site!r} pass its bare array"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Axis(Vector):
    """The Assistant Axis: it points toward the Assistant, higher is more Assistant-like.

    Attributes:
      percentiles: population → "p25" → [L] float32, percentiles of the projections of that
        population's response means on the unit axis.

    Raises:
      ValueError: as for `Vector`, or percentiles that are not one finite number a layer.
    """

    percentiles: Mapping[str, Mapping[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    kind = "axis"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.percentiles, Mapping):
            raise ValueError(f"percentiles is a {type(self.percentiles).__name__}; it must be a "
                             "table of populations, such as default")
        object.__setattr__(self, "percentiles", {
            population: _percentiles(population, table, self.n_layers)
            for population, table in self.percentiles.items()})

    def thresholds(self, percentile: str, *, of: str = "default") -> np.ndarray:
        """Return the projection at a percentile for every layer, [L] float32.

        Args:
          percentile: such as "p25", along +axis: a quarter of the population lies below.
          of: the population, "default" (the default persona's rollouts) or "all" (every rollout's).

        Raises:
          ValueError: a population or percentile that the axis was not calibrated for.
        """
        if not self.percentiles:
            raise ValueError(f"axis {self.name!r} has no thresholds; give the floor as numbers, or "
                             "use an axis that `jaxpersona axis` wrote")
        if of not in self.percentiles:
            raise ValueError(
                f"of is {of!r}; this axis knows the populations {sorted(self.percentiles)}"
            )
        known = self.percentiles[of]
        if percentile not in known:
            meant = f"p{percentile}"
            raise ValueError(f"percentile is {percentile!r}; "
                             + (f"write {meant}; " if meant in known else "")
                             + f"this axis knows {', '.join(sorted(known, key=_by_number))}")
        return known[percentile]


def _by_number(name: str) -> tuple[float, str]:
    """Return a key that sorts p5 before p25, and names without a number last."""
    number = re.fullmatch(r"p(\d+(?:\.\d+)?)", name)
    return float(number.group(1)) if number else np.inf, name


def _percentiles(population: str, table: Any, layers: int) -> dict[str, np.ndarray]:
    """Return a population's percentiles as float32, each one finite value a layer."""
    if not isinstance(table, Mapping):
        raise ValueError(f"percentiles[{population!r}] is a {type(table).__name__}; it must be a "
                         "table of [L] by name, such as p25")
    found = {}
    for name, given in table.items():
        field = f"percentiles/{population}/{name}"
        if field.count("/") != 2:
            raise ValueError(f"{field} has a / in a name, where its file could not keep it")
        found[name] = value = _float32(given, field)
        if value.shape != (layers,):
            raise ValueError(f"{field} has shape {list(value.shape)}; it needs one value a layer, "
                             f"[{layers}]")
        if not np.isfinite(value).all():
            raise ValueError(f"{field} holds a value that is not finite; calibrate the axis anew")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Caps:
    """Floors on named directions, in the order in which they act; a layer may have several.

    Attributes:
      values: [n, D] float32, not normalised.
      layers: [n] zero-based layers, each the residual after its block.
      floors: [n] float32, the least projection on each unit direction.
      labels: n names, one a cap.
      name, model, fingerprint, notes, fingerprint_scheme: as for `Vector`.

    Raises:
      ValueError: fields that do not fit each other, or a value that no cap can have.
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
        count = len(self.layers)
        shapes = values.shape[:-1], floors.shape, (len(self.labels),)
        if values.ndim != 2 or not count or set(shapes) != {(count,)}:
            raise ValueError(f"caps {self.name!r} have values {list(values.shape)}, floors "
                             f"{list(floors.shape)}, {count} layers and {len(self.labels)} labels; "
                             "they need [n, D], [n], n and n")
        if not np.isfinite(values).all() or not np.isfinite(floors).all():
            raise ValueError(f"caps {self.name!r} hold a value that is not finite")
        if not values.any(axis=1).all():
            raise ValueError(f"caps {self.name!r} hold a zero vector; it has no direction")
        if any(type(layer) is not int or not 0 <= layer < MAX_LAYERS for layer in self.layers):
            raise ValueError(f"layers is {list(self.layers)}; each must be in 0…{MAX_LAYERS - 1}")
        if not all(isinstance(label, str) for label in self.labels):
            raise ValueError(f"labels is {str(self.labels)[:80]}; each must be text")
        _check_names(self)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "floors", floors)

    def tables(self) -> list[tuple[Vector, tuple[int, ...], np.ndarray]]:
        """Return what `cap` takes, call by call: a direction, its layers, their floors [l].

        The second cap of a layer is in the second table, and so on: chained in this order, every
        layer's caps act in theirs.
        """
        rounds: list[dict[int, int]] = []
        for i, layer in enumerate(self.layers):
            free = next((held for held in rounds if layer not in held), None)
            if free is None:
                rounds.append(free := {})
            free[layer] = i
        found = []
        for held in rounds:
            layers = tuple(sorted(held))
            values = np.zeros((max(self.layers) + 1, self.values.shape[1]), np.float32)
            values[list(layers)] = self.values[[held[layer] for layer in layers]]
            vector = Vector(values, self.name, self.model, self.fingerprint, notes=self.notes,
                            fingerprint_scheme=self.fingerprint_scheme)
            found.append((vector, layers, self.floors[[held[layer] for layer in layers]]))
        return found

    def interventions(self, *, where: Where | str = everywhere) -> Interventions:
        """Return the caps as one intervention that acts on the tokens that `where` chooses."""
        return chain(*(cap(vector, layers=layers, floor=floors, where=where)
                       for vector, layers, floors in self.tables()))


Found = TypeVar("Found", bound=Vector | Caps)


def fitted(found: Found, config: ModelConfig, name: str, fingerprint: str = "") -> Found:
    """Return a direction, or caps, as one of a model; without its fingerprint, of its shape.

    A fingerprint of an older scheme is compared by the half that depends on the shape.

    A control vector by another program names only the layers that it steers: those above them are
    zero.

    Raises:
      ValueError: another width, number of layers or fingerprint.
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
        raise ValueError(
            f"{found.kind} {found.name!r} is for {layers} layers of width "
            f"{found.values.shape[1]}; {name} has {config.n_layers} of {config.d_model}: it "
            "was made for another model; use one of this model's"
        )
    if found.fingerprint_scheme > SCHEME:  # of a later version; nothing of it can be compared
        return found
    # the whole, or its shape's half, which both schemes share
    known = fingerprint if fingerprint and found.fingerprint_scheme == SCHEME else config.hash()
    if found.fingerprint[: len(known)] not in ("", known):
        raise ValueError(
            f"{found.kind} {found.name!r} was made for another model ({found.model or 'not named'}"
            f"), not for {name}; use one of this model's"
            + (", or its bare array" if isinstance(found, Vector) else "")
        )
    return found
