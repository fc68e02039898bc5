"""Operators: constructors of interventions, each an equation in h, v̂ = v/‖v‖ and p = ⟨h, v̂⟩.

`bank` describes the accepted forms of directions, strengths and rows. The linear operators and
`cap` are rank-one edits that differ only in their coefficients (s, c, lo, hi), so each row's
operator is data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import (
    Bank,
    Layers,
    check_finite,
    percentile,
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
)
from jaxpersona.interventions.where import Where, encoded, everywhere
from jaxpersona.runtime import is_traced, own_rules

_FLAT = 1e-6  # unit vectors are collinear if the second's orthogonal component is shorter than this


@checked_call
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
    """Add a direction: h ← h + scale·v, without normalizing v.

    Source: activation addition (Turner et al. 2023); Chen et al. 2025, §3.

    Args:
      vector: a direction or a bank of them (see `bank`).
      layers: zero-based layers: an int, a half-open slice, a list of ints, or text such as "46:54".
      scale: the factor that multiplies v.
      where: the tokens to edit.
      rows: the bank's entry for each batch row, −1 for no edit.
      site: "residual" (after the block), "attention" or "mlp" (their outputs).

    Raises:
      UserError: a direction, strength, layer or row is invalid; the message names the argument,
        its value and the fix.
    """
    bank = Bank(vector, layers, rows, site)
    amount = bank.spread("scale", scale) * bank.norm
    if not is_traced(amount):
        check_finite("scale · ‖vector‖", amount)
    return _rank_one(bank, where, c=amount)


@checked_call
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
    of: str = "default",
) -> Interventions:
    """Clamp the projection on a direction; for a floor, h ← h + v̂·max(τ − ⟨h, v̂⟩, 0).

    Source: activation capping, Lu et al. 2026, §5. For a ceiling, h ← h − v̂·max(⟨h, v̂⟩ − τ, 0).
    The component of h orthogonal to v̂ is unchanged.

    Args:
      vector, layers, where, rows, site: as for `steer`; the vector's norm does not matter.
      floor: the minimum projection τ, in units of the residual stream; −inf means no floor. If the
        vector is an `Axis`, also a percentile name such as "p25" (`Axis.thresholds`).
      ceiling: the maximum projection; inf means no ceiling.
      push: a direction (or bank), in the form of `vector`, along which h is moved instead of v̂.
        Use it as a control: h moves by the same distance as with the cap, but along `push`, so the
        projection on v̂ is not clamped.
      of: the population of a percentile, "default" or "all".

    Raises:
      UserError: both bounds are missing, the floor is above the ceiling, or an argument is invalid
        as in `steer`.
    """
    if floor is None and ceiling is None:
        raise UserError("cap needs a bound: floor, ceiling or both")
    floor, ceiling = (percentile(vector, *bound, of)
                      for bound in (("floor", floor), ("ceiling", ceiling)))
    bank = Bank(vector, layers, rows, site)
    lo = bank.spread("floor", -np.inf if floor is None else floor)
    hi = bank.spread("ceiling", np.inf if ceiling is None else ceiling)
    if not is_traced(lo, hi) and (lo > hi).any():
        raise UserError("floor is above ceiling; a projection cannot satisfy both")
    along = None if push is None else Bank(push, layers, rows, site, "push")
    if along is not None and along.direction.shape != bank.direction.shape:
        raise UserError(f"push has shape {along.direction.shape} and vector has shape "
                        f"{bank.direction.shape}; they must be equal")
    if along is not None:
        bank.origin = one_origin(bank.origin, along.origin)
    return _rank_one(bank, where, lo=lo, hi=hi, push=None if along is None else along.direction)


@checked_call
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

    Source: directional ablation (Arditi et al. 2024). Arguments and errors are as for `steer`; the
    vector's norm does not matter. `coefficient`, the resulting projection, is in units of the
    residual stream.
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=0.0, c=bank.spread("coefficient", coefficient))


@checked_call
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
    """Replace the component along a direction by that of a mean: h ← h + v̂·⟨μ − h, v̂⟩.

    The component of h orthogonal to v̂ is unchanged.

    Args:
      vector, layers, where, rows, site: as for `steer`.
      mean: μ, a mean activation over texts, in the form of `vector`.

    Raises:
      UserError: mean and vector do not match in shape, or an argument is invalid as in `steer`.
    """
    bank = Bank(vector, layers, rows, site)
    of = Bank(mean, layers, rows, site, "mean", zero=True)
    bank.origin = one_origin(bank.origin, of.origin)
    n, width = bank.direction.shape[1:]
    if of.direction.shape[1] not in (1, n) or of.direction.shape[2] != width:
        raise UserError(f"mean has shape {of.direction.shape}, which does not match the shape of "
                        f"vector, {bank.direction.shape}")
    along = (bank.direction * of.direction).sum(-1) * of.norm  # ⟨μ, v̂⟩ [l, n]
    return _rank_one(bank, where, s=0.0, c=along)


@checked_call
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

    Arguments and errors are as for `steer`; `factor` is a number, or one per layer or entry.
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=bank.spread("factor", factor))


@checked_call
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
    """Set the projection on a direction to a value: h ← h + (value − ⟨h, v̂⟩)·v̂.

    Arguments and errors are as for `steer`; `value` is in units of the residual stream.
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=0.0, c=bank.spread("value", value))


