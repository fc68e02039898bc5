"""Released models' `config.json`, as published and with keys added, removed or malformed."""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Iterator
from typing import Any

import pytest
from released_configs import FULL, NUMBERS, RAW, SLIDING, Numbers

from jaxpersona import UserError
from jaxpersona.models import family_keys
from jaxpersona.models.config import ModelConfig, Rope
from jaxpersona.models.families import from_hf, to_hf
from jaxpersona.models.presets import preset


def _is_gemma(name: str) -> bool:
    return name.startswith("gemma")


def _numbers(config: ModelConfig) -> Numbers:
    rope: tuple = (config.rope.kind,)
    if config.rope.kind != "default":
        rope += (config.rope.factor,)
    if config.rope.kind == "llama3":
        rope += (config.rope.low_freq_factor, config.rope.high_freq_factor,
                 config.rope.original_context)
    local = config.rope_local
    assert local is None or local == Rope(local.theta)
    return Numbers(
        config.parameters, config.n_layers, config.d_model, config.n_heads, config.n_kv_heads,
        config.head_dim, config.d_ff, config.vocab_size, config.max_context, config.norm_eps,
        config.rope.theta, round(config.attn_scale**-2), rope, local and local.theta,
        config.windows, (config.attn_softcap, config.final_softcap), config.activation,
        config.tied_embeddings, config.qk_norm, config.qkv_bias)


@pytest.mark.parametrize("name", RAW)
def test_the_numbers_of_a_released_model(name):
    """Warnings are errors in this test suite."""
    expected = NUMBERS[name]
    if expected.windows is None:
        expected = expected._replace(windows=(None,) * expected.layers)
    config = from_hf(RAW[name])
    assert _numbers(config) == expected
    assert config.attn_scale == pytest.approx(expected.scalar**-0.5, rel=1e-12)
    assert not config.o_bias and not config.mlp_bias
    assert config.post_norms == _is_gemma(name)
    assert config.norm_offset == (1.0 if _is_gemma(name) else 0.0)
    assert config.embed_scale == pytest.approx(expected.width**0.5 if _is_gemma(name) else 1.0)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(("name", "changes"), [
    ("Qwen3-1.7B", {"windows": (None,) * 27 + (9,)}),
    ("Qwen3-1.7B", {"qkv_bias": True, "o_bias": True, "norm_eps": 1e-3}),
    ("Mistral-7B-Instruct-v0.3", {"windows": (None, 9) * 16, "rope": Rope(5e5, "linear", 3.0)}),
    ("Llama-3.2-1B@v5", {"mlp_bias": True, "tied_embeddings": False, "head_dim": 96,
                         "attn_scale": 96**-0.5}),
    ("gemma-2-2b-it", {"attn_softcap": None, "final_softcap": 7.0, "attn_scale": 10.5**-0.5}),
    ("gemma-3-1b-it", {"rope": Rope(1e6, "linear", 8.0), "rope_local": Rope(3e4), "o_bias": True,
                       "qkv_bias": True}),
], ids=str)
def test_a_changed_configuration_is_written_and_read_back(name, changes):
    config = dataclasses.replace(from_hf(RAW[name]), **changes)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(("name", "released", "changes"), [
    ("llama-3.2-1b", "Llama-3.2-1B@v5", {}), ("llama-3.2-3b", "Llama-3.2-3B-Instruct", {}),
    ("qwen3-1.7b", "Qwen3-1.7B", {}), ("qwen2.5-0.5b", "Qwen2.5-0.5B-Instruct", {}),
    ("qwen2.5-1.5b", "Qwen2.5-1.5B@v5", {"max_context": 32_768}),
    ("qwen3-4b", "Qwen3-4B-Instruct-2507@v5", {"max_context": 40_960, "rope": Rope(1e6)}),
])
def test_a_preset_is_the_released_model(name, released, changes):
    assert preset(name) == dataclasses.replace(from_hf(RAW[released]), **changes)


