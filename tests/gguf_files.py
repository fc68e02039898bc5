"""Write small transformers models as GGUF files, with the conventions of llama.cpp's converter."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
                 "gemma2": "gemma2", "gemma3_text": "gemma3"}
_NAMES = {
    "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm",
    "input_layernorm": "attn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
    "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
Encode = Callable[[str, np.ndarray], tuple[np.ndarray, Any]]


def tensor_name(name: str, family: str) -> str:
    """Return the GGUF name of a transformers tensor."""
    parts = name.split(".")
    stem, kind = parts[-2], parts[-1]
    new = _NAMES[stem]
    if family.startswith("gemma") and stem == "post_attention_layernorm":
        new = "post_attention_norm"
    return f"blk.{parts[2]}.{new}.{kind}" if "layers" in parts else f"{new}.{kind}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute the rows of Q or K as llama.cpp does for the architecture "llama"."""
    rows = weight.shape[0]
    split = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def llama3_divisors(config: Any) -> np.ndarray | None:
    """Return the tensor rope_freqs.weight for a configuration with Llama 3's scaling."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    low, high, context = (rope[key] for key in (
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    smooth = (context / wave - low) / (high - low)
    blended = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return np.where(wave < context / high, 1, np.where(wave > context / low, rope["factor"],
                                                       blended)).astype(np.float32)


def plain(name: str, value: np.ndarray) -> tuple[np.ndarray, Any]:
    """Encode a tensor as F32."""
    return value, None


def write(path: pathlib.Path, made: Any, encode: Encode = plain, *, name: str = "test",
          tokens: list[str] | None = None, merges: list[str] | None = None,
          kinds: list[int] | None = None, template: str | None = None,
          skip: tuple[str, ...] = (), fields: dict[str, Any] | None = None,
          **options: Any) -> pathlib.Path:
    """Write a transformers model as GGUF.

    Args:
        made: the model.
        encode: returns a matrix's data and its GGML type; vectors are written as F32.
        name: `general.name`.
        tokens, merges, kinds, template: the tokenizer; none is written if `tokens` is None.
        skip: keys under "<architecture>." and tensors to omit.
        fields: additional integers and strings by key; they override the defaults.
        options: passed to `gguf.GGUFWriter`.
    """
    import gguf

    config = made.config
    family = config.model_type
    arch = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, arch, **options)
    values: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    rope = config.rope_parameters
    values["rope.freq_base"] = float(rope.get("full_attention", rope)["rope_theta"])
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, key, None):
            values[key] = float(getattr(config, key))
    types = getattr(config, "layer_types", None)
    if types and "sliding_attention" in types:
        values["attention.sliding_window"] = config.sliding_window
        values["attention.sliding_window_pattern"] = [t == "sliding_attention" for t in types]
    elif family == "mistral" and config.sliding_window:
        values["attention.sliding_window"] = config.sliding_window
    values = {f"{arch}.{k}": v for k, v in values.items() if k not in skip}
    values["general.name"] = name
    if tokens is not None:
        values |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
                   "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
                   "tokenizer.ggml.token_type": kinds, "tokenizer.chat_template": template}
    for key, value in (values | (fields or {})).items():
        if value is None:
            continue
        if key == "general.alignment":
            writer.add_custom_alignment(value)
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string, list: writer.add_array}[type(value)]
        add(key, value)
    if (divisors := llama3_divisors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for full, tensor in made.state_dict().items():
        new = tensor_name(full, family)
        if new in skip or new == "output.weight" and config.tie_word_embeddings:
            continue
        value = tensor.float().numpy()
        if arch == "llama" and (".q_proj." in full or ".k_proj." in full):
            value = permuted(value, config.num_attention_heads if ".q_proj." in full
                             else config.num_key_value_heads)
        if family.startswith("gemma") and full.endswith("norm.weight"):
            value = value + np.float32(1)
        data, kind = plain(new, value) if value.ndim == 1 else encode(new, value)
        writer.add_tensor(new, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
