"""The class `Caps`, and a check that directions or caps were made for a given model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxpersona.brief import count, line, quoted
from jaxpersona.calls import checked_class
from jaxpersona.errors import UserError
from jaxpersona.export import Table, others
from jaxpersona.interventions.bank import normalised
from jaxpersona.interventions.compose import Interventions, chain
from jaxpersona.interventions.operators import cap
from jaxpersona.interventions.where import Where, everywhere
from jaxpersona.models.config import MAX_LAYERS, ModelConfig
from jaxpersona.models.params import SCHEME
from jaxpersona.vectors.fields import check_names, float32
from jaxpersona.vectors.saved import Saved
from jaxpersona.vectors.vector import CONTROL_VECTOR, Vector


@checked_class
@dataclasses.dataclass(frozen=True, eq=False)
class Caps(Table, Saved):
    """An ordered list of n caps, each a floor on one projection of the residual stream.

    A layer may have several caps, which are applied in the order of the list.

    Attributes:
      values: [n, D] float32, the direction of each cap, not normalized.
      layers: n zero-based layers; cap i applies to the residual stream after block layers[i].
      floors: [n] float32, the minimum projection onto each unit direction.
      labels: n strings, one per cap.
      name, model, fingerprint, notes, fingerprint_scheme: as for `Vector`.

    Raises:
      UserError: the fields have different lengths, or a value is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np
      >>> caps = jp.Caps(np.ones((1, 128)), layers=(4,), floors=np.ones(1), labels=("a",))
      >>> caps
      Caps('caps', 1 floor, layers 4 to 4)
      >>> caps.interventions()
      cap(everywhere, layer 4, residual)
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
        values, floors = float32(self.values, "values"), float32(self.floors, "floors")
        for field in ("layers", "labels"):
            if not isinstance(getattr(self, field), Sequence):
                raise UserError(f"{field} is {getattr(self, field)!r:.60}; it must be a sequence")
        count = len(self.layers)
        shapes = values.shape[:-1], floors.shape, (len(self.labels),)
        if values.ndim != 2 or not count or set(shapes) != {(count,)}:
            raise UserError(f"caps {self.name!r} have values of shape {list(values.shape)}, floors "
                            f"of shape {list(floors.shape)}, layers of length {count} and labels "
                            f"of length {len(self.labels)}; n caps need values [n, D], floors [n], "
                            "n layers and n labels")
        if not np.isfinite(values).all() or not np.isfinite(floors).all():
            raise UserError(f"caps {self.name!r} contain a non-finite value; all values must be "
                            "finite")
        if not values.any(axis=1).all():
            raise UserError(f"caps {self.name!r} contain a zero vector; give nonzero vectors")
        if any(type(layer) is not int or not 0 <= layer < MAX_LAYERS for layer in self.layers):
            raise UserError(f"layers is {list(self.layers)}; each layer must be an integer in "
                            f"0…{MAX_LAYERS - 1}")
        if not all(isinstance(label, str) for label in self.labels):
            raise UserError(f"labels is {str(self.labels)[:80]}; each label must be a string")
        check_names(self)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "floors", floors)

    def __repr__(self) -> str:
        return line("Caps", quoted(self.name), count(len(self.layers), "floor"),
                    f"layers {min(self.layers)} to {max(self.layers)}",
                    f"of {quoted(self.model)}" if self.model else "")

    def records(self) -> list[dict[str, Any]]:
        """Return one record per cap: the layer, the label, the floor and the direction's norm."""
        norms = normalised(self.values)[1].tolist()
        return [{"layer": layer, "label": label, "floor": float(floor), "norm": norm}
                for layer, label, floor, norm in zip(self.layers, self.labels, self.floors, norms,
                                                     strict=True)]

    def facts(self) -> dict[str, Any]:
        """Return the name, the model, the fingerprint and the notes."""
        return {"name": self.name, "model": self.model, "fingerprint": self.fingerprint,
                **others(self.notes, ("name", "model", "fingerprint"))}

    def tables(self) -> list[tuple[Vector, tuple[int, ...], np.ndarray]]:
        """Return the arguments of successive calls of `cap`.

        The k-th call contains the k-th cap of every layer that has at least k caps, so chaining the
        interventions applies the caps of each layer in order.

        Returns:
          A list with one tuple per call: the direction (zero at other layers), the l layers in
          ascending order, and the floors [l] float32.
        """
        rounds: list[dict[int, int]] = []
        for i, layer in enumerate(self.layers):
            free = next((used for used in rounds if layer not in used), None)
            if free is None:
                rounds.append(free := {})
            free[layer] = i
        calls = []
        for index in rounds:
            layers = tuple(sorted(index))
            values = np.zeros((max(self.layers) + 1, self.values.shape[1]), np.float32)
            values[list(layers)] = self.values[[index[layer] for layer in layers]]
            vector = Vector(values, self.name, self.model, self.fingerprint, notes=self.notes,
                            fingerprint_scheme=self.fingerprint_scheme)
            calls.append((vector, layers, self.floors[[index[layer] for layer in layers]]))
        return calls

    def interventions(self, *, where: Where | str = everywhere) -> Interventions:
        """Return the caps as interventions on the tokens that `where` selects."""
        return chain(*(cap(vector, layers=layers, floor=floors, where=where)
                       for vector, layers, floors in self.tables()))


Found = TypeVar("Found", bound=Vector | Caps)


def fitted(found: Found, config: ModelConfig, name: str, fingerprint: str = "") -> Found:
    """Check that a direction or caps were made for a given model, and return them.

    If `fingerprint` is empty, or the fingerprint of `found` has an older scheme, only the half of
    the fingerprint that depends on the configuration is compared. If the fingerprint of `found` is
    empty or has a newer scheme, it is not compared.

    A control vector that another program wrote may have fewer layers than the model. The missing
    layers are filled with zeros.

    Args:
      found: the direction or the caps.
      config, name, fingerprint: the model's configuration, name and fingerprint.

    Returns:
      `found`, with any missing layers added.

    Raises:
      UserError: the width, the layers or the fingerprint does not match the model.
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
            f"{found.kind} {found.name!r}, made for another model (layers: {layers}, width: "
            f"{found.values.shape[1]}), cannot be used with {name} (layers: {config.n_layers}, "
            f"width: {config.d_model}); use the {found.kind} of this model"
        )
    if found.fingerprint_scheme > SCHEME:  # fingerprints of later schemes cannot be compared
        return found
    # The half for the configuration is the same in all schemes. Only this half is compared if the
    # half for the weights is unknown or has another scheme.
    known = fingerprint if fingerprint and found.fingerprint_scheme == SCHEME else config.hash()
    if found.fingerprint[: len(known)] not in ("", known):
        raise UserError(
            f"{found.kind} {found.name!r}, made for another model ({found.model or 'unnamed'}), "
            f"cannot be used with {name}; use the {found.kind} of this model"
            + (", or pass the values as an array" if isinstance(found, Vector) else "")
        )
    return found
