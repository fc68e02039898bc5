"""Directions in every file format: round trips, metadata, and no code execution."""

import json
import os
import pickle
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import gguf as control
from jaxpersona.ckpts import torchfile
from jaxpersona.ckpts.vectors import load_any, load_axis, load_caps, load_vector, save_vector

import jaxpersona as jp
from jaxpersona.vectors.vector import Axis, Vector

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(4, 6)).astype(np.float32)
ID = "layers_1:3-p0.25"


def tensor(values, dtype=torch.float32):
    return torch.tensor(np.asarray(values), dtype=dtype)


def capping(caps=(0.5, -0.25, 1.5)):
    """Return a capping_config with three caps, two of them at layer 2, not in layer order."""
    vectors = {f"layer_{layer}/{i}": {"layer": layer, "vector": tensor(VALUES[i])}
               for i, layer in enumerate((2, 1, 2))}
    listed = [{"vector": name, "cap": cap} for name, cap in zip(vectors, caps, strict=True)]
    return {"vectors": vectors, "experiments": [{"id": ID, "interventions": listed},
                                                {"id": "one", "interventions": listed[1:2]}]}


def test_the_assistant_axis_projects_files(tmp_path):
    """Test bare and wrapped axes in any float type, role vectors, and the default's vector."""
    torch.save(tensor(VALUES), tmp_path / "assistant_axis.pt")
    torch.save({"axis": tensor(VALUES, torch.bfloat16)}, tmp_path / "wrapped.pt")
    torch.save({"vector": tensor(VALUES, torch.float64), "type": "pos_3", "role": "ghost"},
               tmp_path / "ghost.pt")
    torch.save(tensor(VALUES), tmp_path / "default_vector.pt")
    bare = load_axis(tmp_path / "assistant_axis.pt")
    assert isinstance(bare, Axis) and s.same_bits(bare.values, VALUES) and not bare.fingerprint
    wrapped = load_axis(tmp_path / "wrapped.pt").values
    assert s.same_bits(wrapped, VALUES.astype(jnp.bfloat16).astype(np.float32))
    ghost = load_vector(tmp_path / "ghost.pt")
    assert ghost.name == "ghost" and ghost.notes["type"] == "pos_3" and ghost.kind == "vector"
    assert s.same_bits(ghost.values, VALUES)
    assert load_vector(tmp_path / "default_vector.pt").name == "default"
    with pytest.raises(ValueError, match="ghost.pt: contains a vector, not an axis"):
        load_axis(tmp_path / "ghost.pt")
    torch.save(tensor(VALUES), tmp_path / "mystery.pt")
    with pytest.raises(ValueError, match="kind to one of axis, role, persona"):
        load_vector(tmp_path / "mystery.pt")
    assert load_axis(tmp_path / "mystery.pt", kind="axis").n_layers == 4


@pytest.mark.parametrize("pool", ["prompt_avg", "response_avg", "prompt_last"])
def test_persona_vectors_are_rebased_and_say_so(tmp_path, pool):
    """Entry i is layer i − 1; the embeddings and the output of the final norm are dropped."""
    file = tmp_path / f"not_kind_{pool}_diff.pt"
    torch.save(tensor(VALUES), file)  # [L + 1, D]: three layers
    found = load_vector(file)
    assert found.name == "not_kind" and found.notes["pool"] == pool and found.n_layers == 3
    assert s.same_bits(found.values[:2], VALUES[1:3]) and not found.values[2].any()
    assert "entry i of the file is layer i - 1" in found.notes["re-based"]
    assert "layer 2 is zero" in found.notes["re-based"]
    jp.steer(found, layers=[0, 1])
    with pytest.raises(ValueError, match="zero at a chosen layer"):
        jp.steer(found, layers=2)
    torch.save(tensor(VALUES[:2]), file)
    with pytest.raises(ValueError, match=r"\[L \+ 1, D\]"):
        load_vector(file)
    torch.save(tensor(VALUES), tmp_path / "mood_vector.pt")
    named = load_vector(tmp_path / "mood_vector.pt", kind="persona")
    assert (named.name, named.notes["pool"], named.n_layers) == ("mood_vector", "unknown", 3)
    named = load_vector(tmp_path / "mood_vector.pt", kind="role")
    assert (named.name, named.n_layers) == ("mood", 4)


