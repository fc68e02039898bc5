"""Malicious and malformed vector files: each is rejected with a one-line error."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.files import write_tensors
from jaxpersona.ckpts.vectors import load_any, load_vector, save_vector

import jaxpersona as jp
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis, Vector

VALUES = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
HEADER = {"format": "jaxpersona-vector", "kind": "vector", "layer_base": "0", "norm": "none",
          "sign": "+", "site": "residual"}
CAPS = {**HEADER, "kind": "caps", "layers": "[1]", "labels": '["a"]'}
DEEP = "[" * 200_000


def refused(capsys, path, words, *more):
    """Read a file in Python and with the command; both must give the same one-line error."""
    with pytest.raises(ValueError, match=words) as caught:
        load_any(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)
    assert s.run_command(["vectors", "show", str(path), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said[:500]


@pytest.mark.parametrize(("header", "words"), [
    ({**HEADER, "notes": DEEP}, "notes cannot be parsed .nested too deeply"),
    ({**HEADER, "notes": "[" * 400 + "]" * 400}, "notes is .* it must be a JSON object"),
    ({**HEADER, "notes": "{"}, "notes is invalid JSON"),
    ({**HEADER, "notes": '{"a": {"b": 1}}'}, r"notes\['a'\] is of type dict"),
    ({**HEADER, "norm": "unit"}, "norm is 'unit'; only 'none' is supported"),
    ({k: v for k, v in HEADER.items() if k != "norm"}, "norm is None"),
    ({**HEADER, "layer_base": "1"}, "layer_base is '1'; only '0' is supported"),
    ({**HEADER, "sign": "+assistant"}, "sign is '.assistant'; only '.' is supported"),
    ({**HEADER, "kind": "probe"}, "kind is 'probe'; it must be one of .'axis', 'vector', 'caps'"),
    ({**CAPS, "notes": DEEP}, "notes cannot be parsed"),
    ({**CAPS, "layers": DEEP}, "layers cannot be parsed"),
    ({**CAPS, "labels": DEEP}, "labels cannot be parsed"),
    ({**CAPS, "layers": "[1e999]"}, "layers is"), ({**CAPS, "layers": "{}"}, "must be a list"),
    ({**CAPS, "labels": '[{"a": 1}]'}, "labels is .* each label must be a string"),
    ({**CAPS, "labels": "[null]"}, "each label must be a string"),
    ({k: v for k, v in CAPS.items() if k != "labels"}, "'labels' is missing"),
])
def test_a_header_that_lies_is_one_line(tmp_path, capsys, header, words):
    """Test metadata with excessive nesting, wrong types, and fields that contradict the data."""
    tensors = {"values": VALUES[:1], "floors": VALUES[0, :1]}
    write_tensors(tmp_path / "v.safetensors", tensors, header)
    refused(capsys, tmp_path / "v.safetensors", words)


def test_no_depth_of_a_nest_gets_past(tmp_path):
    """Near the parser's limit, a value can be parsed but be too deep to quote in an error."""
    file = tmp_path / "c.safetensors"
    for field in ("notes", "layers", "labels"):
        for depth in range(600, 1000, 7):
            write_tensors(file, {"values": VALUES[:1], "floors": VALUES[0, :1]},
                          {**CAPS, field: "[" * depth + "]" * depth})
            with pytest.raises(ValueError, match=r"c\.safetensors"):
                load_any(file)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 0)])
def test_a_direction_has_layers_and_width(tmp_path, capsys, shape):
    """Empty arrays are not directions, in Python and in every file format."""
    empty = np.zeros(shape, np.float32)
    for kind in (Vector, Axis):
        with pytest.raises(ValueError, match="with L and D nonzero"):
            kind(empty)
    write_tensors(tmp_path / "v.safetensors", {"values": empty}, HEADER)
    np.save(tmp_path / "v.npy", empty)
    for name in ("v.safetensors", "v.npy"):
        refused(capsys, tmp_path / name, "with L and D nonzero")
    write_tensors(tmp_path / "c.safetensors",
                  {"values": empty, "floors": np.zeros(shape[0], np.float32)},
                  {**CAPS, "layers": json.dumps(list(range(shape[0]))),
                   "labels": json.dumps(["a"] * shape[0])})
    refused(capsys, tmp_path / "c.safetensors", "n caps need|zero vector")


