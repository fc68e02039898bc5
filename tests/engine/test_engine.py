"""The engine: a request's bits do not depend on other requests or on the calling thread."""

from __future__ import annotations

import dataclasses
import resource
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.engine import programs
from jaxpersona.engine.engine import Engine
from jaxpersona.engine.generate import generate
from jaxpersona.engine.request import QueueFull, Request
from jaxpersona.interventions import ablate, cap, chain, gate, reserve, steer
from jaxpersona.interventions.where import everywhere, generated
from jaxpersona.models.batch import batch
from jaxpersona.models.forward import forward

D, LAYERS = 32, 3
TINY = s.tiny_model(stop_ids=(257,), vocab_size=258)
V = np.random.default_rng(5).normal(size=(6, D))


@pytest.fixture(scope="module")
def model():
    return dataclasses.replace(TINY, tokenizer=s.byte_tokenizer())


def reserved(slots=2):
    return reserve(1, D, slice(0, LAYERS), slots=slots)


def make(model, **changes):
    return Engine(model, **{"rows": 8, "capacity": reserved(), "sizes": (128,), "chunk": 8,
                            **changes})


READ = capture.mean(generated) | capture.projections(V[:2], generated)
EDITS = [None, steer(V[0], layers=1, scale=2.0), cap(V[1], layers=[0, 2], floor=0.5),
         ablate(V[2], layers=2), chain(cap(V[3], layers=1, ceiling=0.1),
                                       steer(V[4], layers=2, scale=-1.5, where=generated)),
         steer(V[5], layers=[0, 1, 2], scale=0.7)]


def draw(rng, i, reads=(None, READ)):
    """Draw a request with random settings and a prompt of at most 64 tokens."""
    return Request(
        rng.integers(4, 256, int(rng.integers(1, 60))).tolist(),
        interventions=EDITS[rng.integers(len(EDITS))],
        capture=reads[rng.integers(len(reads))],
        max_new_tokens=int(rng.integers(1, 40)),
        temperature=float(rng.choice([0.0, 0.7, 1.3])), top_p=float(rng.choice([1.0, 0.9])),
        seed=int(rng.integers(100)), stop=["a", "bc"] if rng.random() < 0.4 else [], id=i)


def same(a, b):
    return (np.array_equal(a.tokens, b.tokens) and a.text == b.text and a.finish == b.finish
            and s.same_bits((a.captured, a.applied), (b.captured, b.applied)))


def kinds(reads=(None, READ)):
    """Return one request of each kind that `draw` produces."""
    return [Request([5] * width, temperature=temperature, stop=stop, capture=read,
                    max_new_tokens=8)
            for width in (8, 40) for temperature in (0.0, 1.0)
            for stop in ([], ["a", "bc"]) for read in reads]


@pytest.mark.parametrize(("count", "reads"), [
    (20, (READ,)), pytest.param(300, (None, READ), marks=pytest.mark.slow)], ids=["20", "300"])
