"""Configurations of released models in both formats, compared with presets and transformers."""

import hf as oracle
import pytest

from jaxpersona.models.config import replace
from jaxpersona.models.families import from_hf, to_hf
from jaxpersona.models.presets import PRESETS, preset

LLAMA_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192, "rope_type": "llama3"}


def _raw(architecture, model_type, sizes, theta, **fields):
    vocabulary, width, layers, heads, keys, inner, context, eps = sizes
    return {"architectures": [architecture], "model_type": model_type, "vocab_size": vocabulary,
            "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": keys, "intermediate_size": inner, "rms_norm_eps": eps,
            "max_position_embeddings": context, "rope_theta": theta, "use_cache": True,
            "initializer_range": 0.02, "attention_dropout": 0.0, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0", "bos_token_id": 1, "eos_token_id": [2, 3], **fields}


def _llama(*sizes):
    return _raw("LlamaForCausalLM", "llama", (128256, *sizes, 131072, 1e-5), 500000.0,
                rope_scaling=LLAMA_SCALING, hidden_act="silu", attention_bias=False, mlp_bias=False,
                pretraining_tp=1, tie_word_embeddings=False)


def _qwen3(*sizes, tied=False):
    return _raw("Qwen3ForCausalLM", "qwen3", (151936, *sizes, 40960, 1e-6), 1000000,
                head_dim=128, rope_scaling=None, hidden_act="silu", attention_bias=False,
                sliding_window=None, use_sliding_window=False, max_window_layers=sizes[1],
                tie_word_embeddings=tied)


def _gemma2(*sizes, head_dim, scalar):
    return _raw("Gemma2ForCausalLM", "gemma2", (256000, *sizes, 8192, 1e-6), 10000.0,
                head_dim=head_dim, query_pre_attn_scalar=scalar, hidden_act="gelu_pytorch_tanh",
                hidden_activation="gelu_pytorch_tanh", attn_logit_softcapping=50.0,
                final_logit_softcapping=30.0, sliding_window=4096, attention_bias=False,
                cache_implementation="hybrid", sliding_window_size=None)


REAL = {
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336),
    "llama-3.3-70b": _llama(8192, 80, 64, 8, 28672) | {"head_dim": 128},
    "qwen3-0.6b": _qwen3(1024, 28, 16, 8, 3072, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    "qwen2.5-7b": _raw("Qwen2ForCausalLM", "qwen2", (152064, 3584, 28, 28, 4, 18944, 32768, 1e-6),
                       1000000.0, hidden_act="silu", sliding_window=131072,
                       use_sliding_window=False, max_window_layers=28, tie_word_embeddings=False),
    "gemma-2-2b": _gemma2(2304, 26, 8, 4, 9216, head_dim=256, scalar=256),
    "gemma-2-9b": _gemma2(3584, 42, 16, 8, 14336, head_dim=256, scalar=256),
    "gemma-2-27b": _gemma2(4608, 46, 32, 16, 36864, head_dim=128, scalar=144),
}


def _v5(raw):
    """Return the configuration in the format of transformers 5."""
    raw = dict(raw)
    scaling = raw.pop("rope_scaling", None) or {"rope_type": "default"}
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), **scaling}
    raw["dtype"] = raw.pop("torch_dtype")
    raw["transformers_version"] = "5.0.0"
    raw.setdefault("head_dim", None)  # transformers 5 writes null for a missing value
    if raw["model_type"].startswith("qwen"):
        raw |= {"layer_types": ["full_attention"] * raw["num_hidden_layers"],
                "sliding_window": None}
    if raw["model_type"] == "gemma2":
        raw["layer_types"] = ["full_attention" if i % 2 else "sliding_attention"
                              for i in range(raw["num_hidden_layers"])]
    return raw


@pytest.mark.parametrize("name", REAL)
def test_presets_equal_the_real_files(name):
    assert from_hf(REAL[name]) == preset(name)
    assert from_hf(_v5(REAL[name])) == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_back(name):
    assert from_hf(to_hf(preset(name))) == preset(name)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_those_of_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = to_hf(preset(name))
    kind = raw.pop("model_type")
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **raw))
    assert sum(p.numel() for p in made.parameters()) == preset(name).parameters
    size = sum(p.numel() * 2 for p in made.parameters())
    assert size == preset(name).bytes(2)


@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_counts_of_small_models_equal_those_of_transformers(family):
    made = oracle.model(family, **({"mlp_bias": True} if family == "llama" else {}),
                        **({} if family in ("mistral", "qwen2") else {"attention_bias": True}))
    config = from_hf(made.config.to_dict() | {"architectures": [type(made).__name__]})
    assert config.parameters == made.num_parameters()