@pytest.mark.parametrize(("value", "words"), [
    (np.full(4, np.nan), "non-finite"), (np.full(4, np.inf), "non-finite"),
    (np.zeros(3), "one value per layer"), (1.0, "one value per layer"),
    (["x"] * 4, "cannot be converted to float32"),
])
def test_thresholds_are_one_finite_number_a_layer(tmp_path, capsys, value, words):
    """Thresholds are checked in Python and in files."""
    with pytest.raises(ValueError, match=f"percentiles/default/p25.*{words}"):
        Axis(VALUES, percentiles={"default": {"p25": value}})
    with pytest.raises(ValueError, match=r"a dict from percentile names.*arrays \[L\]"):
        Axis(VALUES, percentiles={"p25": value})
    with pytest.raises(ValueError, match="a dict with populations"):
        Axis(VALUES, percentiles=value)
    with pytest.raises(ValueError, match="has a / in a name"):
        Axis(VALUES, percentiles={"a/b": {"p25": np.zeros(4)}})
    if np.asarray(value).dtype.kind == "f":
        tensors = {"values": VALUES, "percentiles/default/p25": np.asarray(value, np.float32)}
        write_tensors(tmp_path / "a.safetensors", tensors,
                      {**HEADER, "kind": "axis", "sign": "+assistant"})
        refused(capsys, tmp_path / "a.safetensors", words)


def test_notes_are_plain_in_every_format(tmp_path):
    """NumPy and JAX scalars become Python scalars; values that files cannot hold are rejected."""
    notes = {"x": np.float32(1.5), "n": np.int64(3), "y": jnp.float32(0.25), "t": "said", "b": True}
    plain = {"x": 1.5, "n": 3, "y": 0.25, "t": "said", "b": True}
    vector = Vector(VALUES, notes=notes)
    assert vector.notes == plain and [type(v) for v in vector.notes.values()] == [
        float, int, float, str, bool]
    files = ["v.safetensors"]
    if _gguf() is not None:
        files.append("v.gguf")
    for name in files:
        save_vector(tmp_path / name, vector)
        assert load_vector(tmp_path / name).notes == plain
    caps = dict(values=VALUES[:1], layers=(1,), floors=np.zeros(1), labels=("a",))
    for change, words in (({"x": np.ones(2)}, r"notes\['x'\] is of type ndarray"),
                          ({1: "a"}, "notes"), ({"x": None}, "NoneType"), ({"x": [1]}, "list"),
                          ([1], "must be a dict")):
        with pytest.raises(ValueError, match=words):
            Vector(VALUES, notes=change)
        with pytest.raises(ValueError, match=words):
            Caps(**caps, notes=change)
    for fields, words in (({"name": 5}, "name is 5"), ({"model": None}, "model is None"),
                          ({"fingerprint": 7}, "fingerprint is 7")):
        with pytest.raises(ValueError, match=words):
            Vector(VALUES, **fields)


def _gguf():
    try:
        import gguf
    except ImportError:
        return None
    return gguf


@pytest.mark.parametrize("notes", ["[1]", "5", DEEP, '{"a": [1]}'])
def test_the_notes_of_a_control_vector_are_a_table(tmp_path, capsys, notes):
    """Metadata that another program wrote under our key is checked as strictly as our own."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_string("jaxpersona.notes", notes)
    writer.add_tensor("direction.1", VALUES[0])
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()
    refused(capsys, tmp_path / "v.gguf", r"v\.gguf.*notes")
    assert s.run_command(["vectors", "convert", str(tmp_path / "v.gguf"),
                          str(tmp_path / "o.npy")]) == 2
    assert not (tmp_path / "o.npy").exists()


def test_a_truncated_control_vector_says_so(tmp_path):
    """Test a file cut at any position; the message is ours, not NumPy's."""
    pytest.importorskip("gguf")
    save_vector(tmp_path / "v.gguf", Vector(VALUES))
    whole = (tmp_path / "v.gguf").read_bytes()
    bad = tmp_path / "cut.gguf"
    for cut in (0, 3, 7, 21, 40, 101, 202, 303, len(whole) - 33):
        bad.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=rf"cut\.gguf: truncated or damaged.*\({cut} bytes\)"):
            load_vector(bad)


