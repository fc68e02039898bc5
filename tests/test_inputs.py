"""Untrusted files: declared sizes, nesting depth, file types and printed text."""

import io
import json
import os
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import hf
from jaxpersona.ckpts.files import read_tensors, write_tensors
from jaxpersona.ckpts.vectors import load_any, save_vector

from jaxpersona import inputs
from jaxpersona.vectors.vector import Vector

VALUES = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
HEADER = {"format": "jaxpersona-vector", "kind": "vector", "layer_base": "0", "norm": "none",
          "sign": "+", "site": "residual"}


def refused(capsys, arguments, *words):
    """Run a command that must fail with one line that contains every word; return the line."""
    capsys.readouterr()
    assert s.run_command([str(part) for part in arguments]) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), said[-2000:]
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_file(fields=b"", n_fields=0, tensors=b"", n_tensors=0, architecture="controlvector"):
    """Return the bytes of a GGUF header with the given architecture, fields and tensors."""
    own = string("general.architecture") + struct.pack("<I", 8) + string(architecture)
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields + 1) + own + fields + tensors


def array_of(kind, count):
    return string("a") + struct.pack("<IIQ", 9, kind, count)


def tensor_of(*dimensions, name="direction.1", count=None):
    return string(name) + struct.pack(f"<I{len(dimensions)}QIQ", count or len(dimensions),
                                      *dimensions, 0, 0)


@pytest.mark.parametrize(("data", "words"), [
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array_of(4, 1 << 62), "an array declares"),
    (gguf_file(array_of(0, 1 << 62), 1), "an array declares"),
    (gguf_file(array_of(8, 1 << 40), 1), "an array declares"),
    (gguf_file(array_of(4, 60_000), 1), "truncated or damaged"),
    (gguf_file(array_of(9, 3), 1), "nested arrays"),
    (gguf_file(array_of(77, 1), 1), "unknown type 77"),
    (gguf_file(string("k")[:-1], 1 << 60), "truncated or damaged"),
    (gguf_file(n_tensors=1 << 60), "declares 1152921504606846976 tensors"),
    (gguf_file(struct.pack("<Q", 1 << 63), 1), "truncated or damaged"),
    (gguf_file(tensors=tensor_of(1 << 40), n_tensors=1), "declare 1099511627776 elements"),
    (gguf_file(tensors=tensor_of(1 << 32, 1 << 32), n_tensors=1), "elements"),
    (gguf_file(tensors=tensor_of(2, count=1 << 31), n_tensors=1), "dimensions"),
    (gguf_file(architecture="llama"), "architecture is 'llama'"),
], ids=str)
def test_what_a_control_vector_claims_is_checked_before_it_is_read(tmp_path, capsys, data, words):
    """Large counts in a header of a hundred bytes do not cause memory allocation."""
    pytest.importorskip("gguf")
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=rf"v\.gguf.*{words}"):
            load_any(path)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    refused(capsys, ["vectors", "show", path], "v.gguf", words)


