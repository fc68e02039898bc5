"""LoRA adapters in the format of the PEFT library, merged into the weights or kept separate.

An adapter is a folder with `adapter_config.json` and `adapter_model.safetensors`. In LoRA (Hu et
al. 2021), a product W·x becomes W·x + s·B·(A·x). The factors A [r, in] and B [out, r] have rank r.
The scale s is α/r, or α/√r with rsLoRA (Kalajdzievski 2023), where α is the setting `lora_alpha`.
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
from jaxpersona.ckpts import adapter_config, names, tensorfile
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
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")

@dataclasses.dataclass(frozen=True)
class Pair:
    """The low-rank update of one weight, s·B·A, as two factors.

    Attributes:
      a: the factor A, [r, in] float32.
      b: the factor B multiplied by s, [out, r] float32.
    """

    a: np.ndarray
    b: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Located:
    """The entries of one weight's LoRA factors in the file, and the scale of their product."""

    a: Entry
    b: Entry
    scale: float


def check_folder(folder: pathlib.Path) -> dict[str, Any]:
    """Check, without the model, that a folder is a supported LoRA adapter.

    Returns:
      The content of `adapter_config.json` as a dict.

    Raises:
      UserError: the folder is not a LoRA adapter, is damaged, or uses an unsupported feature.
    """
    require_folder(folder)
    place = folder / ADAPTER
    if not place.exists():
        raise UserError(f"{folder} is not an adapter; give a folder that contains {ADAPTER}")
    raw = read_json(place)
    if not isinstance(raw, dict):
        raise UserError(f"{place}: contains a {type(raw).__name__}, not a JSON object")
    adapter_config.check_settings(raw, place)
    _, _, faults = tensorfile.read_header(folder / WEIGHTS)
    if faults:
        raise UserError(f"{folder}: damaged adapter\n" + "\n".join(f"  - {x}" for x in faults))
    return raw


def check_adapter(folder: pathlib.Path, config: ModelConfig) -> None:
    """Check that an adapter fits a model, without reading its LoRA factors.

    One warning names the unknown settings in `adapter_config.json`. Another names the modules that
    the settings select but for which the file has no LoRA factors, or states that the file was not
    checked for missing factors.

    Raises:
      UserError: as for `read_adapter`, or a setting that selects modules is malformed.
    """
    raw, located = _locate(folder, config)
    adapter_config.warn_unknown(raw, folder / ADAPTER)
    modules = [t.name.removesuffix(".weight") for t in jax.tree.leaves(names.tensors(config))
               if t.spec.inner]
    adapter_config.warn_missing(
        raw, {name.removesuffix(".weight") for name in located}, modules, folder, WEIGHTS)


def read_adapter(folder: pathlib.Path, config: ModelConfig) -> dict[str, Pair]:
    """Read the weight updates of a LoRA adapter.

    Args:
      folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.
      config: the configuration of the base model.

    Returns:
      The update of each weight that the adapter changes, by tensor name in the base checkpoint.

    Raises:
      UserError: the folder is not a LoRA adapter, or the adapter is damaged, uses an unsupported
        feature or does not fit the model; the message names the folder or file, and the setting or
        tensor if there is one.
    """
    wide = np.dtype(np.float32)
    return {name: Pair(tensorfile.read_as(x.a, wide),
                       np.float32(x.scale) * tensorfile.read_as(x.b, wide))
            for name, x in _locate(folder, config)[1].items()}


def _locate(folder: pathlib.Path,
            config: ModelConfig) -> tuple[dict[str, Any], dict[str, _Located]]:
    """Return an adapter's settings, and the `_Located` of each changed weight by tensor name."""
    raw, place = check_folder(folder), folder / ADAPTER
    entries = tensorfile.read_header(folder / WEIGHTS)[0]
    expected = {t.name: t for t in jax.tree.leaves(names.tensors(config)) if t.spec.inner}
    pairs, faults = _paired(entries, expected, config)
    if not pairs and not faults:
        faults = [f"{WEIGHTS}: contains no LoRA weights"]
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(f"{folder}: the adapter does not fit the model\n{listed}")
    located = {}
    for name, (a, b) in pairs.items():
        module = name.removesuffix(".weight")
        rank = adapter_config.setting(raw, "r", "rank_pattern", module, place)
        if a.shape[0] != rank:
            raise UserError(f"{place}: r of {module} is {rank}, but its factors in {WEIGHTS} "
                            f"have rank {a.shape[0]}")
        alpha = adapter_config.setting(raw, "lora_alpha", "alpha_pattern", module, place)
        scale = alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank)
        located[name] = _Located(a, b, scale)
    return raw, located


def _paired(entries: Mapping[str, Entry], expected: Mapping[str, names.Tensor],
            config: ModelConfig) -> tuple[dict[str, tuple[Entry, Entry]], list[str]]:
    """Return the entries (A, B) of each weight's factors by tensor name, and all error messages."""
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
        elif match[2] in by_weight.get(weight, {}):
            faults.append(f"{name}: the weight has a second lora_{match[2]} with another name")
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
