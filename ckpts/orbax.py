"""Orbax checkpoints: parameters saved and restored shard by shard, by every process at once.

A folder holds `config.json` as transformers would write it, and `params`, the checkpoint proper.
Arrays go by their Hugging Face names, so that a checkpoint outlives a change of our dataclasses.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxpersona.ckpts import files, hf
from jaxpersona.ckpts.tensorfile import DTYPES

from jaxpersona.distributed import sharding
from jaxpersona.inputs import TEXT_BYTES, require_file
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.families import to_hf
from jaxpersona.models.params import Params, layout

NAME = "params"
_MARKS = ("_METADATA", "_CHECKPOINT_METADATA")  # what Orbax leaves beside its arrays


def holds_checkpoint(folder: str | pathlib.Path) -> bool:
    """Whether a folder has the layout that `save` writes."""
    return any((pathlib.Path(folder) / NAME / mark).is_file() for mark in _MARKS)


def check_files(folder: pathlib.Path) -> None:
    """Check the files of a checkpoint before Orbax reads them.

    Raises:
      ValueError: one is no regular file (reading a pipe would wait for a writer), or one of Orbax's
        own texts, which it reads whole, is too large; it is named.
    """
    for path in folder.rglob("*"):
        if not path.is_dir():
            require_file(path, TEXT_BYTES if path.name.startswith("_") else None)


def save(folder: str | pathlib.Path, params: Params, config: ModelConfig) -> None:
    """Write parameters, wherever they lie, and their configuration.

    config.json is removed first and written last: a save cut short is not taken for a model.

    Args:
      folder: made where it does not exist; a checkpoint that it holds is replaced.
      params: in the dtype that is to be written.
      config: their model's shape.

    Raises:
      ValueError: the parameters do not fit the configuration, or the folder cannot be written to.
    """
    folder = pathlib.Path(folder).absolute()
    arrays = {name: array for name, (_, array) in hf.named(params, config).items()}
    dtype = np.dtype(next(iter(arrays.values())).dtype).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror or error})") from None
    with _checkpointer() as orbax, _named_errors(folder, "cannot be written"):
        orbax.save(folder / NAME, arrays, force=True)
        orbax.wait_until_finished()
    files.write_json(folder / "config.json", {**to_hf(config), "dtype": dtype})


def load(folder: str | pathlib.Path, *, dtype: Any = None,
         mesh: Mesh | None = None) -> tuple[Params, ModelConfig]:
    """Restore what `save` wrote, each shard straight to the device that holds it.

    Args:
      folder: what was given to `save`.
      dtype: cast to float32, bfloat16 or float16; each array's own if None.
      mesh: spreads the parameters by `sharding.RULES`, however they were spread when saved.

    Returns:
      The parameters and their configuration.

    Raises:
      ValueError: no such folder, not such a folder, a damaged one, or arrays that its
        configuration does not ask for; all are named.
    """
    folder = pathlib.Path(folder).absolute()
    target = None if dtype is None else np.dtype(dtype)
    if target is not None and target not in DTYPES.values():
        raise ValueError(f"dtype is {target}; parameters are float32, bfloat16 or float16")
    config, _ = hf.read_config(folder)
    if not holds_checkpoint(folder):
        raise ValueError(f"{folder}: not an Orbax folder (it has no {NAME}/{_MARKS[0]})")
    check_files(folder / NAME)
    specs, tree = jax.tree.flatten(layout(config))
    mesh = None if mesh is None else sharding.fit(mesh, config)
    with _checkpointer() as orbax:
        with _named_errors(folder, "the checkpoint cannot be read"):
            found = dict(orbax.metadata(folder / NAME).item_metadata.tree)
        wanted = {spec.file_name: spec for spec in specs}
        faults = [f"{what}: {', '.join(sorted(names))}"
                  for what, names in (("missing", set(wanted) - set(found)),
                                      ("extra", set(found) - set(wanted))) if names]
        for name in sorted(set(wanted) & set(found)):
            shape, kind = getattr(found[name], "shape", None), getattr(found[name], "dtype", None)
            if shape is None or tuple(shape) != wanted[name].shape:
                faults.append(f"{name}: shape {list(shape or ())}, expected "
                              f"{list(wanted[name].shape)}")
            elif kind not in DTYPES.values():
                faults.append(f"{name}: dtype {kind}; float32, bfloat16 and float16 can be read")
        if faults:
            listed = "\n".join(f"  - {fault}" for fault in faults)
            raise ValueError(f"{folder}: the checkpoint does not fit its config.json\n{listed}")
        here = SingleDeviceSharding(sharding.default_device())
        shapes = {
            name: jax.ShapeDtypeStruct(
                spec.shape, target or found[name].dtype,
                sharding=here if mesh is None else
                sharding.weight_sharding(spec.axes, spec.shape, mesh))
            for name, spec in wanted.items()
        }
        with _named_errors(folder, "the checkpoint cannot be read"):
            arrays = orbax.restore(folder / NAME, shapes)
    return jax.tree.unflatten(tree, [arrays[spec.file_name] for spec in specs]), config


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    import orbax.checkpoint

    with orbax.checkpoint.StandardCheckpointer() as made:
        yield made


@contextlib.contextmanager
def _named_errors(folder: pathlib.Path, what: str) -> Iterator[None]:
    """Name the folder in whatever Orbax and TensorStore raise, which is of many kinds."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder}: {what} ({reason or type(error).__name__})") from None
