"""Captures, which read and reduce activations inside the compiled program.

A capture is a pytree of readings (`reading.Reading`). Every call of `forward` (a prefill, a chunk
of a prompt or a decode step) updates the state of each reading. A mean over a generated text
therefore needs no second pass and no array of all activations; `|` combines captures in one pass.

The docstrings below give the shapes of the results of `forward` for B rows, where S is the number
of cache slots, or of tokens per row without a cache. If a result has the axis S, `generate` and
`extract` return a list of arrays [L, T, …] instead, one per conversation of T tokens.

Examples:
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

from jaxpersona.brief import cut, shown
from jaxpersona.calls import checked_call
from jaxpersona.captures.activations import Full, Last, Mean, Norms
from jaxpersona.captures.projections import Histogram, ProjectionMoments, Projections
from jaxpersona.captures.reading import F32, Reading, State
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import (
    Layers,
    check_unmixed,
    normalised,
    numbers,
    resolve_layers,
)
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
    """Named readings that share one forward pass; `a | b` combines two captures.

    Attributes:
      readings: the readings by name.

    Examples:
      >>> import jaxpersona as jp
      >>> list((jp.capture.mean() | jp.capture.last()).readings)
      ['mean', 'last']
    """

    readings: Mapping[str, Reading] = flax.struct.field(default_factory=dict)

    def __or__(self, other: Capture) -> Capture:
        if not isinstance(other, Capture):
            _reject(other)
        twice = sorted(set(self.readings) & set(other.readings))
        if twice:
            raise UserError(f"two captures have names in common: {twice}; give one of them another "
                            "name with `name=`")
        return Capture({**self.readings, **other.readings})

    def before_edits(self) -> Capture:
        """Return a capture that reads activations before the interventions at their site and layer.

        Its values at layer l include the effect of interventions at lower layers and at earlier
        sites of layer l, but not of interventions at the same site of layer l. For example, if
        a cap is the first intervention at its site and layer, this capture can read the
        projections that the cap compares with its floor.

        Examples:
          >>> import jaxpersona as jp
          >>> jp.capture.last(layers=4).before_edits()
          last(everywhere, layer 4).before_edits()
        """
        return Capture({name: reading.replace(edited=False)
                        for name, reading in self.readings.items()})

    def init(self, config: ModelConfig, rows: int, slots: int) -> dict[str, State]:
        """Return the initial state of each reading, by name.

        Args:
          config: the model's configuration.
          rows: the number of rows B.
          slots: the number of cache slots S, or of tokens per row without a cache.

        Raises:
          UserError: a reading does not fit the model.
        """
        return {
            name: reading.init(len(chosen_layers(reading, config)), rows, slots, config.d_model)
            for name, reading in self.readings.items()
        }

    def __repr__(self) -> str:
        """Return the readings in the form of calls, such as `mean(response) | last(everywhere)`."""
        return cut(" | ".join(map(repr, self.readings.values())) or "Capture()")


def chosen_layers(reading: Reading, config: ModelConfig) -> tuple[int, ...]:
    """Check a reading against the model, and return the layers that it reads.

    If the reading does not specify layers, all layers of the model are returned.

    Raises:
      UserError: the site is invalid, a layer does not exist in the model, or an array of the
        reading has the wrong shape.
    """
    if reading.site not in SITES:
        raise UserError(f"site is {reading.site!r}; it must be one of {SITES}")
    layers = reading.layers if reading.layers is not None else tuple(range(config.n_layers))
    if layers[-1] >= config.n_layers:
        raise UserError(
            f"a capture reads layer {layers[-1]}, but the model has layers 0…{config.n_layers - 1}"
        )
    reading.check(layers, config.d_model)
    return layers


def _directions(directions: Any, where: Where | str, layers: Layers | None,
                site: Site) -> dict[str, Any]:
    """Validate and normalize directions, and return keyword arguments for `OnDirections`."""
    several = list(directions) if isinstance(directions, (list, tuple)) else [directions]
    if several and all(hasattr(one, "at_layers") for one in several):
        chosen = resolve_layers(slice(None) if layers is None else layers, several[0].n_layers)
        for one in several:
            one.check_site(site)
            if one.n_layers != several[0].n_layers:
                raise UserError(f"the directions have {several[0].n_layers} and {one.n_layers} "
                                "layers; use directions of the same model")
        value: Any = np.stack([one.at_layers(chosen) for one in several], 1)
        origin, picked = one_origin(*([one.origin] for one in several)), chosen
    else:
        check_unmixed("directions", several)
        value, picked, origin = numbers("directions", directions), _pick(layers), np.zeros(1)
        value = value[None] if value.ndim == 2 else value
    if value.ndim != 3 or not value.shape[1]:
        raise UserError(f"directions has shape {value.shape}; it must be [K, D] or [L, K, D]")
    if not is_traced(value) and not (np.isfinite(value).all() and value.any(-1).all()):
        raise UserError("directions contains a zero vector or a non-finite value; give "
                        "nonzero, finite directions")
    unit = jnp.asarray(normalised(value)[0], F32)
    return {"where": _test(where), "directions": unit, "layers": picked, "site": _site(site),
            "model_origin": jnp.asarray(origin, jnp.uint32)}


def joined(given: Any) -> Capture | None:
    """Convert a `capture` argument (a capture, a list of captures, or None) to a capture or None.

    A list of captures is combined with `|`.

    Raises:
      UserError: the argument is not a capture, such as `mean` instead of `mean()`, or two captures
        in a list have readings of the same name.
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
    """Raise a UserError for a value that is not a capture."""
    name = given if isinstance(given, str) else getattr(given, "__name__", "")
    raise UserError(f"capture is {shown(given, 60)}; give a capture such as "
                    f"jp.capture.{_CALLS.get(name, 'last()')}")


