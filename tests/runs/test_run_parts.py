"""Small parts of a run folder: samples, rollouts, digests, messages and deleted files."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
from types import SimpleNamespace

import pytest
import support as s

from jaxpersona.data.texts import Question, Role
from jaxpersona.errors import UserError
from jaxpersona.interventions.where import response
from jaxpersona.runs import manifest as module
from jaxpersona.runs.compare import check_same, judges_of, manifest_of, roles_of, sealed
from jaxpersona.runs.damage import Damaged
from jaxpersona.runs.files import FIGURES, alive, delete, delete_run, path_of
from jaxpersona.runs.imported import check_origin, continued
from jaxpersona.runs.rollouts import (
    Settings,
    generation,
    is_rollout,
    keys_of,
    opening,
    place_of,
    planned,
    rollout_key,
)
from jaxpersona.runs.run import Run
from jaxpersona.runs.sample import check_keep, chosen

RECORD = {"label": "pos", "prompt_index": 0, "question_index": 0, "sample": 0, "system_prompt": "",
          "question": "Why?", "reply_ids": [2**31 - 1],
          "conversation": [{"role": "assistant", "content": "So."}]}


@pytest.mark.parametrize(("change", "wanted"), [
    ({}, True), ({"label": "default"}, True), ({"label": "neg"}, False), ({"sample": 2}, True),
    ({"sample": -1}, False), ({"sample": 1.0}, False), ({"prompt_index": 2**63 - 1}, True),
    ({"prompt_index": 2**63}, False), ({"question_index": None}, False),
    ({"reply_ids": [2**31]}, False), ({"reply_ids": [True]}, False), ({"reply_ids": None}, False),
    ({"reply_ids": []}, True), ({"system_prompt": None}, False), ({"question": 5}, False),
    ({"conversation": []}, False), ({"conversation": None}, False),
    ({"conversation": [{"role": "user", "content": "Hi."}]}, False),
    ({"conversation": [{"role": "assistant", "content": "a", "name": "b"}]}, False),
    ({"conversation": [{"role": "assistant", "content": None}]}, False),
    ({"conversation": [5, {"role": "assistant", "content": "a"}]}, False)], ids=str)
def test_a_stored_rollout_has_texts_indices_and_a_reply(change, wanted):
    """Limits: indices below 2**63 and token ids below 2**31."""
    assert is_rollout({**RECORD, **change}) == wanted
    assert not is_rollout([RECORD])


def test_a_rollout_without_a_sample_and_without_ids_is_the_first_one():
    """Both fields may be missing, as in files of other programs."""
    bare = {key: value for key, value in RECORD.items() if key not in ("sample", "reply_ids")}
    assert is_rollout(bare) and rollout_key(bare) == "pos_p0_q0" and place_of(bare) == (0, 0, 0)
    assert place_of({"question_index": 3, "prompt_index": 1, "sample": 2}) == (3, 1, 2)


def test_rollouts_are_planned_by_question_prompt_and_sample():
    """Questions are sorted by id; an empty system prompt is no message."""
    role = Role("ghost", ("", "Be."), "")
    asked = [Question(7, "Who?"), Question(2, "Why?")]
    found = list(planned(role, asked, Settings(samples=2)))
    assert [(r["question_index"], r["prompt_index"], r["sample"]) for r in found] == [
        (q, p, n) for q in (2, 7) for p in (0, 1) for n in (0, 1)]
    assert found[0] == {"system_prompt": "", "prompt_index": 0, "question_index": 2,
                        "question": "Why?", "label": "pos", "sample": 0,
                        "conversation": [{"role": "user", "content": "Why?"}]}
    assert found[7]["conversation"] == opening("Be.", "Who?") == [
        {"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}]
    assert keys_of(role, asked, Settings(samples=2))[:4] == [
        "pos_p0_q2", "pos_p0_q2_s1", "pos_p1_q2", "pos_p1_q2_s1"]
    (first, *_) = planned(Role("default", ("",), ""), asked, Settings())
    assert first["label"] == "default"


def test_the_settings_are_those_of_the_paper():
    """Lu et al. 2026 sample one reply of up to 512 tokens at temperature 0.7 and top-p 0.9."""
    assert dataclasses.asdict(Settings()) == {
        "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 512, "samples": 1, "batch_size": 32,
        "seed": 0, "share_prefix": False}
    capture = generation(Settings())["capture"]
    assert "mean" in repr(capture) and repr(response) in repr(capture)
    with pytest.raises(UserError, match="max_new_tokens is 0; it must be positive"):
        Settings(max_new_tokens=0)


def test_a_stratum_with_few_rollouts_gives_all_and_the_others_give_the_rest():
    """Prompts 0, 1 and 2 have one, two and six rollouts; seven are chosen."""
    prompts = {"a": 0, "b": 1, "c": 1, **{f"d{i}": 2 for i in range(6)}}
    for seed in range(5):
        kept = chosen(prompts, 7, seed=seed, role="ghost")
        assert len(kept) == 7 and {"a", "b", "c"} < set(kept)
        assert len(chosen(prompts, 2, seed=seed, role="ghost")) == 2
    assert chosen(prompts, 9, seed=0, role="ghost") == list(prompts)


@pytest.mark.parametrize(("keep", "wanted"), [
    (None, True), (2, True), (1, False), (0, False), (True, False), ("3", False), (2.0, False)])
def test_at_least_two_means_are_kept(keep, wanted):
    """None keeps all of them."""
    if wanted:
        check_keep(keep)
    else:
        with pytest.raises(UserError, match=f"keep_means is {keep!r}; give an integer of at least"):
            check_keep(keep)


MODEL = s.tiny_model(vocab_size=258, stop_ids=(257, 65))


def made(roles=None, questions=None, tokens=None, **more):
    return module.manifest(
        MODEL, roles or [Role("default", ("",), "")], questions or [Question(4, "Why?")], "rules",
        Settings(seed=3), {"role default": "t", "question 4": "q", **(tokens or {})}, **more)


def test_the_manifest_has_the_model_the_settings_and_the_packages():
    """The field last has the arguments that are not compared."""
    found = made(min_count=2)
    assert found["model"] == {
        "fingerprint": MODEL.fingerprint, "fingerprint_scheme": module.SCHEME, "dtype": "float32",
        "layers": 3, "width": 32, "stop_ids": [65, 257]}
    assert found["arguments"] == dataclasses.asdict(Settings(seed=3))
    assert (list(found["roles"]), list(found["questions"])) == (["default"], ["4"])
    assert found["judges"] == {"rules": {}}
    last = found["last"]
    assert (last["model"], last["judge"], last["min_count"]) == ("tiny", "rules", 2)
    assert set(last["versions"]) == {"jax", "jaxlib", "jaxpersona", "numpy", "transformers",
                                     "tokenizers"}


@pytest.mark.parametrize(("part", "change"), [
    ("roles", {"roles": [Role("default", ("x",), "")]}),
    ("roles", {"tokens": {"role default": "u"}}),
    ("questions", {"questions": [Question(4, "Who?")]}),
    ("questions", {"tokens": {"question 4": "r"}})])
def test_a_digest_of_the_manifest_depends_on_the_text_and_on_its_tokens(part, change):
    """The other part of the manifest stays the same."""
    one, two = made(), made(**change)
    assert one[part] != two[part]
    other = "questions" if part == "roles" else "roles"
    assert one[other] == two[other] and one["model"] == two["model"]


def test_the_variables_and_the_device_that_can_change_rounding(monkeypatch):
    """Flags of dumps are left out; a CPU is named by its architecture and instructions."""
    for name, value in (("XLA_FLAGS", "--a=1 --xla_dump_to=/x --b=2"),
                        ("LIBTPU_INIT_ARGS", "--c"), ("NVIDIA_TF32_OVERRIDE", "1")):
        monkeypatch.setenv(name, value)
    found = module.numerics(MODEL)
    assert found["environment"] == {"XLA_FLAGS": ["--a=1", "--b=2"], "LIBTPU_INIT_ARGS": ["--c"],
                                    "NVIDIA_TF32_OVERRIDE": ["1"]}
    assert found["mesh"] == {} and set(found["jax"]) == {
        "jax_enable_x64", "jax_default_matmul_precision", "jax_disable_most_optimizations",
        "jax_disable_jit"}
    info = "processor: 0\nflags\t\t: fpu sse2 avx2 fma ht\n\nflags\t: avx512f\n"
    monkeypatch.setattr(module.os.path, "exists", lambda path: True)
    monkeypatch.setattr(module, "open", lambda *a, **k: io.StringIO(info), raising=False)
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu")
    assert module._kind(cpu) == f"{platform.machine()} avx2 fma sse2"  # of the first core
    monkeypatch.setattr(module.os.path, "exists", lambda path: False)
    assert module._kind(cpu) == platform.machine()
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    assert module._kind(gpu) == "NVIDIA H100"
    for value, wanted in ((None, None), (True, True), (3, 3), ("x", "x"), (1.5, "1.5")):
        monkeypatch.setattr(module, "setting", lambda name, value=value: value)
        assert module._flag("any") == wanted


BOUND = {"model": {"a": 1}, "arguments": {"b": 1}, "numerics": {"c": 1}, "roles": {
    "ghost": "x", "sage": "x"}, "questions": {"0": "q"}, "judges": {}, "last": {"judge": "j"}}


def test_the_binding_of_a_role_depends_on_what_determines_its_rollouts(tmp_path):
    """Questions, judges and the last call may change."""
    def of(role="ghost", **change):
        return Run(tmp_path, {**BOUND, **change}).binding(role)

    assert of() == of(questions={}, judges={"x": {}}, last={})
    others = [of("sage"), of(model={"a": 2}), of(arguments={"b": 2}), of(numerics={"c": 2}),
              of(roles={"ghost": "y"})]
    assert len({of(), *others}) == 6


def test_the_digest_of_a_manifest_is_left_out_and_damage_is_named(tmp_path):
    """`overwrite` accepts an older format and a wrong digest."""
    path = tmp_path / "run.json"
    plain = {"format": "jaxpersona-run 3", "roles": {}}
    path.write_text(json.dumps(sealed(plain)))
    assert manifest_of(tmp_path) == plain
    for value, wanted in (({**sealed(plain), "roles": {"a": 1}}, "damaged .differs from"),
                          ({**plain, "format": "jaxpersona-run 2"}, "copy the rollouts into it")):
        path.write_text(json.dumps(value))
        with pytest.raises(UserError, match=wanted):
            manifest_of(tmp_path)
        assert "digest" not in manifest_of(tmp_path, overwrite=True)
    for value in ([], {"judges": 5}, {"judges": {"": {}}}, {"judges": ["a"]}):
        if isinstance(value, dict):
            with pytest.raises(UserError, match="judges is not an object with non-empty names"):
                judges_of(tmp_path, value)
    assert judges_of(tmp_path, {"judges": {"b": {}, "a": {}}}) == ["b", "a"]
    assert judges_of(tmp_path, {}) == [] == roles_of(tmp_path, {})
    with pytest.raises(UserError, match="roles is not an object"):
        roles_of(tmp_path, {"roles": ["a"]})


def test_only_entries_of_both_manifests_are_compared(tmp_path):
    """New roles may be added, an old one may not change, and all differences are listed."""
    old = {"model": {"a": 1}, "roles": {"x": "1", "y": "2"}, "questions": {}, "judges": {},
           "last": {"z": 1}}
    check_same(tmp_path, old, {**old, "roles": {"y": "2", "w": "3"}, "last": {"z": 2}})
    with pytest.raises(UserError) as error:
        check_same(tmp_path, old, {**old, "roles": {"y": "3"}, "model": {"b": True}})
    assert ("contains another run (model.a was 1, now absent; model.b was absent, now true; "
            "roles.y was \"2\", now \"3\"); choose") in str(error.value)


def test_an_imported_run_is_continued_with_its_own_model(tmp_path):
    """The messages differ for an unknown and for another model."""
    old = {"imported": {"folder": "in", "rollouts": 1}, "model": {"fingerprint": "f"},
           "last": {"model": "tiny"}}
    check_origin(tmp_path, {"model": {"fingerprint": "f"}}, {"model": {"fingerprint": "g"}})
    check_origin(tmp_path, old, {"model": {"fingerprint": "f"}})
    with pytest.raises(UserError, match="from 'in' for the model 'tiny' with the fingerprint f, "
                                        "but the given model has the fingerprint g"):
        check_origin(tmp_path, old, {"model": {"fingerprint": "g"}})
    with pytest.raises(UserError, match="from 'in' without a model"):
        check_origin(tmp_path, {**old, "model": {"fingerprint": ""}}, old)
    assert continued(old["imported"]) == (
        "the run contains 1 rollout imported from 'in'; further rollouts are generated with this "
        "package")
    assert "contains 2 rollouts imported" in continued({"folder": "in", "rollouts": 2})


def test_the_remedy_for_damage_quotes_the_names_of_roles(tmp_path):
    """The option can be pasted into a shell."""
    error = Damaged("a b", tmp_path / "x", "is empty")
    assert error.role == "a b" and error.fault == f"{tmp_path / 'x'}: damaged (is empty)"
    assert str(error) == (f"{error.fault}; restore the damaged data, or regenerate it with "
                          "redo=['a b'] (--redo 'a b')")


def test_a_deleted_run_counts_its_files_and_leaves_no_empty_folder(tmp_path):
    """Files of format 2 are deleted too; temporary files are not counted."""
    names = ["axis.safetensors", "analysis.json", "status.json", *FIGURES,
             "live/ghost.jsonl", "live/ghost.means", "live/ghost.verdicts.jsonl",
             "rollouts/ghost.jsonl", "samples/ghost.safetensors", "vectors/ghost.safetensors",
             "scores/j/ghost.json", "sums/j/ghost.safetensors", "sums/default.safetensors",
             "means/ghost.safetensors", "scores/ghost.json"]
    for name in (*names, "rollouts/.ghost.jsonl.999999999.tmp", "rollouts/mine.jsonl", "run.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert {"roles.png", "roles.svg", "drift.json", "report.html"} < set(FIGURES)
    assert delete_run(tmp_path, ["default", "ghost"], ["j"]) == len(names)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"run.json", "rollouts", "rollouts/mine.jsonl"}
    assert delete_run(tmp_path, ["default", "ghost"], ["j"]) == 0


def test_the_files_of_the_default_persona_have_no_judge(tmp_path):
    """Only scores and sums of other roles are kept per judge."""
    assert path_of(tmp_path, "sums", "default", "j") == tmp_path / "sums/default.safetensors"
    assert path_of(tmp_path, "sums", "a", "j") == tmp_path / "sums/j/a.safetensors"
    assert path_of(tmp_path, "samples", "a", "j") == tmp_path / "samples/a.safetensors"
    assert not delete(tmp_path / "none") and not delete(tmp_path / "none/x")
    (tmp_path / "file").touch()
    assert not delete(tmp_path / "file/x") and delete(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: cannot be deleted"):
        delete(tmp_path / "folder")


def test_a_process_is_alive_also_if_another_user_owns_it(monkeypatch):
    """A number that is too large for a process has ended."""
    assert alive(os.getpid()) and not alive(2**22 + 5) and not alive(10**30)

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert alive(5)
