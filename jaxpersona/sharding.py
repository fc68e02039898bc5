"""Where arrays live: logical axes, meshes, and the one helper that resolves output shardings.

Model code names *logical* axes ("heads", "batch"); `RULES` says which mesh axis each of them is
spread over. With no mesh nothing here does anything, so one model serves one device and many.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]

# logical axis -> mesh axis; an axis that is not listed is replicated
RULES: dict[str, str | None] = {
    "batch": "data",
    "heads": "model",
    "kv_heads": "model",
    "ff": "model",
    "vocab": "model",
    "embed": None,
}


def make_mesh(data: int = 1, model: int = 1, *, devices: Sequence | None = None) -> Mesh:
    """Make a data × model mesh with Explicit axes.

    Raises:
      ValueError: there are fewer devices than data·model.
    """
    have = len(devices) if devices is not None else jax.device_count()
    if data < 1 or model < 1 or data * model > have:
        raise ValueError(
            f"a mesh of data={data} × model={model} needs {data * model} devices; there are {have}"
        )
    chosen = list(devices if devices is not None else jax.devices())[: data * model]
    kinds = (AxisType.Explicit, AxisType.Explicit)
    return jax.make_mesh((data, model), ("data", "model"), axis_types=kinds, devices=chosen)


def spec(axes: Axes) -> PartitionSpec:
    """Translate logical axes to a PartitionSpec by `RULES`."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def out_sharding(axes: Axes, *operands: jax.Array) -> NamedSharding | None:
    """Resolve the sharding of a result with logical `axes` from its operands' own mesh.

    Returns None where no operand lies on a mesh with Explicit axes.
    """
    for operand in operands:
        mesh = jax.typeof(operand).sharding.mesh
        if not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return NamedSharding(mesh, spec(axes))
    return None
