"""Files at the edges of what their readers accept, and what their writers leave behind."""

from __future__ import annotations

import json
import os
import pathlib
import re
import struct
import threading

import jax
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import files, names, shards, source, tensorfile
from jaxpersona.ckpts.gguf_header import HeaderReader
from jaxpersona.ckpts.gguf_model import gguf_name
from jaxpersona.ckpts.tensorfile import Entry, parse_dtype, read_header, read_slice

from jaxpersona.errors import UserError
from jaxpersona.models.params import Spec


def stored(path, header, data=b""):
    """Write a safetensors file with a given header."""
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry_of(shape, dtype="U8", size=None):
    size = int(np.prod(shape)) if size is None else size
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}


@pytest.mark.parametrize(("dimensions", "words"), [
    (16, ""), (17, "declares 17 dimensions; at most 16 are supported")])
def test_a_tensor_may_have_sixteen_dimensions(tmp_path, dimensions, words):
    """One dimension more is an error."""
    _, _, faults = read_header(stored(tmp_path / "x", {"a": entry_of([1] * dimensions)}, b"x"))
    assert faults == ([f"x: a: {words}"] if words else [])


@pytest.mark.parametrize(("change", "words"), [
    ({"shape": [2.0]}, "corrupt shape or byte range"), ({"shape": [True]}, "corrupt shape or byte"),
    ({"shape": [-1]}, "corrupt shape or byte range"), ({"shape": 1}, "corrupt shape or byte range"),
    ({"data_offsets": [1, 0]}, "corrupt shape or byte range"),
    ({"data_offsets": [0]}, "corrupt header entry"), ({"dtype": 5}, "unknown dtype 5"),
    ({"dtype": "F8_E4M3"}, ""), ({"dtype": "I16"}, "I16 .1. does not match its byte range"),
], ids=str)
def test_an_entry_of_a_header_is_checked(tmp_path, change, words):
    """Types, order and size of its byte range, and the dtype."""
    found, _, faults = read_header(stored(tmp_path / "x", {"a": entry_of([1]) | change}, b"x"))
    assert bool(found) is not bool(words)
    assert re.search(words, faults[0]) if words else not faults


@pytest.mark.parametrize(("data", "words"), [
    (b"", r"x: truncated or not a safetensors file \(0 bytes, header length 0\)"),
    (b"\0" * 7, "x: truncated or not a safetensors file .7 bytes"),
    ((3).to_bytes(8, "little") + b"{}", r"\(10 bytes, header length 3\)"),
    ((2).to_bytes(8, "little") + b"{}", ""), ((2).to_bytes(8, "little") + b"[]", "not a JSON ob"),
    ((2).to_bytes(8, "little") + b"\xff\xff", "corrupt header"),
    ((2).to_bytes(8, "little") + b"{}x", "bytes after the last tensor: 1"),
], ids=str)
def test_a_header_has_a_length_within_the_file(tmp_path, data, words):
    """Files of a few bytes, and headers that are not a JSON object."""
    (tmp_path / "x").write_bytes(data)
    entries, metadata, faults = read_header(tmp_path / "x")
    assert not entries and not metadata
    assert re.search(words, faults[0]) if words else faults == []


def test_a_header_may_be_as_long_as_the_limit(tmp_path, monkeypatch):
    """One byte more is an error."""
    path = stored(tmp_path / "x", {})
    monkeypatch.setattr(tensorfile, "_HEADER_LIMIT", 2)
    assert read_header(path)[2] == []
    monkeypatch.setattr(tensorfile, "_HEADER_LIMIT", 1)
    assert "header length 2" in read_header(path)[2][0]


def test_parts_of_a_tensor_are_read_from_their_places(tmp_path):
    """Slices of every dimension, in memory that JAX need not copy."""
    values = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    files.write_tensors(tmp_path / "x.safetensors", {"b": values, "a": np.float32([7])}, {"k": "v"})
    entries, metadata = files.read_entries(tmp_path / "x.safetensors")
    assert list(entries) == ["a", "b"] and metadata == {"k": "v"}
    for index in ((), (slice(1, 3),), (slice(0, 1), slice(0, 4)), (slice(None), slice(1, 3)),
                  (slice(2, 3), slice(0, 4), slice(4, 5)), (slice(1, 1),)):
        found = read_slice(entries["b"], index)
        np.testing.assert_array_equal(found, values[index])
        assert found.ctypes.data % 64 == 0 or not found.size
    found = read_slice(entries["a"])
    assert found.tolist() == [7.0] and found.dtype == np.float32
    gone = Entry(tmp_path / "x.safetensors", "F32", (9,), entries["b"].start, 999)
    with pytest.raises(UserError, match="cannot be read"):
        read_slice(Entry(gone.path, "F32", (999,), gone.start, 999 * 4))
    with pytest.raises(UserError, match="cannot be read .the file ends at byte"):
        list(tensorfile.read_bytes_of(Entry(gone.path, "U8", (999,), gone.start, 999)))


