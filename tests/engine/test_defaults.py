"""The values of arguments that a caller omits: changing one changes the results of every script."""

from __future__ import annotations

import inspect

import pytest
import support as s

import jaxpersona as jp
from jaxpersona.engine.scheduler import Scheduler
from jaxpersona.engine.stream import Stream
from jaxpersona.interventions.where import everywhere

SAMPLED = {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}
EDIT = {"where": everywhere, "rows": None, "site": "residual"}
USUAL = [
    (jp.generate, {**SAMPLED, "top_k": 0, "batch_size": 32, "ids": None, "thinking": False,
                   "share_prefix": False, "refill": True, "on_nonfinite": "warn",
                   "interventions": None, "capture": None, "progress": None}),
    (jp.Request, {**SAMPLED, "top_k": 0, "stop": (), "id": None, "thinking": False,
                  "interventions": None, "capture": None}),
    (Stream, {**SAMPLED, "batch_size": 32, "share_prefix": False, "capture": None}),
    (jp.Engine, {"rows": 32, "capacity": None, "sizes": None, "lanes": 4, "chunk": 16,
                 "queue": 4096}),
    (jp.extract, {"capture": None, "interventions": None, "batch_tokens": None,
                  "on_nonfinite": "warn", "progress": None, "residual": "xla"}),
    (jp.logprobs, {"interventions": None, "batch_tokens": None}),
    (jp.next_logprobs, {"interventions": None, "batch_tokens": None}),
    (jp.forward, {"interventions": None, "capture": None, "carry": None, "slots": None,
                  "logits": "all", "attention": "xla", "residual": "xla"}),
    (jp.load, {"mesh": None, "dtype": None, "progress": None, "revision": None, "adapter": None,
               "merge": True, "activations": None, "tables": None}),
    (jp.make_mesh, {"data": 1, "model": 1, "fsdp": 1, "devices": None}),
    (jp.steer, {**EDIT, "scale": 1.0}), (jp.scale, EDIT), (jp.set_projection, EDIT),
    (jp.mean_ablate, EDIT), (jp.restore_norm, EDIT), (jp.custom, {**EDIT, "params": ()}),
    (jp.cap, {**EDIT, "floor": None, "ceiling": None, "push": None, "of": "default"}),
    (jp.ablate, {**EDIT, "coefficient": 0.0}), (jp.rotate, {**EDIT, "to": None, "by": None}),
    (jp.sweep, {"where": everywhere, "site": "residual"}),
    (jp.gate, {"above": None, "below": None, "over": "prompt", "within": False, "where": None,
               "site": "residual"}),
    (jp.reserve, {"slots": 1, "entries": None, "site": "residual"}),
    (jp.batch, {"kind": None, "turn": None, "row_id": None, "width": None, "vocabulary": None}),
    (jp.init_params, {"dtype": "float32"}),
]


@pytest.mark.parametrize(("function", "wanted"), USUAL, ids=lambda x: getattr(x, "__name__", ""))
def test_omitted_arguments_have_their_documented_values(function, wanted):
    """Names, values and types of all defaults of the public functions."""
    found = {name: one.default for name, one in inspect.signature(function).parameters.items()
             if one.default is not inspect.Parameter.empty}
    assert found == wanted
    assert {name: type(value) for name, value in found.items()} == {
        name: type(value) for name, value in wanted.items()}


def test_an_engine_hands_its_settings_to_its_scheduler():
    """A quarter of the rows is prefilled together, at least one."""
    made = jp.Engine(s.tiny_model(), rows=12, lanes=3, chunk=7, queue=9)
    found = made._scheduler
    assert (found.most, found.chunk, found.batched, found.refill) == (3, 7, False, True)
    assert (made.rows, made.queue, made._together, made.sizes) == (12, 9, 3, None)
    assert [jp.Engine(s.tiny_model(), rows=n)._together for n in (1, 3, 7, 8)] == [1, 1, 1, 2]
    plain = Scheduler(lambda _: None, lambda *_: None)
    assert (plain.most, plain.chunk, plain.batched, plain.refill) == (1, 64, True, True)
