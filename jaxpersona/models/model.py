"""The `Model` dataclass: configuration, parameters and tokenizer of a loaded model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpersona.brief import line, quoted
from jaxpersona.errors import UserError
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.int8 import scheme
from jaxpersona.models.params import Derived, Params, fingerprint, same_arrays
from jaxpersona.runtime import is_traced


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      config, params: the configuration and the parameters.
      tokenizer: a transformers tokenizer, or None if the model was loaded without a tokenizer.
      mesh: the mesh over which the parameters are sharded, or None for a single device.
      name: the name or path from which the model was loaded.
      fingerprint: sixteen hexadecimal digits that identify the configuration and the weights
        (`params.fingerprint`). If `dataclasses.replace` changes the configuration or the
        parameters, the copy has a new fingerprint, or "" if its parameters are traced or abstract.
      stop_ids: the token ids that end a reply.
      template: whether the tokenizer has a chat template; False for most base models.
      marked: the configuration and the parameter arrays from which `fingerprint` was computed.
      derived: a cache of arrays derived from the parameters; empty in a copy.

    Examples:
      >>> import jaxpersona as jp
      >>> model = jp.load("mini")
      >>> model
      Model('mini', qwen3, 8 layers × 128, float32)
      >>> model.config.n_layers, model.config.d_model
      (8, 128)
    """

    config: ModelConfig
    params: Params
    tokenizer: Any
    mesh: Mesh | None
    name: str
    fingerprint: str
    stop_ids: tuple[int, ...]
    template: bool
    marked: tuple[ModelConfig, list[Any]] | None = dataclasses.field(
        default=None, repr=False, compare=False)
    derived: Derived = dataclasses.field(
        init=False, repr=False, compare=False, default_factory=Derived)

    def __post_init__(self) -> None:
        leaves, marked = jax.tree.leaves(self.params), self.marked
        if marked is not None and marked[0] == self.config and same_arrays(marked[1], leaves):
            return
        if marked is not None:
            abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
            mark = "" if abstract or is_traced(leaves) else fingerprint(
                self.config, jax.tree.map(jnp.asarray, self.params))  # from NumPy to JAX arrays
            object.__setattr__(self, "fingerprint", mark)
        object.__setattr__(self, "marked", (self.config, leaves))

    def __repr__(self) -> str:
        return line("Model", quoted(self.name), self.config.family,
                    f"{self.config.n_layers} layers × {self.config.d_model}",
                    scheme(self.params), str(self.params.like.dtype),
                    "" if self.mesh is None else f"mesh {dict(self.mesh.shape)}")


def release(model: Model) -> None:
    """Delete a model's weights from device memory, to make room for another model.

    The model keeps its configuration, name and fingerprint; every later use of the deleted weights
    raises an error.

    Args:
      model: the model. Other models that share its arrays cannot be used afterwards either.
    """
    object.__setattr__(model, "derived", Derived())  # frees the derived arrays
    for leaf in jax.tree.leaves(model.params):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()


def check_model(model: Any) -> None:
    """Check that the `model` argument of a public function has the attributes of a `Model`.

    Raises:
      UserError: an attribute is missing; for example, the argument is a model's name or
        `model.params`.
    """
    if not (hasattr(model, "params") and hasattr(model, "config")):
        shown = " ".join(repr(model).split())
        raise UserError(f"model is {shown:.60}; give the result of jp.load(…)")