BOOKKEEPING = {
    "_name_or_path": "org/base", "_commit_hash": "0" * 40, "_attn_implementation_autoset": True,
    "unsloth_fixed": True, "unsloth_version": "2025.3.19", "auto_map": {"AutoConfig": "c.Config"},
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "output_attentions": False,
    "return_dict": True, "torchscript": False, "chunk_size_feed_forward": 0, "max_length": 20,
    "tokenizer_class": "PreTrainedTokenizerFast", "attention_dropout": 0.1, "use_cache": False,
    "gradient_checkpointing": True, "neftune_noise_alpha": 5.0, "pretraining_tp": 2,
    "transformers.js_config": {"dtype": "q4"}, "torch_dtype": "float16", "dtype": "float32",
    "bos_token_id": None, "eos_token_id": [1, 2], "is_decoder": True, "pruned_heads": {},
}


@pytest.mark.parametrize("name", RAW)
def test_known_bookkeeping_is_ignored_without_a_warning(name):
    """Warnings are errors in this test suite."""
    assert from_hf(RAW[name] | BOOKKEEPING) == from_hf(RAW[name])


UNKNOWN = {"training_stage": "dpo", "tokens_seen": 1.5e12, "freeze_backbone": True,
           "lora_target_modules": ["q_proj", "v_proj"], "data_mix": {"web": 0.7, "code": 0.3}}


@pytest.mark.parametrize("key", UNKNOWN)
@pytest.mark.parametrize("name", RAW)
def test_an_unknown_key_is_ignored_with_one_warning_that_names_it(name, key):
    with pytest.warns(UserWarning) as caught:
        config = from_hf(RAW[name] | {key: UNKNOWN[key]}, place="m/config.json")
    assert config == from_hf(RAW[name])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("m/config.json: ") and f"{key}=" in message
    assert not any(other in message for other in UNKNOWN if other != key)


# key: (a value that changes the computation, values that do not)
CHANGES: dict[str, tuple[Any, tuple]] = {
    "quantization_config": ({"quant_method": "fp8"}, ({}, None)),
    "num_local_experts": (8, (0, None)),
    "moe_intermediate_size": (768, (0, None)),
    "partial_rotary_factor": (0.5, (1, 1.0, None)),
    "residual_multiplier": (0.22, (1.0, None)),
    "logits_scaling": (8.0, (1, None)),
    "rope_interleaved": (True, (False, None)),
    "use_mrope": (True, (False, None)),
    "use_qk_norm": (True, (False, None)),
    "no_rope_layers": ([1, 1, 0], ([], None)),
    "is_causal": (False, (True, None)),
    "attn_logit_softcap": (50.0, (0.0, None)),
    "vision_config": ({"depth": 27}, ({}, None)),
    "num_kv_shared_layers": (10, (0, None)),
    "no_bias": (False, (True, None)),
}
# keys that only other families read, by family; their values, and those without a warning
FOREIGN: dict[str, dict[str, tuple[Any, tuple]]] = {
    "llama": {"sliding_window": (4096, (None,)), "use_sliding_window": (True, (False, None)),
              "layer_types": ([SLIDING, FULL], (None,)),
              "final_logit_softcapping": (30.0, (None,)),
              "hidden_activation": ("gelu", (None, "silu"))},
    "mistral": {"mlp_bias": (True, (False, None)), "use_sliding_window": (True, (False, None)),
                "attn_logit_softcapping": (50.0, (None,))},
    "qwen2": {"mlp_bias": (True, (False, None)), "query_pre_attn_scalar": (144, (None,)),
              "sliding_window_pattern": (6, (None,)), "rope_local_base_freq": (1e4, (None,))},
    "qwen3": {"mlp_bias": (True, (False, None)), "final_logit_softcapping": (30.0, (None,)),
              "use_bidirectional_attention": (True, (False, None))},
    "gemma2": {"mlp_bias": (True, (False, None)), "use_sliding_window": (True, (False, None)),
               "rope_local_base_freq": (1e4, (None,))},
    "gemma3_text": {"mlp_bias": (True, (False, None)), "use_sliding_window": (True, (False, None))},
}


@pytest.mark.parametrize(("name", "key"), [
    pytest.param(name, key, id=f"{name}-{key}") for name in RAW for key in CHANGES])
def test_a_key_that_changes_the_computation_is_refused_with_its_value(name, key):
    value = CHANGES[key][0]
    with pytest.raises(UserError, match=re.escape(f"{key}={reprlib.repr(value)}")):
        from_hf(RAW[name] | {key: value})


