"""The `birbal` command. Heavy libraries are imported only inside the commands that need them."""

from __future__ import annotations

import click

from birbal_ray import __version__
from birbal_ray.cli.common import Commands
from birbal_ray.cli.doctor import doctor
from birbal_ray.cli.evaluate import evaluate
from birbal_ray.cli.export import export_predictions
from birbal_ray.cli.harness import harness
from birbal_ray.cli.leaderboard import leaderboard
from birbal_ray.cli.merge import merge
from birbal_ray.cli.mix import mix
from birbal_ray.cli.models import models
from birbal_ray.cli.pipeline import demo, pipeline
from birbal_ray.cli.report import report
from birbal_ray.cli.score import score
from birbal_ray.cli.status import status
from birbal_ray.cli.tasks import tasks
from birbal_ray.cli.train import train
from birbal_ray.cli.tune import tune


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="birbal")
def main() -> None:
    """Make a language model better with one GPU and one day: find what it gets wrong, train on that.

    \b
    Try it on this machine, no data or GPU needed:
      birbal demo
    The steps, each resumable by running the same command again:
      birbal tasks list --tasks natural-instructions/
      birbal score --tasks natural-instructions/ --model mistralai/Mistral-7B-v0.1 --output runs/score
      birbal mix --scores runs/score --output runs/mix
      birbal tune --scores runs/score --output runs/tune --config configs/tune/birbal.yaml
      birbal train --mix runs/mix --output runs/train --config configs/train/mistral-7b-qlora.yaml
      birbal evaluate --tasks natural-instructions/ --adapter runs/train --output runs/evaluate
      birbal report runs
      birbal status runs
      birbal merge --run runs/train --output models/merged
    """


for command in (
    demo,
    pipeline,
    tasks,
    models,
    score,
    mix,
    tune,
    train,
    merge,
    evaluate,
    report,
    status,
    harness,
    leaderboard,
    export_predictions,
    doctor,
):
    main.add_command(command)
