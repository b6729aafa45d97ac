"""HELM, the challenge's own client, unmodified, against a `birbal serve` started for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from birbal_ray.evaluate.config import HarnessConfig
from birbal_ray.evaluate.harness import RESULTS_FILE, HarnessResult, inputs_of, resolve_measured
from birbal_ray.evaluate.heldout import EvaluatedModel
from birbal_ray.progress import ProgressLine
from birbal_ray.run import RunError, RunFailedError, Step, open_run
from birbal_ray.settings import ConfigError, one_line, sha256_of
from birbal_ray.storage import DamagedFileError, absolute, cache_folder, is_url, read_json, write_json

SUITE = "birbal"
STEP = Step("helm", ("helm/*", RESULTS_FILE))
HELM = "crfm-helm==0.5.16"
# What HELM imports on the way to a model behind HTTP, in the versions that it was tried with; --no-deps leaves out
# torch and spacy.
PACKAGES = (
    *("bottle==0.12.25", "cattrs==22.2.0", "colorlog==6.12.0", "dacite==1.9.2", "datasets==3.6.0", "mako==1.4.3"),
    *("nltk==3.10.4", "numpy==2.4.6", "pandas==2.3.3", "pyarrow==26.0.1", "pyarrow-hotfix==0.7", "pyhocon==0.3.63"),
    *("requests==2.34.2", "retrying==1.4.2", "rouge-score==0.1.2", "scikit-learn==1.9.1", "scipy==1.17.1"),
    *("sqlitedict==2.1.0", "tqdm==4.70.1", "transformers==4.57.6", "ubelt==1.4.3", "uncertainty-calibration==0.1.4"),
    "zstandard==0.18.0",
)
OFFLINE_ENTRIES = (
    *("simple_mcqa", "simple_classification", "synthetic_reasoning_natural:difficulty=easy"),
    "dyck_language:num_parenthesis_pairs=3",
)
# HELM's scenario → (the leaderboard's metric, HELM's): the scenarios of the challenge's open evaluation.
CHALLENGE = {
    "mmlu": ("MMLU - EM", "exact_match"),
    "truthful_qa": ("TruthfulQA - EM", "exact_match"),
    "big_bench": ("BIG-bench - EM", "exact_match"),
    "gsm": ("GSM8K - EM", "exact_match_indicator"),
    "bbq": ("BBQ - EM", "exact_match"),
}
# Of a scenario that isn't the challenge's, the first of these that it reports.
MEASURES = ("exact_match", "quasi_exact_match", "exact_match_indicator", "f1_set_match")
PERTURBED = {"robustness": " (Robustness)", "fairness": " (Fairness)"}
READY = re.compile(r"^serving .* at (http://\S+)", re.MULTILINE)
RETRY = "Retrying (attempt"  # what HELM logs


def run_helm(config: HarnessConfig, *, overwrite: bool = False) -> HarnessResult:
    """Run the entries in `config.tasks` (none: the scenarios that need no download) and write results.json.

    `config.include_path`: a folder of HELM plugins, *.py. Finished entries are kept, the same command continues.
    Raises ConfigError, ModelError, RunFailedError when an entry could not be run or HELM had to repeat a request.
    """
    progress = ProgressLine()
    config = check_options(config)
    model, adapter, measured, team = resolve_measured(config)
    entries = config.tasks or OFFLINE_ENTRIES
    identity = measured | {"helm": HELM, "packages": list(PACKAGES)}
    if config.include_path:
        identity["plugins"] = {file.name: sha256_of(file) for file in config.include_path.glob("*.py")}
    inputs = inputs_of(config, adapter)
    with open_run(config.output or "", STEP, identity, inputs=inputs, overwrite=overwrite) as run:
        before = run.manifest or {}
        if before.get("team") == team and set(entries) <= set(before["entries"]):
            progress.message(f"{run.folder} is up to date; nothing to measure")
            return HarnessResult(run.folder, before, _rows(run.folder.read_json(RESULTS_FILE)["helm"]))
        folder = run.folder.local
        run.withdraw()
        helm = environment(progress)
        (folder / "logs").mkdir(exist_ok=True)
        log = folder / "logs" / "helm.log"
        earlier = _count_retries(log)
        with _server(config, adapter, folder / "logs" / "server.log", progress) as url:
            progress.update(f"HELM asks {url}; logs in {log.parent}")
            code = _call_helm(helm, config, entries, url, folder, log)
        figures = read_figures(folder / "helm" / "runs" / SUITE)
        retries = _count_retries(log)
        run.folder.write_json(RESULTS_FILE, results(team, figures, config.limit))
        if code or retries > earlier:
            failed = f"HELM repeated {retries - earlier} requests"
            if code:
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                failed = f"HELM ended with code {code}: {last}"
            raise RunFailedError(f"{failed} (logs: {log.parent})")
        manifest = {
            "model": {"name": model.name, "revision": model.revision},
            "adapter": adapter.origin if adapter else None,
            "team": team,
            "limit": config.limit,
            "entries": list(dict.fromkeys([*before.get("entries", []), *entries])),
            "num_retries": retries,  # of all sessions: what one has measured, the next one skips
        }
        finished = run.finish(manifest, [RESULTS_FILE], summary=f"{len(figures)} entries")
        return HarnessResult(run.folder, finished, _rows(figures))


def _rows(figures: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"entry": name, **figure} for name, figure in figures.items()]


def check_options(config: HarnessConfig, *, dry_run: bool = False) -> HarnessConfig:
    """The config with an absolute --include-path. Raises ConfigError for what means nothing to HELM."""
    usual = HarnessConfig()
    unused = {"--benchmark": config.benchmarks, "--num-fewshot": config.num_fewshot is not None, "--dry-run": dry_run}
    unused |= {"--backend": config.backend != usual.backend, "--batch-size": config.batch_size != usual.batch_size}
    for flag, given in unused.items():
        if given:
            raise ConfigError(f"{flag} has no meaning with --helm; leave it out (--task names HELM's run entries)")
    if config.output and is_url(config.output):
        raise ConfigError(f"--output {config.output}: HELM writes to a folder of this machine; give a path")
    if config.include_path is None:
        return config
    plugins = Path(absolute(config.include_path))
    if not any(plugins.glob("*.py")):
        raise ConfigError(f"--include-path {config.include_path}: no *.py there; expected a folder of HELM plugins")
    return config.replace({"include_path": plugins})


def environment(progress: ProgressLine) -> Path:
    """The folder of HELM's commands, in a Python environment of its own (600 MB), made when it isn't there.

    Of its own, because HELM's pins exclude ours. Raises RunError when the packages can't be had.
    """
    folder = cache_folder() / "helm" / HELM.rpartition("==")[2]
    done, wanted = folder / "complete.json", [HELM, *PACKAGES]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        with contextlib.suppress(FileNotFoundError, DamagedFileError):
            if read_json(done) == wanted:
                return folder / "bin"
        progress.message(f"making an environment for HELM, once: {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        commands = [[sys.executable, "-m", "venv", str(folder)]]
        installer = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        beside = Path(sys.executable).with_name("uv")
        if uv := str(beside) if beside.exists() else shutil.which("uv"):
            installer = [uv, "pip", "install", "--quiet", "--python", str(folder / "bin" / "python")]
        commands += [[*installer, "--no-deps", HELM], [*installer, *PACKAGES]]
        for command in commands:
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise RunError(f"HELM can't be installed: {one_line(made.stderr or made.stdout)[-400:]}")
        write_json(done, wanted)
    return folder / "bin"


@contextlib.contextmanager
def _server(config: HarnessConfig, adapter: EvaluatedModel | None, log: Path, progress: ProgressLine) -> Iterator[str]:
    """A `birbal serve` of the model on a free port, for the block; gives its URL."""
    command = [sys.executable, "-m", "birbal_ray", "serve", "--model", str(config.model), "--port", "0"]
    command += ["--adapter", adapter.origin] if adapter else []
    if config.device:
        command += ["--device", "gpu" if config.device.startswith("cuda") else config.device]
    progress.update(f"starting the server; log in {log}")
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while not (ready := READY.search(log.read_text(encoding="utf-8", errors="replace"))):
            if process.poll() is not None:
                said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
                raise RunFailedError(f"the server ended with code {process.returncode}: {' '.join(said)} (log: {log})")
            time.sleep(0.2)
        yield ready[1]
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _count_retries(log: Path) -> int:
    """Requests that HELM has repeated in all sessions of the run."""
    return log.read_text(encoding="utf-8", errors="replace").count(RETRY) if log.exists() else 0


def _call_helm(helm: Path, config: HarnessConfig, entries: Sequence[str], url: str, folder: Path, log: Path) -> int:
    """HELM's exit code: not 0 where an entry is unknown or failed."""
    plugins = sorted(config.include_path.glob("*.py")) if config.include_path else []
    command = [str(helm / "helm-run"), "--suite", SUITE, "--output-path", str(folder / "helm"), "--skip-completed-runs"]
    command += ["--local-path", str(folder / "helm" / "local"), "--disable-cache"]
    command += ["--max-eval-instances", str(config.limit or 1_000_000)]
    command += ["--plugins", *(str(one.resolve()) for one in plugins)] if plugins else []
    command += ["--run-entries", *(f"{one}{',' if ':' in one else ':'}model=neurips/local" for one in entries)]
    settings = {**os.environ, "HELM_HTTP_MODEL_BASE_URL": url, "PYTHONPATH": ""}
    with log.open("ab") as out:
        return subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, env=settings).returncode


