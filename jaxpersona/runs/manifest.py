"""The manifest of a run: a JSON record of the data that determine the run's rollouts.

The manifest also contains the names of the judges and a record of the last call.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxpersona.data.texts import Question, Role
from jaxpersona.engine.sampling import PRNG
from jaxpersona.models.int8 import weights_note
from jaxpersona.models.params import SCHEME
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.seal import digest
from jaxpersona.runtime import Device, setting

if TYPE_CHECKING:
    from jaxpersona.models.model import Model
    from jaxpersona.text.chat import Row

_PACKAGES = ("jax", "jaxlib", "jaxpersona", "numpy", "transformers", "tokenizers")
# JAX settings and environment variables that can change rounding
_FLAGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_disable_most_optimizations",
          "jax_disable_jit")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_IRRELEVANT = re.compile(r"--xla_dump_\S+")
# CPU features that can affect the code that XLA generates
_CPU = re.compile(r"(avx|sse|fma|f16c|amx|asimd|sve|bf16|i8mm)")


def manifest(model: Model, roles: Sequence[Role], questions: Sequence[Question], judge: str,
             settings: Settings, tokens: Mapping[str, str], **last: Any) -> dict[str, Any]:
    """Return a run's manifest as a JSON object.

    When a run is resumed, `compare.check_same` requires the fields "model" (weights, dtype, shape
    and stop tokens), "arguments" (all fields of `settings`) and "numerics" (the result of
    `numerics`) to be equal. A role or question that was already in the run must have the same texts
    and tokens, which depend on the tokenizer and the chat template. Roles, questions and judges may
    be added, and the field "last" is not compared.

    Args:
      model, settings: the model and the sampling settings of the run.
      roles, questions: the roles and questions of this call; `Run.open` adds the roles and
        questions of earlier calls.
      judge: the name of the judge.
      tokens: digests of the tokens of each role's prompts and of each question, with the keys
        "role <name>" and "question <id>" (`prepare.check_prompts`).
      last: further arguments to record in the field "last".
    """
    return {
        "model": {"fingerprint": model.fingerprint, "fingerprint_scheme": SCHEME,
                  "dtype": str(model.params.like.dtype), **weights_note(model.params),
                  "layers": model.config.n_layers, "width": model.config.d_model,
                  "stop_ids": sorted(int(i) for i in model.stop_ids)},
        "arguments": dataclasses.asdict(settings),
        "roles": {role.name: digest([list(role.prompts), tokens[f"role {role.name}"]])
                  for role in roles},
        "questions": {str(q.id): digest([q.text, tokens[f"question {q.id}"]]) for q in questions},
        "numerics": numerics(model),
        "judges": {judge: {}},
        "last": {"model": model.name, "judge": judge, **last, "versions": {
            name: importlib.metadata.version(name) for name in _PACKAGES}},
    }


def numerics(model: Model) -> dict[str, Any]:
    """Return the parts of the execution environment that can change rounding or random draws.

    These are the platform, the kind and the number of devices, the mesh, the number of processes,
    the PRNG, and some JAX settings and environment variables. JAX's PRNG settings are omitted,
    because the sampler always uses the PRNG `sampling.PRNG`.
    """
    weight = model.params.like
    devices = sorted(weight.devices(), key=lambda d: d.id) if isinstance(weight, jax.Array) else (
        jax.devices()[:1])
    mesh: Mapping[str, int] = {} if model.mesh is None else dict(model.mesh.shape)
    return {
        "platform": devices[0].platform, "device": _kind(devices[0]), "devices": len(devices),
        "mesh": dict(mesh), "processes": jax.process_count(), "prng": PRNG,
        "jax": {name: _flag(name) for name in _FLAGS},
        "environment": {name: _IRRELEVANT.sub("", os.environ.get(name, "")).split()
                        for name in _VARIABLES},
    }


def _flag(name: str) -> bool | int | str | None:
    """Return a JAX setting as a JSON value; None if it is unset or unknown to this JAX version."""
    value = setting(name)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _kind(device: Device) -> str:
    """Return JAX's device kind or, for a CPU, its architecture and instruction-set features."""
    if device.platform != "cpu":
        return device.device_kind
    instructions: set[str] = set()
    if os.path.exists("/proc/cpuinfo"):  # only Linux has this file
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() in ("flags", "Features"):
                    instructions = {word for word in value.split() if _CPU.match(word)}
                    break
    return " ".join([platform.machine(), *sorted(instructions)])


def tokens_digest(rows: Sequence[Row]) -> str:
    """Return a digest of the tokens and token kinds of encoded prompts (`chat.Row`)."""
    return digest([[np.asarray(row.tokens).tolist(), np.asarray(row.kind).tolist()]
                   for row in rows])
