"""The tokenizer that travels in a checkpoint."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dualray.checkpoint.attached_files import restore_files
from dualray.checkpoint.hf_import import TOKENIZER
from dualray.checkpoint.reader import Reader
from dualray.data.tokenizer import Tokenizer, load_tokenizer


def stored_tokenizer(reader: Reader) -> Tokenizer | None:
    """None if there is none; other files of the text side may be there nevertheless."""
    if f"{TOKENIZER}/tokenizer.json" not in reader:
        return None
    with tempfile.TemporaryDirectory() as folder:
        restore_files(reader, TOKENIZER, Path(folder))
        return load_tokenizer(folder)
