"""The `birbal` command: which commands there are, and how an error becomes an exit code.

A command's module, with the settings' schemas, is imported when that command is called.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from birbal_ray import __version__

EXIT_FAILED, EXIT_USAGE = 1, 2
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
COMMANDS = {  # name: its module, its line in `birbal --help`
    "demo": ("recipe", "The whole recipe, small, on this machine."),
    "plan": ("recipe", "Hours and money of the recipe, before it starts."),
    "pipeline": ("recipe", "The whole recipe on your tasks and model, in one budget."),
    "tasks": ("tasks", "List, show, check, label, import, download tasks."),
    "score": ("steps", "Few-shot inference over task files, scored."),
    "mix": ("steps", "A training set from the scores and outside datasets."),
    "tune": ("steps", "The sampling ratios that a short fine-tune learns most from."),
    "train": ("models", "QLoRA on a mix, within a wall-clock budget."),
    "merge": ("models", "Fold an adapter into its base model's weights."),
    "evaluate": ("results", "Held-out scores of base model, adapters, merged models."),
    "serve": ("models", "Answer prompts over HTTP, as the challenge's server."),
    "report": ("results", "One page on what a run's steps did."),
    "status": ("recipe", "What is done, running and next in a run folder."),
    "harness": ("results", "Measure a model on public benchmarks."),
    "leaderboard": ("results", "Place a model among the challenge's teams."),
    "models": ("models", "The models that come with birbal."),
    "export-predictions": ("results", "A score run as the published JSON."),
    "doctor": ("recipe", "Check versions, CPUs, GPUs, disk, model; or a Ray cluster."),
}


class Commands(click.Group):
    """The commands of COMMANDS. Known errors end as one line on stderr: exit 2 for settings and inputs, 1 for a run."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run with a stdout and a stderr: Python has None for a closed one, and `print` then writes to the other."""
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115, PTH123
        return super().main(*arguments, **options)

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order of the recipe."""
        return list(COMMANDS)

    def get_command(self, context: click.Context | None, name: str) -> click.Command | None:
        """Import the command's module and return the command."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"birbal_ray.cli.{COMMANDS[name][0]}")
        return getattr(module, name.replace("-", "_"))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, context: click.Context) -> Any:
        """Run the command; map our own exceptions to exit codes, let bugs show their traceback."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("\nstopped; what is finished is kept, the same command continues", err=True)
            context.exit(EXIT_FAILED)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends these, the last one (of `| head`) quietly
        except Exception as error:
            from birbal_ray.models import ModelError
            from birbal_ray.ni.schema import TaskError
            from birbal_ray.run import RunError, RunFailedError
            from birbal_ray.settings import ConfigError

            usage = (ConfigError, TaskError, ModelError)
            # Of a path on the command line that can't be what it should be.
            not_folder = (FileExistsError, NotADirectoryError)
            usage += (*not_folder, IsADirectoryError, PermissionError)  # type: ignore[assignment]
            if not isinstance(error, (*usage, RunError, OSError)):  # OSError: a full disk, a lost connection
                raise
            text = str(error)
            if isinstance(error, OSError) and error.filename and error.strerror:
                a_file = "expected a folder, but it, or a part of this path, is a file"
                text = f"{error.filename}: {a_file if isinstance(error, not_folder) else error.strerror}"
            click.echo(f"error: {text}", err=True)
            if isinstance(error, RunFailedError):
                click.echo("what is finished is kept; the same command continues", err=True)
            context.exit(EXIT_USAGE if isinstance(error, usage) else EXIT_FAILED)


# Their names, among which click looks for the nearest one.
@click.group(cls=Commands, context_settings=CONTEXT, commands=dict.fromkeys(COMMANDS))
@click.version_option(__version__, prog_name="birbal")
def main() -> None:
    """Make a language model better with one GPU and one day: find what it gets wrong, train on that.

    \b
    Try it on this machine, no data or GPU needed:
      birbal demo
    The steps; the same command continues a step that was stopped:
      birbal tasks fetch --output natural-instructions
      birbal score --tasks natural-instructions/ --config mistral-7b --output runs/score
      birbal mix --scores runs/score --output runs/mix --config birbal-200k
      birbal train --mix runs/mix --output runs/train --config mistral-7b-qlora
      birbal evaluate --tasks natural-instructions/ --config mistral-7b --adapter runs/train --output runs/evaluate
      birbal report runs
      birbal status runs
      birbal merge --run runs/train --output models/merged
      birbal serve --run runs/train
    """
