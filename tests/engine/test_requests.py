"""What an engine makes of a request, and its queue, without a compiled program."""

from __future__ import annotations

import dataclasses
import re
import types

import jax
import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.engine.edits import RowEdits, for_one_row
from jaxpersona.engine.engine import Engine
from jaxpersona.engine.kinds import plain_shapes
from jaxpersona.engine.prompts import widths
from jaxpersona.engine.replies import Finished, Reply, so_far
from jaxpersona.engine.request import Handle, QueueFull, Request
from jaxpersona.engine.scheduler import Scheduler
from jaxpersona.engine.tasks import Shape
from jaxpersona.interventions import custom, reserve, steer
from jaxpersona.interventions.where import everywhere, generated
from jaxpersona.text import chat

END = 257
MODEL = dataclasses.replace(s.tiny_model(stop_ids=(END,), vocab_size=258),
                            tokenizer=s.byte_tokenizer())
V = np.random.default_rng(5).normal(size=(2, 32))
IDS = MODEL.tokenizer("abcd", add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def engine():
    return Engine(MODEL, rows=2)


def task(engine, conversation=(5, 6, 7), **settings):
    return engine._task(Request(list(conversation), **settings))


def test_the_settings_of_a_request_are_those_of_its_task(engine):
    made = task(engine, temperature=0.5, top_p=0.25, top_k=9, seed=4, id=8, max_new_tokens=11)
    how = made.sampling
    assert [x.tolist() for x in (how.temperature, how.top_p, how.top_k, how.seed)] == [
        [0.5], [0.25], [9], [4]]
    assert (made.row_id, made.limit, made.lane.greedy) == (8, 11, False)
    plain = task(engine)
    assert plain.row_id == chat.row_id([5, 6, 7]) and plain.lane.greedy
    assert task(engine, max_new_tokens=10**12).limit == 512 - 3  # the model's context
    edited = task(engine, interventions=steer(V[0], layers=1, scale=2.0))
    assert edited.edits.edits[0].layers == (1,) and not plain.edits.edits


def test_a_request_may_ask_for_a_thinking_block():
    tokenizer = s.byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{{ '<think>' if enable_thinking }}"
    engine = Engine(dataclasses.replace(MODEL, tokenizer=tokenizer), rows=2)
    texts = [engine._task(Request("hi", thinking=on)).row.text for on in (False, True)]
    assert texts == ["hi", "hi<think>"]


@pytest.mark.parametrize("fault", [
    {"stop": 5}, {"stop": True}, {"stop": 0}, {"stop": False}, {"stop": b"ab"}, {"stop": "a\ud800"},
    {"stop": iter(["a"])},  # would be empty the second time
    {"max_new_tokens": True}, {"max_new_tokens": [5]}, {"max_new_tokens": -1},
    {"id": [[1], [2, 3]]}, {"id": [1]}, {"id": 1.5}, {"id": True}, {"id": -1}, {"id": 2**80},
    {"temperature": 1e39}, {"temperature": 1 + 2j},
], ids=lambda fault: re.sub(" at 0x.*", "", str(fault)))
def test_a_fault_in_a_request_is_one_line(engine, fault):
    with pytest.raises(jp.UserError, match=f"^{next(iter(fault))} is ") as caught:
        task(engine, **fault)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "words"), [
    ({"sizes": 128}, "sizes is 128"), ({"sizes": ()}, r"sizes is \(\)"),
    ({"sizes": (64, True)}, r"sizes\[1\] is True"), ({"rows": True}, "rows is True"),
    ({"lanes": 0}, "lanes is 0"), ({"queue": 0}, "queue is 0"), ({"chunk": 0}, "chunk is 0"),
    ({"capacity": steer(V[0], layers=1)}, r"capacity is steer\(.*; give the result of jp\.reserve"),
    ({"capacity": jp.Interventions()}, "give the result of jp.reserve"),
])
def test_each_setting_of_an_engine_is_checked(changes, words):
    with pytest.raises(jp.UserError, match=words):
        Engine(MODEL, **{"rows": 2, **changes})


def test_the_largest_of_the_sizes_limits_a_reply_in_any_order():
    engine = Engine(MODEL, rows=2, sizes=[256, 64, 256])
    assert engine.sizes == (64, 256)
    assert task(engine, max_new_tokens=500).limit == 256 - 32  # a prompt of 3 is padded to 32
    assert [task(engine, max_new_tokens=n).shape for n in (32, 33)] == [
        (0, 32, 64), (0, 32, 256)]
    with pytest.raises(jp.UserError, match="has 200 tokens, padded to 256, but the engine's"):
        task(engine, [5] * 200)


