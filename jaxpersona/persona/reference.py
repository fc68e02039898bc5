"""Reference values for projections: the default persona's percentiles and the roles' means.

The percentiles are stored in the axis file, and the roles' mean projections in `analysis.json` in
the run folder.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json
from jaxpersona.persona.check import normal_spread
from jaxpersona.runs.files import MANIFEST
from jaxpersona.vectors.vector import Axis, Vector

ANALYSIS = "analysis.json"
_NEEDED = ("p1", "p25", "p50", "p75", "p99")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Projections of the default persona and of the roles onto an axis at one layer.

    Attributes:
      percentiles: q → q-th percentile of the default persona's projections (0 ≤ q ≤ 100), in
        ascending order of q.
      roles: role → mean projection of the role's replies; {} if unknown.
    """

    __repr__ = brief

    percentiles: Mapping[float, float]
    roles: Mapping[str, float]

    @property
    def floor(self) -> float:
        """The default floor of `--cap`: the default persona's 25th percentile."""
        return self.percentiles[25.0]

    def z(self, value: float) -> float:
        """Return the z-score of a projection relative to the default persona's median.

        The standard deviation is estimated from the default persona's quartiles, assuming that its
        projections are normally distributed.
        """
        spread = float(normal_spread(np.array(self.percentiles[25.0]),
                                     np.array(self.percentiles[75.0])))
        return (value - self.percentiles[50.0]) / max(spread, 1e-6)

    def place(self, value: float) -> str:
        """Return the percentiles that bracket a projection, such as "p25–p50" or "below p1"."""
        known = list(self.percentiles.items())
        below = [name for name, at in known if at <= value]
        above = [name for name, at in known if at > value]
        if not below:
            return f"below p{above[0]:g}"
        return f"p{below[-1]:g}–p{above[0]:g}" if above else f"above p{below[-1]:g}"

    def nearest(self, value: float, count: int = 3) -> list[str]:
        """Return the `count` roles with the mean projections closest to a value, closest first."""
        return sorted(self.roles, key=lambda name: (abs(self.roles[name] - value), name))[:count]


def reference(vector: Vector, layer: int, file: str | os.PathLike[str] | None = None,
              ) -> Reference | None:
    """Return the reference values for projections onto a direction at a layer.

    Args:
      vector: the direction.
      layer: the layer.
      file: the file from which the direction was loaded, or None. If it is in a run folder of the
        same model, the roles' mean projections are read from `analysis.json` in that folder.

    Returns:
      The reference values, or None if the direction is not an axis with the default persona's 1st,
      25th, 50th, 75th and 99th percentiles.

    Raises:
      UserError: `run.json` or `analysis.json` is damaged, or `analysis.json` has a different number
        of layers than the axis.

    Examples:
      >>> import jaxpersona as jp
      >>> from jaxpersona.persona.reference import reference
      >>> found = reference(jp.load_axis("mini"), layer=4)
      >>> found.place(found.floor)
      'p25–p50'
    """
    table = vector.percentiles.get("default", {}) if isinstance(vector, Axis) else {}
    if not all(name in table for name in _NEEDED):
        return None
    numbers = {}
    for name, values in table.items():
        text = name.removeprefix("p").replace(".", "", 1)
        if name.startswith("p") and text.isdecimal():
            numbers[float(name[1:])] = float(values[layer])
    roles: dict[str, float] = {}
    if file is not None and _is_of_run(pathlib.Path(file), vector):
        roles = _roles(pathlib.Path(file).parent / ANALYSIS, vector.n_layers, layer)
    return Reference(dict(sorted(numbers.items())), roles)


def _is_of_run(file: pathlib.Path, vector: Vector) -> bool:
    """Return whether a file is in the folder of a completed run with the vector's model."""
    if not all(path.is_file() for path in (file, file.with_name(ANALYSIS),
                                           file.with_name(MANIFEST))):
        return False
    found: Any = read_json(file.with_name(MANIFEST))
    model = found.get("model") if isinstance(found, dict) else None
    return isinstance(model, dict) and model.get("fingerprint") == vector.fingerprint


def _roles(path: pathlib.Path, layers: int, layer: int) -> dict[str, float]:
    """Read the mean projection of each role at a layer from the `analysis.json` of a run.

    The default persona and roles without a finite value are omitted.

    Raises:
      UserError: the file is damaged, or has a different number of layers than the axis.
    """
    found: Any = read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("roles"), dict):
        raise UserError(f"{path}: field 'roles' is missing or invalid; delete the file, or run "
                        "`jaxpersona axis` again")
    if found.get("layers") != layers:
        raise UserError(f"{path} has {found.get('layers')!r:.20} layers, but the axis in its "
                        f"folder has {layers}; move one of the two files to another folder")
    roles = {}
    for name, role in found["roles"].items():
        value = _value(role, layers, layer)
        if value is None:
            raise UserError(f"{path}: mean_projection of {name!r:.60} is missing or invalid; "
                            "delete the file, or run `jaxpersona axis` again")
        if name != "default" and np.isfinite(value):
            roles[name] = value
    return roles


def _value(role: Any, layers: int, layer: int) -> float | None:
    """Return a role's mean projection at a layer; None if its entry is damaged."""
    values = role.get("mean_projection") if isinstance(role, dict) else None
    if not isinstance(values, list) or len(values) != layers:
        return None
    if not all(isinstance(x, (int, float)) for x in values):
        return None
    try:
        return float(values[layer])
    except OverflowError:  # an integer in JSON can exceed the range of a float
        return None
