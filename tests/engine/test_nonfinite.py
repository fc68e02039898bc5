"""NaN and infinite activations are detected, reported once, and excluded from averages."""

from __future__ import annotations

import dataclasses
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.files import write_tensors

import jaxpersona as jp
from jaxpersona.captures import capture
from jaxpersona.engine import programs
from jaxpersona.engine.nonfinite import NonfiniteWarning, first_site
from jaxpersona.engine.sampling import finite
from jaxpersona.interventions import cap, chain, restore_norm, steer
from jaxpersona.interventions.where import everywhere, generated, system
from jaxpersona.models.batch import SYSTEM, USER
from jaxpersona.persona import axis as science
from jaxpersona.planning import hlo
from jaxpersona.text.chat import Row
from jaxpersona.vectors.vector import Vector

pytestmark = pytest.mark.usefixtures("compile_fast")

MODEL = s.tiny_model(stop_ids=(3, 7))
ROWS = s.prompts((5, 9, 4, 20, 6, 3, 12, 8), seed=2)
V = np.ones(32)


def go(rows=ROWS, model=MODEL, **changes):
    how = {"capture": capture.mean(everywhere), "max_new_tokens": 12, "batch_size": 8, **changes}
    return jp.generate(model, rows, **how)


def warned(act):
    """Return the result of a call and the only warning that it issues."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = act()
    assert [w.category for w in caught] == [NonfiniteWarning], [str(w.message) for w in caught]
    assert caught[0].filename == __file__
    said = str(caught[0].message)
    assert "\n" not in said
    return out, said


def with_weight(name, at, value=np.nan, layer=None):
    """Return the model with one value of one parameter replaced."""
    params = MODEL.params.replace(embed_vd=MODEL.params.embed_vd + 0)  # a new array
    owner = params if layer is None else params.layers[layer]
    owner = owner.replace(**{name: getattr(owner, name).at[at].set(value)})
    if layer is not None:
        owner = params.replace(layers=tuple(owner if i == layer else x
                                            for i, x in enumerate(params.layers)))
    return dataclasses.replace(MODEL, params=owner)


DAMAGED = {
    "attention": (with_weight("wo_dnh", (0, 0, 0), layer=1), "layer 1 (attention), token 0",
                  "layers[1].wo_dnh"),
    "mlp": (with_weight("w_down_df", (3, 1), np.inf, layer=2), "layer 2 (mlp), token 0",
            "layers[2].w_down_df"),
    "large": (with_weight("w_down_df", slice(None), 3e38, layer=1), "layer 1 (mlp), token 0",
              "overflow float32, probably because the weights of tiny are too large"),
    "norm": (with_weight("final_norm_d", 5), "after the last layer", "final_norm_d"),
    "head": (with_weight("head_vd", (60, 2)), "after the last layer", "head_vd"),
    "head_inf": (with_weight("head_vd", (slice(None), 2), np.inf), "after the last layer",
                 "head_vd"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_weights_are_named(kind):
    model, where, parameter = DAMAGED[kind]
    sampled = kind in ("mlp", "head")
    out, said = warned(lambda: go(model=model, temperature=1.0 if sampled else 0.0))
    assert out.finish == ["nonfinite"] * 8 and not out.stopped.any()
    assert not any(t.size for t in out.tokens)
    assert "8 of 8 replies" in said and where in said and parameter in said


@pytest.mark.parametrize("how", ({}, {"temperature": 1.0}, {"batch_size": 5}, {"refill": False}),
                         ids=str)
def test_an_overflow_ends_its_own_row_alone(how):
    index = np.array([-1, 0, -1, -1, 0, -1, -1, 0])
    edits = steer(V * 1e18, layers=[1], scale=[1e19], rows=index)
    out, said = warned(lambda: go(interventions=edits, **how))
    plain = go(interventions=steer(V, layers=[1], scale=[1.0], rows=np.full(8, -1)), **how)
    assert set(plain.finish) <= {"stop", "length"}
    assert [f == "stop" for f in plain.finish] == plain.stopped.tolist()
    assert "3 of 8 replies" in said and "layer 1 (residual), token 0, in conversation 1" in said
    assert "without the interventions the activations are finite" in said
    for i in range(8):
        if index[i] < 0:
            assert out.finish[i] == plain.finish[i]
            assert np.array_equal(out.tokens[i], plain.tokens[i])
            assert s.same_bits(out.captured["mean"][i], plain.captured["mean"][i])
        else:
            assert out.finish[i] == "nonfinite" and not out.tokens[i].size


@pytest.mark.parametrize("limit", (1, 12))
def test_an_overflow_within_a_reply_keeps_what_was_said_before(limit):
    plain = go(model=dataclasses.replace(MODEL, stop_ids=()), max_new_tokens=limit)
    edits = steer(V * 1e18, layers=[2], scale=1e19, where=generated)
    out, said = warned(lambda: go(interventions=edits, max_new_tokens=limit,
                                  model=dataclasses.replace(MODEL, stop_ids=())))
    assert out.finish == ["nonfinite"] * 8 and "layer 2 (residual), token 5" in said
    for i in range(8):  # the first token is chosen from finite logits, and the next step overflows
        assert out.tokens[i].tolist() == plain.tokens[i][:1].tolist()


def test_low_precision_that_overflows_says_which_dtype_fits():
    params = jax.tree.map(lambda x: x.astype(jnp.float16), MODEL.params)
    layer = params.layers[1].replace(w_up_fd=params.layers[1].w_up_fd * 3e4)
    half = dataclasses.replace(MODEL, params=params.replace(
        layers=(params.layers[0], layer, params.layers[2])))
    out, said = warned(lambda: go(model=half))
    assert "nonfinite" in out.finish and "layer 1 (mlp)" in said and "65504" in said
    assert "bfloat16" in said


def test_bfloat16_that_overflows_is_not_told_of_the_range_of_float16():
    """The range of bfloat16 is that of float32, so another dtype would not help."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DAMAGED["large"][0].params)
    model = dataclasses.replace(MODEL, params=params)
    out, said = warned(lambda: jp.extract(model, ROWS[:2], capture=capture.norms(layers=[2])))
    assert out.nonfinite.all() and "65504" not in said
    assert "overflow bfloat16, probably because the weights of tiny are too large" in said


