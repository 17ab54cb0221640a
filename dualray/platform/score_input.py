"""What `dualray score` is given: token ids as JSON, or text, as sequences that a model can take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualray.checkpoint.reader import Reader
from dualray.errors import CheckpointError, DataError
from dualray.model.config import ModelConfig
from dualray.platform.stored_tokenizer import stored_tokenizer


def read_tokens(path: Path, model: ModelConfig) -> list[list[int]]:
    """The sequences of a JSON file that holds a list of lists of ids. Raises DataError."""
    try:
        sequences = json.loads(_text(path, "--tokens"))
    except (ValueError, RecursionError) as error:
        where = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"--tokens {path}{where} is not JSON", hint="write a list of lists of token ids"
        ) from None
    if not isinstance(sequences, list) or not sequences:
        raise DataError(
            f"--tokens {path} must be a list of lists of token ids and is {_kind(sequences)}",
            hint="write, say, [[1, 2, 3], [4, 5]]",
        )
    for index, sequence in enumerate(sequences):
        _check_sequence(f"sequence {index} of --tokens {path}", sequence, model)
    _refuse_nothing_to_score(f"--tokens {path}", sequences)
    return sequences


def read_text(path: Path, reader: Reader, model: ModelConfig) -> list[list[int]]:
    """A text file as ids of the checkpoint's tokenizer, cut where the context ends.

    Each piece begins with the last token of the one before, so that every token of the text
    but the first is scored once. Raises DataError or CheckpointError.
    """
    text = _text(path, "--text")
    tokenizer = stored_tokenizer(reader)
    if tokenizer is None:
        raise CheckpointError(
            f"checkpoint {reader.folder} holds no tokenizer",
            hint="give --tokens, or import the model with its tokenizer.json",
        )
    ids = tokenizer.encode(text)
    _refuse_nothing_to_score(f"--text {path}", [ids])
    step = max(1, model.max_position_embeddings - 1)
    pieces = [ids[start : start + step + 1] for start in range(0, len(ids) - 1, step)]
    for piece in pieces:
        _check_sequence(f"--text {path}", piece, model)
    return pieces


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start} of {option} {path} is not UTF-8", hint="convert the file"
        ) from None
    except OSError as error:
        raise DataError(
            f"{option} {path} cannot be read ({error.strerror})", hint="check the path"
        ) from None


def _check_sequence(name: str, sequence: Any, model: ModelConfig) -> None:
    if not isinstance(sequence, list) or not sequence:
        raise DataError(
            f"{name} must be a list of token ids and is {_kind(sequence)}",
            hint="write, say, [[1, 2, 3], [4, 5]]",
        )
    for position, token in enumerate(sequence):
        if type(token) is not int:  # True is an int, but no token
            raise DataError(
                f"{name} has {json.dumps(token)[:40]} at position {position}, which is no token id",
                hint="write whole numbers",
            )
        if not 0 <= token < model.vocab_size:
            raise DataError(
                f"{name} has token {token} at position {position} and model.vocab_size is "
                f"{model.vocab_size}",
                hint="use the tokenizer that the checkpoint was trained with",
            )
    if len(sequence) > model.max_position_embeddings:
        raise DataError(
            f"{name} has {len(sequence)} tokens and model.max_position_embeddings is "
            f"{model.max_position_embeddings}",
            hint="cut it into shorter sequences",
        )


def _refuse_nothing_to_score(name: str, sequences: list[list[int]]) -> None:
    if all(len(sequence) < 2 for sequence in sequences):
        raise DataError(
            f"{name} has no second token in any sequence, and the first is given",
            hint="give sequences of two tokens or more",
        )


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if isinstance(value, list):
        return "an empty list"
    words = {dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")