def test_capping_experiments_become_floors(tmp_path):
    """The floors change a residual like the formula of the file format, applied in file order."""
    config = capping()
    torch.save(config, tmp_path / "capping_config.pt")
    found = load_caps(tmp_path / "capping_config.pt")
    assert list(found) == [ID, "one"]
    caps = found[ID]
    assert caps.layers == (2, 1, 2) and s.same_bits(caps.floors, np.float32([-0.5, 0.25, -1.5]))
    assert "p0.25 of the file is the 75th percentile along +axis" in caps.notes["sign"]
    assert "percentile" not in found["one"].notes["sign"]
    h = RNG.normal(size=(64, 6)).astype(np.float32) * 3
    for layer in (1, 2):
        want, got = h.astype(np.float64), h.astype(np.float64)
        for item in config["experiments"][0]["interventions"]:
            if config["vectors"][item["vector"]]["layer"] == layer:
                u = config["vectors"][item["vector"]]["vector"].numpy().astype(np.float64)
                u /= np.linalg.norm(u)
                want -= np.maximum(want @ u - item["cap"], 0)[:, None] * u
        for edit in caps.interventions().edits:
            if layer in edit.layers:
                at = edit.layers.index(layer)
                v = np.asarray(edit.direction[at, 0], np.float64)
                lo, hi = (float(x) for x in edit.coefficients[at, 0, 2:])
                p = got @ v
                got += (np.clip(p, lo, hi) - p)[:, None] * v
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(want - h).max() > 0.1
    rounds = [(layers, floors.tolist()) for _, layers, floors in caps.tables()]
    assert rounds == [((1, 2), [0.25, -0.5]), ((2,), [-1.5])]
    with pytest.raises(ValueError, match="read the file with load_caps"):
        load_vector(tmp_path / "capping_config.pt")
    save_vector(tmp_path / "c.safetensors", caps)
    again = load_caps(tmp_path / "c.safetensors")[ID]
    assert (again.layers, again.labels, dict(again.notes)) == (caps.layers, caps.labels, caps.notes)
    assert s.same_bits((again.values, again.floors), (caps.values, caps.floors))
    with pytest.raises(ValueError, match=r"caps are written as \.safetensors"):
        save_vector(tmp_path / "c.gguf", caps)


def test_floors_act_in_a_model_at_their_layers(tmp_path):
    """The imported caps change only projections below their floors."""
    model = s.tiny_model(d_model=6, n_heads=2, n_kv_heads=1, head_dim=4)
    batch = jp.batch(s.prompts([5, 9]))
    plain = s.residuals(model, batch)[0]
    for cap, bound in ((50.0, False), (-50.0, True)):
        torch.save(capping((cap,) * 3), tmp_path / "capping_config.pt")
        edits = load_caps(tmp_path / "capping_config.pt")[ID].interventions()
        held = s.residuals(model, batch, edits)[0]
        assert s.same_bits(held, plain) != bound
        assert s.same_bits(held[:, 0], plain[:, 0])


def test_gguf_in_and_out(tmp_path):
    """`direction.N` is layer N; a warning lists what the format drops: layer 0 and thresholds."""
    axis = Axis(VALUES, "assistant", "owner/m", "0123456789abcdef", notes={"roles": 3},
                percentiles={"default": {"p25": np.zeros(4)}})
    lost = save_vector(tmp_path / "a.gguf", axis)
    assert len(lost) == 2 and "layer 0" in lost[0]
    again = load_axis(tmp_path / "a.gguf")
    assert s.same_bits(again.values[1:], VALUES[1:]) and not again.values[0].any()
    for field in ("name", "model", "fingerprint", "notes", "site"):
        assert getattr(again, field) == getattr(axis, field)
    plain = Vector(np.pad(VALUES[1:3], ((1, 1), (0, 0))), "v")
    assert save_vector(tmp_path / "v.gguf", plain) == []
    assert s.same_bits(load_vector(tmp_path / "v.gguf").values, plain.values)
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert [t.name for t in reader.tensors] == ["direction.1", "direction.2"]
    assert reader.get_field("general.architecture").contents() == "controlvector"
    foreign = s.write_control(tmp_path / "f.gguf", {"direction.2": VALUES[2],
                                                    "direction.1": VALUES[1].astype(np.float16)})
    found = load_vector(foreign)
    assert found.name == "f" and found.notes["model_hint"] == "qwen3"
    assert s.same_bits(found.values[2], VALUES[2]) and found.n_layers == 3
    np.testing.assert_allclose(found.values[1], VALUES[1], rtol=1e-3)
    for directions, words in (({"direction.0": VALUES[0]}, "direction.0"),
                              ({"direction.9999999": VALUES[0]}, "direction.9999999"),
                              ({"blk.1.w": VALUES[0]}, "blk.1.w"), ({}, "no direction"),
                              ({"direction.1": VALUES[0], "direction.2": VALUES[0, :3]}, "widths"),
                              ({"direction.1": VALUES}, "2 dimensions")):
        with pytest.raises(ValueError, match=f"f.gguf.*{words}"):
            load_vector(s.write_control(tmp_path / "f.gguf", directions))
    with pytest.raises(ValueError, match="architecture is 'llama'"):
        load_vector(s.write_control(tmp_path / "f.gguf", {"direction.1": VALUES[0]}, "llama"))
    with pytest.raises(ValueError, match="measured at site"):
        save_vector(tmp_path / "m.gguf", Vector(VALUES, site="mlp"))
    with pytest.raises(ValueError, match="zero at every layer above 0"):
        save_vector(tmp_path / "z.gguf", Vector(VALUES[:1]))


