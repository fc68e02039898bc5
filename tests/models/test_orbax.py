"""Orbax folders: bit-exact round trips, on and off a mesh, and an error for every damage."""

import json
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jax.sharding import PartitionSpec as P
from jaxpersona.ckpts import hf, names, orbax

import jaxpersona as jp
from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.models.params import Spec, fingerprint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a float32 folder, its parameters and its configuration."""
    config = s.tiny_config(vocab_size=96)  # divisible by the mesh
    params = s.random_params(config)
    folder = tmp_path_factory.mktemp("orbax") / "m"
    orbax.save(folder, params, config)
    return folder, params, config


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bit_exact(dtype, tied, tmp_path):
    config = s.tiny_config(tied_embeddings=tied, qkv_bias=True, o_bias=True)
    params = s.random_params(config, 1, dtype)
    orbax.save(tmp_path / "m", params, config)
    found, shape = orbax.load(tmp_path / "m")
    assert shape == config
    assert s.differing(found, params) == []
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    again = s.random_params(config, 2, dtype)
    orbax.save(tmp_path / "m", again, config)  # replaces the existing checkpoint
    assert s.differing(orbax.load(tmp_path / "m")[0], again) == []


def test_a_mesh_may_come_and_go(saved, tmp_path):
    folder, params, config = saved
    spread, _ = orbax.load(folder, mesh=make_mesh(2, 2))
    assert spread.layers[0].wo_dnh.sharding.spec == P(None, "model", None)
    assert len(spread.layers[0].wo_dnh.sharding.device_set) == 4
    assert s.differing(spread, params) == []
    orbax.save(tmp_path / "m", spread, config)
    back, _ = orbax.load(tmp_path / "m")
    assert len(back.embed_vd.sharding.device_set) == 1
    assert s.differing(back, params) == []


def test_another_dtype_is_cast_where_it_is_asked_for_by_name(saved):
    folder, params, _ = saved
    found, _ = orbax.load(folder, dtype="bfloat16")
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert s.differing(found, wanted) == []
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        orbax.load(folder, dtype="int8")


def test_load_of_the_library_reads_the_folder(saved):
    folder, params, config = saved
    model = jp.load(folder)
    assert model.config == config and model.fingerprint == fingerprint(config, params)
    assert s.differing(model.params, params) == []


def test_faults_are_named(saved, tmp_path):
    folder, params, config = saved
    with pytest.raises(ValueError, match="no such folder"):
        orbax.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="not a model folder"):
        orbax.load(tmp_path)
    hf.save(tmp_path / "hf", params, config)
    with pytest.raises(ValueError, match="not an Orbax folder"):
        orbax.load(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"model.norm.weight: float32\[3\], expected \[32\]"):
        orbax.save(tmp_path / "m", params.replace(final_norm_d=jnp.ones(3)), config)
    assert not (tmp_path / "m").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        orbax.save(tmp_path / "file" / "m", params, config)


def test_a_config_of_another_shape_is_refused(tmp_path):
    config = s.tiny_config()
    orbax.save(tmp_path, s.random_params(config), config)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"intermediate_size": 50, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError) as caught:
        orbax.load(tmp_path)
    for part in ("missing arrays: model.layers.3.", "model.layers.0.mlp.up_proj.weight: shape "
                 "[48, 32], expected [50, 32]", str(tmp_path)):
        assert part in str(caught.value)
    raw |= {"intermediate_size": 48, "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="unexpected arrays: model.layers.2.input_layernorm"):
        orbax.load(tmp_path)


@pytest.mark.parametrize(("changes", "words"), [
    ({}, []), ({".scale": ((4, 3, 2), "float16")}, []), ({".made_from": ((3, 2), "uint32")}, []),
    ({".scale": ((4, 3, 4), "float16")}, [".scale: float16[4, 3, 4], expected a float array of"]),
    ({".scale": ((3, 4), "float32")}, [".scale: float32[3, 4], expected a float array of"]),
    ({".scale": ((4, 3), "int8")}, [".scale: int8[4, 3], expected a float array of"]),
    ({".made_from": ((2, 2), "uint32")}, [".made_from: uint32[2, 2], expected uint32[3, 2]"]),
    ({"": ((4, 3, 6), "int32")}, [": dtype int32, expected float32"]),
    ({"": ((4, 3, 5), "int8")}, [": shape [4, 3, 5], expected [4, 3, 6]"]),
], ids=str)
def test_the_parts_of_an_int8_weight_are_checked(changes, words):
    """A weight [4, 3, 6] has scales [4, 3], or [4, 3, n] for n blocks of its six inputs."""
    parts = {"": ((4, 3, 6), "int8"), ".scale": ((4, 3), "float32"), **changes}
    stored = {f"w{suffix}": types.SimpleNamespace(shape=shape, dtype=np.dtype(kind))
              for suffix, (shape, kind) in parts.items()}
    tensor = names.Tensor("w", (12, 6), Spec((4, 3, 6), ("heads", None, "embed"), 1))
    found = orbax._faults(tensor, stored)
    assert [f[:len("w" + word)] for f, word in zip(found, words, strict=True)] == [
        f"w{word}" for word in words]


_REFUSED = """
import sys
import jax
from jaxpersona.ckpts import orbax
try:
    jax.block_until_ready(orbax.load(sys.argv[1]))
except ValueError as error:
    print(error)
"""


def test_a_damaged_checkpoint_is_refused_in_words(tmp_path):
    """Use a separate process.

    When a read fails, Orbax does not await the others, and TensorStore may then report the closed
    event loop during a later test.
    """
    config = s.tiny_config()
    orbax.save(tmp_path, s.random_params(config), config)
    held = [p for p in (tmp_path / "params").rglob("*") if p.is_file() and p.parent.name == "d"]
    assert held
    for path in held:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ended = subprocess.run([sys.executable, "-c", _REFUSED, tmp_path], capture_output=True,
                           text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert f"{tmp_path}: the checkpoint cannot be read" in ended.stdout
    (tmp_path / "params" / "_METADATA").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        orbax.load(tmp_path)


def test_a_pipe_in_a_checkpoint_is_not_waited_for(saved, tmp_path):
    import os
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(saved[0], folder)
    (folder / "params" / "_METADATA").unlink()
    os.mkfifo(folder / "params" / "_METADATA")
    (folder / "params" / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(ValueError, match="_METADATA: cannot be read .it is a pipe"):
        orbax.load(folder)


def test_an_interrupted_save_is_not_taken_for_a_model(tmp_path, monkeypatch):
    config = s.tiny_config()
    orbax.save(tmp_path / "m", s.random_params(config), config)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax.files, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        orbax.save(tmp_path / "m", s.random_params(config, 1), config)
    assert not (tmp_path / "m" / "config.json").exists()
