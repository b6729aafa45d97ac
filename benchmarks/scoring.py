"""Rows per second of `birbal score` beside what it is built on, same prompts, one run.

    python benchmarks/scoring.py --json scoring.json
    python benchmarks/scoring.py --only birbal vllm vllm-longest-first --rounds 4 --instances 32 --minutes 12

(a) birbal score              our pipeline: Ray Data, engine actor, prompts, scoring, Parquet
(b) vLLM, prefix cache        one raw LLM.generate call, same engine settings, tasks by name
(b') same, longest first      the tasks in the order of (a): long completions first
(b") vLLM's block size        128 tokens on a CPU instead of our 32
(c) vLLM, no prefix cache     one raw LLM.generate call
(d) transformers              generate, one prompt at a time, on a sample
(e) ray.data.llm              Ray's own vLLM processor over the same prompts

512 prompts: 64 instances (`--instances`) of 8 tasks from the Natural Instructions subset where it is at hand, else
the sample tasks. Several rounds go through the variants in turn; the median counts. Rates are steady-state: the
engine is loaded and has answered a warm-up prompt before the clock starts. Each variant runs in a process of its
own; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from birbal_ray.ni import prompt, reader
from birbal_ray.ni.schema import order_instances, sample_tasks_folder
from birbal_ray.score.config import ScoreConfig
from birbal_ray.settings import load_config

REPOSITORY = Path(__file__).resolve().parent.parent
ARCHIVE = REPOSITORY.parent / "shared" / "data" / "natural-instructions-subset.tar.gz"
TASKS = [  # four exact match, four generation; prompts of 200 to 700 tokens
    "task591_sciq_answer_generation",
    "task320_stereoset_classification_race",
    "task1518_limit_answer_generation",
    "task898_freebase_qa_answer_generation",
    "task067_abductivenli_answer_generation",
    "task645_summarization",
    "task955_wiki_auto_style_transfer",
    "task1358_xlsum_title_generation",
]
NUM_SAMPLED = 32
MAX_MODEL_LEN, THREADS = 2048, len(os.sched_getaffinity(0))
VARIANTS = (
    "birbal",
    "vllm",
    "vllm-longest-first",
    "vllm-default-block",
    "vllm-no-cache",
    "transformers",
    "ray-data-llm",
)


def settings(folder: Path, output: Path, num_instances: int) -> ScoreConfig:
    """The run that all variants imitate."""
    flags = {
        "tasks.path": str(folder),
        "tasks.instances_per_task": num_instances,
        "output": str(output),
        "engine.device": "cpu",
        "engine.max_model_len": MAX_MODEL_LEN,
    }
    return load_config(ScoreConfig, None, [], flags)


def make_tasks(folder: Path) -> None:
    """The benchmark's task files, in one folder."""
    if not ARCHIVE.exists():
        shutil.copytree(sample_tasks_folder(), folder, ignore=shutil.ignore_patterns("*.md"))
        return
    folder.mkdir()
    files = [file for file in reader.find_task_files(ARCHIVE) if file.name in TASKS]
    for file, data in reader.read_files(files):
        if isinstance(data, OSError):
            raise data
        (folder / f"{file.name}.json").write_bytes(data)


def prompts_of(config: ScoreConfig, *, longest_first: bool = False) -> tuple[list[str], list[int]]:
    """(prompts, completion tokens allowed), tasks adjacent, by name or in the order of `birbal score`."""
    from birbal_ray.score.plan import plan_run

    texts, limits = [], []
    plan = plan_run(config)
    by_name = {planned.name: planned for planned in plan.tasks}
    ordered = dict.fromkeys(shard.task for shard in plan.shards(1 << 16)) if longest_first else by_name
    for planned in (by_name[name] for name in ordered):
        task = reader.parse_task(planned.name, Path(planned.path).read_bytes())
        for instance in order_instances(task, config.seed)[: config.tasks.instances_per_task]:
            texts.append(prompt.render_prompt(task.definition, prompt.examples_of(task), instance.input))
            limits.append(planned.max_completion_tokens)
    return texts, limits