def test_bare_arrays_in_and_out(tmp_path):
    """A .npy file keeps only the values; anything but a real matrix raises an error."""
    assert save_vector(tmp_path / "v.npy", Vector(VALUES)) == ["the name"]
    axis = Axis(VALUES, "a", "m", "ab" * 8, notes={"n": 1},
                percentiles={"default": {"p25": np.zeros(len(VALUES))}})
    assert save_vector(tmp_path / "a.npy", axis) == [
        "the kind (axis)", "the name", "the model", "the fingerprint", "the thresholds",
        "the notes"]
    assert save_vector(tmp_path / "m.npy", Vector(VALUES, site="mlp"))[-1] == "the site (mlp)"
    found = load_vector(tmp_path / "v.npy")
    assert s.same_bits(found.values, VALUES) and found.name == "v"
    assert "bare" in found.notes["source"]
    np.save(tmp_path / "h.npy", VALUES.astype(np.float64))
    assert load_vector(tmp_path / "h.npy").values.dtype == np.float32
    for value, words in ((VALUES[0], r"float32\[6\]"), (VALUES.astype(complex), "complex"),
                         (np.array([["x"]]), "<U1"), (np.full((2, 2), np.nan), "non-finite"),
                         (np.full((2, 2), 1e300), "non-finite")):
        np.save(tmp_path / "w.npy", value)
        with pytest.raises(ValueError, match=f"w.npy.*{words}"):
            load_vector(tmp_path / "w.npy")
    np.savez(tmp_path / "z.npz", VALUES)
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(ValueError, match="z.npy: (contains an archive|invalid .npy)"):
        load_vector(tmp_path / "z.npy")


