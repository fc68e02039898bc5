"""Construction of interventions and captures from JSON specifications.

A specification is a JSON object or a list of objects. A list of operators is applied in order:

    [{"operator": "steer", "vector": "calm.safetensors", "layers": 16, "scale": 2.0},
     {"operator": "cap", "vector": "axis.safetensors", "layers": "46:54", "floor": "p25",
      "of": "default", "where": "generated",
      "gate": {"vector": "axis.safetensors", "layer": 20, "below": -3.0}}]

Specifications are validated before any program is compiled. One error lists all fields that
`spec_forms` rejects.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic

from jaxpersona import interventions as ops
from jaxpersona.captures import capture as readings
from jaxpersona.captures.capture import Capture
from jaxpersona.ckpts.vectors import load_vector
from jaxpersona.errors import UserError
from jaxpersona.interventions import Interventions, Where
from jaxpersona.interventions import spec_forms as forms
from jaxpersona.vectors.caps import fitted
from jaxpersona.vectors.vector import Axis, Vector

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

def interventions(spec: Any, model: Model, *, folder: str | pathlib.Path = ".") -> Interventions:
    """Build interventions from a JSON specification and check them against a model.

    Args:
      spec: a dict parsed from JSON, or a list of such dicts.
      model: the model, from `load`.
      folder: the folder that contains the vector files of the specification.

    Raises:
      UserError: a field is unknown, missing or invalid, a vector file cannot be read, or a layer or
        a direction does not fit the model.
    """
    chained = [_operator(item, at, model, pathlib.Path(folder))
               for item, at in zip(*forms.read(spec, forms.Operator, "interventions"), strict=True)]
    return ops.chain(*chained)


def captures(spec: Any, model: Model, *, folder: str | pathlib.Path = ".") -> Capture:
    """Build a capture from a JSON specification and check it against a model.

    The arguments and errors are as for `interventions`.
    """
    out = Capture()
    for item, at in zip(*forms.read(spec, forms.Reading, "capture"), strict=True):
        try:
            out = out | _reading(item, model, pathlib.Path(folder))
            for reading in out.readings.values():
                readings.chosen_layers(reading, model.config)
        except ValueError as error:
            raise UserError(f"{at}: {error}") from None
    return out


def schema() -> dict[str, Any]:
    """Return the JSON schema of a list of operators."""
    return pydantic.TypeAdapter(list[forms.Operator]).json_schema()


def _operator(item: Any, at: str, model: Model, folder: pathlib.Path) -> Interventions:
    """Build the interventions of one operator, with its gate, and check them against the model.

    Args:
      item: the validated operator.
      at: the name of the operator in error messages, such as "interventions[0]".
      model: the model, from `load`.
      folder: the folder that contains the vector files.

    Raises:
      UserError: the operator is invalid, or does not fit the model.
    """
    try:
        made = _build(item, model, folder)
        if item.gate is not None:
            gate = item.gate
            made = ops.gate(
                made, _direction(gate.vector, model, folder), layer=gate.layer, above=gate.above,
                below=gate.below, over=gate.over, within=gate.within, site=gate.site,
                where=_gate_place(gate))
        made.check(layers=model.config.n_layers, width=model.config.d_model, rows=0)
    except ValueError as error:
        raise UserError(f"{at}: {error}") from None
    return made


def _build(item: Any, model: Model, folder: pathlib.Path) -> Interventions:
    options: dict[str, Any] = {"layers": ops.resolve_layers(item.layers, model.config.n_layers),
                               "where": item.where.build(item.first_token), "site": item.site}

    def read(value: Any) -> Any:
        return _direction(value, model, folder)

    match item:
        case forms.Steer():
            return ops.steer(read(item.vector), scale=item.scale, **options)
        case forms.Cap():
            vector = read(item.vector)
            if item.push is not None:
                options["push"] = read(item.push)
            if item.of is not None and not any(isinstance(x, str)
                                               for x in (item.floor, item.ceiling)):
                raise UserError("\"of\" selects the population of a percentile, but neither "
                                "\"floor\" nor \"ceiling\" is a percentile name; omit \"of\"")
            return ops.cap(vector, floor=_bound(vector, "floor", item.floor, item.of),
                           ceiling=_bound(vector, "ceiling", item.ceiling, item.of), **options)
        case forms.Ablate():
            return ops.ablate(read(item.vector), coefficient=item.coefficient, **options)
        case forms.MeanAblate():
            return ops.mean_ablate(read(item.vector), read(item.mean), **options)
        case forms.Scale():
            return ops.scale(read(item.vector), item.factor, **options)
        case forms.SetProjection():
            return ops.set_projection(read(item.vector), item.value, **options)
        case forms.Rotate():
            return ops.rotate(read(item.plane[0]), read(item.plane[1]), to=item.to, by=item.by,
                              **options)
        case forms.RestoreNorm():
            return ops.restore_norm(**options)
    raise NotImplementedError(f"{type(item).__name__} has no case in specs._build; add one")


def _reading(item: forms.Reading, model: Model, folder: pathlib.Path) -> Capture:
    layers = item.layers
    if layers is not None:
        layers = ops.resolve_layers(layers, model.config.n_layers)
    options: dict[str, Any] = {"layers": layers, "site": item.site,
                               "name": item.name or item.reading}
    if item.where is not None or not item.first_token:
        usual = "response" if item.reading in ("mean", "moments", "histogram") else "everywhere"
        options["where"] = (item.where or forms.Place(name=usual)).build(item.first_token)
    on = item.reading in ("projections", "moments", "histogram")
    for field, wanted in (("directions", on), ("edges", item.reading == "histogram")):
        if (getattr(item, field) is not None) != wanted:
            raise UserError(f"{item.reading} requires {field}; add it" if wanted else
                            f"{item.reading} does not accept {field}; omit it")
    if item.turns is not None and item.reading != "mean":
        raise UserError(f"{item.reading} does not accept turns; omit it")
    make = getattr(readings, item.reading)
    if not on:
        return make(**options, **({"turns": item.turns} if item.reading == "mean" else {}))
    value: Any = [_direction(one, model, folder) for one in item.directions or ()]
    if not any(isinstance(one, Vector) for one in value):
        value = np.array(value)
    elif not all(isinstance(one, Vector) for one in value):
        raise UserError("directions contains both file names and numbers; give only file names or "
                        "only numbers")
    return make(value, *([item.edges] if item.reading == "histogram" else []), **options)


def _gate_place(gate: forms.GateSpec) -> Where | None:
    """Return the token test for the tokens that a gate measures, or None for `gate`'s default."""
    if gate.where is None and not gate.first_token:
        return None
    usual = forms.Place(name="prompt" if gate.over == "prompt" else "everywhere")
    return (gate.where or usual).build(gate.first_token)


def _direction(value: Any, model: Model, folder: pathlib.Path) -> Any:
    if isinstance(value, str):
        return fitted(load_vector(folder / value), model.config, model.name, model.fingerprint)
    array = np.array(value, np.float64)
    return array[None] if array.ndim == 2 else array


def _bound(vector: Any, name: str, value: Any, of: str | None) -> Any:
    """Return the thresholds [L] if a bound is a percentile name, else the bound unchanged.

    Raises:
      UserError: the direction is not an axis, the population is missing, or the axis has no
        thresholds for the population or the percentile.
    """
    if not isinstance(value, str):
        return value
    if not isinstance(vector, Axis):
        raise UserError(f"{name} is {value!r}, but only an axis has percentiles; give a number")
    if of is None:
        raise UserError(f"{name} is {value!r}; give the population of the percentile as \"of\": "
                        "\"default\" or \"of\": \"all\"")
    return vector.thresholds(value, of=of)
