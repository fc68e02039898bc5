"""The options for interventions and projections that `generate` and `chat` share."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxpersona.cli import caps
from jaxpersona.errors import UserError

if TYPE_CHECKING:
    from jaxpersona.interventions import Interventions
    from jaxpersona.models.model import Model
    from jaxpersona.persona.monitor import Monitor
    from jaxpersona.vectors.caps import Caps
    from jaxpersona.vectors.vector import Axis, Vector

CapOption = Annotated[str | None, typer.Option(
    "--cap", show_default="none",
    help="A file with an axis or caps, or `mini` for the axis of mini. "
         "The form FILE:FROM:TO:pNN also sets --cap-layers and --percentile.")]
CapLayersOption = Annotated[str | None, typer.Option(
    "--cap-layers", show_default="the upper half",
    help="The layers to cap, a half-open range such as 46:54.")]
PercentileOption = Annotated[str | None, typer.Option(
    "--percentile", show_default="p25",
    help="The percentile of projections that --cap uses as the floor.")]
OfOption = Annotated[str | None, typer.Option(
    "--of", show_default="default",
    help="The population from which --percentile is computed: `all` (all rollouts, except those of "
         "held-out roles) or `default` (the rollouts of the default persona).")]
ExperimentOption = Annotated[str | None, typer.Option(
    "--experiment", show_default="the only experiment",
    help="The id of an experiment in a capping_config.pt file.")]
CheckOption = Annotated[bool, typer.Option(
    "--check/--no-check", help="Test the caps on short replies before generation.")]
SteerOption = Annotated[pathlib.Path | None, typer.Option(
    "--steer", show_default="none", help="A file with the vector to add to the activations.")]
SteerLayersOption = Annotated[str | None, typer.Option(
    "--steer-layers", show_default="the middle layer",
    help="The layers to steer, e.g. 16 or 14:18.")]
ScaleOption = Annotated[float, typer.Option(
    "--scale", help="The factor by which the vector of --steer is multiplied.")]
SpecOption = Annotated[pathlib.Path | None, typer.Option(
    "--spec", "--interventions", show_default="none",
    help="A JSON file of interventions, which are applied after --steer and --cap.")]
WhereOption = Annotated[str | None, typer.Option(
    "--where", show_default="everywhere",
    help="The tokens that --cap and --steer edit, e.g. response, user, prompt or generated.")]
AxisOption = Annotated[pathlib.Path | None, typer.Option(
    "--axis", show_default="that of --cap in `chat`, otherwise none",
    help="Show each reply's mean projection onto the axis or vector in this file; "
         "`mini` selects the axis of mini.")]
AxisLayersOption = Annotated[str | None, typer.Option(
    "--axis-layers", show_default="the middle layer",
    help="The layers at which projections are computed, e.g. 16 or 14:18.")]

_SHORT = re.compile(r"(.+?):(\d+:\d+)(?::(p\d+(?:\.\d+)?))?")


@dataclasses.dataclass
class EditOptions:
    """The values of the options for interventions and projections."""

    cap: CapOption = None
    cap_layers: CapLayersOption = None
    percentile: PercentileOption = None
    of: OfOption = None
    experiment: ExperimentOption = None
    check: CheckOption = True
    steer: SteerOption = None
    steer_layers: SteerLayersOption = None
    scale: ScaleOption = 1.0
    spec: SpecOption = None
    where: WhereOption = None
    axis: AxisOption = None
    axis_layers: AxisLayersOption = None


@dataclasses.dataclass
class Edits(EditOptions):
    """The values of the options for interventions and projections, and the contents of their files.

    The method `read` sets the following attributes. Each attribute is None until then, and remains
    None if its option was not given.

    Attributes:
      held: the axis or caps in the file of `--cap`.
      vector: the direction in the file of `--steer`.
      asked: the JSON value in the file of `--spec`.
      shown: the direction in the file of `--axis`.
    """

    held: Axis | Caps | None = dataclasses.field(default=None, init=False)
    vector: Vector | None = dataclasses.field(default=None, init=False)
    asked: Any = dataclasses.field(default=None, init=False)
    shown: Vector | None = dataclasses.field(default=None, init=False)

    @property
    def any(self) -> bool:
        """Whether any of the options `--cap`, `--steer` and `--spec` was given."""
        return any(x is not None for x in (self.cap, self.steer, self.spec))

    def read(self) -> Edits:
        """Check the options, read their files and return `self`; no model is needed.

        Raises:
          UserError: an option is invalid, conflicts with another option or needs one that was not
            given, or a file cannot be read or has unsuitable contents.
        """
        from jaxpersona.ckpts.vectors import load_vector
        from jaxpersona.interventions.bank import parse_layers
        from jaxpersona.interventions.where import as_where

        if not math.isfinite(self.scale):
            raise UserError(f"--scale is {self.scale}; it must be finite")
        file, suffix = self._cap_file()
        for layers in (self.cap_layers, self.steer_layers, self.axis_layers):
            if layers is not None:
                parse_layers(layers)
        if self.where is not None:
            as_where(self.where)
        given = {"--cap-layers": self.cap_layers, "--percentile": self.percentile,
                 "--of": self.of, "--experiment": self.experiment}
        idle = [name for name, value in given.items() if value is not None]
        missing = []
        if idle and self.cap is None:
            missing.append(f"{', '.join(idle)} need{'s' * (len(idle) == 1)} --cap")
        if self.steer_layers is not None and self.steer is None:
            missing.append("--steer-layers needs --steer")
        if self.axis_layers is not None and self.axis is None and self.cap is None:
            missing.append("--axis-layers needs --axis")
        if self.where is not None and self.cap is None and self.steer is None:
            missing.append("--where needs --cap or --steer")
        if missing:
            raise UserError(", and ".join(missing))
        self.held = None if file is None else caps.open_caps(file, given, suffix)
        self.vector = load_vector(self.steer) if self.steer else None
        self.asked = caps.read_spec(self.spec) if self.spec else None
        self.shown = load_vector(self.axis) if self.axis else None
        return self

    def _cap_file(self) -> tuple[pathlib.Path | None, str]:
        """Split the value of `--cap` into a file and a suffix `:FROM:TO[:pNN]`.

        The suffix sets `cap_layers` and, with pNN, `percentile`. If a file with the whole value as
        its name exists, the value has no suffix.

        Returns:
          (the file, or None if the option was not given; the suffix, or "").

        Raises:
          UserError: another option also sets the layers or the percentile.
        """
        if self.cap is None:
            return None, ""
        short = _SHORT.fullmatch(self.cap)
        if short is None or pathlib.Path(self.cap).exists():
            return pathlib.Path(self.cap), ""
        name, layers, percentile = short.groups()
        if self.cap_layers is not None or (percentile and self.percentile is not None):
            option = "--cap-layers" if self.cap_layers is not None else "--percentile"
            raise UserError(f"--cap is {self.cap}, and {option} is also given; "
                            "both set the same value, so omit one of them")
        self.cap_layers = layers
        self.percentile = percentile or self.percentile
        return pathlib.Path(name), self.cap.removeprefix(name)

    def build(self, model: Model) -> Interventions:
        """Return the interventions of all options, after a self-test of caps if `check` is True.

        Raises:
          UserError: a file belongs to another model, the file of `--spec` is invalid, a layer does
            not exist, or a cap fails the self-test.
        """
        from jaxpersona.interventions import chain, resolve_layers
        from jaxpersona.interventions import steer as add
        from jaxpersona.vectors.caps import fitted

        total, where = model.config.n_layers, self.where or "everywhere"
        vector = self.vector
        if vector is not None:
            vector = fitted(vector, model.config, model.name, model.fingerprint)
        at = total // 2 if self.steer_layers is None else resolve_layers(self.steer_layers, total)
        return chain(
            None if vector is None else add(vector, layers=at, scale=self.scale, where=where),
            None if self.held is None else caps.cap_edits(
                model, self.held, self.cap_layers, self.percentile, self.of, self.check, where),
            None if self.spec is None else caps.spec_edits(model, self.asked, self.spec,
                                                           self.check),
        )

    def monitor(self, model: Model, *, default: bool = False) -> Monitor | None:
        """Return a `Monitor` for the direction of `--axis`, or None if there is no direction.

        Args:
          model: the model.
          default: whether to use the axis of `--cap` if `--axis` was not given.

        Raises:
          UserError: the direction belongs to another model or is zero at one of the layers, a layer
            does not exist, or `--axis-layers` is given without a direction.
        """
        from jaxpersona.persona.monitor import Monitor
        from jaxpersona.vectors.vector import Axis

        shown = self.shown
        if shown is None and default and isinstance(self.held, Axis):
            shown = self.held
        if shown is None and self.axis_layers is not None:
            raise UserError("--axis-layers needs --axis")
        return None if shown is None else Monitor(model, shown, self.axis_layers)