def _test(where: Where | str) -> jax.Array:
    return jnp.asarray(encoded(where))


def _site(site: Site) -> Site:
    if site not in SITES:
        raise UserError(f"site is {site!r}; it must be one of {SITES}")
    return site


def _common(where: Where | str, layers: Layers | None, site: Site) -> dict[str, Any]:
    """Return keyword arguments for `reading.Reading`."""
    return {"where": _test(where), "layers": _pick(layers), "site": _site(site)}


def _pick(layers: Layers | None) -> tuple[int, ...] | None:
    return None if layers is None else resolve_layers(layers, None)


@checked_call
@own_rules()
def mean(where: Where | str = response, *, layers: Layers | None = None, site: Site = "residual",
         turns: int | None = None, name: str = "mean") -> Capture:
    """Capture the mean activation of each row's selected tokens.

    Args:
      where: the tokens to read, as a token test or its name; by default, the content of assistant
        messages without thinking blocks.
      layers: the L layers to read, in a form that `steer` accepts; by default, all layers.
      site: the site to read (see `steer`).
      turns: the number M of leading messages, each of which is averaged separately; by default, all
        selected tokens of a row are averaged together.
      name: the name of the result.

    Returns:
      A capture whose result is [B, L, D] float32, or [B, L, M, D] with `turns`. A mean over no
      tokens is NaN.

    Raises:
      UserError: an argument is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> jp.extract(jp.load("mini"), [talk], capture=jp.capture.mean()).captured["mean"].shape
      (1, 8, 128)
    """
    if turns is not None and (type(turns) is not int or turns < 1):
        raise UserError(f"turns is {shown(turns)}; it must be a positive integer")
    return Capture({name: Mean(**_common(where, layers, site), turns=turns)})


@checked_call
@own_rules()
def last(where: Where | str = everywhere, *, layers: Layers | None = None, site: Site = "residual",
         name: str = "last") -> Capture:
    """Capture the activation of each row's last selected token.

    The arguments and errors are as for `mean`, but without `turns`. By default, all tokens are
    selected.

    Returns:
      A capture whose result is [B, L, D] float32, with NaN for rows without a selected token.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.capture.mean() | jp.capture.last(jp.prompt, layers=4)  # both in one pass
      mean(response) | last(prompt, layer 4)
    """
    return Capture({name: Last(**_common(where, layers, site))})


@checked_call
@own_rules()
def projections(directions: Any, where: Where | str = everywhere, *, layers: Layers | None = None,
                site: Site = "residual", name: str = "projections") -> Capture:
    """Capture the projections of every selected token's activation onto K unit directions.

    Args:
      directions: a named direction (`Axis` or `Vector`) or a list of named directions, whose values
        at the chosen layers are used, or an array: [K, D], with the same K directions at every
        layer, or [L, K, D], with K directions per chosen layer. All directions are normalized.
      where, layers, site, name: as for `mean`; by default, all tokens are selected.

    Returns:
      A capture whose result is [B, L, S, K] float32 (see the module docstring for S), with NaN at
      slots without a selected token.

    Raises:
      UserError: a direction is zero, not finite, of the wrong shape or measured at another site,
        the directions belong to different models, or another argument is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> read = jp.capture.projections(jp.load_axis("mini"), layers=[4, 5])
      >>> out = jp.extract(jp.load("mini"), [talk], capture=read)
      >>> out.captured["projections"][0].shape, out.tokens
      ((2, 15, 1), 15)
    """
    return Capture({name: Projections(**_directions(directions, where, layers, site))})


