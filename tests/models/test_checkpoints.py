"""Checkpoint folders: bit-exact round trips, and an error for every kind of damage."""

import hashlib
import json
import os
import random

import chex
import hf as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jaxpersona.ckpts import files, hf, tensorfile
from jaxpersona.ckpts.tensorfile import read_header, read_slice
from safetensors.numpy import save_file

from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.errors import UserError
from jaxpersona.models.params import init_params

TORCH = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def tensors(folder):
    """Return every tensor in a folder's files, by name."""
    entries, faults = hf.read_entries(folder)
    assert not faults
    return {name: read_slice(entry) for name, entry in entries.items()}


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shard", [None, 30_000])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_through_transformers_is_bit_exact(dtype, shard, tied, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    made = oracle.model("qwen3", tie_word_embeddings=tied, attention_bias=True)
    oracle.cast(made, getattr(torch, dtype))
    made.save_pretrained(tmp_path / "a", max_shard_size=shard or "5GB")
    assert (tmp_path / "a" / hf.INDEX).exists() == bool(shard)
    params, config = hf.load(tmp_path / "a"), hf.read_config(tmp_path / "a")[0]
    assert params.embed_vd.dtype == jnp.dtype(dtype)
    hf.save(tmp_path / "b", params, config, shard_bytes=shard or 5e9)
    assert (tmp_path / "b" / hf.INDEX).exists() == bool(shard)
    assert hf.read_config(tmp_path / "b")[0] == config
    a, b = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert set(a) == set(b)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=False)
    assert back.dtype == getattr(torch, dtype)
    state = back.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a folder with two shards, its configuration and its parameters."""
    folder = tmp_path_factory.mktemp("small")
    settings = oracle.config("qwen3", num_hidden_layers=2, hidden_size=8, head_dim=4,
                             intermediate_size=8, vocab_size=16)
    config = hf.from_hf(settings.to_dict() | {"architectures": ["Qwen3ForCausalLM"]})
    params = init_params(config, jax.random.key(0))
    hf.save(folder, params, config, shard_bytes=3000)
    assert (folder / hf.INDEX).exists()
    return folder, config, params


def test_no_shard_of_several_tensors_exceeds_the_limit(small, tmp_path):
    _, config, params = small
    sizes = [x.nbytes for x in jax.tree.leaves(params)]
    for limit in (max(sizes) - 1, 1000, 3000):
        hf.save(tmp_path, params, config, shard_bytes=limit)
        shards = [[entry.size for entry in read_header(path)[0].values()]
                  for path in tmp_path.glob("model-*.safetensors")]
        assert sorted(size for shard in shards for size in shard) == sorted(sizes)
        assert all(len(shard) == 1 or sum(shard) <= limit for shard in shards)


def copy(folder, to):
    """Copy a folder's files."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_load_onto_a_mesh_reads_the_same_numbers(small):
    folder, config, params = small
    seen = []
    loaded = hf.load(folder, mesh=make_mesh(2, 2), progress=lambda *at: seen.append(at))
    chex.assert_trees_all_equal(loaded, params)
    assert loaded.layers[0].wo_dnh.sharding.spec == P(None, "model", None)
    assert seen[-1][0] == seen[-1][1] == config.bytes(4)


@pytest.mark.parametrize("to", TORCH)
@pytest.mark.parametrize("piece", [1 << 23, 20])  # 20 bytes do not evenly divide most tensors
def test_load_casts_to_a_dtype(to, piece, small, monkeypatch):
    monkeypatch.setattr(tensorfile, "_PIECE", piece)
    folder, _, params = small
    loaded = hf.load(folder, dtype=to if to != "bfloat16" else jnp.bfloat16)
    wanted = jax.tree.map(lambda x: x.astype(to), params)
    chex.assert_trees_all_equal(loaded, wanted)


