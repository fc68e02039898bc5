"""`config.json` files of released models, and the expected values for each, written by hand.

Most files in `RAW` are in the format of transformers 4 (`torch_dtype`, and `rope_theta` and
`rope_scaling` at the top level). Names that end in "@v5" are in the format of transformers 5
(`dtype`, `rope_parameters`, `layer_types`). The parameter counts are those of the checkpoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Numbers(NamedTuple):
    """The expected configuration: sizes, rotary embedding, windows, soft-caps and biases.

    rope: the kind of scaling and its parameters. windows: None for full attention in all layers.
    scalar: the square of the divisor of q·k. softcaps: of attention scores and of logits.
    """

    parameters: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocabulary: int
    context: int
    eps: float
    theta: float
    scalar: int
    rope: tuple = ("default",)
    local_theta: float | None = None
    windows: tuple | None = None
    softcaps: tuple = (None, None)
    activation: str = "silu"
    tied: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False


SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3_8 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA3_32 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
             "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
         "attention_bias": False, "initializer_range": 0.02, "pretraining_tp": 1,
         "use_cache": True}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
           "bos_token_id": 1, "initializer_range": 0.02, "rms_norm_eps": 1e-05,
           "tie_word_embeddings": False, "use_cache": True}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
         "attention_dropout": 0.0, "bos_token_id": 151643, "initializer_range": 0.02,
         "rms_norm_eps": 1e-06, "use_cache": True, "use_sliding_window": False}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
         "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
         "eos_token_id": 151645, "head_dim": 128, "initializer_range": 0.02, "rms_norm_eps": 1e-06,
         "sliding_window": None, "tie_word_embeddings": True, "use_cache": True,
         "use_sliding_window": False, "vocab_size": 151936}
GEMMA = {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "pad_token_id": 0,
         "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
         "rms_norm_eps": 1e-06, "use_cache": True}
GEMMA2 = GEMMA | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2",
                  "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                  "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh",
                  "max_position_embeddings": 8192, "sliding_window": 4096, "eos_token_id": 1,
                  "vocab_size": 256000}
GEMMA3 = GEMMA | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
                  "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
                  "max_position_embeddings": 32768, "num_attention_heads": 4,
                  "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "sliding_window": 512,
                  "vocab_size": 262144}

RAW: dict[str, dict[str, Any]] = {
    "Meta-Llama-3-8B-Instruct": LLAMA | {
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128009,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.0.dev0", "vocab_size": 128256},
    "Hermes-3-Llama-3.1-8B": LLAMA | {
        "_name_or_path": "meta-llama/Meta-Llama-3.1-8B", "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128040, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_8, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.4",
        "vocab_size": 128256},
    "DeepSeek-R1-Distill-Llama-8B": LLAMA | {
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_8,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0", "vocab_size": 128256},
    "Llama-3.2-3B-Instruct": LLAMA | {
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 24,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3_32, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "vocab_size": 128256},
    "Llama-3.2-1B@v5": LLAMA | {
        "attention_dropout": 0.0, "bos_token_id": 128000, "dtype": "bfloat16",
        "eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "pad_token_id": None,
        "rms_norm_eps": 1e-05, "rope_parameters": LLAMA3_32 | {"rope_theta": 500000.0},
        "tie_word_embeddings": True, "transformers_version": "5.0.0", "vocab_size": 128256},
    "TinyLlama-1.1B-Chat-v1.0": LLAMA | {
        "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.35.0", "vocab_size": 32000},
    "deepseek-coder-1.3b-instruct": LLAMA | {  # rope_scaling uses the older key "type"
        "bos_token_id": 32013, "eos_token_id": 32021, "hidden_size": 2048,
        "intermediate_size": 5504, "max_position_embeddings": 16384, "num_attention_heads": 16,
        "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "vocab_size": 32256},
    "SmolLM2-360M-Instruct": LLAMA | {
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 960,
        "intermediate_size": 2560, "is_llama_config": True, "max_position_embeddings": 8192,
        "mlp_bias": False, "num_attention_heads": 15, "num_hidden_layers": 32,
        "num_key_value_heads": 5, "pad_token_id": 2, "rms_norm_eps": 1e-05,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "vocab_size": 49152},
    "SmolLM2-1.7B-Instruct@v5": LLAMA | {
        "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2,
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 8192, "mlp_bias": False, "num_attention_heads": 32,
        "num_hidden_layers": 24, "num_key_value_heads": 32, "pad_token_id": 2,
        "rms_norm_eps": 1e-05, "rope_parameters": {"rope_theta": 130000, "rope_type": "default"},
        "tie_word_embeddings": True, "transformers_version": "5.0.0",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "vocab_size": 49152},
    "Mistral-7B-Instruct-v0.3": MISTRAL | {
        "attention_dropout": 0.0, "eos_token_id": 2, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 1000000.0,
        "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
        "vocab_size": 32768},
    "OpenHermes-2.5-Mistral-7B": MISTRAL | {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "eos_token_id": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
        "use_cache": False, "vocab_size": 32002},
    # 32 heads of dimension 128, with a model width of 5,120
    "Mistral-Nemo-Instruct-2407@v5": MISTRAL | {
        "attention_dropout": 0.0, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 128,
        "hidden_size": 5120, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
        "pad_token_id": None, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "sliding_window": None, "transformers_version": "5.0.0", "vocab_size": 131072},
    "Qwen2.5-0.5B-Instruct": QWEN2 | {
        "eos_token_id": 151645, "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "vocab_size": 151936},
    "Qwen2.5-1.5B@v5": QWEN2 | {
        "dtype": "bfloat16", "eos_token_id": 151643, "hidden_size": 1536,
        "intermediate_size": 8960, "layer_types": [FULL] * 28, "max_position_embeddings": 131072,
        "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "pad_token_id": None, "sliding_window": None,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "tie_word_embeddings": True, "transformers_version": "5.0.0", "use_mrope": False,
        "vocab_size": 151936},
    "Qwen2.5-Coder-7B-Instruct": QWEN2 | {
        "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0", "vocab_size": 152064},
    # has the rope base of Qwen2.5-Math, and an untied head
    "DeepSeek-R1-Distill-Qwen-1.5B": QWEN2 | {
        "eos_token_id": 151643, "hidden_size": 1536, "intermediate_size": 8960,
        "max_position_embeddings": 131072, "max_window_layers": 21, "num_attention_heads": 12,
        "num_hidden_layers": 28, "num_key_value_heads": 2, "rope_theta": 10000,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.44.0", "use_mrope": False, "vocab_size": 151936},
    "Qwen3-1.7B": QWEN3 | {
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rope_scaling": None, "rope_theta": 1000000,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0"},
    "Qwen3-4B-Instruct-2507@v5": QWEN3 | {  # 32 heads of dimension 128, with a model width of 2,560
        "dtype": "bfloat16", "hidden_size": 2560, "intermediate_size": 9728,
        "layer_types": [FULL] * 36, "max_position_embeddings": 262144, "max_window_layers": 36,
        "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
        "pad_token_id": None, "transformers_version": "5.0.0",
        "rope_parameters": {"rope_theta": 5000000, "rope_type": "default"}},
    "gemma-2-2b-it": GEMMA2 | {
        "head_dim": 256, "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.42.4"},
    "gemma-2-27b-it@v5": GEMMA2 | {
        "_attn_implementation": "eager", "dtype": "bfloat16", "head_dim": 128, "hidden_size": 4608,
        "intermediate_size": 36864, "layer_types": [SLIDING, FULL] * 23,
        "num_attention_heads": 32, "num_hidden_layers": 46, "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144, "sliding_window_size": 4096, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "transformers_version": "5.0.0", "use_bidirectional_attention": None},
    "gemma-3-270m-it": GEMMA3 | {
        "_sliding_window_pattern": 6, "eos_token_id": 1, "hidden_size": 640,
        "intermediate_size": 2048, "layer_types": ([SLIDING] * 5 + [FULL]) * 3,
        "num_hidden_layers": 18, "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
        "transformers_version": "4.55.0.dev0", "use_bidirectional_attention": False},
    "gemma-3-1b-it": GEMMA3 | {
        "cache_implementation": "hybrid", "eos_token_id": [1, 106], "hidden_size": 1152,
        "intermediate_size": 6912, "num_hidden_layers": 26, "rope_local_base_freq": 10000,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0"},
    "gemma-3-1b-pt@v5": GEMMA3 | {
        "_sliding_window_pattern": 6, "cache_implementation": "hybrid", "dtype": "bfloat16",
        "eos_token_id": 1, "hidden_size": 1152, "intermediate_size": 6912,
        "layer_types": ([SLIDING] * 5 + [FULL]) * 4 + [SLIDING] * 2, "num_hidden_layers": 26,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1000000, "rope_type": "default"},
            "sliding_attention": {"rope_theta": 10000, "rope_type": "default"}},
        "tie_word_embeddings": True, "transformers_version": "5.0.0",
        "use_bidirectional_attention": False},
}

_LLAMA_31_8B = Numbers(
    8_030_261_248, 32, 4096, 32, 8, 128, 14336, 128256, 131072, 1e-5, 5e5, 128,
    rope=("llama3", 8.0, 1.0, 4.0, 8192))
_GEMMA_3_1B = Numbers(
    999_885_952, 26, 1152, 4, 1, 256, 6912, 262144, 32768, 1e-6, 1e6, 256, local_theta=1e4,
    windows=((512,) * 5 + (None,)) * 4 + (512, 512), activation="gelu_tanh", tied=True,
    qk_norm=True)
NUMBERS = {
    "Meta-Llama-3-8B-Instruct": Numbers(
        8_030_261_248, 32, 4096, 32, 8, 128, 14336, 128256, 8192, 1e-5, 5e5, 128),
    "Hermes-3-Llama-3.1-8B": _LLAMA_31_8B,
    "DeepSeek-R1-Distill-Llama-8B": _LLAMA_31_8B,
    "Llama-3.2-3B-Instruct": Numbers(
        3_212_749_824, 28, 3072, 24, 8, 128, 8192, 128256, 131072, 1e-5, 5e5, 128,
        rope=("llama3", 32.0, 1.0, 4.0, 8192), tied=True),
    "Llama-3.2-1B@v5": Numbers(
        1_235_814_400, 16, 2048, 32, 8, 64, 8192, 128256, 131072, 1e-5, 5e5, 64,
        rope=("llama3", 32.0, 1.0, 4.0, 8192), tied=True),
    "TinyLlama-1.1B-Chat-v1.0": Numbers(
        1_100_048_384, 22, 2048, 32, 4, 64, 5632, 32000, 2048, 1e-5, 1e4, 64),
    "deepseek-coder-1.3b-instruct": Numbers(
        1_346_471_936, 24, 2048, 16, 16, 128, 5504, 32256, 16384, 1e-6, 1e5, 128,
        rope=("linear", 4.0)),
    "SmolLM2-360M-Instruct": Numbers(
        361_821_120, 32, 960, 15, 5, 64, 2560, 49152, 8192, 1e-5, 1e5, 64, tied=True),
    "SmolLM2-1.7B-Instruct@v5": Numbers(
        1_711_376_384, 24, 2048, 32, 32, 64, 8192, 49152, 8192, 1e-5, 1.3e5, 64, tied=True),
    "Mistral-7B-Instruct-v0.3": Numbers(
        7_248_023_552, 32, 4096, 32, 8, 128, 14336, 32768, 32768, 1e-5, 1e6, 128),
    "OpenHermes-2.5-Mistral-7B": Numbers(
        7_241_748_480, 32, 4096, 32, 8, 128, 14336, 32002, 32768, 1e-5, 1e4, 128,
        windows=(4096,) * 32),
    "Mistral-Nemo-Instruct-2407@v5": Numbers(
        12_247_782_400, 40, 5120, 32, 8, 128, 14336, 131072, 131072, 1e-5, 1e6, 128),
    "Qwen2.5-0.5B-Instruct": Numbers(
        494_032_768, 24, 896, 14, 2, 64, 4864, 151936, 32768, 1e-6, 1e6, 64, tied=True,
        qkv_bias=True),
    "Qwen2.5-1.5B@v5": Numbers(
        1_543_714_304, 28, 1536, 12, 2, 128, 8960, 151936, 131072, 1e-6, 1e6, 128, tied=True,
        qkv_bias=True),
    "Qwen2.5-Coder-7B-Instruct": Numbers(
        7_615_616_512, 28, 3584, 28, 4, 128, 18944, 152064, 32768, 1e-6, 1e6, 128, qkv_bias=True),
    "DeepSeek-R1-Distill-Qwen-1.5B": Numbers(
        1_777_088_000, 28, 1536, 12, 2, 128, 8960, 151936, 131072, 1e-6, 1e4, 128, qkv_bias=True),
    "Qwen3-1.7B": Numbers(
        1_720_574_976, 28, 2048, 16, 8, 128, 6144, 151936, 40960, 1e-6, 1e6, 128, tied=True,
        qk_norm=True),
    "Qwen3-4B-Instruct-2507@v5": Numbers(
        4_022_468_096, 36, 2560, 32, 8, 128, 9728, 151936, 262144, 1e-6, 5e6, 128, tied=True,
        qk_norm=True),
    "gemma-2-2b-it": Numbers(
        2_614_341_888, 26, 2304, 8, 4, 256, 9216, 256000, 8192, 1e-6, 1e4, 256,
        windows=(4096, None) * 13, softcaps=(50.0, 30.0), activation="gelu_tanh", tied=True),
    "gemma-2-27b-it@v5": Numbers(
        27_227_128_320, 46, 4608, 32, 16, 128, 36864, 256000, 8192, 1e-6, 1e4, 144,
        windows=(4096, None) * 23, softcaps=(50.0, 30.0), activation="gelu_tanh", tied=True),
    "gemma-3-270m-it": Numbers(
        268_098_176, 18, 640, 4, 1, 256, 2048, 262144, 32768, 1e-6, 1e6, 256, local_theta=1e4,
        windows=((512,) * 5 + (None,)) * 3, activation="gelu_tanh", tied=True, qk_norm=True),
    "gemma-3-1b-it": _GEMMA_3_1B,
    "gemma-3-1b-pt@v5": _GEMMA_3_1B,
}
