"""Text as a metric and a word count see it: tokens of every script.

English words stand between spaces. Chinese, Japanese, Thai, Khmer, Lao and Burmese are written without
spaces, so here each of their characters is a token and counts as a word.
"""

from __future__ import annotations

import re
import unicodedata

import regex

_ASCII_TOKEN = re.compile(r"[a-z0-9]+")
# A letter or digit of a script without spaces, with the marks on it. ー, 々, 〆 are shared by several scripts.
_CHARACTER = r"[\p{L}\p{N}&&[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Khmer}\p{Lao}\p{Myanmar}ー々〆〇]]\p{M}*"
# Emoji and other pictures, which may be a whole answer; not the signs that decorate a word.
_SYMBOL = r"[[\p{So}🏻-🏿]--[©®°\uFFFC\uFFFD]]"
_WORD = rf"(?:(?!{_CHARACTER})[\p{{L}}\p{{M}}\p{{N}}])+"
_TOKEN = regex.compile(rf"(?V1){_CHARACTER}|{_SYMBOL}|{_WORD}")
_SPACELESS = regex.compile(rf"(?V1){_CHARACTER}")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")  # zero-width, joiners, soft hyphen, variants
_EDGES = regex.compile(r"^[\s\p{Default_Ignorable_Code_Point}]+|[\s\p{Default_Ignorable_Code_Point}]+$")


def tokens(text: str) -> list[str]:
    """The text's tokens, in order; those of rouge-score (without stemmer) where the text is ASCII.

    Other text is NFKC and case-folded, invisible characters are removed; a token is a run of letters,
    marks and digits, one character of a script without spaces, or one symbol such as an emoji.
    """
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return _TOKEN.findall(_INVISIBLE.sub("", folded))


def has_token(text: str) -> bool:
    """Whether `tokens` finds any."""
    return bool(_ASCII_TOKEN.search(text.lower()) if text.isascii() else tokens(text))


def count_words(text: str) -> int:
    """Words between white space; a word of a script without spaces counts its characters."""
    if text.isascii():
        return len(text.split())
    return sum(len(_TOKEN.findall(word)) if _SPACELESS.search(word) else 1 for word in text.split())


def canonical(text: str) -> str:
    """The text for a comparison character by character: NFC, without white space or invisible characters around it."""
    return text.strip() if text.isascii() else _EDGES.sub("", unicodedata.normalize("NFC", text))
