"""Draw figures of roles: ranking on the axis, principal components and explained variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.report import labels, sources
from jaxpersona.report.style import (
    BLACK,
    DEFAULT,
    GREY,
    ROLE,
    TINY,
    axes_of,
    band,
    described,
    figure_of,
    label,
    reference,
    style,
    titled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED, EXTREMES = 40, 15  # up to 40 roles, all are named; above 40, only 15 at each end
_CORNERS = 6  # number of roles to name at each end of a component, if not all are named
_ROW = 0.155  # height of a role's line, in inches
_LEAST = 7.5  # minimum height of a line in axes that the caller provides, in points


@checked_call
def ranking(found: Any, layer: int | None = None, *, count: int = EXTREMES,
            held_out: Sequence[str] = (), title: str | None = None,
            ax: Axes | None = None) -> Axes:
    """Draw the roles in the order of their projections onto the Assistant Axis.

    Each line of the figure shows the mean and the interquartile range over one role's answers. If
    there are more than 40 roles, only the roles at both ends have their own lines, and the means of
    the others are ticks on one shared line. The band is the interquartile range over the default
    persona's answers.

    Args:
      found: the result of `extract_axis`; the folder of a run; or role → projections [n, L] of n
        answers (or their mean [L]), with the default persona as "default".
      layer: the layer; default: the middle one.
      count: the number of roles to name at each end, if there are more than 40 roles. Fewer roles
        are named if the names do not fit the height of `ax`.
      held_out: roles to draw as open circles, in addition to the held-out roles of the run.
      title: the title; default: one with the number of roles.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, `count` is not a positive integer, `found` has an
        unsupported type or no finite projection at the layer, its run is incomplete or damaged, or
        the layer does not exist.

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np
      >>> found = {"default": np.array([[3.0], [5.0]]), "pirate": np.array([[-1.0], [0.0]])}
      >>> [tick.get_text() for tick in jp.plot.ranking(found).get_yticklabels()]
      ['pirate', 'default persona']
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"count is {shown(count)}; it must be a positive integer")
    at = sources.places(found, layer)
    with style():
        total, rows = len(at.names), len(at.names) if len(at.names) <= NAMED else 2 * count + 3
        ax = axes_of(ax, 6.4, _ROW * (min(rows, total + 3) + 2) + 1.3)
        room = int(ax.get_window_extent().height / figure_of(ax).dpi * 72 / _LEAST) - 3
        whole = total <= NAMED and total <= room
        ends = total if whole else max(1, min(count, (room - 3) // 2, (total - 1) // 2))
        heights = _rows(total, ends, whole)
        _draw_rows(ax, at, heights, frozenset(held_out) | at.held_out)
        if at.default is not None:
            band(ax, *at.default[1:], "default persona, p25 to p75", vertical=True)
        described(ax, f"projection onto the Assistant Axis, layer {at.layer} (higher: more "
                  "Assistant-like)",
                  "Dots: means over a role's answers"
                  + ("; bars: p25 to p75." if at.quartiles is not None else "."))
        titled(ax, title or f"{total} roles on the Assistant Axis")
    return ax


def _rows(total: int, ends: int, whole: bool) -> np.ndarray:
    """Return the y coordinates [total] of the roles.

    Unless `whole` is True, all roles except the first and last `ends` roles share one line.
    """
    heights = np.arange(total, dtype=float)
    if not whole:
        heights[ends : total - ends] = ends + 1
        heights[total - ends :] = ends + 3 + np.arange(ends)
    return heights


def _draw_rows(ax: Axes, at: sources.Places, heights: np.ndarray, held_out: frozenset[str]) -> None:
    """Draw the roles at the given y coordinates, and the default persona above them.

    Roles that share a line are drawn as ticks.
    """
    shared = np.array([int((heights == height).sum()) > 1 for height in heights])
    names = {}
    drawn = False
    for i, name in enumerate(at.names):
        if shared[i]:
            continue
        if at.quartiles is not None:
            ax.plot(at.quartiles[i], [heights[i]] * 2, color=ROLE, alpha=0.35, linewidth=3.5,
                    marker="", solid_capstyle="butt")
        held = name in held_out
        ax.plot(at.means[i], heights[i], "o", color=ROLE, markersize=4.5,
                fillstyle="none" if held else "full",
                label="not used for the axis" if held and not drawn else None)
        drawn |= held
        names[heights[i]] = label(name)
    if shared.any():
        ax.plot(at.means[shared], heights[shared], "|", color=ROLE, alpha=0.55, markersize=13,
                markeredgewidth=0.9, linestyle="none")
        names[heights[shared][0]] = f"{int(shared.sum())} other roles"
    if at.default is not None:
        top = heights.max() + 1.4
        mean, low, high = at.default
        ax.plot([low, high], [top] * 2, color=DEFAULT, alpha=0.45, linewidth=3.5, marker="",
                solid_capstyle="butt")
        ax.plot(mean, top, "*", color=DEFAULT, markersize=9)
        names[top] = "default persona"
    ax.set_yticks(sorted(names), [names[height] for height in sorted(names)], fontsize=TINY)
    ax.tick_params(axis="y", length=2)
    ax.set_ylim(min(names) - 0.9, max(names) + 0.9)


@checked_call
def pca(found: Any, layer: int | None = None, *, default: Any = None, title: str | None = None,
        ax: Axes | None = None) -> Axes:
    """Draw the role vectors in the plane of their first two principal components at one layer.

    With more than 40 roles, only those at the ends of each component are named.

    Args:
      found: the result of `extract_axis` or its `analysis`; the folder of a run; or role → vector
        [L, D], with the default persona as "default".
      layer: the layer; default: the middle one.
      default: the default persona's mean activation [L, D], if `found` does not contain it.
      title: the title; default: one with the number of roles, the layer and |cos(PC1, axis)|.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, `found` has an unsupported type (such as `Axis`, which has
        no role vectors) or fewer than two roles, its run is incomplete or damaged, the default
        persona's mean activation is missing, or the layer does not exist.

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np
      >>> found = {name: np.eye(3, 4)[:1] * n for n, name in enumerate(["a", "b", "default"])}
      >>> jp.plot.pca(found).get_xlabel().split(",")[0]
      'PC1 (higher: more Assistant-like)'
    """
    read = sources.parts(found, layer, default)
    xy = read.components.coordinates[:, :2]
    xy = np.pad(xy, ((0, 0), (0, 2 - xy.shape[1])))
    with style():
        ax = axes_of(ax, 6.4, 5.2)
        ax.scatter(*xy.T, color=ROLE, s=16, alpha=0.7, linewidths=0, label="role", zorder=2)
        points = [(label(name), float(x), float(y))
                  for name, (x, y) in zip(read.names, xy, strict=True)]
        distance = np.abs(xy / np.maximum(xy.std(0), 1e-30)).max(1)
        chosen = _ends(xy) if len(points) > NAMED else set(range(len(points)))
        points = [points[i] for i in sorted(chosen, key=lambda i: -distance[i])]
        sizes, markers = [TINY - 0.5] * len(points), xy
        if read.default is not None:
            x, y = np.pad(read.default, (0, 2 - len(read.default)))
            ax.plot(x, y, "*", color=DEFAULT, markersize=14, linestyle="none", zorder=4,
                    markeredgecolor="white", markeredgewidth=0.6, label="default persona")
            points.insert(0, ("default persona", float(x), float(y)))
            sizes.insert(0, TINY + 1)
            markers = np.concatenate([xy, [[x, y]]])
        ratio = read.components.ratio
        described(ax, f"PC1 (higher: more Assistant-like), {ratio[0]:.0%} of the variance")
        ax.set_ylabel(f"PC2, {ratio[1]:.0%} of the variance" if len(ratio) > 1 else "PC2")
        ax.margins(0.12)
        titled(ax, title or f"{len(read.names)} role vectors, layer {read.layer}: "
                            f"|cos(PC1, axis)| = {read.cosine:.2f}")
        labels.place(ax, points, markers, sizes)
    return ax


def _ends(xy: np.ndarray) -> set[int]:
    """Return the indices of the `_CORNERS` lowest and highest points in each coordinate."""
    order = np.argsort(xy, axis=0)
    return {int(i) for i in np.concatenate([order[:_CORNERS], order[-_CORNERS:]]).reshape(-1)}


@checked_call
def variance(found: Any, layer: int | None = None, *, thresholds: Sequence[float] = (0.7, 0.9),
             most: int = 20, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw the cumulative explained variance of the principal components of the role vectors.

    Args:
      found: as for `pca`, or the explained variance ratios [C] of the components.
      layer: the layer; default: the middle one. For ratios, the layer appears only in the title.
      thresholds: shares of the variance, which are drawn as lines. The legend states how many
        components are needed to reach each share.
      most: the maximum number of components to draw.
      title: the title; default: one with the layer.
      ax: the axes to draw on; default: the axes of a new figure.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib is missing, `found` has an unsupported type or invalid ratios, its run
        is incomplete or damaged, the layer does not exist, or a threshold is not between 0 and 1.

    Examples:
      >>> import jaxpersona as jp
      >>> ax = jp.plot.variance([0.6, 0.2, 0.1, 0.1])
      >>> [entry.get_text() for entry in ax.get_legend().get_texts()]
      ['70 %: 2 components', '90 %: 3 components']
    """
    for share in thresholds:
        if not isinstance(share, (int, float)) or not 0 < share < 1:
            raise UserError(f"thresholds contains {share!r}; give shares between 0 and 1")
    values, at = sources.ratios(found, layer)
    with style():
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        ax = axes_of(ax, 5.2, 3.6)
        total = np.cumsum(values)
        shown = total[:most]
        ax.plot(np.arange(1, len(shown) + 1), shown, "o-", color=ROLE, markersize=4)
        dashes = [(0, (4, 2)), (0, (1, 1.5)), (0, (6, 1, 1, 1)), (0, (2, 4))]
        for i, share in enumerate(sorted(thresholds)):
            reached = np.nonzero(total >= share - 1e-9)[0]
            needed = f"{reached[0] + 1} component" + ("" if reached[0] == 0 else "s") if len(
                reached) else f"more than {len(total)} components"
            reference(ax, share, f"{share * 100:g} %: {needed}", dash=dashes[i % 4],
                      colour=BLACK if i % 2 == 0 else GREY)
        ax.set(ylim=(0, 1.03), ylabel="explained share of the variance")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        if len(shown) > 20:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            ax.set_xticks(range(1, len(shown) + 1))
        described(ax, "number of principal components")
        titled(ax, title or "Variance of the role vectors"
               + ("" if at < 0 else f", layer {at}"), columns=2)
    return ax
