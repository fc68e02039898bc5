"""Draw figures of the JSON results of the benchmarks of decoding, caps, rows and rooflines."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json
from jaxpersona.report import labels
from jaxpersona.report.style import (
    BLACK,
    CYCLE,
    GREY,
    MARKERS,
    TINY,
    axes_of,
    described,
    reference,
    style,
    text,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KINDS = {  # benchmark → (field of the curves, title, label of the x axis, label of the y axis)
    "decode": ("by_batch", "Throughput of decoding", "rows", "tokens/s"),
    "cap_overhead": ("by_layers", "Speed with capped layers", "capped layers",
                     "speed, capped ÷ uncapped"),
    "rows": ("by_distinct", "Speed with distinct caps", "distinct caps in a batch",
             "speed, distinct ÷ shared caps"),
    "roofline": ("points", "Roofline", "FLOP/byte", "FLOP/s"),
}


@checked_call
def bench(found: Any, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the results of one benchmark: `decode`, `cap_overhead`, `rows` or `roofline`.

    The curves of `cap_overhead` and `rows` are ratios of speeds (capped ÷ uncapped, distinct ÷
    shared caps); the shaded bands are their 95 % confidence intervals.

    Args:
      found: a result, as a dict or the path of a JSON file; or a dict from names to results (as
        dicts) of the same benchmark.
      title: the title; default: the standard title for the benchmark.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, or `found` is not a result of one of these benchmarks.

    Examples:
      >>> import jaxpersona as jp
      >>> found = {"bench": "decode", "by_batch": {"1": {"tokens_per_second": 50.0},
      ...                                          "8": {"tokens_per_second": 300.0}}}
      >>> jp.plot.bench(found).get_ylabel()
      'tokens/s'
    """
    results = _results(found)
    kind = next(iter(results.values()))["bench"]
    field, usual, x, y = _KINDS[kind]
    with style():
        from matplotlib.ticker import StrMethodFormatter

        ax = axes_of(ax, 5.6, 4.0)
        try:
            for i, (name, value) in enumerate(results.items()):
                look: dict[str, Any] = {
                    "color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)],
                    "label": text(name or usual)}
                if kind == "roofline":
                    _roof(ax, value, look)
                elif kind == "decode":
                    at = {int(n): one["tokens_per_second"] for n, one in value[field].items()}
                    ax.plot(sorted(at), [at[n] for n in sorted(at)], **look)
                else:
                    _ratios(ax, {int(n): one for n, one in value[field].items()}, look)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UserError(f"found is not a result of the benchmark {kind!r} "
                            f"({type(error).__name__}: {error})") from None
        if kind in ("rows", "cap_overhead"):
            reference(ax, 1.0, "equal speed", colour=GREY)
        if kind != "cap_overhead":
            ax.set_xscale("log", base=2)
        if kind == "roofline":
            ax.set_yscale("log")
        else:
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if kind == "decode":
            ax.set_ylim(0)
            ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        described(ax, x)
        ax.set_ylabel(y)
        titled(ax, title or usual, columns=2)
        if kind == "roofline":
            _name_points(ax, results)
    return ax


def _results(found: Any) -> dict[str, dict[str, Any]]:
    """Read `found` if it is a file, validate it, and return the results by name.

    Raises:
      UserError: `found` contains no results, or results of several or of unknown benchmarks.
    """
    if isinstance(found, (str, os.PathLike)):
        path = pathlib.Path(found)
        found = {path.stem: read_json(path)}
    if isinstance(found, Mapping) and "bench" in found:
        found = {"": found}
    if not isinstance(found, Mapping) or not found or not all(
            isinstance(value, Mapping) for value in found.values()):
        raise UserError(f"found is {shown(found, 60)}; give a benchmark result, or a dict "
                        "from names to results")
    kinds = {str(value.get("bench")) for value in found.values()}
    if len(kinds) > 1 or not kinds <= set(_KINDS):
        raise UserError(f"found has results of {', '.join(sorted(kinds))}; give results of one of "
                        f"the benchmarks {', '.join(_KINDS)}")
    return {str(name): dict(value) for name, value in found.items()}


def _ratios(ax: Axes, at: Mapping[int, Mapping[str, Any]], look: dict[str, Any]) -> None:
    """Draw ratios as a curve, with their confidence intervals as a band."""
    xs = sorted(at)
    low, high = zip(*(at[x]["interval"] for x in xs), strict=True)
    ax.plot(xs, [at[x]["ratio"] for x in xs], **look)
    ax.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _roof(ax: Axes, value: Mapping[str, Any], look: dict[str, Any]) -> None:
    """Draw the roofline of a device as a line, and the speed of each program as a point."""
    roof = value["roof"]
    xs = [2**n / 8 for n in range(14)]
    ax.plot(xs, [min(roof["flops_per_second"], x * roof["bytes_per_second"]) for x in xs],
            **{**look, "marker": ""})
    for _, x, y in _points(value):
        ax.plot(x, y, "o", color=BLACK)


def _points(value: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Return (name, FLOP/byte, FLOP/s) of each program in a result of `roofline`."""
    return [(str(point["name"]), float(point["intensity"]), float(point["flops_per_second"]))
            for point in value["points"]]


def _name_points(ax: Axes, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the name of each point of a roofline plot beside the point, if there is space."""
    points = [point for value in results.values() for point in _points(value)]
    if not points:
        return
    drawn = [np.asarray(line.get_xydata()) for line in ax.lines]
    lines = [np.stack([np.interp(steps, np.arange(len(xy)), np.log(xy[:, i])) for i in (0, 1)], 1)
             for xy in drawn if len(xy) > 1 for steps in [np.linspace(0, len(xy) - 1, 200)]]
    avoid = np.exp(np.concatenate([np.log([(x, y) for _, x, y in points]), *lines]))
    labels.place(ax, points, avoid, TINY)
