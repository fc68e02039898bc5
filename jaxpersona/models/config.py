"""Model configuration, with parameter, memory and FLOP counts.

A `ModelConfig` is frozen, hashable and static under `jax.jit`. Model families differ only in the
values of the fields, so `forward` supports every family without branching on the family's name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import jax

from jaxpersona.brief import line, shown
from jaxpersona.errors import UserError

Activation = Literal["silu", "gelu_tanh"]
# The fields that `ModelConfig.hash` always covers. Hashes are stored in files, so this list must
# not change. A field added later is hashed only if its value differs from its default.
_HASHED = {
    "ModelConfig": frozenset("""
        family vocab_size d_model n_layers n_heads n_kv_heads head_dim d_ff norm_eps max_context
        rope attn_scale tied_embeddings windows rope_local activation qk_norm qkv_bias o_bias
        mlp_bias norm_offset post_norms embed_scale attn_softcap final_softcap
    """.split()),
    "Rope": frozenset("""
        theta kind factor low_freq_factor high_freq_factor original_context
    """.split()),
}
MAX_LAYERS = 1024  # more than in any released model; a larger number indicates a damaged file


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: the base and the scaling of its frequencies.

    The kind "default" uses only the base `theta`, and "linear" divides every frequency by `factor`.
    The kind "llama3" divides low frequencies, whose wavelength in positions is above
    `original_context / low_freq_factor`, by `factor`. It leaves high frequencies, whose wavelength
    is below `original_context / high_freq_factor`, unchanged, and interpolates in between.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"low_freq_factor is {self.low_freq_factor} and high_freq_factor is "
                            f"{self.high_freq_factor}; the first must be smaller")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configuration of a decoder-only language model.

    Attributes:
      family: the model family, a key of `families.FAMILIES`.
      d_model, d_ff, n_layers, n_heads, n_kv_heads, head_dim, vocab_size: the sizes D, F, L, N, K,
        H and V in array shapes, in this order.
      rope: the rotary embedding of all layers or, if `rope_local` is set, of full-attention layers.
      attn_scale: the factor applied to q·k (1/√H in most families).
      tied_embeddings: whether the output head shares the weight of the token embedding.
      windows: for each layer, the sliding-window size in positions, or None for full attention.
      rope_local: the rotary embedding of sliding-window layers, or None to use `rope`.
      activation: the activation function of the gated MLP.
      qk_norm: whether queries and keys are normalized before the rotary embedding.
      qkv_bias, o_bias, mlp_bias: whether the q, k and v projections, the attention output
        projection and the MLP projections have biases.
      norm_offset: 1 if norms multiply by (1 + weight), 0 if they multiply by the weight.
      norm_eps: the ε of all norms.
      post_norms: whether attention and MLP outputs are normalized before the residual add.
      embed_scale: the factor applied to the token embeddings.
      attn_softcap, final_softcap: the soft-cap of the attention scores and the soft-cap of the
        logits; None for no soft-cap.
      max_context: the model's maximum sequence length in tokens.

    Raises:
      UserError: a size or `max_context` is not a positive integer, `n_heads` is not a multiple of
        `n_kv_heads`, `head_dim` is odd, or the length of `windows` is not `n_layers`.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.load("mini").config.n_heads
      4
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    norm_eps: float
    max_context: int
    rope: Rope
    attn_scale: float
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    rope_local: Rope | None = None
    activation: Activation = "silu"
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    embed_scale: float = 1.0
    attn_softcap: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        for field in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                      "d_ff", "max_context"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{field} is {shown(value)}; it must be a positive integer")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads ({self.n_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}; it must be even for rotary embeddings")
        if len(self.windows) != self.n_layers:
            raise UserError(
                f"windows has length {len(self.windows)}; its length must be n_layers "
                f"({self.n_layers})"
            )

    def __repr__(self) -> str:
        return line("ModelConfig", self.family, f"{self.n_layers} layers × {self.d_model}",
                    f"heads {self.n_heads}", f"key/value heads {self.n_kv_heads}",
                    f"vocabulary {self.vocab_size}", f"context {self.max_context}")

    def rope_at(self, layer: int) -> Rope:
        """Return the rotary embedding of `layer`."""
        if self.rope_local is not None and self.windows[layer] is not None:
            return self.rope_local
        return self.rope

    def hash(self) -> str:
        """Return an eight-digit hexadecimal hash of all fields.

        Adding a field with a default value to the class does not change existing hashes.
        """
        text = json.dumps(_hashed(self, "ModelConfig"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def parameters(self) -> int:
        """The number of parameters; tied embeddings are counted once."""
        d, f, n, k, h = self.d_model, self.d_ff, self.n_heads, self.n_kv_heads, self.head_dim
        attention = 2 * n * h * d + 2 * k * h * d
        attention += self.qkv_bias * (n + 2 * k) * h + self.o_bias * d + self.qk_norm * 2 * h
        mlp = 3 * d * f + self.mlp_bias * (2 * f + d)
        norms = (4 if self.post_norms else 2) * d
        heads = 1 if self.tied_embeddings else 2
        return self.n_layers * (attention + mlp + norms) + d + heads * self.vocab_size * d

    def bytes(self, itemsize: int = 2) -> int:
        """Return the size of the parameters in bytes, with `itemsize` bytes per parameter."""
        return self.parameters * itemsize

    def step_bytes(self, itemsize: int = 2) -> int:
        """Return the number of weight bytes read per decode step.

        An input embedding that is not tied to the output head is excluded, because a step reads
        only one of its rows per token.
        """
        untied = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        return (self.parameters - untied) * itemsize

    def cache_bytes(self, length: int, itemsize: int = 2) -> int:
        """Return the number of KV cache bytes read per decode step for a row of `length` tokens."""
        seen = sum(min(length, w) if w else length for w in self.windows)
        return 2 * self.n_kv_heads * self.head_dim * itemsize * seen

    def prefill_flops(self, length: int, *, head: bool = False) -> int:
        """Return the number of floating-point operations to prefill one row of `length` tokens.

        The count is 2·P·T + 2·L·N·H·T² for T = `length`, where P is the number of parameters
        without the embedding and the output head. The attention term includes a factor 1/2 for
        causal masking and ignores sliding windows. With `head`, the count includes the logits of
        every token.
        """
        heads = 1 if self.tied_embeddings else 2
        dense = self.parameters - heads * self.vocab_size * self.d_model
        attention = 2 * self.n_layers * self.n_heads * self.head_dim * length * length
        return 2 * dense * length + attention + head * 2 * self.vocab_size * self.d_model * length


def _hashed(value: Any, kind: str) -> dict[str, Any]:
    """Return the fields that a dataclass's hash covers, as name → value; `kind` is the class."""
    covered = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.name in _HASHED[kind] or item != field.default:
            covered[field.name] = _hashed(item, "Rope") if isinstance(item, Rope) else item
    return covered


def replace(config: ModelConfig, **changes: Any) -> ModelConfig:
    """Return a copy of `config` with the fields in `changes` replaced.

    If `changes` contains `n_layers` but not `windows`, `windows` is repeated or truncated to the
    new number of layers.
    """
    if "n_layers" in changes and "windows" not in changes:
        n = changes["n_layers"]
        if len(set(config.windows)) == 1:
            changes["windows"] = config.windows[:1] * n
        else:
            changes["windows"] = (config.windows * (n // config.n_layers + 1))[:n]
    return dataclasses.replace(config, **changes)