class Malicious:
    """When unpickled, this creates a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["bare2.pt", "bare4.pt", "zipped_axis.pt", "legacy_axis.pt",
                                  "code.npy"])
def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path, name):
    """Test pickles with a call in them, in every container that can contain one."""
    mark, file = tmp_path / "ran", tmp_path / name
    if name[:4] == "bare":
        file.write_bytes(pickle.dumps(Malicious(mark), int(name[4])))
    elif name == "code.npy":
        np.save(file, np.array([[Malicious(mark)]], object), allow_pickle=True)
    else:
        torch.save({"axis": tensor(VALUES), "x": Malicious(mark)}, file,
                   _use_new_zipfile_serialization=name[0] == "z")
    if name != "code.npy":  # a trusted file does run its code
        pickle.loads(file.read_bytes()) if name[:4] == "bare" else torch.load(
            file, weights_only=False)
        assert mark.exists()
        mark.rmdir()
    with pytest.raises(ValueError, match=name) as caught:
        load_any(file)
    assert not mark.exists() and "\n" not in str(caught.value)
    if name not in ("code.npy", "bare4.pt"):  # PyTorch's reader does not support pickle protocol 4
        assert re.search(r"unsafe pickle \(it would call \w+\.mkdir\)", str(caught.value))


def test_damaged_files_of_every_format_are_one_line(tmp_path):
    """A file that is cut or has changed bytes raises an error or reads as valid values."""
    axis = Axis(VALUES, "assistant")
    for name in ("a.safetensors", "a.gguf", "a.npy"):
        save_vector(tmp_path / name, axis)
    torch.save(tensor(VALUES), tmp_path / "a_axis.pt")
    torch.save(capping(), tmp_path / "capping_config.pt")
    for name in ("a.safetensors", "a.gguf", "a.npy", "a_axis.pt", "capping_config.pt"):
        whole = (tmp_path / name).read_bytes()
        bad = tmp_path / f"bad_axis{(tmp_path / name).suffix}"
        for cut in np.linspace(0, len(whole) - 1, 25).astype(int):
            bad.write_bytes(whole[:cut])
            try:  # GGUF pads the end of a file; without the padding, nothing is lost
                found = load_any(bad)
                assert name == "a.gguf" and s.same_bits(found.values[1:], VALUES[1:])
            except ValueError as error:
                assert bad.name in str(error) and "\n" not in str(error), (name, cut)
        good, numbers = load_any(tmp_path / name), whole.find(VALUES.tobytes())
        sound = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            changed = bytearray(whole)
            places = rng.integers(0, len(whole), 4)
            if numbers >= 0 and seed % 2:  # change only the numbers
                places = numbers + rng.integers(0, VALUES.nbytes, 4)
            for at in places:
                changed[at] = rng.integers(256)
            bad.write_bytes(changed)
            try:
                found = load_any(bad)
            except ValueError as error:
                assert bad.name in str(error) and "\n" not in str(error), (name, seed)
            else:  # every number has the value of its bytes and is finite
                assert type(found) is type(good), (name, seed)
                held = found.values() if isinstance(found, dict) else [found]
                assert all(np.isfinite(one.values).all() for one in held), (name, seed)
                if numbers >= 0 and seed % 2:
                    sound += 1
                    said = np.frombuffer(changed, np.float32, VALUES.size, numbers)
                    np.testing.assert_array_equal(found.values.ravel(), said, err_msg=name)
        assert sound > 10 or numbers < 0, name
    for name in ("absent.pt", "absent.gguf", "absent.npy", "absent.safetensors"):
        with pytest.raises(ValueError, match=f"{name}: no such file"):
            load_any(tmp_path / name)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="suffix must be one of"):
        load_any(tmp_path / "a.bin")


def one_cap(cap=1.0, **vector):
    """Return an experiment with one cap on vector q and the given fields."""
    return {"vectors": {"q": {"layer": 2, "vector": torch.ones(3), **vector}},
            "experiments": [{"id": "a", "interventions": [{"vector": "q", "cap": cap}]}]}


@pytest.mark.parametrize(("content", "words"), [
    ({"x": 1}, "any of the keys axis, vector or experiments"), ({"axis": 5}, "axis is int"),
    ({"vector": torch.ones(2, 2)}, "'role' is missing"),
    ({"axis": torch.ones(3)}, r"axis is \[3\]"),
    ({"axis": torch.ones(2, 2, dtype=torch.int64)}, "torch.int64"),
    ({"axis": torch.full((2, 2), torch.inf)}, "non-finite"),
    ({"experiments": []}, "'vectors' is missing"),
    ({"vectors": {}, "experiments": []}, "experiments is empty"),
    ({"vectors": {}, "experiments": [{"id": "a", "interventions": []}]}, "has no caps"),
    ({**one_cap(), "vectors": {}}, "'q', which is not in vectors"),
    (one_cap(layer="2"), "'layer' an int"), (one_cap(layer=-2), "integer in 0"),
    (one_cap("x"), "cap is 'x'; it must be a number"), (one_cap(1e300), "non-finite"),
    (one_cap(vector=torch.ones(1, 3)), r"tensor \[D\]"), (one_cap(True), "cap is True; it must be"),
    ({**one_cap(), "experiments": one_cap()["experiments"] * 2}, "contains 'a' twice"),
])
def test_a_pt_file_of_another_content_is_named(tmp_path, content, words):
    """Each missing field gives a one-line error."""
    torch.save(content, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=rf"t\.pt.*{words}") as caught:
        load_any(tmp_path / "t.pt")
    assert "\n" not in str(caught.value)


def test_missing_extras_are_one_line(tmp_path, monkeypatch):
    """Without PyTorch or gguf, the error contains the command that installs it."""
    torch.save(tensor(VALUES), tmp_path / "axis.pt")
    save_vector(tmp_path / "v.gguf", Vector(VALUES))
    for name, file, extra in (("torch", "axis.pt", "torch"), ("gguf", "v.gguf", "gguf")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"{file}.*pip install 'jaxpersona\[{extra}\]'"):
            load_any(tmp_path / file)
    with pytest.raises(ValueError, match=r"jaxpersona\[gguf\]"):
        control.write(tmp_path / "w.gguf", Vector(VALUES))
    with pytest.raises(ValueError, match="kind is 'x'"):
        torchfile.read(tmp_path / "axis.pt", "x")


def test_show_and_convert(tmp_path, capsys, checkpoint):
    """Every format can be shown and converted; the model is checked and recorded."""
    model = jp.load(str(checkpoint))
    shape = model.config.n_layers, model.config.d_model
    values = RNG.normal(size=(shape[0] + 1, shape[1])).astype(np.float32)
    torch.save(tensor(values[:-1]), tmp_path / "axis.pt")
    torch.save(tensor(values), tmp_path / "evil_response_avg_diff.pt")
    vectors = {f"v{i}": {"layer": i, "vector": tensor(values[i])} for i in (0, 1)}
    torch.save({"vectors": vectors, "experiments": [
        {"id": name, "interventions": [{"vector": v, "cap": 1.0} for v in vectors]}
        for name in (ID, "other")]}, tmp_path / "capping_config.pt")
    save_vector(tmp_path / "short.gguf", Vector(values[:2]))
    s.write_control(tmp_path / "foreign.gguf", {"direction.1": values[1]})
    np.save(tmp_path / "bare.npy", values[:-1])
    here = lambda name: str(tmp_path / name)  # noqa: E731
    for name in ("axis.pt", "evil_response_avg_diff.pt", "capping_config.pt", "foreign.gguf",
                 "bare.npy"):
        assert s.run_command(["vectors", "show", here(name)]) == 0
        said = capsys.readouterr().out
        assert {"model unknown", "fingerprint unknown"} & {
            " ".join(re.findall(r"\w+", line)) for line in said.splitlines()}
        out = f"{name}.safetensors"
        more = ["--experiment", ID] if name[:3] == "cap" else []
        command = ["vectors", "convert", here(name), here(out), "--model", str(checkpoint), *more]
        assert s.run_command(command) == 0, name
        found = load_any(tmp_path / out)
        found = next(iter(found.values())) if isinstance(found, dict) else found
        assert (found.model, found.fingerprint) == (str(checkpoint), model.fingerprint)
        capsys.readouterr()
        assert s.run_command(["vectors", "show", here(out)]) == 0
        assert model.fingerprint in capsys.readouterr().out
    assert load_vector(tmp_path / "foreign.gguf.safetensors").n_layers == shape[0]
    save_vector(tmp_path / "mlp.safetensors", Vector(values[:-1], site="mlp"))
    assert s.run_command(["vectors", "convert", here("mlp.safetensors"), here("mlp2.safetensors"),
                          "--model", str(checkpoint)]) == 0
    found = load_vector(tmp_path / "mlp2.safetensors")
    assert (found.site, found.fingerprint) == ("mlp", model.fingerprint)
    assert s.run_command(["vectors", "convert", here("axis.pt"), here("a.gguf")]) == 0
    said = capsys.readouterr().out
    assert "omitted, because .gguf files cannot store this data: layer 0" in said
    assert "the file does not contain the fingerprint of a model" in said
    assert s.run_command(["vectors", "convert", here("a.gguf"), here("b.npy"), "--name", "x"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "values only" in said[0] and "'x'" not in said[0]
    assert said[1] == ("  omitted, because .npy files cannot store this data: the kind (axis), the "
                       "name, the notes")
    for arguments, words in (
        (["capping_config.pt", "o.safetensors"], f"choose one with --experiment: {ID}, other"),
        (["capping_config.pt", "o.safetensors", "--experiment", "x"], "experiment is 'x'"),
        (["axis.pt", "o.safetensors", "--experiment", "x"], "only to files of caps"),
        (["axis.pt", "o.pt"], "written as .safetensors, .gguf or .npy"),
        (["axis.pt", "o"], "the suffix is missing"),
        (["bare.npy", "o.gguf", "--kind", "axis"], "only to .pt files"),
        (["short.gguf", "o.npy", "--model", str(checkpoint)], "made for another model"),
    ):
        command = ["vectors", "convert", *[here(a) for a in arguments[:2]], *arguments[2:]]
        assert s.run_command(command) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 or "error:" in said.splitlines()[-1]
        assert words in said and "Traceback" not in said, said
        assert not (tmp_path / arguments[1]).exists()
    assert json.loads(json.dumps(dict(load_any(tmp_path / "axis.pt").notes)))
