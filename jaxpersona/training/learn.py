"""Training of a steering vector through a frozen model with a user-defined loss.

The vector is the parameter of a `flax.nnx` module, and gradients flow through the intervention that
adds it. If a folder is given, Orbax checkpoints store the training state there, so a run can be
resumed. `Direction.to_vector` converts the result to a named direction.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxpersona.brief import count, line, shown
from jaxpersona.ckpts import files, orbax
from jaxpersona.errors import UserError
from jaxpersona.extras import require
from jaxpersona.inputs import read_json
from jaxpersona.interventions import SITES, Interventions, Site, Where, resolve_layers, steer
from jaxpersona.interventions.bank import Layers
from jaxpersona.interventions.where import as_where, everywhere
from jaxpersona.models.batch import Batch, check_ids
from jaxpersona.models.forward import Output, forward
from jaxpersona.models.int8 import weights_note
from jaxpersona.progress import shows
from jaxpersona.runtime import check_process
from jaxpersona.vectors.vector import Vector

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

    from jaxpersona.models.model import Model
    from jaxpersona.models.params import Params

Loss = Callable[[Output, Batch], jax.Array]
_SAVE_EVERY = 50  # number of steps between two checkpoints


class Direction(nnx.Module):
    """A trainable steering vector: h ← h + v at the given layers, site and tokens.

    Attributes:
      vector: [l, D] float32, one vector for each of the l layers.
      layers, site, where: the layers, the site and the tokens at which the vector is added.
    """

    def __init__(self, width: int, layers: Layers, *, where: Where | str = everywhere,
                 site: Site = "residual", size: float = 0.1, seed: int = 0) -> None:
        """Initialize the vectors of the chosen layers with random values.

        Args:
          width: the width D of the model's residual stream.
          layers: an int, a slice with a stop, a list of ints, or a string such as "46:54".
          where: the tokens to steer.
          site: the site to steer, as in `steer`.
          size: the norm of each layer's initial vector. It must be positive, because the norm is
            not differentiable at 0.
          seed: the seed of the random initialization.

        Raises:
          UserError: an argument is invalid.
        """
        if not isinstance(width, (int, np.integer)) or width < 1:
            raise UserError(f"width is {shown(width, 60)}; it must be a positive integer, the "
                            "width of the model's residual stream")
        if not isinstance(size, (int, float, np.number)) or not 0 < size < math.inf:
            raise UserError(f"size is {shown(size, 60)}; it must be a positive number")
        if not isinstance(seed, (int, np.integer)):
            raise UserError(f"seed is {shown(seed, 60)}; it must be an integer")
        if site not in SITES:
            raise UserError(f"site is {site!r}; it must be one of {SITES}")
        self.layers = resolve_layers(layers, None)
        self.site: Site = site
        self.where = as_where(where)
        drawn = jax.random.normal(jax.random.key(seed), (len(self.layers), width), jnp.float32)
        self.vector = nnx.Param(size * drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True))

    def __repr__(self) -> str:
        width = self.vector[...].shape[-1]
        return line("Direction", f"{count(len(self.layers), 'layer')} × {width}", self.site)

    __str__ = __repr__  # flax's default string has several lines

    def interventions(self) -> Interventions:
        """Return the current steering intervention, differentiable with respect to the vector."""
        return steer(self.vector[...][None], layers=self.layers, where=self.where, site=self.site)

    def to_vector(self, model: Model, name: str = "learned") -> Vector:
        """Return the learned values as a `Vector` [L, D], zero at layers that were not trained.

        For a `Direction` d, `steer(d.to_vector(model), layers=d.layers, where=d.where,
        site=d.site)` edits the model as in training.

        Raises:
          UserError: the model has a different width or too few layers.
        """
        self.interventions().check(layers=model.config.n_layers, width=model.config.d_model, rows=0)
        values = np.zeros((model.config.n_layers, self.vector[...].shape[-1]), np.float32)
        values[list(self.layers)] = np.asarray(self.vector[...])
        return Vector(values, name=name, model=model.name, fingerprint=model.fingerprint,
                      site=self.site, notes={"learned_at": ",".join(map(str, self.layers)),
                                             **weights_note(model.params)})


@shows(lambda done, total, loss: ("train", done, total, f"loss {loss:.4g}"))
def fit(
    model: Model,
    direction: Direction,
    loss: Loss,
    batches: Sequence[Batch],
    *,
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    folder: str | pathlib.Path | None = None,
    progress: Callable[[int, int, float], None] | bool | None = None,
) -> list[float]:
    """Train a direction in place; the model's parameters are frozen.

    Args:
      model: the result of `load`.
      direction: the vector to train.
      loss: the JAX-traceable function to minimize, loss(output, batch) → scalar.
      batches: the training batches, which are cycled through in order. Batches of equal shape share
        one compiled program.
      steps: the total number of steps, including those of an earlier run in `folder`.
      optimizer: an optax optimizer; by default, Adam with a learning rate of 0.05.
      folder: the folder for checkpoints, which are saved every fifty steps and at the end. A later
        call resumes from the last checkpoint. If None, no checkpoints are saved.
      progress: by default, a call of more than three seconds shows its progress; False shows
        nothing. A function is called after each step with (steps done, steps, loss) instead.

    Returns:
      The loss of every step of this call.

    Raises:
      UserError: an argument has the wrong type, there are no batches or steps, a token id is
        outside the vocabulary, the direction does not match the model or the checkpoint, the folder
        has other files, the checkpoint is damaged or has more steps than `steps`, orbax-checkpoint
        is not installed, the loss is not a scalar, the loss, its gradient or the optimizer's update
        is not finite, or this process was forked from a process that had used JAX. If the loss, its
        gradient or the update is not finite, the direction keeps its value from before that step.
    """
    check_process()
    if isinstance(batches, Batch):
        raise UserError("batches is a single Batch; give a list of batches")
    if not isinstance(batches, Iterable):
        raise UserError(f"batches is {shown(batches, 60)}; give a list of batches")
    batches = list(batches)
    if not hasattr(model, "config") or not hasattr(model, "params"):
        raise UserError(f"model is {shown(model, 60)}; give the result of `jaxpersona.load`")
    if not isinstance(direction, Direction):
        raise UserError(f"direction is {shown(direction, 60)}; give a `Direction`")
    if not isinstance(optimizer, optax.GradientTransformation | None):
        raise UserError(f"optimizer is {shown(optimizer, 60)}; give an optax optimizer")
    if not isinstance(steps, (int, np.integer)):
        raise UserError(f"steps is {shown(steps, 60)}; it must be an integer")
    if steps < 1 or not batches:
        raise UserError(f"steps is {steps} and the number of batches is {len(batches)}; both "
                        "numbers must be positive")
    config = model.config
    for i, item in enumerate(batches):
        if not isinstance(item, Batch):
            raise UserError(f"batches[{i}] is {shown(item, 60)}; give the result of `batch` or "
                            "`encode`")
        if getattr(item.tokens, "is_fully_addressable", True):
            check_ids(np.asarray(jax.device_get(item.tokens)), config.vocab_size, f"batches[{i}]")
    direction.interventions().check(layers=config.n_layers, width=config.d_model, rows=0)
    if not callable(loss):
        raise UserError(f"loss is {shown(loss, 60)}; give a function loss(output, batch)")
    optimizer = optimizer if optimizer is not None else optax.adam(0.05)
    graph, learned = nnx.split(direction)

    @jax.jit
    def step(learned: nnx.State, optimizer_state: optax.OptState, params: Params,
             batch: Batch) -> tuple[nnx.State, optax.OptState, jax.Array, list[jax.Array]]:
        def objective(state: nnx.State) -> jax.Array:
            edits = nnx.merge(graph, state).interventions()
            value = loss(forward(params, config, batch, interventions=edits), batch)
            if jnp.shape(value) != ():
                raise UserError(f"the loss has shape {jnp.shape(value)}; it must be a scalar")
            return value

        value, gradient = jax.value_and_grad(objective)(learned)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes arrays and Python floats
            update, optimizer_state = optimizer.update(gradient, optimizer_state, learned)
        updated: Any = optax.apply_updates(learned, update)  # an nnx.State, like `learned`
        return updated, optimizer_state, value, finite(gradient)

    def finite(tree: Any) -> list[jax.Array]:
        return [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]

    optimizer_state, done, losses = optimizer.init(learned), 0, []
    with _checkpoints(folder, direction, model) as checkpoints:
        latest = None if checkpoints is None else checkpoints.latest
        if checkpoints is not None and latest is not None:
            learned, optimizer_state = checkpoints.restore(latest, (learned, optimizer_state))
            done = latest
            if done > steps:
                raise UserError(f"steps is {steps}, but the last checkpoint in {folder} is at step "
                                f"{done}; give a larger number, or use another folder")
        for number in range(done, steps):
            batch = batches[number % len(batches)]
            updated, optimizer_state, value, sloped = step(learned, optimizer_state, model.params,
                                                           batch)
            if not all(finite((value, updated))):
                nnx.update(direction, learned)
                cause = ("the optimizer's update of the vector" if all([*sloped, *finite(value)])
                         else f"the loss ({float(value)}) or its gradient")
                raise UserError(f"at step {number}, {cause} is not finite; use a smaller learning "
                                "rate or a different loss")
            learned = updated
            losses.append(float(value))
            if checkpoints is not None and (
                    (number + 1) % _SAVE_EVERY == 0 or number + 1 == steps):
                checkpoints.save(number + 1, (learned, optimizer_state))
            if callable(progress):
                progress(number + 1, steps, losses[-1])
    nnx.update(direction, learned)
    return losses


class _Checkpoints:
    """The Orbax checkpoints of a training run, by step."""

    def __init__(self, manager: ocp.CheckpointManager, folder: pathlib.Path) -> None:
        self.manager, self.folder = manager, folder

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint, or None if there is no checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Save the state after a step and delete all but the last two checkpoints."""
        import orbax.checkpoint as ocp

        self.manager.save(step, args=ocp.args.StandardSave(_numbered(state)))
        self.manager.wait_until_finished()

    def restore(self, step: int, target: Any) -> Any:
        """Return the state after a step, with the tree structure of `target`.

        Raises:
          UserError: the checkpoint is damaged, contains values that are not finite, or was written
            with a different optimizer.
        """
        import orbax.checkpoint as ocp

        leaves, tree = jax.tree.flatten(target)
        wanted = _numbered(target)
        try:
            stored = getattr(self.manager.item_metadata(step), "tree", None)
            if stored is None:
                raise UserError("its metadata is damaged")
            shapes = {name: tuple(array.shape) for name, array in stored.items()}
            if shapes != {name: x.shape for name, x in wanted.items()}:
                raise UserError("it was written with a different optimizer")
            arrays = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
            if not all(np.isfinite(x).all() for x in jax.device_get(list(arrays.values()))):
                raise UserError("it contains values that are not finite")
        except Exception as error:
            raise _unusable(self.folder, error) from error
        return jax.tree.unflatten(tree, [arrays[f"{i:04d}"] for i in range(len(leaves))])