def test_a_big_endian_control_vector_is_refused(tmp_path, capsys):
    """The gguf package would misread its values as little-endian."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "v.gguf"
    writer = gguf.GGUFWriter(path, "controlvector", endianess=gguf.GGUFEndian.BIG)
    writer.add_array("extra", ["a", "b"])
    writer.add_tensor("direction.1", VALUES[0])
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file"):
        getattr(writer, step)()
    writer.close()
    refused(capsys, ["vectors", "show", path], "v.gguf", "big-endian")


def archive(path, entries, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as out:
        for name, data in entries.items():
            out.writestr(name, data)


def test_an_archive_that_expands_is_refused_unread(tmp_path, capsys):
    """PyTorch stores entries uncompressed; a compressed entry could expand to any size."""
    torch = pytest.importorskip("torch")
    kept = io.BytesIO()
    torch.save({"axis": torch.zeros(1000, 4000)}, kept)
    with zipfile.ZipFile(kept) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    archive(tmp_path / "axis.pt", entries, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "axis.pt").stat().st_size < 100_000
    refused(capsys, ["vectors", "show", tmp_path / "axis.pt"], "axis.pt", "compressed entry")
    archive(tmp_path / "axis.pt", {name: data for name, data in entries.items()})
    # without compression, the file is accepted
    assert load_any(tmp_path / "axis.pt").n_layers == 1000
    whole = (tmp_path / "axis.pt").read_bytes()
    (tmp_path / "axis.pt").write_bytes(whole[: len(whole) // 2])
    refused(capsys, ["vectors", "show", tmp_path / "axis.pt"], "axis.pt", "invalid .pt file")


def test_shared_parts_of_a_pickle_are_walked_once(tmp_path, capsys):
    """Test an expanded view, a structure with many shared references, and excessive nesting."""
    torch = pytest.importorskip("torch")
    torch.save({"axis": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "axis.pt")
    refused(capsys, ["vectors", "show", tmp_path / "axis.pt"], "axis.pt", "a tensor declares")
    nest = [torch.ones(2)]
    for _ in range(60):
        nest = [nest, nest]
    torch.save({"axis": nest}, tmp_path / "axis.pt")
    refused(capsys, ["vectors", "show", tmp_path / "axis.pt"], "axis.pt", "axis is list")
    torch.save({"vector": torch.ones(2, 2), "role": nest}, tmp_path / "r.pt")
    refused(capsys, ["vectors", "show", tmp_path / "r.pt"], "r.pt", "role is of type list")


@pytest.mark.parametrize(("change", "words"), [
    ({"vectors": {"q": "bare"}}, "vector 'q' is of type ndarray"),
    ({"experiments": ["a"]}, "experiments[0] is of type str"),
    ({"experiments": [{"id": "a", "interventions": 5}]}, "interventions must be a list"),
    ({"experiments": [{"id": "a", "interventions": ["q"]}]}, "an intervention is of type str"),
    ({"experiments": [{"id": "a", "interventions": [{"vector": ["q"], "cap": 1.0}]}]},
     "vector is of type list"),
    ({"experiments": [{"id": "a", "interventions": [{"vector": "q", "cap": "tensor"}]}]},
     "cap is a tensor"),
    ({"experiments": [{"interventions": []}]}, "'id' is missing"),
    ({"vectors": 5}, "vectors is of type int"),
], ids=str)
def test_experiments_of_another_shape_are_named(tmp_path, capsys, change, words):
    """Test tensors, lists and numbers in place of dicts in a capping file."""
    torch = pytest.importorskip("torch")
    table = {"vectors": {"q": {"layer": 1, "vector": torch.ones(3)}},
             "experiments": [{"id": "a", "interventions": [{"vector": "q", "cap": 1.0}]}]} | change
    text = torch.ones(3)
    if table["vectors"] == {"q": "bare"}:
        table["vectors"] = {"q": text}
    for experiment in table["experiments"]:
        for item in experiment.get("interventions", []) if isinstance(experiment, dict) and (
                isinstance(experiment.get("interventions"), list)) else []:
            if isinstance(item, dict) and item["cap"] == "tensor":
                item["cap"] = text
    torch.save(table, tmp_path / "capping_config.pt")
    refused(capsys, ["vectors", "show", tmp_path / "capping_config.pt"], "capping_config.pt", words)


def npy(path, shape, data=b"", dtype="<f4"):
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return path


@pytest.mark.parametrize("shape", [(1 << 40, 4), (1 << 62, 4), (1 << 62, 1 << 62), (10**30, 1),
                                   (1 << 61, 8), (-1, 4), (1 << 62, 0)], ids=str)
def test_a_row_count_that_no_model_has_is_refused(tmp_path, capsys, shape):
    refused(capsys, ["vectors", "show", npy(tmp_path / "v.npy", shape, bytes(64))], "v.npy")


def test_more_layers_than_any_model_are_refused_in_every_format(tmp_path, capsys):
    values = np.ones((2000, 2), np.float32)
    np.save(tmp_path / "v.npy", values)
    write_tensors(tmp_path / "v.safetensors", {"values": values}, HEADER)
    for name in ("v.npy", "v.safetensors"):
        refused(capsys, ["vectors", "show", tmp_path / name], name, "2000 layers")


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "pt", "gguf"])
def test_a_sparse_file_of_any_size_is_not_read(tmp_path, capsys, suffix):
    """Test a sparse file of 40 GB with a valid header."""
    path = tmp_path / f"v.{suffix}"
    size = 40 << 30
    if suffix == "npy":
        npy(path, (100, size // 400))
    elif suffix == "safetensors":
        header = json.dumps({"__metadata__": HEADER, "values": {
            "dtype": "F32", "shape": [100, size // 400], "data_offsets": [0, size]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        size += 8 + len(header)
    elif suffix == "gguf":
        pytest.importorskip("gguf")
        path.write_bytes(gguf_file(tensors=tensor_of(1 << 10), n_tensors=1))
    else:
        path.write_bytes(b"PK\3\4")
    os.truncate(path, size)
    refused(capsys, ["vectors", "show", path], path.name, "bytes")


def test_texts_of_any_size_and_pipes_and_devices_are_refused(checkpoint, tmp_path, capsys):
    """Reads do not block on pipes and do not read endless devices."""
    big, pipe = tmp_path / "big.json", tmp_path / "pipe.json"
    big.write_text("{")
    os.truncate(big, 40 << 30)
    os.mkfifo(pipe)
    for path, words in ((big, "bytes"), (pipe, "a pipe"), ("/dev/zero", "a device")):
        name = str(path)
        for arguments in (["generate", "hi", "--spec", path, "--model", checkpoint],
                          ["project", path, "--on", path, "--model", checkpoint],
                          ["axis", "--model", checkpoint, "--questions", path,
                           "--out", tmp_path / "out"]):
            refused(capsys, arguments, name, words)
    for name in ("v.npy", "v.safetensors", "v.pt", "v.gguf"):
        os.mkfifo(tmp_path / name)
        refused(capsys, ["vectors", "show", tmp_path / name], name, "a pipe")
    texts = tmp_path / "texts" / "roles"
    texts.mkdir(parents=True)
    os.mkfifo(texts / "ghost.json")
    refused(capsys, ["data", "check", tmp_path / "texts"], "ghost.json", "a pipe")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json",
                                  "tokenizer_config.json", "generation_config.json", hf.INDEX])
def test_a_pipe_or_a_sparse_file_in_a_model_folder_is_named(checkpoint, tmp_path, capsys, name):
    folder = tmp_path / "m"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    arguments = ["generate", "hi", "--model", folder]
    refused(capsys, arguments, str(folder), name, "a pipe")
    (folder / name).unlink()
    (folder / name).write_bytes(b"{")
    os.truncate(folder / name, 40 << 30)
    weights = name == "model.safetensors"  # only the header is read
    refused(capsys, arguments, str(folder), name, "corrupt header" if weights else "bytes")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "C64"])
def test_dtypes_that_are_no_direction_are_named(tmp_path, capsys, dtype):
    width = 8 if dtype == "C64" else 1
    header = json.dumps({"__metadata__": HEADER, "values": {
        "dtype": dtype, "shape": [2, 4], "data_offsets": [0, 8 * width]}}).encode()
    path = tmp_path / "v.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 * width))
    refused(capsys, ["vectors", "show", path], "v.safetensors", f"dtype {dtype}")


def test_every_numpy_dtype_is_read_as_the_library_reads_it(tmp_path):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    tensors = {kind: rng.integers(0, 2, (3, 2)).astype(kind) for kind in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
        "float16", "float32", "float64")}
    tensors["scalar"] = np.array(2.5, np.float32)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"a": "b"})
    found, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"a": "b"} and set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, "[" * 200_000, '{"a":' * 700 + "1"
                                  + "}" * 700, "9" * 5000, '{"a": ' + "9" * 5000 + "}"],
                         ids=["900", "200000", "tables", "digits", "digits inside"])
def test_json_beyond_what_python_walks_names_its_file(checkpoint, tmp_path, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    for arguments in (["generate", "hi", "--spec", path, "--model", checkpoint],
                      ["project", path, "--on", path, "--model", checkpoint]):
        refused(capsys, arguments, "x.json")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(text)
    refused(capsys, ["plan", "--topology", "h200:1", "--model", folder], "config.json")
    (tmp_path / "roles").mkdir()
    (tmp_path / "roles" / "ghost.json").write_text(text)
    refused(capsys, ["data", "check", tmp_path], "ghost.json")


def test_nesting_has_a_limit_of_five_hundred():
    assert inputs.parse_json("[" * 500 + "]" * 500)
    assert inputs.parse_json('{"a": ' * 499 + "[]" + "}" * 499)
    for text in ("[" * 501 + "]" * 501, '{"a": ' * 500 + "[]" + "}" * 500):
        with pytest.raises(ValueError, match="nested too deeply"):
            inputs.parse_json(text)


def test_a_file_may_have_the_largest_size(tmp_path):
    path = tmp_path / "ten"
    path.write_bytes(b"0123456789")
    assert inputs.require_file(path) == inputs.require_file(path, 10) == 10
    assert inputs.read_bytes(path, 10) == b"0123456789"
    inputs.require_files(tmp_path, ("en",), 10)
    inputs.require_files(tmp_path, (".json",), 9)  # another suffix
    inputs.require_folder(tmp_path)
    (tmp_path / "bad.json").write_bytes(b'"\xff"')
    for call, wanted in ((lambda: inputs.read_bytes(path, 9), "ten has 10 bytes; the limit is 9"),
                         (lambda: inputs.require_files(tmp_path, ("en",), 9), "the limit is 9"),
                         (lambda: inputs.require_file(tmp_path), "cannot be read .it is a folder"),
                         (lambda: inputs.require_file(tmp_path / "x"), "x: no such file"),
                         (lambda: inputs.require_file(path / "x"), "x: no such file"),
                         (lambda: inputs.require_folder(path), "ten: no such folder"),
                         (lambda: inputs.require_folder("a\0"), "cannot be read .embedded null"),
                         (lambda: inputs.read_json(tmp_path / "bad.json"), "bad.json: invalid JS")):
        with pytest.raises(inputs.UserError, match=wanted):
            call()


HUGE = str(10**18), str(10**30), str(10**400), "9" * 5000


@pytest.mark.parametrize("value", [*HUGE, "-" + HUGE[1]], ids=["18", "30", "400", "5000", "-30"])
def test_numbers_of_any_size_on_the_command_line_are_refused(checkpoint, tmp_path, capsys, value):
    """Huge numbers cause no allocation, loop or traceback."""
    from jaxpersona.data.texts import Question, Role

    texts = tmp_path / "texts"
    texts.mkdir()
    s.write_texts(texts, [Role(n, (f"You are {n}.",), "") for n in ("default", "a", "b")],
                  [Question(0, "Why?")])
    out = tmp_path / "out"
    axis = s.axis_command(checkpoint, texts, out)
    save_vector(tmp_path / "v.safetensors", Vector(np.ones((3, 32))))
    vector = str(tmp_path / "v.safetensors")
    (tmp_path / "talk.json").write_text('[{"role": "user", "content": "hi"}]')
    talk = ["project", str(tmp_path / "talk.json"), "--on", vector, "--model", str(checkpoint)]
    say = ["generate", "hi", "--model", str(checkpoint), "--max-new-tokens", "2"]
    plan = ["plan", "--topology", "h200:1", "--model", "random:qwen3-mini"]
    for arguments in ([*say, "--temperature", value], [*say, "--steer", vector, "--scale", value]):
        assert s.run_command(arguments) in (0, 2), arguments  # 1e18 is valid
        assert "Traceback" not in capsys.readouterr().err
    for arguments in (
        *([*axis, option, value] for option in ("--samples", "--batch-size", "--seed",
                                                "--min-count", "--top-p")),
        [*talk, "--layer", value], [*say, "--seed", value],
        [*say, "--top-p", value], [*say, "--steer", vector, "--steer-layers", value],
        [*plan, "--batch", value], [*plan, "--context", value], [*plan, "--mesh", f"data={value}"],
        [*plan, "--cap", f"0:{value}"], [*plan[:2], f"h200:{value}", *plan[3:]],
    ):
        capsys.readouterr()
        assert s.run_command(arguments) == 2, arguments
        assert "Traceback" not in capsys.readouterr().err
        assert not out.exists(), arguments


def test_shapes_of_many_dimensions_are_refused_at_once(tmp_path, capsys):
    """The shape's product has millions of digits, and NumPy limits the number of dimensions."""
    for count, size in ((400_000, 2**62), (65, 1)):
        header = json.dumps({"__metadata__": HEADER, "values": {
            "dtype": "F32", "shape": [size] * count, "data_offsets": [0, 4]}}).encode()
        path = tmp_path / "v.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
        began = time.perf_counter()
        refused(capsys, ["vectors", "show", path], path.name, f"declares {count} dimensions")
        assert time.perf_counter() - began < 10


def test_the_arrays_of_a_gguf_are_bounded_together(tmp_path, capsys):
    pytest.importorskip("gguf")
    path = tmp_path / "v.gguf"
    path.write_bytes(gguf_file((array_of(0, 40_000) + bytes(40_000)) * 3, 3))
    refused(capsys, ["vectors", "show", path], path.name, "arrays declare at least 80000 elements")


def test_templates_beside_a_tokenizer_are_checked_too(checkpoint, tmp_path, capsys):
    """transformers reads every template in the folder and would block on a pipe."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "other.jinja")
    refused(capsys, ["generate", "hi", "--model", folder], "other.jinja", "a pipe")