@checked_call
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
    """Rotate h within a plane, preserving its norm: h ← h − Ph + ‖Ph‖·(cos θ·b₁ + sin θ·b₂).

    b₁ is the first direction, b₂ the component of the second orthogonal to b₁, both normalized. P
    projects onto their plane. Source: angular steering (Vu and Nguyen 2025).

    Args:
      first, second: two directions that span the plane, in the forms of `steer`'s vector.
      to: the target angle θ in radians, from b₁ toward b₂.
      by: the rotation angle in radians, relative to the angle of Ph. Give either `to` or `by`.
      layers, where, rows, site: as for `steer`.

    Raises:
      UserError: `to` and `by` are both given or both missing, the directions are collinear, or an
        argument is invalid as in `steer`.
    """
    if (to is None) == (by is None):
        raise UserError("rotate needs one angle in radians: to= (from the first direction) or by=")
    one, two = Bank(first, layers, rows, site, "first"), Bank(second, layers, rows, site, "second")
    if one.direction.shape != two.direction.shape:
        raise UserError(f"second has shape {two.direction.shape} and first has shape "
                        f"{one.direction.shape}; they must be equal")
    one.origin = one_origin(one.origin, two.origin)
    xp: Any = jnp if is_traced(one.direction, two.direction, to, by) else np
    across = two.direction - (one.direction * two.direction).sum(-1, keepdims=True) * one.direction
    length = xp.linalg.norm(across, axis=-1, keepdims=True)
    if xp is np and (length < _FLAT).any():
        raise UserError("first and second are collinear at a chosen layer; give directions that "
                        "span a plane")
    theta = one.spread("to" if by is None else "by", to if by is None else by)
    angle = xp.stack([xp.cos(theta), xp.sin(theta), xp.full(theta.shape, float(by is None))], -1)
    return _table(Rotation, one, where, first=one.direction, second=across / length, angle=angle)


@checked_call
@own_rules()
def restore_norm(
    *,
    layers: Layers,
    where: Where | str = everywhere,
    rows: Any = None,
    site: Site = "residual",
) -> Interventions:
    """Restore the norm: h ← h·‖h₀‖/‖h‖, with h₀ the activation before all edits at this site.

    Chain it after the edits whose effect on the norm should be undone.

    Args:
      layers, where, site: as for `steer`.
      rows: per batch row, 0 to restore the norm and −1 for no edit; default: all rows.
    """
    chosen = resolve_layers(layers, None)
    return _plain(NormRestoration, chosen, where, rows, site,
                  amount=jnp.ones((len(chosen), 1), jnp.float32))