@pytest.mark.parametrize("share", (False, True))
def test_an_overflow_that_no_logit_depends_on_is_found_too(share):
    """In the last layer, no later token attends to the prompt, so only readings are affected."""
    kind = np.array([SYSTEM] * 20 + [USER] * 4, np.int32)
    rows = [Row(np.array(s.prompts((24,), seed=i)[0], np.int32), kind, (kind == USER).astype(int),
                "") for i in range(2)]
    edits = steer(V * 1e18, layers=[2], scale=[1e19], where=system, rows=[0, -1])
    out, _ = warned(lambda: go(rows, interventions=edits, share_prefix=share))
    assert out.finish[0] == "nonfinite" and out.finish[1] != "nonfinite"


def test_raise_stops_at_once_and_a_debugging_flag_asks_for_it():
    edits = steer(V * 1e18, layers=[1], scale=1e19)
    seen = []
    how = dict(interventions=edits, progress=lambda *x: seen.append(x))
    with pytest.raises(ValueError, match=r"layer 1 \(residual\)"):
        go(ROWS * 4, on_nonfinite="raise", **how)
    assert not seen
    with jax.debug_nans(True), pytest.raises(ValueError, match=r"layer 1 \(residual\)"):
        go(**how)
    with pytest.raises(ValueError, match="on_nonfinite is 'stop'; it must be 'warn' or 'raise'"):
        go(on_nonfinite="stop")
    with pytest.raises(ValueError, match="on_nonfinite"):
        jp.extract(MODEL, ROWS, on_nonfinite=None)