def test_a_table_says_itself_what_it_is(tmp_path):
    """A `kind` that contradicts the file is rejected; tensor names are matched by whole words."""
    torch = pytest.importorskip("torch")
    value = torch.tensor(VALUES)
    tables = {"axis": {"axis": value}, "role": {"vector": value, "role": "ghost"}, "caps": {
        "vectors": {"q": {"layer": 2, "vector": value[0]}},
        "experiments": [{"id": "a", "interventions": [{"vector": "q", "cap": 1.0}]}]}}
    for own, table in tables.items():
        torch.save(table, tmp_path / "t.pt")
        for kind in ("axis", "role", "persona"):
            if kind == own:
                assert load_vector(tmp_path / "t.pt", kind=kind).n_layers == 4
                continue
            with pytest.raises(ValueError, match=f"kind is '{kind}'.*of the file is '{own}'"):
                load_any(tmp_path / "t.pt", kind)
    for name, kind in (("syntaxist", None), ("taxis", None), ("taxis_2", None), ("praxis", None),
                       ("defaulter", None), ("axis2", "axis"), ("my-axis", "axis"),
                       ("my_axis", "axis"), ("AssistantAxis", "axis"), ("ASSISTANT_AXIS", "axis"),
                       ("default_vector", "vector")):
        torch.save(value, tmp_path / f"{name}.pt")
        if kind is None:
            with pytest.raises(ValueError, match="cannot be inferred from the file name"):
                load_any(tmp_path / f"{name}.pt")
        else:
            assert load_vector(tmp_path / f"{name}.pt").kind == kind


def test_a_caps_file_that_lies_is_named(tmp_path):
    """Caps are checked when they are read."""
    fields = dict(values=VALUES[:2], layers=(1, 2), floors=np.zeros(2), labels=("a", "b"))
    for change, words in (({"layers": (1,)}, "length 1 a"), ({"floors": [np.nan, 0]}, "non-finite"),
                          ({"values": 0 * VALUES[:2]}, "zero vector"),
                          ({"layers": (1, True)}, "an integer in 0"),
                          ({"fingerprint": "x"}, "sixteen hexadecimal")):
        with pytest.raises(ValueError, match=words):
            Caps(**{**fields, **change})
    header = {"format": "jaxpersona-vector", "kind": "caps", "layer_base": "0", "sign": "+",
              "norm": "none", "site": "residual", "layers": "[1]", "labels": '["a"]'}
    for change, words in (({"site": "mlp"}, "site"), ({"layers": "5"}, "must be a list"),
                          ({"sign": "-"}, "sign"), ({"layers": "[1.5]"}, "an integer in 0")):
        write_tensors(tmp_path / "c.safetensors", {"values": VALUES[:1], "floors": VALUES[0, :1]},
                      {**header, **change})
        with pytest.raises(ValueError, match=rf"c\.safetensors.*{words}"):
            load_any(tmp_path / "c.safetensors")


def test_numbers_beyond_float32_are_one_line(tmp_path, capsys):
    """Test integers beyond float32, as a cap in a file and as values in Python."""
    for make, field in ((lambda: Vector([[10**400]]), "values"),
                        (lambda: Caps(VALUES[:1], (1,), [10**400], ("a",)), "floors"),
                        (lambda: Vector([[{}]]), "values"), (lambda: Vector("x"), "values")):
        with pytest.raises(ValueError, match=field):
            make()
    torch = pytest.importorskip("torch")
    torch.save({"vectors": {"q": {"layer": 2, "vector": torch.ones(3)}},
                "experiments": [{"id": "a", "interventions": [{"vector": "q", "cap": 10**400}]}]},
               tmp_path / "capping_config.pt")
    refused(capsys, tmp_path / "capping_config.pt", "floors cannot be converted to float32")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".gguf", ".npy"])
