"""Estimates of a model's memory and speed on given chips, without weights or an accelerator.

For TPUs, if libtpu is installed, prefill and decode are compiled ahead of time. The temporary
memory, accessed bytes, kernels and collectives are then read from the compiled programs. Times are
roofline estimates from published specifications, not measurements.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.stages import Lowered

from jaxpersona.brief import shown
from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import sharding
from jaxpersona.engine.programs import Stops, decode, prefill
from jaxpersona.engine.sampling import sampling
from jaxpersona.errors import UserError
from jaxpersona.interventions import Interventions, cap, resolve_layers
from jaxpersona.models.batch import Batch
from jaxpersona.models.config import ModelConfig, replace
from jaxpersona.models.params import Params
from jaxpersona.planning import chips, hlo
from jaxpersona.planning.arithmetic import (
    FRACTIONS,
    Shapes,
    Weights,
    abstract_weights,
    activation_bytes,
    cache_bytes,
    run_hours,
    seconds,
    weight_bytes,
)
from jaxpersona.runtime import Device, check_process

# depths at which prefill is compiled; from 8 layers on, its temporary memory is linear in the depth
DEPTHS = (8, 12)
_WIDEST = 16  # maximum size of the model axis if no mesh is given


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Statistics of the compiled prefill and decode programs, per chip.

    Attributes:
      prefill_temporaries, decode_temporaries: the bytes of temporary memory, excluding weights,
        cache and outputs.
      operations: the operations of one decode step; empty if the step exceeds device memory.
      bytes: the bytes that one decode step accesses, according to the compiler's cost analysis; 0
        if the step exceeds device memory.
    """

    prefill_temporaries: int
    decode_temporaries: int
    operations: tuple[hlo.Operation, ...]
    bytes: int

    @property
    def temporaries(self) -> int:
        """The peak temporary memory in bytes per chip; the two programs never run together."""
        return max(self.prefill_temporaries, self.decode_temporaries)


