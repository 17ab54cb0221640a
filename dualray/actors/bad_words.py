"""Words that must not be said, as the token ids that would say them."""

from __future__ import annotations

from collections.abc import Iterable

from dualray.data.tokenizer import Tokenizer


def bad_word_ids(words: Iterable[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Ids of each word as it begins a text and as it follows a space, as vLLM reads them.

    Behind a space it counts only where the space is a part of its first token; otherwise the first
    form finds it there too.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        plain = tuple(tokenizer.encode(word.lstrip() or word))
        spaced = tuple(tokenizer.encode(" " + word.lstrip()))
        if plain:
            found.append(plain)
        if spaced and spaced[:1] != plain[:1] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(dict.fromkeys(found))