def _unusable(folder: pathlib.Path, error: Exception) -> UserError:
    """Return the error for a checkpoint that is unreadable or does not match the training run."""
    reason = " ".join(str(error).split())[:160]
    return UserError(f"{folder}: the checkpoint cannot be used ({reason}); use another folder, or "
                     "delete this folder to start over")


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    """Write a run's settings to a new folder, or compare them with the settings in the folder.

    Raises:
      UserError: the folder belongs to another training run or contains other files, or
        `direction.json` is not a JSON object or cannot be read or written.
    """
    path = folder / "direction.json"
    if not path.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder}: the folder is not empty and has no {path.name}; use "
                            "another folder")
        files.write_json(path, settings)
        return
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise UserError(f"{path}: contains a {type(stored).__name__}, not a JSON object; use "
                        "another folder")
    for field, value in settings.items():
        if stored.get(field) != value:
            raise UserError(f"{folder}: the checkpoint does not match this direction, because "
                            f"its {field} is {stored.get(field)!r:.80}, not {shown(value, 80)}; "
                            "use another folder")


def _numbered(state: Any) -> dict[str, Any]:
    """Return a state's arrays by index, so that checkpoints do not depend on pytree classes."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


@contextlib.contextmanager
def _checkpoints(folder: str | pathlib.Path | None, direction: Direction,
                 model: Model) -> Iterator[_Checkpoints | None]:
    """Yield the checkpoints of a run, or None if `folder` is None.

    Raises:
      UserError: orbax-checkpoint is not installed, the folder contains other files, or the
        checkpoints do not match the direction or the model, or cannot be read.
    """
    if folder is None:
        yield None
        return
    ocp = require("orbax.checkpoint", "folder= needs orbax-checkpoint")
    path = pathlib.Path(folder).absolute()
    _check_settings(path, {"layers": list(direction.layers), "site": direction.site,
                  "where": direction.where.encode().tolist(), "model": model.fingerprint,
                  "shape": list(direction.vector[...].shape)})
    orbax.check_files(path)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    handler = ocp.StandardCheckpointHandler()
    try:  # reads the metadata of the last checkpoint
        opened = ocp.CheckpointManager(path, options=options, item_handlers=handler)
    except Exception as error:
        raise _unusable(path, error) from error
    with opened as manager:
        yield _Checkpoints(manager, path)
