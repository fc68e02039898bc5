"""Sharding: logical axes, meshes, and helpers that derive the shardings of arrays.

Model code uses *logical* axes ("heads", "batch"), and `RULES` maps each logical axis to mesh axes.
Without a mesh, no array is sharded, so the same model code runs on one or several devices.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpersona.brief import shown
from jaxpersona.calls import checked_call
from jaxpersona.errors import UserError
from jaxpersona.models.config import ModelConfig
from jaxpersona.runtime import Device, is_traced, setting

Axes = tuple[str | None, ...]

# logical axis → the mesh axes that shard it; axes that are missing from a mesh are skipped
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": ("model", "group"),
    "kv_heads": ("model",),  # replicated over the devices of a "group"
    "kv_group": ("group",),  # the query heads that share a key/value head
    "ff": ("model", "group"),
    "vocab": ("model", "group"),
    "embed": ("fsdp",),  # an axis of weights, which are all-gathered before use
}


@checked_call
def make_mesh(data: int = 1, model: int = 1, *, fsdp: int = 1,
              devices: Sequence[Device] | None = None) -> Mesh:
    """Create a mesh with the Explicit axes "data", "fsdp" (omitted if `fsdp` is 1) and "model".

    Args:
      data: the number of shards of batch rows, with replicated weights (data parallelism).
      model: the number of shards of heads, feed-forward width and vocabulary (tensor parallelism).
      fsdp: the number of shards of both batch rows and weights; weights are all-gathered before
        every use.
      devices: the available devices, by default all; the first data·fsdp·model are used.

    Raises:
      UserError: an axis size is not a positive integer, or there are fewer devices than
        data·fsdp·model.

    Examples:
      >>> import jaxpersona as jp
      >>> import jax
      >>> jp.make_mesh(data=1, model=1, devices=jax.devices()[:1]).axis_names
      ('data', 'model')
    """
    have = len(devices) if devices is not None else jax.device_count()
    for name, count in (("data", data), ("fsdp", fsdp), ("model", model)):
        if not isinstance(count, int):
            raise UserError(f"{name} is {shown(count, 60)}; it must be an integer")
    wanted = {"data": data, **({"fsdp": fsdp} if fsdp != 1 else {}), "model": model}
    size = data * fsdp * model
    if min(wanted.values()) < 1 or size > have:
        axes = " × ".join(f"{name}={n}" for name, n in wanted.items())
        fix = (f"available: {have}; use a smaller mesh" if min(wanted.values()) > 0 else
               "every axis must be at least 1")
        raise UserError(f"a mesh of {axes} needs {size} devices; {fix}")
    chosen = list(devices if devices is not None else jax.devices())[:size]
    kinds = (AxisType.Explicit,) * len(wanted)
    return jax.make_mesh(tuple(wanted.values()), tuple(wanted), axis_types=kinds, devices=chosen)


def parse_mesh(text: str) -> dict[str, int]:
    """Parse a string such as "data=2,model=4" into a dict of arguments for `make_mesh`.

    Raises:
      UserError: the string does not have this form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        number = re.fullmatch(r"\d{1,9}", size)
        if name not in ("data", "model", "fsdp") or name in sizes or number is None:
            raise UserError(f"mesh is {text!r}; give sizes of data, model and fsdp, such as "
                            "data=2,model=4")
        sizes[name] = int(size)
    return sizes


@overload
def fit(mesh: Mesh, config: ModelConfig) -> Mesh: ...


@overload
def fit(mesh: AbstractMesh, config: ModelConfig) -> AbstractMesh: ...