def test_a_name_that_the_system_refuses_is_one_line(tmp_path, capsys, suffix):
    """Test a name that is too long and one with a null byte."""
    refused(capsys, tmp_path / ("x" * 300 + suffix), "cannot be read .File name too long")
    with pytest.raises(ValueError, match="cannot be read .embedded null byte"):
        load_vector(tmp_path / f"a\0{suffix}")
    with pytest.raises(ValueError, match=r"no such file"):
        load_vector(tmp_path / f"absent{suffix}")


def test_convert_checks_the_shape_of_random_weights_alone(tmp_path, capsys, monkeypatch):
    """For `random:`, no weights are drawn; for a model, weights are read and this is reported."""
    def load(source, _):
        raise AssertionError(f"{source} was loaded")

    monkeypatch.setattr("jaxpersona.cli.support.open_model", load)
    config = jp.preset("qwen3-8b")
    values = np.ones((config.n_layers, config.d_model), np.float32)
    source, target = (str(tmp_path / f"{name}.safetensors") for name in "ab")
    convert = ["vectors", "convert", source, target, "--model", "random:qwen3-8b"]
    save_vector(source, Vector(values))
    assert s.run_command(convert) == 0
    assert "only the shape was checked" in capsys.readouterr().out
    found = load_vector(target)
    assert (found.model, found.fingerprint) == ("random:qwen3-8b", "")
    known = config.hash() + "01234567"
    save_vector(source, Vector(values, model="owner/m", fingerprint=known))
    assert s.run_command(convert) == 0
    found = load_vector(target)
    assert (found.model, found.fingerprint) == ("owner/m", known)  # neither was verified
    for vector in (Vector(values[1:]), Vector(values, fingerprint="0" * 16)):
        save_vector(source, vector)
        capsys.readouterr()
        assert s.run_command(convert) == 2
        assert "made for another model" in capsys.readouterr().err
    monkeypatch.undo()
    mini = jp.load("mini")
    save_vector(source, Vector(np.ones((mini.config.n_layers, mini.config.d_model))))
    assert s.run_command([*convert[:-1], "mini"]) == 0
    assert "mini: reading the weights to compute their fingerprint" in capsys.readouterr().err
    assert load_vector(target).fingerprint == mini.fingerprint


@pytest.mark.parametrize(("change", "words"), [
    ({"values": VALUES[:2] * [[1], [0]]}, "contain a zero vector"),
    ({"values": VALUES[:2] * [[1], [np.nan]]}, "non-finite"),
    ({"labels": ("a", 5)}, "each label must be a string"),
    ({"layers": (1, 1024)}, "each layer must be an integer in 0…1023"),
    ({"layers": (-1, 1)}, "each layer must be an integer in 0…1023"),
])
def test_one_wrong_cap_of_two_is_refused(change, words):
    fields = dict(values=VALUES[:2], layers=(1, 1023), floors=np.zeros(2), labels=("a", "b"))
    assert Caps(**fields).layers == (1, 1023)
    with pytest.raises(ValueError, match=words):
        Caps(**{**fields, **change})


def test_a_given_kind_takes_precedence_over_the_name_of_the_file(tmp_path):
    """The name only suggests the kind of a bare tensor, so any kind may be given with any name."""
    torch = pytest.importorskip("torch")
    for name in ("my_axis", "default_vector", "evil_response_avg_diff"):
        path = tmp_path / f"{name}.pt"
        torch.save(torch.tensor(VALUES), path)
        axis, role, persona = (load_vector(path, kind=kind) for kind in ("axis", "role", "persona"))
        assert [one.kind for one in (axis, role, persona)] == ["axis", "vector", "vector"]
        assert [one.n_layers for one in (axis, role, persona)] == [4, 4, 3]
        assert "pool" in persona.notes and "pool" not in {**axis.notes, **role.notes}
