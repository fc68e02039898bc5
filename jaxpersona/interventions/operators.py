"""Operators: the named interventions, each an equation on h, v̂ = v/‖v‖ and p = ⟨h, v̂⟩.

How directions, strengths and rows may be given is said in `bank`. The linear ones and `cap` are
rows of numbers (s, c, lo, hi) of one rank-one edit, so which of them a row uses is data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.interventions.bank import (
    Bank,
    Layers,
    check_finite,
    resolve_layers,
)
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.edit import table
from jaxpersona.interventions.kinds import Custom, NormRestoration, Rotation
from jaxpersona.interventions.table import (
    SITES,
    Site,
    Table,
    checked_index,
    common,
    next_power,
    one_origin,
    traced,
)
from jaxpersona.interventions.where import Where, encoded, everywhere
from jaxpersona.runtime import own_rules

_FLAT = 1e-6  # a plane whose second vector keeps less than this of its length has no direction


@own_rules()
def steer(
    vector: Any,
    *,
    layers: Layers,
    scale: Any = 1.0,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Add a direction: h ← h + scale·v, v as given and not normalised.

    Source: activation addition (Turner et al. 2023); Chen et al. 2025, §3.

    Args:
      vector: a direction or a bank of them (see `bank`).
      layers: zero-based; an int, a half-open slice, several ints, or text such as "46:54".
      scale: multiples of v.
      where: which tokens.
      rows: the bank's entry for each row, −1 for none.
      site: "residual" (after the block), "attention" or "mlp" (their outputs).

    Raises:
      ValueError: a direction, strength, layer or row that does not fit; field, value and mend.
    """
    bank = Bank(vector, layers, rows, site)
    amount = bank.spread("scale", scale) * bank.norm
    if not traced(amount):
        check_finite("scale · ‖vector‖", amount)
    return _rank_one(bank, where, c=amount)


@own_rules()
def cap(
    vector: Any,
    *,
    layers: Layers,
    floor: Any = None,
    ceiling: Any = None,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
    push: Any = None,
) -> Interventions:
    """Hold the projection on a direction within bounds: h ← h + v̂·max(τ − ⟨h, v̂⟩, 0) for a floor.

    Source: activation capping, Lu et al. 2026, §5. A ceiling is the same in reverse:
    h ← h − v̂·max(⟨h, v̂⟩ − τ, 0). The part of h orthogonal to v̂ is left as it is.

    Args:
      vector, layers, where, rows, site: as for `steer`; the direction's length does not matter.
      floor: the least projection τ, in units of the residual stream; −inf is no floor.
      ceiling: the greatest; inf is no ceiling.
      push: a direction (or bank) in the same form as `vector` to move along instead: the control
        that displaces h exactly as far as the cap would, but elsewhere. It caps nothing.

    Raises:
      ValueError: neither bound, a floor above the ceiling, a floor on an axis that does not point
        toward the Assistant, or anything that `steer` refuses.
    """
    if floor is None and ceiling is None:
        raise ValueError("cap needs a floor, a ceiling or both")
    bank = Bank(vector, layers, rows, site)
    lo = bank.spread("floor", -np.inf if floor is None else floor)
    hi = bank.spread("ceiling", np.inf if ceiling is None else ceiling)
    if not traced(lo, hi) and (lo > hi).any():
        raise ValueError("floor is above ceiling; a projection cannot satisfy both")
    along = None if push is None else Bank(push, layers, rows, site, "push")
    if along is not None and along.direction.shape != bank.direction.shape:
        raise ValueError(f"push has shape {along.direction.shape}; vector {bank.direction.shape}")
    if along is not None:
        bank.origin = one_origin(bank.origin, along.origin)
    return _rank_one(bank, where, lo=lo, hi=hi, push=None if along is None else along.direction)


@own_rules()
def ablate(
    vector: Any,
    *,
    layers: Layers,
    coefficient: Any = 0.0,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Remove the component along a direction: h ← h − v̂·⟨h, v̂⟩ + coefficient·v̂.

    Source: directional ablation (Arditi et al. 2024). Args and errors are those of `steer`; the
    direction's length does not matter, and `coefficient` (what is put back) is in units of the
    residual stream.
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=0.0, c=bank.spread("coefficient", coefficient))