@pytest.mark.parametrize(("name", "key"), [
    pytest.param(name, key, id=f"{name}-{key}") for name in RAW
    for key in FOREIGN[RAW[name]["model_type"]]])
def test_a_key_that_only_other_families_read_is_ignored_with_a_warning(name, key):
    """`test_foreign_keys.py` compares the logits with those of transformers."""
    value = FOREIGN[RAW[name]["model_type"]][key][0]
    with pytest.warns(UserWarning, match=re.escape(f"{key}={reprlib.repr(value)}")) as caught:
        assert from_hf(RAW[name] | {key: value}, place="m/config.json") == from_hf(RAW[name])
    assert len(caught) == 1 and str(caught[0].message).startswith(
        "m/config.json: ignored keys that the family")


@pytest.mark.parametrize("name", RAW)
def test_such_a_key_is_read_without_a_warning_where_it_changes_nothing(name):
    """Warnings are errors in this test suite."""
    for key, (_, neutral) in (CHANGES | FOREIGN[RAW[name]["model_type"]]).items():
        for value in neutral:
            assert from_hf(RAW[name] | {key: value}) == from_hf(RAW[name]), f"{key}={value}"


@pytest.mark.parametrize("name", RAW)
def test_a_key_of_another_family_that_other_keys_turn_off_is_read_without_a_warning(name):
    raw = RAW[name]
    assert from_hf({"max_window_layers": 99} | raw) == from_hf(raw)
    assert from_hf({"max_window_layers": 99, "use_sliding_window": False} | raw) == from_hf(raw)
    if raw["model_type"] == "llama":
        off = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1}
        assert from_hf(raw | off) == from_hf(raw)


@pytest.mark.parametrize("name", RAW)
def test_a_missing_number_of_key_heads_is_that_of_transformers(name):
    """Null means the number of heads; a missing key means the family's default."""
    raw = RAW[name]
    heads, family = raw["num_attention_heads"], raw["model_type"]
    assert from_hf(raw | {"num_key_value_heads": None}).n_kv_heads == heads
    default = {"llama": heads, "mistral": 8, "qwen2": 32, "qwen3": 32}.get(family, 4)
    bare = {k: v for k, v in raw.items() if k != "num_key_value_heads"}
    if heads % default:
        with pytest.raises(UserError, match=f"n_kv_heads is {default}; it must divide"):
            from_hf(bare)
    else:
        assert from_hf(bare).n_kv_heads == default


@pytest.mark.parametrize("key", family_keys._CHANGES)
def test_every_listed_key_is_refused_unless_its_value_is_neutral(key):
    raw = RAW["Llama-3.2-1B@v5"]
    same, other = {"None": ((None, False, 0, [], {}), (2, True, [2], {"a": 1}, "full")),
                   "1": ((None, False, 1, 1.0), (2, 0.5, [2], "full")),
                   "True": ((None, True), (False, 2, [2]))}[str(family_keys._CHANGES[key])]
    for value in same:
        assert from_hf(raw | {key: value}) == from_hf(raw), value
    for value in other:
        with pytest.raises(UserError, match=re.escape(f"{key}={value!r}")):
            from_hf(raw | {key: value})


def test_the_list_of_keys_that_change_the_computation_is_complete():
    """No key is lost by an edit; a key that is added changes the number."""
    assert len(family_keys._CHANGES) == 219


