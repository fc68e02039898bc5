"""The style of all figures: rcParams, a colour-blind-safe palette, labels and saving.

matplotlib is imported when a figure is drawn, not when the package is imported.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import pathlib
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxpersona.brief import shown
from jaxpersona.ckpts.files import atomic
from jaxpersona.errors import UserError
from jaxpersona.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# the colour-blind-safe palette of Okabe and Ito (2008)
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#6E6E6E"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # one per colour: curves differ in colour and marker
DEFAULT, ROLE = GREEN, BLUE
ARMS = {"uncapped": (VERMILION, "o"), "capped": (BLUE, "s")}  # arm → (colour, marker)
DIVERGING = "PuOr"  # colour map for values on both sides of a reference
SMALL, TINY = 8.0, 7.0  # font sizes in points: tick labels and legends; names of roles
_RC = {
    "font.family": ["DejaVu Sans"],  # bundled with matplotlib, so it is always available
    "font.size": 9.0, "axes.titlesize": 10.0, "axes.titlelocation": "left",
    "axes.titlepad": 8.0, "axes.labelsize": 9.0, "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL, "legend.fontsize": SMALL, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
    "lines.linewidth": 1.6, "lines.markersize": 5.0, "figure.dpi": 110.0, "savefig.dpi": 150.0,
    "axes.axisbelow": True, "svg.hashsalt": "jaxpersona",  # makes SVG files reproducible
}
_PLAIN = contextvars.ContextVar("figures without pyplot", default=False)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Apply the package's style in a `with` block, and restore the caller's rcParams afterwards.

    Raises:
      UserError: matplotlib is not installed.
    """
    require("matplotlib", "figures need matplotlib")
    import matplotlib
    from cycler import cycler

    settings: dict[Any, Any] = {**_RC}
    settings["axes.prop_cycle"] = cycler(color=CYCLE) + cycler(marker=MARKERS)
    with matplotlib.rc_context(settings):
        yield


@contextlib.contextmanager
def without_pyplot() -> Iterator[None]:
    """Create the figures in a `with` block without pyplot.

    The global state of pyplot (its backend and its list of figures) remains unchanged.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the given axes, or the axes of a new figure with this width and height in inches.

    The top and right spines of given axes are hidden.

    Raises:
      UserError: `ax` is not a matplotlib Axes.
    """
    if ax is None and _PLAIN.get():
        return new_figure(width, height).subplots()
    if ax is None:
        import matplotlib.pyplot as plt  # so that notebooks display the figure

        return plt.subplots(figsize=(width, height), layout="constrained")[1]
    if not (hasattr(ax, "plot") and hasattr(ax, "transAxes")):
        raise UserError(f"ax is {shown(ax, 60)}; give a matplotlib Axes, such as plt.subplots()[1]")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def new_figure(width: float, height: float) -> Figure:
    """Create a figure of a given size in inches, independent of pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_of(ax: Axes) -> Figure:
    """Return the top-level figure of an Axes, even if the Axes is in a subfigure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def renderer_of(ax: Axes) -> Any:
    """Apply the layout of the figure of an Axes, and return a renderer for measuring text.

    The renderer is always Agg's, so positions do not depend on matplotlib's backend.
    """
    from matplotlib.backends.backend_agg import RendererAgg

    figure = figure_of(ax)
    figure.draw_without_rendering()  # applies the layout and sets the limits of the axes
    width, height = figure.bbox.size
    return RendererAgg(max(1, int(width)), max(1, int(height)), figure.dpi)


def text(given: object) -> str:
    """Escape the dollar signs of a text, which matplotlib would interpret as math delimiters."""
    return str(given).replace("$", r"\$")


def label(name: str) -> str:
    """Return the label of a role or curve: its escaped name, with spaces for underscores."""
    return text(name.replace("_", " ").strip() or "(unnamed)")


def reference(ax: Axes, value: float, name: str, *, vertical: bool = False,
              colour: str = BLACK, dash: Any = (0, (4, 2))) -> None:
    """Draw a horizontal (or vertical) line at a value, with an entry in the legend."""
    draw = ax.axvline if vertical else ax.axhline
    draw(value, color=colour, linewidth=0.9, linestyle=dash, marker="", label=text(name), zorder=1)


def band(ax: Axes, low: float, high: float, name: str, *, vertical: bool = False) -> None:
    """Shade a horizontal (or vertical) band of values, with an entry in the legend."""
    draw = ax.axvspan if vertical else ax.axhspan
    draw(low, high, color=DEFAULT, alpha=0.14, linewidth=0, label=text(name), zorder=0)


def titled(ax: Axes, title: str, columns: int = 3) -> None:
    """Write the title above the axes, with the legend between the title and the axes."""
    handles, names = ax.get_legend_handles_labels()
    lines = -(-len(handles) // columns)
    if handles:
        ax.legend(handles, names, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns,
                  borderaxespad=0.1, borderpad=0.1, handlelength=1.8, columnspacing=1.4,
                  labelspacing=0.35)
    inches = ax.get_window_extent().width / figure_of(ax).dpi
    wrapped = textwrap.fill(title, max(20, int(inches * 13)))
    ax.set_title(text(wrapped), pad=6 + lines * 1.45 * SMALL)


def described(ax: Axes, name: str, caption: str = "") -> None:
    """Label the x axis, and write an optional caption below the label."""
    ax.set_xlabel(text(name) + (f"\n{text(caption)}" if caption else ""), linespacing=1.5)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as a PNG file and an SVG file with the same stem.

    If the path ends in .svg, it is the path of the SVG file; otherwise, of the PNG file.
    """
    path = pathlib.Path(path)
    stem = path.with_suffix("") if path.suffix.lower() in (".png", ".svg") else path
    png = stem.with_name(f"{stem.name}.png") if path.suffix.lower() == ".svg" else path
    with style():
        with atomic(png) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
        with atomic(stem.with_name(f"{stem.name}.svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