READS = {
    "none": None, "where": capture.mean(generated), "other where": capture.mean(everywhere),
    "layers": capture.mean(generated, layers=[1]), "name": capture.mean(generated, name="x"),
    "direction": capture.projections(V[:1]), "other direction": capture.projections(V[1:]),
    "edges": capture.histogram(V[:1], [0.0]), "other edges": capture.histogram(V[:1], [1.0]),
}


def test_only_requests_with_equal_captures_share_a_lane(engine):
    kinds = {name: task(engine, capture=read).lane for name, read in READS.items()}
    for one in READS:
        for other in READS:
            assert (kinds[one] == kinds[other]) == (one == other), (one, other)
    again = task(engine, capture=capture.histogram(V[:1], [1.0]))
    assert again.lane == kinds["other edges"] and hash(again.lane) == hash(kinds["other edges"])


def test_requests_with_edits_of_other_values_share_a_lane(engine):
    first, second = (task(engine, interventions=steer(v, layers=1, scale=scale)).lane
                     for v, scale in zip(V, (1.0, 2.0), strict=True))
    assert first == second != task(engine).lane
    for other in ({"interventions": steer(V[0], layers=2)}, {"stop": "a"}, {"temperature": 1.0},
                  {"max_new_tokens": 400}):
        settings = {"interventions": steer(V[0], layers=1), "max_new_tokens": 20}
        assert task(engine, **settings).lane != task(engine, **{**settings, **other}).lane, other


@pytest.mark.parametrize(("read", "words"), [
    (capture.projections(np.ones((1, 7))), "7"), (capture.mean(layers=[9]), "reads layer 9, but"),
    (capture.histogram(np.ones((1, 7)), [0.0]), "7")], ids=["width", "layer", "histogram"])
def test_a_capture_that_does_not_match_the_model_is_refused_at_once(engine, read, words):
    with pytest.raises(jp.UserError, match=words):
        engine.submit(Request([5], capture=read))


def test_custom_edits_share_a_lane_only_if_their_parameters_have_the_same_dtype(engine):
    """A lane stores the parameters of all rows in one array, which would cast 1.5 to 1."""
    def scaled(k, h):
        return h * k

    tasks = [task(engine, interventions=custom(scaled, k, layers=1)) for k in (1, 1.5, 2.5)]
    assert tasks[0].lane != tasks[1].lane == tasks[2].lane
    edits = RowEdits(tasks[1].lane.neutral, 2)
    for row, one in enumerate(tasks[1:]):
        edits.assign(one.edits, np.array([row], np.int32))
    assert edits.table.edits[0].params.tolist() == [1.5, 2.5]


def test_captures_share_a_lane_only_if_their_values_have_the_same_dtype(engine):
    read = capture.mean(generated)
    wide = jax.tree.map(lambda x: np.asarray(x, np.uint32), read)
    assert task(engine, capture=read).lane != task(engine, capture=wide).lane


def changed(**fields):
    row = chat.Row(*(np.full(3, value, np.int32) for value in (5, 16, 0)), "")
    return dataclasses.replace(row, **fields)


ROWS = {
    "no token": ({name: np.zeros(0, np.int32) for name in ("tokens", "kind", "turn")},
                 "tokens is empty; give at least one token"),
    "a short kind": ({"kind": np.zeros(2, np.int32)}, "kind has length 2, but the length"),
    "a long turn": ({"turn": np.zeros(4, np.int32)}, "turn has length 4, but the length of tokens"),
    "float tokens": ({"tokens": np.ones(3)}, r"tokens has shape \(3,\) and dtype float64; give an"),
    "float kind": ({"kind": np.ones(3)}, r"kind has shape \(3,\) and dtype float64; give an"),
    "bool turn": ({"turn": np.ones(3, bool)}, r"turn has shape \(3,\) and dtype bool; give an"),
    "a list": ({"tokens": [5, 6, 7]}, "tokens is a list; give an int32 array"),
    "two axes": ({"tokens": np.ones((1, 3), np.int32)}, r"tokens has shape \(1, 3\) and dtype"),
    "no kind": ({"kind": None}, "kind is a NoneType; give an int32 array"),
}


