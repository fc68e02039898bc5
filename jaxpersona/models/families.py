"""Model families, and conversion of Hugging Face configurations to and from `ModelConfig`.

To add a family, add an entry to `FAMILIES` with the architecture name, the fields of `config.json`
and their conversion to `ModelConfig`. An unsupported field that changes the computation raises an
error, because ignoring the field would silently change the model's outputs. Other keys that the
family does not read are ignored, with a warning if they are unknown (see `family_keys`).
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.models.config import MAX_LAYERS, ModelConfig, Rope
from jaxpersona.models.family_keys import check_keys

_COMMON = frozenset("""
    vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    intermediate_size rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters
    tie_word_embeddings hidden_act attention_bias
""".split())


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its names in transformers, its `config.json` fields and their conversion.

    Attributes:
      name: the key of the family in `FAMILIES`.
      architecture, model_type: the values of `architectures` and `model_type` in `config.json`.
      fields: the fields that the family supports in addition to `_COMMON`.
      read: a function from the contents of `config.json` to the family's fields of `ModelConfig`.
      default: the default values of fields that `config.json` may omit.
    """

    name: str
    architecture: str
    model_type: str
    fields: frozenset[str]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    default: Mapping[str, Any]
    float16: bool = True  # whether the activations of released models stay in float16's range


def _layer_windows(raw: Mapping[str, Any], fallback: Callable[[int], bool]) -> tuple:
    """Return each layer's window size, or None for full attention.

    If `layer_types` is missing, layer i has a sliding window if `fallback(i)` is true.
    """
    n, window = raw["num_hidden_layers"], raw.get("sliding_window")
    types = raw.get("layer_types")
    if types is None:
        types = ["sliding_attention" if fallback(i) else "full_attention" for i in range(n)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != n or any(t not in known for t in types):
        raise UserError(f"layer_types is {reprlib.repr(types)}; it must be a list of {n} values, "
                        f"each one of {known}")
    if window is None and "sliding_attention" in types:
        raise UserError("layer_types contains sliding_attention, but sliding_window is null or "
                        "use_sliding_window is false; set a window, or use full_attention")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _llama(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(raw.get("mlp_bias", False))}


def _mistral(raw: Mapping[str, Any]) -> dict[str, Any]:
    sliding = raw.get("sliding_window") is not None
    return {"windows": _layer_windows(raw, lambda _: sliding)}


def _qwen_windows(raw: Mapping[str, Any]) -> tuple:
    """Return each layer's window size, or None for full attention.

    Without `layer_types`, the layers from `max_window_layers` on have a sliding window if
    `use_sliding_window` is true.
    """
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    first = raw.get("max_window_layers", 28)
    return _layer_windows({**raw, "sliding_window": window},
                          lambda layer: window is not None and layer >= first)


def _qwen2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True, "windows": _qwen_windows(raw)}


