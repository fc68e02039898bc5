"""What a model is: every number that shapes its program, and what that costs.

A `ModelConfig` is frozen, hashable and static under `jax.jit`. A family's difference is a *field*
here, never a branch on a name elsewhere, so one forward serves every family.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

import jax

Activation = Literal["silu", "gelu_tanh"]
# What `ModelConfig.hash` covers, version 1. Hashes are stored in files, so this list never changes:
# a field added later enters a hash only where its value is not the default.
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
MAX_LAYERS = 1024  # more than any model has; a file that says more is damaged


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base, and how its frequencies are stretched.

    kind "default" uses `theta` alone; "linear" divides every frequency by `factor`; "llama3"
    divides the low ones by `factor` and blends between the two wave-length bounds.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only language model.

    Attributes:
      family: the row of `families.FAMILIES` that the configuration was read by.
      d_model, d_ff, n_layers, n_heads, n_kv_heads, head_dim, vocab_size: D, F, L, N, K, H, V.
      attn_scale: what q·k is multiplied by (1/√H in most families).
      windows: for each layer the number of positions a query sees, or None for all.
      rope_local: the rotary embedding of layers with a window, where it is another one.
      norm_offset: 1 where a norm multiplies by (1 + weight), else 0.
      post_norms: whether attention and MLP outputs are normed before they are added.
      max_context: the longest sequence that the model was made for, in tokens.
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
                raise ValueError(f"{field} is {value!r}; it must be a positive integer")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads is {self.n_kv_heads}; it must divide n_heads ({self.n_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")
        if len(self.windows) != self.n_layers:
            raise ValueError(
                f"windows has {len(self.windows)} entries; it needs one a layer ({self.n_layers})"
            )

    def rope_at(self, layer: int) -> Rope:
        """Return the rotary embedding of `layer`."""
        local = self.rope_local is not None and self.windows[layer] is not None
        return self.rope_local if local else self.rope  # pyright: ignore[reportReturnType]

    def hash(self) -> str:
        """Return eight hexadecimal digits that change with the value of any field.

        A field that is added to the class later, with a default, changes no existing hash.
        """
        text = json.dumps(_hashed(self, "ModelConfig"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def parameters(self) -> int:
        """Count the parameters; a tied head is counted once."""
        d, f, n, k, h = self.d_model, self.d_ff, self.n_heads, self.n_kv_heads, self.head_dim
        attention = 2 * n * h * d + 2 * k * h * d
        attention += self.qkv_bias * (n + 2 * k) * h + self.o_bias * d + self.qk_norm * 2 * h
        mlp = 3 * d * f + self.mlp_bias * (2 * f + d)
        norms = (4 if self.post_norms else 2) * d
        heads = 1 if self.tied_embeddings else 2
        return self.n_layers * (attention + mlp + norms) + d + heads * self.vocab_size * d

    def bytes(self, itemsize: int = 2) -> int:
        """Return the size of the parameters in bytes."""
        return self.parameters * itemsize

    def step_bytes(self, itemsize: int = 2) -> int:
        """Return the weight bytes that one decode step reads: all but an untied input embedding."""
        untied = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        return (self.parameters - untied) * itemsize

    def cache_bytes(self, length: int, itemsize: int = 2) -> int:
        """Return the bytes of keys and values that one row of `length` tokens attends to."""
        seen = sum(min(length, w) if w else length for w in self.windows)
        return 2 * self.n_kv_heads * self.head_dim * itemsize * seen

    def prefill_flops(self, length: int, *, head: bool = False) -> int:
        """Return the floating-point operations of one row of `length` tokens.

        2·P·T + 2·L·N·H·T², the attention term halved by causality; P leaves the embeddings out.
        """
        heads = 1 if self.tied_embeddings else 2
        dense = self.parameters - heads * self.vocab_size * self.d_model
        attention = 2 * self.n_layers * self.n_heads * self.head_dim * length * length
        return 2 * dense * length + attention + head * 2 * self.vocab_size * self.d_model * length


def _hashed(value: Any, kind: str) -> dict[str, Any]:
    """Return the fields of a dataclass that its hash covers."""
    found = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.name in _HASHED[kind] or item != field.default:
            found[field.name] = _hashed(item, "Rope") if isinstance(item, Rope) else item
    return found


def replace(config: ModelConfig, **changes: Any) -> ModelConfig:
    """Return `config` with some fields changed (`windows` follows a new `n_layers`)."""
    if "n_layers" in changes and "windows" not in changes:
        n = changes["n_layers"]
        if len(set(config.windows)) == 1:
            changes["windows"] = config.windows[:1] * n
        else:
            changes["windows"] = (config.windows * (n // config.n_layers + 1))[:n]
    return dataclasses.replace(config, **changes)
