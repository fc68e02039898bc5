"""Compile prefill and decode for an H200 on any machine, to check `plan`'s memory estimate.

    pip install 'jax[cuda12]'        (for the CUDA version in `H200` below)
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python bench/ahead.py --model qwen3-8b --batch 32

The benchmark also counts the kernels of a decode step with and without caps. Autotuning needs a GPU
and is disabled, so XLA's choice of kernels may differ from that on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from common import report
from jax.experimental import topologies
from jaxpersona.kernels.attention import Asked, attention_implementation

import jaxpersona as jp
from jaxpersona.interventions import resolve_layers
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import layout
from jaxpersona.planning import hlo, plan

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 151397597184 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""  # XLA's target description of the GPU


def kernels(program: Any) -> Counter[str]:
    """Count the kernels in one decode step by named scope."""
    looped = [op for op in hlo.operations(program.as_text()) if op.looped]
    return Counter(
        re.sub(r"layer\d+", "layer", op.scope.removeprefix("jit(decode)/while/body/")) or "(none)"
        for op in looped if op.kind in ("fusion", "custom-call", "copy", "sort"))


def main() -> None:
    """Compile the programs; print a decode step's kernels and the compiled and planned memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="qwen3-8b", help="name of a preset")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--layers", default="24:32", help="layers to cap, a half-open range")
    args = parser.parse_args()
    # autotuning times kernels on a GPU, which this machine may not have
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    config = jp.preset(args.model)
    few = resolve_layers(args.layers, config.n_layers)
    target = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200)

    placed = jax.sharding.SingleDeviceSharding(target.devices[0])
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=placed), layout(config))
    shapes = plan.Shapes.of(args.batch, args.context)

    def attends(config: ModelConfig, asked: Asked, *, platform: str, **case: Any) -> str:
        return attention_implementation(config, "gpu", capability=9.0, asked=asked, **case)[0]

    arms = {"uncapped": range(0), "capped": few, "all": range(config.n_layers)}
    made: dict[str, dict[str, Any]] = {}
    with mock.patch.object(jax, "default_backend", return_value="gpu"), \
            mock.patch("jaxpersona.models.forward.choose", attends):  # choose attention as on a GPU
        for arm, layers in arms.items():
            programs = plan.lowered(params, config, shapes, layers)
            made[arm] = {name: program.compile() for name, program in zip(
                ("prefill", "decode"), programs, strict=True)}
    memory = {name: made["uncapped"][name].memory_analysis() for name in ("prefill", "decode")}
    prefilled = memory["prefill"]
    total = (prefilled.argument_size_in_bytes + prefilled.output_size_in_bytes
             + prefilled.temp_size_in_bytes)
    planned = plan.plan(config, "h200:1", batch=args.batch,
                        context=args.context)["bytes_per_chip"]
    steps = {arm: kernels(programs["decode"]) for arm, programs in made.items()}
    count = {arm: found.total() for arm, found in steps.items()}
    bare, capped = steps["uncapped"], steps["capped"]
    print(json.dumps(dict(bare.most_common()), indent=1))
    print(json.dumps({place: [bare[place], capped[place]] for place in {**bare, **capped}
                      if bare[place] != capped[place]}, indent=1))
    report(
        "ahead", args.model, args, target="H200, compiled but not run",
        kernels_a_step=count,
        added_kernels_per_capped_layer=round((count["capped"] - count["uncapped"])
                                             / len(few), 2),
        added_kernels_per_layer_of_all=round((count["all"] - count["uncapped"])
                                             / config.n_layers, 2),
        temporaries={name: found.temp_size_in_bytes for name, found in memory.items()},
        added_temporaries={
            name: made["capped"][name].memory_analysis().temp_size_in_bytes
            - memory[name].temp_size_in_bytes for name in memory},
        bytes=total, planned_bytes=planned["total"],
        planned_over_compiled=round(planned["total"] / total, 4),
        planned_temporaries_over_compiled=round(
            planned["temporaries"] / prefilled.temp_size_in_bytes, 4),
    )


if __name__ == "__main__":
    main()