@checked_call
@own_rules()
def moments(directions: Any, where: Where | str = response, *, layers: Layers | None = None,
            site: Site = "residual", name: str = "moments") -> Capture:
    """Capture the count, mean and variance of the projections of each row's selected tokens.

    These moments are updated online (Welford 1962), so the size of the state does not depend on the
    length of the text. The arguments and errors are as for `projections`, but `where` defaults to
    `response`.

    Returns:
      A capture whose result is a `projections.Moments`: count [B], mean and variance [B, L, K].

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> read = jp.capture.moments(jp.load_axis("mini"), jp.everywhere)
      >>> out = jp.extract(jp.load("mini"), [talk], capture=read).captured["moments"]
      >>> int(out.count[0]), out.variance.shape
      (15, (1, 8, 1))
    """
    return Capture({name: ProjectionMoments(**_directions(directions, where, layers, site))})


@checked_call
@own_rules()
def histogram(directions: Any, edges: Any, where: Where | str = response, *,
              layers: Layers | None = None, site: Site = "residual",
              name: str = "histogram") -> Capture:
    """Capture a histogram of the projections of each row's selected tokens.

    Args:
      directions, layers, site, name: as for `projections`.
      where: as for `mean`.
      edges: E ascending bin edges, as an array [E], or [L, K, E] with separate edges for each
        chosen layer and direction. Bin 0 counts p < edges[0], bin E counts p ≥ edges[E − 1], and
        each bin i between them counts edges[i − 1] ≤ p < edges[i].

    Returns:
      A capture whose result is [B, L, K, E + 1] int32.

    Raises:
      UserError: the edges are not finite and strictly ascending, the shapes of `edges` and
        `directions` do not match, or another argument is invalid.

    Examples:
      >>> import jaxpersona as jp
      >>> talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
      >>> read = jp.capture.histogram(jp.load_axis("mini"), [0.0, 20.0], jp.everywhere, layers=[4])
      >>> counts = jp.extract(jp.load("mini"), [talk], capture=read).captured["histogram"]
      >>> counts.shape, int(counts.sum())
      ((1, 1, 1, 3), 15)
    """
    fields = _directions(directions, where, layers, site)
    bounds = numbers("edges", edges)
    bounds = bounds[None, None] if bounds.ndim == 1 else bounds
    if bounds.ndim != 3 or not bounds.shape[-1]:
        raise UserError(f"edges has shape {bounds.shape}; it must be [E] or [L, K, E]")
    with np.errstate(over="ignore"):  # float32 overflow gives infinity, which is rejected
        bounds = np.asarray(bounds, np.float32)
    if not np.isfinite(bounds).all() or (np.diff(bounds, axis=-1) <= 0).any():
        raise UserError("edges must be finite and strictly ascending as float32 values")
    picked, shape = fields["layers"], fields["directions"].shape
    count = None if picked is None else len(picked)  # if None, `chosen_layers` checks the shape
    if bounds.shape[1] not in (1, shape[1]) or (
            count is not None and bounds.shape[0] not in (1, count)):
        raise UserError(f"edges has shape {bounds.shape}, but directions has shape "
                        f"{shape}; give edges [E] or [L, K, E] with the same L and K")
    return Capture({name: Histogram(**fields, edges=jnp.asarray(bounds, F32))})


@checked_call
@own_rules()
def norms(where: Where | str = everywhere, *, layers: Layers | None = None, site: Site = "residual",
          name: str = "norms") -> Capture:
    """Capture the norm ‖h‖ of every selected token's activation.

    The mean norm is a common unit of steering strengths. Exclude the first token of a row, because
    its norm is often very large. The arguments and errors are as for `mean`, but without `turns`.
    By default, all tokens are selected.

    Returns:
      A capture whose result is [B, L, S] float32 (see the module docstring for S), with NaN at
      slots without a selected token.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.capture.norms(jp.everywhere.without("first"), layers=slice(4, 8))
      norms(everywhere.without('first'), layers 4–7)
    """
    return Capture({name: Norms(**_common(where, layers, site))})


@checked_call
@own_rules()
def full(where: Where | str = everywhere, *, layers: Layers | None = None, site: Site = "residual",
         name: str = "full") -> Capture:
    """Capture the activation of every selected token.

    The arguments and errors are as for `mean`, but without `turns`. By default, all tokens are
    selected.

    Returns:
      A capture whose result is [B, L, S, D] float32 (see the module docstring for S), with NaN at
      slots without a selected token. The result takes 4·B·L·S·D bytes.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.capture.full(jp.response, layers=4, site="mlp")
      full(response, layer 4, mlp)
    """
    return Capture({name: Full(**_common(where, layers, site))})
