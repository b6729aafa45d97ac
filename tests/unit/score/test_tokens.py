"""A prompt's ids begin as the model expects and end in the prompt."""

from __future__ import annotations

import pytest

from birbal_ray.score.tokens import encode, prompt_token_ids

BOS, EOS, MASK = 1, 2, 3


class Letters:
    """A letter is its code point; `around` is what the tokenizer adds by itself."""

    bos_token_id = BOS

    def __init__(self, before=(), after=()):
        self.before, self.after = list(before), list(after)

    def __call__(self, text, *, add_special_tokens=True):
        before, after = (self.before, self.after) if add_special_tokens else ([], [])
        return {"input_ids": [[*before, *map(ord, one), *after] for one in text]}


@pytest.mark.parametrize(
    ("before", "after", "leading"),
    [
        ([], [], []),
        ([BOS], [], [BOS]),
        ([BOS], [EOS], [BOS]),
        ([], [EOS], []),
        ([BOS, BOS], [], [BOS]),
        ([BOS, BOS], [EOS, EOS], [BOS]),
        ([MASK, BOS], [], [MASK, BOS]),
    ],
)
def test_what_the_tokenizer_adds_stays_once_in_front_and_never_behind(before, after, leading):
    tokenizer = Letters(before, after)
    assert prompt_token_ids(tokenizer, ["ab", "x", ""]) == [[*leading, 97, 98], [*leading, 120], leading]
    assert prompt_token_ids(tokenizer, ["ab"], as_trained=True) == [[BOS, 97, 98]]


def test_without_a_bos_and_without_texts():
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    assert prompt_token_ids(tokenizer, ["ab"], as_trained=True) == [[97, 98]]
    assert prompt_token_ids(tokenizer, []) == []


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_ids_are_those_of_the_tokenizer_s_own_ids(split_special_tokens):
    """Special tokens inside a text, no text at all, scripts; and truncation, which a tokenizer's file may ask for."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "b": 2, "##b": 3, "[": 4, "end": 5, "]": 6}, unk_token="[UNK]"))
    backend.pre_tokenizer = BertPreTokenizer()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[end]", bos_token="a", split_special_tokens=split_special_tokens
    )
    texts = ["a b ab", "", "a[end]b", "абв 漢字", "a" * 200]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert encode(tokenizer, texts) == expected
    assert list(map(len, expected[:2])) == [4, 0], "neither cut nor padded"
    assert encode(tokenizer, []) == [] == encode(Letters(), [])
    assert encode(Letters([BOS]), ["ab", ""]) == [[97, 98], []]
