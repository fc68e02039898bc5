"""Where arrays live: logical axes, meshes, and the one helper that resolves output shardings.

Model code names *logical* axes ("heads", "batch"); `RULES` says which axes of the mesh each of them
is spread over. With no mesh nothing here does anything, so one model serves one device and many.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpersona.models.config import ModelConfig

Axes = tuple[str | None, ...]
AnyMesh = TypeVar("AnyMesh", Mesh, AbstractMesh)

# logical axis -> the mesh axes that it is spread over, those that the mesh has
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "heads": ("model", "group"),
    "kv_heads": ("model",),  # whole on each device of a group
    "kv_group": ("group",),  # the queries of one key/value head
    "ff": ("model", "group"),
    "vocab": ("model", "group"),
    "embed": ("fsdp",),  # of weights, which are gathered where they are used; never of activations
}


def make_mesh(data: int = 1, model: int = 1, *, fsdp: int = 1,
              devices: Sequence | None = None) -> Mesh:
    """Make a mesh with Explicit axes.

    Args:
      data: ways to spread rows of a batch; every one of them holds the weights.
      model: ways to spread heads, feed-forward width and vocabulary.
      fsdp: ways to spread rows and the weights too, which then cross the mesh at every use.
      devices: in place of all of them.

    Raises:
      ValueError: there are fewer devices than data·fsdp·model.
    """
    have = len(devices) if devices is not None else jax.device_count()
    wanted = {"data": data, **({"fsdp": fsdp} if fsdp != 1 else {}), "model": model}
    size = data * fsdp * model
    if min(wanted.values()) < 1 or size > have:
        asked = " × ".join(f"{name}={n}" for name, n in wanted.items())
        mend = (f"there are {have}: make it smaller" if min(wanted.values()) > 0 else
                "every axis must be at least 1")
        raise ValueError(f"a mesh of {asked} needs {size} devices; {mend}")
    chosen = list(devices if devices is not None else jax.devices())[:size]
    kinds = (AxisType.Explicit,) * len(wanted)
    return jax.make_mesh(tuple(wanted.values()), tuple(wanted), axis_types=kinds, devices=chosen)


def parse_mesh(text: str) -> dict[str, int]:
    """Read "data=2,model=4" as the arguments of `make_mesh`.

    Raises:
      ValueError: not of that form.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("data", "model", "fsdp") or name in found or not size.isdecimal():
            raise ValueError(f"mesh is {text!r}; write sizes of data, model and fsdp, as "
                             "data=2,model=4")
        found[name] = int(size)
    return found