def test_extract_marks_and_says_it():
    index = np.array([-1, 0, -1, -1, 0, -1, -1, 0])
    edits = steer(V * 1e18, layers=[1], scale=[1e19], rows=index)
    for read in (capture.mean(everywhere), capture.norms(everywhere, layers=[1]),
                 capture.histogram(V[None], [0.0], everywhere, layers=[2])):
        out, said = warned(lambda read=read: jp.extract(MODEL, ROWS, interventions=edits,
                                                        capture=read))
        assert (out.nonfinite == (index == 0)).all()
        assert [record["finite"] for record in out.records()] == (index < 0).tolist()
        assert "3 of 8 conversations" in said and "layer 1 (residual), token 0" in said
    with pytest.raises(ValueError, match="layer 1"):
        jp.extract(MODEL, ROWS, interventions=edits, capture=capture.mean(everywhere),
                   on_nonfinite="raise")
    assert not jp.extract(MODEL, ROWS, capture=capture.mean(everywhere)).nonfinite.any()


def test_the_head_and_a_restored_norm_show_an_overflow():
    batch = jp.batch(ROWS[:2])
    for edits in (steer(V * 1e18, layers=[2], scale=1e19),
                  chain(steer(V * 1e18, layers=[2], scale=1e19), restore_norm(layers=[2]))):
        out = s.run(MODEL.params, MODEL.config, batch, interventions=edits)
        assert np.isnan(out.logits[batch.valid]).all() and not np.asarray(out.finite).any()
    plain = s.run(MODEL.params, MODEL.config, batch)
    assert np.isfinite(plain.logits).all() and np.asarray(plain.finite).all()


def test_a_soft_cap_does_not_hide_infinite_logits():
    model = s.tiny_model(final_softcap=30.0)
    norm = model.params.final_norm_d.at[0].set(np.inf)
    broken = dataclasses.replace(model, params=model.params.replace(final_norm_d=norm))
    batch = jp.batch(ROWS[:2])
    assert np.isnan(s.run(broken.params, broken.config, batch).logits[batch.valid]).all()
    assert np.isfinite(s.run(model.params, model.config, batch).logits).all()


def test_finite_logits():
    rows = np.zeros((6, 97), np.float32)
    rows[1, 5], rows[2, 5], rows[3], rows[4, 5] = np.nan, np.inf, -np.inf, -np.inf
    token = programs.most_likely(jnp.asarray(rows))
    for known in (None, token):
        assert finite(jnp.asarray(rows), known).tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("greedy", (True, False))
def test_the_guard_adds_one_kernel_a_step(greedy, monkeypatch):
    def fusions():
        size = 512 if greedy else 16_384  # from this size on, a CPU computes the argmax in blocks
        model = s.tiny_model(vocab_size=size)
        rows = jax.tree.map(jnp.asarray, jp.batch(s.prompts((5, 5), vocabulary=size)))
        how = programs.Sampling(*(jnp.zeros(2, kind) for kind in
                                (jnp.float32, jnp.float32, jnp.int32, jnp.uint32)))
        stops = programs.Stops(jnp.full((4,), -1, jnp.int32), jnp.full((2,), -1, jnp.int32))
        args = cap(V, layers=[1], floor=0.5), capture.mean(), how, stops

        def both(params):
            state = inspect.unwrap(programs.prefill)(
                params, model.config, rows, *args, jnp.full((2,), 8, jnp.int32), slots=64,
                max_new=8, greedy=greedy)
            return inspect.unwrap(programs.decode)(params, model.config, state, *args, jnp.int32(8),
                                                 greedy=greedy)

        text = jax.jit(both).lower(model.params).compile().as_text()
        return hlo.fusions(hlo.operations(text))

    guarded = fusions()
    monkeypatch.setattr(programs, "finite", lambda logits, token: jnp.ones(2, bool))
    assert guarded - fusions() <= 1


@pytest.mark.parametrize(("argument", "options"), [
    ("dtype", {"dtype": "float16"}), ("activations", {"dtype": "int8", "activations": "float16"})])
def test_float16_is_refused_for_families_that_exceed_it(argument, options):
    with pytest.raises(ValueError, match=rf"^{argument} is 'float16', .*gemma2.*65504.*'bfloat16'"):
        jp.load("random:gemma-2-2b", **options)


