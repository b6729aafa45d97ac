"""How fast a card is, before anything has run on it: arithmetic on data sheets, as a range that names its source.

What this machine measured itself goes first (`progress.last_figures`); these figures stand in until it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

# Of the dense bf16 peak: QLoRA fine-tunes reach 0.47 on one RTX 4090 (torchtune's README, Llama-3.1-8B, 2k packs).
TRAIN_UTILISATION = (0.35, 0.50)
# A step with checkpointing passes the frozen weights three times (forward, again, backward): 2 flop a weight each.
TRAIN_FLOP_PER_WEIGHT = 6
PREFILL_UTILISATION = (0.40, 0.75)
DECODED_TOGETHER = (25, 60)  # sequences per reading of the weights; Mistral-7B on 24 GB holds about 40
WEIGHT_BYTES = 2  # bf16
MEASURED = "measured on this machine"
LOAD_SECONDS = {"cpu": (20.0, 60.0), "gpu": (40.0, 180.0)}  # an engine, or a model to train, until it works


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's figures. `memory_gib` is what its driver reports, less than the data sheet's."""

    memory_gib: float
    tflops: float  # dense bf16 with float32 sums
    bandwidth_gb: float  # GB/s


# By Ray's names; NVIDIA's data sheets.
CARDS = {
    "T4": Card(14.7, 65, 320),
    "V100": Card(15.8, 125, 900),
    "A10G": Card(22.5, 70, 600),
    "L4": Card(22.5, 121, 300),
    "GeForce-RTX-3090": Card(23.6, 71, 936),
    "GeForce-RTX-4090": Card(23.6, 165, 1008),
    "GeForce-RTX-5090": Card(31.4, 209, 1792),
    "A100-40G": Card(39.4, 312, 1555),
    "L40S": Card(44.4, 362, 864),
    "A100-80G": Card(79.3, 312, 2039),
    "H100": Card(79.2, 989, 3350),
    "H200": Card(139.8, 989, 4800),
}


class Speed(NamedTuple):
    """A rate per second as a range. `source` says where it comes from."""

    low: float
    high: float
    source: str


def measured(rate: float) -> Speed:
    """A rate that was seen, give or take a tenth."""
    return Speed(rate * 0.9, rate * 1.1, MEASURED)


def training_tokens(card: str, flop_per_token: float) -> Speed:
    """Tokens a second of a QLoRA fine-tune on one card. Raises KeyError for a card that isn't in CARDS."""
    low, high = (CARDS[card].tflops * 1e12 * share / flop_per_token for share in TRAIN_UTILISATION)
    shares = " to ".join(f"{share:.0%}" for share in TRAIN_UTILISATION)
    return Speed(low, high, f"arithmetic: {shares} of {CARDS[card].tflops:g} TFLOP/s ({card}'s data sheet)")


def prompts(card: str, num_weights: int, own_tokens: float, completion_tokens: float) -> Speed:
    """Prompts a second of one vLLM engine in bf16 whose shared prefixes are cached.

    `own_tokens`, `completion_tokens`: of one prompt, on average. Raises KeyError for a card that isn't in CARDS.
    """
    figures = CARDS[card]

    def rate(utilisation: float, together: int) -> float:
        prefill = own_tokens * 2 * num_weights / (figures.tflops * 1e12 * utilisation)
        decode = completion_tokens * WEIGHT_BYTES * num_weights / (figures.bandwidth_gb * 1e9 * together)
        return 1 / (prefill + decode)

    low, high = (rate(*pair) for pair in zip(PREFILL_UTILISATION, DECODED_TOGETHER, strict=True))
    source = f"arithmetic: {own_tokens:.0f} own and {completion_tokens:.0f} new tokens a prompt, {card}'s data sheet"
    return Speed(low, high, source)
