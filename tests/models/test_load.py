"""Loading models by name: folders, the embedded model, random weights, and one-line errors."""

import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import hf
from jaxpersona.ckpts.loading import load

import jaxpersona as jp
from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.models.config import replace
from jaxpersona.models.params import init_params
from jaxpersona.models.presets import preset


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


@pytest.mark.parametrize("name", ["gemma-2-2b", "qwen3-0.6b"])
def test_fresh_norms_multiply_by_one_and_weights_are_small(name):
    """Test a model with an offset in its norm weights and one without."""
    config = replace(preset(name), n_layers=1, vocab_size=512, d_model=128, d_ff=256)
    layer = init_params(config, jax.random.key(3)).layers[0]
    for field in ("attn_norm_d", "mlp_norm_d", "q_norm_h", "attn_post_norm_d"):
        weight = getattr(layer, field)
        if weight is not None:
            np.testing.assert_array_equal(weight + config.norm_offset, np.ones(weight.shape))
    for weight in (layer.wq_nhd, layer.w_down_df):
        assert np.std(weight) == pytest.approx(0.02, rel=0.05) and abs(np.mean(weight)) < 1e-3


def test_random_weights_are_the_same_on_a_mesh():
    one, two = load("random:qwen3-mini"), load("random:qwen3-mini", mesh=make_mesh(2, 2))
    chex.assert_trees_all_close(one.params, two.params, rtol=1e-6)


@pytest.mark.parametrize(("source", "options", "words"), [
    ("./absent", {}, "no such folder"),
    ("absent", {}, "no such folder"),
    ("owner/absent", {}, "the Hugging Face Hub is unreachable"),
    ("random:gpt-9", {}, "gpt-9"),
    ("random:qwen3-mini", {"dtype": "int4"}, "int4"),
    ("random:qwen3-mini", {"dtype": "int8", "tables": "int4"}, "tables is 'int4'"),
    ("random:qwen3-mini", {"dtype": "int8", "activations": "int8"}, "activations: dtype is"),
    ("random:qwen3-mini", {"tables": "float"}, "applies only to dtype='int8'"),
    ("mini", {"revision": "main"}, "mini is not a Hub repository; omit revision"),
    ("random:qwen3-mini", {"revision": "main"}, "not a Hub repository"),
    ("./absent", {"revision": "main"}, "not a Hub repository"),
    ("owner/m@v1", {"revision": "v2"}, "two revisions"),
    ("owner/m@", {}, "no such folder"),
    ("x" * 300, {}, "cannot be read .File name too long"),
    ("./" + "x" * 300, {}, "cannot be read .File name too long"),
    ("~nobody-of-that-name/x", {}, "no such folder"),
    ("owner/m@v1", {}, "owner/m@v1.*HF_HUB_OFFLINE is set"),
])
def test_mistakes_are_one_line(source, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        load(source, **options)
    assert "\n" not in str(caught.value)


def hub_error(name):
    """Return a huggingface_hub error with the response that causes it."""
    from huggingface_hub import errors

    kind = getattr(errors, name)
    if not issubclass(kind, errors.HfHubHTTPError):
        return kind("said\nthe hub")
    httpx = pytest.importorskip(errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0])
    reply = httpx.Response(401, request=httpx.Request("GET", "https://huggingface.co/owner/m"))
    return kind("said\nthe hub", response=reply)


@pytest.mark.parametrize(("error", "words"), [
    ("GatedRepoError", "gated; accept its terms on huggingface.co and log in with `hf auth login`"),
    ("RepositoryNotFoundError", "no such repository on the Hugging Face Hub.*`hf auth login`"),
    ("RevisionNotFoundError", "unknown revision; give a branch, tag or commit"),
    ("LocalEntryNotFoundError", "not in the local cache.*download the model first"),
    ("OfflineModeIsEnabled", "the Hugging Face Hub is unreachable"),
    ("HFValidationError", "the download failed .said the hub."),
    ("EntryNotFoundError", "download failed"), ("DisabledRepoError", "download failed"),
    ("HfHubHTTPError", "the download failed .said the hub"),
])
def test_what_the_hub_says_is_one_line(monkeypatch, error, words):
    """Each class of hub error has a message with the repository and its revision."""
    import huggingface_hub

    asked = []

    def refuse(name, **options):
        asked.append((name, options["revision"]))
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for source, revision in (("owner/m@9f3c", None), ("owner/m", "9f3c"), ("owner/m@9f3c", "9f3c")):
        with pytest.raises(ValueError, match=f"owner/m@9f3c: .*{words}") as caught:
            load(source, revision=revision)
        assert "\n" not in str(caught.value)
    assert asked == [("owner/m", "9f3c")] * 3


