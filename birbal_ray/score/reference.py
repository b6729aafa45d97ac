"""Does an engine serve an adapter? Its log probabilities against those that PEFT computed.

An engine that finds none of an adapter's modules serves the base model without an error. Training leaves
reference.json beside an adapter: of a few prompts the likeliest next tokens, with their log probabilities under the
adapter and under the base model. An engine that serves the adapter changes them as PEFT does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from birbal_ray.models import ModelError
from birbal_ray.score.engine import Adapter, Engine, Request, Sampling

REFERENCE_FILE = "reference.json"  # beside an adapter, or a model it was folded into: what PEFT computes with it
CHOICES = 20  # next tokens that a reference holds of each prompt
MIN_APPLIED = 0.1  # an engine that shows less of an adapter's change than this does not apply it
# The smallest change that is looked at, in nats: in one engine, with and without the adapter; and for a model that it
# was folded into, whose base model PEFT may have held in four bits.
MIN_CHANGE, MIN_CHANGE_FOLDED = 0.1, 1.0


@dataclass(frozen=True, slots=True)
class Agreement:
    """An engine against PEFT, over one next token of each prompt: the one that the adapter changes most."""

    change_nats: float  # PEFT's largest change of a log probability by the adapter
    applied_fraction: float  # of PEFT's change in the engine: 1 is all of it, 0 the base model
    difference_nats: float  # largest distance of the engine's log probability from PEFT's, adapter on


def reference_prompts(prompts: Sequence[list[int]], adapter: Any, base: Any) -> list[dict[str, Any]]:
    """`prompts` of a reference.json. `adapter`, `base`: float32 logits of the next token, (prompts, vocabulary)."""
    found, chosen = adapter.log_softmax(-1).topk(min(CHOICES, adapter.shape[-1]))
    without = base.log_softmax(-1).gather(-1, chosen)
    keys = ("token_ids", "next_token_ids", "adapter_log_probs", "base_log_probs")
    rows = zip(prompts, chosen.tolist(), found.tolist(), without.tolist(), strict=True)
    return [dict(zip(keys, row, strict=True)) for row in rows]


def check_engine(engine: Engine, model: Path, adapters: Sequence[Adapter]) -> None:
    """Refuse an engine that does not apply what has a reference.json: its model, if folded, and each adapter.

    Raises ModelError with the numbers.
    """
    folded = "it is not the adapter that was folded into this model"
    beside = "fold it in with `birbal merge` (evaluate: --set serve_adapters=merged)"
    for name, folder, least in [
        ("", model, MIN_CHANGE_FOLDED),
        *((a.name, Path(a.path), MIN_CHANGE) for a in adapters),
    ]:
        if (folder / REFERENCE_FILE).is_file():
            reference = json.loads((folder / REFERENCE_FILE).read_text(encoding="utf-8"))
            if reason := why_not_applied(compare_with_peft(engine, reference, name), least):
                raise ModelError(f"adapter in {folder}: {reason}; {beside if name else folded}")


def compare_with_peft(engine: Engine, reference: Mapping[str, Any], adapter: str = "") -> Agreement:
    """Ask the engine for the reference's prompts; without `adapter` its model is one that the adapter was folded into.

    Prompts longer than the engine takes are left out.
    """
    probes = []  # (token ids with the next token, PEFT's log probability with the adapter, without it)
    for prompt in reference["prompts"]:
        choices = zip(prompt["next_token_ids"], prompt["adapter_log_probs"], prompt["base_log_probs"], strict=True)
        token, with_adapter, without = max(choices, key=lambda one: abs(one[1] - one[2]))
        if len(prompt["token_ids"]) + 1 < engine.max_model_len:
            probes.append(([*prompt["token_ids"], token], with_adapter, without))
    served = _last_log_probs(engine, [ids for ids, *_ in probes], adapter)
    base = _last_log_probs(engine, [ids for ids, *_ in probes], "") if adapter else [probe[2] for probe in probes]
    changes = [with_adapter - without for _, with_adapter, without in probes]
    shown = sum((a - b) * change for a, b, change in zip(served, base, changes, strict=True))
    return Agreement(
        change_nats=max(map(abs, changes), default=0.0),
        applied_fraction=shown / max(1e-12, sum(change**2 for change in changes)),
        difference_nats=max((abs(a - probe[1]) for a, probe in zip(served, probes, strict=True)), default=0.0),
    )


def why_not_applied(found: Agreement, least_change: float = MIN_CHANGE) -> str | None:
    """Why the engine can't have applied the adapter, or None; a change under `least_change` nats proves nothing."""
    if found.change_nats < least_change or found.applied_fraction >= MIN_APPLIED:
        return None
    return (
        f"it changes PEFT's log probabilities by up to {found.change_nats:.2f} nats, and the engine shows "
        f"{max(0.0, found.applied_fraction):.0%} of that change: the engine does not apply it"
    )


def _last_log_probs(engine: Engine, prompts: Sequence[Sequence[int]], adapter: str) -> list[float]:
    """The log probability of each prompt's last token, in nats."""
    asked = Sampling(prompt_logprobs=True)
    for number, ids in enumerate(prompts):
        engine.add(f"reference-{number}", Request("", ids, 1, adapter, asked))
    found: dict[str, float] = {}
    while engine.has_unfinished():
        found |= {key: done.prompt_tokens[-1].logprob for key, done in engine.step()}
    return [found[f"reference-{number}"] for number in range(len(prompts))]
