"""A self-test of an axis or of caps: sign, layer numbering and floors.

A cap with the wrong sign, shifted layers or wrong floors raises no error, but produces gibberish or
has no effect. The check generates short replies as the default persona and in roles far from the
Assistant, and runs three tests:

    sign     the mean projection of the default persona's replies onto the axis is higher than
             the mean projection of the role replies, at every tested layer
    layers   the cosine between the axis and the difference of the mean activations (default persona
             minus roles) is highest if the layers of the axis are not shifted
    floors   the floors are neither far above the default persona's projections nor far below the
             projections of the role replies

If the sign is wrong, the sentences of the other tests are omitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpersona.brief import line, shown
from jaxpersona.calls import checked_call
from jaxpersona.captures import capture
from jaxpersona.engine.generate import generate
from jaxpersona.errors import UserError
from jaxpersona.export import Table
from jaxpersona.interventions import resolve_layers
from jaxpersona.interventions.bank import Layers, normalised
from jaxpersona.interventions.where import response
from jaxpersona.models.model import check_model
from jaxpersona.progress import shows, tokens
from jaxpersona.vectors.caps import Caps, Found, fitted
from jaxpersona.vectors.vector import Axis, Vector

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from jaxpersona.models.model import Model

DEFAULTS = ("", "You are an AI assistant.")
ROLES = ("You are a ghost.", "You are a demon.", "Take the part of a pirate.", "You are an oracle.")
QUESTIONS = ("Tell me about the sea.", "What does friendship mean to you?",
             "How do you feel about time?")
# If the two highest mean cosines differ by less than this, the layers test is inconclusive.
_SHIFT_MARGIN = 0.005


@dataclasses.dataclass(frozen=True)
class Check(Table):
    """The result of the self-test of an axis or of caps on a model.

    Attributes:
      ok: whether all tests passed. An inconclusive layers test counts as passed.
      faults: one sentence per failed test, with the fix.
      sentences: one sentence per test (sign, layers, floors), regardless of its outcome. If the
        sign test failed, the other tests are omitted. Without floors, the floors test is omitted.
        The sentence of a passed floors test may contain a warning.
      layers: the l tested layers. For caps, there is one entry per cap.
      default, roles: [l] float32, the mean projections of the default persona's replies and of the
        role replies onto the unit direction of each tested layer.
      shift: the shift s that maximizes the mean over layers i of cos(axis[i - s], difference[i]),
        where the difference is the default persona's mean activation minus the roles' mean
        activation. 0 if the layer numbering is correct, None if the test is inconclusive;
        meaningless if the sign test failed.
      spread: [l] float32, the standard deviation over replies of the default persona's mean
        projections, estimated from the quartiles of these projections in `Axis.percentiles` or,
        without quartiles, from the default persona's replies in the check.
      floors: [l] float32, the floors; None if `floor` was omitted and the axis has no percentiles.

    Examples:
      >>> import jaxpersona as jp
      >>> found = jp.check(jp.load("mini"), jp.load_axis("mini"))
      >>> found.ok, found.shift
      (True, 0)
    """

    ok: bool
    faults: tuple[str, ...]
    sentences: tuple[str, ...]
    layers: tuple[int, ...]
    default: np.ndarray
    roles: np.ndarray
    shift: int | None
    spread: np.ndarray
    floors: np.ndarray | None

    @property
    def z_roles(self) -> np.ndarray:
        """The z-scores of the role replies, (roles − default) / spread, [l]; usually negative."""
        return (self.roles - self.default) / self.spread

    @property
    def z_floors(self) -> np.ndarray | None:
        """The z-scores of the floors, (floors − default) / spread, [l]; None without floors."""
        return None if self.floors is None else (self.floors - self.default) / self.spread

    def __repr__(self) -> str:
        return line("Check", "ok" if self.ok else "; ".join(map(str, self.faults)))

    def records(self) -> list[dict[str, Any]]:
        """Return one record per tested layer: layer, default, roles, difference default − roles."""
        return [{"layer": int(layer), "default": float(ours), "roles": float(theirs),
                 "difference": float(ours - theirs)}
                for layer, ours, theirs in zip(self.layers, self.default, self.roles, strict=True)]

    def facts(self) -> dict[str, Any]:
        """Return a dictionary with `ok`, the outcome of each test as text, and `shift`."""
        outcomes = [sentence.partition(": ") for sentence in self.sentences]
        return {"ok": self.ok, **{test: outcome for test, _, outcome in outcomes},
                "shift": self.shift}


def fit(model: Model, found: Found) -> Found:
    """Check that a direction or caps were made for a model, and return them.

    If an imported control vector has fewer layers than the model, the missing last layers are
    filled with zeros.

    Raises:
      UserError: the width, the number of layers or the fingerprint differs from the model's, a
        direction belongs to a site other than the residual stream, or `found` is neither a `Vector`
        nor `Caps`.
    """
    if not isinstance(found, (Vector, Caps)):
        raise UserError(f"the direction is {shown(found, 60)}; give a Vector, an Axis or Caps")
    if isinstance(found, Vector):
        found.check_site("residual")
    return fitted(found, model.config, model.name, model.fingerprint)


@checked_call
@shows(tokens("check"))
def check(
    model: Model,
    axis: Axis | Caps,
    *,
    layers: Layers | None = None,
    floor: ArrayLike | None = None,
    max_new_tokens: int = 16,
    progress: Callable[[int, int, int], None] | bool | None = None,
) -> Check:
    """Test whether an axis or caps fit a model, using 18 short greedy replies of the model.

    Args:
      model: the model to cap.
      axis: the axis or the caps to test.
      layers: the layers to cap; default: the upper half of the layers. With Caps, `layers` and
        `floor` must be omitted, because the caps contain both.
      floor: the floors τ: a scalar, one value per capped layer, or one value per layer of the
        model. Default: the 25th percentile of the default persona's projections
        (`axis.percentiles`); if the axis has no percentiles, the floors test is skipped.
      max_new_tokens: the maximum length of each reply in tokens.
      progress: as for `generate`.

    Returns:
      The outcome of the tests. A failed test does not raise an error.

    Raises:
      UserError: `axis` is neither an Axis nor Caps, belongs to another model, or is zero at a layer
        to be tested; an argument is invalid; `layers` or `floor` is given for Caps; the model has
        no tokenizer or no chat template; all default-persona replies or all role replies are empty;
        or activations are not finite.

    Examples:
      >>> import jaxpersona as jp
      >>> found = jp.check(jp.load("mini"), jp.load_axis("mini"))
      >>> found
      Check(ok)
    """
    check_model(model)
    if not isinstance(axis, (Axis, Caps)):
        raise UserError(f"axis is of type {type(axis).__name__}; the check needs an Axis or Caps, "
                        "which point to the Assistant: wrap an array [L, D] with jp.Axis(values)")
    axis = fit(model, axis)
    if model.tokenizer is None or not model.template:
        raise UserError(
            f"{model.name} has no tokenizer; the check needs one to encode prompts"
            if model.tokenizer is None else
            f"{model.name} has no chat template (a base model), so it cannot be prompted as "
            "the default persona or in a role; use the instruction-tuned model that the axis "
            "belongs to")
    chosen, directions, floors = _entries(model, axis, layers, floor)
    default, roles = _replies(model, max_new_tokens, progress if callable(progress) else False)
    unit, _ = normalised(directions)
    ours, theirs = (np.einsum("nld,ld->nl", x[:, list(chosen)], unit) for x in (default, roles))
    base, shift = _layer_base(axis, default.mean(0) - roles.mean(0))
    spread = _spread(axis, chosen, ours)
    judged = [_sign(chosen, ours, theirs, spread), base]
    if not judged[0][0]:  # if the sign is wrong, the other tests are meaningless
        judged = judged[:1]
    elif floors is not None:
        own = isinstance(axis, Axis) and axis.origin and axis.fingerprint == model.fingerprint
        judged.append(_scale(chosen, ours, theirs, floors, spread, _centre(axis, chosen, ours),
                             known=bool(own)))
    faults = tuple(text for fine, text in judged if not fine)
    return Check(not faults, faults, tuple(text for _, text in judged), chosen,
                 ours.mean(0).astype(np.float32), theirs.mean(0).astype(np.float32), shift,
                 spread.astype(np.float32),
                 None if floors is None else floors.astype(np.float32))


def _spread(axis: Axis | Caps, layers: tuple[int, ...], ours: np.ndarray) -> np.ndarray:
    """Return the standard deviation [l] of the default persona's projections across its replies.

    It is estimated from the quartiles in `axis.percentiles`, assuming a normal distribution,
    because the check generates only six replies as the default persona. Without quartiles, and at
    layers where they are equal, it is estimated from these replies. It is at least 1e-6.
    """
    table = axis.percentiles.get("default", {}) if isinstance(axis, Axis) else {}
    spread = ours.std(0, ddof=1) if len(ours) > 1 else np.zeros(len(layers))
    if "p25" in table and "p75" in table:
        known = normal_spread(table["p25"], table["p75"])[list(layers)]
        spread = np.where(known > 0, known, spread)
    return np.maximum(spread, 1e-6)


def _centre(axis: Axis | Caps, layers: tuple[int, ...], ours: np.ndarray) -> np.ndarray:
    """Return the median [l] of the default persona's projections.

    If the axis contains no median, return the mean projection of the default persona's replies in
    the check. The mean is less accurate, because these short replies may have lower projections
    than the full-length replies from which floors are computed.
    """
    table = axis.percentiles.get("default", {}) if isinstance(axis, Axis) else {}
    return table["p50"][list(layers)] if "p50" in table else ours.mean(0)


def normal_spread(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the standard deviation of a normal distribution with quartiles `low` and `high`."""
    return (np.asarray(high, np.float64) - low) / 1.3489795