def test_no_network_is_told_from_offline_mode(monkeypatch):
    """The message differs between offline mode and a missing network connection."""
    import huggingface_hub

    def refuse(name, **options):
        raise hub_error("LocalEntryNotFoundError")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for offline, words in ((True, "HF_HUB_OFFLINE is set"), (False, "no network")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match=words):
            load("owner/m")


def test_a_pinned_repository_is_loaded_from_its_snapshot(monkeypatch, folder):
    """The revision is passed to the hub, and the model keeps the requested name."""
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.update(options, name=name) or str(folder))
    assert load("owner/m@9f3c").name == "owner/m@9f3c"
    assert asked["name"] == "owner/m" and asked["revision"] == "9f3c"
    assert "*.safetensors" in asked["allow_patterns"]


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


def test_what_is_fetched_is_what_is_read(monkeypatch, folder):
    """Duplicate weights, adapters and files of other programs are not downloaded."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.update(options) or str(folder))
    load("owner/m")
    wanted = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors",
              "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "tokenizer.model", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    others = ["consolidated.safetensors", "consolidated.00.pth", "consolidated-00001.safetensors",
              "adapter_model.safetensors", "original/params.json",
              "checkpoint-500/model.safetensors", "onnx/config.json",
              "pytorch_model.bin", "README.md"]
    found = filter_repo_objects([*wanted, *others], allow_patterns=asked["allow_patterns"],
                                ignore_patterns=asked["ignore_patterns"])
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(("raw", "words"), [
    ({"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 8},
     "a LoRA adapter of 'owner/base', not a model.*adapter=FOLDER"),
    ({"peft_type": "IA3"}, "a PEFT adapter .'IA3'., not a model.*merge_and_unload"),
    ({"base_model_name_or_path": ["x"]}, "a LoRA adapter, not a model"), ([], "a LoRA adapter"),
])
def test_an_adapter_is_called_one(tmp_path, raw, words):
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(16))
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("files", "words"), [
    (("b.gguf", "a.gguf"), "no config.json.; to load a.gguf, give the file's path"),
    (("config.json", "pytorch_model.bin"), "convert the PyTorch file pytorch_model.bin to safet"),
])
def test_a_folder_with_another_kind_of_file_says_what_to_do(folder, tmp_path, files, words):
    other = tmp_path / "other"
    other.mkdir()
    for name in files:
        (other / name).write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=words):
        load(other)


def test_the_authors_own_layout_is_called_that(tmp_path):
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ValueError, match="params.json without config.json"):
        load(tmp_path)


def test_generation_settings_that_are_not_followed_are_named_once(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({
        "eos_token_id": 7, "repetition_penalty": 1.1, "top_k": 20, "do_sample": True,
        "temperature": 0.7, "no_repeat_ngram_size": 3, "num_beams": 1, "suppress_tokens": [],
        "bad_words_ids": [[4]], "min_length": 0, "transformers_version": "4.43"}))
    with pytest.warns(UserWarning, match="ignored repetition_penalty=1.1, no_repeat_ngram_size=3, "
                                         r"bad_words_ids=\[\[4\]\], top_k=20, which") as warned:
        assert load(folder).stop_ids == (7, 5)
    assert len(warned) == 1 and str(path) in str(warned[0].message)
    for quiet in ({"do_sample": False, "top_k": 20}, {"do_sample": True, "top_k": 50},
                  {"temperature": 0.6, "top_p": 0.9, "do_sample": True}, {"min_length": None}):
        path.write_text(json.dumps(quiet))
        load(folder)  # warnings are errors in this test suite


def test_a_tokenizer_that_panics_is_named(checkpoint, tmp_path, capfd):
    """On some regular expressions, the tokenizers library panics instead of raising."""
    copied = tmp_path / "m"
    copied.mkdir()
    for path in checkpoint.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    table = json.loads((copied / "tokenizer.json").read_text())
    table["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"(?:[^z]|[^z]|[^z])*(?<=q)"},
                              "behavior": "Isolated", "invert": False}
    (copied / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="the tokenizer cannot be read") as caught:
        load(copied)
    assert str(copied) in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


def test_transformers_is_not_imported_where_no_tokenizer_is_read(folder):
    code = (f"import sys; from jaxpersona.ckpts.loading import load; load({str(folder)!r}); "
            "assert not {'transformers', 'torch', 'huggingface_hub'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_that_try_tokenizers_leave_standard_error_as_it_was():
    """The second thread must not mistake the first thread's redirected stream for the original."""
    code = """
import os, threading
from jaxpersona.ckpts.tokenizer import _without_stderr
first, second = threading.Event(), threading.Event()

def one():
    with _without_stderr():
        first.set()
        second.wait(0.5)  # for the other thread to enter, if it can

def two():
    first.wait()
    with _without_stderr():
        second.set()
        threads[0].join(0.5)

threads = [threading.Thread(target=f) for f in (one, two)]
[t.start() for t in threads]
[t.join() for t in threads]
os.write(2, b"still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and done.stderr.endswith("still here"), done


def test_a_named_tokenizer_is_read_without_the_configurations_class(checkpoint):
    """The result is the one that transformers gives with the model's configuration."""
    from jaxpersona.ckpts.tokenizer import _named_class, read_tokenizer
    from transformers import AutoTokenizer

    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    assert isinstance(settings["tokenizer_class"], str)
    named = _named_class(checkpoint)["config"]
    assert named.model_type == "qwen3" and named.name_or_path == str(checkpoint)
    own = read_tokenizer(checkpoint)
    theirs = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True,
                                           trust_remote_code=False)
    assert type(own) is type(theirs) and own.get_vocab() == theirs.get_vocab()
    assert own.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert own.special_tokens_map == theirs.special_tokens_map
    assert own.chat_template == theirs.chat_template


