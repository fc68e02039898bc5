"""Operators that are not rank-one edits: rotation, norm restoration and custom functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Bank, Layers, resolve_layers
from jaxpersona.interventions.compose import Interventions
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

# unit vectors are collinear if the component of one orthogonal to the other is shorter than this
_FLAT = 1e-6


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

    b₁ is the first direction, and b₂ is the component of the second direction orthogonal to b₁;
    both are normalized. P projects onto the plane of b₁ and b₂. Source: angular steering (Vu and
    Nguyen 2025).

    Args:
      first, second: two directions that span the plane, each in a form that `steer` accepts.
      to: the target angle θ in radians, from b₁ toward b₂, as a number or an array (see the module
        `bank`).
      by: the rotation angle in radians, in the same forms as `to`; θ is then the angle of Ph plus
        this angle. Give either `to` or `by`.
      layers, where, rows, site: as for `steer`.

    Raises:
      UserError: `to` and `by` are both given or both missing; the directions are collinear, have
        different shapes or belong to different models; or an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np
      >>> u, v = np.eye(128)[:2]
      >>> jp.rotate(u, v, layers=4, by=0.5)
      rotate(everywhere, layer 4, residual)
    """
    if (to is None) == (by is None):
        raise UserError("rotate needs one angle in radians; give either to= (the target angle) "
                        "or by= (the rotation angle)")
    one, two = Bank(first, layers, rows, site, "first"), Bank(second, layers, rows, site, "second")
    if one.direction.shape != two.direction.shape:
        raise UserError(f"`second` has shape {two.direction.shape} and `first` has shape "
                        f"{one.direction.shape}; the shapes must be equal")
    one.origin = one_origin(one.origin, two.origin)
    xp: Any = jnp if is_traced(one.direction, two.direction, to, by) else np
    across = two.direction - (one.direction * two.direction).sum(-1, keepdims=True) * one.direction
    length = xp.linalg.norm(across, axis=-1, keepdims=True)
    if xp is np and (flat := length < _FLAT).any():
        at = one.layers[int(np.argwhere(flat)[0, 0])]
        raise UserError(f"`first` and `second` are collinear at layer {at}; give directions that "
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
    """Restore the norm: h ← h·‖h₀‖/‖h‖, where h₀ is the activation before all edits at this site.

    Chain the result after the edits whose effect on the norm should be undone.

    Args:
      layers, where, site: as for `steer`.
      rows: for each batch row, 0 to restore the norm or −1 for no edit. By default, the norm is
        restored in all rows.

    Raises:
      UserError: an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.chain(jp.steer(jp.load_axis("mini"), layers=4, scale=2.0), jp.restore_norm(layers=4))
      chain(steer(everywhere, layer 4, residual), restore_norm(everywhere, layer 4, residual))
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

    The function is applied per token, so prefill, chunked prefill and decode give the same
    result.

    Args:
      fn: a JAX-traceable function fn(params, h) → h, where h [D] float32 is the activation of one
        token. `fn` is static, so each new function object triggers recompilation. Define the
        function once, rather than as a new lambda for each call.
      params: a pytree of arrays. New values do not trigger recompilation. With `rows=`, each array
        is [n, …], with one entry per edit.
      rows: the index of each batch row's entry in `params`, or −1 for no edit.
      layers, where, site: as for `steer`.

    Raises:
      UserError: `fn` is not callable, is not hashable or does not accept (params, h); the leaves of
        `params` are not numeric or, with `rows=`, do not all have the shape [n, …] with the same n;
        or another argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.custom(lambda factor, h: factor * h, 0.9, layers=4)
      custom(everywhere, layer 4, residual)
    """
    try:
        hash(fn)
    except TypeError:
        raise UserError("fn is not hashable; give a function and pass its data in params=") \
            from None
    if not callable(fn):
        raise UserError(f"fn is {fn!r}; it must be a function of (params, h)")
    _check_arguments(fn)
    chosen = resolve_layers(layers, None)
    # convert Python numbers with NumPy, because JAX would make them weakly typed
    leaves = [x if is_traced(x) else jnp.asarray(np.asarray(x)) for x in _arrays(params)]
    if rows is None:
        leaves = [x[None] for x in leaves]
    sizes = {x.shape[0] if x.ndim else 0 for x in leaves} or {1}
    if len(sizes) > 1 or 0 in sizes:
        raise UserError("with rows=, every array in params must have shape [n, …] with the same n")
    n = sizes.pop()
    spread = np.array([*range(n), *[n - 1] * (next_power(n) - n)], np.int32)
    leaves = [x[spread] for x in leaves]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return _plain(Custom, chosen, where, rows, site, n, params=params, fn=fn,
                  on=jnp.ones((len(chosen), next_power(n)), jnp.float32))


def _check_arguments(fn: Any) -> None:
    """Check that a custom function can be called with params and h.

    Raises:
      UserError: the function's signature does not allow two positional arguments.
    """
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise UserError(f"fn has the signature {signature}; it must accept (params, h)") from None


def _arrays(params: Any) -> list[Any]:
    """Check that the leaves of a custom function's parameters are numeric, and return them.

    Raises:
      UserError: a leaf is not numeric.
    """
    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not is_traced(leaf) and np.asarray(leaf).dtype.kind in "OSU":
            raise UserError(f"params contains {leaf!r}; its leaves must be arrays or numbers")
    return leaves


def _table(kind: type[Table], bank: Bank, where: Where | str, **payload: Any) -> Interventions:
    """Build interventions with one table of class `kind` from a bank and fields [l, n, …].

    The number of entries is padded to a power of two by repeating the last entry.
    """
    n = len(bank.origin)
    size = next_power(n)
    spread = np.array([*range(n), *[n - 1] * (size - n)])
    fields = {name: jnp.asarray(value[:, spread], jnp.float32) for name, value in payload.items()}
    test = np.broadcast_to(encoded(where), (n, 5))
    shared = common(test, bank.origin, checked_index(bank.index, n), size)
    made: Any = kind  # for the type checker: `Table` declares only the fields that all kinds have
    return Interventions((made(layers=bank.layers, site=bank.site, **shared, **fields),))


def _plain(kind: type[Table], layers: tuple[int, ...], where: Where | str, rows: Any, site: Site,
           n: int = 1, **fields: Any) -> Interventions:
    """Build interventions with one table of class `kind`, which has no directions."""
    if site not in SITES:
        raise UserError(f"site is {site!r}; it must be one of {SITES}")
    test = np.broadcast_to(encoded(where), (n, 5))
    shared = common(test, np.zeros(n, np.uint32), checked_index(rows, n), next_power(n))
    return Interventions((kind(layers=layers, site=site, **shared, **fields),))