def _entries(model: Model, axis: Axis | Caps, layers: Layers | None,
             floor: ArrayLike | None) -> tuple[tuple[int, ...], np.ndarray, np.ndarray | None]:
    """Return the l layers to test, the directions [l, D], and the floors [l] or None."""
    total = model.config.n_layers
    if isinstance(axis, Caps):
        if layers is not None or floor is not None:
            raise UserError("Caps already contain layers and floors; omit `layers` and `floor`")
        return axis.layers, axis.values.astype(np.float64), axis.floors.astype(np.float64)
    chosen = resolve_layers(slice(total // 2, total) if layers is None else layers, total)
    if floor is None and "p25" in axis.percentiles.get("default", {}):
        floor = axis.thresholds("p25", of="default")
    directions = axis.at_layers(chosen).astype(np.float64)
    empty = [i for i, row in zip(chosen, directions, strict=True) if not row.any()]
    if empty:
        raise UserError(f"the axis is zero at layer {empty[0]}; choose layers where it is nonzero")
    if floor is None:
        return chosen, directions, None
    try:
        given = np.asarray(floor, np.float64)
    except (TypeError, ValueError, OverflowError):
        given = np.array(np.nan)
    if np.isnan(given).any():
        raise UserError(f"floor is {shown(floor)}; give numbers other than NaN")
    if given.shape == (total,):
        given = given[list(chosen)]
    if given.shape not in ((), (len(chosen),)):
        raise UserError(f"floor has shape {given.shape}; give a scalar, {len(chosen)} values (one "
                        f"per capped layer), or {total} values (one per layer of the model)")
    return chosen, directions, np.broadcast_to(given, (len(chosen),))


def _replies(model: Model, length: int, progress: Callable[[int, int, int], None] | bool,
             ) -> tuple[np.ndarray, np.ndarray]:
    """Generate replies as the default persona and in roles.

    Returns:
      (default, roles): the response means [n, L, D] of the non-empty default-persona replies, and
      the response means of the non-empty role replies.

    Raises:
      UserError: all replies in one of the two groups are empty, or activations are not finite.
    """
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
        raise UserError(f"{model.name} gave only empty replies as the default persona or in the "
                        "roles; the check needs at least one non-empty reply of each kind")
    return kept[0], kept[1]


def _sign(layers: tuple[int, ...], ours: np.ndarray, theirs: np.ndarray, spread: np.ndarray,
          ) -> tuple[bool, str]:
    gap = ours.mean(0) - theirs.mean(0)
    wrong = sorted({layer for layer, value in zip(layers, gap, strict=True) if value <= 0})
    where = _spoken(layers)
    if not wrong:
        return True, ("sign: the default persona has higher projections than the roles, by "
                      f"{_numbers(gap / spread)} standard deviations of the default persona's "
                      f"projections (layers: {where})")
    if len(wrong) == len(set(layers)):
        return False, ("sign: the roles have higher projections than the default persona at every "
                       "tested layer; the axis points away from the Assistant: negate its values")
    return False, ("sign: the roles have higher projections than the default persona at some of "
                   f"the tested layers ({_spoken(wrong)}); cap other layers, or use an axis of "
                   "this model")


def _layer_base(axis: Axis | Caps, difference: np.ndarray) -> tuple[tuple[bool, str], int | None]:
    """Test the layer numbering by finding the shift of the axis with the highest mean cosine.

    Args:
      axis: the axis or caps.
      difference: [L, D], the default persona's mean activation minus the roles' mean activation.

    Returns:
      ((whether the test passed, sentence), shift or None).
    """
    pairs = zip(axis.layers if isinstance(axis, Caps) else range(axis.n_layers),
                axis.values.astype(np.float64), strict=True)
    rows = {layer: normalised(row)[0] for layer, row in pairs if row.any()}
    unit, _ = normalised(difference)
    shifts = (-2, -1, 0, 1, 2)
    # All shifts are compared on the same layers i of the difference. With different layers for each
    # shift, the result would depend on which layers have high cosines, not only on the shift.
    seen = [i for i in range(len(unit)) if all(i - s in rows for s in shifts)]
    if len(seen) < 3:
        return (True, "layers: too few layers to detect a shift of the axis"), None
    fits = {s: float(np.mean([rows[i - s] @ unit[i] for i in seen])) for s in shifts}
    best = max(shifts, key=lambda s: fits[s])
    rest = max(value for s, value in fits.items() if s != best)
    if fits[best] - rest < _SHIFT_MARGIN:
        return (True, "layers: adjacent layers are too similar to detect a shift of the axis "
                      f"(mean cosine {fits[0]:.3f}, shifted by one layer "
                      f"{max(fits[-1], fits[1]):.3f})"), None
    if best == 0:
        return (True, f"layers: the axis fits best without a shift (mean cosine {fits[0]:.3f}, "
                      f"shifted by one layer {max(fits[-1], fits[1]):.3f})"), 0
    return (False, f"layers: the axis's vector for layer l fits layer l{best:+d} best (mean "
                   f"cosine {fits[best]:.3f}, unshifted {fits[0]:.3f}); the layer "
                   "numbering of the axis differs from the model's: shift its vectors"), best


def _scale(layers: tuple[int, ...], ours: np.ndarray, theirs: np.ndarray,
           floors: np.ndarray, spread: np.ndarray, centre: np.ndarray, *,
           known: bool = False) -> tuple[bool, str]:
    """Test that no floor is far above the default persona's or far below the roles' projections.

    A floor above the default persona's median (`centre`) passes with a warning.

    Args:
      layers: the l layers.
      ours, theirs: the projections of the default persona's and the roles' replies, [n, l].
      floors, spread, centre: the floors, and the standard deviation and median of the default
        persona's projections, each [l].
      known: whether `centre` was measured on this model. If so, a floor is too high only if it is
        far above both `centre` and the mean of `ours`, which may be lower in these short replies.

    Returns:
      (whether the test passed, sentence).
    """
    high, low = ours.mean(0), theirs.mean(0)
    gap = high - low
    most = np.maximum(high, centre) if known else high
    above = floors > most + np.maximum(gap, 4 * ours.std(0))
    below = floors < low - np.maximum(gap, 4 * theirs.std(0))
    for wrong, words in ((above, "far above the default persona's projections, so the cap would "
                                 "change every token"),
                         (below, "far below the roles' projections, so the cap would never bind")):
        if wrong.any():
            i = int(np.argmax(wrong))
            return False, (f"floors: {floors[i]:.4g} at layer {layers[i]} is {words} (means: "
                           f"default persona {high[i]:.4g}, roles {low[i]:.4g}); use thresholds "
                           "measured on this model")
    z = (floors - high) / spread
    text = (f"floors: {_numbers(z)} standard deviations from the default persona's mean "
            f"projection, {_numbers(100 * (floors - low) / gap)} % of the way from the roles' mean "
            "to the default persona's")
    if (over := floors > centre).any():
        at = [layer for layer, wrong in zip(layers, over, strict=True) if wrong]
        text += (". Warning: the floor is above the median of the default persona's projections "
                 f"(layers: {_spoken(at)}), so the cap changes more than half of the default "
                 "persona's replies: choose a lower percentile")
    return True, text


def _numbers(values: np.ndarray) -> str:
    low, high = f"{values.min():.3g}", f"{values.max():.3g}"
    return low if low == high else f"{low} to {high}"


def _spoken(layers: Iterable[int]) -> str:
    chosen = sorted(set(layers))
    whole = len(chosen) > 1 and chosen == list(range(chosen[0], chosen[-1] + 1))
    return f"{chosen[0]}…{chosen[-1]}" if whole else ", ".join(map(str, chosen))
