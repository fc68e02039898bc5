"""A fused kernel for the end of a layer: residual add, rank-one edits, projections and norm.

At the end of a layer, the MLP's output is added to the residual stream, the rank-one edits are
applied one after another, and the next norm is applied to the result. Each edit projects the
current residual stream onto its direction. Readings project the residual stream onto further
directions, before or after the edits. XLA compiles these operations to several kernels, and each of
them reads the residual stream. The Pallas kernel reads the residual stream and the MLP's output
once, keeps a block of tokens in on-chip memory, and writes the edited residual stream and its
normalized form once. `reference` computes the same result in plain JAX.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxpersona.kernels.reference import rank_one_edit, round_residual

from jaxpersona.errors import UserError

Implementation = Literal["xla", "pallas", "interpret"]
F32 = jnp.float32
MEMORY = 10 * 2**20  # maximum bytes of on-chip memory per grid step; TPU cores have at least 16 MiB
_BY_SUMS = 8  # up to this number, projections are computed as sums; above it, as a matrix product
_TOKENS = (256, 128, 64, 32, 16, 8)  # possible sizes of a block, in tokens


class SiteEdit(NamedTuple):
    """A rank-one edit, whose direction and coefficients are given per row or shared by all rows.

    The equation is in `reference.rank_one_edit`.

    Attributes:
      direction: unit vectors v̂ [B or 1, D] float32.
      coefficients: s, c, lo and hi, each [B or 1] float32.
      active: [B, T] bool, True at the tokens to edit.
      push: û [B or 1, D] float32, along which h moves, or None to move h along v̂.
    """

    direction: jax.Array
    coefficients: Sequence[jax.Array]
    active: jax.Array
    push: jax.Array | None = None


class Norm(NamedTuple):
    """The RMS norm after a site: its weight [D], and ε and offset as in `nn.rms_norm`."""

    weight: jax.Array
    eps: float
    offset: float


class Site(NamedTuple):
    """The result of `site`.

    Attributes:
      h: the edited residual stream [B, T, D], with the dtype of the input.
      changed: [n, B] int32, the number of tokens that each edit changed in each row.
      read: [B, T, K] float32, the projections onto the K directions, or None without directions.
      normed: h after the norm, [B, T, D], or None without a norm.
    """

    h: jax.Array
    changed: jax.Array
    read: jax.Array | None
    normed: jax.Array | None


def reference(x: jax.Array, added: jax.Array, edits: Sequence[SiteEdit] = (), *,
              directions: jax.Array | None = None, before: int = 0,
              norm: Norm | None = None) -> Site:
    """Compute the result of `site` in plain JAX; all arguments are as for `site`."""
    h = unedited = round_residual(x + added)
    counts = []
    for edit in edits:
        h, changed = rank_one_edit(h, edit.direction, edit.coefficients, edit.active, edit.push)
        h = round_residual(h)
        counts.append(changed.sum(-1, dtype=jnp.int32))
    read = None
    if directions is not None:
        read = jnp.concatenate([
            jnp.einsum("btd,kd->btk", side.astype(F32), part, precision="highest")
            for side, part in ((unedited, directions[:before]), (h, directions[before:]))], -1)
    normed = None if norm is None else _normed(
        h.astype(F32), norm.weight.astype(F32)[None, None], norm.eps, norm.offset).astype(h.dtype)
    return Site(h, jnp.stack(counts) if counts else _no_counts(x), read, normed)


def site(x: jax.Array, added: jax.Array, edits: Sequence[SiteEdit] = (), *,
         directions: jax.Array | None = None, before: int = 0, norm: Norm | None = None,
         implementation: Implementation = "xla") -> Site:
    """Add the MLP's output to the residual stream, edit the sum, and apply a norm to the result.

    Args:
      x: the residual stream [B, T, D].
      added: the output of the MLP [B, T, D].
      edits: n rank-one edits, applied in order.
      directions: [K, D] float32, the directions of projection readings, or None.
      before: the number of leading directions whose projections are computed before the edits; the
        other projections are computed after the edits.
      norm: the norm to compute, or None.
      implementation: "xla" (the reference), "pallas" (one kernel on a TPU) or "interpret" (this
        kernel, emulated with JAX operations on any device for tests). The kernel is not
        differentiable.

    Raises:
      UserError: the implementation is unknown, or the smallest block does not fit in `MEMORY`.
    """
    if implementation == "xla":
        return reference(x, added, edits, directions=directions, before=before, norm=norm)
    if implementation not in ("pallas", "interpret"):
        raise UserError(f"implementation is {implementation!r}; it must be 'xla', 'pallas' or "
                        "'interpret'")
    rows, width = x.shape[:2]
    by_token = width == 1  # in a decode step, the tokens of a block belong to different rows
    if by_token:
        x, added = (jnp.swapaxes(array, 0, 1) for array in (x, added))  # [1, B, D]
    found = _run(x, added, edits, directions, before, norm, by_token,
                 implementation == "interpret")
    if by_token:
        h, read, normed = jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1),
                                       (found.h, found.read, found.normed))
        found = found._replace(h=h, read=read, normed=normed)
    return found if edits else found._replace(changed=jnp.zeros((0, rows), jnp.int32))


def refusal(platform: str, width: int, entries: int, directions: int,
            itemsize: int = 2) -> str | None:
    """Return the reason why the Pallas kernel cannot run with these arguments, or None if it can.

    Args:
      platform: "cpu", "gpu" or "tpu".
      width: the width D of the residual stream.
      entries: the number of vectors v̂ and û in the edits of a site.
      directions: the number K of directions.
      itemsize: the number of bytes of an activation, 2 for bfloat16 and 4 for float32.
    """
    if platform != "tpu":
        return f"the platform is {platform}, and the kernel is written for TPUs"
    if width % 128:
        return f"the width {width} of the residual stream is not a multiple of 128"
    if _block(width, itemsize, entries, directions, False) is None:
        return (f"a block of {_TOKENS[-1]} tokens of width {width} exceeds {MEMORY} bytes of "
                f"on-chip memory (vectors of edits: {entries}, directions of readings: "
                f"{directions})")
    return None


def _no_counts(x: jax.Array) -> jax.Array:
    return jnp.zeros((0, x.shape[0]), jnp.int32)


def _normed(h: jax.Array, weight: jax.Array, eps: float, offset: float) -> jax.Array:
    """Apply RMSNorm to h [..., D] float32; `weight` has as many dimensions as h."""
    return h * jax.lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + eps) * (weight + offset)


def _block(width: int, itemsize: int, entries: int, directions: int, by_token: bool) -> int | None:
    """Return the largest number of tokens in a block that fits in `MEMORY`, or None if none fits.

    The estimate includes two buffers for each of two inputs and two outputs, three float32
    temporaries (all with one value per channel and token of the block), and the vectors of edits
    and readings.
    """
    for tokens in _TOKENS:
        vectors = entries * 4 * width * (tokens if by_token else 8)
        held = tokens * width * (8 * itemsize + 12) + vectors + 4 * width * max(8, directions)
        if held <= MEMORY:
            return tokens
    return None


def _run(x: jax.Array, added: jax.Array, edits: Sequence[SiteEdit], directions: jax.Array | None,
         before: int, norm: Norm | None, by_token: bool, interpret: bool) -> Site:
    """Run the kernel on x [G, R, D]: G rows of R tokens or, if `by_token`, R rows of one token.

    Raises:
      UserError: the smallest block does not fit in `MEMORY`.
    """
    from jax.experimental import pallas as pl

    groups, count, width = x.shape
    entries = sum(1 + (edit.push is not None) for edit in edits)
    reads = 0 if directions is None else directions.shape[0]
    tokens = _block(width, x.dtype.itemsize, entries, reads, by_token)
    if tokens is None:
        raise UserError(f"the residual kernel needs more than {MEMORY} bytes of on-chip memory at "
                        f"width {width} (vectors of edits: {entries}, directions of readings: "
                        f"{reads}); use 'xla'")
    tokens = min(tokens, -(-count // 8) * 8)
    padded = -(-count // tokens) * tokens
    if padded != count:
        x, added = (jnp.pad(y, ((0, 0), (0, padded - count), (0, 0))) for y in (x, added))
    steps = padded // tokens

    def whole(array: jax.Array) -> tuple[jax.Array, Any]:
        return array, pl.BlockSpec(array.shape, lambda g, t: (0,) * array.ndim)

    def per_row(array: jax.Array) -> tuple[jax.Array, Any]:
        """Return the kernel's input for per-row values [B or 1, n], and its block specification."""
        last = array.shape[-1]
        if array.shape[0] == 1:
            return whole(array)
        if by_token:
            array = jnp.pad(array, ((0, padded - count), (0, 0)))
            return array, pl.BlockSpec((tokens, last), lambda g, t: (t, 0))
        return array[:, None], pl.BlockSpec((None, 1, last), lambda g, t: (g, 0, 0))

    def per_token(last: int) -> Any:
        return pl.BlockSpec((None, tokens, last), lambda g, t: (g, t, 0))

    given = [(x, per_token(width)), (added, per_token(width))]
    if edits:
        active = jnp.stack([edit.active.astype(jnp.int32) for edit in edits], -1)
        active = jnp.swapaxes(active, 0, 1) if by_token else active
        active = jnp.pad(active, ((0, 0), (0, padded - count), (0, 0)))
        given.append((active, per_token(len(edits))))
    for edit in edits:
        given.append(per_row(edit.direction))
        given.append(per_row(jnp.stack(list(edit.coefficients), -1)))
        if edit.push is not None:
            given.append(per_row(edit.push))
    if directions is not None:
        given.append(whole(directions))
    if norm is not None:
        given.append(whole(norm.weight[None]))
    made = [(jax.ShapeDtypeStruct(x.shape, x.dtype), per_token(width))]
    if edits and by_token:
        made.append((jax.ShapeDtypeStruct((1, padded, len(edits)), jnp.int32),
                     per_token(len(edits))))
    elif edits:  # one count per block of tokens
        made.append((jax.ShapeDtypeStruct((groups, steps, 1, len(edits)), jnp.int32),
                     pl.BlockSpec((None, None, 1, len(edits)), lambda g, t: (g, t, 0, 0))))
    if directions is not None:
        made.append((jax.ShapeDtypeStruct((groups, padded, reads), F32), per_token(reads)))
    if norm is not None:
        made.append((jax.ShapeDtypeStruct(x.shape, x.dtype), per_token(width)))
    pushed = tuple(edit.push is not None for edit in edits)
    out: Iterator[jax.Array] = iter(pl.pallas_call(
        functools.partial(_kernel, pushed=pushed, reads=reads, before=before, by_token=by_token,
                          norm=None if norm is None else (norm.eps, norm.offset)),
        grid=(groups, steps), in_specs=[place for _, place in given],
        out_specs=[place for _, place in made], out_shape=[shape for shape, _ in made],
        interpret=interpret, name="residual_site")(*(array for array, _ in given)))
    h = next(out)[:, :count]
    changed = next(out) if edits else _no_counts(h)
    if edits:
        changed = changed[0, :count].T if by_token else changed[:, :, 0].sum(1).T
    return Site(h, changed, None if directions is None else next(out)[:, :count],
                None if norm is None else next(out)[:, :count])


