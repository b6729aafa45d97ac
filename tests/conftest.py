"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings

from birbal_ray.manifest import FORMAT
from birbal_ray.storage import Folder, open_folder
from tests.fixtures.s3_server import BUCKET, s3_server

REPOSITORY = Path(__file__).resolve().parent.parent
SLOW = os.environ.get("BIRBAL_SLOW_TESTS") == "1"
# For this process and all that it starts, before torch is loaded anywhere: OpenMP threads that wait for each other
# sleep. Else those of one worker's engine spin on the cores that the other worker's tests need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
settings.register_profile("birbal", deadline=None)  # a busy machine is no failure
settings.load_profile("birbal")
slow = pytest.mark.skipif(not SLOW, reason="takes minutes; `make test-all` (BIRBAL_SLOW_TESTS=1) runs it")
# xdist gives files out in this order, the longest first, so that all workers are busy until the end. vLLM's files are
# apart: engines side by side take each other's cache and memory bandwidth.
LONGEST_FIRST = (
    "e2e/test_recipe.py",
    "ray/test_score_kills.py",
    "ray/test_tune_step.py",
    "e2e/test_real_tasks.py",
    "ray/test_preemption.py",
    "ray/test_score_simulated.py",
    "ray/test_train_ray.py",
    "training/test_finetune.py",
    "ray/test_storage_s3.py",
    "e2e/test_serve.py",
    "ray/test_job_submit.py",
    "ray/test_tune_ray.py",
    "ray/test_evaluate_ray.py",
    "e2e/test_engine_contract.py",
    "ray/test_mix_on_ray.py",
    "harness/test_harness_offline.py",
    "ray/test_score_adapter.py",
    "training/test_run_folder.py",
    "ray/test_remote_lock.py",
    "data/test_real_tasks.py",
    "unit/report/test_report.py",
    "unit/mix/test_run.py",
    "unit/mix/test_published.py",
    "unit/test_status.py",
    "unit/tune/test_tuning.py",
    "unit/score/test_amend.py",
    "unit/test_storage.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by LONGEST_FIRST; other files follow as they came."""
    place = {REPOSITORY / "tests" / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """What the libraries made while they were imported stays: the collector need not go through it again."""
    gc.collect()
    gc.freeze()


def examples(number: int) -> settings:
    """How many examples hypothesis tries: so many where slow tests run, else a third."""
    return settings(max_examples=number if SLOW else number // 3)


@pytest.fixture(autouse=True, scope="session")
def _unsynced_disk() -> Iterator[None]:
    """No test survives a power cut: this process does not wait for its disk, 4 ms each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real Natural Instructions files; only where a `shared` folder stands beside the checkout."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real Natural Instructions files in {folder}, which this clone does not have")
    return folder


def task_values(num_instances: int = 6, **changes: Any) -> dict[str, Any]:
    """A small valid task file as a dict, with `changes` made to it."""
    values = {
        "Source": ["ours"],
        "Categories": ["Sentiment Analysis"],
        "Definition": ["Say whether the colour is warm."],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Positive Examples": [{"input": "red", "output": "yes"}, {"input": "blue", "output": "no"}],
        "Instances": [
            {"id": f"t-{n}", "input": f"shade number {n}", "output": ["yes" if n % 2 else "no"]}
            for n in range(num_instances)
        ],
    }
    return {**values, **changes}


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """write_task(name, num_instances, **changes) → the folder that holds the task file."""

    def write(name: str, num_instances: int = 6, **changes: Any) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(task_values(num_instances, **changes)), encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def _s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("moto") / "log") as environment:
        yield environment


@pytest.fixture
def s3(_s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An S3 server on this machine, which this process finds; gives the environment by which others find it."""
    for name, value in _s3_server.items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A folder that does not exist yet: on a disk, then in object storage."""
    if request.param == "disk":
        return open_folder(tmp_path / "folder")
    request.getfixturevalue("s3")
    return open_folder(f"s3://{BUCKET}/{tmp_path.name}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a byte tokenizer, made here."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet, "ĊĊ", "he", "##"])}
    merges = [("Ċ", "Ċ"), ("h", "e"), ("#", "#")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mix in the layout of `birbal mix`, made here."""
    folder = tmp_path_factory.mktemp("mix")
    make_mix(folder, 60, 8)
    return folder


def make_mix(folder: Path, num_train: int, num_eval: int) -> None:
    files = {}
    for split, rows in (("train", range(num_train)), ("eval", range(1000, 1000 + num_eval))):
        inputs = [f"{'count ' * (1 + k % 7)}{k}" for k in rows]
        answers = [f"{k} {'and on ' * (k % 5)}".strip() for k in rows]
        texts = {
            "instruction": [""] * len(inputs),
            "input": inputs,
            "output": answers,
            "question": [f"### Input:\n{text}\n\n### Response:\n" for text in inputs],
            "answer": answers,
        }
        pq.write_table(pa.table(texts), folder / f"{split}.parquet")
        files[f"{split}.parquet"] = open_folder(folder).record_of(f"{split}.parquet")._asdict()
    manifest = {
        "format": FORMAT,
        "step": "mix",
        "identity_hash": "0" * 64,
        "files": files,
        "composition": [{"source": "made_up", "label": None, "train": num_train, "eval": num_eval}],
        "licenses": [{"source": "made_up", "licences": "Apache-2.0"}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
