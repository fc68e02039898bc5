"""Interventions and captures as JSON, one form for the command line, files and services.

A file holds one object, or a list of them that acts in the listed order:

    [{"operator": "steer", "vector": "calm.safetensors", "layers": 16, "scale": 2.0},
     {"operator": "cap", "vector": "axis.safetensors", "layers": "46:54", "floor": "p25",
      "of": "default", "where": "generated",
      "gate": {"vector": "axis.safetensors", "layer": 20, "below": -3.0}}]

Everything is checked before anything compiles, and every fault is named at once.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field, FiniteFloat, NonNegativeInt

from jaxpersona import capture as readings
from jaxpersona import interventions as ops
from jaxpersona.capture import Capture
from jaxpersona.ckpts.vectors import load_vector
from jaxpersona.interventions import Interventions, Where
from jaxpersona.interventions.where import NAMED
from jaxpersona.vectors import Axis

if TYPE_CHECKING:
    from jaxpersona.load import Model

Numbers = FiniteFloat | list[FiniteFloat]
Direction = str | list[FiniteFloat] | list[list[FiniteFloat]]  # a file, [D], or one a layer [l, D]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Place(_Strict):
    """Which tokens: a name of `where`, less some kinds, within some messages."""

    name: str = "everywhere"
    without: list[str] = []
    turns: tuple[NonNegativeInt, NonNegativeInt] | None = None

    @pydantic.field_validator("turns", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    def build(self, first: bool) -> Where:
        """Return the test; `first` says whether it may hold on a row's first token."""
        if self.name not in NAMED:
            raise ValueError(f"where is {self.name!r}; choose from {', '.join(NAMED)}")
        where = NAMED[self.name].without(*self.without, *([] if first else ["first"]))
        return where if self.turns is None else where.within(*self.turns)


class GateSpec(_Strict):
    """What must hold before an operator acts (`gate`)."""

    vector: Direction
    layer: NonNegativeInt
    above: FiniteFloat | None = None
    below: FiniteFloat | None = None
    over: Literal["prompt", "token"] = "prompt"
    within: bool = False
    where: str | Place | None = None
    site: ops.Site = "residual"


class _Act(_Strict):
    layers: int | str | list[int]
    where: str | Place = "everywhere"
    first_token: bool = True
    site: ops.Site = "residual"
    gate: GateSpec | None = None


class Steer(_Act):
    """`steer`."""

    operator: Literal["steer"]
    vector: Direction
    scale: Numbers = 1.0


class Cap(_Act):
    """`cap`; bounds are numbers or percentiles of an axis, such as "p25" with `of`."""

    operator: Literal["cap"]
    vector: Direction
    floor: Numbers | str | None = None
    ceiling: Numbers | str | None = None
    of: str | None = None


class Ablate(_Act):
    """`ablate`."""

    operator: Literal["ablate"]
    vector: Direction
    coefficient: Numbers = 0.0


class MeanAblate(_Act):
    """`mean_ablate`."""

    operator: Literal["mean_ablate"]
    vector: Direction
    mean: Direction


class Scale(_Act):
    """`scale`."""

    operator: Literal["scale"]
    vector: Direction
    factor: Numbers


class SetProjection(_Act):
    """`set_projection`."""

    operator: Literal["set_projection"]
    vector: Direction
    value: Numbers


class Rotate(_Act):
    """`rotate`, in the plane of two directions; angles in radians."""

    operator: Literal["rotate"]
    plane: list[Direction] = Field(min_length=2, max_length=2)
    to: Numbers | None = None
    by: Numbers | None = None


class RestoreNorm(_Act):
    """`restore_norm`."""

    operator: Literal["restore_norm"]


Operator = Annotated[
    Steer | Cap | Ablate | MeanAblate | Scale | SetProjection | Rotate | RestoreNorm,
    Field(discriminator="operator")]


