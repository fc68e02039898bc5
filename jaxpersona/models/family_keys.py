"""Checks of the `config.json` keys that a model family does not read.

Known metadata and known settings of training code are ignored. A known field of another
architecture raises an error unless its value leaves the forward pass unchanged, because ignoring
the field would silently change the model's outputs. Any other key, including a key that only other
families read, is ignored as in transformers, with a warning unless its value is null, false or 0.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

from jaxpersona.errors import UserError

# Metadata and training settings that do not affect inference.
_IGNORED = frozenset("""
    architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
    initializer_range attention_dropout hidden_dropout pretraining_tp auto_map return_dict
    output_hidden_states output_attentions cache_implementation _attn_implementation
    tokenizer_class task_specific_params id2label label2id problem_type finetuning_task
    is_encoder_decoder add_cross_attention tie_encoder_decoder chunk_size_feed_forward
    torchscript prefix pruned_heads cross_attention_hidden_size is_decoder
    _attn_implementation_autoset attn_implementation _attn_implementation_internal
    _model_name_or_path is_llama_config is_qwen2_config unsloth_fixed unsloth_version
    transformers.js_config _commit_hash max_sequence_length max_length
    output_router_logits keys_to_ignore_at_inference use_return_dict gradient_checkpointing
    neftune_noise_alpha use_reentrant_checkpointing embd_pdrop resid_pdrop
    attn_pdrop embedding_dropout residual_dropout attention_probs_dropout_prob hidden_dropout_prob
""".split())

# Fields of other architectures that can change the forward pass. Each field is mapped to the only
# value that leaves the forward pass unchanged, or to None if 0, false and empty values do. A JSON
# null is always allowed; false is also allowed unless the mapped value is true.
_CHANGES: dict[str, Any] = {key: None for key in """
    quantization_config quantization compression_config sparsity_config bnb_config
    num_experts num_local_experts n_routed_experts num_experts_per_tok num_experts_per_token
    n_shared_experts num_shared_experts moe_intermediate_size shared_expert_intermediate_size
    moe_layer_start_index moe_num_experts moe_topk moe_config decoder_sparse_step mlp_only_layers
    first_k_dense_replace enable_moe_block use_moe ffn_config attn_config
    qk_norm use_qk_norm qk_layernorm qk_layer_norms use_qk_layernorm layer_norm_type norm_type
    layernorm_type use_parallel_residual parallel_residual parallel_attn parallel_attention_ffn
    norm_bias use_bias use_qkv_bias qkv_bias add_qkv_bias attention_out_bias o_proj_bias
    attention_output_bias lm_head_bias add_bias_linear bias
    attn_logit_softcap final_logit_softcap output_soft_cap logit_softcap softcap
    clip_qkv qkv_clip attention_chunk_size attn_scale floor_scale attn_temperature_tuning
    attn_temperature_scale attention_sinks use_sinks attention_sink_size sinks
    no_rope_layers no_rope_layer_interval nope_layer_interval rope_interleaved interleaved_rope
    rotary_emb_base rotary_dim rope_ratio mrope_section use_mrope rope_interleave
    position_embedding_type alibi use_alibi relative_attention
    q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim global_head_dim
    num_global_key_value_heads num_kv_shared_layers layer_block_types layers_block_type
    attn_layer_period attn_layer_offset mamba_d_state mamba_expand ssm_state_size conv_kernel
    linear_num_value_heads linear_key_head_dim full_attention_interval linear_attn_config
    hidden_size_per_layer_input vocab_size_per_layer_input altup_num_inputs laurel_rank
    activation_sparsity_pattern block_configs num_attention_heads_per_layer layer_skip
    num_loops num_recurrent_layers recurrent_depth cross_attention_layers
    vision_config audio_config text_config speech_config mm_projector_type mm_vision_tower
    is_causal_lm_bidirectional bidirectional use_cross_attention
    prefix_lm embedding_norm scale_embedding scale_emb dim_model_base scale_depth mup_enabled
    use_mup residual_scale output_multiplier_scale embed_scale rescale_every
    query_key_value_bias per_layer_sliding_window swa_layers sliding_window_layers
    residual_sigma use_conv use_residual_gate gated_attention attention_gate use_gated_attention
    attention_k_eq_v attention_value_scale attention_type attention_window attention_window_size
    window_size layer_rope_theta compress_rope_theta rotary_embedding_base learnable_sink_init
    logits_soft_cap output_logit_soft_cap gate_soft_cap mlp_gate_softcap swiglu_limit swiglu_alpha
    num_query_groups multi_query new_decoder_architecture intermediate_size_mlp num_dense_layers
    interleave_moe_layer_step is_moe moe_hidden_size moe_k moe_layers shared_intermediate_size
    norm_after pre_norm use_post_norm use_sandwich_norm qk_norm_type rescale_embeddings
    embedding_scale embedding_rank embedding_size word_embed_proj_dim index_topk hc_mult
    hybrid_layer_ids mamba_d_ssm mamba_n_heads mamba_headdim ssm_multipliers loop_num_passes
    use_double_wide_mlp use_attention_bias cross_layer_interval kv_source_layers per_layer_config