def test_the_bytes_of_a_tensor_are_read_in_pieces(small, monkeypatch):
    monkeypatch.setattr(tensorfile, "_PIECE", 20)
    path = min(small[0].glob("model-*.safetensors"))
    data = path.read_bytes()
    entries = read_header(path)[0].values()
    for entry in entries:
        pieces = list(tensorfile.read_bytes_of(entry))
        assert b"".join(pieces) == data[entry.start : entry.start + entry.size]
        assert max(map(len, pieces)) <= 20 and len(pieces) == -(-entry.size // 20)
    assert max(entry.size for entry in entries) > 40


def edit(path, change):
    """Rewrite a file's safetensors header."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_all_faults_are_named_at_once(small, tmp_path):
    folder = copy(small[0], tmp_path / "m")
    first, *others = sorted(folder.glob("model-*.safetensors"))
    index = json.loads((folder / hf.INDEX).read_text())
    where = index["weight_map"]
    gone = "model.layers.1.mlp.up_proj.weight"
    where["model.layers.9.mlp.up_proj.weight"] = where.pop(gone)
    where["other.weight"] = "absent.safetensors"
    (folder / hf.INDEX).write_text(json.dumps(index))
    norm = "model.layers.0.input_layernorm.weight"

    def change(header):
        header[norm]["shape"] = [2, 4]
        header["model.embed_tokens.weight"]["dtype"] = "I32"

    edit(first, change)
    others[-1].write_bytes(others[-1].read_bytes()[:-8])
    with pytest.raises(ValueError) as caught:
        hf.load(folder)
    for part in ("missing tensors: ", gone, "model.layers.9.mlp.up_proj.weight",
                 "absent.safetensors", f"{norm}: shape [2, 4], expected [8]", "dtype I32",
                 "truncated", others[-1].name):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="truncated"):
        hf.verify(folder)


@pytest.mark.parametrize(("damage", "words"), [
    (lambda f: (f / "config.json").unlink(), "not a model folder"),
    (lambda f: (f / "config.json").write_text("{"), "invalid JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    (lambda f: (f / hf.INDEX).write_text("{"), "corrupt"),
    (lambda f: (f / hf.INDEX).write_text('{"weight_map": {"a": "../b"}}'), "corrupt"),
    (lambda f: (f / hf.INDEX).unlink(), "neither"),
])
def test_faults_of_a_folder(damage, words, small, tmp_path):
    folder = copy(small[0], tmp_path / "m")
    damage(folder)
    with pytest.raises(ValueError, match=words):
        hf.load(folder)


def test_harmless_extras_pass_and_others_are_named(small, tmp_path):
    _, config, params = small
    hf.save(tmp_path, params, config)
    file = tmp_path / hf.SINGLE

    def add(name):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        at = len(data) - 8 - length
        file.write_bytes(data + bytes(16))
        spec = {"dtype": "F32", "shape": [4], "data_offsets": [at, at + 16]}
        edit(file, lambda header: header.update({name: spec}))

    add("model.layers.0.self_attn.rotary_emb.inv_freq")
    hf.load(tmp_path)
    add("model.layers.0.surprise.weight")
    with pytest.raises(ValueError, match="unexpected tensors: model.layers.0.surprise.weight"):
        hf.load(tmp_path)


def test_a_tensor_in_a_shard_that_the_index_does_not_list_is_named(small, tmp_path):
    folder = copy(small[0], tmp_path / "m")
    first = min(folder.glob("model-*.safetensors"))
    name = next(iter(read_header(first)[0]))
    data = first.read_bytes()
    at = len(data) - 8 - int.from_bytes(data[:8], "little")
    first.write_bytes(data + bytes(16))
    spec = {"dtype": "F32", "shape": [4], "data_offsets": [at, at + 16]}
    edit(first, lambda header: header.update({f"{name}.copy": spec}))
    with pytest.raises(ValueError, match=f"contains {name}.copy, which .* does not list for it"):
        hf.load(folder)


TWO = '"dtype": "F32", "shape": [2], "data_offsets"'


@pytest.mark.parametrize(("header", "size", "words"), [
    (f'"a": {{{TWO}: [0, 8]}}, "a": {{{TWO}: [8, 16]}}', 16, r"corrupt header \(duplicate name\)"),
    (f'"a": {{{TWO}: [0, 8]}}, "b": {{{TWO}: [8, 16]}}', 20, "bytes after the last tensor: 4"),
    (f'"a": {{{TWO}: [0, 8]}}, "b": {{{TWO}: [4, 12]}}', 12, "byte ranges overlap or leave a gap"),
    (f'"a": {{{TWO}: [0, 8]}}, "b": {{{TWO}: [12, 20]}}', 20, "byte ranges overlap or leave a gap"),
    (f'"a": {{{TWO}: [0, 12]}}', 12, r"F32 \[2\] does not match its byte range .*: 12\)"),
    ('"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}', 1, "a: unknown dtype 'F4'"),
    (f'"__metadata__": {{"x": 1}}, "a": {{{TWO}: [0, 8]}}', 8, "metadata values must be strings"),
], ids=lambda value: value if isinstance(value, str) and "{" not in value else "")
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path, header, size, words):
    text = f"{{{header}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ValueError, match=f"x.safetensors: this .* cannot be read .*{words}"):
        files.read_entries(tmp_path / "x.safetensors")


def test_verify_compares_hashes(small):
    folder = small[0]
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.glob("*.safetensors")}
    assert hf.verify(folder, sums) == {name: (folder / name).stat().st_size for name in sums}
    with pytest.raises(ValueError, match="sha256"):
        hf.verify(folder, dict.fromkeys(sums, "0" * 64))
    with pytest.raises(ValueError, match="absent.json: no such file"):
        hf.verify(folder, {**sums, "absent.json": "0" * 64})


def test_verify_takes_hashes_in_capitals(small):
    folder = small[0]
    sums = {p.name: hashlib.sha256(p.read_bytes()).hexdigest().upper()
            for p in folder.glob("*.safetensors")}
    assert sums and set(hf.verify(folder, sums)) == set(sums)


def test_save_replaces_another_model_and_refuses_what_does_not_fit(small, tmp_path):
    folder, config, params = copy(small[0], tmp_path / "m"), *small[1:]
    hf.save(folder, params, config)
    assert [p.name for p in sorted(folder.iterdir())] == ["config.json", hf.SINGLE]
    assert read_header(folder / hf.SINGLE)[1] == {"format": "pt"}
    with pytest.raises(ValueError, match="model.norm.weight"):
        hf.save(folder, params.replace(final_norm_d=jnp.ones(3)), config)
    with pytest.raises(ValueError, match=r"norm.weight: int32\[8\], expected \[8\] in float32"):
        hf.save(folder, params.replace(final_norm_d=jnp.ones(8, jnp.int32)), config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        hf.save(tmp_path / "file" / "m", params, config)


@pytest.mark.filterwarnings("ignore:.*ignored:UserWarning")  # unknown keys in a damaged config.json
def test_a_thousand_corruptions_end_in_a_clear_error_or_a_load(small, tmp_path):
    folder = copy(small[0], tmp_path / "m")
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw = random.Random(0)
    refused = 0
    for _ in range(1000):
        name = draw.choice(sorted(original))
        data = bytearray(original[name])
        kind = draw.choice(("flip", "header", "cut", "insert", "swap"))
        limit = len(data) if kind == "flip" else min(len(data), 600)
        at = draw.randrange(limit)
        if kind in ("flip", "header"):
            for _ in range(draw.choice((1, 1, 4))):
                data[draw.randrange(limit)] = draw.randrange(256)
        elif kind == "cut":
            del data[draw.randrange(len(data)):]
        elif kind == "insert":
            data[at:at] = draw.choice((b"9", b"-", b"null", b'"', b"{", b"[]", b"1e9", b"\xff"))
        else:
            end = draw.randrange(at, limit)
            data[at:end] = data[at:end][::-1]
        (folder / name).write_bytes(data)
        try:
            jax.block_until_ready(hf.load(folder))
        except ValueError as error:
            refused += 1
            assert str(folder) in str(error)
        (folder / name).write_bytes(original[name])
    assert refused > 500


@pytest.mark.parametrize("index", [(), (slice(1, 3),), (slice(None), slice(1, 2))])
def test_a_file_that_shrinks_after_its_header_was_read_is_named(tmp_path, index):
    """Reading rows or columns of a tensor whose bytes are missing is a user's error."""
    path = tmp_path / "m.safetensors"
    save_file({"w": np.arange(12, dtype=np.float32).reshape(4, 3)}, path)
    entry = read_header(path)[0]["w"]
    np.testing.assert_array_equal(read_slice(entry, index),
                                  np.arange(12, dtype=np.float32).reshape(4, 3)[index])
    os.truncate(path, entry.start + entry.size - 1)
    if index == (slice(1, 3),):  # these rows are still complete
        os.truncate(path, entry.start + 3 * 3 * 4 - 1)
    with pytest.raises(UserError, match=r"m.safetensors: cannot be read \(the file ends"):
        read_slice(entry, index)
