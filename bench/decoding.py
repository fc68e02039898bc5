"""The workload that several benchmarks share: a fixed number of decode steps for random prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpersona.captures.capture import Capture
from jaxpersona.engine.programs import State, Stops, decode, prefill
from jaxpersona.engine.sampling import sampling
from jaxpersona.interventions import Interventions
from jaxpersona.models.batch import batch
from jaxpersona.models.cache import kept_dtype
from jaxpersona.models.prepared import fast_params
from jaxpersona.planning import hlo

PROMPT = 32
NOTHING = Interventions()


class Decoding:
    """A batch of `rows` random prompts of `prompt` tokens, decoded for exactly `steps` steps."""

    def __init__(self, model: Any, rows: int, steps: int, *, prompt: int = PROMPT,
                 temperature: float = 0.0, top_p: float = 1.0,
                 program: Any = decode) -> None:
        """Prepare the prompts and settings; `program` must accept the arguments of `decode`."""
        self.program = program
        self.model, self.rows, self.steps, self.prompt = model, rows, steps, prompt
        self.params = fast_params(model, rows)  # the weight layout that `generate` uses
        self.prompts = np.random.default_rng(1).integers(0, model.config.vocab_size, (rows, prompt))
        self.batch = jax.tree.map(jnp.asarray, batch(self.prompts))
        self.how = sampling(rows, temperature=temperature, top_p=top_p)
        self.greedy = temperature == 0
        self.stops = Stops(jnp.full((4,), -1, jnp.int32), jnp.full((2,), -1, jnp.int32))
        self.limit = jnp.full((rows,), steps + 1, jnp.int32)
        self.until = jnp.asarray(steps, jnp.int32)

    def start(self, edits: Interventions, read: Capture) -> State:
        """Prefill the prompts and return the state of the decode loop."""
        return prefill(self.params, self.model.config, self.batch, edits, read, self.how,
                       self.stops, self.limit, slots=self.prompt + self.steps + 16,
                       max_new=self.steps + 1, greedy=self.greedy)

    def arguments(self, state: State, edits: Interventions, read: Capture) -> tuple:
        """Return the arguments of `decode`, except `greedy`."""
        return (self.params, self.model.config, state, edits, read, self.how, self.stops,
                self.until)

    def timer(self, edits: Interventions = NOTHING, read: Capture | None = None, *,
              prompts: bool = False) -> Callable[[], float]:
        """Return a function that times the steps, including the prefill if `prompts` is true."""
        reads = Capture() if read is None else read
        # each run copies this state, because `decode` donates its buffers
        first = None if prompts else self.start(edits, reads)

        def once() -> float:
            state = None if first is None else jax.block_until_ready(jax.tree.map(jnp.copy, first))
            begun = time.perf_counter()
            state = self.start(edits, reads) if state is None else state
            state = jax.block_until_ready(
                self.program(*self.arguments(state, edits, reads), greedy=self.greedy))
            spent = time.perf_counter() - begun
            if int(state.step) != self.steps:
                raise RuntimeError(f"the decode loop ended after {int(state.step)} steps "
                                   f"instead of {self.steps}")
            return spent

        return once

    def fusions(self, edits: Interventions = NOTHING) -> int:
        """Count the fusions in the loop body of the compiled decode program."""
        state = jax.eval_shape(lambda: self.start(edits, Capture()))  # only shapes are needed
        compiled = self.program.lower(*self.arguments(state, edits, Capture()),
                                      greedy=self.greedy).compile()
        return hlo.fusions(hlo.operations(compiled.as_text()))

    @property
    def bytes(self) -> int:
        """The bytes of weights, keys and values read by the decode step halfway through the run."""
        embed = self.model.params.embed_vd
        config = self.model.config
        seen = self.prompt + self.steps // 2
        return (config.step_bytes(embed.dtype.itemsize)
                + self.rows * config.cache_bytes(seen, jnp.dtype(kept_dtype(embed)).itemsize))
