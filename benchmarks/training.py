"""Tokens per second of `birbal train`'s trainer beside plain TRL, same data, same settings, one run; packing.

    python benchmarks/training.py --json training.json                  two idle cores: about 12 minutes
    python benchmarks/training.py --layers 2 --lengths 512 2048         whether it runs, not how fast

(a) birbal    what the worker of `birbal train` runs: deadline, metrics, attention sample by sample (varlen on a GPU)
(b) TRL       SFTTrainer, its own tokenising and packing; sdpa with a dense mask

SmolLM2-135M in NF4 on a made-up mix (or --model, on a GPU if there is one; --layers takes so many of its layers,
with random weights). A run trains `--tokens` tokens after one step that warms up; evaluations and checkpoints are left
out of both. The order is a, b, then b, a. On a machine that does other work meanwhile, tokens per second of CPU time
say more than those of the clock, with --threads 1. Then, without a model: how full packs of 8,192 tokens are, and how
much lengths vary inside a pack.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from birbal_ray.manifest import FORMAT
from birbal_ray.models import load_tokenizer, resolve_model
from birbal_ray.settings import load_config
from birbal_ray.storage import open_folder

VARIANTS = ("birbal", "trl")
WARM_UP = 1  # steps
MICRO, ACCUMULATION, RANK, ALPHA = 1, 1, 16, 32
PACK_TOKENS, NUM_LENGTHS = 8192, 20_000
# Natural logarithm of a sample's tokens: about that of instruction data (median 245 tokens).
MEAN_LOG, SPREAD_LOG = 5.5, 0.64


def make_mix(folder: Path) -> None:
    """400 rows of 15 to 108 words in the layout of `birbal mix`; no two alike."""
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
        files[f"{split}.parquet"] = open_folder(folder).record_of(f"{split}.parquet")._asdict()
    manifest = {"format": FORMAT, "step": "mix", "identity_hash": "benchmark", "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"composition": [], "licenses": []}))


def make_shallow_model(source: Path, folder: Path, num_layers: int) -> None:
    """A model of so many of the model's layers with random weights, and its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(source)
    config.num_hidden_layers = num_layers
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in source.glob("*token*"):
        shutil.copy(file, folder)


def run_variant(variant: str, mix: Path, folder: Path, model: str, length: int, steps: int) -> dict[str, Any]:
    """Tokens, seconds and seconds of CPU time from the end of the warm-up to the last step's end."""
    import torch
    from transformers import TrainerCallback

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    ends: list[tuple[int, float, float]] = []  # of each step, when its log is written

    class Times(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "num_tokens" in (logs or {}):
                ends.append((int(logs["num_tokens"]), time.monotonic(), time.process_time()))

    run = run_birbal if variant == "birbal" else run_trl
    extra = run(mix, folder, model, length, steps, Times())
    (before, start, cpu_start), (after, end, cpu_end) = ends[WARM_UP - 1], ends[steps - 1]
    return {"tokens": after - before, "seconds": end - start, "cpu_seconds": cpu_end - cpu_start, **extra}


def run_birbal(mix: Path, folder: Path, model: str, length: int, steps: int, times: Any) -> dict[str, Any]:
    import torch

    from birbal_ray.train import TrainConfig
    from birbal_ray.train.data import prepare
    from birbal_ray.train.run import resolve_config
    from birbal_ray.train.sft import fine_tune

    flags = {
        "mix": str(mix),
        "model.name": model,
        "max_steps": steps,
        "epochs": 100,
        "batch.sequence_length": length,
        "batch.micro": MICRO,
        "batch.accumulation": ACCUMULATION,
        "lora.r": RANK,
        "lora.alpha": ALPHA,
        "gradient_checkpointing": torch.cuda.is_available(),
        "evaluation.num_rows": 4,
    }
    config, found = resolve_config(load_config(TrainConfig, flags=flags))
    prepare(mix, folder / "packed", load_tokenizer(found.path), config)
    fine_tune(config, found.path, folder, callbacks=[times])
    return {"checkpoint_seconds": json.loads((folder / "clock.json").read_text())["save_seconds"]}


def run_trl(mix: Path, folder: Path, model: str, length: int, steps: int, times: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    path = resolve_model(model).path
    dtype = torch.bfloat16 if cuda else torch.float32
    base = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": 0 if cuda else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    )
    rows = pq.read_table(mix / "train.parquet").to_pylist()
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder),
            packing=True,
            max_length=length,
            completion_only_loss=True,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=steps,
            learning_rate=2e-5,
            weight_decay=0.01,
            max_grad_norm=0.3,
            optim="paged_adamw_32bit" if cuda else "adamw_torch",
            neftune_noise_alpha=5,
            activation_checkpointing=cuda,
            bf16=cuda,
            use_cpu=not cuda,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["question"], "completion": row["answer"]} for row in rows]),
        processing_class=load_tokenizer(path),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[times],
    )
    trainer.train()
    return {}