@pytest.mark.parametrize("fault", ROWS)
def test_a_faulty_row_is_refused_before_other_requests_are_affected(engine, fault):
    fields, words = ROWS[fault]
    row = changed(**fields)
    with pytest.raises(jp.UserError, match=f"^a conversation is a Row whose {words}"):
        engine.submit(Request(row))
    for call in (jp.generate, jp.extract, jp.logprobs, lambda *x: jp.next_logprobs(*x, [5])):
        with pytest.raises(jp.UserError, match=f"^conversation 1 is a Row whose {words}"):
            call(MODEL, [[5, 6], row])


def test_the_arrays_of_a_row_become_int32(engine):
    plain, wide = changed(), changed(**{name: np.full(3, value, np.int64) for name, value in (
        ("tokens", 5), ("kind", 16), ("turn", 0))})
    assert engine._task(Request(plain)).row is plain
    made = engine._task(Request(wide)).row
    assert all(s.same_bits(getattr(made, name), getattr(plain, name))
               for name in ("tokens", "kind", "turn"))
    assert wide.tokens.dtype == np.int64


@pytest.mark.parametrize(("examples", "words"), [
    (5, "^requests is 5; give a list"), (Request([5]), r"^requests is Request\(.*; give a list"),
    ([Request([5]), 5], r"^requests\[1\] is 5; give a jp.Request"),
    ("ab", r"^requests\[0\] is 'a'; give a jp.Request")])
def test_only_requests_are_examples_for_warm_up(engine, examples, words):
    with pytest.raises(jp.UserError, match=words):
        engine.warm_up(examples)


def test_a_capacity_keeps_its_site():
    room = reserve(4, 32, [1, 2], site="attention")
    own = for_one_row(steer(V[0], layers=1, site="attention"), room)
    assert [table.site for table in own.edits] == ["attention"]
    assert own.edits[0].layers == (1, 2) and for_one_row(None, room).edits[0].site == "attention"


def test_requests_that_a_step_has_taken_over_count_as_queued(monkeypatch):
    engine = Engine(MODEL, rows=2, queue=3)
    monkeypatch.setattr(engine._scheduler, "step", lambda: None)  # no row is free
    for _ in range(2):
        engine.submit(Request([5]))
    assert engine.step()
    waiting = engine.submit(Request([5]))
    with pytest.raises(QueueFull, match=r"limit: 3"):
        engine.submit(Request([5]))
    engine.cancel(waiting)
    engine.step()
    assert engine.submit(Request([5])).number == 3


def test_cancelled_requests_leave_the_queue(monkeypatch):
    engine = Engine(MODEL, rows=2)
    monkeypatch.setattr(engine._scheduler, "step", lambda: None)
    handles = [engine.submit(Request([5])) for _ in range(3)]
    engine.step()
    engine.cancel(handles[1])
    engine.step()
    assert [task.number for task in engine._scheduler.waiting] == [0, 2]


@pytest.mark.parametrize(("tokens", "flags", "kept", "text", "finish"), [
    ([*IDS[:2], END], {}, IDS[:2], "ab", "stop"), ([END], {}, [], "", "stop"),
    (IDS[:3], {"matched": True}, IDS[:3], "a", "stop"), (IDS[:2], {}, IDS[:2], "ab", "length"),
    (IDS[:1], {"nonfinite": True}, IDS[:1], "a", "nonfinite"),
    ([*IDS[:2], END], {"nonfinite": True}, IDS[:2], "ab", "nonfinite"),
])
def test_how_a_reply_ended(engine, tokens, flags, kept, text, finish):
    handle = engine.submit(Request([5], stop=["bc"]))
    mine = engine._handles[handle.number][1]
    reply = engine._reply(mine, Finished(
        np.array(tokens, np.int32), {}, frozenset(), frozenset(), (),
        **{"nonfinite": False, "matched": False, **flags}))
    engine.cancel(handle)
    assert (reply.tokens.tolist(), reply.text, reply.finish) == (kept, text, finish)
    assert reply.row is mine.row


def test_a_cancelled_reply_has_what_was_streamed(engine):
    handle = engine.submit(Request([5], stop=["bc"]))
    handle._grow(np.array(IDS, np.int32), {})
    engine.cancel(handle)
    reply = engine.result(handle)
    assert (reply.text, reply.finish, reply.tokens.tolist()) == ("a", "cancelled", IDS)
    assert reply.row.tokens.tolist() == [5] and not reply.captured and not reply.applied


def test_a_handle_keeps_its_first_end():
    handle = Handle(Request([5]), 0)
    reply = Reply("a", np.array([1], np.int32), "cancelled", None, {}, ())
    assert not handle.done and handle._finish(reply) and handle.done
    assert not handle._finish(None, RuntimeError("late")) and handle._look()[2:] == (reply, None)


