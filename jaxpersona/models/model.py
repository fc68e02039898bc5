"""A model that is ready to run: its shape, parameters and tokenizer as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpersona.models.config import ModelConfig
from jaxpersona.models.params import Derived, Params, fingerprint, same_arrays


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that is ready to run.

    Attributes:
      config, params: its shape and its parameters.
      tokenizer: of transformers, or None where the source has none.
      mesh: the devices that the parameters are spread over, or None for one.
      name: what it was loaded as.
      fingerprint: sixteen digits that identify its shape and weights (`params.fingerprint`). A copy
        with other parameters (`dataclasses.replace`) gets its own; "" while they are traced.
      stop_ids: the tokens that end a reply.
      template: whether the tokenizer has a chat template; a base model has none.
      marked: the configuration and arrays that the fingerprint is of.
      derived: what was computed from the parameters for speed; a copy begins without.
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
            traced = any(isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct) for x in leaves)
            mark = "" if traced else fingerprint(
                self.config, jax.tree.map(jnp.asarray, self.params))  # NumPy's arrays too
            object.__setattr__(self, "fingerprint", mark)
        object.__setattr__(self, "marked", (self.config, leaves))