@pytest.mark.parametrize(("file", "changes"), [
    ("tokenizer_config.json", {"tokenizer_class": None}), ("config.json", {"model_type": 3}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
], ids=["no class", "no type", "remote code"])
def test_any_other_tokenizer_is_left_to_transformers(tmp_path, file, changes):
    from jaxpersona.ckpts.tokenizer import _named_class

    files = {"tokenizer_config.json": {"tokenizer_class": "X"}, "config.json": {"model_type": "x"}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content | (changes if name == file else {})))
    assert _named_class(tmp_path) == {}


def test_a_folder_of_links_is_read_like_its_files(folder, tmp_path):
    """As in the cache of the Hugging Face Hub, where snapshots contain links to blobs."""
    s.byte_tokenizer().save_pretrained(folder)
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        (blobs / f"{i:040x}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i:040x}")
    one, other = load(folder), load(snapshot)
    assert other.fingerprint == one.fingerprint and other.stop_ids == one.stop_ids
    assert other.template and other.tokenizer.get_vocab() == one.tokenizer.get_vocab()


def test_added_tokens_and_a_vocabulary_that_is_padded_for_the_weights(tmp_path):
    """Ids of the padding have no token; tokens that were added later are matched whole."""
    tokenizer = s.byte_tokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    config = replace(preset("qwen3-mini"), n_layers=1, vocab_size=320)
    hf.save(tmp_path, init_params(config, jax.random.key(1)), config)
    tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert len(model.tokenizer) == 260 < model.config.vocab_size == len(model.params.embed_vd)
    ids = model.tokenizer("a<think>b<|call|>").input_ids
    assert ids[1::2] == [258, 259] and ids == tokenizer("a<think>b<|call|>").input_ids
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    logits = jp.forward(model.params, model.config, jp.batch([[*ids, 319]])).logits
    assert logits.shape[-1] == 320 and np.isfinite(logits).all()
    reply = jp.generate(model, [ids], max_new_tokens=4).tokens[0]
    assert isinstance(model.tokenizer.decode(reply), str)
