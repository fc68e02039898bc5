"""Interrupts, failed threads and races leave the engine and its other requests usable."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import traceback
import weakref

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.engine import compiled, lanes, programs, stopping
from jaxpersona.engine.engine import Engine
from jaxpersona.engine.request import Request, detached

MODEL = dataclasses.replace(s.tiny_model(stop_ids=(257,), vocab_size=258),
                            tokenizer=s.byte_tokenizer())
IDS = MODEL.tokenizer("abcdefgh", add_special_tokens=False)["input_ids"]


def make(**changes):
    return Engine(MODEL, **{"rows": 4, "sizes": (64,), "chunk": 4, **changes})


def ask(n=3, **settings):
    return Request([5, 6], max_new_tokens=n, **settings)


def within(function, seconds=100):
    """Return the result of a function, or fail if it takes longer than `seconds`."""
    found = []

    def call():
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    assert found, "the call does not return"
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


def test_streams_that_are_cancelled_at_once_do_not_stop_other_requests():
    engine = make()
    old = engine.submit(ask(30))
    old._streamed = True
    engine.step()
    assert old._look()[0].size == 1  # sent before the first chunk
    for i in range(4):
        new = engine.submit(Request([7 + i], max_new_tokens=30))
        next(engine.stream(new))
        engine.cancel(new)
    assert old._look()[0].size == 1 + 2 * 4  # every second step decodes a chunk of four


def test_an_interrupted_end_of_the_background_leaves_the_engine_usable(monkeypatch):
    engine, entered, release = make(), threading.Event(), threading.Event()
    real = engine._scheduler.step

    def slow():
        entered.set()
        release.wait(100)
        real()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._scheduler, "step", slow)
    handle = engine.submit(ask())
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        with engine.running():
            assert entered.wait(100)
            patch.setattr(threading.Thread, "join", interrupted)
    release.set()
    assert within(lambda: engine.result(handle)).tokens.size == 3
    with engine.running():
        again = engine.submit(ask())
        assert within(lambda: engine.result(again)).tokens.size == 3
    assert not engine._background.active


def test_a_thread_that_does_not_start_leaves_the_engine_usable(monkeypatch):
    engine = make()

    def fails(_):
        raise RuntimeError("can't start new thread")

    with pytest.raises(RuntimeError, match="new thread"), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        with engine.running():
            pass
    assert engine.result(engine.submit(ask())).tokens.size == 3
    with engine.running(), pytest.raises(jp.UserError, match="already runs in the background"):
        with engine.running():
            pass


def test_an_exit_in_a_step_fails_its_requests_and_not_the_background_thread(monkeypatch):
    engine = make()

    def leaves():
        raise SystemExit("from a user's function")

    with engine.running():
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler, "step", leaves)
            handle = engine.submit(ask())
            with pytest.raises(SystemExit, match="from a user's function"):
                within(lambda: engine.result(handle))
        second = engine.submit(ask())
        assert within(lambda: engine.result(second)).tokens.size == 3 and engine._background.active


def test_a_handle_of_another_engine_is_a_user_error():
    one, other = make(), make()
    mine, theirs = one.submit(ask()), other.submit(ask())
    for call in (other.cancel, other.result, lambda handle: list(other.stream(handle))):
        with pytest.raises(jp.UserError, match=r"handle is Handle\(0: .* of another engine"):
            call(mine)
        with pytest.raises(jp.UserError, match="handle is of type str"):
            call("x")
    assert not mine.done and not theirs.done and len(other._handles) == 1
    other.cancel(theirs)
    other.cancel(theirs)  # has ended
    assert other.result(theirs).finish == "cancelled"


def test_an_interrupted_warm_up_leaves_no_lane_with_donated_arrays(monkeypatch):
    engine, real = make(), lanes.decode

    def interrupted(*args, **named):
        real(*args, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lanes, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.warm_up([ask()])
    assert not engine._scheduler.lanes
    assert engine.result(engine.submit(ask())).tokens.size == 3


def test_a_failed_handle_keeps_no_lane_and_each_result_has_its_own_traceback(monkeypatch):
    engine, opened = make(), []
    real = engine._scheduler.open_lane

    def open_lane(kind):
        lane = real(kind)
        opened.append(weakref.ref(lane))
        return lane

    def broken(*_, **__):
        try:
            raise KeyError("cause")
        except KeyError as error:
            raise RuntimeError("no memory") from error

    monkeypatch.setattr(engine._scheduler, "open_lane", open_lane)
    monkeypatch.setattr(lanes, "decode", broken)
    handles = [engine.submit(ask()) for _ in range(2)]
    engine.step()
    gc.collect()
    assert opened[0]() is None and all(handle.done for handle in handles)
    frames = []
    for handle in (*handles, *handles):
        with pytest.raises(RuntimeError, match="no memory") as caught:
            engine.result(handle)
        frames.append(len(traceback.extract_tb(caught.value.__traceback__)))
        assert str(caught.value) == "no memory" and caught.value.__cause__ is None
        assert handle._look()[3].__traceback__ is None
        (note,) = caught.value.__notes__
        assert "in broken" in note and "KeyError: 'cause'" in note
    assert len(set(frames)) == 1


def test_many_requests_whose_lane_cannot_be_opened_end_with_its_error(monkeypatch):
    """More requests than Python's recursion limit fail with the error of the lane."""
    many = sys.getrecursionlimit() + 100
    engine = make(queue=many)

    def broken(_):
        raise RuntimeError("no memory")

    handles = [engine.submit(ask()) for _ in range(many)]
    with monkeypatch.context() as patch:
        patch.setattr(engine._scheduler, "open_lane", broken)
        while engine.step():
            pass
    assert {str(handle._look()[3]) for handle in handles} == {"no memory"}
    assert engine.result(engine.submit(ask())).tokens.size == 3


