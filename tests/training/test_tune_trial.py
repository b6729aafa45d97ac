"""One trial of a search on a model of two layers: what it is judged on, and that training shows in it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from birbal_ray.mix.scores import open_scores
from birbal_ray.models import resolve_model
from birbal_ray.train.data import IGNORED
from birbal_ray.train.task_loss import read_samples, task_losses
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.run import resolve_config
from birbal_ray.tune.scheduler import REPEAT, TrialResult, TrialScheduler
from birbal_ray.tune.trial import judge, make_mix
from tests.fixtures.score_folder import made_up_rows, write_score_folder

TOKENS = 6000


class Noted:
    """Takes rungs as `RungReporter` does, without Ray."""

    def __init__(self):
        self.rungs, self.figures, self.kept = [], {}, {}

    def keep(self, adapter):
        self.kept = {file.name: file.read_bytes() for file in adapter.iterdir()}

    def report(self, step, objective, **figures):
        self.rungs.append((step, objective))
        self.figures = figures


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    scores = write_score_folder(tmp_path_factory.mktemp("s") / "scores", made_up_rows(4, 60, seed=3, words=(3, 8)))
    return resolve_config(
        TuneConfig(
            scores=str(scores),
            mix={"task_score": {"exact_match_budget": 40, "generation_budget": 40, "allow_shortfall": True}},
            train={
                "model": {"name": str(tiny_model), "quantization": "none"},
                "lora": {"r": 4, "alpha": 8},
                "batch": {"sequence_length": 256, "micro": 1, "accumulation": 2},
                "optimizer": {"learning_rate": 2e-2, "warmup_steps": 0},
                "gradient_checkpointing": False,
            },
            proxy={"tokens": TOKENS, "keep_adapters": True},
            validation={"rows_per_task": 3, "num_rungs": 2},
        )
    )[0]


@pytest.fixture(scope="module")
def judged(config, tiny_model, tmp_path_factory):
    """Key → (reports, folder) of the base model and two baselines."""
    found, folder = {}, tmp_path_factory.mktemp("trials")
    scores = open_scores(Path(config.scores))
    labels = {task.name: task.label for task in scores.tasks}
    scheduler = TrialScheduler(config)
    for _ in range(3):
        spec, noted = scheduler.next(), Noted()
        made = make_mix(spec, config, folder / spec.key / "mix")
        judge(spec, config, resolve_model(str(tiny_model)), folder / spec.key, made, labels, noted)
        found[spec.key] = noted, folder / spec.key
        scheduler.tell(TrialResult(spec, "finished", noted.rungs[-1][1]))
    return found


def test_training_lowers_the_loss_on_rows_that_it_never_saw(judged):
    ((step, base),) = judged["base_model"][0].rungs
    assert step == 0
    for name in ("uniform", "proportional"):
        noted = judged[name][0]
        (half, _), (end, loss) = noted.rungs
        assert end == 2 * half
        assert loss < 0.97 * base
        assert abs(noted.figures["num_tokens"] - TOKENS) < 512, "a step's tokens at most"
    assert judged["uniform"][0].figures["mix_sha256"] != judged["proportional"][0].figures["mix_sha256"]
    assert len({noted.figures["validation_sha256"] for noted, _ in judged.values()}) == 1


def test_the_objective_is_the_mean_over_labels_of_the_mean_of_task_means(judged, config, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    samples = read_samples(judged["base_model"][1] / "mix" / "validation.parquet", tokenizer, 256)
    assert len(samples) == 12
    by_task = {}
    with torch.no_grad():
        for sample in samples:  # one by one: no padding, no batch
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1].float()
            start = sample.loss_start
            labels = torch.tensor(([IGNORED] * start + sample.input_ids[start:])[1:])
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            by_task.setdefault(sample.task, []).append((float(loss), int((labels != IGNORED).sum())))
    expected = {
        task: sum(loss for loss, _ in found) / sum(tokens for _, tokens in found) for task, found in by_task.items()
    }
    losses = task_losses(model.train(), samples)
    assert model.training, "left as it came"
    assert losses == pytest.approx(expected, rel=1e-4)
    labels = {task.name: task.label for task in open_scores(Path(config.scores)).tasks}
    means = {}
    for label in ("exact_match", "generation"):
        mine = [loss for task, loss in expected.items() if labels[task] == label]
        means[label] = sum(mine) / len(mine)
    noted = judged["base_model"][0]
    assert noted.figures["groups"] == pytest.approx(means, rel=1e-4)
    assert noted.figures["tasks"] == pytest.approx(expected, rel=1e-4)
    assert noted.rungs[0][1] == pytest.approx((means["exact_match"] + means["generation"]) / 2, rel=1e-4)


def test_a_fresh_seeds_adapter_is_kept_before_its_result_and_has_its_loss(judged, config, tiny_model, tmp_path):
    assert not any(noted.kept for noted, _ in judged.values()), "those of the search are not asked for"
    labels = {task.name: task.label for task in open_scores(Path(config.scores)).tasks}
    spec = replace(TrialScheduler(config)._named["uniform"], key="uniform-seed1", kind=REPEAT, seed=1)
    noted = Noted()
    made = make_mix(spec, config, tmp_path / "mix")
    judge(spec, config, resolve_model(str(tiny_model)), tmp_path, made, labels, noted)
    (tmp_path / "kept").mkdir()
    for name, content in noted.kept.items():
        (tmp_path / "kept" / name).write_bytes(content)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= noted.kept.keys()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "kept")
    samples = read_samples(tmp_path / "mix" / "validation.parquet", AutoTokenizer.from_pretrained(tiny_model), 256)
    assert task_losses(model, samples) == pytest.approx(noted.figures["tasks"], rel=1e-3)