def test_requests_from_eight_threads_have_the_bits_they_have_alone(model, count, reads):
    engine = make(model)
    engine.warm_up(kinds(reads))
    traced = dict(programs.TRACES)
    rng = np.random.default_rng(0)
    requests = [draw(rng, i, reads) for i in range(count)]
    cancelled = set(rng.choice(count, count // 10, replace=False).tolist())
    done, faults = {}, []

    def client(mine):
        pause = np.random.default_rng(mine[0])
        for i in mine:
            time.sleep(pause.uniform(0, 0.01))
            handle = engine.submit(requests[i])
            try:
                if i in cancelled:
                    time.sleep(pause.uniform(0, 0.02))
                    engine.cancel(handle)
                elif i % 3 == 0:
                    done[i] = list(engine.stream(handle))[-1].reply
                    continue
                done[i] = engine.result(handle)
            except BaseException as error:
                faults.append(error)

    threads = [threading.Thread(target=client, args=(list(range(k, count, 8)),)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and len(done) == count
    while engine.step():
        pass
    assert not engine._handles and all(lane.free == 8 for lane in engine._scheduler.lanes.values())
    ends = [done[i].finish for i in range(count)]
    assert {"stop", "length", "cancelled"} == set(ends)
    assert all(i in cancelled for i in range(count) if ends[i] == "cancelled")
    for i in range(count):
        if ends[i] != "cancelled":
            alone = engine.result(engine.submit(requests[i]))
            assert same(done[i], alone), f"request {i}: {requests[i]}"
    assert dict(programs.TRACES) == traced, "a program was traced after warm_up"
    settings = [dataclasses.replace(requests[i], id=i + 1000) for i in range(count)]
    others = [engine.result(engine.submit(r)) for r in settings]
    assert any(not same(done[i], others[i]) for i in range(count) if ends[i] != "cancelled")


@pytest.mark.slow
def test_after_warm_up_without_examples_plain_requests_trace_nothing(model):
    s.KEPT.clear()
    engine = make(model, rows=4, sizes=(64, 128))
    engine.warm_up()
    traced = dict(programs.TRACES)
    handles = [engine.submit(Request([5] * width, max_new_tokens=most, temperature=temperature,
                                     interventions=edits))
               for width, most in ((3, 5), (30, 60), (40, 9), (64, 200)) for temperature in (0., 1.)
               for edits in (None, EDITS[4])]
    assert all(engine.result(handle).tokens.size for handle in handles)
    assert dict(programs.TRACES) == traced
    with pytest.raises(ValueError, match=r"has no sizes.*Engine\(sizes=…\), or pass example"):
        make(model, sizes=None).warm_up()


SETTINGS = [(name, temperature) for name in ("plain", "steer", "chain", "gate")
            for temperature in (0.0, 1.0)]
QUICK = [("gate", 1.0)]


@pytest.mark.parametrize(("name", "temperature"), [
    *QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SETTINGS
              if pair not in QUICK)])
def test_a_request_has_the_reply_that_generate_gives(model, name, temperature):
    """Test greedy and sampled requests with edits and captures; rounding may differ."""
    edits = {"plain": None, "steer": EDITS[1], "chain": EDITS[4],
             "gate": gate(EDITS[1], V[0], layer=0, above=0.0)}[name]
    engine = make(model, capacity=None, sizes=None, rows=8)
    row = s.prompts((20,), 256, seed=3)[0]
    reply = engine.result(engine.submit(Request(
        row, interventions=edits, capture=READ, max_new_tokens=20, seed=4, id=9,
        temperature=temperature)))
    out = generate(model, [row], interventions=edits, capture=READ, max_new_tokens=20,
                   temperature=temperature, seed=4, ids=[9], batch_size=8)
    assert np.array_equal(reply.tokens, out.tokens[0]) and reply.text == out.text[0]
    assert s.rowwise(reply.captured["mean"], out.captured["mean"][0]).max() < 1e-5
    assert np.allclose(reply.captured["projections"], out.captured["projections"][0],
                       rtol=1e-4, atol=1e-4, equal_nan=True)
    for own, theirs in zip(reply.applied, out.applied, strict=True):
        assert own.seen == theirs.seen[0]
        assert np.array_equal(own.changed, theirs.changed[:, 0])


def test_the_oldest_waiting_request_is_admitted_next(model):
    engine = make(model, rows=4, chunk=4)
    handles = [engine.submit(Request([7 + i], max_new_tokens=4 + 3 * (i % 5), id=i,
                                     temperature=1.0)) for i in range(20)]
    admitted, lanes = [], []
    open_lane = engine._scheduler.open_lane

    def opened(kind):
        lane = open_lane(kind)
        admit = lane.admit
        lane.admit = lambda chosen, shape: (admitted.extend(t.number for t in chosen),
                                            admit(chosen, shape))
        lanes.append(lane)
        return lane

    engine._scheduler.open_lane = opened
    while engine.step():
        pass
    assert admitted == list(range(20)) and len(lanes) == 1
    assert all(handle.done for handle in handles)


def test_a_cancelled_request_frees_its_row_within_one_chunk(model):
    engine = make(model, rows=2, chunk=4)
    long = [engine.submit(Request([9], max_new_tokens=90, id=i, temperature=1.0,
                                  stop=["\x00never"])) for i in range(2)]
    next_one = engine.submit(Request([10], max_new_tokens=4, id=7, temperature=1.0,
                                     stop=["\x00never"]))
    engine.step()
    assert not next_one.done and next_one._look()[0].size == 0
    engine.cancel(long[0])
    assert long[0].done and engine.result(long[0]).finish == "cancelled"
    engine.step()
    assert next_one.done and not long[1].done
    engine.cancel(next_one)  # already done
    assert engine.result(next_one).finish == "length"
    engine.cancel(long[1])
    assert not engine.step()


def test_a_request_that_fails_fails_alone(model, monkeypatch):
    engine = make(model)
    good = engine.submit(Request([5, 6], max_new_tokens=4))
    for fault, words in (
        (Request([5] * 600), "context is limited to 512"),
        (Request([5] * 120), "largest cache is limited to 128"),
        (Request([5], interventions=steer(np.ones(7), layers=1)), "width 7"),
        (Request([5], interventions=steer(V[0], layers=9)), "layers"),
        (Request([5], interventions=chain(*[steer(V[0], layers=1)] * 3)), "does not fit|reserve"),
        (Request([5], interventions=steer(V[:2], layers=1, rows=[0])), "rows"),
        (Request([999]), "999"), (Request([5], temperature=-1.0), "temperature"),
        (Request([5], max_new_tokens=0), "max_new_tokens is 0"),
        (Request([5], max_new_tokens=2.5), "max_new_tokens is 2.5"),
        (Request([5], stop=[""]), "stop is"), (Request([5], stop=[3]), "stop is"),
        (Request([5], stop=["x" * 300]), "300 bytes"), (Request([5], id=-1), "id is -1"),
        (Request([]), "token ids"), (Request({"role": "user"}), "the single message"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.submit(fault)
            pytest.fail(f"{words}: accepted")
    with pytest.raises(ValueError, match="give a jp.Request"):
        engine.submit("hello")
    assert engine.result(good).tokens.size
    # an error in a lane fails the requests in that lane only
    decode = programs.decode

    def broken(params, config, state, edits, read, how, *rest, **named):
        if read.readings:
            raise RuntimeError("no memory")
        return decode(params, config, state, edits, read, how, *rest, **named)

    monkeypatch.setattr("jaxpersona.engine.lanes.decode", broken)
    bad = engine.submit(Request([5, 6], max_new_tokens=4, capture=READ))
    fine = engine.submit(Request([5, 6], max_new_tokens=4))
    assert np.array_equal(engine.result(fine).tokens, engine.result(good).tokens)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.result(bad)
    with pytest.raises(RuntimeError, match="no memory"):
        list(engine.stream(bad))
    monkeypatch.undo()
    assert engine.result(engine.submit(bad.request)).captured["mean"].shape == (LAYERS, D)


@pytest.mark.parametrize("place", ["open_lane", "collect"])
def test_an_error_outside_the_programs_ends_its_requests_and_not_the_engine(model, place):
    """Test an error where a lane is opened, and one after rows are taken out of it."""
    engine = make(model)
    working = getattr(engine._scheduler, place)

    def broken(*_):
        raise RuntimeError("no memory")

    setattr(engine._scheduler, place, broken)
    bad = [engine.submit(Request([5, 6], max_new_tokens=n)) for n in (2, 3)]
    for handle in bad:
        with pytest.raises(RuntimeError, match="no memory"):
            engine.result(handle)
    setattr(engine._scheduler, place, working)
    assert engine.result(engine.submit(bad[0].request)).finish == "length"
    assert not engine.step() and not engine._handles


def test_the_queue_is_bounded(model):
    engine = make(model, queue=3)
    handles = [engine.submit(Request([5 + i], max_new_tokens=2)) for i in range(3)]
    with pytest.raises(QueueFull, match="the queue is full .limit: 3"):
        engine.submit(Request([9]))
    engine.step()
    engine.submit(Request([9], max_new_tokens=2))
    assert all(engine.result(handle).tokens.size <= 2 for handle in handles)


@pytest.mark.parametrize(("changes", "words"), [
    ({"rows": 0}, "rows is 0"), ({"chunk": 1.5}, "chunk is 1.5"), ({"sizes": (64, 0)}, "sizes"),
    ({"capacity": reserve(1, 7, [0])}, "width 7"), ({"capacity": reserve(1, D, [5])}, "layers"),
])
def test_settings_of_an_engine_are_checked(model, changes, words):
    with pytest.raises(ValueError, match=words):
        make(model, **changes)


def test_a_background_thread_serves_and_leaves(model):
    engine = make(model)
    with engine.running():
        with pytest.raises(ValueError, match="already runs in the background"):
            with engine.running():
                pass
        handles = [engine.submit(Request([5 + i], max_new_tokens=20, id=i, temperature=1.0))
                   for i in range(12)]
        events = list(engine.stream(handles[0]))
        replies = [engine.result(handle) for handle in handles]
    assert "".join(e.text for e in events) == replies[0].text
    alone = make(model)
    for handle, reply in zip(handles, replies, strict=True):
        assert same(reply, alone.result(alone.submit(handle.request)))
    late = engine.submit(Request([5], max_new_tokens=3))  # the background thread has ended
    assert engine.result(late).tokens.size <= 3


TEXTS = ["h\u00e9llo w\u00f6rld", "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8",
         "\U0001f469\u200d\U0001f469\u200d\U0001f467 family", "\U0001f1eb\U0001f1f7", "a b  c\n\nd",
         "na\u00efve caf\u00e9 \u2615", "\U0001d518\U0001d52b", "\u6df7\u305c\u308bmixed", "tail ",
         "\ttab\n"]


def forced(monkeypatch, replies):
    """Make row id i draw the bytes of replies[i]; prompts have one token."""
    length = max(map(len, replies)) + 2
    table = np.full((len(replies), length), 257, np.int32)
    for i, ids in enumerate(replies):
        table[i, : len(ids)] = ids
    chosen = jnp.asarray(table)
    monkeypatch.setattr(programs, "choose", lambda logits, how, row_id, position: chosen.at[
        row_id.astype(jnp.int32), position - 1].get(mode="clip"))


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_pieces_join_to_the_text_whatever_tokens_split(model, monkeypatch, count):
    """Test replies with emoji and CJK characters over several tokens, and with stop strings."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(TEXTS, 4)) for _ in range(count)]
    stops = [[texts[i][k : k + 1 + i % 3]] if i % 2 and (k := int(rng.integers(2, 8))) else []
             for i in range(count)]
    ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    forced(monkeypatch, ids)
    s.KEPT.clear()
    engine = make(model, capacity=None, sizes=(512,), rows=32, chunk=5, lanes=2)
    early, distinct = 0, sorted({tuple(stop) for stop in stops})[: min(6, count // 20)]
    for i, text in enumerate(texts):
        stop = list(stops[i] if tuple(stops[i]) in distinct else distinct[i % len(distinct)])
        handle = engine.submit(Request([5], temperature=1.0, id=i, max_new_tokens=400, stop=stop))
        events = list(engine.stream(handle))
        want = text
        for one in stop:
            want = want.split(one)[0]
        reply = events[-1].reply
        assert "".join(e.text for e in events) == want == reply.text
        assert np.array_equal(np.concatenate([e.tokens for e in events]), reply.tokens)
        assert reply.finish == "stop"
        end = len((want + stop[0]).encode()) if want != text else len(ids[i])
        assert reply.tokens.tolist() == ids[i][:end]
        assert not any("\ufffd" in e.text for e in events)
        early += any(event.text for event in events[:-1])
    assert early > count // 2  # text is streamed before the reply is complete
    s.KEPT.clear()


def test_projections_of_streamed_tokens_are_those_of_a_separate_pass(model):
    engine = make(model, chunk=3)
    read = capture.projections(V[:2], everywhere)
    for temperature in (0.0, 1.0):
        handle = engine.submit(Request([5, 6, 7], capture=read, max_new_tokens=30, id=3,
                                       interventions=EDITS[2], temperature=temperature))
        events = list(engine.stream(handle))
        reply = events[-1].reply
        assert len(events) > 5
        got = np.concatenate([e.projections["projections"] for e in events])
        tokens = np.concatenate([e.tokens for e in events])
        assert got.shape == (tokens.size, LAYERS, 2) and np.array_equal(tokens, reply.tokens)
        whole = jax.jit(forward)(model.params, model.config, batch([[5, 6, 7, *tokens]]),
                                 interventions=EDITS[2], capture=read)
        want = np.asarray(whole.captured["projections"].value)[0][:, 3:]
        assert s.relative(got.transpose(1, 0, 2), want).max() < 1e-5


@pytest.mark.slow
def test_resident_memory_stays_flat(model):
    engine = make(model)
    engine.warm_up(kinds())
    rng = np.random.default_rng(2)

    def some(count):
        for start in range(0, count, 50):
            handles = [engine.submit(draw(rng, start + i)) for i in range(50)]
            for handle in handles:
                engine.result(handle)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    some(500)
    before = some(50)
    after = some(5000)
    assert after < 1.02 * before, f"{before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"