@own_rules()
def mean_ablate(
    vector: Any,
    mean: Any,
    *,
    layers: Layers,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Replace the component along a direction by a mean activation's: h ← h + v̂·⟨μ − h, v̂⟩.

    An ablation followed by the addition of what the mean has along v̂; the rest of h stays.

    Args:
      vector, layers, where, rows, site: as for `steer`.
      mean: μ, the mean activation of some texts, in the same form as `vector`.

    Raises:
      ValueError: a mean of another form, or anything that `steer` refuses.
    """
    bank = Bank(vector, layers, rows, site)
    of = Bank(mean, layers, rows, site, "mean", zero=True)
    bank.origin = one_origin(bank.origin, of.origin)
    n, width = bank.direction.shape[1:]
    if of.direction.shape[1] not in (1, n) or of.direction.shape[2] != width:
        raise ValueError(f"mean has shape {of.direction.shape}; vector {bank.direction.shape}")
    along = (bank.direction * of.direction).sum(-1) * of.norm  # ⟨μ, v̂⟩ [l, n]
    return _rank_one(bank, where, s=0.0, c=along)


@own_rules()
def scale(
    vector: Any,
    factor: Any,
    *,
    layers: Layers,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Multiply the projection on a direction: h ← h + (factor − 1)·⟨h, v̂⟩·v̂.

    Args and errors are those of `steer`, with `factor` a number, one a layer or one an entry.
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=bank.spread("factor", factor))


@own_rules()
def set_projection(
    vector: Any,
    value: Any,
    *,
    layers: Layers,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Put the projection on a direction at a value: h ← h + (value − ⟨h, v̂⟩)·v̂.

    Args and errors are those of `steer`; `value` is in units of the residual stream.
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=0.0, c=bank.spread("value", value))


@own_rules()
def rotate(
    first: Any,
    second: Any,
    *,
    layers: Layers,
    to: Any = None,
    by: Any = None,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Rotate within a plane, the norm kept: h ← h − Ph + ‖Ph‖·(cos θ·b₁ + sin θ·b₂).

    b₁ is the first direction's, b₂ the second's part orthogonal to it; P projects on their plane.
    Source: angular steering (Vu and Nguyen 2025).

    Args:
      first, second: two directions, in the same form as `steer`'s vector, that span the plane.
      to: θ in radians, counted from b₁ toward b₂: where h is to lie.
      by: θ in radians, how far h is turned from where it lies. One of the two is given.
      layers, where, rows, site: as for `steer`.

    Raises:
      ValueError: neither angle or both, two directions on one line, or what `steer` refuses.
    """
    if (to is None) == (by is None):
        raise ValueError("rotate needs one angle in radians: to= (from the first direction) or by=")
    one, two = Bank(first, layers, rows, site, "first"), Bank(second, layers, rows, site, "second")
    if one.direction.shape != two.direction.shape:
        raise ValueError(f"second has shape {two.direction.shape}; first {one.direction.shape}")
    one.origin = one_origin(one.origin, two.origin)
    xp: Any = jnp if traced(one.direction, two.direction, to, by) else np
    across = two.direction - (one.direction * two.direction).sum(-1, keepdims=True) * one.direction
    length = xp.linalg.norm(across, axis=-1, keepdims=True)
    if xp is np and (length < _FLAT).any():
        raise ValueError("first and second lie on one line at a chosen layer; they span no plane")
    theta = one.spread("to" if by is None else "by", to if by is None else by)
    angle = xp.stack([xp.cos(theta), xp.sin(theta), xp.full(theta.shape, float(by is None))], -1)
    return _table(Rotation, one, where, first=one.direction, second=across / length, angle=angle)


@own_rules()
def restore_norm(
    *,
    layers: Layers,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Give h back its norm: h ← h·‖h₀‖/‖h‖, h₀ being h before what precedes this at its site.

    Chain it after the edits whose effect on the length is to be undone.

    Args:
      layers, where, site: as for `steer`.
      rows: 0 for each row that it is for, −1 for the others; all rows by default.
    """
    chosen = resolve_layers(layers, None)
    return _plain(NormRestoration, chosen, where, rows, site,
                  amount=jnp.ones((len(chosen), 1), jnp.float32))


@own_rules()
def custom(
    fn: Callable[[Any, jax.Array], jax.Array],
    params: Any = (),
    *,
    layers: Layers,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Apply a function of your own to a token's activation: h ← fn(params, h).

    It sees one token, so it means the same in prefill, in chunks and in decode.

    Args:
      fn: fn(params, h) → h for h [D] float32, traceable by JAX. A named function: it is part of
        the program, so another one compiles another.
      params: a pytree of arrays, data: new values compile nothing. With `rows=`, [n, …] each.
      rows: the entry of `params` for each row, −1 for none.
      layers, where, site: as for `steer`.

    Raises:
      ValueError: `fn` cannot be called or hashed, or leaves of `params` that differ in n.
    """
    try:
        hash(fn)
    except TypeError:
        raise ValueError("fn cannot be hashed; give a function and hand its data as params") \
            from None
    if not callable(fn):
        raise ValueError(f"fn is {fn!r}; it must be a function of (params, h)")
    _check_arguments(fn)
    chosen = resolve_layers(layers, None)
    # through NumPy, so that a Python number's type is as strong as an array's
    leaves = [x if traced(x) else jnp.asarray(np.asarray(x)) for x in _arrays(params)]
    if rows is None:
        leaves = [x[None] for x in leaves]
    sizes = {x.shape[0] if x.ndim else 0 for x in leaves} or {1}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError("with rows=, every array of params must be [n, …] with the same n")
    n = sizes.pop()
    spread = np.array([*range(n), *[n - 1] * (next_power(n) - n)], np.int32)
    leaves = [x[spread] for x in leaves]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return _plain(Custom, chosen, where, rows, site, n, params=params, fn=fn,
                  on=jnp.ones((len(chosen), next_power(n)), jnp.float32))


def _check_arguments(fn: Any) -> None:
    """Check that a custom function can be called with params and h.

    Raises:
      ValueError: its signature does not allow two positional arguments.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ValueError(f"fn has the arguments {signature}; fn takes (params, h)") from None


def _arrays(params: Any) -> list[Any]:
    """Return the leaves of a custom function's parameters, which must be numbers."""
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not traced(leaf) and np.asarray(leaf).dtype.kind in "OSU":
            raise ValueError(f"params holds {leaf!r}; its leaves must be arrays or numbers")
    return leaves


def _rank_one(bank: Bank, where: Where | str, *, s: Any = 1.0, c: Any = 0.0, lo: Any = -np.inf,
              hi: Any = np.inf, push: Any = None) -> Interventions:
    """Make a table of rank-one edits."""
    count, n = bank.norm.shape
    xp: Any = jnp if traced(s, c, lo, hi) else np
    numbers = [xp.broadcast_to(xp.asarray(x, xp.float32) if xp is jnp else x, (count, n))
               for x in (s, c, lo, hi)]
    test = np.broadcast_to(encoded(where), (n, 5))
    edit = table(bank.direction, xp.stack(numbers, -1), test, bank.origin, bank.layers, bank.site,
                 bank.index, push)
    return Interventions((edit,))


def _table(kind: type[Table], bank: Bank, where: Where | str, **payload: Any) -> Interventions:
    """Make a table of another kind from fields [l, n, …], padded with its last entry."""
    n = len(bank.origin)
    size = next_power(n)
    spread = np.array([*range(n), *[n - 1] * (size - n)])
    fields = {name: jnp.asarray(value[:, spread], jnp.float32) for name, value in payload.items()}
    test = np.broadcast_to(encoded(where), (n, 5))
    shared = common(test, bank.origin, checked_index(bank.index, n), size)
    made: Any = kind  # of which only the fields that all kinds share are known
    return Interventions((made(layers=bank.layers, site=bank.site, **shared, **fields),))


def _plain(kind: type[Table], layers: tuple[int, ...], where: Where | str, rows: Any, site: Site,
           n: int = 1, **fields: Any) -> Interventions:
    """Make a table that has no direction."""
    if site not in SITES:
        raise ValueError(f"site is {site!r}; it must be one of {SITES}")
    test = np.broadcast_to(encoded(where), (n, 5))
    shared = common(test, np.zeros(n, np.uint32), checked_index(rows, n), next_power(n))
    return Interventions((kind(layers=layers, site=site, **shared, **fields),))