def test_an_error_that_cannot_be_copied_is_detached_itself():
    class Picky(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    try:
        raise Picky("a", "b")
    except Picky as error:
        made = detached(error, "note")
        assert made is error and made.__traceback__ is None and made.__notes__ == ["note"]
    try:
        raise ValueError("a")
    except ValueError as error:
        made = detached(detached(error, "one"), "two")
        assert made is not error and error.__traceback__ is not None and made.args == ("a",)
        assert made.__notes__ == ["one", "two"] and not hasattr(error, "__notes__")


def test_tokens_that_arrive_during_a_cancellation_are_not_streamed(monkeypatch):
    engine, real, threads = make(), stopping.text_of, []
    handle = engine.submit(ask(8))
    events, stream = [], engine.stream(handle)
    handle._grow(np.array(IDS[:2], np.int32), {})
    events.append(next(stream))

    def step():
        handle._grow(np.array(IDS[:5], np.int32), {})
        events.append(next(stream))

    def text_of(*args):
        if not threads:
            threads.append(threading.Thread(target=step))
            threads[0].start()
            threads[0].join(0.3)
        return real(*args)

    monkeypatch.setattr(stopping, "text_of", text_of)
    engine.cancel(handle)
    threads[0].join()
    events += list(stream)
    reply = engine.result(handle)
    assert reply.finish == "cancelled" and reply.tokens.tolist() == IDS[:2]
    assert np.concatenate([event.tokens for event in events]).tolist() == IDS[:2]
    assert "".join(event.text for event in events) == reply.text == "ab"
    assert handle._look()[0].size == 2


def test_warm_up_raises_the_limit_of_programs_in_memory(monkeypatch):
    monkeypatch.delenv(compiled.SWITCH, raising=False)
    monkeypatch.setattr(s.KEPT, "limit", 2)
    s.KEPT.clear()
    engine = make()
    engine.warm_up([ask()])
    held, traced = len(s.KEPT), dict(programs.TRACES)
    assert held == s.KEPT.limit > 2
    assert engine.result(engine.submit(ask())).tokens.size == 3
    assert dict(programs.TRACES) == traced and len(s.KEPT) == held


@pytest.mark.parametrize("said", ["", "3"])
def test_a_limit_of_the_user_is_kept_with_a_warning(monkeypatch, recwarn, said):
    monkeypatch.setenv(compiled.SWITCH, said)
    monkeypatch.setattr("jaxpersona.engine.engine.KEPT", kept := compiled.Kept(3))
    engine = make(sizes=(64, 128))
    monkeypatch.setattr(engine, "_compile", lambda kind, shape: kept.get((kind, shape), list))
    kept.get("other", list)
    engine.warm_up()
    if not said:  # two programs for 64 slots and four for 128
        assert kept.limit == len(kept) == 6 and not recwarn.list
        kept.get("another", list)
        assert len(kept) == 6  # later programs replace the least recently used ones
        return
    (found,) = recwarn.list
    assert (kept.limit, len(kept)) == (3, 3) and found.filename == __file__
    assert str(found.message) == (
        f"warm_up compiled 6 programs, but {compiled.SWITCH} is 3, so some were dropped and are "
        f"recompiled on their next use; set {compiled.SWITCH} to at least 6")
