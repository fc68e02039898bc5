"""The settings of a LoRA adapter: which modules they select, and the limits of their values."""

from __future__ import annotations

import pathlib
import warnings

import pytest
from jaxpersona.ckpts import adapter_config as settings

from jaxpersona.errors import UserError

PLACE = pathlib.Path("a/adapter_config.json")
MODULE = "model.layers.3.self_attn.q_proj"


def value(raw, module=MODULE):
    return settings.setting(raw, "lora_alpha", "alpha_pattern", module, PLACE)


@pytest.mark.parametrize(("raw", "wanted"), [
    ({}, 8), ({"lora_alpha": 2.5}, 2.5), ({"lora_alpha": 2, "alpha_pattern": None}, 2),
    ({"alpha_pattern": {"q_proj": 3}}, 3), ({"alpha_pattern": {"proj": 3}}, 8),
    ({"alpha_pattern": {"layers.3.self_attn.q_proj": 3}}, 3),
    ({"alpha_pattern": {MODULE: 3}}, 3), ({"alpha_pattern": {"q_pro": 3}}, 8),
    ({"alpha_pattern": {"q_proj|k_proj": 3, "q_proj": 4}}, 3),
    ({"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 5}}, 5),
    ({"lora_alpha": 999_999}, 999_999),
], ids=str)
def test_the_value_of_a_module_is_that_of_the_first_pattern_that_matches(raw, wanted):
    """As in PEFT, a pattern matches the whole name or the part after a dot."""
    assert value(raw) == wanted


@pytest.mark.parametrize(("raw", "words"), [
    ({"lora_alpha": 0}, f"lora_alpha of {MODULE} is 0; it must be a positive number below a mill"),
    ({"lora_alpha": 1e6}, "is 1000000.0; it must be a positive number below a million"),
    ({"lora_alpha": True}, "is True; it must"), ({"lora_alpha": float("nan")}, "is nan; it must"),
    ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; it must be a JSON object"),
    ({"alpha_pattern": {"q_proj": "x"}}, "is 'x'; it must be a positive"),
], ids=str)
def test_a_value_that_no_adapter_has_is_refused(raw, words):
    """Values are positive numbers below a million."""
    with pytest.raises(UserError, match=words):
        value(raw)


@pytest.mark.parametrize(("pattern", "long"), [
    ("a" * 1000, False), ("a" * 1001, True), ("a*b*c*d*", False), ("a*b*c*d*e+", True),
    ("(a|b)c*", False), ("(a|b)*", True), ("(a|b)+", True), ("(a|b){2}", True), ("(a)?", False)])
def test_patterns_that_may_take_long_are_known(pattern, long):
    """More than 1,000 characters, more than four repetitions, or a repeated group."""
    assert settings._may_take_long(pattern) is long


@pytest.mark.parametrize(("setting", "chosen"), [
    (None, []), (["q_proj"], [MODULE]), (["proj"], []), ([MODULE], [MODULE]), ([], []),
    (["self_attn.q_proj", "up_proj"], [MODULE, "model.layers.0.mlp.up_proj"]),
    ("all-linear", [MODULE, "model.layers.0.mlp.up_proj"]),
    ("ALL-LINEAR", [MODULE, "model.layers.0.mlp.up_proj"]),
    (r".*\.q_proj", [MODULE]), (r"q_proj", []), (r"lm_head|.*up_proj",
                                                 ["model.layers.0.mlp.up_proj", "lm_head"]),
], ids=str)
def test_modules_are_selected_by_their_ends_or_by_an_expression_for_the_whole_name(setting, chosen):
    """"all-linear" excludes the embedding and the head."""
    test = settings._selector({"target_modules": setting}, "target_modules", PLACE)
    modules = [MODULE, "model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head"]
    assert [module for module in modules if test(module)] == chosen


@pytest.mark.parametrize(("raw", "missing"), [
    ({"target_modules": ["q_proj"]}, "model.layers.0.q_proj, model.layers.2.q_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, "model.layers.0.q_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": 2}, "model.layers.2.q_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": []},
     "model.layers.0.q_proj, model.layers.2.q_proj"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"]},
     "model.layers.2.q_proj"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ""), ({}, ""),
], ids=str)
def test_selected_modules_without_factors_are_named(raw, missing):
    """Layers and modules that the settings leave out are not missing."""
    modules = [f"model.layers.{i}.q_proj" for i in range(3)] + ["lm_head"]

    def warn():
        settings.warn_missing(raw, {"model.layers.1.q_proj"}, modules, PLACE.parent, "w.file")

    if missing:
        with pytest.warns(UserWarning, match=f"^a: w.file has no weights for {missing}, which ada"):
            warn()
    else:
        with warnings.catch_warnings(action="error"):
            warn()


@pytest.mark.parametrize(("key", "given", "good"), [
    ("use_dora", False, True), ("use_dora", 0, False), ("bias", "none", True), ("bias", None, True),
    ("bias", "lora_only", False), ("modules_to_save", [], True), ("modules_to_save", {}, False),
    ("trainable_token_indices", {}, True), ("arrow_config", None, True),
    ("arrow_config", {}, False),
    ("init_lora_weights", True, True), ("init_lora_weights", "gaussian", True),
    ("init_lora_weights", "PiSSA", False), ("init_lora_weights", "loftq", False),
    ("peft_type", "LORA", True), ("peft_type", None, False), ("fan_in_fan_out", True, False),
], ids=str)
def test_settings_that_change_the_computation_are_refused(key, given, good):
    """Values of another type are not equal to the neutral value."""
    if good:
        settings.check_settings({key: given}, PLACE)
    else:
        with pytest.raises(UserError, match=f"^a/adapter_config.json: {key} is "):
            settings.check_settings({key: given}, PLACE)


def test_at_most_twenty_unknown_settings_are_listed():
    """Known settings and settings without effect are omitted."""
    with pytest.warns(UserWarning, match=r"settings \(k00=1, .*, k19=1\); if they change") as found:
        settings.warn_unknown({f"k{i:02d}": 1 for i in range(25)} | {"off": 0, "r": 5}, PLACE)
    assert len(found) == 1 and "k20" not in str(found[0].message)
