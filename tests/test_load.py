"""Names to models: folders, the embedded model, random weights, and every mistake in one line."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpersona.ckpts import hf

from jaxpersona.config import replace
from jaxpersona.load import load
from jaxpersona.params import init_params
from jaxpersona.presets import preset
from jaxpersona.sharding import make_mesh


@pytest.fixture
def folder(tmp_path):
    config = replace(preset("qwen3-mini"), n_layers=2, vocab_size=64)
    params = init_params(config, jax.random.key(1))
    hf.save(tmp_path / "m", params, config, extra_config={"eos_token_id": 5})
    return tmp_path / "m"


def test_a_folder_without_a_tokenizer(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    model = load(folder)
    assert model.stop_ids == (7, 5) and model.tokenizer is None and not model.template
    assert model.name == str(folder) and model.mesh is None
    assert model.params.embed_vd.dtype == jnp.float32


def test_dtype_and_mesh_leave_the_fingerprint_of_the_weights(folder):
    plain = load(folder)
    spread = load(folder, mesh=make_mesh(1, 2), dtype="bfloat16")
    assert spread.params.embed_vd.dtype == jnp.bfloat16
    assert spread.fingerprint == plain.fingerprint
    assert len(spread.params.embed_vd.sharding.device_set) == 2


def test_random_weights_are_the_same_on_a_mesh():
    one, two = load("random:qwen3-mini"), load("random:qwen3-mini", mesh=make_mesh(2, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one.params, two.params)


@pytest.mark.parametrize(("source", "options", "words"), [
    ("./absent", {}, "no such folder"),
    ("absent", {}, "no such folder"),
    ("owner/absent", {}, "the hub cannot be reached"),
    ("random:gpt-9", {}, "gpt-9"),
    ("random:qwen3-mini", {"dtype": "int8"}, "int8"),
])
def test_mistakes_are_one_line(source, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_or_has_a_broken_tokenizer(folder, tmp_path):
    with pytest.raises(ValueError, match="not a model folder"):
        load(tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ValueError, match="eos_token_id of generation_config.json is 'end'"):
        load(folder)


def test_transformers_is_not_imported_where_no_tokenizer_is_read(folder):
    code = (f"import sys; from jaxpersona.load import load; load({str(folder)!r}); "
            "assert not {'transformers', 'torch', 'huggingface_hub'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