def test_values_are_read_in_pieces_of_the_same_number_of_elements(tmp_path, monkeypatch):
    """Whatever the dtype, so that two tensors can be compared piece by piece."""
    monkeypatch.setattr(tensorfile, "_PIECE", 40)
    wide = np.arange(23, dtype=np.float32)
    files.write_tensors(tmp_path / "x.safetensors", {
        "wide": wide, "half": wide.astype(np.float16)}, {})
    entries, _ = files.read_entries(tmp_path / "x.safetensors")
    for name in ("wide", "half"):
        found = list(tensorfile.read_pieces(entries[name]))
        assert [x.size for x in found] == [10, 10, 3]
        np.testing.assert_array_equal(np.concatenate(found), wide)
    np.testing.assert_array_equal(tensorfile.read_as(entries["half"], np.dtype(np.float32)), wide)


@pytest.mark.parametrize(("given", "wanted"), [
    ("float32", "float32"), ("bfloat16", "bfloat16"), (jax.numpy.bfloat16, "bfloat16"),
    (np.float16, "float16"), (float, None), ("f4", None), (np.int8, None), (5, None), ("", None)],
    ids=str)
def test_a_dtype_is_one_of_three(given, wanted):
    """As a name or as a type of NumPy or JAX."""
    if wanted is None:
        with pytest.raises(UserError, match="it must be one of float32, bfloat16, float16"):
            parse_dtype(given)
    else:
        assert parse_dtype(given).name == wanted


def test_the_header_that_is_announced_is_the_one_that_is_written(tmp_path):
    """Tensors and metadata are sorted by name."""
    values = {"z": np.ones((2, 3), np.int32), "a": np.zeros(5, np.float16)}
    files.write_tensors(tmp_path / "x", values, {"n": "1", "b": "2"})
    data = (tmp_path / "x").read_bytes()
    made = files.header_of({name: (x.dtype, x.shape) for name, x in values.items()},
                           {"b": "2", "n": "1"})
    assert data.startswith(made) and len(data) == len(made) + 24 + 10 and len(made) % 8 == 0
    assert list(json.loads(made[8:])) == ["__metadata__", "a", "z"]


def test_json_is_written_with_sorted_keys_and_letters_of_any_alphabet(tmp_path):
    """Folders are created, and no temporary file stays."""
    text = files.json_text({"b": [1, "é"], "a": None})
    assert text == '{\n  "a": null,\n  "b": [\n    1,\n    "é"\n  ]\n}\n'
    files.write_json(tmp_path / "new" / "x.json", {"a": 1})
    assert (tmp_path / "new" / "x.json").read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(tmp_path / "new") == ["x.json"]