def measure_speed(lengths: list[int], tokens: int, model: str, folder: Path) -> list[dict[str, Any]]:
    """One row for each pack length and variant, both rounds summed; each run in a process of its own."""
    found = []
    for length in lengths:
        steps = WARM_UP + max(1, tokens // (length * MICRO * ACCUMULATION))
        runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in VARIANTS}
        for variant in (*VARIANTS, *reversed(VARIANTS)):
            print(f"running {variant} on packs of {length:,}", file=sys.stderr, flush=True)
            out = folder / f"{variant}-{length}-{len(runs[variant])}"
            command = [sys.executable, __file__, "--child", variant, str(folder / "mix"), str(out), model]
            with (folder / "log").open("w") as log:
                if subprocess.run([*command, str(length), str(steps)], stdout=log, stderr=log).returncode != 0:
                    sys.exit(f"{variant} failed:\n{(folder / 'log').read_text()[-3000:]}")
            runs[variant].append(json.loads(out.with_suffix(".json").read_text()))
            shutil.rmtree(out, ignore_errors=True)
        for variant, both in runs.items():
            row: dict[str, Any] = {"packs": length, "variant": variant, "runs": both}
            row |= {name: sum(run[name] for run in both) for name in ("tokens", "seconds", "cpu_seconds")}
            row |= {f"tokens_per_{one}": row["tokens"] / row[f"{one}s"] for one in ("second", "cpu_second")}
            found.append(row)
    return found


def measure_packing() -> list[dict[str, Any]]:
    """How full the packs are and the spread of log lengths inside a pack (mean over packs), by packer."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    from birbal_ray.train.data import make_layouts

    logs = np.random.default_rng(0).normal(MEAN_LOG, SPREAD_LOG, NUM_LENGTHS)
    lengths = np.clip(np.exp(logs), 8, PACK_TOKENS).astype(int).tolist()
    (ours,) = make_layouts(lengths, PACK_TOKENS, 0, 1)
    rows = pack_dataset(Dataset.from_dict({"input_ids": [[0] * n for n in lengths]}), PACK_TOKENS)
    packs = {"birbal": [[lengths[sample] for sample in pack] for pack in ours], "trl": rows["seq_lengths"]}
    overall = float(np.log(lengths).std())
    return [
        {
            "variant": variant,
            "packs": len(found),
            "full": sum(map(sum, found)) / (len(found) * PACK_TOKENS),
            "spread_in_a_pack": float(np.mean([np.log(pack).std() for pack in found if len(pack) > 1])),
            "spread_of_the_mix": overall,
        }
        for variant, found in packs.items()
    ]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        variant, mix, out, model, length, steps = sys.argv[2:]
        figures = run_variant(variant, Path(mix), Path(out), model, int(length), int(steps))
        Path(out).with_suffix(".json").write_text(json.dumps(figures))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096, help="trained in a run, behind the step that warms up")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens in a pack")
    parser.add_argument("--layers", type=int, help="take so many of the model's layers, with random weights")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the runs, too
    with tempfile.TemporaryDirectory(prefix="birbal-bench-") as name:
        folder, model = Path(name), arguments.model
        make_mix(folder / "mix")
        if arguments.layers:
            model = str(folder / "shallow")
            make_shallow_model(resolve_model(arguments.model).path, folder / "shallow", arguments.layers)
        speed = measure_speed(arguments.lengths, arguments.tokens, model, folder)
    columns = ("tokens", "seconds", "tokens/s", "per CPU s", "checkpoint s")
    print(f"{'packs':>6} {'variant':8} {' '.join(f'{column:>12}' for column in columns)}")
    for row in speed:
        saves = [run["checkpoint_seconds"] for run in row["runs"] if "checkpoint_seconds" in run]
        save = f"{sum(saves) / len(saves):.2f}" if saves else "-"
        rates = f"{row['tokens_per_second']:12.1f} {row['tokens_per_cpu_second']:12.1f}"
        print(f"{row['packs']:>6} {row['variant']:8} {row['tokens']:12,d} {row['seconds']:12.1f} {rates} {save:>12}")
    for ours, theirs in zip(speed[::2], speed[1::2], strict=True):
        clock, cpu = (ours[key] / theirs[key] for key in ("tokens_per_second", "tokens_per_cpu_second"))
        print(f"packs of {ours['packs']:,}: birbal / trl {clock:.3f} by the clock, {cpu:.3f} by CPU time")
    packing = measure_packing()
    for row in packing:
        spread = f"{row['spread_in_a_pack']:.2f} inside a pack, {row['spread_of_the_mix']:.2f} in the mix"
        print(f"{row['variant']}: {row['packs']:,} packs of {PACK_TOKENS:,}, {row['full']:.1%} full; {spread}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"speed": speed, "packing": packing}, indent=1) + "\n")


if __name__ == "__main__":
    main()
