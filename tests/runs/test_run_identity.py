"""The manifest, the file names of roles, and the axis for given scores."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_axis

from jaxpersona.data.texts import Question, Role
from jaxpersona.judges.judges import SelfJudge
from jaxpersona.judges.protocol import Item
from jaxpersona.models.prepared import in_int8
from jaxpersona.persona import axis as science
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.manifest import numerics, tokens_digest
from jaxpersona.runs.names import file_stem
from jaxpersona.runs.rollouts import Settings, draw_id, planned, rollout_key
from jaxpersona.runs.run import Run
from jaxpersona.text.chat import Row

QUESTIONS = [Question(0, "Why?"), Question(1, "How?")]
SETTINGS = Settings(temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8)
MODEL = dataclasses.replace(s.tiny_model(vocab_size=258, stop_ids=(257,)),
                            tokenizer=s.byte_tokenizer())


def cast(*names):
    return [Role("default", ("", "You are an AI."), "")] + [
        Role(name, ("You are one.", "Act as one."), "{question} {answer}") for name in names]


PLACE = {"pos_p0_q0": 0, "pos_p1_q0": 1, "pos_p0_q1": 2, "pos_p1_q1": 3}


def Judge(scores, name="listed"):  # noqa: N802
    """Return a judge with given scores for each role, in the order of its rollouts."""
    return s.Scored(lambda role, key: scores.get(role, [3] * 4)[PLACE[key]], name)


def find(folder, roles, judge=None, **options):
    return extract_axis(MODEL, roles, QUESTIONS, folder, judge=judge or Judge({}),
                        settings=SETTINGS, **{"min_count": 1, **options})


NAMES = ["../../x", "/etc/passwd", "a/b", "a\\b", "..", ".", ".hidden", "a:b", "über Ärzte", "幽霊",
         "a\nb", "a\0b", "100%", "%2E", " ", "x" * 200, "gpt-4.5_mini"]


def test_any_name_stays_within_its_folder_and_is_its_own(tmp_path):
    """Names that are paths or invalid file names are encoded, and the run can be resumed."""
    roles, out = cast(*NAMES), tmp_path / "deep" / "run"
    found = find(out, roles)
    stems = [file_stem(role.name) for role in roles]
    assert len(set(stems)) == len(roles) and not set("/\\:\0\n ") & set("".join(stems))
    assert file_stem("gpt-4.5_mini") == "gpt-4.5_mini" and file_stem("..") == "%2E."
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(out)]
    assert not outside and len(list((out / "rollouts").iterdir())) == len(roles)
    assert set(found.projections) == {role.name for role in roles}
    before = {p: p.stat().st_mtime_ns for p in out.glob("rollouts/*")}
    again = find(out, roles)
    assert again.tokens == 0 and before == {p: p.stat().st_mtime_ns for p in before}


@pytest.mark.parametrize(("names", "wanted"), [
    (["x" * 201], "takes 201 bytes as a file name; the limit is 200"),
    (["é" * 40], "takes 240 bytes"), ([""], "must be a non-empty string"),
    ([None], "must be a non-empty string"),
    (["\ud800"], "a lone surrogate"), (["a", "b", "a"], "two roles are named 'a'"),
    (["Ghost", "ghost"], "differ only in upper and lower case")])
def test_a_name_that_no_file_can_have_is_refused_before_anything(tmp_path, names, wanted):
    with pytest.raises(ValueError, match=wanted):
        find(tmp_path / "run", [*cast("one", "two")] + cast(*names)[1:])
    assert not list(tmp_path.iterdir())


def test_question_ids_and_counts_of_scores_are_checked(tmp_path):
    twice = [Question(0, "Why?"), Question(0, "How?")]
    with pytest.raises(ValueError, match="question id 0 is given more than once"):
        extract_axis(MODEL, cast("a", "b"), twice, tmp_path / "run", judge=Judge({}))
    assert not list(tmp_path.iterdir())
    for scores, wanted in (([3, True, 3, 3], "gave 'pos_p1_q0' the score True"),
                           ([3, 2.0, 3, 3], "gave 'pos_p1_q0' the score 2.0"),
                           ([3, 4, 3, 3], "gave 'pos_p1_q0' the score 4; it must be None or an")):
        with pytest.raises(ValueError, match=wanted):
            find(tmp_path / "run", cast("a", "b"), Judge({"a": scores}))

    class Few(s.Scored):
        def score(self, items):
            """Leave out the first item."""
            return super().score(items[1:])

    class Twice(s.Scored):
        def score(self, items):
            """Give the first item's verdict twice."""
            yield from [*super().score(items[:1]), *super().score(items)]

    with pytest.raises(ValueError, match="gave no verdict on 1 of 4 replies of role 'a'"):
        find(tmp_path / "few", cast("a", "b"), Few())
    with pytest.raises(ValueError, match="a verdict on 'pos_p0_q0', which is unknown or"):
        find(tmp_path / "few", cast("a", "b"), Twice())
    with pytest.raises(ValueError, match="judge is <function"):
        find(tmp_path / "few", cast("a", "b"), find)
    assert not find(tmp_path / "few", cast("a", "b")).tokens  # every rollout was kept