COSTS = {
    # name: parameters, weight bytes per decode step, cache bytes for 1,000 and 8,000 tokens
    # (bfloat16), FLOPs of a prefill of 1,000 tokens without and with the head; counted by hand
    "llama-3.1-8b": (  # untied: a step reads one of two tables of 128,256 × 4,096
        8_030_261_248, 2 * (8_030_261_248 - 525_336_576), 1000 * 131_072, 8000 * 131_072,
        2 * 6_979_588_096 * 1000 + 262_144 * 1000**2,
        2 * 6_979_588_096 * 1000 + 262_144 * 1000**2 + 2 * 525_336_576 * 1000),
    "qwen3-0.6b": (  # tied: the single table of 151,936 × 1,024 is also the head
        596_049_920, 2 * 596_049_920, 1000 * 114_688, 8000 * 114_688,
        2 * 440_467_456 * 1000 + 114_688 * 1000**2,
        2 * 440_467_456 * 1000 + 114_688 * 1000**2 + 2 * 155_582_464 * 1000),
    "gemma-2-27b": (  # tied; 23 of 46 layers have a window of 4,096 tokens; 8,192 bytes per token
        27_227_128_320, 2 * 27_227_128_320, 46 * 1000 * 8_192, 23 * (4_096 + 8_000) * 8_192,
        2 * 26_047_480_320 * 1000 + 376_832 * 1000**2,
        2 * 26_047_480_320 * 1000 + 376_832 * 1000**2 + 2 * 1_179_648_000 * 1000),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs_equal_a_count_by_hand(name):
    config = preset(name)
    found = (config.parameters, config.step_bytes(), config.cache_bytes(1000),
             config.cache_bytes(8000), config.prefill_flops(1000),
             config.prefill_flops(1000, head=True))
    assert found == COSTS[name]
    assert config.bytes(4) == 4 * COSTS[name][0]
    assert config.step_bytes(1) == COSTS[name][1] // 2
    assert config.cache_bytes(1000, 4) == 2 * COSTS[name][2]


def test_another_number_of_layers_keeps_the_pattern_of_the_windows():
    config = preset("gemma-2-2b")
    assert config.windows == (4096, None) * 13
    assert replace(config, n_layers=5).windows == (4096, None, 4096, None, 4096)
    assert replace(config, n_layers=28).windows == (4096, None) * 14
    assert replace(config, n_layers=2, windows=(8, 9)).windows == (8, 9)
    assert replace(preset("llama-3.1-8b"), n_layers=70).windows == (None,) * 70


BASE = REAL["qwen3-0.6b"]


@pytest.mark.parametrize(("change", "words"), [
    ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
    ({"architectures": None, "model_type": "bert"}, "bert"),
    ({"architectures": "Qwen3ForCausalLM"}, "architectures"),
    ({"num_experts": 8}, "num_experts=8"),
    ({"hidden_act": "relu"}, "relu"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA_SCALING, "low_freq_factor": 4.0}},
     "low_freq_factor is 4.0 and high_freq_factor is 4.0; the first must be smaller"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "default", "mscale": 1.0}}, "mscale"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"hidden_size": "1024"}, "hidden_size is '1024'"),
    ({"num_key_value_heads": 5}, "n_kv_heads is 5"),
    ({"head_dim": 33}, "head_dim is 33"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked"] * 28},
     "layer_types"),
])
def test_what_is_not_implemented_or_malformed_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        from_hf(BASE | change)


