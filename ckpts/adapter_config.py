"""The settings of a LoRA adapter, adapter_config.json in the format of the PEFT library."""

from __future__ import annotations

import pathlib
import re
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpersona.ckpts.names import EMBED, HEAD
from jaxpersona.ckpts.shards import some

from jaxpersona.errors import UserError

# Regular expressions with nested or many repetitions are rejected, because matching could take
# exponential or high-degree polynomial time.
_NESTED, _REPEATED = re.compile(r"\)[*+{]"), re.compile(r"[*+{]")
# PEFT settings that can change the computation, each with the values that leave it unchanged
_INACTIVE: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "layer_replication": (None, []),
    "target_parameters": (None, []), "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []), "use_qalora": (False, None),
    "arrow_config": (None,), "use_bdlora": (None, False), "kasa_config": (None,),
    "monteclora_config": (None,),
}
# prefixes of the `init_lora_weights` values with which PEFT also changes the base weights
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# settings that do not change the computation of a trained adapter, or that are read here
_KNOWN = frozenset("""
    alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config
    exclude_modules inference_mode init_lora_weights layers_pattern layers_to_transform loftq_config
    lora_alpha lora_dropout lora_ga_config megatron_config megatron_core merge_weights
    peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules
    task_type use_rslora velora_config
""".split())


def check_settings(raw: Mapping[str, Any], place: pathlib.Path) -> None:
    """Raise UserError if the adapter is not LoRA, or if an unsupported setting may affect results.

    Args:
      raw: the settings.
      place: the file with the settings, for error messages.
    """
    if raw.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{place}: peft_type is {raw['peft_type']!r:.60}; only 'LORA' is supported")
    for key, inactive in _INACTIVE.items():
        value = raw.get(key)
        if not any(value is x or (type(value) is type(x) and value == x) for x in inactive):
            raise UserError(f"{place}: {key} is {value!r:.60}, which is not supported; merge the "
                            "adapter into its base model with peft's merge_and_unload")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise UserError(f"{place}: init_lora_weights is {init!r:.60}, which changes the base "
                        "model's weights; convert the adapter to plain LoRA with peft's "
                        "save_pretrained(path_initial_model_for_weight_conversion=…)")


def warn_unknown(raw: Mapping[str, Any], place: pathlib.Path) -> None:
    """Warn once about unknown settings, unless their value is null, false, 0 or empty."""
    unknown = sorted(key for key in set(raw) - _KNOWN - set(_INACTIVE) if raw[key])
    if unknown:
        listed = ", ".join(f"{key}={reprlib.repr(raw[key])}" for key in unknown[:20])
        warnings.warn(f"{place}: ignored unknown settings ({listed}); if they change what the "
                      "adapter computes, merge it into its base model with peft's "
                      "merge_and_unload", stacklevel=2)


def warn_missing(raw: Mapping[str, Any], present: set[str], modules: Sequence[str],
                 folder: pathlib.Path, file: str) -> None:
    """Warn once about modules that the settings select but for which the file has no LoRA factors.

    If a regular expression may take too long to match, nothing is checked, and the warning says so.

    Args:
      raw: the settings.
      present: the names of the modules for which the file has factors.
      modules: the names of all linear layers of the model.
      folder: the folder of the adapter, for messages.
      file: the name of the file with the factors, for messages.

    Raises:
      UserError: a setting that selects modules is malformed.
    """
    place = folder / "adapter_config.json"
    try:
        chosen = _selector(raw, "target_modules", place)
        excluded = _selector(raw, "exclude_modules", place)
    except _TooLong as error:
        warnings.warn(f"{place}: {error}, which may take too long to match; whether {file} lacks "
                      "weights was not checked. Use a list of module names", stacklevel=2)
        return
    layers = raw.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    if layers is not None and (not isinstance(layers, list)
                               or any(type(i) is not int for i in layers)):
        raise UserError(f"{place}: layers_to_transform is {reprlib.repr(layers)}; it must be a "
                        "layer or a list of layers")

    def layer_is_chosen(module: str) -> bool:
        found = re.search(r"\.layers\.(\d+)\.", module)
        return not layers or (found is not None and int(found[1]) in layers)

    missing = {m for m in modules if chosen(m) and not excluded(m) and layer_is_chosen(m)} - present
    if missing:
        warnings.warn(f"{folder}: {file} has no weights for {some(missing)}, which "
                      "adapter_config.json selects; the base weights are used there, as in peft. "
                      "If the file is incomplete, save the adapter again", stacklevel=2)


class _TooLong(Exception):
    """Raised for a regular expression that may take too long to match."""


def _selector(raw: Mapping[str, Any], key: str, place: pathlib.Path) -> Callable[[str], bool]:
    """Return a function that tests whether the setting `key` selects a module, as in PEFT.

    `key` is "target_modules" or "exclude_modules". A list contains module names or their last
    components. A string is a regular expression for the whole name, or "all-linear" for all linear
    layers except the output head. A missing or null setting selects no module.
    """
    value = raw.get(key)
    if value is None:
        return lambda _: False
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        ends = tuple(f".{name}" for name in value)
        return lambda module: f".{module}".endswith(ends)
    if not isinstance(value, str):
        raise UserError(f"{place}: {key} is {reprlib.repr(value)}; it must be a list of module "
                        "names or a regular expression")
    if value.lower() == "all-linear":
        return lambda module: f"{module}.weight" not in (EMBED, HEAD)
    if _may_take_long(value):
        raise _TooLong(f"{key} is {reprlib.repr(value)}")
    try:
        pattern = re.compile(value)
    except (OverflowError, RecursionError, re.error):  # e.g. "a{9999999999}", deeply nested groups
        raise UserError(f"{place}: {key} is {reprlib.repr(value)}, which is not a valid regular "
                        "expression") from None
    return lambda module: pattern.fullmatch(module) is not None


def _may_take_long(pattern: str) -> bool:
    return (len(pattern) > 1000 or len(_REPEATED.findall(pattern)) > 4
            or _NESTED.search(pattern) is not None)


def setting(raw: Mapping[str, Any], key: str, patterns: str, module: str,
             place: pathlib.Path) -> float:
    """Return the rank or α of a module: the value of the first matching pattern, or of `key`.

    As in PEFT, the default is 8, and a pattern is a regular expression that must match the whole
    name of the module or the part of the name after any of its dots.

    Args:
      raw: the settings.
      key: the name of the setting for all modules, "r" or "lora_alpha".
      patterns: the name of the setting that maps patterns to values, "rank_pattern" or
        "alpha_pattern".
      module: the name of the module.
      place: the file with the settings, for error messages.

    Raises:
      UserError: the setting `patterns` is not a JSON object, a pattern is invalid or may take too
        long to match, or the value is not a positive number below a million.
    """
    value = raw.get(key, 8)
    table = raw.get(patterns) or {}
    if not isinstance(table, dict):
        raise UserError(f"{place}: {patterns} is {table!r:.60}; it must be a JSON object")
    for pattern, own in table.items():
        if _may_take_long(pattern):
            raise UserError(f"{place}: {patterns} has {pattern!r:.60}, which may take too long to "
                            "match; use module names as keys")
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except (OverflowError, RecursionError, re.error):  # e.g. "a{9999999999}", nested groups
            raise UserError(f"{place}: {patterns} has {pattern!r:.60}, which is not a valid "
                            "regular expression") from None
        if matched:
            value = own
            break
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise UserError(f"{place}: {key} of {module} is {value!r:.60}; it must be a positive "
                        "number below a million")
    return value
