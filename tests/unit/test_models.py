"""A model folder that can't be loaded is refused in one line, by doctor, dry runs and starts alike."""

from __future__ import annotations

import json
import logging
import struct
import warnings

import pytest

from birbal_ray import doctor, models
from birbal_ray.settings import sha256_of
from birbal_ray.storage import RunError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1234\n"


def safetensors(num_bytes=8):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * num_bytes


@pytest.fixture
def complete(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors())
    return folder


def test_a_complete_folder_is_taken_and_its_fingerprint_follows_its_files(complete):
    before = models.resolve_model(str(complete)).fingerprint
    (complete / "README.md").write_text("x")
    assert models.resolve_model(str(complete)).fingerprint == before
    assert models.resolve_model(str(complete), weights=False).fingerprint == before
    (complete / "config.json").write_text('{"model_type": "llama", "vocab_size": 7}')
    assert models.resolve_model(str(complete)).fingerprint != before
    (complete / "model.safetensors").unlink()
    assert models.resolve_model(str(complete), weights=False).fingerprint == "", "not known"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "config.json is not a JSON object"),
        ("config.json", b"[1]", "config.json is not a JSON object"),
        ("config.json", b"{}", "config.json names no model_type"),
        ("config.json", b'{"model_type": "my_own", "auto_map": {}}', "model_type 'my_own' is unknown to transformers"),
        ("config.json", POINTER.encode(), "config.json is a Git LFS pointer"),
        ("tokenizer.json", None, "no tokenizer (one of tokenizer.json"),
        ("tokenizer.json", POINTER.encode(), "tokenizer.json is a Git LFS pointer"),
        ("model.safetensors", None, "no *.safetensors"),
        ("model.safetensors", POINTER.encode(), "model.safetensors is a Git LFS pointer"),
        ("model.safetensors", b"", "model.safetensors (0 bytes) is damaged or broke off"),
        ("model.safetensors", b"\0" * 5000, "model.safetensors (5,000 bytes) is damaged or broke off"),
        ("model.safetensors", b"<html>not found</html>", "is damaged or broke off"),
        ("model.safetensors", safetensors(3), "is damaged or broke off"),
        ("model.safetensors", safetensors(9), "is damaged or broke off"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "x.safetensors"}}', "1 of 1 weight files are missing"),
        ("model.safetensors.index.json", b'{"weight_map": [1]}', "model.safetensors.index.json is not a weight index"),
    ],
)
def test_an_incomplete_folder_is_refused_in_one_line(complete, name, content, reason):
    if content is None:
        (complete / name).unlink()
    else:
        (complete / name).write_bytes(content)
    with pytest.raises(models.ModelError) as caught:
        models.resolve_model(str(complete))
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(complete) in str(caught.value)
    (check,) = [check for check in doctor.examine(str(complete), ".") if check.name == "model"]
    assert (check.state, check.advice) == ("problem", str(caught.value))


def test_a_folder_in_the_users_home_is_found_and_another_users_is_refused(complete, monkeypatch):
    monkeypatch.setenv("HOME", str(complete.parent))
    found = models.resolve_model(f"~/{complete.name}")
    assert (found.path, found.fingerprint) == (complete, models.resolve_model(str(complete)).fingerprint)
    with pytest.raises(models.ModelError, match="no such folder"):
        models.resolve_model("~nobody-of-this-name/model")


def test_names_that_are_no_model_are_refused(tmp_path):
    for name in ("nobody", "./absent", str(tmp_path / "absent"), "a/b/c"):
        with pytest.raises(models.ModelError, match="no such folder, not a Hub id"):
            models.resolve_model(name)


@pytest.mark.parametrize("kind", ["a file", "not there"])
def test_a_cache_that_can_t_be_written_is_named_with_the_way_out(tmp_path, monkeypatch, kind):
    cache = tmp_path / "cache" if kind == "a file" else "/proc/birbal"
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("BIRBAL_CACHE", str(cache))
    with pytest.raises(RunError, match=rf"the cache {cache}/models can't be written \(.*set BIRBAL_CACHE") as caught:
        models.resolve_model("smollm2-135m")
    (check,) = [check for check in doctor.examine("smollm2-135m", ".") if check.name == "model"]
    assert (check.state, check.advice) == ("problem", str(caught.value))


def test_weights_whose_record_is_damaged_are_unpacked_again(tmp_path, monkeypatch):
    def convert(source, target):
        unpacked.append(target)
        (target / "checksums.json").write_text(json.dumps({"files": {"weights": sha256_of(b"1")}}))
        (target / "weights").write_bytes(b"1")

    unpacked = []
    monkeypatch.setenv("BIRBAL_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "_embedded_file", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(models, "convert", convert)
    for number, content in enumerate((None, '{"files": {"we', "[]", '{"files": [1]}'), 1):
        if content:
            (tmp_path / "models" / models.EMBEDDED_FOLDER / "checksums.json").write_text(content)
        for _ in range(2):
            assert (models._embedded_folder() / "weights").read_bytes() == b"1"
            assert len(unpacked) == number


def test_two_messages_of_libraries_are_dropped_and_no_other(caplog):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        models.quiet_libraries()
        models.quiet_libraries()
        logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
        logger.warning("Failed to load something else")
        warnings.warn(
            "`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, stacklevel=1
        )
        warnings.warn("`another_name` is deprecated", FutureWarning, stacklevel=1)
    assert caplog.messages == ["Failed to load something else"]
    assert [str(one.message) for one in seen] == ["`another_name` is deprecated"]


def test_records_of_a_merge_are_no_part_of_the_model(complete):
    before = models.resolve_model(str(complete)).fingerprint
    for name in ("run.json", "progress.json", "manifest.json", ".lock.json"):
        (complete / name).write_text("{}")
    assert models.resolve_model(str(complete)).fingerprint == before
    (complete / "generation_config.json").write_text("{}")
    assert models.resolve_model(str(complete)).fingerprint != before


@pytest.mark.parametrize("kind", ["HTTPError", "RuntimeError", "TimeoutError"])  # RuntimeError: hf_xet's
def test_a_download_that_breaks_off_is_said_in_one_line(monkeypatch, kind):
    import builtins

    import huggingface_hub
    from huggingface_hub import errors

    def broken(*arguments, **options):
        raise (getattr(errors, kind, None) or getattr(builtins, kind))("the server closed the connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    text = rf"model 'owner/name': .* \({kind}: the server closed the connection\); run the same command again"
    with pytest.raises(models.ModelError, match=text):
        models.resolve_model("owner/name")


def test_weights_are_not_downloaded_twice(complete, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    again = ["consolidated.safetensors", "original/model.safetensors"]
    there = ["README.md", "config.json", "merges.txt", "tokenizer.json", *weights, *again]
    taken = []

    def download(name, *, revision, **patterns):
        taken.append(list(filter_repo_objects(there, **patterns)))
        return str(complete)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models.resolve_model("owner/name")
    models.resolve_model("owner/name", weights=False)
    others = ["config.json", "merges.txt", "tokenizer.json"]
    assert taken == [[*others, *weights], others]
