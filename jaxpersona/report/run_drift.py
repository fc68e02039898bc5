"""The file drift.json of a run folder: persona drift over turns, with and without the cap."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import brief
from jaxpersona.ckpts.files import write_json
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json
from jaxpersona.runs.files import DRIFT
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from jaxpersona.persona.talk import Talks
    from jaxpersona.report.run_values import Notes

_LINES = ("style", "mean", "p25", "p75")


@dataclasses.dataclass(frozen=True)
class Drift:
    """Drift by arm, such as "uncapped" and "capped".

    Attributes:
      layer: the layer of the projections.
      floor: the floor of the cap at this layer.
      percentile: the floor as a percentile of the default persona, such as "p25".
      arms: arm → a dict. "style" lists the share of in-character choices by turn. "mean", "p25" and
        "p75" list the mean and quartiles, by turn, of the replies' projections, measured without
        the cap. "leak" is the leak rate after the last turn (`plot.drift`), and "conversations" is
        the number of conversations.
    """

    __repr__ = brief

    layer: int
    floor: float
    percentile: str
    arms: dict[str, dict[str, Any]]

    def value(self, notes: Notes) -> dict[str, Any]:
        """Return a JSON object; non-finite values become null and are listed in `notes`."""
        arms = {}
        for name, arm in self.arms.items():
            lines = {line: notes.series(f"drift, {name!r:.40}, {line}", arm[line], "turn", 1)
                     for line in _LINES}
            leak = notes.number(f"drift, {name!r:.40}, leak", arm["leak"])
            arms[name] = {**arm, **lines, "leak": leak}
        floor = notes.number(f"drift, floor of the cap at layer {self.layer}", self.floor)
        return {"layer": self.layer, "floor": floor, "percentile": self.percentile, "arms": arms}


def save_drift(folder: pathlib.Path, talks: Mapping[str, Talks], axis: Axis, layer: int, *,
               behaviour: Mapping[str, Sequence[float]], leak: Mapping[str, float],
               floor: str = "p25") -> None:
    """Write drift.json to a run folder; the other arguments are as for `figures.drift`.

    All `Talks` must have a `readout`, and `floor` must be a percentile such as "p25".
    """
    arms = {}
    for name, talk in talks.items():
        assert talk.readout is not None
        read = np.asarray(talk.readout)[: len(behaviour[name]), :, layer].astype(np.float64)
        low, high = np.nanpercentile(read, [25, 75], axis=1)
        arms[name] = {"style": _plain(behaviour[name]), "mean": _plain(np.nanmean(read, 1)),
                      "p25": _plain(low), "p75": _plain(high), "leak": float(leak[name]),
                      "conversations": read.shape[1]}
    write_json(folder / DRIFT, {
        "layer": layer, "percentile": floor, "arms": arms,
        "floor": float(axis.thresholds(floor)[layer])})


def _plain(values: Any) -> list[float]:
    return [round(float(value), 6) for value in values]


def read_drift(folder: pathlib.Path, layers: int) -> Drift | None:
    """Return the content of drift.json, or None if the file is missing.

    `layers` is the number of layers of the model.

    Raises:
      UserError: the file is damaged, or its layer does not exist.
    """
    path = folder / DRIFT
    if not path.exists():
        return None
    about = read_json(path)
    try:
        arms = {}
        for name, arm in about["arms"].items():
            lines = {line: [float(x) for x in arm[line]] for line in _LINES}
            if len({len(values) for values in lines.values()}) != 1:
                raise ValueError(f"the lists of {name} differ in length")
            arms[str(name)] = {**lines, "leak": float(arm["leak"]),
                               "conversations": int(arm["conversations"])}
        drift = Drift(int(about["layer"]), float(about["floor"]), str(about["percentile"]), arms)
        if not 0 <= drift.layer < layers:
            raise ValueError(f"layer is {drift.layer}, but the number of layers is {layers}")
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); delete it, or run "
                        "`jaxpersona demo` again to rewrite it") from None
    return drift
