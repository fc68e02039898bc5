"""A JAX engine that reads and steers the persona of chat models in the residual stream.

Captures and interventions are pytrees of arrays that are passed to the model, without hooks; XLA
compiles their operations into the model's program.
"""

from importlib.metadata import version as _version

# imported first so that the CLI handles signals during the slow imports below
from jaxpersona import interrupt as _interrupt  # noqa: F401

# isort: split
from jaxpersona.captures import capture
from jaxpersona.ckpts.loading import load
from jaxpersona.ckpts.vectors import load_axis, load_caps, load_vector, save_vector
from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.engine.engine import Engine
from jaxpersona.engine.extract import Extracted, extract
from jaxpersona.engine.generate import Generated, generate
from jaxpersona.engine.replies import Reply
from jaxpersona.engine.request import Event, Handle, QueueFull, Request
from jaxpersona.engine.scoring import Scored, logprobs, next_logprobs
from jaxpersona.engine.stats import RunStats
from jaxpersona.errors import UserError
from jaxpersona.interventions import (
    Interventions,
    Where,
    ablate,
    cap,
    chain,
    custom,
    gate,
    mean_ablate,
    reserve,
    restore_norm,
    rotate,
    scale,
    set_projection,
    stack_rows,
    steer,
    sweep,
    turns,
    where,
)
from jaxpersona.interventions.trace import Applied
from jaxpersona.interventions.where import (
    assistant,
    everywhere,
    from_last,
    generated,
    last,
    marked,
    prompt,
    response,
    system,
    user,
)
from jaxpersona.models.batch import Batch, batch
from jaxpersona.models.cache import Cache, init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.config import ModelConfig
from jaxpersona.models.families import from_hf
from jaxpersona.models.forward import Output, forward
from jaxpersona.models.model import Model
from jaxpersona.models.params import Params, init_params
from jaxpersona.models.presets import preset
from jaxpersona.persona.check import Check, check
from jaxpersona.persona.contrast import contrast
from jaxpersona.report import plot
from jaxpersona.text.chat import encode
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis, Vector

__version__ = _version("jaxpersona")

__all__ = [
    "Applied", "Axis", "Batch", "Cache", "Caps", "Carry", "Check", "Engine", "Event", "Extracted",
    "Generated", "Handle", "Interventions", "Model", "ModelConfig", "Output", "Params", "QueueFull",
    "Reply", "Request", "RunStats", "Scored", "UserError", "Vector", "Where", "ablate", "assistant",
    "batch", "cap", "capture", "chain", "check", "contrast", "custom", "encode", "everywhere",
    "extract", "forward", "from_hf", "from_last", "gate", "generate", "generated", "init_cache",
    "init_params", "last", "load", "load_axis", "load_caps", "load_vector", "logprobs", "make_mesh",
    "marked", "mean_ablate", "next_logprobs", "plot", "preset", "prompt", "reserve", "response",
    "restore_norm", "rotate", "save_vector", "scale", "set_projection", "stack_rows", "steer",
    "sweep", "system", "turns", "user", "where",
]
