"""Tokens per second of `birbal train` beside plain TRL, same data, same settings, one run.

    python benchmarks/training.py --steps 6 --lengths 1024 4096 --json training.json

(a) birbal train   Ray Train worker, deadline, metrics, checkpoints; attention sample by sample, or varlen on a GPU
(b) TRL            SFTTrainer in a plain process, its own tokenising and packing, no checkpoints; sdpa with a dense mask

SmolLM2-135M in NF4 on a made-up mix (or --model, on a GPU if there is one). The first two steps
warm up and are left out; evaluation is left out of both. Also: what a checkpoint costs, and how full
the packs are. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.settings import sha256_of

WARM_UP = 2
SETTINGS = {"sequence_length": 1024, "micro": 1, "accumulation": 1, "r": 16, "alpha": 32}


def make_mix(folder: Path) -> None:
    """400 rows of 20 to 250 words in the layout of `birbal mix`; no two alike."""
    folder.mkdir()
    rows = [
        {
            "question": f"### Input:\nRepeat number {n}: {' '.join(f'word{(n * k) % 97}' for k in range(10 + n % 60))}"
            "\n\n### Response:\n",
            "answer": " ".join(f"word{(n * k) % 97}" for k in range(5 + n % 40)),
        }
        for n in range(400)
    ]
    files = {}
    for split, part in (("train", rows[:384]), ("eval", rows[384:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"{split}.parquet")
        files[f"{split}.parquet"] = sha256_of(folder / f"{split}.parquet")
    manifest = {"step": "mix", "identity_hash": "benchmark", "files": files, "composition": [], "licenses": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def run_birbal(mix: Path, folder: Path, model: str, steps: int) -> dict[str, Any]:
    from birbal_ray.settings import load_config
    from birbal_ray.train.checkpoints import read_metrics
    from birbal_ray.train.config import TrainConfig
    from birbal_ray.train.run import train

    flags = {
        "mix": str(mix),
        "output": str(folder),
        "model.name": model,
        "max_steps": steps,
        "epochs": 100,
        "batch.sequence_length": SETTINGS["sequence_length"],
        "batch.micro": SETTINGS["micro"],
        "batch.accumulation": SETTINGS["accumulation"],
        "lora.r": SETTINGS["r"],
        "lora.alpha": SETTINGS["alpha"],
        "evaluation.every_steps": 10_000,
        "evaluation.num_rows": 4,
        "checkpoint.every_steps": max(3, steps // 3),
    }
    result = train(load_config(TrainConfig, flags=flags))
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    # From one step's log to the next one's: whatever happens in between counts, but for checkpoints and the end.
    saves = {step for step in range(steps) if step % flags["checkpoint.every_steps"] == 0}
    pairs = [(a, b) for a, b in itertools.pairwise(lines) if a["step"] >= WARM_UP and a["step"] not in saves]
    tokens = sum(after["tokens"] for _, after in pairs)
    seconds = sum(after["elapsed_seconds"] - before["elapsed_seconds"] for before, after in pairs)
    status = json.loads((folder / "status.json").read_text())
    return {
        "tokens": tokens,
        "seconds": seconds,
        "packing_efficiency": result.manifest["packing"]["train"]["packing_efficiency_fraction"],
        "checkpoint_seconds": status["save_seconds"],
    }


def run_trl(mix: Path, folder: Path, model: str, steps: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from birbal_ray.models import resolve_model

    cuda = torch.cuda.is_available()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    path = resolve_model(model).path
    dtype = torch.bfloat16 if cuda else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": 0 if cuda else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = pq.read_table(mix / "train.parquet").to_pylist()
    data = Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows])
    ends: list[tuple[float, int]] = []

    class Times(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "num_tokens" in (logs or {}):
                ends.append((time.monotonic(), int(logs["num_tokens"])))

    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder),
            packing=True,
            max_length=SETTINGS["sequence_length"],
            completion_only_loss=True,
            per_device_train_batch_size=SETTINGS["micro"],
            gradient_accumulation_steps=SETTINGS["accumulation"],
            max_steps=steps,
            learning_rate=2e-5,
            weight_decay=0.01,
            max_grad_norm=0.3,
            optim="paged_adamw_32bit" if cuda else "adamw_torch",
            neftune_noise_alpha=5,
            activation_checkpointing=True,
            bf16=cuda,
            use_cpu=not cuda,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=SETTINGS["r"],
            lora_alpha=SETTINGS["alpha"],
            lora_dropout=0.05,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Times()],
    )
    packs = trainer.train_dataset
    trainer.train()
    steps_timed = ends[WARM_UP - 1 :]
    return {
        "tokens": steps_timed[-1][1] - steps_timed[0][1],
        "seconds": steps_timed[-1][0] - steps_timed[0][0],
        "packing_efficiency": sum(map(len, packs["input_ids"])) / (len(packs) * SETTINGS["sequence_length"]),
        "checkpoint_seconds": None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens in a pack")
    parser.add_argument("--length", type=int, default=1024, help=argparse.SUPPRESS)  # of the child process
    parser.add_argument("--rounds", type=int, default=2, help="a, b, a, b, …; the sum counts")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--variant", choices=["birbal", "trl"], help=argparse.SUPPRESS)  # the child process's part
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        SETTINGS["sequence_length"] = arguments.length
        run = run_birbal if arguments.variant == "birbal" else run_trl
        folder = arguments.folder
        figures = run(folder / "mix", folder / f"run-{os.getpid()}", arguments.model, arguments.steps)
        (folder / "figures.json").write_text(json.dumps(figures))
        return
    results: dict[str, dict[str, list[dict[str, Any]]]] = {
        str(length): {"birbal": [], "trl": []} for length in arguments.lengths
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_mix(folder / "mix")
        for _, length, variant in itertools.product(range(arguments.rounds), results, ("birbal", "trl")):
            print(f"running {variant} on packs of {length} …", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--variant", variant, "--length", length, "--folder", str(folder)]
            command += ["--model", arguments.model, "--steps", str(arguments.steps)]
            with (folder / "log").open("w") as log:
                if subprocess.run(command, stdout=log, stderr=log).returncode != 0:
                    sys.exit(f"{variant} failed:\n{(folder / 'log').read_text()[-3000:]}")
            results[length][variant].append(json.loads((folder / "figures.json").read_text()))
    print(f"{'packs':>6} {'variant':10} {'tokens':>8} {'seconds':>8} {'tokens/s':>9} {'full':>7} {'checkpoint s':>13}")
    for length, variants in results.items():
        rates = {}
        for variant, runs in variants.items():
            tokens, seconds = sum(run["tokens"] for run in runs), sum(run["seconds"] for run in runs)
            rates[variant] = tokens / seconds
            saves = [run["checkpoint_seconds"] for run in runs if run["checkpoint_seconds"] is not None]
            save = f"{sum(saves) / len(saves):.2f}" if saves else "-"
            full = runs[0]["packing_efficiency"]
            row = f"{tokens:8,d} {seconds:8.1f} {rates[variant]:9.1f} {full:7.1%} {save:>13}"
            print(f"{length:>6} {variant:10} {row}")
        print(f"{length:>6} birbal / trl: {rates['birbal'] / rates['trl']:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"settings": SETTINGS, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