def test_what_changes_bits_is_recorded_and_compared(tmp_path, monkeypatch):
    """A change of device, mesh, JAX flags, environment, tokenizer or int8 raises an error."""
    out, roles = tmp_path / "run", cast("a", "b")
    find(out, roles)
    kept = json.loads((out / "run.json").read_text())
    assert kept["numerics"]["platform"] == "cpu" and kept["numerics"]["prng"] == "threefry2x32"
    assert kept["numerics"]["devices"] == 1 and kept["numerics"]["processes"] == 1
    assert kept["numerics"]["jax"]["jax_enable_x64"] is False
    flags = kept["numerics"]["environment"]["XLA_FLAGS"]
    assert "--xla_force_host_platform_device_count=8" in flags

    def refused(wanted, *, model=MODEL):
        with pytest.raises(ValueError, match=wanted):
            extract_axis(model, roles, QUESTIONS, out, judge=Judge({}), settings=SETTINGS,
                         min_count=1)

    with jax.default_matmul_precision("bfloat16"):
        refused("numerics.jax.jax_default_matmul_precision was null, now \"bfloat16\"")
    with monkeypatch.context() as patch:
        flags = os.environ["XLA_FLAGS"]
        patch.setenv("XLA_FLAGS", flags + " --xla_cpu_enable_fast_math=true")
        refused("numerics.environment.XLA_FLAGS")
        patch.setenv("XLA_FLAGS", flags + " --xla_dump_to=/x")
        find(out, roles)  # flags for dumps do not change results
    other = s.byte_tokenizer()
    other.chat_template = other.chat_template.replace("assistant\n", "assistant: ")
    refused("roles.a was .*; roles.b was", model=dataclasses.replace(MODEL, tokenizer=other))
    refused('model.weights was absent, now "int8 per channel"', model=dataclasses.replace(
        MODEL, params=in_int8(MODEL.params)))
    refused("model.stop_ids", model=dataclasses.replace(MODEL, stop_ids=(257, 9)))


def test_every_rollout_has_its_own_draws():
    """They depend on the model, the role, the prompt, the question and the sample."""
    settings = dataclasses.replace(SETTINGS, samples=3)

    def draws(model, roles, questions, settings):
        return {(role.name, rollout_key(record)): draw_id(model, role.name, record)
                for role in roles for record in planned(role, questions, settings)}

    all_ids = draws(MODEL, cast("a", "b"), QUESTIONS, settings)
    assert len(all_ids) == len(set(all_ids.values())) == 3 * 2 * 2 * 3
    other = dataclasses.replace(MODEL, fingerprint="0" * 16)
    assert not set(all_ids.values()) & set(draws(other, cast("a"), QUESTIONS, settings).values())
    # other roles, questions and numbers of samples do not change the draws of a rollout
    fewer = draws(MODEL, cast("b"), QUESTIONS[1:], SETTINGS)
    assert len(fewer) == 2 * 2 and fewer.items() <= all_ids.items()


def test_a_mesh_is_recorded(checkpoint):
    import jaxpersona as jp

    mesh = jp.make_mesh(data=2, model=2, devices=jax.devices()[:4])
    spread = numerics(jp.load(str(checkpoint), mesh=mesh))
    assert spread["devices"] == 4 and {"data": 2, "model": 2}.items() <= spread["mesh"].items()


def test_the_digest_of_tokens_includes_their_kinds():
    def row(tokens, kind):
        return Row(np.array(tokens, np.int32), np.array(kind, np.int32), np.zeros(2, np.int32), "")

    known = tokens_digest([row([1, 2], [4, 16])])
    assert known == tokens_digest([row([1, 2], [4, 16])])
    assert known != tokens_digest([row([1, 2], [4, 4])])
    assert known != tokens_digest([row([1, 3], [4, 16])])


def test_a_role_at_min_count_is_in_the_axis_and_below_it_is_not(tmp_path):
    scores = {"a": [3, 3, 0, 0], "b": [3, 3, 3, 2], "c": [3, 2, 2, None]}
    found = find(tmp_path / "run", cast("a", "b", "c"), Judge(scores), min_count=2)
    assert found.analysis.names == ["a", "b"] and set(found.role_means) == {"a", "b"}
    assert found.counts["c"] == {"0": 0, "1": 0, "2": 2, "3": 1, "None": 1}