def fit(mesh: AnyMesh, config: ModelConfig) -> AnyMesh:
    """Return the mesh that a model runs on, or say why it cannot run on this one.

    Where "model" is wider than the key/value heads it is split into "model" × "group": each of
    these heads is then held by a group of devices, which share its queries.

    Raises:
      ValueError: an axis that `RULES` does not know, or that does not divide the model.
    """
    known = {name for names in RULES.values() for name in names}
    if unknown := [name for name in mesh.axis_names if name not in known]:
        raise ValueError(f"mesh has the axes {unknown}; name them {', '.join(sorted(known))}")
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
                AbstractMesh(tuple(shape), names, axis_types=kinds))  # pyright: ignore
        sizes = dict(mesh.shape)
    model, group = sizes.get("model", 1), sizes.get("group", 1)
    if heads % model or (group > 1 and heads != model):
        raise ValueError(f"n_kv_heads is {heads}; a mesh of model={model * group} neither divides "
                         f"it nor is a multiple: use model={_divisor(heads, model * group)}")
    for field, value, split in (("n_heads / n_kv_heads", config.n_heads // heads, group),
                               ("d_ff", config.d_ff, model * group),
                               ("d_model", config.d_model, sizes.get("fsdp", 1))):
        if value % split:
            name = "fsdp" if field == "d_model" else "model"
            total = split if name == "fsdp" else model * group
            best = _divisor(value, split) * (model if field.startswith("n_") else 1)
            raise ValueError(f"{field} is {value}; a mesh of {name}={total} does not divide it: "
                             f"use {name}={best}")
    return mesh


def _divisor(value: int, limit: int) -> int:
    """Return the greatest divisor of `value` up to `limit`."""
    return next(n for n in range(min(value, limit), 0, -1) if value % n == 0)


def spec(axes: Axes, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Translate logical axes to a PartitionSpec of a mesh by `RULES`."""

    def entry(axis: str | None) -> Any:
        names = tuple(n for n in RULES[axis] if n in mesh.axis_names) if axis else ()
        return names[0] if len(names) == 1 else names or None

    return PartitionSpec(*map(entry, axes))


def weight_sharding(axes: Axes, shape: tuple[int, ...],
                    mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return where a parameter lives; a vocabulary that the mesh does not divide is kept whole."""
    placed = NamedSharding(mesh, spec(axes, mesh))
    try:
        placed.shard_shape(shape)
    except ValueError:
        placed = NamedSharding(mesh, spec(tuple(a if a != "vocab" else None for a in axes), mesh))
    return placed


def mesh_of(*operands: Any) -> Mesh | AbstractMesh | None:
    """Return the mesh that the first operand on one lies on, or None."""
    for operand in operands:
        # outside jit an operation needs the devices themselves, which the type does not hold
        concrete = isinstance(operand, jax.Array) and not isinstance(operand, jax.core.Tracer)
        placed = operand.sharding if concrete else jax.typeof(operand).sharding
        if isinstance(placed, NamedSharding) and not placed.mesh.empty:
            return placed.mesh
    return None


def on_cpu(*operands: Any) -> bool:
    """Whether the operands' platform is a CPU and none of them lies on a mesh: XLA then needs some
    things expressed otherwise. The numbers do not depend on it."""
    return platform(*operands) == "cpu" and mesh_of(*operands) is None


_PLATFORM: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform(*operands: Any) -> str:
    """Return the platform that the operands lie on: "cpu", "gpu" or "tpu".

    Arrays know their devices. While a function is traced its operands do not; then it is what
    `running_on` says, and without that the platform on which JAX places new arrays.
    """
    for operand in operands:
        if not isinstance(operand, jax.core.Tracer):
            devices = getattr(getattr(operand, "sharding", None), "device_set", None)
            if devices:
                return next(iter(devices)).platform
    return _PLATFORM.get() or default_platform()


@contextlib.contextmanager
def running_on(where: str) -> Iterator[None]:
    """Say for which platform functions are traced inside this context."""
    before = _PLATFORM.set(where)
    try:
        yield
    finally:
        _PLATFORM.reset(before)


def default_platform() -> str:
    """Return the platform on which JAX places new arrays (`jax.default_device` counts)."""
    chosen: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None:
        return jax.default_backend()
    return default_device().platform


def default_device() -> Any:
    """Return the device on which JAX places new arrays."""
    chosen: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return jax.local_devices()[0] if chosen is None else chosen


def unset_mesh() -> contextlib.AbstractContextManager:
    """Return a context in which no mesh is set, whatever the caller has set (`jax.set_mesh`).

    Everything here takes its mesh from the parameters. The caller's may be another one, since `fit`
    may have split an axis of it, and new arrays would be placed on it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def on_own_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function to run without a mesh that its caller has set (`unset_mesh`)."""
    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        with unset_mesh():
            return function(*args, **named)

    return run


def off_mesh(tree: Any) -> Any:
    """Fetch a small tree's arrays that lie on a mesh, such as those made in `jax.set_mesh`."""
    def one(x: Any) -> Any:
        concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
        return jax.device_get(x) if concrete and mesh_of(x) is not None else x

    return jax.tree.map(one, tree)


def check_set_mesh(like: jax.Array) -> None:
    """Refuse a mesh that the caller has set (`jax.set_mesh`) and that an array does not lie on.

    Raises:
      ValueError: the meshes differ; both are named.
    """
    current, mesh = jax.sharding.get_abstract_mesh(), mesh_of(like)
    if current.empty or (mesh is not None and _same_shape(current, mesh)):
        return
    if mesh is None:
        if AxisType.Explicit not in current.axis_types:
            return
        raise ValueError(f"the mesh {_written(current)} is set, but the model lies on one device: "
                         "leave jax.set_mesh, or load the model with mesh=")
    raise ValueError(f"the mesh that is set, {_written(current)}, is not the model's, "
                     f"{_written(mesh)}: write `with jax.set_mesh(model.mesh)`")


def _same_shape(one: AnyMesh, other: Any) -> bool:
    return tuple(one.shape.items()) == tuple(other.shape.items())


def _written(mesh: Mesh | AbstractMesh) -> str:
    return " × ".join(f"{name}={size}" for name, size in mesh.shape.items())


def out_sharding(axes: Axes, *operands: Any) -> NamedSharding | None:
    """Resolve the sharding of a result with logical `axes` from its operands' own mesh.

    Returns None where no operand lies on a mesh with Explicit axes.
    """
    mesh = mesh_of(*operands)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    return NamedSharding(mesh, spec(axes, mesh))


def place(x: jax.Array, axes: Axes, *operands: Any) -> jax.Array:
    """Spread x over the mesh of the operands (or its own) by its logical axes.

    On a mesh with Auto axes this is a constraint that the partitioner may rely on; without a mesh
    it is nothing.
    """
    mesh = mesh_of(*(operands or (x,)))
    if mesh is None:
        return x
    placed = NamedSharding(mesh, spec(axes, mesh))
    if AxisType.Explicit in mesh.axis_types:
        return jax.sharding.reshard(x, placed)
    return jax.lax.with_sharding_constraint(x, placed)


def spread_rows(x: jax.Array, dimension: int, like: Any) -> jax.Array:
    """Spread the dimension of x that counts rows over the mesh of an array, if that is on one."""
    return place(x, tuple("batch" if i == dimension else None for i in range(x.ndim)), like)


def of_each(x: jax.Array, index: jax.Array) -> jax.Array:
    """Take entries of each row's own choice: x[b, index[b]].

    Unlike `take_along_axis` this also takes a single row, on a mesh that spreads rows.

    Args:
      x: [B, n, …].
      index: [B] or [B, m] integers in 0…n−1.

    Returns:
      [B, …] or [B, m, …].
    """
    def one(row: jax.Array, at: jax.Array) -> jax.Array:
        return row.at[at].get(mode="clip", wrap_negative_indices=False)

    return jax.vmap(one)(x, spread_rows(index, 0, x))


def rows_divisor(*operands: Any) -> int:
    """Return over how many ways the operands' mesh spreads the rows of a batch; 1 without one."""
    mesh = mesh_of(*operands)
    return 1 if mesh is None else ways(mesh, "batch")


def ways(mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Return over how many ways a mesh spreads a logical axis."""
    return math.prod(mesh.shape.get(name, 1) for name in RULES[axis])


def gather_weight(w: jax.Array) -> jax.Array:
    """Bring a weight that is spread over "fsdp" together, for the product that uses it."""
    mesh = mesh_of(w)
    if mesh is None or "fsdp" not in mesh.axis_names:
        return w
    if AxisType.Explicit not in mesh.axis_types:
        return w  # the partitioner sees the product and gathers what it needs
    kept = (None if name == "fsdp" else name for name in jax.typeof(w).sharding.spec)
    return jax.sharding.reshard(w, NamedSharding(mesh, PartitionSpec(*kept)))
