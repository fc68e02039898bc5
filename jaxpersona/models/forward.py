"""The forward pass, embed → blocks → head, as a pure function of parameters and data.

`forward` supports every model family, with or without a cache, interventions and captures. A
compiled program contains only the requested operations, without hooks or run-time branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.brief import brief, shown
from jaxpersona.calls import checked_call
from jaxpersona.captures.capture import Capture, joined
from jaxpersona.captures.reading import spread_states
from jaxpersona.distributed.sharding import (
    check_set_mesh,
    gather_weight,
    mesh_of,
    of_each,
    on_cpu,
    out_sharding,
    platform,
)
from jaxpersona.errors import UserError
from jaxpersona.interventions.compose import Interventions, PreparedInterventions, prepared
from jaxpersona.interventions.fusion import Fusion
from jaxpersona.interventions.trace import Applied, Gates, Trace
from jaxpersona.kernels.attention import Asked, choose
from jaxpersona.kernels.edit import Implementation as Fused
from jaxpersona.models import blocks, nn
from jaxpersona.models.batch import VALID, Batch, check_ids
from jaxpersona.models.cache import Cache, advance, assign_slots, init_cache, kept_dtype
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import Int8
from jaxpersona.models.params import Params
from jaxpersona.models.weight import dot
from jaxpersona.runtime import is_traced

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float

Logits = Literal["all", "last"] | None


class Output(flax.struct.PyTreeNode):
    """The result of a forward pass.

    Attributes:
      logits: float32, [B, T, V] for `logits="all"`, [B, V] for `logits="last"`, otherwise None.
      carry: the state after this call, to be passed to the next call on the same rows.

    Examples:
      >>> import jaxpersona as jp
      >>> import jax
      >>> model = jp.load("mini")
      >>> out = jax.jit(jp.forward)(model.params, model.config, jp.encode(model, ["hi"]))
      >>> out.logits.shape, bool(out.finite.all())
      ((1, 10, 1024), True)
    """

    __repr__ = brief

    logits: Float[Array, "B *T V"] | Any  # None if `forward` is called with logits=None
    carry: Carry

    @property
    def captured(self) -> dict[str, Any]:
        """The state of each reading by name; its `value` is the result of the reading."""
        return self.carry.captured or {}

    @property
    def applied(self) -> tuple[Applied, ...]:
        """One `Applied` per intervention table, with counts summed over all calls so far."""
        return self.carry.applied or ()

    @property
    def cache(self) -> Cache | None:
        """The cache, including the tokens of this call; None if no cache was allocated."""
        return self.carry.cache

    @property
    def gates(self) -> Gates:
        """The state of each prompt gate, by its intervention table's index, such as "0"."""
        return self.carry.gates or {}

    @property
    def finite(self) -> Bool[Array, " B"]:
        """[B] bool: whether the final residual stream was finite (see `Carry.finite`).

        Non-finite values in an earlier block propagate to the final residual stream unless an edit
        removes them.
        """
        assert self.carry.finite is not None  # `forward` always sets this field
        return self.carry.finite


