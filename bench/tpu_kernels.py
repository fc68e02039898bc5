"""Compile the Pallas kernels for TPUs without a TPU, and compare them with XLA's kernels.

    pip install 'jaxpersona[tpu]'
    JAX_PLATFORMS=cpu python bench/tpu_kernels.py attention --model gemma-2-27b --chip v6e
    JAX_PLATFORMS=cpu python bench/tpu_kernels.py residual --model llama-3.1-8b --chip v5e

The programs are compiled but not run. The part `attention` compiles a prefill of one row with XLA's
chunked attention and with splash attention. The part `residual` compiles decode steps and a prefill
without a cap, and with every layer capped by XLA's edit or by the fused kernel. A few layers are
enough (`--layers`), because each layer adds the same number of kernels and bytes, and the
temporaries of one layer's attention are freed before the next layer. The last line of the output is
JSON.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import report

import jaxpersona as jp
from jaxpersona.distributed.sharding import running_on, spread_rows
from jaxpersona.models.batch import ASSISTANT, GENERATED, VALID, Batch
from jaxpersona.models.config import ModelConfig, replace
from jaxpersona.models.nn import QUERY_CHUNK
from jaxpersona.planning import chips, hlo, plan
from jaxpersona.planning.arithmetic import abstract_weights

KERNELS = ("fusion", "custom-call", "copy", "convolution", "dot", "reduce", "sort")
READ = 4  # number of directions in the arms that capture projections


def prefill(config: ModelConfig, mesh: Any, rows: int, width: int, **options: Any) -> Any:
    """Compile a prefill of a batch of prompts with a new cache, for the devices of a mesh.

    Args:
      config: the model configuration.
      mesh: the mesh of abstract TPU devices.
      rows, width: the number of prompts and their length in tokens.
      options: further arguments of `forward`.
    """
    shape = (rows, width)
    batch = Batch(*(np.zeros(shape, kind) for kind in (np.int32, np.int32, np.uint16, np.int32)),
                  row_id=np.zeros((rows,), np.uint32))

    def run(params: Any, batch: Batch) -> Any:
        return jp.forward(params, config, batch, slots=width, logits="last", **options)

    with running_on("tpu"):
        lowered = jax.jit(run).lower(abstract_weights(config, mesh, "bfloat16"), batch)
    return lowered.compile()


def decode(config: ModelConfig, mesh: Any, rows: int, slots: int, *, interventions: Any,
           **options: Any) -> Any:
    """Compile a loop of greedy decode steps with a cache of `slots` slots."""
    def step(params: Any, state: tuple, edits: Any, **fresh: Any) -> tuple:
        carry, token, position = state
        kind = jnp.full((rows, 1), VALID | ASSISTANT | GENERATED, jnp.uint16)
        batch = Batch(token[:, None], position[:, None], kind, jnp.zeros((rows, 1), jnp.int32),
                      row_id=jnp.zeros((rows,), jnp.uint32)).spread(params.like)
        out = jp.forward(params, config, batch, carry=carry, logits="last", interventions=edits,
                         **options, **fresh)
        return out.carry, jnp.argmax(out.logits, -1).astype(jnp.int32), position + 1

    def run(params: Any, state: tuple, until: jax.Array) -> tuple:
        ready = None if interventions is None else interventions.prepare(rows, params.like)
        return jax.lax.fori_loop(0, until, lambda _, state: step(params, state, ready), state)

    def first(params: Any) -> tuple:
        zeros = spread_rows(jnp.zeros((rows,), jnp.int32), 0, params.like)
        return step(params, (None, zeros, zeros), interventions, slots=slots)

    params = abstract_weights(config, mesh, "bfloat16")
    with running_on("tpu"):
        state = jax.eval_shape(first, params)
        return jax.jit(run, donate_argnums=1).lower(params, state, np.int32(slots)).compile()


def sizes(program: Any) -> dict[str, int]:
    """Return a program's temporary bytes, and the bytes accessed according to XLA."""
    return {"temporaries": int(program.memory_analysis().temp_size_in_bytes),
            "bytes": int(program.cost_analysis()["bytes accessed"])}


def per_layer(program: Any, layers: int) -> float:
    """Return the median number of kernels per layer."""
    found = hlo.operations(program.as_text())
    if any(op.looped and op.kind in KERNELS and "layer0" in op.scope.split("/") for op in found):
        found = [op for op in found if op.looped]  # count only the operations of a decode step
    return statistics.median(sum(op.kind in KERNELS for op in hlo.by_layer(found, i))
                             for i in range(layers))


