"""Pydantic schemas of the JSON form of interventions and captures.

The keys, types and ranges of all fields are validated before any vector file is opened, and one
error lists all fields that fail. Other properties, such as the name of a `where`, are checked item
by item.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import Field

from jaxpersona.errors import UserError
from jaxpersona.interventions import Site, Where
from jaxpersona.interventions.bank import parse_layers
from jaxpersona.interventions.where import NAMED

_FLOAT32 = 3.4028234e38  # the largest finite float32, rounded down


def _numbers(value: Any) -> Any:
    """Validate a finite number or a nested list of finite numbers; return it unchanged."""
    if isinstance(value, list) and value:
        for part in value:
            _numbers(part)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
        raise UserError("must be a finite number, or a non-empty (nested) list of finite numbers")
    return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # the integer is too large for a float
        return False


def _direction_form(value: Any) -> Any:
    """Validate a direction (the name of a vector file, or numbers [D] or [l, D]), and return it."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise UserError("must be the name of a vector file, a list of numbers, or one such list "
                        "per layer")
    _numbers(value)
    rows = {len(row) if isinstance(row, list) else -1 for row in value}
    if len(rows) > 1:
        raise UserError("must contain only numbers, or only lists of the same length, one per "
                        "layer")
    return value


def _layers_form(value: Any) -> Any:
    """Validate a layer, a list of layers or a layer string such as "46:54"; return it unchanged."""
    whole = [value] if not isinstance(value, list) else value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            parse_layers(value)
            return value
    elif whole and all(isinstance(x, int) and not isinstance(x, bool) for x in whole):
        return value
    raise UserError("must be an integer, a list of integers, or a string such "
                    "as \"46:54\" (half-open), \"16\" or \"3,5\"")


def _place_form(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _schema(*kinds: dict[str, Any]) -> pydantic.WithJsonSchema:
    return pydantic.WithJsonSchema({"anyOf": list(kinds)})


_NUMBER, _TEXT = {"type": "number"}, {"type": "string"}


def _many(kind: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": kind}


Numbers = Annotated[Any, pydantic.AfterValidator(_numbers), _schema(_NUMBER, _many(_NUMBER))]
Bound = Annotated[Any, pydantic.AfterValidator(lambda x: x if isinstance(x, str) else _numbers(x)),
                  _schema(_NUMBER, _many(_NUMBER), _TEXT)]
Direction = Annotated[Any, pydantic.AfterValidator(_direction_form),
                      _schema(_TEXT, _many(_NUMBER), _many(_many(_NUMBER)))]
Layers = Annotated[Any, pydantic.AfterValidator(_layers_form),
                   _schema({"type": "integer"}, _many({"type": "integer"}), _TEXT)]


Index = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(ge=-_FLOAT32, le=_FLOAT32, allow_inf_nan=False)]


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)


class Place(_Strict):
    """A token selection: a named `where`, and optionally kinds to exclude and a range of turns."""

    name: Annotated[str, pydantic.WithJsonSchema({"type": "string", "enum": list(NAMED)})] = \
        "everywhere"
    without: list[str] = []
    turns: list[Index] | None = Field(default=None, min_length=2, max_length=2)

    def build(self, first: bool) -> Where:
        """Return the token test; if `first` is false, the test excludes each row's first token.

        Raises:
          UserError: the name or a kind is unknown, or the range of turns is empty.
        """
        if self.name not in NAMED:
            raise UserError(f"where is {self.name!r}; choose from {', '.join(NAMED)}")
        where = NAMED[self.name].without(*self.without, *([] if first else ["first"]))
        return where if self.turns is None else where.within(*self.turns)


class _OrName:
    """An annotation that makes the JSON schema accept a name in place of a `Place` object."""

    @staticmethod
    def __get_pydantic_json_schema__(kind: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "enum": list(NAMED)}, handler(kind)]}


Where_ = Annotated[Place, pydantic.BeforeValidator(_place_form), _OrName]


class GateSpec(_Strict):
    """The arguments of `gate`; `first_token` allows each row's first token to be measured."""

    vector: Direction
    layer: Index
    above: Number | None = None
    below: Number | None = None
    over: Literal["prompt", "token"] = "prompt"
    within: bool = False
    where: Where_ | None = None
    first_token: bool = False
    site: Site = "residual"


class _Act(_Strict):
    layers: Layers
    where: Where_ = Place()
    first_token: bool = True
    site: Site = "residual"
    gate: GateSpec | None = None


class Steer(_Act):
    """The arguments of `steer`."""

    operator: Literal["steer"]
    vector: Direction
    scale: Numbers = 1.0


