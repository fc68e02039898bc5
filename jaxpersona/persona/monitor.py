"""Project replies onto a direction during generation, and count the edited tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxpersona.brief import line, quoted
from jaxpersona.captures import capture
from jaxpersona.captures.capture import Capture
from jaxpersona.errors import UserError
from jaxpersona.interventions import resolve_layers
from jaxpersona.interventions.bank import Layers
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.describe import layer_range
from jaxpersona.interventions.trace import Applied
from jaxpersona.interventions.where import generated, response
from jaxpersona.persona.check import fit
from jaxpersona.vectors.vector import Axis, Vector

if TYPE_CHECKING:
    from jaxtyping import Float

    from jaxpersona.models.model import Model

NAME = "monitor"  # the key of the projections in `Reply.captured`


class Monitor:
    """Measures the mean projection of replies onto a direction, at selected layers.

    The projections are computed in the forward passes that generate the reply, before the
    interventions at the same layer (`Capture.before_edits`). A projection below the floor of a cap
    is therefore reported unchanged. Tokens of thinking blocks and of the chat template are
    excluded.

    Attributes:
      vector: the direction.
      layers: the layers of the projections, in ascending order.
      capture: the capture to pass to `generate` or `Request`.

    Examples:
      >>> import jaxpersona as jp
      >>> from jaxpersona.persona.monitor import NAME, Monitor
      >>> model = jp.load("mini")
      >>> monitor = Monitor(model, jp.load_axis("mini"))
      >>> out = jp.generate(model, ["Who are you?"], capture=monitor.capture, max_new_tokens=8)
      >>> monitor.of_reply(out.captured[NAME][0], out.rows[0].tokens.size).keys()
      dict_keys([4])
    """

    def __init__(self, model: Model, vector: Vector, layers: Layers | None = None) -> None:
        """Check the direction and choose the layers.

        Args:
          model: the model that generates the replies.
          vector: a direction in the model's residual stream.
          layers: the layers of the projections; default: the middle layer of the model. If the
            direction is zero at that layer (possible for an imported file), the default is the
            middle of the layers at which the direction is nonzero.

        Raises:
          UserError: the direction belongs to another model or site, or is zero at every layer or at
            one of `layers`; or a layer does not exist.
        """
        vector = fit(model, vector)
        known = np.flatnonzero(vector.values.any(1))
        total = model.config.n_layers
        if not known.size:
            raise UserError(f"{vector.kind} {vector.name!r} is zero at every layer; choose "
                            "another direction")
        if layers is None:
            layers = total // 2 if total // 2 in known else int(known[known.size // 2])
        chosen = resolve_layers(layers, total)
        if empty := [layer for layer in chosen if layer not in known]:
            raise UserError(f"{vector.kind} {vector.name!r} is zero at layer {empty[0]}; choose "
                            "other layers")
        self.vector, self.layers = vector, chosen
        self.capture: Capture = capture.projections(
            vector, response & generated, layers=chosen, name=NAME).before_edits()

    def __repr__(self) -> str:
        return line("Monitor", quoted(self.vector.name), layer_range(self.layers))

    @property
    def sentence(self) -> str:
        """A description of the projections as text."""
        return (f"mean projection of the reply's tokens on {self.vector.name!r} at "
                f"{layer_range(self.layers)}, read before the interventions at that layer")

    @property
    def usual(self) -> dict[int, tuple[float, float]]:
        """The usual projections of the default persona: layer → (25th, 75th percentile).

        The percentiles are over rollouts, of the mean projection of each rollout's reply. The dict
        is empty if they are unknown.
        """
        known = self.vector.percentiles.get("default", {}) if isinstance(self.vector, Axis) else {}
        if "p25" not in known or "p75" not in known:
            return {}
        return {layer: (float(known["p25"][layer]), float(known["p75"][layer]))
                for layer in self.layers}

    def mean(self, values: Float[np.ndarray, "n L K"]) -> dict[int, float]:
        """Return the mean projection over tokens, by layer; {} if all tokens are excluded.

        Args:
          values: [n, L, 1], the projections of n tokens at the L layers of `layers`
            (`Event.projections`); NaN for excluded tokens.
        """
        counted = values[~np.isnan(values).any((1, 2))] if values.size else values
        if not counted.shape[0]:
            return {}
        means = counted[..., 0].mean(0, dtype=np.float64)
        return dict(zip(self.layers, means.tolist(), strict=True))

    def of_reply(self, captured: Float[np.ndarray, "L T K"], start: int) -> dict[int, float]:
        """Return the mean projection of a reply, by layer; {} if all its tokens are excluded.

        Args:
          captured: [L, T, 1], the projections of the T tokens of the prompt and the reply at the L
            layers of `layers`: `Reply.captured[NAME]`, or `Generated.captured[NAME][i]` for
            conversation i.
          start: the number of tokens in the prompt.
        """
        return self.mean(np.moveaxis(captured[:, start:], 0, 1))

    def words(self, means: Mapping[int, float]) -> str:
        """Return the mean projections as text, such as "projection +19.31 at layer 4"."""
        if not means:
            return "no projection: the reply has no token to project"
        return "projection " + ", ".join(f"{value:+.2f} at layer {layer}"
                                         for layer, value in means.items())


@dataclasses.dataclass(frozen=True)
class EditCount:
    """The numbers of tokens that an intervention selected and changed in one conversation.

    Attributes:
      edit: a description of the intervention, such as "cap(everywhere, layers 4–7, residual)".
      layers: the l layers of the intervention.
      seen: the number of selected tokens in the prompt and the reply.
      changed: the number of changed tokens, for each of the l layers.
    """

    edit: str
    layers: list[int]
    seen: int
    changed: list[int]


def edit_counts(edits: Interventions, applied: Sequence[Applied],
                index: int | None = None) -> list[EditCount]:
    """Return one `EditCount` per intervention, for one conversation.

    Args:
      edits: the interventions.
      applied: `Reply.applied`, or `Generated.applied` if `index` is given.
      index: the index of the conversation in `Generated`; None for a `Reply`.
    """
    at = () if index is None else (index,)
    return [EditCount(repr(table), list(table.layers),
                      int(np.asarray(one.seen)[at]),
                      np.asarray(one.changed)[(slice(None), *at)].tolist())
            for table, one in zip(edits.edits, applied, strict=True)]
