"""The mix on Ray's workers equals the mix in one process, byte for byte; a killed run leaves nothing half-written."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from birbal_ray.cluster import ray_session
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.files import mix_files
from birbal_ray.mix.run import WORK_FOLDER, mix
from birbal_ray.run import MANIFEST_FILE, RunError
from tests.fixtures.score_folder import list_files_as_they_are, made_up_rows, write_score_folder

BUDGETS = {"exact_match_budget": 6_000, "generation_budget": 5_000}


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    return write_score_folder(tmp_path_factory.mktemp("scores") / "s", made_up_rows(40, 1000, seed=2), shard_rows=250)


@pytest.fixture(scope="module")
def expected(scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix") / "one-process"
    mix(config(scores, folder, 32))
    return folder


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        with ray_session(4, tmp_path_factory.mktemp("ray") / "ray.log"):
            yield


def config(scores, folder, in_process_mib, **changes):
    resources = {"in_process_mib": in_process_mib, "chunk_mib": 1}
    return MixConfig(
        **{"scores": str(scores), "output": str(folder), "task_score": BUDGETS, "resources": resources, **changes}
    )


def data_of(folder):
    return {name: (folder / name).read_bytes() for name in [*mix_files(), "tasks.parquet", "README.md"]}


def test_what_is_given_no_card_sees_none(local_ray):
    import ray

    seen = ray.remote(num_cpus=1)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(seen.remote()) == ""


def test_same_bytes_as_in_one_process(local_ray, scores, expected, tmp_path):
    mix(config(scores, tmp_path / "m", 0))
    assert data_of(tmp_path / "m") == data_of(expected)


def test_same_bytes_with_near_duplicates_and_one_chunk(local_ray, scores, tmp_path):
    near = {"near": True, "near_threshold": 0.7}
    mix(config(scores, tmp_path / "a", 32, dedup=near))
    mix(config(scores, tmp_path / "b", 0, dedup=near).model_copy(update={"resources": _one_chunk()}))
    assert data_of(tmp_path / "a") == data_of(tmp_path / "b")


def test_an_error_in_a_worker_is_one_line(local_ray, scores, tmp_path):
    folder = shutil.copytree(scores, tmp_path / "s")
    shard = sorted((folder / "rows").rglob("*.parquet"))[7]
    shard.write_bytes(shard.read_bytes()[:1000])
    list_files_as_they_are(folder)
    with pytest.raises(RunError, match=f"{shard.name}: not a readable Parquet file") as caught:
        mix(config(folder, tmp_path / "m", 0))
    assert len(str(caught.value).splitlines()) == 1
    assert not any((tmp_path / "m" / name).exists() for name in [*mix_files(), MANIFEST_FILE, WORK_FOLDER])


PROGRAM = """
import sys
from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.run import mix
mix(MixConfig.model_validate_json(sys.argv[1]))
"""


@pytest.mark.parametrize("wait_for", ["run.json", f"{WORK_FOLDER}/texts/0.arrow", "train.parquet"])
def test_killed_and_run_again(scores, expected, tmp_path, wait_for):
    settings = config(scores, tmp_path / "m", 32)
    arguments = [sys.executable, "-c", PROGRAM, settings.model_dump_json()]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "m" / wait_for).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    process.wait()
    result = mix(settings)
    assert data_of(result.folder.local) == data_of(expected)
    assert not (tmp_path / "m" / WORK_FOLDER).exists()


def _one_chunk():
    from birbal_ray.mix.config import MixResources

    return MixResources(in_process_mib=0, chunk_mib=64)
