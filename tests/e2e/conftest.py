"""A model that vLLM's CPU build serves in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def served_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads of 32 values, the fewest that vLLM's CPU attention takes, and its tokenizer."""
    from transformers import AutoConfig, LlamaForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("served") / "model")
    config = AutoConfig.from_pretrained(folder)
    config.head_dim = 32
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