def test_a_block_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path):
    """A full disk is a user error with the file's name."""
    files.write_text(tmp_path / "x", "old")
    with pytest.raises(KeyError), files.atomic(tmp_path / "x") as temporary:
        temporary.write_text("new")
        assert files.leftovers(tmp_path) == [(temporary, "x", os.getpid())]
        raise KeyError
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]
    with pytest.raises(UserError, match=r"x: cannot be written \(No space"), files.atomic(
            tmp_path / "x"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(("name", "wanted"), [
    (".a.json.123.tmp", ("a.json", 123)), (".b..7.tmp", ("b.", 7)), ("a.json.123.tmp", None),
    (".a.json.tmp", None), (".a.x.tmp", None), (".a.1.tmp2", None), ("..1.tmp", None)])
def test_temporary_files_are_known_by_their_names(tmp_path, name, wanted):
    """A dot, the name, the process and the suffix; folders are none."""
    (tmp_path / name).write_text("")
    (tmp_path / ".folder.5.tmp").mkdir()
    assert files.leftovers(tmp_path) == ([] if wanted is None else [(tmp_path / name, *wanted)])


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    """An empty folder is replaced, and a failed one leaves nothing."""
    target = tmp_path / "above" / "new"
    with files.new_folder(target) as temporary:
        (temporary / "x").write_text("1")
        assert not target.exists() and temporary.parent == target.parent
    assert (target / "x").read_text() == "1" and os.listdir(target.parent) == ["new"]
    with pytest.raises(UserError, match="new is not empty; give a new folder"), files.new_folder(
            target):
        raise AssertionError
    (tmp_path / "empty").mkdir()
    with files.new_folder(tmp_path / "empty") as temporary:
        (temporary / "y").write_text("2")
    assert os.listdir(tmp_path / "empty") == ["y"]
    with pytest.raises(UserError, match="x is a file; give a folder"), files.new_folder(
            target / "x"):
        raise AssertionError
    with pytest.raises(KeyError), files.new_folder(tmp_path / "failed"):
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["above", "empty"]


@pytest.mark.parametrize(("text", "kind", "words"), [
    ("{}", dict, ""), ("[]", list, ""), ("[]", dict, r"^f is '\[\]'; it must be a JSON object$"),
    ("{}", list, "^f is '{}'; it must be a list$"), ("{", dict, "^f is invalid JSON"),
    ("[" * 2000, list, "^f cannot be parsed .nested too deeply.$"),
    ("9" * 5000, dict, "^f cannot be parsed"),
], ids=lambda x: x[:9] if isinstance(x, str) else "")
def test_a_field_of_a_header_has_a_type(text, kind, words):
    """Invalid JSON, too deep JSON and other types have different messages."""
    if words:
        with pytest.raises(UserError, match=words):
            files.parse_field(text, "f", kind)
    else:
        assert files.parse_field(text, "f", kind) == kind()


@pytest.mark.parametrize(("spec", "shape", "ranges", "wanted"), [
    (Spec((4, 3, 6), ("heads", None, "embed"), 1), (12, 6), [(1, 3), (0, 3), (2, 4)],
     ((3, 9), (2, 4))),
    (Spec((6, 4, 3), ("embed", "heads", None), 2), (6, 12), [(0, 6), (2, 4), (0, 3)],
     ((0, 6), (6, 12))),
    (Spec((4, 3), ("heads", None)), (12,), [(1, 2), (0, 3)], ((3, 6),)),
    (Spec((5,), (None,)), (5,), [(0, 5)], ((0, 5),)),
    (Spec((4, 3, 6), ("heads", None, "embed"), 1), (12, 6), [(1, 3), (0, 2), (0, 6)], None),
], ids=str)
def test_a_shard_of_a_parameter_is_a_part_of_its_tensor(spec, shape, ranges, wanted):
    """Heads and their dimensions are one dimension in the file."""
    tensor = names.Tensor("w", shape, spec)
    if wanted is None:
        with pytest.raises(UserError, match="^w: a head cannot be sharded over devices$"):
            names.file_index(tensor, ranges)
    else:
        assert names.file_index(tensor, ranges) == tuple(slice(*pair) for pair in wanted)


def test_tensors_have_the_names_of_their_family():
    """With norms after attention and MLP, a name has another meaning."""
    plain, post = (jax.tree.leaves(names.tensors(s.tiny_config(post_norms=on))) for on in (
        False, True))
    assert [t.name.removeprefix("model.layers.0.") for t in plain if "layers.0." in t.name][-2:] \
        == ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    found = {t.name.removeprefix("model.layers.0.") for t in post if "layers.0.p" in t.name}
    assert found == {f"{name}_layernorm.weight" for name in (
        "post_attention", "pre_feedforward", "post_feedforward")}
    assert {t.name: t.shape for t in plain}["model.layers.1.self_attn.o_proj.weight"] == (32, 48)
    for name, on, wanted in (("input_layernorm", True, "attn_norm"),
                             ("post_attention_layernorm", False, "ffn_norm"),
                             ("post_attention_layernorm", True, "post_attention_norm"),
                             ("pre_feedforward_layernorm", True, "ffn_norm"),
                             ("post_feedforward_layernorm", True, "post_ffw_norm")):
        assert gguf_name(f"model.layers.12.{name}.weight", on) == f"blk.12.{wanted}.weight"
    assert gguf_name("model.layers.3.self_attn.q_proj.bias", False) == "blk.3.attn_q.bias"
    assert gguf_name("model.norm.weight", False) == "output_norm.weight"


@pytest.mark.parametrize(("count", "wanted"), [
    (1, "a0"), (6, "a0, a1, a2, a3, a4, a5"), (7, "a0, a1, a2, a3, a4, a5 and 1 more"),
    (9, "a0, a1, a2, a3, a4, a5 and 3 more")])
def test_six_names_are_listed_and_the_others_are_counted(count, wanted):
    """In sorted order."""
    assert shards.some({f"a{i}" for i in range(count)}) == wanted


def test_tensors_are_read_ahead_in_order():
    """At most four reads have begun before the first result is taken."""
    begun, lock = [], threading.Lock()

    def read(item):
        with lock:
            begun.append(item)
        return item * 2

    found = source.ahead(read, range(20))
    assert next(found) == 0 and len(begun) <= source.READERS + 1 == 4
    assert list(found) == [2 * i for i in range(1, 20)] and sorted(begun) == list(range(20))

    def broken(item):
        raise UserError(f"{item} is broken")

    with pytest.raises(UserError, match="0 is broken"):
        list(source.ahead(broken, range(3)))


def test_progress_of_a_load_counts_the_bytes_of_the_files(tmp_path):
    """Bytes in the file, not in the target dtype."""
    from jaxpersona.ckpts import hf

    config = s.tiny_config(n_layers=1, windows=(None,))
    params = s.random_params(config)
    hf.save(tmp_path, params, config)
    told = []
    hf.load(tmp_path, dtype="bfloat16", progress=lambda *numbers: told.append(numbers))
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    assert told == [(int(n), sum(sizes)) for n in np.cumsum(sizes)]


def gguf(*parts, tensors=0, fields=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + b"".join(parts)


def text(value):
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(("data", "words"), [
    (gguf(text(b"k"), struct.pack("<I", 13), fields=1), "a field has the unknown type 13"),
    (gguf(text(b"k"), struct.pack("<IIQ", 9, 9, 0), fields=1), "nested arrays are not supported"),
    (gguf(text(b"k"), struct.pack("<IIQ", 9, 13, 0), fields=1), "elements of the unknown type 13"),
    (gguf(text(b"k"), struct.pack("<IIQ", 9, 0, 8), b"x" * 8, fields=1),
     "an array declares 8 elements; the limit is 7"),
    (gguf(text(b"k"), struct.pack("<IIQ", 9, 0, 7), b"x" * 7, fields=1), ""),
], ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_of_a_gguf_header_is_checked(data, words):
    """Unknown types, nested arrays and too many elements."""
    if words:
        with pytest.raises(UserError, match=words):
            HeaderReader(data, 7).read_fields(lambda name: None)
    else:
        assert HeaderReader(data, 7).read_fields(lambda name: None)["k"].tolist() == [120] * 7


def test_a_tensor_of_a_gguf_header_has_its_shape_in_the_order_of_c():
    """The format lists the contiguous dimension first."""
    info = text(b"w") + struct.pack("<IQQIQ", 2, 6, 4, 8, 96)
    reader = HeaderReader(gguf(info, tensors=1), 0)
    (found,) = reader.read_tensors(24)
    assert (found.name, found.shape, found.kind, found.offset) == ("w", (4, 6), 8, 96)
    assert reader.at == 24 + len(info) and reader.version == 3
    with pytest.raises(UserError, match="the tensors declare 24 elements; the limit is 23"):
        HeaderReader(gguf(info, tensors=1), 0).read_tensors(23)
    for count, good in ((4, True), (5, False)):
        data = gguf(text(b"w"), struct.pack(f"<I{count}QIQ", count, *[1] * count, 0, 0), tensors=1)
        if good:
            assert HeaderReader(data, 0).read_tensors()[0].shape == (1,) * 4
        else:
            with pytest.raises(UserError, match="a tensor declares 5 dimensions; the limit is 4"):
                HeaderReader(data, 0).read_tensors()
    with pytest.raises(struct.error):
        HeaderReader(gguf(info[:-1], tensors=1), 0).read_tensors()
    with pytest.raises(struct.error):
        HeaderReader(gguf(struct.pack("<Q", 2), b"w", tensors=1), 0).read_tensors()


def test_a_field_after_the_architecture_is_not_read_if_it_is_not_supported():
    """The field after it has an unknown type."""
    seen = []
    data = gguf(text(b"general.architecture"), struct.pack("<I", 8), text(b"x"),
                text(b"k"), struct.pack("<I", 13), fields=2)

    def check(name):
        seen.append(name)
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        HeaderReader(data, 7).read_fields(check)
    assert seen == ["x"]
    kept = HeaderReader(data, 7).read_fields(seen.append, keep=None, count=1)
    assert kept == {"general.architecture": "x"} and seen == ["x", "x"]


def test_a_folder_is_no_source_of_names(tmp_path):
    """The shards of an index are files in its folder, and each tensor has one file."""
    (tmp_path / shards.INDEX).write_text(json.dumps({"weight_map": {"a": "x", "b": "x", "c": "y"}}))
    stored(tmp_path / "x", {"a": entry_of([1]), "d": {**entry_of([1]), "data_offsets": [1, 2]}},
           b"xx")
    entries, faults = shards.read_entries(tmp_path)
    assert list(entries) == ["a"] and sorted(faults) == [
        f"x: contains d, which {shards.INDEX} does not list for it",
        f"x: does not contain b, which {shards.INDEX} lists for it",
        f"y: missing; {shards.INDEX} lists it for c"]
    assert shards.read_entries(pathlib.Path(tmp_path / "absent")) == (
        {}, [f"neither {shards.SINGLE} nor {shards.INDEX} exists"])
