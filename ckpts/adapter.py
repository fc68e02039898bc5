"""LoRA adapters in the format of the PEFT library, merged into the weights or kept separate.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. In LoRA (Hu et
al. 2021), a product W·x becomes W·x + s·B·(A·x), with A [r, in], B [out, r] and s = α/r, or α/√r
with rsLoRA (Kalajdzievski 2023).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxpersona.ckpts import names, tensorfile
from jaxpersona.ckpts.hf import ADAPTER
from jaxpersona.ckpts.names import HEAD
from jaxpersona.ckpts.tensorfile import DTYPES, Entry

from jaxpersona.distributed import sharding
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json, require_folder
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import Int8
from jaxpersona.models.params import Params, Spec
from jaxpersona.models.prepared import PRODUCTS
from jaxpersona.models.weight import LowRank, Weight

WEIGHTS = "adapter_model.safetensors"
# Regular expressions with nested or many repetitions are rejected, because matching could take
# exponential or high-degree polynomial time.
_NESTED, _REPEATED = re.compile(r"\)[*+{]"), re.compile(r"[*+{]")
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# PEFT settings that can change the computation, each with the values that leave it unchanged
_INACTIVE: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "fan_in_fan_out": (False, None), "bias": ("none", None),
    "lora_bias": (False, None), "modules_to_save": (None, []), "layer_replication": (None, []),
    "target_parameters": (None, []), "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []), "use_qalora": (False, None),
    "arrow_config": (None,), "use_bdlora": (None, False),
}
# prefixes of the `init_lora_weights` values with which PEFT also changes the base weights
_CHANGED_BASE = ("pissa", "olora", "loftq", "corda")


@dataclasses.dataclass(frozen=True)
class Pair:
    """The low-rank update of one weight, s·B·A, as two factors.

    Attributes:
      a: the factor A, [r, in] float32.
      b: the factor B multiplied by s, [out, r] float32.
    """

    a: np.ndarray
    b: np.ndarray


def read_adapter(folder: pathlib.Path, config: ModelConfig) -> dict[str, Pair]:
    """Read the weight updates of a LoRA adapter.

    Args:
      folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
      config: the configuration of the base model.

    Returns:
      The update of each weight that the adapter changes, by tensor name in the base checkpoint.

    Raises:
      UserError: the folder is not a LoRA adapter, or the adapter uses an unsupported feature or
        does not fit the model; the message names the file and the setting or tensor.
    """
    require_folder(folder)
    if not (folder / ADAPTER).exists():
        raise UserError(f"{folder}: not an adapter (no {ADAPTER})")
    raw = read_json(folder / ADAPTER)
    place = folder / ADAPTER
    if not isinstance(raw, dict):
        raise UserError(f"{place}: contains a {type(raw).__name__}, not a JSON object")
    _check_settings(raw, place)
    entries, _, faults = tensorfile.read_header(folder / WEIGHTS)
    expected = {t.name: t for t in jax.tree.leaves(names.tensors(config)) if t.spec.inner}
    pairs, more = _paired(entries, expected, config)
    if not faults and not pairs and not more:
        more = [f"{WEIGHTS}: contains no LoRA weights"]
    if faults + more:
        listed = "\n".join(f"  - {fault}" for fault in faults + more)
        raise UserError(f"{folder}: the adapter does not fit the model\n{listed}")
    updates = {}
    for name, (a, b) in pairs.items():
        module = name.removesuffix(".weight")
        rank = _setting(raw, "r", "rank_pattern", module, place)
        if a.shape[0] != rank:
            raise UserError(f"{place}: r of {module} is {rank}, but its factors in {WEIGHTS} "
                            f"have rank {a.shape[0]}")
        alpha = _setting(raw, "lora_alpha", "alpha_pattern", module, place)
        scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
        wide = np.dtype(np.float32)
        updates[name] = Pair(tensorfile.read_as(a, wide),
                             np.float32(scale) * tensorfile.read_as(b, wide))
    return updates


def _check_settings(raw: Mapping[str, Any], place: pathlib.Path) -> None:
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


def _setting(raw: Mapping[str, Any], key: str, patterns: str, module: str,
             place: pathlib.Path) -> float:
    """Return the rank or α of a module: the value of the first matching pattern, or of `key`.

    As in PEFT, the default is 8, and a pattern is a regular expression that must match the whole
    name of the module or the part of the name after any of its dots.
    """
    value = raw.get(key, 8)
    table = raw.get(patterns) or {}
    if not isinstance(table, dict):
        raise UserError(f"{place}: {patterns} is {table!r:.60}; it must be a JSON object")
    for pattern, own in table.items():
        if len(pattern) > 1000 or len(_REPEATED.findall(pattern)) > 4 or _NESTED.search(pattern):
            raise UserError(f"{place}: {patterns} has {pattern!r:.60}, which may take too long to "
                            "match; use module names as keys")
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except (OverflowError, RecursionError, re.error):  # a huge count, nested groups
            raise UserError(f"{place}: {patterns} has {pattern!r:.60}, which is not a valid "
                            "regular expression") from None
        if matched:
            value = own
            break
    if type(value) not in (int, float) or not 0 < value < 1e6:
        raise UserError(f"{place}: {key} of {module} is {value!r:.60}; it must be a positive "
                        "number below a million")
    return value


def _paired(entries: Mapping[str, Entry], expected: Mapping[str, names.Tensor],
            config: ModelConfig) -> tuple[dict[str, tuple[Entry, Entry]], list[str]]:
    """Return the factors (A, B) of each weight by tensor name, and a list of all errors."""
    by_weight: dict[str, dict[str, Entry]] = {}
    faults = []
    for name, entry in sorted(entries.items()):
        match = _NAME.fullmatch(name)
        weight = f"{match[1]}.weight" if match else ""
        if match is None:
            faults.append(f"{name}: not a LoRA factor of a linear layer")
        elif weight == HEAD and config.tied_embeddings:
            faults.append(f"{name}: the model has no separate output head (tied embeddings)")
        elif weight not in expected:
            faults.append(f"{name}: the model has no weight {weight}")
        elif entry.dtype not in DTYPES or len(entry.shape) != 2:
            faults.append(f"{name}: dtype is {entry.dtype} and shape is {list(entry.shape)}; a "
                          "factor must be a matrix with one of the dtypes "
                          f"{', '.join(DTYPES)}")
        else:
            by_weight.setdefault(weight, {})[match[2]] = entry
    pairs = {}
    for weight, factors in by_weight.items():
        out, width = expected[weight].shape
        if set(factors) != {"A", "B"}:
            faults.append(f"{weight}: only lora_{next(iter(factors))} is present")
            continue
        a, b = factors["A"], factors["B"]
        if a.shape[1] != width or b.shape[0] != out or a.shape[0] != b.shape[1]:
            faults.append(f"{weight}: factors with shapes {list(a.shape)} and "
                          f"{list(b.shape)} do not fit the weight's shape [{out}, {width}]")
        else:
            pairs[weight] = (a, b)
    return pairs, faults


def merged(params: Params, config: ModelConfig, updates: Mapping[str, Pair]) -> Params:
    """Return parameters with the updates added to the weights (see `add_pair`).

    Raises:
      UserError: an update applies to an int8 weight.
    """
    def add(w: jax.Array, spec: Spec, pair: Pair) -> jax.Array:
        if isinstance(w, Weight):
            raise UserError("the weights are int8, and an adapter cannot be merged into them; load "
                            "the float model with dtype='int8' and this adapter, or use "
                            "merge=False")
        return add_pair(w, spec, pair)

    return _changed(params, config, updates, add)


def add_pair(w: jax.Array, spec: Spec, pair: Pair) -> jax.Array:
    """Return W + s·B·A for one array W, computed in float32 and rounded to the dtype of W."""
    return _sum(w, jax.device_put((pair.b @ pair.a).reshape(spec.shape), w.sharding))


def attached(params: Params, config: ModelConfig, updates: Mapping[str, Pair]) -> Params:
    """Return parameters in which each weight with an update is a `weight.LowRank`.

    The `LowRank` contains the unchanged base weight and the update. The update has the dtype of the
    activations, even if the base weight is int8.
    """
    dtype = params.like.dtype

    def attach(w: jax.Array | Int8, spec: Spec, pair: Pair) -> LowRank:
        at = len(spec.shape) - spec.inner
        rank = pair.a.shape[0]
        a = pair.a.reshape(rank, *spec.shape[at:]).astype(dtype)
        b = pair.b.reshape(*spec.shape[:at], rank).astype(dtype)
        array = w.value if isinstance(w, Int8) else w
        mesh = sharding.mesh_of(array)
        if mesh is None:
            where = array.sharding
            return LowRank(w, jax.device_put(a, where), jax.device_put(b, where), spec.inner)
        places = (sharding.weight_sharding((None, *spec.axes[at:]), a.shape, mesh),
                  sharding.weight_sharding((*spec.axes[:at], None), b.shape, mesh))
        return LowRank(w, jax.device_put(a, places[0]), jax.device_put(b, places[1]), spec.inner)

    return _changed(params, config, updates, attach)


def _changed(params: Params, config: ModelConfig, updates: Mapping[str, Pair],
             change: Any) -> Params:
    """Replace each weight that has an update with the result of `change(weight, spec, update)`."""
    tensors = names.tensors(config)

    def one(holder: Any, layout: Any, field: str) -> Any:
        tensor, w = getattr(layout, field), getattr(holder, field)
        if tensor is None or w is None or tensor.name not in updates:
            return w
        return change(w, tensor.spec, updates[tensor.name])

    layers = tuple(
        layer.replace(**{field: one(layer, layout, field) for field in PRODUCTS})
        for layer, layout in zip(params.layers, tensors.layers, strict=True))
    return params.replace(layers=layers, head_vd=one(params, tensors, "head_vd"))


@jax.jit
def _sum(w: jax.Array, delta: jax.Array) -> jax.Array:
    return (w.astype(jnp.float32) + delta).astype(w.dtype)
