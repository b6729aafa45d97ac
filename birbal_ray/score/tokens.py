"""Prompts as token ids: they begin as the model expects and end with the prompt's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol
from zlib import crc32

from birbal_ray import models
from birbal_ray.ni.prompt import STOP, ChatTemplate
from birbal_ray.score.config import ScoreConfig

NUM_EMBEDDINGS = 1 << 15  # of the simulated tokenizer and engine


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        """`{"input_ids": …}`, one list of token ids per text."""


def load_tokenizer(config: ScoreConfig) -> Tokenizer:
    """The model's tokenizer. The simulated backend splits at white space."""
    if config.engine.backend == "simulated":
        return SimulatedTokenizer()
    return models.load_tokenizer(models.resolve_model(config.model.name, config.model.revision, weights=False).path)


def prompt_token_ids(
    tokenizer: Tokenizer, texts: list[str], *, as_trained: bool = False, chat: ChatTemplate | None = None
) -> list[list[int]]:
    """Token ids of prompts that a model is to continue.

    They begin with the special tokens that the tokenizer puts before a text, each once (some tokenizers add BOS
    twice), or, `as_trained`, with BOS wherever there is one, as training samples do; a chat template writes its own.
    They end with the text's own tokens: behind an EOS, which some tokenizers append, a model starts another text.
    """
    if not texts:
        return []
    bos = getattr(tokenizer, "bos_token_id", None)
    if chat is not None:
        leading: list[int] = []
    elif as_trained:
        leading = [] if bos is None else [bos]
    else:
        (marked,), (plain,) = tokenizer(["x"])["input_ids"], tokenizer(["x"], add_special_tokens=False)["input_ids"]
        starts = (start for start in range(len(marked)) if marked[start : start + len(plain)] == plain)
        leading = list(dict.fromkeys(marked[: next(starts, 0)]))
    return [leading + ids for ids in encode(tokenizer, texts)]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens around it.

    A plan counts millions of references: the Rust tokenizer is asked itself, where there is one, since transformers
    makes lists of everything else that it knows about each text (76,196 references: 6.6 s, the tokens alone 3.5).
    """
    if not texts:
        return []
    # In either case a call of transformers: it sets truncation, padding and the meaning of special tokens in a text.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ids = tokenizer(texts[:1] if backend else texts, add_special_tokens=False)["input_ids"]
    return [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)] if backend else ids


def stops(tokenizer: Any, chat: ChatTemplate | None) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(stop strings, stop token ids) of completions: the blank line, or what ends a turn in the chat template.

    An end of turn that is one token is stopped at by its id: the text of special tokens is left out of completions.
    """
    if chat is None:
        return (STOP,), ()
    (ids,) = tokenizer([chat.end_of_turn], add_special_tokens=False)["input_ids"]
    return ((), tuple(ids)) if len(ids) == 1 else (tuple(filter(None, [chat.end_of_turn])), ())


_words: dict[int, str] = {}  # token id → word, of the words that this process has seen


def word_token_ids(words: Sequence[str]) -> list[int]:
    """Made-up ids below NUM_EMBEDDINGS; equal words get equal ids on every machine."""
    ids = [crc32(word.encode()) % NUM_EMBEDDINGS for word in words]
    _words.update(zip(ids, words, strict=True))
    return ids


class SimulatedTokenizer:
    """For tests: one token per word; decodes the words it has seen. A chat's turns are `<role> text <end>`."""

    bos_token_id = None
    chat_template = "as apply_chat_template writes it"

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The turns as one text."""
        turns = "".join(f"<{one['role']}>\n{one['content']}\n<end>\n" for one in messages)
        return turns + "<assistant>\n" * add_generation_prompt

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [word_token_ids(one.split()) for one in text]}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The words with one space between them."""
        return " ".join(_words.get(token_id, f"<{token_id}>") for token_id in token_ids)
