"""Rank-one operators, which create interventions that edit the projection onto a direction.

In the equations, h is an activation, v̂ = v/‖v‖ a unit direction and p = ⟨h, v̂⟩ the projection.
The module `bank` describes the accepted forms of directions, strengths and rows. The operators
differ only in their coefficients (s, c, lo, hi), which are data, so rows may have different
operators. The module `nonlinear` contains the operators that are not rank-one edits.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.interventions.bank import Bank, Layers, check_finite, percentile
from jaxpersona.interventions.compose import Interventions
from jaxpersona.interventions.edit import table
from jaxpersona.interventions.table import Site, one_origin
from jaxpersona.interventions.where import Where, encoded, everywhere
from jaxpersona.runtime import is_traced, own_rules


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

    Sources: activation addition (Turner et al. 2023) and persona vectors (Chen et al. 2025, §3).

    Args:
      vector: a direction (an array [D], an `Axis` or a `Vector`) or a bank of directions (see the
        module `bank`).
      layers: zero-based layers, as an int, a half-open slice, a list of ints, or a string such as
        "46:54".
      scale: the factor that multiplies v, as a number or an array (see the module `bank`).
      where: the tokens to edit, as a token test or its name, such as "generated".
      rows: the index of each batch row's direction in the bank, or −1 for no edit.
      site: the activation to edit: "residual" (the residual stream after the block), "attention" or
        "mlp" (the output of this sublayer).

    Raises:
      UserError: a direction, strength, layer, row, site or token test is invalid; the message gives
        the argument and the fix.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.steer(jp.load_axis("mini"), layers=4, scale=-2.0, where="generated")
      steer(generated, layer 4, residual)
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
    """Clamp the projection onto a direction; for a floor, h ← h + v̂·max(τ − ⟨h, v̂⟩, 0).

    For a ceiling, h ← h − v̂·max(⟨h, v̂⟩ − τ, 0). Without `push`, the component of h orthogonal to
    v̂ is unchanged. Source: activation capping (Lu et al. 2026, §5).

    Args:
      vector, layers, where, rows, site: as for `steer`; the norm of `vector` has no effect.
      floor: the minimum projection τ, as a number or an array (see the module `bank`), in units of
        the residual stream; −inf means no floor. If `vector` is an `Axis`, `floor` may also be a
        percentile name such as "p25" (`Axis.thresholds`).
      ceiling: the maximum projection, in the same forms as `floor`; inf means no ceiling.
      push: a direction or bank of the same shape as `vector`, along which h moves instead of along
        v̂. This is a control condition: h moves by the same distance as without `push`, but the
        projection onto v̂ is not clamped.
      of: the population over which a percentile name is evaluated, "default" or "all"
        (`Axis.thresholds`).

    Raises:
      UserError: both bounds are missing, the floor is above the ceiling, a bound is a percentile
        that `vector` does not have, `push` and `vector` have different shapes or belong to
        different models, or an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.cap(jp.load_axis("mini"), layers=slice(4, 8), floor="p25", of="default")
      cap(everywhere, layers 4–7, residual)
    """
    if floor is None and ceiling is None:
        raise UserError("cap needs a bound; give floor, ceiling or both")
    floor, ceiling = (percentile(vector, *bound, of)
                      for bound in (("floor", floor), ("ceiling", ceiling)))
    bank = Bank(vector, layers, rows, site)
    lo = bank.spread("floor", -np.inf if floor is None else floor)
    hi = bank.spread("ceiling", np.inf if ceiling is None else ceiling)
    if not is_traced(lo, hi) and (lo > hi).any():
        raise UserError("floor is above ceiling, so no projection satisfies both; lower the floor "
                        "or raise the ceiling")
    along = None if push is None else Bank(push, layers, rows, site, "push")
    if along is not None and along.direction.shape != bank.direction.shape:
        raise UserError(f"push has shape {along.direction.shape} and vector has shape "
                        f"{bank.direction.shape}; the shapes must be equal")
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
    """Remove the component along a direction, or set it to `coefficient`.

    The edit is h ← h − v̂·⟨h, v̂⟩ + coefficient·v̂.

    Source: directional ablation (Arditi et al. 2024).

    Args:
      vector, layers, where, rows, site: as for `steer`; the norm of `vector` has no effect.
      coefficient: the projection after the edit, in units of the residual stream, as a number or an
        array (see the module `bank`).

    Raises:
      UserError: an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.ablate(jp.load_axis("mini"), layers=[3, 5])
      ablate(everywhere, layers 3, 5, residual)
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
    """Set the projection onto a direction to ⟨μ, v̂⟩ for a mean activation μ.

    The edit is h ← h + v̂·⟨μ − h, v̂⟩. The component of h orthogonal to v̂ is unchanged.

    Args:
      vector, layers, where, rows, site: as for `steer`; the norm of `vector` has no effect.
      mean: the mean activation μ, in a form that `vector` accepts. With a bank of directions, one
        mean for all of them is also allowed.

    Raises:
      UserError: the shapes of `mean` and `vector` do not match, they belong to different models, or
        an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> import numpy as np
      >>> jp.mean_ablate(jp.load_axis("mini"), np.zeros(128), layers=4)
      ablate(everywhere, layer 4, residual)
    """
    bank = Bank(vector, layers, rows, site)
    of = Bank(mean, layers, rows, site, "mean", zero=True)
    bank.origin = one_origin(bank.origin, of.origin)
    n, width = bank.direction.shape[1:]
    if of.direction.shape[1] not in (1, n) or of.direction.shape[2] != width:
        raise UserError(f"mean has shape {of.direction.shape} and vector has shape "
                        f"{bank.direction.shape} (layers, directions, width); give one mean, or "
                        "one per direction, of the same width")
    along = (bank.direction * of.direction).sum(-1) * of.norm  # ⟨μ, v̂⟩ [l, n]
    if not is_traced(along):
        check_finite("the projection of mean onto vector", along)
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
    """Multiply the projection onto a direction by a factor: h ← h + (factor − 1)·⟨h, v̂⟩·v̂.

    Args:
      vector, layers, where, rows, site: as for `steer`; the norm of `vector` has no effect.
      factor: the factor, as a number or an array (see the module `bank`).

    Raises:
      UserError: an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.scale(jp.load_axis("mini"), layers=4, factor=0.5)
      scale(everywhere, layer 4, residual)
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
    """Set the projection onto a direction to a value: h ← h + (value − ⟨h, v̂⟩)·v̂.

    Args:
      vector, layers, where, rows, site: as for `steer`; the norm of `vector` has no effect.
      value: the projection after the edit, in units of the residual stream, as a number or an array
        (see the module `bank`).

    Raises:
      UserError: an argument is invalid (see `steer`).

    Examples:
      >>> import jaxpersona as jp
      >>> jp.set_projection(jp.load_axis("mini"), layers=4, value=0.0)
      ablate(everywhere, layer 4, residual)
    """
    bank = Bank(vector, layers, rows, site)
    return _rank_one(bank, where, s=0.0, c=bank.spread("value", value))


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