def test_both_populations_have_their_own_values(tmp_path):
    """Population "default": the default's rollouts; "all": every role that is not held out."""
    out, roles = tmp_path / "run", cast("a", "b", "c")
    found = find(out, roles, held_out=["c"])
    run = Run.read(out)
    unit = found.axis.values / np.linalg.norm(found.axis.values, axis=1, keepdims=True)

    def places(*names):
        means = np.concatenate([run.sample(name).means for name in names]).astype(np.float64)
        return np.einsum("nld,ld->nl", means, unit)[np.isfinite(means).all((1, 2))]

    kept = load_axis(out / "axis.safetensors")
    for of, names in (("default", ["default"]), ("all", ["default", "a", "b"])):
        for q in (5, 25, 90):
            np.testing.assert_allclose(kept.thresholds(f"p{q}", of=of),
                                       np.percentile(places(*names), q, axis=0), rtol=1e-4)
    with_c = np.percentile(places("default", "a", "b", "c"), 90, axis=0)
    assert np.abs(kept.thresholds("p90", of="all") - with_c).max() > 1e-3


def test_coordinates_are_centred():
    """Coordinates are those of the role vectors minus their mean."""
    vectors = np.random.default_rng(0).normal(3.0, 1.0, (6, 5))
    found = science.principal_components(vectors, np.ones(5))
    np.testing.assert_allclose(found.coordinates.mean(0), 0, atol=1e-12)
    expected = (vectors - vectors.mean(0)) @ found.directions.T
    np.testing.assert_allclose(found.coordinates, expected, atol=1e-12)
    assert np.var(found.coordinates[:, 0]) == pytest.approx(
        found.ratio[0] * np.var(vectors, axis=0).sum())


GHOST = Role("ghost", ("You are a ghost.",), "Q: {question} A: {answer} Rate it 0 to 3.")
ITEMS = [Item(f"k{i}", GHOST, f"Why {i}?", f"Reply {i}.") for i in range(4)]


def test_the_self_judge_asks_for_the_reply_and_reads_the_verdicts(monkeypatch):
    # the module, not the function of the same name
    module = sys.modules["jaxpersona.engine.generate"]
    asked = []

    def said(model, conversations, **options):
        asked.extend(conversations)
        assert options == {"max_new_tokens": 10, "batch_size": 2, "on_nonfinite": "raise"}
        return module.Generated(["3", "Score: 1", "4", "I cannot say"], [], np.zeros(4), [], {}, (),
                                ["length"] * 4)

    monkeypatch.setattr(module, "generate", said)
    found = list(SelfJudge(MODEL, batch_size=2).score(ITEMS))
    assert [verdict.score for verdict in found] == [3, 1, None, None]
    assert asked == [f"Q: Why {i}? A: Reply {i}. Rate it 0 to 3." for i in range(4)]


def test_the_self_judge_judges_with_the_model_itself():
    """The self judge runs on a real model."""
    scores = [verdict.score for verdict in SelfJudge(MODEL, batch_size=4).score(ITEMS)]
    assert len(scores) == 4 and set(scores) <= {0, 1, 2, 3, None}
    with pytest.raises(ValueError, match="has no eval_prompt"):
        list(SelfJudge(MODEL).score([Item("a", Role("bare", ("x",), ""), "Why?", "So.")]))


def test_a_killed_command_resumes_to_the_same_bytes(tmp_path):
    """A process killed with SIGKILL during rollouts leaves a folder that can be resumed."""
    code = (
        "import os, signal, sys\n"
        "import test_run_identity as t\n"
        "from jaxpersona.runs.run import Run\n"
        "save = Run.save_rollouts\n"
        "def killed(self, role, *rest):\n"
        "    save(self, role, *rest)\n"
        "    if role == 'a':\n"
        "        (self.folder / 'rollouts' / f'.b.jsonl.{os.getpid()}.tmp').write_text('{')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Run.save_rollouts = killed\n"
        "t.find(sys.argv[1], t.cast('a', 'b'))\n")
    folders = map(os.path.dirname, (__file__, s.__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "part")], env=env,
                          capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "part" / ".lock").exists()
    assert (tmp_path / "part" / "rollouts" / "a.jsonl").exists()
    for name in ("part", "whole"):
        find(tmp_path / name, cast("a", "b"))
    part, whole = ({str(p.relative_to(tmp_path / name)): p.read_bytes()
                    for p in (tmp_path / name).rglob("*")
                    if p.is_file() and p.name != "status.json"}
                   for name in ("part", "whole"))
    assert part == whole
