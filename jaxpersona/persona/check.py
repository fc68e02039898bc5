"""A self-test before a cap: do an axis's sign, layers and floors make sense on this model?

A cap on the wrong sign, a layer too early or with floors of another scale gives gibberish or does
nothing, and neither looks like a mistake. A few short replies, as the default persona and in far
roles, tell: the default must project higher, the difference of their means must lie along the axis
at the axis's own layers, and the floors must lie where replies do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.captures import capture
from jaxpersona.engine.generate import generate
from jaxpersona.interventions import resolve_layers
from jaxpersona.interventions.bank import normalised
from jaxpersona.interventions.where import response
from jaxpersona.vectors.vector import Axis, Caps, Found, Vector, fitted

if TYPE_CHECKING:
    from jaxpersona.models.model import Model

DEFAULTS = ("", "You are an AI assistant.")
ROLES = ("You are a ghost.", "You are a demon.", "Take the part of a pirate.", "You are an oracle.")
QUESTIONS = ("Tell me about the sea.", "What does friendship mean to you?",
             "How do you feel about time?")
_SHIFT_MARGIN = 0.005  # of mean cosine: less than this between two shifts tells nothing


@dataclasses.dataclass(frozen=True)
class Check:
    """What the self-test of an axis or of caps found on a model.

    Attributes:
      ok: whether nothing speaks against capping.
      faults: what does, each with its mend.
      sentences: one each on sign, layers and floors; a fault stands in its place.
      layers: the layers that were looked at, one for each cap.
      default, roles: [l] float32, mean projections of default and of role replies on each unit
        direction.
      shift: how many layers above its own an axis fits best; None where that cannot be told.
    """

    ok: bool
    faults: tuple[str, ...]
    sentences: tuple[str, ...]
    layers: tuple[int, ...]
    default: np.ndarray
    roles: np.ndarray
    shift: int | None


def fit(model: Model, found: Found) -> Found:
    """Return a direction, or caps, of the residual stream as one of a model.

    Raises:
      ValueError: another width, number of layers, site or fingerprint: made for another model.
    """
    if isinstance(found, Vector):
        found.check_site("residual")
    return fitted(found, model.config, model.name, model.fingerprint)


def check(
    model: Model,
    axis: Axis | Caps,
    *,
    layers: Any = None,
    floor: Any = None,
    max_new_tokens: int = 16,
    progress: Callable[[int, int, int], None] | None = None,
) -> Check:
    """Test an axis, or caps, on short replies of the model before it is capped.

    Args:
      model: the model that is to be capped.
      axis: an axis, or the caps of an experiment.
      layers: those that are to be capped; default: the upper half, or the caps' own.
      floor: τ a layer, in any form that `cap` takes; default: the 25th percentile of the default
        where the axis knows it, or the caps' own. Without one the floors are not judged.
      max_new_tokens: length of each of the 18 greedy replies.
      progress: as for `generate`.

    Raises:
      ValueError: neither an axis nor caps, or made for another model, or without a direction at a
        layer; a floor that is no number; or the model has no tokenizer or no chat template.
    """
    if not isinstance(axis, (Axis, Caps)):
        raise ValueError(f"axis is a {type(axis).__name__}; the check needs an Axis or Caps, which "
                         "point toward the Assistant: jp.Axis(values) makes one of [L, D]")
    axis = fit(model, axis)
    if model.tokenizer is None or not model.template:
        lacks = "tokenizer" if model.tokenizer is None else "chat template"
        raise ValueError(f"{model.name} has no {lacks}; the check needs one to ask the model")
    chosen, directions, floors = _entries(model, axis, layers, floor)
    default, roles = _replies(model, max_new_tokens, progress)
    unit, _ = normalised(directions)
    ours, theirs = (np.einsum("nld,ld->nl", x[:, list(chosen)], unit) for x in (default, roles))
    base, shift = _layer_base(axis, default.mean(0) - roles.mean(0))
    judged = [_sign(chosen, ours, theirs), base]
    if not judged[0][0]:  # with a wrong sign neither the layers nor the floors can be judged
        judged = judged[:1]
    elif floors is not None:
        judged.append(_scale(chosen, ours, theirs, floors))
    faults = tuple(text for fine, text in judged if not fine)
    return Check(not faults, faults, tuple(text for _, text in judged), chosen,
                 ours.mean(0).astype(np.float32), theirs.mean(0).astype(np.float32), shift)


def _entries(model: Model, axis: Axis | Caps, layers: Any,
             floor: Any) -> tuple[tuple[int, ...], np.ndarray, np.ndarray | None]:
    """Return each cap's layer, direction [D] and floor (None where there is none)."""
    total = model.config.n_layers
    if isinstance(axis, Caps):
        if layers is not None or floor is not None:
            raise ValueError("caps have layers and floors of their own; give neither")
        return axis.layers, axis.values.astype(np.float64), axis.floors.astype(np.float64)
    chosen = resolve_layers(slice(total // 2, total) if layers is None else layers, total)
    if floor is None and "p25" in axis.percentiles.get("default", {}):
        floor = axis.thresholds("p25", of="default")
    directions = axis.at_layers(chosen).astype(np.float64)
    empty = [i for i, row in zip(chosen, directions, strict=True) if not row.any()]
    if empty:
        raise ValueError(f"the axis is zero at layer {empty[0]}; it has no direction there")
    if floor is None:
        return chosen, directions, None
    try:
        given = np.asarray(floor, np.float64)
    except (TypeError, ValueError, OverflowError):
        given = np.array(np.nan)
    if np.isnan(given).any():
        raise ValueError(f"floor is {floor!r}; it must be numbers, none of them NaN")
    if given.shape == (total,):
        given = given[list(chosen)]
    if given.shape not in ((), (len(chosen),)):
        raise ValueError(f"floor has shape {given.shape}; it must be a number, [{len(chosen)}] or "
                         f"[{total}]")
    return chosen, directions, np.broadcast_to(given, (len(chosen),))


def _replies(model: Model, length: int, progress: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the response means [n, L, D] of default and of role replies, empty ones left out."""
    def talk(prompt: str, question: str) -> list[dict[str, str]]:
        head = [{"role": "system", "content": prompt}] if prompt else []
        return [*head, {"role": "user", "content": question}]

    groups = [[talk(prompt, question) for prompt in prompts for question in QUESTIONS]
              for prompts in (DEFAULTS, ROLES)]
    talks = groups[0] + groups[1]
    out = generate(model, talks, capture=capture.mean(response), max_new_tokens=length,
                   batch_size=len(talks), on_nonfinite="raise", progress=progress)
    means = np.asarray(out.captured["mean"], np.float64)
    split = len(groups[0])
    kept = [part[np.isfinite(part).all((1, 2))] for part in (means[:split], means[split:])]
    if not all(len(part) for part in kept):
        raise ValueError(f"{model.name} answered every question of the check with nothing; it "
                         "cannot be told from its replies")
    return kept[0], kept[1]


def _sign(layers: tuple[int, ...], ours: np.ndarray, theirs: np.ndarray) -> tuple[bool, str]:
    gap = ours.mean(0) - theirs.mean(0)
    wrong = sorted({layer for layer, value in zip(layers, gap, strict=True) if value <= 0})
    where = _spoken(layers)
    if not wrong:
        return True, (f"sign: the default projects {_numbers(ours.mean(0))} at layers {where}, "
                      f"roles {_numbers(theirs.mean(0))}")
    if len(wrong) == len(set(layers)):
        return False, ("sign: roles project higher than the default at every layer to be capped; "
                       "the axis points away from the Assistant: negate its values")
    return False, (f"sign: roles project higher than the default at layers {_spoken(wrong)}; cap "
                   "other layers, or use an axis of this model")


def _layer_base(axis: Axis | Caps, difference: np.ndarray) -> tuple[tuple[bool, str], int | None]:
    """Compare the directions with the replies' own difference [L, D] one or two layers away."""
    pairs = zip(axis.layers if isinstance(axis, Caps) else range(axis.n_layers),
                axis.values.astype(np.float64), strict=True)
    rows = {layer: normalised(row)[0] for layer, row in pairs if row.any()}
    unit, _ = normalised(difference)
    shifts = (-2, -1, 0, 1, 2)
    # the same replies against several rows: were it one row against several layers' replies, the
    # layer where roles show most clearly would win, whatever the row
    seen = [i for i in range(len(unit)) if all(i - s in rows for s in shifts)]
    if len(seen) < 3:
        return (True, "layers: too few to tell whether the axis is shifted by a layer"), None
    fits = {s: float(np.mean([rows[i - s] @ unit[i] for i in seen])) for s in shifts}
    best = max(shifts, key=lambda s: fits[s])
    rest = max(value for s, value in fits.items() if s != best)
    if fits[best] - rest < _SHIFT_MARGIN:
        return (True, "layers: neighbours are too alike here to tell whether the axis is shifted "
                      f"(cosine {fits[0]:.3f}, one layer away {max(fits[-1], fits[1]):.3f})"), None
    if best == 0:
        return (True, f"layers: the axis fits its own layers best (cosine {fits[0]:.3f}, one layer "
                      f"away {max(fits[-1], fits[1]):.3f})"), 0
    return (False, f"layers: row l of the axis fits layer l{best:+d} best (cosine {fits[best]:.3f} "
                   f"against {fits[0]:.3f}); it counts layers differently: shift its rows"), best


def _scale(layers: tuple[int, ...], ours: np.ndarray, theirs: np.ndarray,
           floors: np.ndarray) -> tuple[bool, str]:
    """Ask that floors lie between far below the roles and a little above the default."""
    high, low = ours.mean(0), theirs.mean(0)
    gap = high - low
    above = floors > high + np.maximum(gap, 4 * ours.std(0))
    below = floors < low - np.maximum(gap, 4 * theirs.std(0))
    for wrong, words in ((above, "far above every default reply: it would move every token"),
                         (below, "far below every role's reply: it would never act")):
        if wrong.any():
            i = int(np.argmax(wrong))
            return False, (f"floors: {floors[i]:.4g} at layer {layers[i]} is {words} (default "
                           f"{high[i]:.4g}, roles {low[i]:.4g}); take thresholds of this model")
    share = (floors - low) / gap
    return True, (f"floors: {share.min():.0%} to {share.max():.0%} of the way from roles to the "
                  "default")


def _numbers(values: np.ndarray) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _spoken(layers: Any) -> str:
    chosen = sorted(set(layers))
    whole = len(chosen) > 1 and chosen == list(range(chosen[0], chosen[-1] + 1))
    return f"{chosen[0]}…{chosen[-1]}" if whole else ", ".join(map(str, chosen))
