"""How much text a token can stand for: what is surely too long need not be encoded to know it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import pre_tokenizers


def most_bytes(parsed: Mapping[str, Any], vocab: Mapping[str, int]) -> int | None:
    """No token of the tokenizer.json `parsed` stands for more bytes of UTF-8 than this.

    None unless the tokenizer is byte-level and loses nothing: a normaliser shortens texts, an
    unknown token stands for any of them.
    """
    names = _names(parsed.get("pre_tokenizer"))
    loses = parsed.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}) or any(
        not token["special"] and (token.get("lstrip") or token.get("rstrip"))
        for token in parsed.get("added_tokens", ())
    )
    whole = set(pre_tokenizers.ByteLevel.alphabet()) <= vocab.keys()
    if names is None or "ByteLevel" not in names or loses or not whole:
        return None
    return max(len(name.encode()) for name in vocab)


def _names(pre_tokenizer: Mapping[str, Any] | None) -> set[str] | None:
    """Kinds of the steps before the model; None if one of them drops text."""
    if pre_tokenizer is None:
        return set()
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        steps = [_names(step) for step in pre_tokenizer["pretokenizers"]]
        return None if None in steps else {name for step in steps for name in step or ()}
    keeps = kind in ("ByteLevel", "Digits") or (
        kind == "Split" and pre_tokenizer.get("behavior") != "Removed"
    )
    return {kind} if keeps else None