def read_figures(suite: Path) -> dict[str, dict[str, Any]]:
    """HELM's run name → its figure: leaderboard metric (None: not the challenge's), HELM's measure, value, instances.

    Perturbed values, where HELM made them, under the leaderboard's names in `perturbed`.
    """
    figures = {}
    for file in sorted(suite.glob("*/stats.json")):
        scenario = re.split("[:,]", file.parent.name)[0]
        metric, wanted = CHALLENGE.get(scenario, (None, ""))
        plain: dict[str, dict[str, Any]] = {}
        perturbed: dict[str, float] = {}
        for stat in read_json(file):
            about = stat["name"]
            if about.get("split") != "test" or not stat["count"]:
                continue
            change = about.get("perturbation")
            if not change:
                plain[about["name"]] = stat
            elif about["name"] == wanted and change.get("computed_on") == "worst" and change["name"] in PERTURBED:
                perturbed[f"{metric}{PERTURBED[change['name']]}"] = stat["mean"]
        measure = next((one for one in (wanted, *MEASURES) if one in plain), None)
        if measure is None:
            raise RunError(f"{file}: none of {', '.join(MEASURES)} among its measures of the test split")
        instances = plain.get("num_instances", {}).get("mean")
        figures[file.parent.name] = {
            "metric": metric,
            "measure": measure,
            "value": plain[measure]["mean"],
            "instances": None if instances is None else int(instances),
            "perturbed": perturbed,
        }
    return figures


def results(team: str, figures: dict[str, dict[str, Any]], limit: int | None) -> dict[str, Any]:
    """In the layout that `birbal leaderboard --add` reads; only the challenge's own scenarios give metrics.

    A metric is the mean over the scenario's runs (subjects, tasks), as HELM's own tables have it.
    """
    found: dict[str, list[float]] = {}
    for figure in figures.values():
        if figure["metric"]:
            for metric, value in {figure["metric"]: figure["value"], **figure["perturbed"]}.items():
                found.setdefault(metric, []).append(value)
    others = [name for name, figure in figures.items() if not figure["metric"]]
    notes = [f"only {limit} instances of every scenario"] if limit and found else []
    notes += [f"not scenarios of the challenge: {', '.join(others)}"] if others else []
    return {
        "team": team,
        "metrics": {metric: statistics.fmean(values) for metric, values in found.items()},
        "comparable": bool(found),
        "note": "; ".join([f"measured by HELM ({HELM}), the challenge's own client", *notes]),
        "helm": figures,
    }
