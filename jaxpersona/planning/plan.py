"""What a model needs and costs on chips that are not here: no weights, no accelerator.

For TPUs prefill and decode are compiled ahead of time, so bytes, kernels and traffic are the
compiler's word. Seconds are arithmetic on published figures everywhere; nothing is ever timed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jaxpersona.captures.capture import Capture
from jaxpersona.distributed import sharding
from jaxpersona.engine.programs import Stops, decode, prefill
from jaxpersona.engine.sampling import sampling
from jaxpersona.interventions import Interventions, cap
from jaxpersona.kernels.attention import attention_implementation
from jaxpersona.models.batch import Batch
from jaxpersona.models.cache import KV_AXES
from jaxpersona.models.config import ModelConfig, replace
from jaxpersona.models.nn import QUERY_CHUNK
from jaxpersona.models.params import Params, layout
from jaxpersona.planning import chips, hlo
from jaxpersona.runtime import check_process

ITEM = 2  # bytes of a bfloat16
FRACTIONS = (1.0, 0.6, 0.3)  # of the roofline, for the hours of a run
ROLLOUTS = 331_200  # of an axis as published (Lu et al. 2026): 276 roles of 1,200
NEW_TOKENS = 512  # the longest reply there
DEPTHS = (8, 12)  # layers of the prefills that are compiled: below 8 temporaries grow unevenly
_WIDEST = 16  # ways of model parallelism that are chosen unasked


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is compiled for: B rows, a prompt's padded width and the cache's slots."""

    batch: int
    width: int
    slots: int

    @classmethod
    def of(cls, batch: int, context: int) -> Shapes:
        """Keep a quarter of the context, at most `NEW_TOKENS`, for the reply."""
        return cls(batch, context - max(1, min(NEW_TOKENS, context // 4)), context)

    @property
    def new(self) -> int:
        """The most tokens of a reply."""
        return self.slots - self.width


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of prefill and decode, one chip's share of it.

    Attributes:
      prefill_temporaries, decode_temporaries: bytes beside weights, cache and results.
      operations: what one decode step runs; none where it needs too much memory to compile.
      bytes: that one decode step reads and writes, by the compiler's own count.
    """

    prefill_temporaries: int
    decode_temporaries: int
    operations: tuple[hlo.Operation, ...]
    bytes: int

    @property
    def temporaries(self) -> int:
        """The bytes of the program that needs more; they never run together."""
        return max(self.prefill_temporaries, self.decode_temporaries)


def plan(config: ModelConfig, topology: str, *, name: str = "model", batch: int = 32,
         context: int = 2048, cap_layers: Sequence[int] = (),
         mesh: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Say what fits on a topology and what it costs.

    Args:
      config: the model's shape.
      topology: chip:extents, as v5e:4x4 or h200:8.
      name: what the model is called in the result.
      batch: rows B of all chips together.
      context: cache slots a row; a quarter of them, at most 512, are for the reply.
      cap_layers: layers to cap, to compare with the same program uncapped.
      mesh: sizes of "data", "fsdp" and "model"; by default as wide a model axis as the shape
        allows, up to 16, and data for the rest.

    Returns:
      What `jaxpersona plan --json` prints. Fields that only a compiler knows are None where none
      was asked (GPUs, or libtpu is not installed).

    Raises:
      ValueError: an unknown topology, a mesh that does not fit the model or the chips, settings out
        of range, or a process that was forked from one that had used JAX.
    """
    check_process()
    chip, count = chips.parse(topology)
    if batch < 1 or context < 2:
        raise ValueError(f"batch ({batch}) must be at least 1, context ({context}) at least 2")
    if context > config.max_context:
        raise ValueError(f"context is {context}; the model was made for {config.max_context}")
    sizes = choose_mesh(config, count) if mesh is None else _checked(mesh, count)
    shapes = Shapes.of(batch, context)
    devices = chips.tpu_devices(topology) if chip.name in chips.TPUS else None
    if devices is not None and len(devices) != count:
        raise ValueError(f"topology {topology!r} has {len(devices)} devices for {count} chips; "
                         f"plan for one of {', '.join(chips.TPUS)}")
    placed = _mesh(sizes, devices, config)
    ways = sharding.ways(placed, "batch")
    if batch % ways:
        raise ValueError(f"batch (--batch) is {batch}; the mesh spreads rows over {ways} chips: "
                         f"use a multiple of {ways}")
    compiled = None
    if isinstance(placed, Mesh):
        compiled = compile_for(config, placed, shapes, cap_layers)
        temporaries = compiled["plain"].temporaries
    else:
        temporaries = activation_bytes(config, placed, shapes, chip)
    weights, cache = weight_bytes(config, placed), cache_bytes(config, placed, shapes)
    total, room = weights + cache + temporaries, usable(chip)
    roofline = seconds(config, placed, shapes, chip)
    by_row = (cache + temporaries) / batch
    return {
        "model": name, "topology": topology, "chips": count, "mesh": dict(placed.shape),
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
    """Return the bytes of a chip that a program may take: the runtime keeps about a sixty-fourth,
    as the compiler's own limit for v5e (15.75 of 16 GiB) shows."""
    return chip.memory - chip.memory // 64


def choose_mesh(config: ModelConfig, count: int) -> dict[str, int]:
    """Return data × model for `count` chips: model as wide as the shape allows, at most 16."""
    for ways in range(min(count, _WIDEST), 0, -1):
        if count % ways == 0:
            try:
                _mesh({"data": 1, "model": ways}, None, config)
            except ValueError:
                continue
            return {"data": count // ways, "model": ways}
    raise AssertionError("one way always fits")


def _checked(mesh: Mapping[str, int], count: int) -> dict[str, int]:
    size = int(np.prod(list(mesh.values())))
    if size != count:
        asked = " × ".join(f"{name}={n}" for name, n in mesh.items())
        raise ValueError(f"a mesh of {asked} needs {size} chips; the topology has {count}")
    return dict(mesh)


def _mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None,
          config: ModelConfig) -> Mesh | AbstractMesh:
    """Make a mesh of devices, or of none where nothing is to be compiled, fitted to a model."""
    if devices is not None:
        return sharding.fit(sharding.make_mesh(**sizes, devices=devices), config)
    kinds = (AxisType.Explicit,) * len(sizes)
    return sharding.fit(AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds), config)


def weight_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Return the bytes of one chip's shards of the parameters, bfloat16."""
    specs = jax.tree.leaves(layout(config))
    return ITEM * sum(
        math.prod(sharding.weight_sharding(s.axes, s.shape, mesh).shard_shape(s.shape))
        for s in specs)


def cache_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, shapes: Shapes) -> int:
    """Return the bytes of one chip's keys and values."""
    whole = (shapes.batch, config.n_kv_heads, shapes.slots, config.head_dim)
    mine = NamedSharding(mesh, sharding.spec(KV_AXES, mesh)).shard_shape(whole)
    return 2 * config.n_layers * ITEM * math.prod(mine)


def activation_bytes(config: ModelConfig, mesh: Mesh | AbstractMesh, shapes: Shapes,
                     chip: chips.Chip) -> int:
    """Estimate what a prefill holds beside weights and cache, where no compiler is asked.

    On a GPU it is the greater of two: the MLP's two halves, the residual stream, its norm and the
    product that is added to it; the queries twice and, where cuDNN does not attend, the scores of
    one chunk of them in float32 with their softmax in bfloat16. `bench/ahead.py` compares it with
    what XLA takes for an H200. On a TPU whose compiler is not at hand everything counts at one
    time, the MLP, the norm and the scores twice in float32.
    """
    split = sharding.ways(mesh, "ff")
    rows = shapes.batch // sharding.ways(mesh, "batch")
    tokens, queries = rows * shapes.width, min(shapes.width, QUERY_CHUNK)
    scores = rows * config.n_heads // split * queries * shapes.slots
    if chip.name in chips.TPUS:
        return tokens * (config.d_model * (2 * ITEM + 4) + 2 * 4 * config.d_ff // split
                         ) + 2 * 4 * scores
    mlp = tokens * ITEM * (2 * config.d_ff // split + 3 * config.d_model)
    attention = tokens * ITEM * 2 * config.n_heads * config.head_dim // split
    form, _ = attention_implementation(config, "gpu", dtype=jnp.bfloat16, tokens=shapes.width,
                                       fresh=True, capability=8.0, sharded=mesh.size > 1)
    return max(mlp, attention + (4 + ITEM) * scores * (form == "xla"))


def seconds(config: ModelConfig, mesh: Mesh | AbstractMesh, shapes: Shapes,
            chip: chips.Chip) -> dict[str, float]:
    """Return the least seconds of a decode step and of a prefill, by arithmetic.

    A decode step reads every weight once and every row's keys and values, of a cache that is full
    on average by its prompt and half its reply; a prefill computes. The sums over the model axis
    are a ring's, 2·(n − 1)/n of their bytes over the links, and are not hidden behind anything.
    """
    split, ways = sharding.ways(mesh, "ff"), sharding.ways(mesh, "batch")
    rows = shapes.batch // ways
    weights = config.step_bytes(ITEM) / split
    length = shapes.width + shapes.new // 2
    held = rows * config.cache_bytes(length, ITEM) / sharding.ways(mesh, "kv_heads")
    compute = 2 * rows * config.step_bytes(1) / split / chip.peak
    exchange = 2 * (split - 1) / split * 2 * config.n_layers * rows * config.d_model * ITEM
    step = held / chip.bandwidth + max(weights / chip.bandwidth, compute)
    whole = rows * config.prefill_flops(shapes.width) / split / chip.peak
    sums = {"decode": exchange / chip.link, "prefill": exchange * shapes.width / chip.link}
    return {"decode_step": step + sums["decode"], "decode_sums": sums["decode"],
            "prefill": whole + sums["prefill"], "prefill_sums": sums["prefill"]}


def run_hours(roofline: Mapping[str, float], shapes: Shapes, fraction: float) -> float:
    """Return the hours of a published axis run at a fraction of the roofline, replies all full."""
    batches = -(-ROLLOUTS // shapes.batch)
    one = roofline["prefill"] + NEW_TOKENS * roofline["decode_step"]
    return batches * one / fraction / 3600


def compile_for(config: ModelConfig, mesh: Mesh, shapes: Shapes,
                cap_layers: Sequence[int]) -> dict[str, Compiled]:
    """Compile prefill and decode, uncapped and (where layers are given) capped.

    A prefill's temporaries grow evenly with the layers, so it is compiled at the two `DEPTHS` and
    extended to the whole; the decode is compiled as it is.
    """
    shallow, deep = (min(depth, config.n_layers) for depth in DEPTHS)
    arms: dict[str, tuple[int, ...]] = {"plain": ()}
    if cap_layers:
        arms["capped"] = tuple(cap_layers)
    lowered: dict[tuple[str, str], Any] = {}
    for arm, layers in arms.items():
        lowered[arm, "decode"] = _lower(config, mesh, shapes, layers)[1]
        # as great a share of the layers as the cap has of the whole model's, from the same depth
        share = -(-len(layers) * deep // config.n_layers)
        begin = min(layers[0] * deep // config.n_layers, deep - share) if layers else 0
        lowered[arm, "prefill"] = _lower(replace(config, n_layers=deep), mesh, shapes,
                                         tuple(range(begin, begin + share)))[0]
    lowered["plain", "shallow"] = _lower(replace(config, n_layers=shallow), mesh, shapes, ())[0]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # the compiler works outside Python
        made = dict(zip(lowered, pool.map(_compile, lowered.values()), strict=True))
    rise = made["plain", "prefill"][1] - made["plain", "shallow"][1]
    beyond = round(rise / max(deep - shallow, 1) * (config.n_layers - deep))
    out = {}
    for arm in arms:
        program, temporaries = made[arm, "decode"]
        text = "" if program is None else program.as_text()
        out[arm] = Compiled(
            prefill_temporaries=made[arm, "prefill"][1] + beyond,
            decode_temporaries=temporaries,
            operations=tuple(hlo.operations(text)) if text else (),
            bytes=0 if program is None else int(program.cost_analysis()["bytes accessed"]))
    return out


def _lower(config: ModelConfig, mesh: Mesh, shapes: Shapes,
           cap_layers: tuple[int, ...]) -> tuple[Any, Any]:
    """Trace prefill and decode for parameters that are nothing but shapes on a mesh."""
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.bfloat16, sharding=sharding.weight_sharding(
            s.axes, s.shape, mesh)), layout(config))
    return lowered(params, config, shapes, cap_layers)


def lowered(params: Params, config: ModelConfig, shapes: Shapes,
            cap_layers: Sequence[int]) -> tuple[Any, Any]:
    """Trace prefill and decode, greedy, for where these parameters (or their shapes) lie."""
    rows, width = shapes.batch, shapes.width
    edits = Interventions()
    if cap_layers:
        edits = cap(np.ones(config.d_model), layers=cap_layers, floor=0.0)
    field = (rows, width)
    batch = Batch(*(np.zeros(field, kind) for kind in (np.int32, np.int32, np.uint16, np.int32)),
                  row_id=np.zeros((rows,), np.uint32))
    how, limit = sampling(rows), np.zeros((rows,), np.int32)
    stops = Stops(ids=np.full((4,), -1, np.int32), think=np.full((2,), -1, np.int32))
    begin = functools.partial(prefill, slots=shapes.slots, max_new=shapes.new, greedy=True)
    state = jax.eval_shape(lambda p: begin(p, config, batch, edits, Capture(), how, stops, limit),
                           params)
    until = np.int32(shapes.new)
    return (prefill.lower(params, config, batch, edits, Capture(), how, stops, limit,
                          slots=shapes.slots, max_new=shapes.new, greedy=True),
            decode.lower(params, config, state, edits, Capture(), how, stops, until, greedy=True))


def _compile(lowered: Any) -> tuple[Any, int]:
    """Compile; return the program and its temporaries in bytes, or None where they are too many."""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        wanted = re.search(r"\(([\d.]+)([MG])\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or wanted is None:
            raise
        size = {"M": 2**20, "G": 2**30}[wanted.group(2)]
        return None, round(float(wanted.group(1)) * size)
    return program, int(program.memory_analysis().temp_size_in_bytes)


def compare(compiled: Mapping[str, Compiled] | None,
            cap_layers: Sequence[int]) -> dict[str, Any]:
    """Say what the compiled decode step sends, and what a cap adds to it.

    A capped layer's kernels are those traced within it; `added_fusions_once` are what is left of a
    step's, which a cap adds whatever its number of layers. `temporaries_ratio` is of the bytes that
    a chip must have, for the greater of the two programs; `temporaries_by_program` is of each.
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
        found = side.operations if layer is None else hlo.by_layer(list(side.operations), layer)
        return hlo.fusions(found)

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