def run_birbal(config: ScoreConfig) -> dict[str, Any]:
    from birbal_ray.score.run import score

    result = score(config)
    session = result.manifest["last_session"]
    return {
        "rows": session["rows"],
        "seconds": session["steady_seconds"],
        "load_seconds": session["load_seconds"],
        "cached_fraction": result.manifest["tokens"]["cached_fraction"],
    }


def run_vllm(
    config: ScoreConfig, *, prefix_caching: bool, block_size: int | None, longest_first: bool
) -> dict[str, Any]:
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2", OMP_NUM_THREADS=str(THREADS))
    from birbal_ray.models import resolve_model
    from birbal_ray.score.engine import CPU_MAX_NUM_SEQS

    texts, limits = prompts_of(config, longest_first=longest_first)
    started = time.monotonic()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(resolve_model(config.model.name).path),
        dtype="float32",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=CPU_MAX_NUM_SEQS,
        enforce_eager=True,
        enable_prefix_caching=prefix_caching,
        generation_config="vllm",
        seed=0,
        **({"block_size": block_size} if block_size else {}),
    )
    engine.generate(["Say yes."], SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
    loaded = time.monotonic()
    params = [SamplingParams(temperature=0, max_tokens=limit, stop=[prompt.STOP]) for limit in limits]
    outputs = engine.generate(texts, params, use_tqdm=False)
    cached, total = sum(o.num_cached_tokens or 0 for o in outputs), sum(len(o.prompt_token_ids) for o in outputs)
    return timed(len(texts), loaded, started) | {"cached_fraction": cached / total}


def run_transformers(config: ScoreConfig) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

    from birbal_ray.models import resolve_model

    torch.set_num_threads(THREADS)
    texts, limits = prompts_of(config)
    started = time.monotonic()
    path = resolve_model(config.model.name).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    step = max(1, len(texts) // NUM_SAMPLED)
    sample = list(zip(texts, limits, strict=True))[::step]

    def answer(text: str, limit: int) -> None:
        inputs = tokenizer(text, return_tensors="pt")
        start = inputs["input_ids"].shape[1]

        def blank_line(made: Any, _: Any) -> Any:  # stop_strings would search the vocabulary at every call
            return torch.tensor([prompt.STOP in tokenizer.decode(made[0, start:])])

        criteria = StoppingCriteriaList([blank_line])
        model.generate(**inputs, max_new_tokens=limit, do_sample=False, stopping_criteria=criteria)

    answer(*sample[0])
    loaded = time.monotonic()
    for text, limit in sample:
        answer(text, limit)
    return timed(len(sample), loaded, started)


def run_ray_data_llm(config: ScoreConfig) -> dict[str, Any]:
    """Measured from the first finished row to the last: its engine loads inside the pipeline."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from birbal_ray.cluster import ray_session
    from birbal_ray.models import resolve_model
    from birbal_ray.score.engine import CPU_BLOCK_TOKENS, CPU_MAX_NUM_SEQS

    texts, limits = prompts_of(config)
    started = time.monotonic()
    with ray_session(8):
        environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": str(THREADS)}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # its automatic binding uses one core of two
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=str(resolve_model(config.model.name).path),
                engine_kwargs={
                    "dtype": "float32",
                    "max_model_len": MAX_MODEL_LEN,
                    "max_num_seqs": CPU_MAX_NUM_SEQS,
                    "enforce_eager": True,
                    "enable_prefix_caching": True,
                    "block_size": CPU_BLOCK_TOKENS,
                    "generation_config": "vllm",
                },
                concurrency=1,
                log_engine_metrics=False,  # its logger finds no Ray inside the engine's own process
                batch_size=32,
                chat_template_stage=False,
                accelerator_type=None,
                runtime_env={"env_vars": environment},
                placement_group_config={"bundles": [{"CPU": 1}]},
            ),
            preprocess=lambda row: {
                "prompt": row["prompt"],
                "sampling_params": {"temperature": 0.0, "max_tokens": int(row["limit"]), "stop": [prompt.STOP]},
            },
            postprocess=lambda row: {"text": row["generated_text"]},
        )
        rows = [{"prompt": text, "limit": limit} for text, limit in zip(texts, limits, strict=True)]
        times = []
        for _ in processor(ray.data.from_items(rows, override_num_blocks=len(rows) // 32)).iter_rows():
            times.append(time.monotonic())
    first_batch = 32
    return {
        "rows": len(times) - first_batch,
        "seconds": times[-1] - times[first_batch - 1],
        "load_seconds": times[0] - started,
        "cached_fraction": None,
    }


def timed(rows: int, loaded: float, started: float) -> dict[str, Any]:
    return {
        "rows": rows,
        "seconds": time.monotonic() - loaded,
        "load_seconds": loaded - started,
        "cached_fraction": None,
    }


def median_run(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run of the (lower) median rate, with the median itself."""
    ordered = sorted(runs, key=lambda run: run["rows_per_second"])
    rate = statistics.median(run["rows_per_second"] for run in runs)
    return ordered[(len(runs) - 1) // 2] | {"rows_per_second": rate}


def run_variant(name: str, folder: Path, output: Path, num_instances: int) -> dict[str, Any]:
    from birbal_ray.score.engine import CPU_BLOCK_TOKENS

    config = settings(folder, output, num_instances)
    if name == "birbal":
        return run_birbal(config)
    if name == "transformers":
        return run_transformers(config)
    if name == "ray-data-llm":
        return run_ray_data_llm(config)
    longest_first = name == "vllm-longest-first"
    block = CPU_BLOCK_TOKENS if name == "vllm" or longest_first else None
    caching = name != "vllm-no-cache"
    return run_vllm(config, prefix_caching=caching, block_size=block, longest_first=longest_first)


def run_child(name: str, folder: Path, num_instances: int) -> dict[str, Any] | None:
    """A variant in a process of its own: its figures, or None where it failed."""
    print(f"running {name} …", file=sys.stderr, flush=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, __file__, "--variant", name, "--folder", str(folder), "--instances", str(num_instances)]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log)
    if done.returncode != 0:
        print(f"{name} failed:\n{(folder / f'{name}.log').read_text()[-2000:]}", file=sys.stderr)
        return None
    figures = json.loads((folder / f"{name}.json").read_text())
    return figures | {"rows_per_second": figures["rows"] / figures["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=1, help="go through the variants so often; the median counts")
    parser.add_argument("--instances", type=int, default=64, help="of each task")
    parser.add_argument("--minutes", type=float, default=60, help="start no round that would not end by then")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--variant", help=argparse.SUPPRESS)  # the child process's part
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        figures = run_variant(
            arguments.variant, arguments.folder / "tasks", arguments.folder / "run", arguments.instances
        )
        (arguments.folder / f"{arguments.variant}.json").write_text(json.dumps(figures))
        return
    measured: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_tasks(folder / "tasks")
        started = time.monotonic()
        for number in range(arguments.rounds):
            elapsed = time.monotonic() - started
            if number and elapsed * (number + 1) / number > arguments.minutes * 60:
                print(
                    f"stopped after {number} rounds: another would pass {arguments.minutes:g} minutes", file=sys.stderr
                )
                break
            for name in arguments.only:
                if found := run_child(name, folder, arguments.instances):
                    measured.setdefault(name, []).append(found)
    results = {name: median_run(runs) for name, runs in measured.items()}
    ours = results.get("birbal", {}).get("rows_per_second")
    print(
        f"{'variant':20} {'rows':>5} {'seconds':>8} {'rows/s':>7} {'load s':>7} {'cached':>7} {'birbal is':>10}  rounds"
    )
    for name, figures in results.items():
        cached = "-" if figures["cached_fraction"] is None else f"{figures['cached_fraction']:.0%}"
        ratio = f"{ours / figures['rows_per_second']:.2f} x" if ours else "-"
        rounds = " ".join(f"{run['rows_per_second']:.2f}" for run in measured[name])
        print(
            f"{name:20} {figures['rows']:5d} {figures['seconds']:8.1f} {figures['rows_per_second']:7.2f} "
            f"{figures['load_seconds']:7.1f} {cached:>7} {ratio:>10}  {rounds}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": THREADS, "variants": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
