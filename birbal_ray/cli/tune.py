"""`birbal tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from birbal_ray.cli.common import config_options, format_option, note, overwrite_option, print_table

if TYPE_CHECKING:
    from birbal_ray.tune.run import TuneResult


@click.command(short_help="The sampling ratios that a short fine-tune learns most from.")
@click.option("--scores", metavar="DIR", help="Output folder of `birbal score`.")
@click.option("--output", metavar="DIR", help="Run folder; the same command continues a search that broke off.")
@click.option("--model", metavar="NAME", help="The proxy that is fine-tuned (smollm2-135m).")
@click.option("--num-trials", type=click.IntRange(min=1), help="Mixes that the search tries, besides baselines (24).")
@click.option("--seed", type=click.IntRange(min=0), help="Another search.")
@overwrite_option
@click.option("--dry-run", is_flag=True, help="Print what would be run; run nothing.")
@config_options
@format_option
def tune(
    scores: str | None,
    output: str | None,
    model: str | None,
    num_trials: int | None,
    seed: int | None,
    overwrite: bool,
    dry_run: bool,
    config_file: str | None,
    assignments: tuple[str, ...],
    output_format: str,
) -> None:
    """Search gamma, the exact-match share, the sources' shares and failed-first with Ray Tune.

    Each trial builds a mix from the same scores, fine-tunes a proxy on a fixed number of tokens, and
    is judged by its loss on rows of every task that no trial trains on. Hand-made mixes run beside the
    search; the best ones and these run again with fresh seeds, and only that decides.
    Writes best_mix.yaml (for `birbal mix --config`), trials.parquet, search.png, verdict.png.

    \b
    Examples:
      birbal tune --scores runs/score --output runs/tune --config configs/tune/tiny.yaml --dry-run
      birbal tune --scores runs/score --output runs/tune --config configs/tune/tiny.yaml
      birbal mix --config runs/tune/best_mix.yaml --output runs/mix
    """
    from birbal_ray.settings import load_config
    from birbal_ray.tune import run as step
    from birbal_ray.tune.config import TuneConfig

    flags = {"scores": scores, "output": output, "train.model.name": model, "num_trials": num_trials, "seed": seed}
    config = load_config(TuneConfig, config_file, assignments, flags)
    if dry_run:
        print_table(step.dry_run(config), output_format)
        return
    print_result(step.tune(config, overwrite=overwrite), output_format)


def print_result(result: TuneResult, output_format: str) -> None:
    """The table of mixes on stdout, the verdict and the files on stderr."""
    manifest, folder = result.manifest, result.folder
    print_table(manifest["summary"], output_format)
    if manifest["base_objective"] is not None:
        note(f"held-out loss before any training: {manifest['base_objective']:.4f}")
    if manifest.get("left_out"):
        note(manifest["left_out"])
    for found in manifest["verdicts"]:
        note(found["sentence"])
    best = manifest["best"]
    if best["is_baseline"]:
        note(f"lowest mean loss: the baseline {best['mix']}; the search found nothing better")
    elif not manifest["verdicts"]:
        note(f"lowest loss: {best['mix']}, of one trial (repeats.top=0): no verdict against the baselines")
    note(f"its mix: birbal mix --config {folder / 'best_mix.yaml'} --output DIR")
    note(f"all trials: {folder / 'trials.parquet'}; pictures: {folder / 'search.png'}")
