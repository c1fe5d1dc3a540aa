"""model=hf: folders and cached repos open without weights; everything else is refused at once, with a remedy."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from slm_exp.core.errors import ArchitectureError, CheckpointError, ConfigError
from slm_exp.models.hf import HF

CPU = torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tiny) -> Path:
    """A small checkpoint folder. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("hf") / "small"
    handle = make_tiny("qwen2", layers=3)
    handle.model.save_pretrained(folder)
    handle.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def mine(saved, tmp_path) -> Path:
    """A copy of the folder to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "small"))


def edit(folder: Path, **fields) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, **fields}))


def test_a_folder_opens_without_weights(saved, make_tiny, tokens):
    handle = HF(path=str(saved)).open(CPU, Path("unused"))
    assert (handle.name, handle.n_layers, handle.layout.family) == ("small", 3, "qwen2")
    assert handle.n_params == make_tiny("qwen2", layers=3).n_params
    assert handle.tokenizer("ab")["input_ids"] == make_tiny().tokenizer("ab")["input_ids"]
    assert not handle.loaded
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.no_grad():
        assert torch.equal(handle.model(ids).logits, make_tiny("qwen2", layers=3).model(ids).logits)
    assert not any(p.requires_grad for p in handle.model.parameters())


def test_identity_is_contents_not_place(saved, mine):
    here, there = HF(path=str(saved)), HF(path=str(mine), device="cuda", device_map="auto")
    assert here.identity() == there.identity()
    assert here.open(CPU, mine).digest == there.open(CPU, mine).digest
    assert str(saved) not in json.dumps(here.identity())
    before = here.identity()
    assert HF(path=str(saved), dtype="bfloat16").identity() != before
    edit(mine, rms_norm_eps=1e-3)
    assert there.identity() != before


def test_weights_are_hashed_once(mine, monkeypatch):
    from slm_exp.core.cache import digests

    read = []
    for name, value in (("SMALL", 0), ("SETTLED_NS", 0), ("_seen", {})):
        monkeypatch.setattr(digests, name, value)
    monkeypatch.setattr(digests, "file_digest", lambda p: read.append(p.name) or "x" * 16)
    HF(path=str(mine)).identity()
    first = list(read)
    assert "model.safetensors" in first
    HF(path=str(mine)).identity()
    assert read == first
    (mine / "model.safetensors").touch()
    HF(path=str(mine)).identity()
    assert read == [*first, "model.safetensors"]


def test_auto_dtype_is_the_saved_one(mine, make_tiny):
    handle = make_tiny(dtype="bfloat16", layers=2)
    handle.model.save_pretrained(mine)
    assert HF(path=str(mine), dtype="auto").open(CPU, mine).model.dtype == torch.bfloat16
    assert HF(path=str(mine)).open(CPU, mine).model.dtype == torch.float32


def test_a_sharded_folder_loads_and_a_missing_shard_is_named(mine, make_tiny, tokens):
    (mine / "model.safetensors").unlink()
    handle = make_tiny("qwen2", layers=3)
    handle.model.save_pretrained(mine, max_shard_size="50KB")
    shards = sorted(mine.glob("model-*.safetensors"))
    assert len(shards) > 1
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.no_grad():
        again = HF(path=str(mine)).open(CPU, mine).model(ids).logits
        assert torch.equal(again, handle.model(ids).logits)
    shards[0].unlink()
    with pytest.raises(ConfigError, match=rf"{shards[0].name} is missing; the checkpoint is incomplete"):
        HF(path=str(mine)).identity()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", r"model.path = ''; expected a folder or a Hugging Face repo id"),
        ("/nowhere/model", r"model.path = /nowhere/model; expected an existing folder or a repo id.*no such folder"),
        ("./model", r"model.path = ./model; expected an existing folder"),
        (__file__, r"expected a folder or a repo id, not a file"),
    ],
)
def test_a_path_that_is_nothing_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        HF(path=path).identity()


def test_revision_belongs_to_repos(saved):
    with pytest.raises(ConfigError, match=r"model.revision = main; expected null when model.path is a folder"):
        HF(path=str(saved), revision="main")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", r"only pickled weights \(pytorch_model.bin\), which can run code.*refs/pr/N"),
        ("consolidated.00.pth", r"only pickled weights"),
        ("adapter_config.json", r"a PEFT adapter.*merge_and_unload"),
        ("model.Q4_0.gguf", r"GGUF weights \(model.Q4_0.gguf\)"),
        ("notes.md", r"no model.safetensors here"),
    ],
)
def test_other_weights_are_refused(mine, file, message):
    if file != "adapter_config.json":
        (mine / "model.safetensors").unlink()
    (mine / file).write_bytes(b"{}")
    with pytest.raises(ConfigError, match=message):
        HF(path=str(mine)).open(CPU, mine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bloom"}, r"model_type = 'bloom' is not understood; known: arcee"),
        ({"model_type": "nonesuch"}, r"model_type = 'nonesuch' is not known to transformers"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config \(awq\)"),
        ({"skip_me": [1, 2, 3]}, r"skip_me = \[1, 2, 3\] has one entry per layer"),
    ],
)
def test_refused_before_the_weights_are_read(mine, fields, message):
    (mine / "model.safetensors").write_bytes(b"not weights")
    edit(mine, **fields)
    with pytest.raises(ArchitectureError, match=message):
        HF(path=str(mine)).open(CPU, mine)


def test_a_config_that_is_not_one(mine):
    (mine / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read"):
        HF(path=str(mine)).open(CPU, mine)


def test_weights_must_be_all_there_and_no_more(mine):
    edit(mine, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    with pytest.raises(CheckpointError, match=r"lack model.layers.3."):
        _ = HF(path=str(mine)).open(CPU, mine).model
    edit(mine, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    with pytest.raises(CheckpointError, match=r"hold, beyond what config.json counts, model.layers.2."):
        _ = HF(path=str(mine)).open(CPU, mine).model


def test_weights_of_another_shape_are_named_with_both(mine):
    wanted = json.loads((mine / "config.json").read_text())["intermediate_size"] + 8
    edit(mine, intermediate_size=wanted)
    shapes = rf"other shapes .*down_proj.weight \(\d+, {wanted - 8}\) for \(\d+, {wanted}\)"
    with pytest.raises(CheckpointError, match=shapes):
        _ = HF(path=str(mine)).open(CPU, mine).model


def test_a_folder_without_tokenizer(mine):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mine / name).unlink()
    assert HF(path=str(mine)).open(CPU, mine).tokenizer is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, r"num_hidden_layers = 0; .*greater than or equal to 1"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers = 1000000; .*less than or equal to 1000"),
        ({"num_hidden_layers": True}, r"num_hidden_layers = True"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers = 2.5"),
        ({"num_hidden_layers": [3]}, r"num_hidden_layers = \[3\]"),
        ({"hidden_size": -32}, r"hidden_size = -32"),
        ({"vocab_size": 10**30}, r"vocab_size = 1000000"),
        ({"num_attention_heads": "4"}, r"num_attention_heads = 4"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads = 3; expected a divisor of num_attention_heads = 4"),
        ({"hidden_act": "silo"}, r"hidden_act = 'silo'; expected one of .* Did you mean silu"),
        ({"hidden_act": 3}, r"hidden_act = 3"),
        ({"rms_norm_eps": "nan"}, r"rms_norm_eps = nan"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps = nan"),
        ({"attn_implementation": "me/kernel"}, r"attn_implementation = me/kernel; .*whose code would run"),
        ({"transformers_weights": "weights.bin"}, r"transformers_weights = weights.bin"),
    ],
)
def test_nonsense_in_config_is_known_before_anything_is_built(mine, fields, message, monkeypatch):
    (mine / "model.safetensors").write_bytes(b"not weights")
    edit(mine, **fields)
    for look in (HF(path=str(mine)).identity, lambda: HF(path=str(mine)).sketch(mine, "cpu")):
        with pytest.raises(ConfigError, match=message) as error:
            look()
        assert str(error.value).startswith(f"model.path = {mine}: config.json has ")
        assert "\n" not in str(error.value)
    with pytest.raises((ConfigError, ArchitectureError), match=message):
        HF(path=str(mine)).open(CPU, mine)


@pytest.mark.parametrize(
    "fields", [{"rope_parameters": {"rope_type": "nonesuch"}}, {"layer_types": 3}, {"dtype": "float7"},
               {"rope_parameters": 3}, {"layer_types": ["full_attention"] * 9}]
)
def test_what_only_building_the_model_shows_is_an_error_in_a_line(mine, fields):
    edit(mine, **fields)
    with pytest.raises((ConfigError, ArchitectureError)) as error:
        HF(path=str(mine)).open(CPU, mine)
    assert "\n" not in str(error.value)


def test_activations_are_those_of_transformers():
    from transformers.activations import ACT2FN

    from slm_exp.models.config_file import ACTIVATIONS

    assert set(ACTIVATIONS) == set(ACT2FN)


def sharded(folder: Path, names: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, r"no weights index"),
        ([], r"no weights index"),
        ({"weight_map": {}}, r"names no files"),
        ({"weight_map": {"a": "weights.bin"}}, r"names 'weights.bin'; expected names of .safetensors files"),
        ({"weight_map": {"a": "../outside.safetensors"}}, r"names '../outside.safetensors'"),
        ({"weight_map": {"a": "sub/inside.safetensors"}}, r"names 'sub/inside.safetensors'"),
        ({"weight_map": {"a": "/outside.safetensors"}}, r"names '/outside.safetensors'"),
        ({"weight_map": {"a": 3}}, r"names '3'"),
    ],
)
def test_an_index_names_safetensors_files_beside_it(mine, index, message):
    shutil.move(mine / "model.safetensors", mine.parent / "outside.safetensors")
    sharded(mine, index)
    for look in (HF(path=str(mine)).identity, lambda: HF(path=str(mine)).open(CPU, mine)):
        with pytest.raises(ConfigError, match=rf"model.safetensors.index.json {message}|{message}"):
            look()


def test_an_index_beside_a_single_file_is_not_looked_at_as_in_transformers(mine, make_tiny, tokens):
    before = HF(path=str(mine)).identity()
    sharded(mine, {"weight_map": {"a": "weights.bin"}})
    assert HF(path=str(mine)).identity() == before
    ids = torch.as_tensor(tokens.tokens_NT).long()
    with torch.no_grad():
        assert torch.equal(HF(path=str(mine)).open(CPU, mine).model(ids).logits,
                           make_tiny("qwen2", layers=3).model(ids).logits)
    other = make_tiny("qwen2", layers=3, seed=9)
    other.model.save_pretrained(mine)
    assert HF(path=str(mine)).identity() != before


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "tokenizer_config.json",
                                  "additional_chat_templates/tools.jinja"])
def test_identity_is_what_the_loader_opens(mine, name):
    before, digest = HF(path=str(mine)).identity(), HF(path=str(mine)).open(CPU, mine).digest
    (mine / "notes.md").write_text("not opened")
    (mine / "model.py").write_text("not trusted")
    assert HF(path=str(mine)).identity() == before
    (mine / name).parent.mkdir(exist_ok=True)
    (mine / name).write_text("{} ")
    assert HF(path=str(mine)).identity() != before
    if name.endswith("jinja"):
        assert HF(path=str(mine)).open(CPU, mine).digest != digest


def test_code_counts_where_it_is_trusted(mine):
    trusting = HF(path=str(mine), trust_remote_code=True)
    assert trusting.identity() != HF(path=str(mine)).identity()
    before = trusting.identity()
    (mine / "code").mkdir()
    (mine / "code" / "model.py").write_text("x = 1")
    assert trusting.identity() != before


def test_weights_that_are_not_whole_are_known_by_their_header(mine):
    whole = (mine / "model.safetensors").read_bytes()
    for contents, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", r"git-lfs pointer.*git lfs pull"),
        (whole[:-1], rf"has {len(whole) - 1} bytes; its header counts {len(whole)}.*download it again"),
        (whole + b"x", r"its header counts"),
        (whole[:100], r"has no safetensors header"),
        (b"", r"has no safetensors header"),
        (b"\xff" * 8 + whole[8:], r"has no safetensors header"),
    ):
        (mine / "model.safetensors").write_bytes(contents)
        for look in (HF(path=str(mine)).identity, lambda: HF(path=str(mine)).open(CPU, mine)):
            with pytest.raises(ConfigError, match=rf"model.path = {mine}: model.safetensors .*{message}"):
                look()


def test_a_sketch_reads_no_large_file(mine, monkeypatch):
    from slm_exp.core.cache import digests

    source = HF(path=str(mine))
    known = source.sketch(mine, "cpu")
    assert not source.unread_weights()
    assert known.digest == source.open(CPU, mine).digest
    for name, value in (("SMALL", 10_000), ("_seen", {}), ("file_digest", lambda p: pytest.fail(f"read {p}"))):
        monkeypatch.setattr(digests, name, value)
    assert source.unread_weights()
    large = source.sketch(mine, "cpu")
    assert large.digest.startswith("?")
    assert large.sizes == known.sizes
    assert "have not been read on this machine yet" in large.notes[0]


# --- repos -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty local Hugging Face cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached(hub: Path, repo: str, saved: Path) -> Path:
    at = hub / f"models--{repo.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(saved, at / "snapshots" / COMMIT))


def test_a_cached_repo_needs_no_network(hub_cache, saved):
    cached(hub_cache, "me/small", saved)
    handle = HF(path="me/small").open(CPU, hub_cache)
    assert handle.name == "me/small"
    assert handle.model.config.num_hidden_layers == 3
    pinned = HF(path="me/small", revision=COMMIT)
    assert pinned.open(CPU, hub_cache).digest == handle.digest
    assert HF(path="me/small").identity() == {"name": "hf", "repo": "me/small", "revision": None, "dtype": "float32"}
    assert pinned.identity()["revision"] == COMMIT


def test_offline_fails_at_once_and_says_what_to_do(hub_cache):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"model.path = me/none: .*HF_HUB_OFFLINE.*`hf download me/none`.*folder"):
        HF(path="me/none").open(CPU, hub_cache)
    assert time.monotonic() - start < 5
    assert HF(path="me/none").identity()["repo"] == "me/none"


def refusing(kind: type[Exception], monkeypatch) -> list[float]:
    """Make the hub answer every question with an error; returns the timeouts it was asked with."""
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    asked: list[float] = []

    def repo_info(self, *args, timeout=None, **kwargs):
        asked.append(timeout)
        if issubclass(kind, HfHubHTTPError):
            raise kind("no", response=SimpleNamespace(headers={}, request=None, status_code=403))
        raise kind("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return asked


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", r"the repo is gated. Accept its terms at https://huggingface.co/me/none.*hf auth login"),
        ("RevisionNotFoundError", r"\(revision v9\): the repo has no such revision"),
        ("RepositoryNotFoundError", r"no such repo on the hub, or it is private"),
        ("ConnectionError", r"the hub does not answer \(ConnectionError: no route\).*--revision v9.*copy the cache"),
    ],
)
def test_one_quick_question_then_an_answer(hub_cache, monkeypatch, error, message):
    import builtins

    from huggingface_hub import errors

    asked = refusing(getattr(errors, error, None) or getattr(builtins, error), monkeypatch)
    with pytest.raises(ConfigError, match=message):
        HF(path="me/none", revision="v9").open(CPU, hub_cache)
    assert len(asked) == 1
    assert asked[0] <= 5


def test_a_repo_of_pickles_is_refused_before_the_download(hub_cache, monkeypatch):
    from types import SimpleNamespace

    import huggingface_hub
    from huggingface_hub import constants

    files = [SimpleNamespace(rfilename=n) for n in ("config.json", "pytorch_model.bin")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info",
                        lambda *a, **k: SimpleNamespace(siblings=files, sha=COMMIT))  # fmt: skip
    with pytest.raises(ConfigError, match=r"model.path = me/old: has only pickled weights"):
        HF(path="me/old").open(CPU, hub_cache)


def test_weights_are_fetched_by_the_names_of_the_index(hub_cache, saved, monkeypatch):
    """Not by pattern: some repos hold a second copy of all weights under another name."""
    from slm_exp.core import hub

    folder = cached(hub_cache, "me/small", saved)
    (folder / "model.safetensors").unlink()
    asked = {}

    def folder_of(repo, patterns, complete, vet=None):
        asked.update(revision=repo.revision, patterns=patterns)
        shutil.copy(saved / "model.safetensors", folder)
        return folder

    handle = HF(path="me/small").open(CPU, hub_cache)
    monkeypatch.setattr(hub.Repo, "folder", folder_of)
    assert handle.model.config.num_hidden_layers == 3
    assert "model.safetensors" in asked["patterns"]
    assert not any("*.safetensors" in p for p in asked["patterns"])
    assert asked["revision"] == COMMIT
