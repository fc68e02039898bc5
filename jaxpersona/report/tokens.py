"""A figure of one conversation's tokens, with projections as background colours."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.engine.extract import Extracted
from jaxpersona.engine.generate import Generated
from jaxpersona.engine.replies import Reply
from jaxpersona.errors import UserError
from jaxpersona.inputs import printable
from jaxpersona.models.batch import ASSISTANT, SYSTEM, USER
from jaxpersona.models.model import check_model
from jaxpersona.report.sources import layer_of
from jaxpersona.report.style import (
    DEFAULT,
    DIVERGING,
    GREY,
    SMALL,
    axes_of,
    described,
    figure_of,
    renderer_of,
    style,
    text,
    titled,
)
from jaxpersona.vectors.vector import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from jaxpersona.models.model import Model
    from jaxpersona.text.chat import Row

_COLUMNS = 88  # maximum number of characters per line
_LINE = 0.19  # height of a line, in inches
# the font size used to compute how many lines fit in `ax`, and the maximum font size, in points
_LEAST, _MOST = 5.0, 8.5
_ADVANCE = 0.6021  # width of a DejaVu Sans Mono character, relative to the font size
_LINES = 120  # maximum number of lines in a new figure
_ROLES = ((SYSTEM, "system"), (USER, "user"), (ASSISTANT, "assistant"))


@checked_call
def projections(found: Generated | Extracted | Reply, model: Model, index: int = 0, *,
                layer: int | None = None, direction: int = 0, reading: str = "projections",
                centre: float | None = None, name: str = "the direction",
                axis: Axis | None = None,
                title: str = "Projection of every token", ax: Axes | None = None) -> Axes:
    """Draw the tokens of one conversation, coloured by their projections onto a direction.

    Tokens that the reading did not select are grey on white. The range of colours is the smallest
    range that is symmetric about the projection drawn in white and contains the 2nd and 98th
    percentiles and, if `axis` is given, the default persona's quartiles. Projections beyond this
    range, such as the projection of the first token (an attention sink), have the colour at its
    end.

    Args:
      found: the result of `generate` or `extract`, or a `Reply`, with a reading of
        `capture.projections`.
      model: the model, whose tokenizer decodes the tokens.
      index: the index of the conversation in `found`.
      layer: an index into the layers of the reading; default: the middle one.
      direction: an index into the directions of the reading.
      reading: the name of the reading in `found.captured`.
      centre: the projection drawn in white, such as the floor of a cap; default: the median.
      name: the name of the direction, for the label of the colour bar.
      axis: the axis onto which the reading projects, at all layers; the interquartile range of the
        default persona's projections at the layer is marked above the colour bar.
      title: the title.
      ax: the axes to draw on; default: the axes of a new figure. Tokens that do not fit are
        omitted, and the last line states their number.

    Returns:
      The axes.

    Raises:
      UserError: matplotlib or the model's tokenizer is missing, `found` has no such reading, the
        reading selected no token, an index is out of range, or `axis` is not an axis of all layers
        of the reading.

    Examples:
      >>> import jaxpersona as jp
      >>> model, axis = jp.load("mini"), jp.load_axis("mini")
      >>> read = jp.capture.projections(axis)
      >>> out = jp.generate(model, ["Who are you?"], capture=read, max_new_tokens=4)
      >>> [tick.get_text() for tick in jp.plot.projections(out, model).get_yticklabels()]
      ['user', 'assistant']
    """
    check_model(model)
    if model.tokenizer is None:
        raise UserError(f"{model.name} has no tokenizer, so its tokens cannot be decoded")
    row, reply, values = _values(found, index, reading)
    at = layer_of(layer, values.shape[0])
    many, whole = values.shape[-1], isinstance(direction, int | np.integer)
    if not whole or isinstance(direction, bool) or not 0 <= direction < many:
        raise UserError(f"direction is {direction!r}; it must be an integer from 0 to {many - 1}, "
                        f"an index of a direction of the reading")
    ids = np.concatenate([row.tokens, reply])[: values.shape[1]]
    shown = values[at, : len(ids), direction].astype(np.float64)
    pieces = [_piece(model.tokenizer.decode([token])) for token in ids.tolist()]
    known = shown[np.isfinite(shown)]
    if not known.size:
        raise UserError(f"reading {reading!r} selected no token of conversation {index}")
    middle = float(np.median(known)) if centre is None else float(centre)
    default = None if axis is None else _default(axis, at, values.shape[0])
    ends = [*np.percentile(known, [2, 98]), *(default or ())]
    reach = max(float(np.abs(np.array(ends) - middle).max()), 1e-12)
    messages = _messages(row, len(ids))
    lines = _wrapped(pieces, [messages[i] != messages[i - 1] for i in range(len(pieces))])
    with style():
        own = ax is None
        ax = axes_of(ax, 7.2, min(lines[-1][0] + 1, _LINES) * _LINE + 1.35)
        described(ax, "")
        _draw(ax, pieces, lines, shown, messages, middle, reach, own)
        read = f"layer {at}" if values.shape[0] == model.config.n_layers else f"entry {at}"
        _colour_bar(ax, middle, reach, f"projection onto {name}, {read}\nwhite: "
                    + ("the median" if centre is None else f"{middle:.3g}"), default)
        titled(ax, title)
        _fit_font(ax)
    return ax


def _values(found: Any, index: int, reading: str) -> tuple[Row, np.ndarray, np.ndarray]:
    """Return a conversation's prompt, the token ids of its reply, and the projections.

    The projections are an array [L, T, K] for L layers, T tokens and K directions.

    Raises:
      UserError: `found` has an unsupported type or no such reading, the index is out of range, or
        the reading is not a reading of projections.
    """
    if not isinstance(found, (Generated, Extracted, Reply)):
        raise UserError(f"found is {shown(found, 60)}; give the result of generate or extract, or "
                        "a Reply")
    if reading not in found.captured:
        raise UserError(f"reading is {reading!r}; the result has "
                        f"{', '.join(found.captured) or 'no reading'}; to compute "
                        "projections, pass capture=jp.capture.projections(vector)")
    count = 1 if isinstance(found, Reply) else len(found.rows)
    if not isinstance(index, (int, np.integer)) or not 0 <= index < count:
        raise UserError(f"index is {shown(index)}; the indices of conversations are 0…{count - 1}")
    if isinstance(found, Reply):
        row, reply, value = found.row, found.tokens, found.captured[reading]
    else:
        row, value = found.rows[index], found.captured[reading][index]
        reply = found.tokens[index] if isinstance(found, Generated) else np.zeros(0, np.int32)
    value = np.asarray(value)
    if value.ndim != 3:
        raise UserError(f"reading {reading!r} has shape {list(value.shape)} for a conversation; "
                        "give a reading of jp.capture.projections, which has shape [L, T, K]")
    return row, np.asarray(reply), value


def _piece(token: str) -> str:
    """Return a token's text on one line, with control characters escaped; "∅" if it is empty."""
    return printable(token.replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵")) or "∅"


def _cells(piece: str) -> int:
    """Return the width of a text in a monospaced font, in character cells."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF"
               else 1 for c in piece)


def _messages(row: Row, count: int) -> list[tuple[int, str]]:
    """Return (message index, role) for every token; tokens of the reply have role "assistant"."""
    roles = {}
    for bit, role in _ROLES:
        for turn in set(row.turn[(row.kind & bit) != 0].tolist()):
            roles.setdefault(turn, role)
    last = int(row.turn[-1])
    found = [(int(turn), roles.get(int(turn), "assistant" if turn == last else ""))
             for turn in row.turn[:count]]
    # without a generation prompt, the reply is a new message
    reply = last if roles.get(last, "assistant") == "assistant" else last + 1
    return found + [(reply, "assistant")] * (count - len(found))


def _wrapped(pieces: list[str], starts: list[bool]) -> list[tuple[int, int]]:
    """Return (line, column) of every token.

    A new line starts at each message, after a token that ends in ↵, and if a token does not fit the
    current line.
    """
    places, line, column = [], 0, 0
    for i, piece in enumerate(pieces):
        width = min(_cells(piece), _COLUMNS)
        fresh = starts[i] or (i > 0 and pieces[i - 1].endswith("↵"))
        if i and column and (fresh or column + width > _COLUMNS):
            line, column = line + 1, 0
        places.append((line, column))
        column += width
    return places


def _draw(ax: Axes, pieces: list[str], lines: list[tuple[int, int]], values: np.ndarray,
          messages: list[tuple[int, str]], middle: float, reach: float, own: bool) -> None:
    """Draw the tokens that fit, their backgrounds, and the role at the start of each message."""
    import matplotlib
    from matplotlib.patches import Rectangle

    fitting = _LINES
    if not own:
        height = ax.get_window_extent().height / figure_of(ax).dpi
        fitting = max(2, int(height / (_LEAST * 1.45 / 72)))
    count = lines[-1][0] + 1
    whole = count <= fitting
    kept = count if whole else fitting - 1
    colours = matplotlib.colormaps[DIVERGING]
    ticks: dict[int, str] = {}
    for i, (piece, (line, column), value) in enumerate(zip(pieces, lines, values, strict=True)):
        if line >= kept:
            break
        cells = min(_cells(piece), _COLUMNS - column)
        tone, ink = "white", GREY
        if np.isfinite(value):
            tone = colours(float(np.clip((value - middle) / (2 * reach) + 0.5, 0, 1)))
            ink = "white" if sum(w * c for w, c in zip((.3, .59, .11), tone, strict=False)) < .45 \
                else "black"
        ax.add_patch(Rectangle((column, line), cells, 0.92, facecolor=tone, edgecolor="white",
                               linewidth=0.4))
        ax.text(column, line + 0.46, text(piece[:cells]), family="DejaVu Sans Mono",
                fontsize=_MOST, color=ink, va="center", ha="left", clip_on=True, gid="token")
        if not i or messages[i] != messages[i - 1]:
            ticks.setdefault(line, messages[i][1])
    if not whole:
        left = sum(line >= kept for line, _ in lines)
        ax.text(0, kept + 0.46, f"… tokens omitted: {left}", fontsize=_MOST, color=GREY,
                va="center", family="DejaVu Sans Mono", gid="token")
    ax.set(xlim=(0, _COLUMNS), ylim=(kept + (not whole), 0))
    ax.set_xticks([])
    ax.set_yticks([line + 0.46 for line in ticks], list(ticks.values()))
    ax.tick_params(axis="y", length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def _default(axis: Any, layer: int, layers: int) -> tuple[float, float]:
    """Return the 25th and 75th percentiles of the default persona's projections at a layer.

    Raises:
      UserError: `axis` is not an axis, or has another number of layers than the reading.
    """
    if not isinstance(axis, Axis):
        raise UserError(f"axis is {shown(axis, 60)}; give an Axis, such as the result of "
                        "jp.load_axis")
    if axis.n_layers != layers:
        raise UserError(f"axis has {axis.n_layers} layers, but the reading has {layers}; capture "
                        "the projections at all layers, or omit axis=")
    low, high = (float(axis.thresholds(name, of="default")[layer]) for name in ("p25", "p75"))
    return low, high


def _colour_bar(ax: Axes, middle: float, reach: float, name: str,
                default: tuple[float, float] | None) -> None:
    """Below the text, draw a colour bar for the projections, with the default persona's range."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = ScalarMappable(Normalize(middle - reach, middle + reach), DIVERGING)
    bar = figure_of(ax).colorbar(scale, ax=ax, location="bottom", extend="both", shrink=0.6,
                                 aspect=40, pad=0.02)
    bar.set_label(text(name))
    if default is not None:
        place = bar.ax.get_xaxis_transform()
        bar.ax.plot(default, [1.4, 1.4], color=DEFAULT, linewidth=4, marker="", transform=place,
                    clip_on=False, solid_capstyle="butt")
        bar.ax.text(default[1], 1.9, "default persona, p25 to p75", transform=place, color=DEFAULT,
                    fontsize=SMALL, ha="right", va="bottom")


def _fit_font(ax: Axes) -> None:
    """Set the font size so that characters fit the columns and lines do not overlap."""
    renderer_of(ax)  # applies the layout
    box, dpi = ax.get_window_extent(), figure_of(ax).dpi
    lines = abs(ax.get_ylim()[0] - ax.get_ylim()[1])
    wide = box.width / _COLUMNS * 72 / dpi / _ADVANCE
    high = box.height / lines * 72 / dpi / 1.25
    for token in ax.texts:
        if token.get_gid() == "token":
            token.set_fontsize(min(_MOST, 0.99 * wide, high))
