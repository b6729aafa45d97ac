"""One trial of a search on a model of two layers: what it is judged on, and that training shows in it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from birbal_ray.mix.scores import open_scores
from birbal_ray.models import resolve_model
from birbal_ray.train.data import IGNORED
from birbal_ray.train.task_loss import mean_over_tasks, read_samples, task_losses
from birbal_ray.tune.config import TuneConfig
from birbal_ray.tune.run import resolved, task_counts
from birbal_ray.tune.scheduler import Plan, Record
from birbal_ray.tune.trial import judge, make_mix
from tests.fixtures.score_folder import made_up_rows, write_score_folder

TOKENS = 6000


class Noted:
    """Takes looks as `Looks` does, without Ray."""

    def __init__(self):
        self.looks, self.figures = [], {}

    def look(self, step, objective, **figures):
        self.looks.append((step, objective))
        self.figures = figures


@pytest.fixture(scope="module")
def config(tiny_model, tmp_path_factory):
    scores = write_score_folder(tmp_path_factory.mktemp("s") / "scores", made_up_rows(4, 60, seed=3, words=(3, 8)))
    return resolved(
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
            proxy={"tokens": TOKENS},
            validation={"rows_per_task": 3, "looks": 2},
        )
    )[0]


@pytest.fixture(scope="module")
def judged(config, tiny_model, tmp_path_factory):
    """Key → (looks, folder) of the base model and two baselines."""
    found, folder = {}, tmp_path_factory.mktemp("trials")
    plan = Plan(config, task_counts(open_scores(folder.parent / config.scores)))
    for _ in range(3):
        job, noted = plan.next(), Noted()
        made = make_mix(job, config, folder / job.key / "mix")
        judge(job, config, resolve_model(str(tiny_model)), folder / job.key, made, noted)
        found[job.key] = noted, folder / job.key
        plan.tell(Record(job, "finished", noted.looks[-1][1]))
    return found


def test_training_lowers_the_loss_on_rows_that_it_never_saw(judged):
    ((step, base),) = judged["base_model"][0].looks
    assert step == 0
    for name in ("uniform", "proportional"):
        noted = judged[name][0]
        (half, _), (end, loss) = noted.looks
        assert end == 2 * half
        assert loss < 0.97 * base
        assert abs(noted.figures["num_tokens"] - TOKENS) < 512, "a step's tokens at most"
    assert judged["uniform"][0].figures["mix_sha256"] != judged["proportional"][0].figures["mix_sha256"]
    assert len({noted.figures["validation_sha256"] for noted, _ in judged.values()}) == 1


def test_the_objective_is_the_mean_of_task_means(judged, config, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    samples = read_samples(judged["base_model"][1] / "mix" / "validation.parquet", tokenizer, 256)
    assert len(samples) == 12
    by_task = {}
    with torch.no_grad():
        for sample in samples:  # one by one: no padding, no batch
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1].float()
            labels = torch.tensor(sample.labels[1:])
            loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
            by_task.setdefault(sample.task, []).append((float(loss), int((labels != IGNORED).sum())))
    expected = {
        task: sum(loss for loss, _ in found) / sum(tokens for _, tokens in found) for task, found in by_task.items()
    }
    losses = task_losses(model.train(), samples)
    assert model.training, "left as it came"
    assert losses == pytest.approx(expected, rel=1e-4)
    assert judged["base_model"][0].looks[0][1] == pytest.approx(mean_over_tasks(expected), rel=1e-4)