class Reading(_Strict):
    """A capture: what is read off which tokens."""

    reading: Literal["mean", "last", "full", "norms", "projections", "moments", "histogram"]
    where: str | Place | None = None
    first_token: bool = True
    layers: int | str | list[int] | None = None
    site: ops.Site = "residual"
    name: str | None = None
    turns: int | None = None
    directions: list[Direction] | str | None = None
    edges: list[FiniteFloat] | None = None


def interventions(spec: Any, model: Model, *, folder: str | pathlib.Path = ".") -> Interventions:
    """Build interventions from their declarative form and check them against a model.

    Args:
      spec: a table as JSON gives it, or a list of them.
      model: what `load` returned.
      folder: what vector files' names are relative to.

    Raises:
      ValueError: unknown or missing keys, values of another type, a vector file, layer, width or
        plane that does not fit; field, value and mend, all of a spec's form at once.
    """
    parts = [_operator(item, at, model, pathlib.Path(folder))
             for item, at in zip(*_read(spec, Operator, "interventions"), strict=True)]
    return ops.chain(*parts)


def captures(spec: Any, model: Model, *, folder: str | pathlib.Path = ".") -> Capture:
    """Build a capture from its declarative form; arguments and errors as for `interventions`."""
    out = Capture()
    for item, at in zip(*_read(spec, Reading, "capture"), strict=True):
        try:
            out = out | _reading(item, model, pathlib.Path(folder))
            for part in out.parts.values():
                readings.chosen_layers(part, model.config)
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from None
    return out


def schema() -> dict[str, Any]:
    """Return the JSON schema of a list of operators."""
    return pydantic.TypeAdapter(list[Operator]).json_schema()


def _read(spec: Any, kind: Any, name: str) -> tuple[list[Any], list[str]]:
    """Read one table or a list of them; also say what to call each in an error."""
    many = isinstance(spec, Sequence) and not isinstance(spec, (str, bytes))
    items = list(spec) if many else [spec]
    where = [f"{name}[{i}]" if many else name for i in range(len(items))]
    adapter, found, faults = pydantic.TypeAdapter(kind), [], []
    for item, at in zip(items, where, strict=True):
        try:
            found.append(adapter.validate_python(item))
        except pydantic.ValidationError as error:
            faults += [_fault(fault, at, item) for fault in error.errors(include_url=False)]
    if faults:
        raise ValueError("; ".join(dict.fromkeys(faults)))
    return found, where


def _fault(fault: Any, at: str, item: Any) -> str:
    """Say one of pydantic's findings as field, value and mend."""
    tag = item.get("operator") if isinstance(item, dict) else None
    place = [str(part) for part in fault["loc"] if part != tag]
    # the members of a union of types are pydantic's business, not the user's
    place = [part for part in place if part.isidentifier() and part.islower() or part.isdigit()]
    path = ".".join([at, *place])
    if fault["type"] == "extra_forbidden":
        kinds = {"gate": GateSpec, "where": Place}
        owner = kinds.get(place[0]) if len(place) > 1 else _KINDS.get(tag, Reading)
        known = list(owner.model_fields) if owner else []
        near = difflib.get_close_matches(place[-1], known, 1)
        mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"{path} is unknown; {mend}"
    value = "" if fault["type"] == "missing" else f" is {fault['input']!r}"
    return f"{path}{value}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"


_KINDS = {kind.model_fields["operator"].annotation.__args__[0]: kind  # pyright: ignore
          for kind in (Steer, Cap, Ablate, MeanAblate, Scale, SetProjection, Rotate, RestoreNorm)}


def _operator(item: Any, at: str, model: Model, folder: pathlib.Path) -> Interventions:
    """Build one operator, gate and all, and check it against the model."""
    try:
        made = _build(item, model, folder)
        if item.gate is not None:
            gate = item.gate
            made = ops.gate(
                made, _direction(gate.vector, folder), layer=gate.layer, above=gate.above,
                below=gate.below, over=gate.over, within=gate.within, site=gate.site,
                where=None if gate.where is None else _place(gate.where, False))
        made.check(layers=model.config.n_layers, width=model.config.d_model, rows=0)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    return made