class Cap(_Act):
    """The arguments of `cap`; a bound may also be a percentile name, such as "p25"."""

    operator: Literal["cap"]
    vector: Direction
    floor: Bound | None = None
    ceiling: Bound | None = None
    of: str | None = None
    push: Direction | None = None


class Ablate(_Act):
    """The arguments of `ablate`."""

    operator: Literal["ablate"]
    vector: Direction
    coefficient: Numbers = 0.0


class MeanAblate(_Act):
    """The arguments of `mean_ablate`."""

    operator: Literal["mean_ablate"]
    vector: Direction
    mean: Direction


class Scale(_Act):
    """The arguments of `scale`."""

    operator: Literal["scale"]
    vector: Direction
    factor: Numbers


class SetProjection(_Act):
    """The arguments of `set_projection`."""

    operator: Literal["set_projection"]
    vector: Direction
    value: Numbers


class Rotate(_Act):
    """The arguments of `rotate`: two directions that span the plane, and an angle in radians."""

    operator: Literal["rotate"]
    plane: list[Direction] = Field(min_length=2, max_length=2)
    to: Numbers | None = None
    by: Numbers | None = None


class RestoreNorm(_Act):
    """The arguments of `restore_norm`."""

    operator: Literal["restore_norm"]


Operator = Annotated[
    Steer | Cap | Ablate | MeanAblate | Scale | SetProjection | Rotate | RestoreNorm,
    Field(discriminator="operator")]


class Reading(_Strict):
    """The name of a reading and the arguments of its constructor, such as `capture.mean`."""

    reading: Literal["mean", "last", "full", "norms", "projections", "moments", "histogram"]
    where: Where_ | None = None
    first_token: bool = True
    layers: Layers | None = None
    site: Site = "residual"
    name: str | None = None
    turns: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    directions: Annotated[list[Direction], Field(min_length=1)] | None = None
    edges: Numbers | None = None


def read(spec: Any, kind: Any, name: str) -> tuple[list[Any], list[str]]:
    """Validate a specification, which is one item or a list of items.

    Args:
      spec: an item parsed from JSON, or a list of such items.
      kind: the pydantic type of an item.
      name: the name of the specification in error messages.

    Returns:
      The validated items, and the name of each item in error messages, such as "capture[0]".

    Raises:
      UserError: the list is empty, or fields are invalid; the message lists all invalid fields.
    """
    many = isinstance(spec, Sequence) and not isinstance(spec, (str, bytes))
    if many and not spec:
        raise UserError(f"{name} is an empty list; give at least one item")
    items = list(spec) if many else [spec]
    where = [f"{name}[{i}]" if many else name for i in range(len(items))]
    adapter, parsed, faults = pydantic.TypeAdapter(kind), [], []
    for item, at in zip(items, where, strict=True):
        try:
            parsed.append(adapter.validate_python(item))
        except pydantic.ValidationError as error:
            faults += [_fault(fault, at, item) for fault in error.errors(include_url=False)]
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    return parsed, where


def _fault(fault: Any, at: str, item: Any) -> str:
    """Format one pydantic error as a message that contains the field, its value and the fix."""
    tag = item.get("operator") if isinstance(item, dict) else None
    place = [str(part) for part in fault["loc"]]
    if place[:1] == [tag] and tag in _KINDS:  # drop the name of the operator, which is not a field
        place = place[1:]
    path = ".".join([at, *place])
    if fault["type"] == "extra_forbidden":
        kinds = {"gate": GateSpec, "where": Place}
        kind = _KINDS[tag] if isinstance(tag, str) and tag in _KINDS else Reading
        owner = kinds[place[-2]] if len(place) > 1 else kind
        near = difflib.get_close_matches(place[-1], owner.model_fields, 1)
        return f"{path} is unknown; " + (f"did you mean {near[0]!r}?" if near else
                                         f"known keys: {', '.join(owner.model_fields)}")
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        operator = "missing" if tag is None else reprlib.repr(tag)
        return f"{at}: operator is {operator}; choose from {', '.join(_KINDS)}"
    message = fault["msg"].removeprefix("Value error, ")
    value = "" if fault["type"] == "missing" else f" is {reprlib.repr(fault['input'])}"
    return f"{path}{value}: {message[:1].lower()}{message[1:]}"


_KINDS = {get_args(kind.model_fields["operator"].annotation)[0]: kind
          for kind in (Steer, Cap, Ablate, MeanAblate, Scale, SetProjection, Rotate, RestoreNorm)}