@checked_call
def forward(
    params: Params,
    config: ModelConfig,
    batch: Batch,
    *,
    interventions: Interventions | PreparedInterventions | None = None,
    capture: Capture | Sequence[Capture] | None = None,
    carry: Carry | None = None,
    slots: int | None = None,
    logits: Logits = "all",
    attention: Asked = "xla",
    residual: Fused = "xla",
) -> Output:
    """Run the model on a batch; return the logits and the state for the next call as an `Output`.

    Args:
      params: the parameters (`model.params`); the activations have the dtype of `params.like`.
      config: the model configuration (static).
      batch: B rows of T tokens, right-padded. If the carry has a cache, these tokens follow the
        tokens in the cache.
      interventions: the edits to the activations, optionally prepared by `Interventions.prepare`.
      capture: the readings of the activations, as one `Capture` or a list of them.
      carry: the state to continue from, returned by the previous call on these rows
        (`Output.carry`), or None.
      slots: the number of slots of a new cache (static), or None to allocate no cache. The dtype of
        a new cache is `cache.kept_dtype(params.like)`. `slots` must be None if the carry has a
        cache.
      logits: "all" for every token, "last" for each row's last valid token, or None to skip the
        head. None also skips layers that have no effect on the result: without a cache, those above
        the last captured or edited layer, and with a cache, those above the last cached layer.
      attention: "xla" (the reference), "cudnn" (flash attention on a GPU), "splash" (splash
        attention on a TPU) or "auto" (the platform's kernel for long batches if it is supported,
        see `kernels.attention`). Both kernels require that positions increase by one per token, as
        in a batch built by `batch`.
      residual: the implementation of the operations at the end of each block: the residual add, the
        edits at the site "residual", projection readings and the next norm. It is "xla" (the
        reference), "pallas" (one kernel on a TPU, `kernels.edit`) or "interpret" (the same kernel,
        emulated on any device for tests). Edits at other sites and other readings always use XLA.
        The kernel supports only rank-one edits and is not differentiable.

    Most functions of this package disable JAX's debugging flags and transfer guard; `forward` does
    not. With `jax_debug_nans`, a capture with NaN for unselected tokens therefore raises an error.

    Raises:
      UserError: an argument has the wrong type, interventions or captures do not match the model or
        the batch, the number of rows is not a multiple of the number of batch shards, T is larger
        than the number of slots, the cache has too few layers, a row has more tokens than free
        slots, a token id is outside the embedding, a gate with `within=True` is used on a chunked
        prompt, the carry does not match the batch, the readings, the intervention tables or the
        gates, `slots` is combined with a carry that has a cache, a kernel does not support the
        platform or the arguments, or the mesh set by `jax.set_mesh` differs from the mesh of the
        parameters. Under `jax.jit`, a lack of free slots and invalid token ids are not detected and
        give NaN.

    Examples:
      >>> import jaxpersona as jp
      >>> import jax
      >>> model = jp.load("mini")
      >>> run = jax.jit(jp.forward)  # a pure function
      >>> run(model.params, model.config, jp.encode(model, ["hi"])).logits.shape  # [B, T, V]
      (1, 10, 1024)
    """
    _check_arguments(params, batch, carry)
    capture = joined(capture)
    rows, width = batch.tokens.shape
    _check_ids(batch.tokens, config)
    like = params.like
    check_set_mesh(like)
    edits = prepared(interventions, layers=config.n_layers, width=config.d_model, rows=rows,
                     like=like)
    if batch.chunk and any(e.gate is not None and e.gate.within for e in edits.edits):
        raise UserError("a gate with within=True needs the whole prompt in one call; disable "
                        "chunked prefill, or use within=False")
    carry = Carry() if carry is None else carry
    cache = carry.cache
    if cache is not None and slots is not None:
        raise UserError("carry has a cache, but slots is also set; give either a carry with a "
                        "cache, to continue it, or slots, to allocate a new cache")
    _check_carry(carry, edits, rows)
    capacity = slots if cache is None else cache.slots
    if capacity is not None and width > capacity:
        raise UserError(f"the batch has {width} tokens per row, including padding, but the cache "
                        f"has {capacity} slots; use a larger cache")
    batch = batch.spread(like)
    dtype = like.dtype
    chosen = choose(config, attention, dtype=dtype, tokens=width, fresh=cache is None,
                    sharded=mesh_of(like) is not None, platform=platform(like))
    if slots is not None:
        cache = init_cache(config, rows, slots, kept_dtype(like))
    cache = None if cache is None else cache.spread(like)
    if slots is None and cache is not None:
        _check_room(cache, batch)
    token_slots = assign_slots(cache, batch)
    start: Any = None if cache is None else cache.next  # each row's first free slot before the call
    state = carry.captured
    if state is None and capture is not None:
        state = capture.init(config, rows, width if cache is None else cache.slots)
        state = spread_states(state, like)
    trace = Trace(config, batch, edits, capture if capture is not None else Capture(), carry.gates,
                  start, Fusion(residual, platform(like)))
    if cache is None:
        positions = jnp.where(batch.valid, batch.position, -1)
    else:
        cache = advance(cache, batch, token_slots)
        positions = cache.position
    # False at tokens whose id is outside the embedding or for which the cache has no free slot
    known = (batch.tokens >= 0) & (batch.tokens < params.embed_vd.shape[0])
    if cache is not None and slots is None:
        known &= token_slots < cache.slots
    angles = {
        rope: nn.rotary(batch.position, rope, config.head_dim)
        for rope in {config.rope_at(i) for i in range(config.n_layers)}
    }
    x, normed = embed(params, config, batch), None
    attend, transform = blocks.parts(config, chosen)
    keys, values = [], []
    needed = config.n_layers if logits is not None else (
        trace.highest + 1 if cache is None else len(cache.k))
    if cache is not None and len(cache.k) < max(needed, trace.highest + 1):
        raise UserError(f"the number of layers of the cache is {len(cache.k)}, but this call needs "
                        f"{max(needed, trace.highest + 1)}; allocate a cache with `init_cache`")
    layers = params.layers[:needed]
    for i, layer in enumerate(layers):
        with jax.named_scope(f"layer{i}"):
            held = None if cache is None else (cache.k[i], cache.v[i])
            out, held = attend(layer, x, angles[config.rope_at(i)], batch, positions, token_slots,
                               held, known | ~batch.valid if i == 0 else None, normed,
                               window=config.windows[i])
            x = nn.round_residual(x + trace.visit("attention", i, out))
            added = trace.visit("mlp", i, transform(layer, x))
            following = layers[i + 1].attn_norm_d if i + 1 < needed else None
            x, normed = trace.finish(i, x, added, following)
            if held is not None:
                keys.append(held[0])
                values.append(held[1])
    if cache is not None:
        cache = cache.replace(k=tuple(keys), v=tuple(values))
    applied, finite = trace.applied(), _finite(x, batch)
    if carry.applied is not None:
        applied = jax.tree.map(jnp.add, carry.applied, applied)
    if carry.finite is not None:
        finite = carry.finite & finite
    return Output(
        logits=head(params, config, x, batch, logits),
        carry=Carry(cache=cache, captured=trace.captured(state, token_slots), applied=applied,
                    gates=trace.gates, finite=finite),
    )