# keys that publishers and tools add: SmolLM2 by HuggingFaceTB, copies by unsloth, and transformers
# with `gguf_file=`
RELEASED = {
    "SmolLM2-135M-Instruct": _raw(
        "LlamaForCausalLM", "llama", (49152, 576, 30, 9, 3, 1536, 8192, 1e-5), 100000,
        rope_scaling=None, hidden_act="silu", attention_bias=False, mlp_bias=False,
        pretraining_tp=1, tie_word_embeddings=True, is_llama_config=True, rope_interleaved=False,
        pad_token_id=2, initializer_range=0.041666666666666664, **{
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}),
    "unsloth/Llama-3.2-1B-Instruct": _llama(2048, 16, 32, 8, 8192) | {
        "unsloth_fixed": True, "pad_token_id": 128004, "head_dim": 64, "_name_or_path": "meta"},
    "unsloth-trained": BASE | {"unsloth_version": "2025.3.19", "unsloth_fixed": True,
                               "use_cache": False, "pad_token_id": 151654},
    "from GGUF": BASE | {"_model_name_or_path": "folder", "is_llama_config": True,
                         "_attn_implementation_autoset": True, "return_dict": True},
    "gemma-3-270m": oracle.config("gemma3").to_dict() | {
        "architectures": ["Gemma3ForCausalLM"], "_model_name_or_path": "folder",
        "_sliding_window_pattern": 6, "use_bidirectional_attention": False,
        "cache_implementation": "hybrid"},
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configurations_are_read_without_a_word(name):
    """Warnings are errors in this test suite."""
    from_hf(RELEASED[name])


def test_an_unknown_key_is_named_once_and_ignored():
    strange = {"my_training_run": "a7", "weird": [1] * 100, "off": False, "null": None}
    with pytest.warns(UserWarning, match=r"m/config.json: ignored keys that the family .* does not "
                                         r"read \(my_training_run='a7', ") as w:
        assert from_hf(BASE | strange, place="m/config.json") == from_hf(BASE)
    assert len(w) == 1 and len(str(w[0].message)) < 300 and "off" not in str(w[0].message)


@pytest.mark.parametrize(("key", "value"), [
    ("quantization_config", {"quant_method": "fp8"}), ("num_local_experts", 8),
    ("partial_rotary_factor", 0.5), ("residual_multiplier", 0.22), ("logit_scale", 0.0625),
    ("attention_multiplier", 0.1), ("clip_qkv", 8.0), ("use_qk_norm", True),
    ("layer_norm_type", "low_precision_layernorm"), ("rope_interleaved", True),
    ("no_rope_layers", [1, 1, 0]), ("vision_config", {"depth": 3}), ("is_causal", False),
    ("use_rope", False), ("kv_lora_rank", 512), ("attention_sinks", True),
    ("attn_logit_softcap", 50.0), ("logits_scaling", 8.0), ("moe_intermediate_size", 768),
])
def test_a_key_that_changes_the_computation_is_refused(key, value):
    with pytest.raises(ValueError, match=f"unsupported fields: {key}="):
        from_hf(BASE | {key: value})


@pytest.mark.parametrize(("key", "value"), [
    ("partial_rotary_factor", 1.0), ("residual_multiplier", 1), ("num_local_experts", 0),
    ("no_rope_layers", []), ("is_causal", True), ("quantization_config", {}),
    ("final_logit_softcapping", None), ("use_qk_norm", False),
])
def test_such_a_key_passes_where_it_changes_nothing(key, value):
    assert from_hf(BASE | {key: value}) == from_hf(BASE)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "rms_norm_eps", "rope_theta",
                                 "head_dim", "max_position_embeddings", "num_key_value_heads"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308, float("inf"), float("nan")])
def test_numbers_beyond_any_model_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} is"):
        from_hf(BASE | {key: value})
    with pytest.raises(ValueError, match="rope"):
        from_hf(BASE | {"rope_scaling": {"rope_type": "linear", "factor": 10**400}})


def test_a_missing_field_is_named():
    with pytest.raises(ValueError, match="vocab_size"):
        from_hf({k: v for k, v in BASE.items() if k != "vocab_size"})


def test_gemma_refuses_what_its_attention_does_not_do():
    for family, key, value in (("Gemma3", "attn_logit_softcapping", 5.0),
                               ("Gemma3", "use_bidirectional_attention", True),
                               ("Gemma2", "use_bidirectional_attention", True)):
        raw = oracle.config(family.lower()).to_dict() | {"architectures": [f"{family}ForCausalLM"]}
        from_hf(raw)
        with pytest.raises(ValueError, match=key):
            from_hf(raw | {key: value})


@pytest.mark.parametrize(("model", "change", "windows"), [
    ("gemma3", {}, (9,) * 5 + (None, 9)),
    ("gemma3", {"sliding_window_pattern": 3}, (9, 9, None) * 2 + (9,)),
    ("gemma3", {"_sliding_window_pattern": 3}, (9, 9, None) * 2 + (9,)),
    ("gemma3", {"sliding_window_pattern": 2, "_sliding_window_pattern": 3}, (9, None) * 3 + (9,)),
    ("gemma2", {}, (9, None) * 3 + (9,)), ("mistral", {}, (9,) * 7),
    ("mistral", {"sliding_window": None}, (None,) * 7),
    ("qwen3", {"max_window_layers": 5}, (None,) * 7),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 5}, (None,) * 5 + (9,) * 2),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}, (9,) * 7),
    ("qwen3", {"use_sliding_window": True, "num_hidden_layers": 30}, (None,) * 28 + (9,) * 2),
])
def test_unlisted_layers_have_the_windows_of_their_family(model, change, windows):
    """Gemma 3 files give the period of full attention under one of two names."""
    raw = {key: value for key, value in oracle.config(model).to_dict().items()
           if key not in ("layer_types", "max_window_layers") and "pattern" not in key}
    raw |= {"architectures": [oracle.architecture(model).__name__], "num_hidden_layers": 7,
            "sliding_window": 9}
    assert from_hf(raw | change).windows == windows
