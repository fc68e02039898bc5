"""Captures: readings of activations, reduced inside the compiled program.

A capture is a pytree that describes the readings. Prefill, every chunk and every decode step update
its state, so a mean over a generated text needs no second pass and no `[L, B, T, D]` array.
Captures are combined with `|` and share one forward pass.

Example:
  >>> import jaxpersona as jp
  >>> jp.capture.mean(jp.response, layers=[4]) | jp.capture.last()
  mean(response, layer 4) | last(everywhere)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import cut
from jaxpersona.calls import checked_call
from jaxpersona.captures.activations import Full, Last, Mean, Norms
from jaxpersona.captures.projections import Histogram, ProjectionMoments, Projections
from jaxpersona.captures.reading import F32, Reading, State
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Layers, normalised, numbers, resolve_layers
from jaxpersona.interventions.table import SITES, Site, one_origin
from jaxpersona.interventions.where import Where, encoded, everywhere, response
from jaxpersona.models.config import ModelConfig
from jaxpersona.runtime import is_traced, own_rules

__all__ = ["Capture", "chosen_layers", "full", "histogram", "last", "mean", "moments", "norms",
           "projections"]

_CALLS = {"full": "full()", "histogram": "histogram(directions, edges)", "last": "last()",
          "mean": "mean()", "moments": "moments(directions)", "norms": "norms()",
          "projections": "projections(directions)"}


class Capture(flax.struct.PyTreeNode):
    """Named readings that share one forward pass; `a | b` combines two captures."""

    readings: Mapping[str, Reading] = flax.struct.field(default_factory=dict)

    def __or__(self, other: Capture) -> Capture:
        if not isinstance(other, Capture):
            _reject(other)
        twice = sorted(set(self.readings) & set(other.readings))
        if twice:
            raise UserError(f"two captures have the name {twice}; rename one with `name=`")
        return Capture({**self.readings, **other.readings})

    def before_edits(self) -> Capture:
        """Return the capture with activations read before the interventions at their layer.

        At layer l such a reading contains the effect of interventions at lower layers, but not of
        those at layer l and the same site. For a cap at layer l it is the projection that the cap
        compares with its floor. Without interventions the values are the same.

        Example::

            capture = jp.capture.projections(axis, jp.response, layers=4).before_edits()
        """
        return Capture({name: reading.replace(edited=False)
                        for name, reading in self.readings.items()})

    def init(self, config: ModelConfig, rows: int, slots: int) -> dict[str, State]:
        """Return the initial state of every reading for `rows` rows of `slots` cache slots."""
        return {
            name: reading.init(len(chosen_layers(reading, config)), rows, slots, config.d_model)
            for name, reading in self.readings.items()
        }

    def __repr__(self) -> str:
        """Return the readings, such as `mean(response) | last(everywhere)`."""
        return cut(" | ".join(map(repr, self.readings.values())) or "Capture()")


def chosen_layers(reading: Reading, config: ModelConfig) -> tuple[int, ...]:
    """Return the layers that a reading reads; default: all.

    Raises:
      UserError: a layer does not exist in the model, or the directions have the wrong shape.
    """
    if reading.site not in SITES:
        raise UserError(f"site is {reading.site!r}; it must be one of {SITES}")
    layers = reading.layers if reading.layers is not None else tuple(range(config.n_layers))
    if layers[-1] >= config.n_layers:
        raise UserError(
            f"a capture reads layer {layers[-1]}; the model has layers 0…{config.n_layers - 1}"
        )
    reading.check(layers, config.d_model)
    return layers


def _directions(directions: Any, where: Where | str, layers: Layers | None,
                site: Site) -> dict[str, Any]:
    """Return the fields of `projections.OnDirections`."""
    several = list(directions) if isinstance(directions, (list, tuple)) else [directions]
    if several and all(hasattr(one, "at_layers") for one in several):
        chosen = resolve_layers(slice(None) if layers is None else layers, several[0].n_layers)
        for one in several:
            one.check_site(site)
            if one.n_layers != several[0].n_layers:
                raise UserError(f"the directions have {several[0].n_layers} and {one.n_layers} "
                                "layers; use directions of one model")
        value: Any = np.stack([one.at_layers(chosen) for one in several], 1)
        origin, picked = one_origin(*([one.origin] for one in several)), chosen
    else:
        value, picked, origin = numbers("directions", directions), _pick(layers), np.zeros(1)
        value = value[None] if value.ndim == 2 else value
    if value.ndim != 3 or not value.shape[1]:
        raise UserError(f"directions has shape {value.shape}; it must be [K, D] or [l, K, D]")
    if not is_traced(value) and not (np.isfinite(value).all() and value.any(-1).all()):
        raise UserError("directions contains a zero vector or a non-finite value")
    unit = jnp.asarray(normalised(value)[0], F32)
    return {"where": _test(where), "directions": unit, "layers": picked, "site": _site(site),
            "model_origin": jnp.asarray(origin, jnp.uint32)}


def joined(given: Any) -> Capture | None:
    """Return a caller's `capture` argument as one capture or None; a list is joined with `|`.

    Raises:
      UserError: it is another value, such as a function of this module that was not called, or two
        captures of a list have the same name.
    """
    if given is None or isinstance(given, Capture):
        return given
    if isinstance(given, (list, tuple)):
        whole = Capture()
        for one in given:
            whole = whole | one
        return whole
    _reject(given)


def _reject(given: Any) -> NoReturn:
    """Raise the error for a value that is not a capture."""
    name = given if isinstance(given, str) else getattr(given, "__name__", "")
    raise UserError(f"capture is {given!r:.60}; give a capture such as "
                    f"jp.capture.{_CALLS.get(name, 'last()')}")


def _test(where: Where | str) -> jax.Array:
    return jnp.asarray(encoded(where))


def _site(site: Site) -> Site:
    if site not in SITES:
        raise UserError(f"site is {site!r}; it must be one of {SITES}")
    return site


def _common(where: Where | str, layers: Layers | None, site: Site) -> dict[str, Any]:
    """Return the fields of `reading.Reading`."""
    return {"where": _test(where), "layers": _pick(layers), "site": _site(site)}


def _pick(layers: Layers | None) -> tuple[int, ...] | None:
    return None if layers is None else resolve_layers(layers, None)


@checked_call
@own_rules()
def mean(where: Where | str = response, *, layers: Layers | None = None, site: Site = "residual",
         turns: int | None = None, name: str = "mean") -> Capture:
    """Average activations over tokens; with `turns=M`, separately in each of the first M messages.

    Result: [B, L, D], or [B, L, M, D].
    """
    if turns is not None and (not isinstance(turns, int) or turns < 1):
        raise UserError(f"turns is {turns!r}; it must be a positive integer")
    return Capture({name: Mean(**_common(where, layers, site), turns=turns)})


@checked_call
@own_rules()
def last(where: Where | str = everywhere, *, layers: Layers | None = None, site: Site = "residual",
         name: str = "last") -> Capture:
    """Keep the activation of the last selected token. Result: [B, L, D]."""
    return Capture({name: Last(**_common(where, layers, site))})


@checked_call
@own_rules()
def projections(directions: Any, where: Where | str = everywhere, *, layers: Layers | None = None,
                site: Site = "residual", name: str = "projections") -> Capture:
    """Project every selected token on directions, which are normalized to unit length.

    Args:
      directions: [K, D], the same at every layer; [l, K, D], one set per chosen layer; or a named
        direction (`Axis`, `Vector`) or a list of them, read at the chosen layers.

    Returns:
      A capture with result [B, L, S, K]; NaN at tokens that are not selected.
    """
    return Capture({name: Projections(**_directions(directions, where, layers, site))})


@checked_call
@own_rules()
def moments(directions: Any, where: Where | str = response, *, layers: Layers | None = None,
            site: Site = "residual", name: str = "moments") -> Capture:
    """Compute count, mean and variance of the projections of a row's selected tokens.

    The state's size does not depend on the text's length (Welford 1962). The arguments are as for
    `projections`.

    Returns:
      A capture with result `projections.Moments`: count [B], mean and variance [B, L, K].
    """
    return Capture({name: ProjectionMoments(**_directions(directions, where, layers, site))})


@checked_call
@own_rules()
def histogram(directions: Any, edges: Any, where: Where | str = response, *,
              layers: Layers | None = None, site: Site = "residual",
              name: str = "histogram") -> Capture:
    """Compute a histogram of the projections of a row's selected tokens.

    Args:
      directions: as for `projections`.
      edges: E ascending bin edges: [E], or [l, K, E] per chosen layer and direction. Bin 0 is
        p < edges[0], bin i is edges[i − 1] ≤ p < edges[i], bin E is p ≥ edges[E − 1].

    Returns:
      A capture with result [B, L, K, E + 1] int32.

    Raises:
      UserError: the edges do not ascend, or edges or directions have an invalid shape.
    """
    fields = _directions(directions, where, layers, site)
    bounds = numbers("edges", edges)
    bounds = bounds[None, None] if bounds.ndim == 1 else bounds
    if bounds.ndim != 3 or not bounds.shape[-1]:
        raise UserError(f"edges has shape {bounds.shape}; it must be [E] or [l, K, E]")
    if not np.isfinite(bounds).all() or (np.diff(bounds.astype(np.float32), axis=-1) <= 0).any():
        raise UserError("edges must be finite and strictly ascending")
    picked, shape = fields["layers"], fields["directions"].shape
    count = None if picked is None else len(picked)  # None: checked by `chosen_layers`
    if bounds.shape[1] not in (1, shape[1]) or (
            count is not None and bounds.shape[0] not in (1, count)):
        raise UserError(f"edges has shape {bounds.shape}; it must fit the shape of directions, "
                        f"{shape}")
    return Capture({name: Histogram(**fields, edges=jnp.asarray(bounds, F32))})


@checked_call
@own_rules()
def norms(where: Where | str = everywhere, *, layers: Layers | None = None, site: Site = "residual",
          name: str = "norms") -> Capture:
    """Compute the norm ‖h‖ of every selected token. Result: [B, L, S]; NaN at other tokens.

    Lu et al. 2026 give steering strengths in units of the mean norm over all tokens but the first.
    """
    return Capture({name: Norms(**_common(where, layers, site))})


@checked_call
@own_rules()
def full(where: Where | str = everywhere, *, layers: Layers | None = None, site: Site = "residual",
         name: str = "full") -> Capture:
    """Keep the activation of every selected token. Result: [B, L, S, D] float32; 4·B·L·S·D bytes.

    The values of other tokens are NaN.
    """
    return Capture({name: Full(**_common(where, layers, site))})