def test_a_stop_token_is_not_streamed():
    tokens = np.array([[END, -1, -1], [5, 6, -1], [5, END, -1], [-1, -1, -1]], np.int32)
    state = types.SimpleNamespace(
        tokens=tokens, length=np.array([1, 2, 2, 0]), carry=types.SimpleNamespace(
            captured=None, cache=types.SimpleNamespace(next=np.array([3, 4, 4, 3]))))
    prompt = types.SimpleNamespace(row=types.SimpleNamespace(tokens=np.zeros(3, np.int32)))
    found = so_far(state, [(i, prompt, []) for i in range(4)], (END,))
    assert [tokens.tolist() for tokens, _ in found] == [[], [5, 6], [5], []]


def test_the_programs_of_requests_cannot_be_compiled_between_requests():
    engine = Engine(MODEL, rows=2)
    with pytest.raises(jp.UserError, match=r"no sizes; use Engine\(sizes=…\), or pass example"):
        engine.warm_up()
    engine.submit(Request([5]))
    with pytest.raises(jp.UserError, match="call warm_up before submit"):
        engine.warm_up([Request([5])])


def test_the_padded_lengths_of_prompts_that_leave_room_for_a_reply():
    assert widths(128, 512) == [32, 64] and widths(129, 512) == [32, 64, 128]
    assert widths(1024, 129) == [32, 64, 128] and widths(1024, 130) == [32, 64, 128, 256]
    assert widths(32, 512) == []


def test_plain_requests_have_the_kinds_and_shapes_that_are_compiled_before():
    room = reserve(1, 32, slice(0, 3), slots=2)
    engine = Engine(MODEL, rows=2, sizes=(64, 128), capacity=room)
    made = list(plain_shapes(MODEL, engine.sizes, engine.capacity, 2))
    assert [(kind.slots, kind.greedy, shape) for kind, shape in made] == [
        (slots, greedy, Shape(0, width, slots)) for slots, wide in ((64, [32]), (128, [32, 64]))
        for greedy in (True, False) for width in wide]
    for settings in ({}, {"temperature": 1.0}, {"interventions": steer(V[0], layers=1)}):
        mine = task(engine, [5] * 40, max_new_tokens=9, **settings)
        assert (mine.lane, mine.shape) in made


def lane(free=2):
    return types.SimpleNamespace(free=free, rows=2, staged=[], tasks=[])


def test_a_lane_without_a_task_makes_room_for_another():
    made = {}
    scheduler = Scheduler(lambda key: made.setdefault(key, lane()), lambda *_: None, lanes=2)
    for key in "ab":
        assert scheduler.lane_of(key) is made[key]
    assert list(scheduler.lanes) == ["a", "b"]  # there is room for both
    made["a"].free = 1
    scheduler.lane_of("c")
    assert list(scheduler.lanes) == ["a", "c"]
    made["a"].free, made["b"].free = 2, 1
    scheduler.lane_of("b")
    assert list(scheduler.lanes) == ["c", "b"]
    made["c"].staged = [None, object()]  # a prompt that is being prefilled
    assert scheduler.lane_of("d") is None and scheduler.lane_of("b") is made["b"]
    assert not scheduler.idle
    made["b"].free = 2
    assert scheduler.lane_of("d") is made["d"] and list(scheduler.lanes) == ["c", "d"]
    made["c"].staged = [None]
    scheduler.lane_of("e")
    assert list(scheduler.lanes) == ["d", "e"]  # one idle lane is enough


@pytest.mark.parametrize("piece", [None, 16])
def test_an_error_at_an_admission_fails_all_prompts_of_the_lane(piece):
    """The lane is dropped, so replies that it already decodes fail too, and no handle waits."""
    def broken(*_):
        raise RuntimeError("no memory")

    ended = []
    running, waiting = (types.SimpleNamespace(lane="a", shape=None, cancelled=False, number=n)
                        for n in range(2))
    busy = types.SimpleNamespace(
        rows=2, free=1, together=1, piece=piece, filling=False, tasks=[running, None],
        staged=[] if piece is None else [None], active=[running], unstage=lambda: None,
        admit=broken, stage=broken)
    scheduler = Scheduler(lambda _: busy, lambda *_: None, failed=lambda tasks, error: ended.append(
        (sorted(task.number for task in tasks), str(error))))
    scheduler.waiting.append(waiting)
    scheduler.step()
    assert ended == [([0, 1], "no memory")]
    assert scheduler.idle and not scheduler.lanes