def _qwen3(raw: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(raw.get("attention_bias", False))
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": _qwen_windows(raw)}


def _gemma(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention is true; only causal attention is supported")
    bias = bool(raw.get("attention_bias", False))
    return {
        "qkv_bias": bias, "o_bias": bias, "norm_offset": 1.0, "post_norms": True,
        "embed_scale": math.sqrt(raw["hidden_size"]),
        "attn_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "attn_softcap": raw.get("attn_logit_softcapping"),
        "final_softcap": raw.get("final_logit_softcapping"),
    }


def _gemma2(raw: Mapping[str, Any]) -> dict[str, Any]:
    return _gemma(raw) | {"windows": _layer_windows(raw, lambda layer: layer % 2 == 0)}


def _gemma3(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("attn_logit_softcapping") is not None:
        raise UserError(f"attn_logit_softcapping is {raw['attn_logit_softcapping']}; it must be "
                        "null for Gemma 3, which has no attention soft-cap")
    period = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    local = (raw.get("rope_parameters") or {}).get("sliding_attention")
    return _gemma(raw) | {
        "qk_norm": True,
        "rope_local": _rope({} if local is None else local, raw["rope_local_base_freq"]),
        "windows": _layer_windows(raw, lambda layer: bool((layer + 1) % period)),
    }


_LLAMA = frozenset({"mlp_bias"})
_WINDOW = frozenset({"sliding_window", "layer_types"})
_QWEN_DEFAULT = {"hidden_act": "silu", "sliding_window": 4096, "num_key_value_heads": 32}
_QWEN = _WINDOW | {"use_sliding_window", "max_window_layers"}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# `sliding_window_size`, an older name of `sliding_window`, is accepted but not used
_GEMMA2 = _WINDOW | {"query_pre_attn_scalar", "hidden_activation", "sliding_window_size",
                     "use_bidirectional_attention", *_CAPS}
_GEMMA_DEFAULT = {
    "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "sliding_window": 4096,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
_GEMMA3 = _GEMMA2 | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama", _LLAMA, _llama, {"hidden_act": "silu"}),
        Family("mistral", "MistralForCausalLM", "mistral", _WINDOW, _mistral,
               {"hidden_act": "silu", "sliding_window": 4096, "num_key_value_heads": 8}),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", _QWEN, _qwen2, _QWEN_DEFAULT),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", _QWEN, _qwen3,
               {**_QWEN_DEFAULT, "head_dim": 128}),
        Family("gemma2", "Gemma2ForCausalLM", "gemma2", _GEMMA2, _gemma2,
               {**_GEMMA_DEFAULT, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
               float16=False),
        Family("gemma3", "Gemma3ForCausalLM", "gemma3_text", _GEMMA3, _gemma3,
               {**_GEMMA_DEFAULT, "rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0},
               float16=False),
    )
}


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
    """Return whether a value is a number between 1e-37 and 1e37.

    Such a number and its reciprocal are finite and nonzero in float32.
    """
    return type(value) in (int, float) and 1e-37 < value < 1e37


_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(raw: Mapping[str, Any], theta: Any = None) -> Rope:
    """Convert a v4 `rope_scaling` or v5 `rope_parameters` dict; `theta` is the default base."""
    if not isinstance(raw, Mapping):
        raise UserError(f"rope parameters are {reprlib.repr(raw)}; give an object per layer type")
    for key in ("rope_theta", *_LLAMA3):
        if not _is_positive(raw.get(key, 1)):
            raise UserError(f"rope scaling: {key} is {reprlib.repr(raw[key])}; it must be a "
                            "number between 1e-37 and 1e37")
    base = float(raw.get("rope_theta", theta if theta is not None else 10_000.0))
    kind = raw.get("rope_type", raw.get("type", "default"))
    allowed = {"rope_theta", "rope_type", "type"}
    if kind == "llama3":
        missing = [key for key in _LLAMA3 if key not in raw]
        if missing:
            raise UserError(f"rope scaling 'llama3' is missing {', '.join(missing)}")
        factor, low, high = (float(raw[key]) for key in _LLAMA3[:3])
        if not _is_size(raw[_LLAMA3[3]]):
            raise UserError(f"rope scaling: {_LLAMA3[3]} is {raw[_LLAMA3[3]]!r}; it must be a "
                            "positive integer below 2³¹")
        rope = Rope(base, "llama3", factor, low, high, raw[_LLAMA3[3]])
        allowed |= set(_LLAMA3)
    elif kind == "linear":
        if "factor" not in raw:
            raise UserError("rope scaling 'linear' is missing factor")
        rope, allowed = Rope(base, "linear", float(raw["factor"])), allowed | {"factor"}
    elif kind == "default":
        rope = Rope(base)
    else:
        raise UserError(f"rope_type is {reprlib.repr(kind)}; it must be 'default', 'linear' or "
                        "'llama3'")
    unread = {key: raw[key] for key in sorted(set(raw) - allowed)}
    if unread.get("partial_rotary_factor") == 1:
        del unread["partial_rotary_factor"]
    if unread:
        raise UserError(f"rope scaling {kind!r} has unsupported fields: {reprlib.repr(unread)}")
    return rope


def _read_rope(raw: Mapping[str, Any], by_layer: bool) -> Rope:
    """Return the rotary embedding of all layers, or of full-attention layers if `by_layer` is true.

    In the latter case, `rope_parameters` may contain one dict for each layer type
    ("full_attention", "sliding_attention").
    """
    theta, scaling = raw.get("rope_theta"), raw.get("rope_scaling")
    whole = parameters = raw.get("rope_parameters")
    if not parameters:
        return _rope(scaling or {}, theta)
    if by_layer and {"full_attention", "sliding_attention"} & set(parameters):
        parameters = parameters.get("full_attention")
    rope = _rope({} if parameters is None else parameters, theta)
    if scaling and _rope(scaling, theta) != rope:  # transformers would use only rope_scaling
        raise UserError(f"rope_scaling is {reprlib.repr(scaling)}, but rope_parameters is "
                        f"{reprlib.repr(whole)}; remove one of them")
    return rope


@checked_call
def from_hf(raw: Mapping[str, Any], *, place: str = "config.json") -> ModelConfig:
    """Convert a Hugging Face `config.json` (transformers v4 or v5) to a `ModelConfig`.

    Keys that the family does not read are ignored unless they are known to change the computation.
    A single warning names up to 20 unknown keys whose value is not null, false or 0.

    Args:
      raw: the contents of `config.json`.
      place: the path of the file, for the warning.

    Raises:
      UserError: the architecture is unknown, or fields are missing, malformed or unsupported; the
        message names the architecture or the fields.

    Examples:
      >>> import jaxpersona as jp
      >>> config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 8,
      ...           "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
      ...           "intermediate_size": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}
      >>> jp.from_hf(config).d_model
      8
    """
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise UserError(f"architectures is {reprlib.repr(names)}; it must be a list of names")
    by_architecture = [f for f in FAMILIES.values() if f.architecture in names]
    by_type = [f for f in FAMILIES.values() if not names and f.model_type == raw.get("model_type")]
    if not by_architecture + by_type:
        known = ", ".join(f.architecture for f in FAMILIES.values())
        given = names or raw.get("model_type")
        raise UserError(f"architecture {reprlib.repr(given)} is not supported; the supported "
                        f"architectures are {known}")
    family = (by_architecture + by_type)[0]
    own = _COMMON | family.fields
    check_keys(raw, family.name, own, place)
    given = {key: value for key, value in raw.items() if value is not None}
    # an explicit null overrides the default: no soft-cap, no window, one key head per query head
    nulls = {key: None for key in _NULLABLE if key in raw and raw[key] is None}
    raw = {**family.default, **given, **nulls}
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                "intermediate_size")
    missing = [key for key in required if key not in raw]
    if missing:
        raise UserError(f"config.json is missing {', '.join(missing)}")
    for key in required:
        if not _is_size(raw[key]):
            raise UserError(f"config.json: {key} is {reprlib.repr(raw[key])}; it must be a "
                            "positive integer below 2³¹")
    _check_types(raw)
    key = "hidden_activation" if "hidden_activation" in family.fields else "hidden_act"
    activation = raw[key]
    if activation not in _ACTIVATIONS:
        raise UserError(f"{key} is {activation!r}; it must be one of {sorted(_ACTIVATIONS)}")
    heads, layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    fields: dict[str, Any] = {
        "family": family.name,
        "vocab_size": raw["vocab_size"],
        "d_model": raw["hidden_size"],
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "d_ff": raw["intermediate_size"],
        "norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "max_context": raw.get("max_position_embeddings", 2048),
        "rope": _read_rope(raw, "rope_local_base_freq" in family.fields),
        "attn_scale": head_dim**-0.5,
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "windows": (None,) * layers,
        "activation": _ACTIVATIONS[activation],
    }
    return ModelConfig(**(fields | family.read(raw)))


_NULLABLE = ("num_key_value_heads", "sliding_window", *_CAPS)
_INTEGERS = ("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
             "sliding_window_pattern", "_sliding_window_pattern")
_REALS = ("rms_norm_eps", "rope_theta", "query_pre_attn_scalar", "rope_local_base_freq", *_CAPS)
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


def _check_types(raw: Mapping[str, Any]) -> None:
    """Check the types and ranges of optional fields, and the number of layers.

    Raises:
      UserError: at least one field is invalid; the message lists all invalid fields.
    """
    faults = []

    def check(key: str, good: bool, wanted: str) -> None:
        if raw.get(key) is not None and not good:
            faults.append(f"{key} is {reprlib.repr(raw[key])}; it must be {wanted}")

    for key in _INTEGERS:
        check(key, _is_size(raw.get(key)), "a positive integer below 2³¹")
    for key in _REALS:
        check(key, _is_positive(raw.get(key)), "a number between 1e-37 and 1e37")
    for key in _FLAGS:
        check(key, isinstance(raw.get(key), bool), "true or false")
    first = raw.get("max_window_layers")
    check("max_window_layers", type(first) is int and first >= 0, "a nonnegative integer")
    for key in ("hidden_act", "hidden_activation"):
        check(key, isinstance(raw.get(key), str), "a string")
    for key in ("rope_scaling", "rope_parameters"):
        check(key, isinstance(raw.get(key), Mapping), "a JSON object")
    if raw["num_hidden_layers"] > MAX_LAYERS:
        faults.append(f"num_hidden_layers is {raw['num_hidden_layers']}; the maximum is "
                      f"{MAX_LAYERS}")
    if faults:
        raise UserError("config.json: " + "; ".join(faults))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Convert a `ModelConfig` to the contents of a transformers `config.json`."""
    family = FAMILIES[config.family]
    activation = next(k for k, v in _ACTIVATIONS.items() if v == config.activation)
    raw: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_context,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": activation,
    }
    if family.name not in ("qwen2", "mistral"):
        raw["attention_bias"] = config.qkv_bias
    if "mlp_bias" in family.fields:
        raw["mlp_bias"] = config.mlp_bias
    if "hidden_activation" in family.fields:
        raw["hidden_activation"] = raw.pop("hidden_act")
        scalar = config.attn_scale**-2
        whole = round(scalar)  # transformers accepts only an integer
        raw["query_pre_attn_scalar"] = whole if math.isclose(whole, scalar) else scalar
        raw["attn_logit_softcapping"] = config.attn_softcap
        raw["final_logit_softcapping"] = config.final_softcap
    if "layer_types" in family.fields:
        window = next((w for w in config.windows if w), None)
        raw["sliding_window"] = window
        kinds = ("full_attention", "sliding_attention")
        raw["layer_types"] = [kinds[bool(window)] for window in config.windows]
        if "use_sliding_window" in family.fields:
            raw["use_sliding_window"] = window is not None
    rope = _rope_to_hf(config.rope)
    if config.rope_local is not None:
        rope = {"full_attention": rope, "sliding_attention": _rope_to_hf(config.rope_local)}
    raw["rope_parameters"] = rope
    return raw


def _rope_to_hf(rope: Rope) -> dict[str, Any]:
    raw: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        raw["factor"] = rope.factor
    if rope.kind == "llama3":
        values = (rope.low_freq_factor, rope.high_freq_factor, rope.original_context)
        raw |= dict(zip(_LLAMA3[1:], values, strict=True))
    return raw
