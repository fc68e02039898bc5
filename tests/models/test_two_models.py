"""Two loaded models of equal shapes, used in turn: each gives what it gives alone."""

from __future__ import annotations

import gc
import weakref

import jax
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import hf

import jaxpersona as jp
from jaxpersona.engine.compiled import KEPT
from jaxpersona.models.prepared import fast_params

CONFIG = s.tiny_config(vocab_size=258)
ROWS = 9  # enough for a transposed copy of the weights on a CPU (`fast_params`)
PROMPTS = s.prompts(range(4, 4 + ROWS), vocabulary=250)
VECTOR = np.random.default_rng(2).normal(size=CONFIG.d_model)
TALK = [{"role": "user", "content": "Hi"}]

pytestmark = pytest.mark.usefixtures("compile_fast")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders whose weights, templates and stop tokens differ."""
    root = tmp_path_factory.mktemp("two")
    for seed, name in enumerate(("one", "two")):
        hf.save(root / name, s.random_params(CONFIG, seed), CONFIG)
        tokenizer = s.byte_tokenizer()
        if name == "two":
            tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}>"
        tokenizer.save_pretrained(root / name)
        (root / name / "generation_config.json").write_text(f'{{"eos_token_id": {100 + seed}}}')
    return [root / "one", root / "two"]


def replies(model):
    return jp.generate(model, PROMPTS, max_new_tokens=7, batch_size=ROWS).tokens


def edited(model):
    out = jp.generate(model, PROMPTS, max_new_tokens=5, batch_size=ROWS,
                      interventions=jp.steer(VECTOR, scale=3.0, layers=[1]),
                      capture=jp.capture.mean(jp.everywhere))
    return out.tokens, out.captured["mean"]


def drawn(model):
    return jp.generate(model, PROMPTS, max_new_tokens=6, temperature=1.0, seed=3,
                       batch_size=2).tokens


def means(model):
    return jp.extract(model, PROMPTS, capture=jp.capture.mean(jp.everywhere)).captured["mean"]


def scores(model):
    return jp.logprobs(model, PROMPTS).logprobs


def served(model):
    engine = jp.Engine(model, rows=2)
    return engine.result(engine.submit(jp.Request(TALK, max_new_tokens=5))).tokens


def texts(model):
    """Return what depends on the folder, without the weights."""
    row = jp.encode(model.tokenizer, [TALK])
    words = "".join((model.name, model.fingerprint, *map(str, model.stop_ids)))
    return row.tokens, np.frombuffer(words.encode(), np.uint8)


CALLS = (replies, edited, drawn, means, scores, served, texts)


def alone(folder):
    """Return the results of all calls with a single loaded model and no programs of another."""
    KEPT.clear()
    model = jp.load(folder)
    return [call(model) for call in CALLS]


def same(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.slow
def test_calls_in_turn_give_what_each_model_gives_alone(folders):
    """The models begin with the programs that were compiled for the first one."""
    wanted = [alone(folder) for folder in folders[::-1]][::-1]
    models = [jp.load(folder) for folder in folders]
    assert models[0].config == models[1].config
    for number, call in enumerate(CALLS):
        assert not same(wanted[0][number], wanted[1][number]), call.__name__
        for turn in (0, 1, 0):
            assert same(call(models[turn]), wanted[turn][number]), (call.__name__, turn)
    assert [model.name for model in models] == [str(folder) for folder in folders]
    assert [model.stop_ids[0] for model in models] == [100, 101]


def test_equal_shapes_share_programs_but_no_prepared_weights(folders):
    KEPT.clear()
    one, two = (jp.load(folder) for folder in folders)
    first = replies(one)
    programs = sum(made._cache_size() for made in KEPT._held.values())
    kept = replies(two)
    assert not same(kept, first)
    assert sum(made._cache_size() for made in KEPT._held.values()) == programs
    copies = [jax.tree.leaves(fast_params(model, ROWS)) for model in (one, two)]
    assert any(not any(x is y for y in jax.tree.leaves(one.params)) for x in copies[0])
    assert not {id(x) for x in copies[0]} & {id(x) for x in copies[1]}
    of_one = [weakref.ref(x) for x in (*copies[0], *jax.tree.leaves(one.params))]
    del one, copies
    gc.collect()
    assert all(ref() is None for ref in of_one)  # nothing of the first model stays in memory
    assert same(replies(two), kept)