def _check_arguments(params: Any, batch: Any, carry: Any) -> None:
    """Check the types of `params`, `batch` and `carry`.

    Raises:
      UserError: params is a `Model`, batch is not a `Batch`, or carry is not a `Carry`.
    """
    if hasattr(params, "params"):
        raise UserError(f"params is of type {type(params).__name__}; pass model.params")
    if not isinstance(batch, Batch):
        raise UserError(f"batch is {shown(batch, 60)}; give the result of jp.encode or jp.batch")
    if carry is not None and not isinstance(carry, Carry):
        raise UserError(f"carry is of type {type(carry).__name__}; give the carry of a previous "
                        "call (`out.carry`), or jp.Carry(cache=cache)")


def _check_carry(carry: Carry, edits: PreparedInterventions, rows: int) -> None:
    """Check that a carry matches the interventions and the number of rows.

    Raises:
      UserError: the cache has a different number of rows, or `carry.applied` belongs to different
        intervention tables or layers.
    """
    if carry.cache is not None and carry.cache.next.shape[0] != rows:
        raise UserError(f"the number of rows is {carry.cache.next.shape[0]} in the carry's cache "
                        f"and {rows} in the batch; continue with the same rows")
    if carry.applied is not None:
        counted = [table.changed.shape[0] for table in carry.applied]
        layers = [len(edit.layers) for edit in edits.edits]
        if counted != layers:
            raise UserError("carry.applied has counts for intervention tables with the numbers of "
                            f"layers {counted}, but the tables of this call have {layers}; "
                            "continue with the interventions of the previous call, or reset the "
                            "counts with carry.replace(applied=None)")