""".split()}
_CHANGES |= dict.fromkeys("""
    partial_rotary_factor rotary_pct rotary_percent rope_scaling_factor residual_multiplier
    embedding_multiplier logits_scaling logit_scale lm_head_multiplier key_multiplier
    attention_in_multiplier attention_out_multiplier mup_width_multiplier mup_scale_emb
    width_multiplier depth_multiplier output_multiplier n_group topk_group routed_scaling_factor
""".split(), 1)
_CHANGES |= {"attention_multiplier": None, "is_causal": True, "causal": True, "no_bias": True,
             "use_rope": True, "use_rotary": True, "use_rotary_embedding": True}


def check_keys(raw: Mapping[str, Any], family: str, own: frozenset[str], place: str) -> None:
    """Raise an error for unsupported keys that change the computation; warn about unknown keys.

    Args:
      raw: the contents of `config.json`.
      family: the family's name, for the messages.
      own: the keys that the family reads.
      place: the path of the file, for the warning.

    Raises:
      UserError: unsupported keys change the computation; the message lists at most 20 of them.
    """
    unread = sorted(key for key in set(raw) - _IGNORED - own if not _is_unused(raw, key))

    def changes(key: str) -> bool:
        value, neutral = raw[key], _CHANGES.get(key)
        if value is None or (value is False and neutral is not True):
            return False
        if key not in _CHANGES or (isinstance(value, (list, dict)) and value):
            return key in _CHANGES
        return bool(value) if neutral is None else value != neutral

    unsupported = [key for key in unread if changes(key)]
    if unsupported:
        raise UserError(f"config.json (family {family}) has unsupported fields: "
                        f"{_listed(raw, unsupported)}")
    unknown = [key for key in unread if key not in _CHANGES and raw[key] not in (None, False)]
    if unknown:
        warnings.warn(f"{place}: ignored keys that the family {family} does not read "
                      f"({_listed(raw, unknown)}), as transformers does", stacklevel=4)


def _is_unused(raw: Mapping[str, Any], key: str) -> bool:
    """Return whether a key that the family does not read has no effect, given the other keys.

    `max_window_layers` has an effect only with `use_sliding_window`, which is checked separately.
    `sliding_window` has no effect if `use_sliding_window` is false, and `hidden_activation` has no
    effect if it equals `hidden_act`.
    """
    if key == "max_window_layers":
        return True
    if key == "sliding_window":
        return raw.get("use_sliding_window") is False
    return key == "hidden_activation" and raw[key] == (raw.get("hidden_act") or "silu")


def _listed(raw: Mapping[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}={reprlib.repr(raw[key])}" for key in keys[:20])