def score_bytes(program: Any, config: ModelConfig, width: int) -> int:
    """Estimate the bytes of attention scores that a program writes per layer.

    XLA's cost analysis counts the body of a loop only once. This function adds up the bytes of
    those results in loop bodies that are at least as large as the bfloat16 scores of one chunk,
    multiplies the sum by the number of chunks, and divides it by the number of layers.
    """
    chunk = 2 * config.n_heads * min(width, QUERY_CHUNK) * width
    found = [op for op in hlo.operations(program.as_text()) if op.looped and op.bytes >= chunk]
    return sum(op.bytes for op in found) * -(-width // QUERY_CHUNK) // config.n_layers


def attention(config: ModelConfig, mesh: Any, widths: list[int]) -> dict[str, Any]:
    """Compile prefills of one row with XLA attention and splash attention; return their sizes."""
    out: dict[str, Any] = {}
    for width in widths:
        for name in ("xla", "splash"):
            program = prefill(config, mesh, 1, width, attention=name)
            out[f"{width} {name}"] = {
                **sizes(program), "score_bytes_per_layer": score_bytes(program, config, width)}
            print(width, name, out[f"{width} {name}"], flush=True)
    for width in widths:
        one, other = out[f"{width} splash"], out[f"{width} xla"]
        out[f"{width} temporaries, splash over xla"] = round(
            one["temporaries"] / other["temporaries"], 3)
    return out


def residual(config: ModelConfig, mesh: Any, rows: int, width: int, programs: list[str],
             readings: bool) -> dict[str, Any]:
    """Compile programs without a cap, and with every layer capped by XLA or the Pallas kernel.

    Returns:
      The sizes and the number of kernels of each program, and the overhead of the caps.
    """
    layers, rng = config.n_layers, np.random.default_rng(0)
    cap = jp.cap(rng.normal(size=config.d_model), layers=range(layers), floor=0.0)
    read = jp.capture.projections(rng.normal(size=(READ, config.d_model)))
    arms = {"plain": ("xla", None, None), "capped xla": ("xla", cap, None),
            "capped pallas": ("pallas", cap, None)}
    if readings:
        arms |= {"read xla": ("xla", cap, read), "read pallas": ("pallas", cap, read)}
    out: dict[str, Any] = {}
    for program in programs:
        for arm, (form, edits, capture) in arms.items():
            options = dict(residual=form, interventions=edits, capture=capture)
            made = (decode(config, mesh, rows, width, **options) if program == "decode" else
                    prefill(config, mesh, 1, width, attention="splash", **options))
            out[f"{program} {arm}"] = {**sizes(made), "kernels_per_layer": per_layer(made, layers)}
            print(program, arm, out[f"{program} {arm}"], flush=True)
        plain = out[f"{program} plain"]
        for arm in list(arms)[1:]:
            one = out[f"{program} {arm}"]
            one["added_kernels_per_layer"] = one["kernels_per_layer"] - plain["kernels_per_layer"]
            one["added_bytes_per_layer"] = round((one["bytes"] - plain["bytes"]) / layers)
    return out


def main() -> None:
    """Compile the programs of one part, then print their sizes and numbers of kernels."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("attention", "residual"))
    parser.add_argument("--model", default="llama-3.1-8b", help="name of a preset")
    parser.add_argument("--chip", default="v5e", choices=chips.TPUS)
    parser.add_argument("--layers", type=int, default=3, help="number of layers to compile")
    parser.add_argument("--programs", nargs="+", default=["decode", "prefill"],
                        choices=("decode", "prefill"), help="the programs of `residual`")
    parser.add_argument("--readings", action="store_true",
                        help=f"also compile `residual` with {READ} captured projections per layer")
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 4096, 8192],
                        help="prompt lengths of `attention` in tokens")
    parser.add_argument("--rows", type=int, default=32, help="number of rows in the decode step")
    parser.add_argument("--width", type=int, default=2048,
                        help="prompt length and number of cache slots of `residual`")
    args = parser.parse_args()
    config = replace(jp.preset(args.model), n_layers=args.layers)
    devices = chips.tpu_devices(f"{args.chip}:1x1")
    if devices is None:
        parser.error("libtpu is not installed: pip install 'jaxpersona[tpu]'")
    mesh = plan._mesh({"data": 1, "model": 1}, devices, config)
    found = (attention(config, mesh, args.widths) if args.part == "attention" else
             residual(config, mesh, args.rows, args.width, args.programs, args.readings))
    report(f"kernels {args.part}", args.model, args,
           target=f"one {args.chip} chip, compiled but not run", layers=args.layers, **found)


if __name__ == "__main__":
    main()