def _malformed(name: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield names, changes and expected error messages for malformed values of known keys.

    This includes values that a family reads but does not support.
    """
    raw = RAW[name]
    family, layers = raw["model_type"], raw["num_hidden_layers"]
    rope = "rope_parameters" if name.endswith("@v5") else "rope_scaling"
    act = "hidden_activation" if _is_gemma(name) else "hidden_act"
    yield "yarn", {rope: {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"
    yield "dynamic", {rope: {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"
    yield "rope-type-list", {rope: {"rope_type": ["linear"]}}, "rope_type is ['linear']"
    yield "rope-list", {rope: [8.0]}, f"{rope} is [8.0]"
    yield "rope-factor", {rope: {"rope_type": "linear", "factor": "8"}}, "factor is '8'"
    yield ("mrope", {rope: {"rope_type": "default", "mrope_section": [16, 24, 24]}},
           "{'mrope_section': [16, 24, 24]}")
    yield ("partial-rope", {rope: {"rope_type": "default", "partial_rotary_factor": 0.5}},
           "{'partial_rotary_factor': 0.5}")
    yield "theta-by-layer", {"rope_theta": {"full": 1e6}}, "rope_theta is {'full': 1000000.0}"
    yield "activation", {act: "relu2"}, f"{act} is 'relu2'"
    yield "no-activation", {act: ""}, f"{act} is ''"
    yield "activation-list", {act: ["silu"]}, f"{act} is ['silu']"
    yield "kv-heads-list", {"num_key_value_heads": [8] * 3}, "num_key_value_heads is [8, 8, 8]"
    yield "d-ff-list", {"intermediate_size": [64, 64]}, "intermediate_size is [64, 64]"
    yield "head-dim-text", {"head_dim": "128"}, "head_dim is '128'"
    yield "context-real", {"max_position_embeddings": 8192.5}, "max_position_embeddings is 8192.5"
    yield "layers-true", {"num_hidden_layers": True}, "num_hidden_layers is True"
    yield "tied-number", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"
    yield "bias-text", {"attention_bias": "false"}, "attention_bias is 'false'"
    yield "eps-text", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"
    if family == "llama":
        yield "mlp-bias", {"mlp_bias": "true"}, "mlp_bias is 'true'"
    else:
        mixed = [FULL] * (layers - 1) + ["chunked_attention"]
        yield "layer-type", {"layer_types": mixed}, f"layer_types is {reprlib.repr(mixed)}"
        nested = [[FULL]] * layers
        yield "layer-type-list", {"layer_types": nested}, f"layer_types is {reprlib.repr(nested)}"
        yield "layer-types-short", {"layer_types": [FULL] * 2}, f"must be a list of {layers} values"
        yield "layer-types-text", {"layer_types": FULL}, f"layer_types is '{FULL}'"
        yield ("layer-without-window",
               {"layer_types": [FULL] * (layers - 1) + [SLIDING], "sliding_window": None},
               f"layer_types contains {SLIDING}")
        yield "window-list", {"sliding_window": [4096]}, "sliding_window is [4096]"
    if family in ("qwen2", "qwen3"):
        yield ("layer-with-windows-off",
               {"layer_types": [FULL] * (layers - 1) + [SLIDING], "sliding_window": 4096},
               f"layer_types contains {SLIDING}")
        yield "windows-text", {"use_sliding_window": "no"}, "use_sliding_window is 'no'"
        yield "first-window", {"max_window_layers": -1}, "max_window_layers is -1"
    if _is_gemma(name):
        yield "scalar-text", {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"
        yield "softcap-list", {"final_logit_softcapping": [30.0]}, "final_logit_softcapping is [30"
        yield ("bidirectional", {"use_bidirectional_attention": True},
               "use_bidirectional_attention is true")
    if family == "gemma3_text":
        yield "attention-softcap", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"
        yield "pattern-list", {"sliding_window_pattern": [6]}, "sliding_window_pattern is [6]"
        yield "local-theta-text", {"rope_local_base_freq": "1e4"}, "rope_local_base_freq is '1e4'"
        for kind in (FULL, SLIDING):
            yield (f"yarn-{kind}", {"rope_parameters": {kind: {"rope_type": "yarn"}}},
                   "rope_type is 'yarn'")
            yield f"list-{kind}", {"rope_parameters": {kind: []}}, "rope parameters are []"
    else:
        by_layer = {FULL: {"rope_type": "default"}, SLIDING: {"rope_type": "linear", "factor": 8.0}}
        yield "rope-by-layer", {"rope_parameters": by_layer}, "{'full_attention': {"


@pytest.mark.parametrize(("name", "change", "words"), [
    pytest.param(name, change, words, id=f"{name}-{case}")
    for name in RAW for case, change, words in _malformed(name)])
def test_a_malformed_or_unsupported_value_of_a_key_that_is_read_is_refused(name, change, words):
    with pytest.raises(UserError, match=re.escape(words)):
        from_hf(RAW[name] | change)


OPTIONAL = {
    "llama": ("mlp_bias",), "mistral": ("layer_types",),
    "qwen2": ("layer_types", "use_sliding_window", "max_window_layers"),
    "qwen3": ("layer_types", "use_sliding_window", "max_window_layers", "attention_bias"),
    "gemma2": ("layer_types", "query_pre_attn_scalar", "hidden_activation", "attention_bias"),
    "gemma3_text": ("layer_types", "query_pre_attn_scalar", "hidden_activation",
                    "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq",
                    "use_bidirectional_attention"),
}


@pytest.mark.parametrize("name", RAW)
def test_null_is_the_same_as_no_key(name):
    for key in (*OPTIONAL[RAW[name]["model_type"]], "head_dim", "rope_theta", "rope_scaling",
                "rope_parameters", "tie_word_embeddings"):
        raw = {k: v for k, v in RAW[name].items() if k != key}
        assert from_hf(raw | {key: None}) == from_hf(raw), key


@pytest.mark.parametrize("name", [n for n in RAW if n.startswith("Qwen")])
def test_null_is_the_same_as_no_key_where_qwen_has_windows(name):
    raw = {k: v for k, v in RAW[name].items() if k not in ("layer_types", "max_window_layers")}
    raw |= {"use_sliding_window": True, "sliding_window": 4096}
    config = from_hf(raw | {"max_window_layers": None, "layer_types": None})
    layers = range(NUMBERS[name].layers)
    assert config.windows == tuple(4096 if layer >= 28 else None for layer in layers)


@pytest.mark.parametrize("name", [n for n in RAW if n.startswith("gemma")])
def test_null_disables_soft_caps(name):
    raw = RAW[name] | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = from_hf(raw)
    assert config.attn_softcap is None and config.final_softcap is None


@pytest.mark.parametrize("name", [n for n in RAW if n.endswith("@v5") and "gemma-3" not in n])
def test_rope_scaling_beside_rope_parameters_must_be_the_same(name):
    """transformers reads only `rope_scaling`, with the base from `rope_theta`."""
    raw = RAW[name]
    same = raw["rope_parameters"]
    assert from_hf(raw | {"rope_scaling": dict(same)}) == from_hf(raw)
    assert from_hf(raw | {"rope_scaling": {}}) == from_hf(raw)
    for other in ({"rope_type": "linear", "factor": 2.0}, same | {"rope_theta": 7e5}):
        with pytest.raises(UserError, match="rope_scaling is .* but rope_parameters is"):
            from_hf(raw | {"rope_scaling": other})
    with pytest.raises(UserError, match="rope_type is 'yarn'"):
        from_hf(raw | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})


GEMMA3 = [n for n in RAW if n.startswith("gemma-3")]


@pytest.mark.parametrize("name", GEMMA3)
@pytest.mark.parametrize("change", [
    pytest.param({"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0},
                                      SLIDING: {"rope_type": "default"}}}, id="without-bases"),
    pytest.param({"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}}}, id="full"),
    pytest.param({"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0},
                                      SLIDING: None}}, id="null"),
    pytest.param({"rope_parameters": None,
                  "rope_scaling": {"rope_type": "linear", "factor": 8.0}}, id="v4"),
])
def test_gemma3_takes_missing_bases_from_the_top_level(name, change):
    """Some released files have `rope_parameters` without bases, and `rope_local_base_freq`."""
    config = from_hf(RAW[name] | {"rope_theta": 2e6, "rope_local_base_freq": 3e4} | change)
    assert config.rope == Rope(2e6, "linear", 8.0)
    assert config.rope_local == Rope(3e4)


@pytest.mark.parametrize("name", GEMMA3)
def test_gemma3_has_default_bases(name):
    raw = {k: v for k, v in RAW[name].items() if not k.startswith("rope")}
    for change in ({}, {"rope_parameters": {SLIDING: {"rope_type": "default"}}}):
        config = from_hf(raw | change)
        assert config.rope == Rope(1e6) and config.rope_local == Rope(1e4)


@pytest.mark.parametrize("name", RAW)
def test_a_neutral_partial_rotary_factor_is_accepted_in_the_rope_dict(name):
    nested = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}
    assert from_hf(RAW[name] | {"rope_scaling": None, "rope_parameters": nested}).rope == Rope(1e6)
