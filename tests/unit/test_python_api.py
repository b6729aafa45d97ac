"""`from birbal_ray.score import score, ScoreConfig` and the like: the functions that the commands call."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest

from birbal_ray.mix import MixConfig, MixResult, mix
from birbal_ray.report import ReportResult, report
from birbal_ray.settings import Settings
from tests.conftest import REPOSITORY
from tests.fixtures.score_folder import made_up_rows, write_score_folder

STEPS = ("score", "mix", "tune", "train", "evaluate")


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_a_function_of_its_settings(step):
    package = importlib.import_module(f"birbal_ray.{step}")
    name = step.capitalize()
    config, result = getattr(package, f"{name}Config"), getattr(package, f"{name}Result")
    assert issubclass(config, Settings)
    signature = inspect.signature(getattr(package, step))
    assert next(iter(signature.parameters.values())).annotation == config.__name__
    assert signature.parameters["overwrite"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.return_annotation == result.__name__
    assert set(package.__all__) == {step, f"{name}Config", f"{name}Result"}
    with pytest.raises(AttributeError, match=rf"module 'birbal_ray.{step}' has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_packages_loads_nothing_heavy():
    names = ", ".join(f"birbal_ray.{step}" for step in (*STEPS, "report", "serve"))
    code = (
        f"import sys, {names}\nprint([n for n in ('ray', 'torch', 'vllm', 'pyarrow', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_steps_in_python(tmp_path):
    scores = write_score_folder(tmp_path / "score", made_up_rows(4, 60))
    config = MixConfig(
        scores=str(scores), output=str(tmp_path / "mix"), task_score={"exact_match_budget": 20, "generation_budget": 20}
    )
    result = mix(config)
    assert isinstance(result, MixResult)
    assert result.manifest["rows"]["kept"] == 40
    page = report(tmp_path)
    assert isinstance(page, ReportResult)
    assert page.missing == {"train": "not run", "evaluate": "not run"}


def test_the_readme_s_python_names_what_exists():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = [
        block for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL) if "birbal" in block
    ]
    imported = set()
    for block in blocks:
        scope: dict = {}
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("birbal_ray"):
                imported |= {alias.name for alias in node.names}
                exec(ast.unparse(node), scope)
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Name) and call.func.id.endswith("Config"):
                exec(ast.unparse(call), scope)  # settings that the schema takes
    assert {*STEPS, "report"} <= imported