def _check_ids(tokens: Any, config: ModelConfig) -> None:
    """Check that token ids are in the vocabulary.

    Ids that are traced or not fully addressable (partly on other hosts) are not checked.

    Raises:
      UserError: an id is outside the vocabulary.
    """
    if is_traced(tokens):
        return
    if isinstance(tokens, jax.Array):
        if not tokens.is_fully_addressable:
            return
        tokens = jax.device_get(tokens)
    check_ids(np.asarray(tokens), config.vocab_size, "the batch")


def _check_room(cache: Cache, batch: Batch) -> None:
    """Check that each row has enough free slots.

    Arrays that are traced or not fully addressable (partly on other hosts) are not checked.

    Raises:
      UserError: a row has more valid tokens than free slots.
    """
    arrays = cache.next, batch.kind
    if any(is_traced(x) or not getattr(x, "is_fully_addressable", True)
           for x in arrays):
        return
    used, kind = jax.device_get(arrays)
    wanted = np.asarray(used) + ((np.asarray(kind) & VALID) != 0).sum(-1)
    if (wanted > cache.slots).any():
        row = int(np.argmax(wanted > cache.slots))
        raise UserError(f"row {row} of the batch needs {int(wanted[row])} slots, including those "
                        f"of earlier tokens, but the cache has {cache.slots}; allocate a larger "
                        "cache (`init_cache`)")


def _finite(x: jax.Array, batch: Batch) -> jax.Array:
    """Return [B] bool: whether ‖x‖² is finite at every valid token, for activations x [B, T, D]."""
    wide = x.astype(jnp.float32)
    return (jnp.isfinite((wide * wide).sum(-1)) | ~batch.valid).all(-1)


def embed(params: Params, config: ModelConfig, batch: Batch) -> jax.Array:
    """Return the token embeddings [B, T, D], multiplied by `config.embed_scale`."""
    table, tokens = params.embed_vd, batch.tokens
    # out-of-range ids are clipped; the first norm (in `blocks.attend`) returns NaN for their tokens
    if isinstance(table, Int8):
        x = table.take(tokens, params.like.dtype)
    else:
        table = gather_weight(table)
        narrow = table.dtype != jnp.float32 and is_traced(table)
        if narrow and on_cpu(table):
            # without the barrier, XLA would convert the whole embedding to float32 before a loop
            table, tokens = jax.lax.optimization_barrier((table, tokens))
        placed = out_sharding(("batch", None, None), table)
        x = table.at[tokens].get(mode="clip", wrap_negative_indices=False, out_sharding=placed)
    if config.embed_scale != 1.0:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    return x


def head(params: Params, config: ModelConfig, x: jax.Array, batch: Batch,
         which: Logits) -> jax.Array | None:
    """Return the float32 logits for the final residual stream x [B, T, D].

    The logits are [B, T, V] if `which` is "all" and [B, V] if it is "last"; the result is None if
    `which` is None. The logits are NaN where the residual stream or its sum of squares is not
    finite, and where a soft-cap would make an infinite logit finite.
    """
    if which is None:
        return None
    with jax.named_scope("head"):
        if which == "last":
            x = of_each(x, jnp.maximum(batch.length - 1, 0)[:, None])
        # without `overflow_to_nan`, logits would be 0 where the sum of squares overflows
        x = nn.rms_norm(x, params.final_norm_d, config.norm_eps, config.norm_offset,
                        overflow_to_nan=True)
        weight = params.embed_vd if params.head_vd is None else params.head_vd
        out = dot(x, weight, dtype=jnp.float32)
        if config.final_softcap is not None:
            capped = config.final_softcap * jnp.tanh(out / config.final_softcap)
            out = jnp.where(jnp.isfinite(out), capped, jnp.nan)  # tanh maps infinity to 1
        return out[:, 0] if which == "last" else out