def plan(config: ModelConfig, topology: str, *, name: str = "model", batch: int = 32,
         context: int = 2048, cap_layers: Sequence[int] = (),
         mesh: Mapping[str, int] | None = None, dtype: Weights = "bfloat16") -> dict[str, Any]:
    """Estimate a model's memory, largest batch and speed on a topology.

    Args:
      config: the model configuration.
      topology: the topology in the form chip:extents, such as v5e:4x4 or h200:8.
      name: the model's name in the result.
      batch: the total number of rows on all chips.
      context: the number of cache slots per row; a quarter of the slots, at most 512, is reserved
        for the reply.
      cap_layers: the layers to cap in a second program, which is compared with the uncapped
        program; by default, there is no second program.
      mesh: the sizes of the axes "data", "fsdp" and "model". By default, "model" has the largest
        size up to 16 that divides the number of chips and is valid for the model, and the size of
        "data" is the number of chips divided by the size of "model".
      dtype: the dtype of the weights, including the embedding and the head. Activations and the
        cache are bfloat16.

    Returns:
      The dict that `jaxpersona plan --json` prints. For GPUs, or if libtpu is not installed, the
      temporary memory is estimated (`activation_bytes`), and the values of `compare` are None.

    Raises:
      UserError: the topology is unknown or not supported by libtpu, the mesh is invalid for the
        model or the number of chips, an argument has the wrong type or an invalid value, or this
        process was forked from a process that had used JAX.
    """
    check_process()
    chip, count = chips.parse(topology)
    if not isinstance(batch, int) or not isinstance(context, int):
        raise UserError(f"batch is {shown(batch, 60)}, context is {shown(context, 60)}; both must "
                        "be ints")
    if batch < 1 or context < 2:
        raise UserError(f"batch is {batch} and context is {context}; batch must be at least 1 and "
                        "context at least 2")
    if context > config.max_context:
        raise UserError(f"context is {context}; the model supports at most {config.max_context} "
                        "tokens")
    cap_layers = resolve_layers(cap_layers, config.n_layers) if len(cap_layers) else ()
    sizes = choose_mesh(config, count) if mesh is None else _checked(mesh, count)
    shapes = Shapes.of(batch, context)
    devices = chips.tpu_devices(topology) if chip.name in chips.TPUS else None
    if devices is not None and len(devices) != count:
        raise UserError(f"libtpu lists {len(devices)} devices for the {count} chips of topology "
                        f"{topology!r}; use a topology with one device per chip")
    placed = _mesh(sizes, devices, config)
    ways = sharding.ways(placed, "batch")
    if batch % ways:
        raise UserError(f"batch (--batch) is {batch}, but the mesh divides rows into {ways} "
                        f"shards; use a multiple of {ways}")
    compiled = None
    if isinstance(placed, Mesh):
        compiled = compile_for(config, placed, shapes, cap_layers, dtype)
        temporaries = compiled["plain"].temporaries
    else:
        temporaries = activation_bytes(config, placed, shapes, chip)
    weights = weight_bytes(config, placed, dtype)
    cache, room = cache_bytes(config, placed, shapes), usable(chip)
    total = weights + cache + temporaries
    roofline = seconds(config, placed, shapes, chip, dtype)
    by_row = (cache + temporaries) / batch
    return {
        "model": name, "dtype": dtype, "topology": topology, "chips": count,
        "mesh": dict(placed.shape),
        "batch": batch, "context": context, "prompt": shapes.width, "cap": list(cap_layers),
        "chip": dataclasses.asdict(chip), "compiled": compiled is not None,
        "fits": total <= room, "short_by": max(0, total - room),
        "bytes_per_chip": {"weights": weights, "cache": cache, "temporaries": temporaries,
                           "total": total, "usable": room},
        "largest_batch": max(0, int((room - weights) / by_row) // ways * ways),
        **compare(compiled, cap_layers),
        "roofline_seconds": roofline,
        "axis_run_hours": {str(f): round(run_hours(roofline, shapes, f), 1) for f in FRACTIONS},
    }


def usable(chip: chips.Chip) -> int:
    """Return the number of bytes of a chip's memory that are available to a program.

    The runtime reserves about 1/64 of the memory: on v5e, the compiler's limit is 15.75 of 16 GiB.
    """
    return chip.memory - chip.memory // 64


def choose_mesh(config: ModelConfig, count: int) -> dict[str, int]:
    """Return mesh axis sizes for `count` chips, with the largest valid model axis up to 16."""
    for ways in range(min(count, _WIDEST), 0, -1):
        if count % ways == 0:
            try:
                _mesh({"data": 1, "model": ways}, None, config)
            except UserError:
                continue
            return {"data": count // ways, "model": ways}
    raise AssertionError("a model axis of size 1 always fits")


def _checked(mesh: Mapping[str, int], count: int) -> dict[str, int]:
    size = int(np.prod(list(mesh.values())))
    if size != count:
        axes = " × ".join(f"{name}={n}" for name, n in mesh.items())
        raise UserError(f"mesh {axes} needs {size} chips; the topology has {count}")
    return dict(mesh)


def _mesh(sizes: Mapping[str, int], devices: Sequence[Device] | None,
          config: ModelConfig) -> Mesh | AbstractMesh:
    """Return a mesh adapted to the model with `fit`; without devices, an `AbstractMesh`."""
    if devices is not None:
        return sharding.fit(sharding.make_mesh(**sizes, devices=devices), config)
    kinds = (AxisType.Explicit,) * len(sizes)
    return sharding.fit(AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds), config)


def compile_for(config: ModelConfig, mesh: Mesh, shapes: Shapes,
                cap_layers: Sequence[int], dtype: Weights = "bfloat16") -> dict[str, Compiled]:
    """Compile prefill and decode without a cap and, if `cap_layers` is given, with a cap.

    From 8 layers on, the temporary memory of prefill is linear in the number of layers. Prefill
    without a cap is therefore compiled at the two depths in `DEPTHS`, and its temporary memory is
    extrapolated to the full depth. Prefill with a cap is compiled at the larger depth and
    extrapolated with the same slope. Decode is compiled at full depth.

    Returns:
      The statistics without a cap ("plain") and, if `cap_layers` is given, with a cap ("capped").
    """
    shallow, deep = (min(depth, config.n_layers) for depth in DEPTHS)
    arms: dict[str, tuple[int, ...]] = {"plain": ()}
    if cap_layers:
        arms["capped"] = tuple(cap_layers)
    def lower(depth: int, layers: tuple[int, ...]) -> tuple[Lowered, Lowered]:
        cut = replace(config, n_layers=depth)
        return lowered(abstract_weights(cut, mesh, dtype), cut, shapes, layers)

    waiting: dict[tuple[str, str], Lowered] = {}
    for arm, layers in arms.items():
        waiting[arm, "decode"] = lower(config.n_layers, layers)[1]
        # cap the same fraction of layers as in the full model, starting at the same relative depth
        share = -(-len(layers) * deep // config.n_layers)
        begin = min(layers[0] * deep // config.n_layers, deep - share) if layers else 0
        waiting[arm, "prefill"] = lower(deep, tuple(range(begin, begin + share)))[0]
    waiting["plain", "shallow"] = lower(shallow, ())[0]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # compilation releases the GIL
        programs = dict(zip(waiting, pool.map(_compile, waiting.values()), strict=True))
    rise = programs["plain", "prefill"][1] - programs["plain", "shallow"][1]
    beyond = round(rise / max(deep - shallow, 1) * (config.n_layers - deep))
    out = {}
    for arm in arms:
        program, temporaries = programs[arm, "decode"]
        text = "" if program is None else program.as_text()
        cost = None if program is None else program.cost_analysis()
        out[arm] = Compiled(
            prefill_temporaries=programs[arm, "prefill"][1] + beyond,
            decode_temporaries=temporaries,
            operations=tuple(hlo.operations(text)) if text else (),
            bytes=0 if cost is None else int(cost["bytes accessed"]))
    return out


def lowered(params: Params, config: ModelConfig, shapes: Shapes,
            cap_layers: Sequence[int]) -> tuple[Lowered, Lowered]:
    """Return prefill and decode, lowered with greedy sampling and, if `cap_layers`, with a cap.

    The leaves of `params` are arrays or `jax.ShapeDtypeStruct`s.
    """
    rows, width = shapes.batch, shapes.width
    edits = Interventions()
    if cap_layers:
        edits = cap(np.ones(config.d_model), layers=cap_layers, floor=0.0)
    field = (rows, width)
    batch = Batch(*(np.zeros(field, kind) for kind in (np.int32, np.int32, np.uint16, np.int32)),
                  row_id=np.zeros((rows,), np.uint32))
    settings, limit = sampling(rows), np.zeros((rows,), np.int32)
    stops = Stops(ids=np.full((4,), -1, np.int32), think=np.full((2,), -1, np.int32))
    begin = functools.partial(prefill, slots=shapes.slots, max_new=shapes.new, greedy=True)
    state = jax.eval_shape(
        lambda p: begin(p, config, batch, edits, Capture(), settings, stops, limit), params)
    until = np.int32(shapes.new)
    return (prefill.lower(params, config, batch, edits, Capture(), settings, stops, limit,
                          slots=shapes.slots, max_new=shapes.new, greedy=True),
            decode.lower(params, config, state, edits, Capture(), settings, stops, until,
                         greedy=True))


def _compile(lowered: Lowered) -> tuple[jax.stages.Compiled | None, int]:
    """Compile a program; return it with the size in bytes of its temporary memory.

    If the program exceeds device memory, return None and the size that the compiler's error states.
    """
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"\(([\d.]+)([MG])\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or wanted is None:
            raise
        size = {"M": 2**20, "G": 2**30}[wanted.group(2)]
        return None, round(float(wanted.group(1)) * size)
    memory = program.memory_analysis()
    assert memory is not None, "XLA for TPUs reports the memory of a program"
    return program, int(memory.temp_size_in_bytes)


def compare(compiled: Mapping[str, Compiled] | None,
            cap_layers: Sequence[int]) -> dict[str, Any]:
    """Return the number of collectives per layer in a decode step, and the overhead of a cap.

    A value is None if a decode program that it requires was not compiled or exceeds device memory.
    `collectives_per_layer` is the maximum over the layers, in which a reduce-scatter and its
    all-gather count as one (`hlo.reductions`). `added_collectives` and `added_bytes` are the
    additional collectives and accessed bytes of a decode step with the cap.
    `added_fusions_per_layer` is the median number of fusions added per capped layer, and
    `added_fusions_once` is the number of other added fusions. `temporaries_by_program` contains the
    ratio of temporary memory with the cap to temporary memory without the cap, for prefill and for
    decode. `temporaries_ratio` is the same ratio for the maximum over prefill and decode.
    """
    names = ("collectives_per_layer", "added_collectives", "added_fusions_per_layer",
             "added_fusions_once", "added_bytes", "temporaries_ratio", "temporaries_by_program")
    out: dict[str, Any] = dict.fromkeys(names)
    plain = compiled["plain"] if compiled else None
    if plain is None or not plain.operations:
        return out
    traffic = [op for op in plain.operations if op.kind in hlo.COLLECTIVES]
    layers = {name for op in traffic for name in op.scope.split("/")
              if re.fullmatch(r"layer\d+", name)}
    sums = [hlo.reductions(hlo.by_layer(traffic, int(name[5:]))) for name in layers]
    out["collectives_per_layer"] = max(sums, default=0)
    capped = compiled.get("capped") if compiled else None
    if capped is None or not capped.operations:
        return out

    def fusions(side: Compiled, layer: int | None = None) -> int:
        ops = side.operations if layer is None else hlo.by_layer(list(side.operations), layer)
        return hlo.fusions(ops)

    per_layer = statistics.median(fusions(capped, i) - fusions(plain, i) for i in cap_layers)
    other = [op for op in capped.operations if op.kind in hlo.COLLECTIVES]
    out["added_collectives"] = len(other) - len(traffic)
    out["added_fusions_per_layer"] = per_layer
    out["added_fusions_once"] = fusions(capped) - fusions(plain) - per_layer * len(cap_layers)
    out["added_bytes"] = capped.bytes - plain.bytes
    out["temporaries_ratio"] = _ratio(capped.temporaries, plain.temporaries)
    out["temporaries_by_program"] = {
        "prefill": _ratio(capped.prefill_temporaries, plain.prefill_temporaries),
        "decode": _ratio(capped.decode_temporaries, plain.decode_temporaries)}
    return out


def _ratio(bytes_: int, plain: int) -> float:
    return round(bytes_ / plain, 4) if plain else 1.0
