"""The decisions of the scheduler, with lanes that run no program."""

from __future__ import annotations

import types

import numpy as np
import pytest

from jaxpersona.engine.lanes import CHUNK
from jaxpersona.engine.scheduler import Scheduler


def task(number=0, lane="a", shape="s", cancelled=False):
    return types.SimpleNamespace(number=number, lane=lane, shape=shape, cancelled=cancelled)


def lane(**changes):
    """Return a lane of 8 rows, of which 2 are free, that prefills 2 prompts at a time."""
    made = types.SimpleNamespace(rows=8, free=2, together=2, piece=None, staged=[], active=[],
                                 tasks=[], filling=False, asked=[], admitted=[], done=[], ended=[],
                                 unstage=lambda: None)
    made.decode = lambda *how: made.asked.append(how) or np.array(made.done, int)
    made.take_out = lambda done: [([task(i) for i in done.tolist()], done, "state")]
    made.admit = lambda chosen, shape: made.admitted.append(([t.number for t in chosen], shape))
    made.end = lambda rows: made.ended.append(rows)
    vars(made).update(changes)
    return made


def scheduler(made, *, collected=None, **options):
    found = [] if collected is None else collected
    return Scheduler(lambda _: made, lambda tasks, rows, state: found.append(rows.tolist()),
                     **options)


@pytest.mark.parametrize(("changes", "options", "waiting", "wanted"), [
    ({}, {}, "a", (2 + 2, CHUNK)), ({}, {}, None, (8, CHUNK)), ({}, {}, "b", (8, CHUNK)),
    ({}, {"refill": False}, "a", (8, CHUNK)), ({}, {"batched": False, "chunk": 5}, "a", (3, 5)),
    ({"together": 7}, {}, "a", (8, CHUNK)),  # six rows are active
    ({"piece": 16}, {}, "a", (2 + 1, CHUNK)),  # one eighth of the rows
    ({"piece": 16, "rows": 24}, {}, "a", (2 + 3, CHUNK)),
    ({"piece": 16, "staged": [None, task()]}, {}, None, (2 + 1, CHUNK)),
], ids=str)
def test_decoding_stops_early_only_if_a_prompt_waits_for_a_row(changes, options, waiting, wanted):
    """The lane gets the number of done rows at which to stop, and the number of steps."""
    made = lane(**changes)
    found = scheduler(made, **options)
    found.waiting.extend([] if waiting is None else [task(lane=waiting)])
    found._decode("a", made)
    assert made.asked == [wanted]


@pytest.mark.parametrize(("done", "options", "wanted"), [
    ([1], {}, []), ([1, 3], {}, [[1, 3]]), ([1], {"batched": False}, [[1]]),
    ([], {"batched": False}, []),
], ids=str)
def test_replies_are_collected_as_soon_as_there_are_enough(done, options, wanted):
    """In batches of two rows, or one by one."""
    collected = []
    made = lane(done=done, filling=True)
    scheduler(made, collected=collected, **options)._decode("a", made)
    assert collected == wanted and not made.filling


@pytest.mark.parametrize(("changes", "options", "wanted"), [
    ({"free": 3}, {}, [0, 1]), ({"free": 1}, {}, []), ({"free": 2}, {}, [0, 1]),
    ({"free": 1}, {"batched": False}, [0]), ({"free": 0}, {"batched": False}, []),
    ({"free": 3}, {"refill": False}, []), ({"free": 8}, {"refill": False}, [0, 1]),
    ({"free": 3, "filling": True}, {"refill": False}, [0, 1]),
    ({"free": 1, "filling": True}, {"refill": False}, [0]),  # without refill, any row is filled
    ({"free": 3, "together": 8}, {"batched": False}, []),  # a prefill would replace all rows
    ({"free": 8, "together": 8}, {}, [0, 1, 3]), ({"free": 3, "piece": 16}, {}, []),
], ids=str)
def test_prompts_of_one_shape_are_admitted_if_there_are_rows(changes, options, wanted):
    """Prompt 2 is cancelled, and prompt 4 has another shape."""
    made = lane(**changes)
    found = scheduler(made, **options)
    found.waiting.extend([task(0), task(1), task(2, cancelled=True), task(3), task(4, shape="t"),
                          task(5)])
    assert [one.number for one in found._admit()] == wanted
    assert made.admitted == ([(wanted, "s")] if wanted else [])
    left = [one.number for one in found.waiting if not one.cancelled]
    assert left == [n for n in (0, 1, 3, 4, 5) if n not in wanted]
    assert made.filling is (bool(wanted) or changes.get("filling", False))


def test_rows_of_cancelled_prompts_are_freed_before_a_step():
    """Only rows with a cancelled prompt."""
    made = lane(free=6, tasks=[None, task(cancelled=True), task(), task(cancelled=True)])
    found = scheduler(made)
    found.lanes["a"] = made
    found.step()
    assert made.ended == [[1, 3]] and len(made.asked) == 1


def test_a_step_that_may_pause_decodes_every_second_time():
    """Prompts that arrive in every step must not delay the others."""
    made, seen = lane(free=4), []
    found = scheduler(made, batched=False, pause=lambda tasks: seen.append(
        [one.number for one in tasks]) or True)
    for number, decoded in ((0, 0), (1, 1), (2, 1), (3, 2)):
        found.waiting.append(task(number))
        found.step()
        assert len(made.asked) == decoded
    found.step()  # without a prompt to admit
    assert len(made.asked) == 3 and seen == [[0], [2]]


def test_an_idle_scheduler_has_neither_prompts_nor_active_rows():
    """An open lane without an active row does not count."""
    made = lane(free=8)
    found = scheduler(made)
    assert found.idle
    found.lanes["a"] = made
    assert found.idle
    found.waiting.append(task())
    assert not found.idle
    found.waiting.clear()
    made.free = 7
    assert not found.idle