def _build(item: Any, model: Model, folder: pathlib.Path) -> Interventions:
    how: dict[str, Any] = {"layers": _layers(item.layers, model.config.n_layers),
                           "where": _place(item.where, item.first_token), "site": item.site}

    def read(value: Direction) -> Any:
        return _direction(value, folder)

    match item:
        case Steer():
            return ops.steer(read(item.vector), scale=item.scale, **how)
        case Cap():
            vector = read(item.vector)
            return ops.cap(vector, floor=_bound(vector, "floor", item.floor, item.of),
                           ceiling=_bound(vector, "ceiling", item.ceiling, item.of), **how)
        case Ablate():
            return ops.ablate(read(item.vector), coefficient=item.coefficient, **how)
        case MeanAblate():
            return ops.mean_ablate(read(item.vector), read(item.mean), **how)
        case Scale():
            return ops.scale(read(item.vector), item.factor, **how)
        case SetProjection():
            return ops.set_projection(read(item.vector), item.value, **how)
        case Rotate():
            return ops.rotate(read(item.plane[0]), read(item.plane[1]), to=item.to, by=item.by,
                              **how)
    return ops.restore_norm(**how)


def _reading(item: Reading, model: Model, folder: pathlib.Path) -> Capture:
    layers = None if item.layers is None else _layers(item.layers, model.config.n_layers)
    how: dict[str, Any] = {"layers": layers, "site": item.site, "name": item.name or item.reading}
    if item.where is not None or not item.first_token:
        where = item.where or ("response" if item.reading in ("mean", "moments", "histogram")
                               else "everywhere")
        how["where"] = _place(where, item.first_token)
    on = item.reading in ("projections", "moments", "histogram")
    for field, wanted in (("directions", on), ("edges", item.reading == "histogram")):
        if (getattr(item, field) is not None) != wanted:
            raise ValueError(f"{item.reading} {'needs' if wanted else 'takes no'} {field}")
    if item.turns is not None and item.reading != "mean":
        raise ValueError(f"{item.reading} takes no turns")
    make = getattr(readings, item.reading)
    if not on:
        return make(**how, **({"turns": item.turns} if item.reading == "mean" else {}))
    given = item.directions
    value = _direction(given, folder) if isinstance(given, str) else np.array(
        [_direction(one, folder) for one in given or ()])
    return make(value, *([item.edges] if item.reading == "histogram" else []), **how)


def _layers(value: int | str | list[int], total: int) -> tuple[int, ...]:
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) != 2 or not all(p.strip().isdigit() or not p for p in parts):
            raise ValueError(f"layers is {value!r}; write a number, a list, or 46:54 (half-open)")
        start, stop = (int(p) if p else None for p in parts)
        return ops.resolve_layers(slice(start, stop), total)
    return ops.resolve_layers(value, total)


def _place(value: str | Place, first: bool) -> Where:
    return (Place(name=value) if isinstance(value, str) else value).build(first)


def _direction(value: Direction, folder: pathlib.Path) -> Any:
    if isinstance(value, str):
        return load_vector(folder / value)
    widths = {len(row) for row in value if isinstance(row, list)}
    if len(widths) > 1:
        raise ValueError(f"vector has rows of different lengths: {sorted(widths)}")
    array = np.array(value, np.float64)
    return array[None] if array.ndim == 2 else array


def _bound(vector: Any, name: str, value: Any, of: str | None) -> Any:
    """Return a bound as numbers, looked up on its axis where it is a percentile."""
    if not isinstance(value, str):
        return value
    if not isinstance(vector, Axis):
        raise ValueError(f"{name} is {value!r}; only an axis has percentiles: give a number")
    if of is None:
        raise ValueError(f"{name} is {value!r}; say of which population: \"of\": \"default\" or "
                         "\"all\"")
    return vector.thresholds(value, of=of)