def fit(mesh: Mesh | AbstractMesh, config: ModelConfig) -> Mesh | AbstractMesh:
    """Adapt a mesh to a model.

    If the size of the axis "model" is a multiple of the number of key/value heads and greater than
    it, the axis is split into "model" × "group": each key/value head is replicated over a group of
    devices, and its query heads are divided among these devices. A mesh that already has an axis
    "group", and any other mesh, is returned unchanged.

    Raises:
      UserError: a mesh axis is not in `RULES`; its size does not divide a dimension of the model
        that it shards, other than the vocabulary; or the mesh has an axis "group" of more than one
        device, and the size of "model" is not the number of key/value heads.
    """
    known = {name for names in RULES.values() for name in names}
    if unknown := [name for name in mesh.axis_names if name not in known]:
        raise UserError(f"mesh has the unknown axes {unknown}; use {', '.join(sorted(known))}")
    sizes = dict(mesh.shape)
    width, heads = sizes.get("model", 1), config.n_kv_heads
    if "group" not in sizes and heads % width and width % heads == 0:
        place = mesh.axis_names.index("model")
        names = (*mesh.axis_names[: place + 1], "group", *mesh.axis_names[place + 1 :])
        shape = [sizes[name] for name in mesh.axis_names]
        shape[place : place + 1] = [heads, width // heads]
        kinds = (*mesh.axis_types[: place + 1], *mesh.axis_types[place:])
        mesh = (Mesh(mesh.devices.reshape(shape), names, axis_types=kinds)
                if isinstance(mesh, Mesh) else
                AbstractMesh(tuple(shape), names, axis_types=kinds))
        sizes = dict(mesh.shape)
    model, group = sizes.get("model", 1), sizes.get("group", 1)
    if heads % model or (group > 1 and heads != model):
        raise UserError(f"n_kv_heads is {heads}, but the mesh has model={model * group}, which is "
                        "neither a divisor nor a multiple of n_kv_heads: use "
                        f"model={_divisor(heads, model * group)}")
    for field, value, split in (("n_heads / n_kv_heads", config.n_heads // heads, group),
                               ("d_ff", config.d_ff, model * group),
                               ("d_model", config.d_model, sizes.get("fsdp", 1))):
        if value % split:
            name = "fsdp" if field == "d_model" else "model"
            total = split if name == "fsdp" else model * group
            best = _divisor(value, split) * (model if field.startswith("n_") else 1)
            raise UserError(f"{field} is {value}, which cannot be divided into {split} equal "
                            f"parts, as {name}={total} of the mesh requires: use {name}={best}")
    return mesh


def _divisor(value: int, limit: int) -> int:
    """Return the greatest divisor of `value` that does not exceed `limit`."""
    return next(n for n in range(min(value, limit), 0, -1) if value % n == 0)


def spec(axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Map logical axes to a PartitionSpec for a mesh, using `RULES`."""

    def entry(axis: str | None) -> str | tuple[str, ...] | None:
        names = tuple(n for n in RULES[axis] if n in mesh.axis_names) if axis else ()
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*map(entry, axes))


def weight_sharding(axes: Axes, shape: tuple[int, ...],
                    mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return a parameter's sharding; replicate a vocabulary axis that cannot be split evenly."""
    placed = NamedSharding(mesh, spec(axes, mesh))
    try:
        placed.shard_shape(shape)
    except ValueError:
        placed = NamedSharding(mesh, spec(tuple(a if a != "vocab" else None for a in axes), mesh))
    return placed


def mesh_of(*operands: Any) -> Mesh | AbstractMesh | None:
    """Return the mesh of the first operand that is on a mesh, or None."""
    for operand in operands:
        # outside jit, operations need a mesh with devices; the mesh in an array's type is abstract
        concrete = isinstance(operand, jax.Array) and not is_traced(operand)
        placed = operand.sharding if concrete else jax.typeof(operand).sharding
        if isinstance(placed, NamedSharding) and not placed.mesh.empty:
            return placed.mesh
    return None


def on_cpu(*operands: Any) -> bool:
    """Return whether the operands' `platform` is "cpu" and no operand is on a mesh.

    Some operations have an equivalent form that is faster on a CPU.
    """
    return platform(*operands) == "cpu" and mesh_of(*operands) is None


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform(*operands: Any) -> str:
    """Return the operands' platform: "cpu", "gpu" or "tpu".

    Tracers and NumPy arrays have no devices. If no operand has a device, the result is the platform
    set by `running_on` or, by default, the platform on which JAX places new arrays.
    """
    for operand in operands:
        if not is_traced(operand):
            devices = getattr(getattr(operand, "sharding", None), "device_set", None)
            if devices:
                return next(iter(devices)).platform
    return _PLATFORM.get() or default_platform()


@contextlib.contextmanager
def running_on(where: str) -> Iterator[None]:
    """Make `platform` return `where` for operands without devices, inside this context."""
    before = _PLATFORM.set(where)
    try:
        yield
    finally:
        _PLATFORM.reset(before)


def in_program() -> bool:
    """Return whether the engine is tracing a program, that is, whether `running_on` is active."""
    return _PLATFORM.get() is not None


def default_platform() -> str:
    """Return the platform on which JAX places new arrays (see `jax.default_device`)."""
    if setting("jax_default_device") is None:
        return jax.default_backend()
    return default_device().platform


def default_device() -> Device:
    """Return the device on which JAX places new arrays."""
    chosen = setting("jax_default_device")
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen


def unset_mesh() -> contextlib.AbstractContextManager:
    """Return a context manager that unsets the mesh set by `jax.set_mesh`.

    This package uses the mesh of the parameters. If a mesh is set, JAX places new arrays on the set
    mesh, which may differ from the mesh of the parameters, because `fit` may split an axis.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def off_mesh(tree: Any) -> Any:
    """Return a copy of a pytree in which each array on a mesh is replaced by a copy on the host."""
    def one(x: Any) -> Any:
        concrete = isinstance(x, jax.Array) and not is_traced(x)
        return jax.device_get(x) if concrete and mesh_of(x) is not None else x

    return jax.tree.map(one, tree)


def check_set_mesh(like: jax.Array) -> None:
    """Check that a mesh set by `jax.set_mesh` has the same axes and sizes as the mesh of an array.

    Raises:
      UserError: the meshes differ, or a mesh with Explicit axes is set and the array has no mesh.
    """
    current, mesh = jax.sharding.get_abstract_mesh(), mesh_of(like)
    if current.empty or (mesh is not None and _same_shape(current, mesh)):
        return
    if mesh is None:
        if AxisType.Explicit not in current.axis_types:
            return
        raise UserError(f"the mesh {_written(current)} is set, but the model is on one device: "
                        "omit jax.set_mesh, or pass mesh= to jp.load")
    raise UserError(f"the mesh set by jax.set_mesh is {_written(current)}, but the model's mesh is "
                    f"{_written(mesh)}: use `with jax.set_mesh(model.mesh)`")


def _same_shape(one: Mesh | AbstractMesh, other: Mesh | AbstractMesh) -> bool:
    return tuple(one.shape.items()) == tuple(other.shape.items())


def _written(mesh: Mesh | AbstractMesh) -> str:
    return " × ".join(f"{name}={size}" for name, size in mesh.shape.items())


def out_sharding(axes: Axes, *operands: Any) -> NamedSharding | None:
    """Return the sharding of a result with the logical axes `axes` on the operands' mesh.

    The result is None if no operand is on a mesh with Explicit axes.
    """
    mesh = mesh_of(*operands)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, spec(axes, mesh))


def place(x: jax.Array, axes: Axes, *operands: Any) -> jax.Array:
    """Return x, sharded by its logical axes over the mesh of the operands (default: of x itself).

    On a mesh with Auto axes, a sharding constraint is added. Without a mesh, x is returned
    unchanged.
    """
    mesh = mesh_of(*(operands or (x,)))
    if mesh is None:
        return x
    placed = NamedSharding(mesh, spec(axes, mesh))
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, placed)
    return jax.lax.with_sharding_constraint(x, placed)


def by_shard(function: Callable[..., Any], given: Sequence[Axes],
             result: Axes | list[Axes]) -> Callable[..., Any]:
    """Wrap a function so that each device runs it on its own shards of the arguments.

    Kernels need this wrapper, because XLA cannot partition a kernel over the devices of a mesh.
    Without a mesh, `function` is called with the whole arrays.

    Args:
      function: a function of arrays that computes each shard of the result from one shard of each
        argument.
      given: the logical axes of each argument.
      result: the logical axes of the result, or, if the result is a tuple, a list with the axes of
        each element.
    """
    def call(*arrays: Any) -> Any:
        mesh = mesh_of(*arrays)
        if mesh is None:
            return function(*arrays)
        out = (tuple(spec(axes, mesh) for axes in result) if isinstance(result, list)
               else spec(result, mesh))
        placed = [place(x, axes, *arrays) for x, axes in zip(arrays, given, strict=True)]
        return jax.shard_map(function, mesh=mesh, check_vma=False, out_specs=out,
                             in_specs=tuple(spec(axes, mesh) for axes in given))(*placed)

    return call


def spread_rows(x: jax.Array, dimension: int, like: Any) -> jax.Array:
    """Shard a dimension of x as batch rows over the mesh of `like`; without a mesh, return x."""
    return place(x, tuple("batch" if i == dimension else None for i in range(x.ndim)), like)


def of_each(x: jax.Array | np.ndarray, index: jax.Array) -> jax.Array:
    """Gather values per batch row: x[b, index[b]].

    Unlike `take_along_axis`, this function supports a single row on a mesh that shards rows.

    Args:
      x: [B, n, …].
      index: [B] or [B, m] integers in 0…n−1.

    Returns:
      The gathered values, [B, …] or [B, m, …].
    """
    def one(row: Any, at: jax.Array) -> jax.Array:
        return row.at[at].get(mode="clip", wrap_negative_indices=False)

    return jax.vmap(one)(x, spread_rows(index, 0, x))


def rows_divisor(*operands: Any) -> int:
    """Return the number of shards of the batch rows on the operands' mesh; 1 without a mesh."""
    mesh = mesh_of(*operands)
    return 1 if mesh is None else ways(mesh, "batch")


def ways(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Return the number of shards of a logical axis on a mesh."""
    return math.prod(mesh.shape.get(name, 1) for name in RULES[axis])


def gather_weight(w: jax.Array) -> jax.Array:
    """All-gather a weight over the mesh axis "fsdp" before the weight is used."""
    mesh = mesh_of(w)
    if mesh is None or "fsdp" not in mesh.axis_names:
        return w
    if AxisType.Explicit not in mesh.axis_types:
        return w  # with Auto axes, the partitioner inserts the all-gather
    kept = (None if name == "fsdp" else name for name in jax.typeof(w).sharding.spec)
    return jax.sharding.reshard(w, NamedSharding(mesh, PartitionSpec(*kept)))