@checked_call
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
    """Apply a user-defined function to each token's activation: h ← fn(params, h).

    The function is applied per token, so prefill, chunked prefill and decode are equivalent.

    Args:
      fn: fn(params, h) → h for h [D] float32, traceable by JAX. It is static, so each new function
        object recompiles: define it once, not as a lambda in each call.
      params: a pytree of arrays. They are data: new values do not recompile. With `rows=`, each
        array is [n, …].
      rows: the entry of `params` for each batch row, −1 for no edit.
      layers, where, site: as for `steer`.

    Raises:
      UserError: `fn` is not callable or not hashable, or leaves of `params` differ in n.
    """
    try:
        hash(fn)
    except TypeError:
        raise UserError("fn is not hashable; give a function and pass its data as params") \
            from None
    if not callable(fn):
        raise UserError(f"fn is {fn!r}; it must be a function of (params, h)")
    _check_arguments(fn)
    chosen = resolve_layers(layers, None)
    # NumPy converts Python numbers, because JAX would make them weakly typed
    leaves = [x if is_traced(x) else jnp.asarray(np.asarray(x)) for x in _arrays(params)]
    if rows is None:
        leaves = [x[None] for x in leaves]
    sizes = {x.shape[0] if x.ndim else 0 for x in leaves} or {1}
    if len(sizes) > 1 or 0 in sizes:
        raise UserError("with rows=, every array of params must be [n, …] with the same n")
    n = sizes.pop()
    spread = np.array([*range(n), *[n - 1] * (next_power(n) - n)], np.int32)
    leaves = [x[spread] for x in leaves]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return _plain(Custom, chosen, where, rows, site, n, params=params, fn=fn,
                  on=jnp.ones((len(chosen), next_power(n)), jnp.float32))


def _check_arguments(fn: Any) -> None:
    """Check that a custom function can be called with params and h.

    Raises:
      UserError: its signature does not allow two positional arguments.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise UserError(f"fn has the arguments {signature}; it must accept (params, h)") from None


def _arrays(params: Any) -> list[Any]:
    """Return the leaves of a custom function's parameters; raise if one is not numeric."""
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not is_traced(leaf) and np.asarray(leaf).dtype.kind in "OSU":
            raise UserError(f"params holds {leaf!r}; its leaves must be arrays or numbers")
    return leaves


def _rank_one(bank: Bank, where: Where | str, *, s: Any = 1.0, c: Any = 0.0, lo: Any = -np.inf,
              hi: Any = np.inf, push: Any = None) -> Interventions:
    """Build interventions with one table of rank-one edits."""
    count, n = bank.norm.shape
    xp: Any = jnp if is_traced(s, c, lo, hi) else np
    numbers = [xp.broadcast_to(xp.asarray(x, xp.float32) if xp is jnp else x, (count, n))
               for x in (s, c, lo, hi)]
    test = np.broadcast_to(encoded(where), (n, 5))
    edit = table(bank.direction, xp.stack(numbers, -1), test, bank.origin, bank.layers, bank.site,
                 bank.index, push)
    return Interventions((edit,))


def _table(kind: type[Table], bank: Bank, where: Where | str, **payload: Any) -> Interventions:
    """Build a table of `kind` from fields [l, n, …]; repeat the last entry as padding."""
    n = len(bank.origin)
    size = next_power(n)
    spread = np.array([*range(n), *[n - 1] * (size - n)])
    fields = {name: jnp.asarray(value[:, spread], jnp.float32) for name, value in payload.items()}
    test = np.broadcast_to(encoded(where), (n, 5))
    shared = common(test, bank.origin, checked_index(bank.index, n), size)
    made: Any = kind  # the type checker knows only the fields that all kinds share
    return Interventions((made(layers=bank.layers, site=bank.site, **shared, **fields),))


def _plain(kind: type[Table], layers: tuple[int, ...], where: Where | str, rows: Any, site: Site,
           n: int = 1, **fields: Any) -> Interventions:
    """Build a table of a kind without directions."""
    if site not in SITES:
        raise UserError(f"site is {site!r}; it must be one of {SITES}")
    test = np.broadcast_to(encoded(where), (n, 5))
    shared = common(test, np.zeros(n, np.uint32), checked_index(rows, n), next_power(n))
    return Interventions((kind(layers=layers, site=site, **shared, **fields),))
