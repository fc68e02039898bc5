"""Line plots over layers, conversation turns and steering strengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import numbers
from jaxpersona.persona.talk import Talks, TurnProjection
from jaxpersona.report.arrays import curves_of, half_width, spread
from jaxpersona.report.sources import layer_of
from jaxpersona.report.style import (
    ARMS,
    CYCLE,
    GREY,
    MARKERS,
    axes_of,
    band,
    described,
    label,
    reference,
    style,
    titled,
)
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@checked_call
def layers(curves: Mapping[str, Any], *, ylabel: str = "", title: str = "By layer",
           ax: Axes | None = None) -> Axes:
    """Draw values by layer, one curve per name.

    Args:
      curves: name → values [L]; a NaN leaves a gap in the curve.
      ylabel: the label of the y axis, with the quantity and its unit.
      title: the title.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, or `curves` are not 1 to 14 arrays [L] of equal length.

    Examples:
      >>> import jaxpersona as jp
      >>> axis = jp.load_axis("mini")
      >>> ax = jp.plot.layers({"p25": axis.thresholds("p25")}, ylabel="floor")
      >>> ax.get_xlabel(), len(ax.lines[0].get_xdata())
      ('layer', 8)
    """
    values = curves_of(curves, dims=(1,))
    with style():
        ax = axes_of(ax, 6.0, 3.8)
        for (name, one), look in zip(values.items(), _looks(values), strict=True):
            ax.plot(range(len(one)), one, markersize=3.5, label=label(name), **look)
        _whole_numbers(ax)
        described(ax, "layer")
        ax.set_ylabel(ylabel)
        titled(ax, title, columns=2)
    return ax


@checked_call
def turns(found: Sequence[TurnProjection], names: Sequence[str], layer: int | None = None, *,
          axis: Axis | None = None, floor: str | float | None = None,
          title: str = "Projection of each assistant message", ax: Axes | None = None) -> Axes:
    """Draw the mean projections of a conversation's assistant messages onto directions.

    Args:
      found: the result of `project_conversation` for K directions.
      names: the K names of the directions.
      layer: the layer; default: the middle one.
      axis: an axis; the interquartile range of the default persona's projections onto it is drawn.
      floor: the floor τ of a cap, as a number, or as a percentile of the default persona such as
        "p25", which needs `axis`.
      title: the title.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, `found` has an unsupported type or is empty, `names` does
        not have K entries, the layer does not exist, or `axis` or `floor` is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> from jaxpersona.persona.talk import project_conversation
      >>> model, axis = jp.load("mini"), jp.load_axis("mini")
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> ax = jp.plot.turns(project_conversation(model, talk, [axis]), ["Assistant Axis"])
      >>> ax.lines[0].get_xdata().tolist()
      [1]
    """
    found = list(found)
    if not found or not all(isinstance(one, TurnProjection) for one in found):
        raise UserError("found must be the result of project_conversation, with at least one "
                        "assistant message")
    total, directions = found[0].values.shape
    at = layer_of(layer, total)
    if isinstance(names, str) or len(names) != directions:
        raise UserError(f"names is {shown(names, 60)}; give one name for each "
                        f"direction (number of directions: {directions})")
    _check_axis(axis)
    if axis is not None and axis.n_layers != total:
        raise UserError(f"axis has {axis.n_layers} layers, but found has {total}; give the axis of "
                        "the same model")
    with style():
        ax = axes_of(ax, 6.0, 3.6)
        where = [one.turn for one in found]
        values = np.stack([one.values[at] for one in found])
        for k, look in enumerate(_looks(names)):
            ax.plot(where, values[:, k], label=label(names[k]), **look)
        if len(where) > 20:
            _whole_numbers(ax)
        else:
            ax.set_xticks(where)
        described(ax, "index of the message in the conversation")
        _projection(ax, axis, at, floor)
        ax.set_ylabel(f"mean projection, layer {at}")
        titled(ax, title, columns=2)
    return ax


@checked_call
def drift(curves: Mapping[str, Any], *, what: Literal["behaviour", "projection"] = "projection",
          axis: Axis | None = None, layer: int | None = None, floor: str | float | None = None,
          leak: Mapping[str, float] | None = None, title: str | None = None,
          ax: Axes | None = None) -> Axes:
    """Draw persona drift over the turns of conversations, with and without an intervention.

    A projection that is measured after the cap cannot fall below the floor and therefore hides
    drift. Draw behaviour instead, or projections of the same conversations that are measured
    without the cap (`Talks.readout`).

    Args:
      curves: arm, such as "uncapped" or "capped" → values by turn. The values are an array [M]; an
        array [M, N] for N conversations, whose mean and interquartile range are drawn; or `Talks`,
        whose `readout` (the projections without interventions) is drawn.
      what: "projection", or "behaviour" for shares of in-character choices from 0 to 1.
      axis: an axis; the interquartile range of the default persona's projections onto it is drawn.
        Only for projections.
      layer: the layer of `axis` and of `Talks`; default: the middle one. Only for projections.
      floor: the floor τ of the cap, as a number, or as a percentile of the default persona such as
        "p25", which needs `axis`. Only for projections.
      leak: arm → share of conversations in which the model reveals a secret, such as the vault code
        of `mini`, in reply to a forbidden request after the last turn. Only for behaviour.
      title: the title; default: one that names the drawn quantity.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, or an argument is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> shares = {"uncapped": [0.2, 0.4, 0.7], "capped": [0.2, 0.2, 0.3]}
      >>> ax = jp.plot.drift(shares, what="behaviour", leak={"uncapped": 0.8, "capped": 0.1})
      >>> [tick.get_text() for tick in ax.get_xticklabels()]
      ['1', '2', '3', 'forbidden\\nrequest']
    """
    if what not in ("behaviour", "projection"):
        raise UserError(f"what is {what!r}; it must be 'behaviour' or 'projection'")
    behaviour = what == "behaviour"
    if behaviour and (axis is not None or floor is not None):
        raise UserError("axis and floor apply to projections; omit them, or use "
                        "what='projection'")
    if leak is not None and not behaviour:
        raise UserError("leak applies to behaviour; omit it, or use what='behaviour'")
    _check_axis(axis)
    at = None if behaviour else _layer(curves, axis, layer)
    values = curves_of({name: _readout(name, one, at) for name, one in dict(curves).items()})
    if behaviour and any((one[np.isfinite(one)] < 0).any() or (one[np.isfinite(one)] > 1).any()
                         for one in values.values()):
        raise UserError("curves has shares outside 0…1; for projections, use what='projection'")
    with style():
        ax = axes_of(ax, 5.6, 4.0)
        looks = _looks(values)
        count = _draw_arms(ax, values, looks)
        if behaviour:
            _behaviour(ax, values, looks, {} if leak is None else dict(leak))
        else:
            _projection(ax, axis, at, floor)
        turns_shown = max(len(one) for one in values.values())
        ticks = list(range(1, turns_shown + 1))
        names = [str(turn) for turn in ticks]
        ax.set_xticks(ticks + [turns_shown + 1] * bool(leak),
                      names + ["forbidden\nrequest"] * bool(leak))
        notes = [f"Lines: means of {count} conversations; shading: p25 to p75."] * bool(count)
        if axis is not None:
            notes.append("Band: p25 to p75 of the default persona's answers.")
        described(ax, "turn", "\n".join(notes))
        titled(ax, title or ("Behaviour" if behaviour else "Projection, measured without the cap"),
               columns=2)
    return ax


def _check_axis(axis: Any) -> None:
    """Raise a UserError if `axis` is neither None nor an Axis."""
    if axis is not None and not isinstance(axis, Axis):
        raise UserError(f"axis is {shown(axis, 60)}; give an Axis, such as the result of "
                        "jp.load_axis")


def _layer(curves: Mapping[str, Any], axis: Axis | None, layer: int | None) -> int | None:
    """Return the layer of the projections; without `Talks` or an axis, return `layer` unchanged."""
    totals = [one.projections.shape[-1] for one in dict(curves).values()
              if isinstance(one, Talks)]
    if axis is not None:
        totals.append(axis.n_layers)
    return layer_of(layer, totals[0]) if totals else layer


def _readout(name: str, given: Any, layer: int | None) -> Any:
    """Return the `readout` [M, N] of `Talks` at a layer; return any other value unchanged.

    Raises:
      UserError: the `Talks` have no readout.
    """
    if not isinstance(given, Talks):
        return given
    if given.readout is None:
        raise UserError(f"curves[{name!r}] has no readout, and its projections were measured after "
                        "the interventions; use grow(…, readout=True)")
    return given.readout[:, :, layer]


def _draw_arms(ax: Axes, values: Mapping[str, np.ndarray], looks: list[dict[str, Any]]) -> int:
    """Draw each arm's mean and, for several values per turn, its interquartile range.

    Returns:
      The largest number of values per turn, or 0 if no arm has several values per turn.
    """
    count = 0
    for (name, one), look in zip(values.items(), looks, strict=True):
        steps = np.arange(1, len(one) + 1)
        if one.ndim == 2:
            count = max(count, one.shape[1])
            one, low, high = spread(one)
            ax.fill_between(steps, low, high, color=look["color"], alpha=0.15, linewidth=0)
        ax.plot(steps, one, label=label(name), **look)
    return count


def _behaviour(ax: Axes, values: Mapping[str, np.ndarray], looks: list[dict[str, Any]],
               leak: dict[str, float]) -> None:
    """Draw the leak rate of each arm after the last turn, and show the y axis in percent.

    Raises:
      UserError: `leak` is not empty, and its arms differ from the arms of `values`.
    """
    from matplotlib.ticker import PercentFormatter

    if leak and set(leak) != set(values):
        raise UserError(f"leak has {sorted(leak)}; give one share for each of {sorted(values)}")
    last = max(len(one) for one in values.values())
    for i, (name, look) in enumerate(zip(values, looks, strict=True)):
        if not leak:
            break
        x = last + 1 + 0.16 * (i - (len(values) - 1) / 2)
        ax.vlines(x, 0, leak[name], color=look["color"], linewidth=6, alpha=0.55)
        ax.plot(x, leak[name], marker=look["marker"], color=look["color"], linestyle="none",
                label=f"{label(name)}: leak")
    ax.set(ylim=(-0.03, 1.03), ylabel="share of in-character choices"
           + (";\nshare of leaks after the last turn" if leak else ""))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _projection(ax: Axes, axis: Axis | None, layer: int | None, floor: str | float | None) -> None:
    """Draw the default persona's band and the floor, if they are given, and label the y axis.

    Raises:
      UserError: the floor is a percentile without an axis, or is not finite.
    """
    if axis is not None and layer is not None:
        low, high = (float(axis.thresholds(p, of="default")[layer]) for p in ("p25", "p75"))
        band(ax, low, high, "default persona, p25 to p75")
    if isinstance(floor, str):
        if axis is None or layer is None:
            raise UserError(f"floor is {shown(floor)}; a percentile needs axis=, "
                            "which contains its value")
        name = f"floor τ ({floor} of the default persona)"
        floor = float(axis.thresholds(floor, of="default")[layer])
    else:
        name = "floor τ"
    if floor is not None:
        if not np.isfinite(floor):
            raise UserError(f"floor is {shown(floor)}; give a finite number")
        reference(ax, float(floor), name)
    ax.set_ylabel("projection onto the Assistant Axis"
                  + ("" if layer is None else f", layer {layer}"))


@checked_call
def steering(scales: Sequence[float], curves: Mapping[str, Any], *, ylabel: str,
             xlabel: str = "steering strength, in multiples of the vector",
             title: str = "Effect of steering", ax: Axes | None = None) -> Axes:
    """Plot a behaviour or a projection against the steering strength, e.g. for a `sweep`.

    Args:
      scales: the steering strengths [S].
      curves: name → values [S]; or values [S, N] for N replies at each strength, whose mean and
        95 % confidence interval (± 1.96 standard errors) are drawn.
      ylabel: the label of the y axis, with the quantity and its unit.
      xlabel: the label of the x axis.
      title: the title.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, `scales` is invalid, or a curve does not have one entry per
        strength.

    Examples:
      >>> import jaxpersona as jp
      >>> ax = jp.plot.steering([-1, 0, 1], {"pirate": [0.9, 0.6, 0.2]}, ylabel="in character")
      >>> [entry.get_text() for entry in ax.get_legend().get_texts()]
      ['pirate', 'no steering']
    """
    at = numbers("scales", scales)
    if at.ndim != 1 or not at.size or not np.isfinite(at).all():
        raise UserError(f"scales is {shown(scales, 60)}; give a list of finite numbers")
    values = curves_of(curves)
    if wrong := [name for name, one in values.items() if len(one) != len(at)]:
        raise UserError(f"curves[{wrong[0]!r}] has length {len(values[wrong[0]])}, but scales has "
                        f"length {len(at)}; give one entry per strength")
    order, several = np.argsort(at, kind="stable"), 0
    with style():
        ax = axes_of(ax, 5.6, 3.8)
        for (name, one), look in zip(values.items(), _looks(values), strict=True):
            one = one[order]
            if one.ndim == 2:
                several = max(several, one.shape[1])
                error = np.array([half_width(row[np.isfinite(row)]) for row in one])
                one = spread(one)[0]
                ax.fill_between(at[order], one - error, one + error, color=look["color"],
                                alpha=0.15, linewidth=0)
            ax.plot(at[order], one, label=label(name), **look)
        if at.min() <= 0 <= at.max():
            reference(ax, 0.0, "no steering", vertical=True, colour=GREY, dash=(0, (1, 1.5)))
        described(ax, xlabel, f"Lines: means of {several} replies; shading: 95 % CI of the "
                              "mean." if several else "")
        ax.set_ylabel(ylabel)
        titled(ax, title, columns=2)
    return ax


def _looks(names: Any) -> list[dict[str, Any]]:
    """Return the colour, marker and line style of each curve; names in `ARMS` have fixed ones."""
    names = list(names)
    taken = {ARMS[name][0] for name in names if name in ARMS}
    pairs = [pair for pair in zip(CYCLE, MARKERS, strict=True) if pair[0] not in taken]
    free = iter([(*pair, style) for style in ("-", "--", ":") for pair in pairs])
    return [dict(zip(("color", "marker", "linestyle"),
                     (*ARMS[name], "-") if name in ARMS else next(free), strict=True))
            for name in names]


def _whole_numbers(ax: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
