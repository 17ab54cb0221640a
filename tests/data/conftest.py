"""A small corpus of jsonl rows and its shards, built once for the tests that only read."""

import json
import random
from pathlib import Path

import pytest

from dualray.data.dataset import TokenDataset
from dualray.data.shards import build

WORDS = "the cat sat on a mat while dogs ran and birds flew over gr\u00fcne fields".split()


def write_corpus(path: Path, *, num_documents: int = 120, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(num_documents):
        lines = [" ".join(rng.choices(WORDS, k=9)) for _ in range(rng.randint(1, 8))]
        texts.append("\n".join(lines) + "\n")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    return path, write_corpus(path)


@pytest.fixture(scope="session")
def shards(corpus, tmp_path_factory) -> Path:
    """Byte tokens in shards of 1,000, so that windows cross from one to the next."""
    out = tmp_path_factory.mktemp("shards") / "bytes"
    build([corpus[0]], "bytes", out, shard_tokens=1000)
    return out


@pytest.fixture(scope="session")
def dataset(shards) -> TokenDataset:
    return TokenDataset.open(shards)
