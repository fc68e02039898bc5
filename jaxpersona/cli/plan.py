"""The command `jaxpersona plan`: estimate the memory and time that a model needs on given chips."""

from __future__ import annotations

import json
import os
import pathlib
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from jaxpersona.cli.output import say
from jaxpersona.errors import UserError
from jaxpersona.extras import pip_line

if TYPE_CHECKING:
    from jaxpersona.models.config import ModelConfig
    from jaxpersona.planning.arithmetic import Weights


def plan(
    topology: Annotated[str, typer.Option(help="The chips as CHIP:SHAPE, e.g. v5e:4x4 or h200:8.")],
    model: Annotated[str, typer.Option(
        help="`random:<preset>`, a .gguf file or a folder with a config.json; weights are not "
             "read.")
    ] = "random:llama-3.3-70b",
    batch: Annotated[int, typer.Option(
        help="Batch size: the total number of rows over all chips.")] = 32,
    context: Annotated[int, typer.Option(
        help="Number of KV cache slots per row, for prompt and reply.")] = 2048,
    cap: Annotated[str | None, typer.Option(
        show_default="no cap", help="Layers to cap, a half-open range such as 56:72.")] = None,
    mesh: Annotated[str | None, typer.Option(
        show_default="data=…,model=N with the largest valid N up to 16",
        help="The device mesh, e.g. data=2,model=8.")] = None,
    dtype: Annotated[str, typer.Option(
        help="The dtype of the weights: bfloat16 or int8.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the memory and time that a model needs, without its weights or an accelerator."""
    from jaxpersona.distributed.sharding import parse_mesh
    from jaxpersona.interventions import resolve_layers
    from jaxpersona.planning.plan import plan as make
    from jaxpersona.runtime import default_setting

    config = read_shape(model)
    if context > config.max_context:
        raise UserError(f"context is {context}; the maximum of {model} is "
                        f"{config.max_context}")
    layers = () if cap is None else resolve_layers(cap, config.n_layers)
    with default_setting("jax_platforms", "cpu"):  # otherwise libtpu searches for a local TPU
        found = make(config, topology, name=model, batch=batch, context=context,
                     cap_layers=layers, mesh=None if mesh is None else parse_mesh(mesh),
                     dtype=cast("Weights", dtype))
    say(json.dumps(found) if as_json else "\n".join(card(found)))


def read_shape(source: str) -> ModelConfig:
    """Return the configuration of a model without loading its weights.

    Args:
      source: "random:<preset>", or the path of a GGUF file or of a folder with a config.json.

    Raises:
      UserError: the source does not exist, or its configuration is invalid or not supported.
    """
    from jaxpersona.ckpts import gguf_model, hf
    from jaxpersona.models.presets import preset

    if source.startswith("random:"):
        return preset(source.removeprefix("random:"))
    folder = os.path.expanduser(source)
    if folder.endswith(gguf_model.SUFFIX) and not os.path.isdir(folder):
        return gguf_model.open_checkpoint(pathlib.Path(folder)).config
    if not os.path.isdir(folder):
        raise UserError(f"{source}: no such folder; give random:<preset>, a .gguf file or a folder "
                        "with the model's config.json")
    return hf.read_config(folder)[0]


def card(found: dict[str, Any]) -> list[str]:
    """Format the result of `planning.plan.plan` as lines of text.

    The text states which numbers come from the compiler, which are computed by arithmetic and which
    are extrapolated.
    """
    from jaxpersona.planning import chips

    size = {name: n / 1e9 for name, n in found["bytes_per_chip"].items()}
    mesh = " × ".join(f"{name}={n}" for name, n in found["mesh"].items())
    tpu = found["topology"].split(":")[0].lower() in chips.TPUS
    missing = f"libtpu is not installed: {pip_line('libtpu')}"
    whose = ("compiler" if found["compiled"] else
             f"arithmetic: {missing if tpu else 'no compiler was used'}")
    verdict = "fits" if found["fits"] else f"does not fit, by {found['short_by'] / 1e9:.2f} GB"
    time, hours = found["roofline_seconds"], found["axis_run_hours"]
    lines = [
        f"{found['model']} on {found['topology']}; chips: {found['chips']}; mesh: {mesh}",
        f"batch {found['batch']}, context {found['context']}, prompts of {found['prompt']} tokens",
        f"{verdict}: {size['total']:.2f} of {size['usable']:.2f} GB per chip: {found['dtype']} "
        f"weights {size['weights']:.2f}, cache {size['cache']:.2f} (arithmetic), temporaries "
        f"{size['temporaries']:.2f} ({whose})",
        f"largest batch: {found['largest_batch']} (extrapolated linearly)",
    ]
    if found["collectives_per_layer"] is not None:
        lines.append(f"collective reductions in a decode step: {found['collectives_per_layer']} "
                     "per layer (compiler)")
    if found["added_collectives"] is not None:
        lines.append(
            f"the cap (number of layers: {len(found['cap'])}) adds to each decode step (compiler): "
            f"collectives: {found['added_collectives']}; kernels per capped layer: "
            f"{found['added_fusions_per_layer']:g}; other kernels: "
            f"{found['added_fusions_once']:g}; memory traffic: "
            f"{found['added_bytes'] / 1e6:.1f} MB. It multiplies the temporaries (the "
            f"maximum of prefill and decode) by {found['temporaries_ratio']}")
    elif found["cap"] and found["compiled"]:
        lines.append("the cost of the cap is unknown: a decode step exceeds the memory of a chip")
    elif found["cap"]:
        lines.append("the cost of the cap is unknown without a compiler for these chips"
                     + (f" ({missing})" if tpu else ""))
    chip = found["chip"]
    lines += [
        f"roofline (arithmetic, with specifications from {chip['source']}): decode step "
        f"{time['decode_step'] * 1e3:.2f} ms, of which collective reductions take "
        f"{time['decode_sums'] * 1e3:.2f} ms; prefill {time['prefill']:.2f} s, of which "
        f"collective reductions take {time['prefill_sums']:.2f} s",
        "hours for an axis run with 331,200 replies of 512 tokens (arithmetic): " + ", ".join(
            f"{value} at {float(name):.0%} of the roofline" for name, value in hours.items()),
        "all times are estimates, not measurements",
    ]
    return lines
