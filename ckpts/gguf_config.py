"""Convert GGUF metadata to a `ModelConfig`, following the conventions of llama.cpp."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpersona.errors import UserError
from jaxpersona.models.config import MAX_LAYERS, ModelConfig, Rope
from jaxpersona.models.families import FAMILIES, from_hf
from jaxpersona.models.nn import rope_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
GEMMA = ("gemma2", "gemma3")
# layer counts of the 27B models, whose query_pre_attn_scalar is hidden_size / num_attention_heads
_27B = {"gemma2": 46, "gemma3": 62}
# keys with the prefix "<architecture>." that are read or checked here, or that have no effect
_KNOWN = frozenset("""
    block_count embedding_length feed_forward_length context_length vocab_size
    attention.head_count attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon attention.sliding_window attention.sliding_window_pattern
    attention.scale attention.causal attn_logit_softcapping final_logit_softcapping
    rope.freq_base rope.freq_base_swa rope.dimension_count rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.finetuned rope.scale_linear
    expert_count expert_used_count use_parallel_residual tensor_data_layout
""".split())
# unsupported keys, each with its only accepted value, which does not change the computation
_UNSUPPORTED = {"expert_count": 0, "use_parallel_residual": False, "attention.causal": True,
                "logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0,
                "attention.clamp_kqv": 0.0, "attention.max_alibi_bias": 0.0}
# sampling settings that `generate` does not support, each with the value that has no effect
_SAMPLING = {"top_k": 0, "min_p": 0.0, "xtc_probability": 0.0, "penalty_repeat": 1.0, "mirostat": 0}


def check_architecture(name: str) -> None:
    """Raise UserError unless the architecture is supported."""
    if name not in ARCHITECTURES:
        raise UserError(f"architecture is {name!r:.80}; it must be one of "
                        f"{', '.join(ARCHITECTURES)} (Mistral models have architecture 'llama')")


def warn_sampling(fields: Mapping[str, Any], place: str) -> None:
    """Warn once about sampling settings that `generate` does not support.

    Args:
      fields: the metadata; the keys of sampling settings begin with "general.sampling.".
      place: the file's path, for the warning.
    """
    def has_effect(value: Any, neutral: float) -> bool:
        if type(value) not in (int, float, bool):
            return value is not None
        return value > 0 if neutral == 0 else value != neutral

    def shown(value: Any) -> str:  # a float32 as its shortest decimal
        with np.errstate(all="ignore"):
            return str(np.float32(value)) if type(value) is float else reprlib.repr(value)

    settings = {key: fields.get(f"general.sampling.{key}") for key in _SAMPLING}
    listed = [f"{key}={shown(value)}"
              for key, value in settings.items() if has_effect(value, _SAMPLING[key])]
    if listed:
        warnings.warn(f"{place}: ignored {', '.join(listed)}, which generate does not support; "
                      "replies may differ from those of llama.cpp", stacklevel=2)


class _Metadata:
    """Typed access to the metadata fields whose keys begin with "<architecture>."."""

    def __init__(self, fields: Mapping[str, Any], architecture: str) -> None:
        self._fields, self._prefix = fields, architecture + "."

    def get(self, key: str) -> Any:
        return self._fields.get(self._prefix + key)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise UserError(f"field {self._prefix}{key} is missing")
        if type(value) is not int or not 0 < value < 2**31:
            raise UserError(f"{self._prefix}{key} is {reprlib.repr(value)}; it must be a positive "
                            "integer below 2³¹")
        return value

    def real(self, key: str) -> float | None:
        """Return a float32 field as the shortest decimal that rounds to it, or None if missing."""
        value = self.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not -3e38 < value < 3e38:
            raise UserError(f"{self._prefix}{key} is {reprlib.repr(value)}; it must be a finite "
                            "number")
        return float(str(np.float32(value)))

    def unknown(self) -> list[str]:
        return sorted(key for key in self._fields if key.startswith(self._prefix)
                      and key.removeprefix(self._prefix) not in _KNOWN)


def to_config(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
              rope_divisors: np.ndarray | None, place: str) -> ModelConfig:
    """Convert the metadata of a GGUF model to a `ModelConfig`.

    Unknown fields whose keys begin with "<architecture>." are ignored with a warning.

    Args:
      fields: the metadata, including `general.architecture`.
      shapes: the shapes of the tensors, by GGUF name.
      rope_divisors: [head_dim / 2] float32, the divisors of the rotary frequencies (the tensor
        `rope_freqs.weight`), or None if the file has no such tensor.
      place: the file's name, for warnings.

    Raises:
      UserError: a field or tensor is missing, malformed or not supported; the message names it.
    """
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str):
        raise UserError("field general.architecture is missing")
    check_architecture(architecture)
    data = _Metadata(fields, architecture)
    for key, neutral in _UNSUPPORTED.items():
        value = data.get(key)
        if value is not None and (type(value) not in (int, float, bool) or value != neutral):
            raise UserError(f"{architecture}.{key} is {reprlib.repr(value)}; this value is not "
                            "supported")
    if unknown := [key for key in data.unknown()
                   if key.removeprefix(architecture + ".") not in _UNSUPPORTED]:
        warnings.warn(f"{place}: ignored unknown fields {reprlib.repr(unknown)}", UserWarning,
                      stacklevel=4)
    embedding = shapes.get("token_embd.weight")
    if embedding is None:
        raise UserError("tensor token_embd.weight is missing")
    if len(embedding) != 2:
        raise UserError(f"token_embd.weight has shape {list(embedding)}; it must be [vocab_size, "
                        "hidden_size]")
    width, heads = data.integer("embedding_length"), data.integer("attention.head_count")
    layers = data.integer("block_count")
    if layers > MAX_LAYERS:
        raise UserError(f"{architecture}.block_count is {layers}; the maximum is {MAX_LAYERS}")
    head_dim = data.integer("attention.key_length", max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if data.integer(key, head_dim) != head_dim:
            raise UserError(f"{architecture}.{key} is {data.get(key)}; it must equal the head "
                            f"dimension ({head_dim})")
    family = FAMILIES["mistral" if _is_mistral(fields, data) else architecture]
    theta = data.real("rope.freq_base") or 10_000.0
    if not 1 <= theta <= 1e12:
        raise UserError(f"{architecture}.rope.freq_base is {theta}; it must be between 1 and 1e12")
    raw: dict[str, Any] = {
        "architectures": [family.architecture], "vocab_size": embedding[0], "hidden_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": data.integer("attention.head_count_kv", heads),
        "intermediate_size": data.integer("feed_forward_length"),
        "rms_norm_eps": data.real("attention.layer_norm_rms_epsilon") or 1e-6,
        "max_position_embeddings": data.integer("context_length"),
        "rope_theta": theta, "rope_scaling": _scaling(data),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if rope_divisors is not None:
        if raw["rope_scaling"] is not None:
            raise UserError("the model has both rope_freqs.weight and rope.scaling; only one of "
                            "them is supported")
        raw["rope_scaling"] = _llama3(rope_divisors, theta, head_dim)
    if family.name in ("llama", "qwen3", *GEMMA):
        raw["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if "mlp_bias" in family.fields:
        raw["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    raw |= _windows(data, family.name, layers)
    if architecture in GEMMA:
        raw |= _gemma(data, architecture, width, heads, layers, head_dim)
    return from_hf(raw, place=place)


def _is_mistral(fields: Mapping[str, Any], data: _Metadata) -> bool:
    """Return whether a file of architecture "llama" contains a Mistral model.

    The families Llama and Mistral differ only in the sliding window, but the family is part of the
    fingerprint, so this function must distinguish the two.
    """
    if fields["general.architecture"] != "llama":
        return False
    names = [str(fields.get(f"general.{key}", "")) for key in ("name", "basename")]
    return data.get("attention.sliding_window") is not None or any(
        "mistral" in name.lower() for name in names)


def _scaling(data: _Metadata) -> dict[str, Any] | None:
    """Return the config.json field `rope_scaling`, or None if the frequencies are not scaled."""
    kind, factor = data.get("rope.scaling.type"), data.real("rope.scaling.factor")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"rope.scaling.type is {reprlib.repr(kind)}; it must be a string")
    if factor is None:
        factor = data.real("rope.scale_linear")
    kind = str(kind or ("linear" if factor not in (None, 1.0) else "none"))
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": 1.0 if factor is None else factor}
    raise UserError(f"rope.scaling.type is {kind!r:.80}; it must be 'none' or 'linear' (Llama 3's "
                    "scaling is read from the tensor rope_freqs.weight)")


def _llama3(divisors: np.ndarray, theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return the config.json field `rope_scaling` of type "llama3" that gives these divisors.

    Multiplying `original_max_position_embeddings` and both frequency factors by the same number
    does not change the divisors. `low_freq_factor` is therefore set to 1, as in all released
    models. The result is None if all divisors are 1.
    """
    divisors = np.asarray(divisors, np.float64)
    if divisors.shape != (head_dim // 2,) or not (np.isfinite(divisors) & (divisors > 0)).all():
        raise UserError(f"rope_freqs.weight must contain {head_dim // 2} positive numbers")
    if head_dim % 2 or np.allclose(divisors, 1, rtol=1e-6):
        return None  # `ModelConfig` rejects an odd head dimension
    factor = float(str(np.float32(divisors.max())))
    if not 1 < factor < 1e6:
        raise UserError(f"rope_freqs.weight has a maximum of {factor:g}; it must be above 1 and "
                        "below a million")
    wave = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    blend = (1 / divisors - 1 / factor) / (1 - 1 / factor)  # 1: unscaled, 0: divided by `factor`
    inside = (blend > 1e-4) & (blend < 1 - 1e-4)
    candidates = [(4.0, 8192.0)]
    candidates += [(4.0, float((3 * s + 1) * w))
                   for s, w in zip(blend[inside], wave[inside], strict=True)]
    if inside.sum() >= 2:  # blend = (context / wave − 1) / (high − 1) is linear in 1 / wave
        (w, *_, v), (s, *_, t) = 1 / wave[inside], blend[inside]
        slope = (t - s) / (v - w)
        offset = s - slope * w
        if offset < 0:
            candidates.append((1 - 1 / offset, -slope / offset))
    elif not inside.any() and (blend >= 0.5).any():
        candidates.append((4.0, 4 * float(wave[blend >= 0.5].max())))
    plain = rope_frequencies(Rope(theta), head_dim)
    for high, context in candidates:
        if not 1 <= context < 2**31:
            continue
        high = round(high, 4)
        rope = Rope(theta, "llama3", factor, 1.0, high, max(round(context), 1))
        if high > 1 and np.allclose(plain / rope_frequencies(rope, head_dim), divisors, rtol=1e-5):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": rope.original_context}
    raise UserError("rope_freqs.weight does not match Llama 3's scaling; other scalings are not "
                    "supported")


def _windows(data: _Metadata, family: str, layers: int) -> dict[str, Any]:
    """Return the config.json fields that configure sliding windows, such as `layer_types`."""
    if family == "llama":
        return {}
    pattern = data.get("attention.sliding_window_pattern")
    if data.get("attention.sliding_window") is None and family != "gemma2":
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    window = data.integer("attention.sliding_window", 4096)
    period = {"gemma2": 2, "gemma3": 6}.get(family)
    if pattern is not None and not isinstance(pattern, np.ndarray):
        period = data.integer("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if len(pattern) != layers:
            raise UserError(f"attention.sliding_window_pattern has length {len(pattern)}; it must "
                            f"have one entry per layer ({layers})")
        sliding = [bool(value) for value in pattern]
    elif period is not None:
        sliding = [bool((i + 1) % period) for i in range(layers)]
    elif family == "mistral":
        sliding = [True] * layers
    else:
        raise UserError(f"attention.sliding_window is {window} without "
                        "attention.sliding_window_pattern, so the layers with a window are unknown")
    raw: dict[str, Any] = {"sliding_window": window, "layer_types": [
        "sliding_attention" if one else "full_attention" for one in sliding]}
    return raw | ({"use_sliding_window": any(sliding)} if family.startswith("qwen") else {})


def _gemma(data: _Metadata, architecture: str, width: int, heads: int, layers: int,
           head_dim: int) -> dict[str, Any]:
    """Return the config.json fields that only Gemma 2 and 3 have."""
    scale = data.real("attention.scale")
    if scale is not None and scale > 0:
        scalar = scale**-2
    else:  # as in llama.cpp, the number of layers determines a missing scale
        scalar = width / heads if layers == _27B[architecture] else head_dim
    raw: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = data.real(key)
        if value is not None:
            raw[key] = value or None
    if architecture == "gemma3" and data.get("rope.freq_base_swa") is not None:
        raw["rope_local_base_freq"] = data.real("rope.freq_base_swa")
    return raw
