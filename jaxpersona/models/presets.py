"""Configurations of released models by name, for randomly initialized models and planning."""

from __future__ import annotations

from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.models.config import ModelConfig, Rope

_LLAMA3 = Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
_LLAMA32 = Rope(500_000.0, "llama3", 32.0, 1.0, 4.0, 8192)


def _llama(d: int, layers: int, heads: int, ff: int, *, h: int = 128, tied: bool = False,
           rope: Rope = _LLAMA3) -> ModelConfig:
    return ModelConfig("llama", 128_256, d, layers, heads, 8, h, ff, 1e-5, 131_072, rope,
                       h**-0.5, tied, (None,) * layers)


def _qwen3(d: int, layers: int, heads: int, ff: int, *, tied: bool = False) -> ModelConfig:
    return ModelConfig("qwen3", 151_936, d, layers, heads, 8, 128, ff, 1e-6, 40_960,
                       Rope(1_000_000.0), 128**-0.5, tied, (None,) * layers, qk_norm=True)


def _qwen2(d: int, layers: int, heads: int, kv: int, ff: int, *, vocab: int = 152_064,
           tied: bool = False) -> ModelConfig:
    h = d // heads
    return ModelConfig("qwen2", vocab, d, layers, heads, kv, h, ff, 1e-6, 32_768,
                       Rope(1_000_000.0), h**-0.5, tied, (None,) * layers, qkv_bias=True)


def _gemma2(d: int, layers: int, heads: int, kv: int, h: int, ff: int, scalar: int) -> ModelConfig:
    windows = tuple(4096 if i % 2 == 0 else None for i in range(layers))
    return ModelConfig("gemma2", 256_000, d, layers, heads, kv, h, ff, 1e-6, 8192, Rope(10_000.0),
                       scalar**-0.5, True, windows, activation="gelu_tanh", norm_offset=1.0,
                       post_norms=True, embed_scale=d**0.5, attn_softcap=50.0, final_softcap=30.0)


PRESETS: dict[str, ModelConfig] = {
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, h=64, tied=True, rope=_LLAMA32),
    "llama-3.2-3b": _llama(3072, 28, 24, 8192, tied=True, rope=_LLAMA32),
    "llama-3.1-8b": _llama(4096, 32, 32, 14_336),
    "llama-3.3-70b": _llama(8192, 80, 64, 28_672),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, vocab=151_936, tied=True),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, vocab=151_936, tied=True),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18_944),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 256, 9216, 256),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 256, 14_336, 256),
    "gemma-2-27b": _gemma2(4608, 46, 32, 16, 128, 36_864, 144),
    # the configuration of "mini", the small model that is included in this package
    "qwen3-mini": ModelConfig("qwen3", 1024, 128, 8, 4, 2, 32, 384, 1e-6, 1024, Rope(10_000.0),
                              32**-0.5, True, (None,) * 8, qk_norm=True),
}


@checked_call
def preset(name: str) -> ModelConfig:
    """Return the configuration of a preset.

    Raises:
      UserError: the preset is unknown; the message lists the known presets.

    Examples:
      >>> import jaxpersona as jp
      >>> jp.preset("qwen3-8b").n_layers
      36
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