def _kernel(*refs: Any, pushed: tuple[bool, ...], reads: int, before: int, by_token: bool,
            norm: tuple[float, float] | None) -> None:
    """Compute one block of tokens; `refs` are the inputs and outputs in the order of `_run`."""
    left = iter(refs)

    def following(present: object = True) -> Any:
        return next(left) if present else None

    x, added, active = following(), following(), following(pushed)
    edits = [(following(), following(), following(push)) for push in pushed]
    directions, weight = following(reads), following(norm)
    out, counts, read, normed = following(), following(pushed), following(reads), following(norm)

    dtype = x.dtype
    h = unedited = (x[...].astype(F32) + added[...].astype(F32)).astype(dtype).astype(F32)
    for n, (direction, coefficients, push) in enumerate(edits):
        v = direction[...]
        s, c, lo, hi = (coefficients[:, i : i + 1] for i in range(4))
        p = jnp.sum(h * v, -1, keepdims=True)
        delta = jnp.minimum(jnp.maximum(s * p - p + c, lo - p), hi - p)
        delta = jnp.where(active[:, n : n + 1] != 0, delta, 0.0)
        moved = (h + delta * (v if push is None else push[...])).astype(dtype).astype(F32)
        # keep h where δ = 0, because adding 0 would turn −0 into 0
        h = jnp.where(jnp.broadcast_to(delta, h.shape) != 0, moved, h)
        changed = jnp.where(delta != 0, 1.0, 0.0)
        if not by_token:
            changed = jnp.sum(changed, 0, keepdims=True)
        counts[:, n : n + 1] = changed.astype(jnp.int32)
    out[...] = h.astype(dtype)
    if read is not None:
        for first, last, side in ((0, before, unedited), (before, reads, h)):
            if last - first > _BY_SUMS:
                read[:, first:last] = jax.lax.dot_general(
                    side, directions[first:last, :], (((1,), (1,)), ((), ())),
                    precision=jax.lax.Precision.HIGHEST, preferred_element_type=F32)
                continue
            for k in range(first, last):
                read[:, k : k + 1] = jnp.sum(side * directions[k : k + 1, :], -1, keepdims=True)
    if norm is not None:
        normed[...] = _normed(h, weight[...].astype(F32), *norm).astype(dtype)