def test_float16_is_refused_for_gemma_3(tmp_path):
    torch = pytest.importorskip("torch")
    import hf

    model, folder = hf.model("gemma3"), tmp_path / "model"
    model.to(torch.float16).save_pretrained(folder)
    with pytest.raises(ValueError, match="^dtype is 'float16', .*gemma3.*65504.*'bfloat16'"):
        jp.load(folder, dtype="float16")
    assert jp.load(folder, dtype="bfloat16").params.like.dtype == jnp.bfloat16


def test_means_that_are_not_finite_are_no_empty_replies():
    means = np.ones((4, 2, 3), np.float32)
    means[1] = np.nan  # an empty reply
    assert science.role_vectors(means, [3] * 4)["pos_3"][1] == 3
    for value in (np.nan, np.inf):
        bad = means.copy()
        bad[2, 1, 1] = value
        with pytest.raises(ValueError, match="mean of rollout 2 has non-finite values"):
            science.role_vectors(bad, [3] * 4)


@pytest.fixture(scope="module")
def damaged(checkpoint, tmp_path_factory):
    """Return a checkpoint with one NaN."""
    import shutil

    from safetensors.numpy import load_file

    folder = tmp_path_factory.mktemp("damaged") / "model"
    shutil.copytree(checkpoint, folder)
    path, = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if "layers.1." in n and "down_proj" in n)
    tensors[name][0, 0] = np.nan
    write_tensors(path, tensors, {"format": "pt"})
    return folder


def test_a_run_stops_and_keeps_nothing_of_it(damaged, tmp_path, capsys):
    from jaxpersona.data.texts import Question, Role

    roles = [Role(name, (f"Be a {name}.",), "") for name in ("ghost", "pirate")]
    texts = s.write_texts(tmp_path, [Role("default", ("",), ""), *roles], [Question(0, "Sea?")])
    assert s.run_command(s.axis_command(damaged, texts, tmp_path / "out")) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1
    assert "layer 1 (mlp)" in said[-1] and "w_down_df" in said[-1]
    assert "Traceback" not in "".join(said)
    for part in ("rollouts", "samples", "sums", "live"):
        assert not [p for p in (tmp_path / "out" / part).rglob("*") if p.is_file()]
        assert (tmp_path / "out" / part).is_dir()  # so that another name is noticed


def test_commands_and_talks_say_it_in_one_line(damaged, capsys):
    assert s.run_command(["generate", "hello", "--model", str(damaged)]) == 2
    assert "layer 1 (mlp)" in capsys.readouterr().err
    model = jp.load(str(damaged))
    vector = Vector(np.ones((model.config.n_layers, model.config.d_model)))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "oh"}]
    from jaxpersona.persona.talk import grow, project_conversation

    with pytest.raises(ValueError, match=r"layer 1 \(mlp\)"):
        project_conversation(model, talk, [vector])
    with pytest.raises(ValueError, match=r"layer 1 \(mlp\)"):
        grow(model, [[]], [["hi"]], vector, max_new_tokens=4, batch_size=1)


def test_the_first_token_that_is_not_finite_is_named():
    row = Row(np.array([5, 6, 7, 8, 9], np.int32), np.full(5, USER, np.int32),
              np.array([0, 0, 1, 1, 1], np.int32), "")
    edits = steer(V * 1e18, layers=[1], scale=1e19, where=everywhere.within(1))
    assert first_site(MODEL, row, edits) == (1, "residual", 2)


@pytest.mark.parametrize("flag", [jax.debug_nans, jax.debug_infs])
def test_each_debugging_flag_asks_for_an_error(flag):
    edits = steer(V * 1e18, layers=[1], scale=1e19)
    with flag(True), pytest.raises(ValueError, match=r"layer 1 \(residual\)"):
        go(ROWS[:2], interventions=edits, capture=None, max_new_tokens=4, batch_size=2)
    with flag(True), pytest.raises(ValueError, match=r"layer 1 \(residual\)"):
        jp.extract(MODEL, ROWS[:2], interventions=edits, capture=capture.mean(everywhere))
