"""What `build` writes decodes to the text; damage is named; nothing half-written stays."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from dualray.data import shards as shards_module
from dualray.data.dataset import TokenDataset
from dualray.data.documents import read_pieces
from dualray.data.segments import cut
from dualray.data.shards import build
from dualray.data.sources import list_files
from dualray.data.tokenizer import train_bpe
from dualray.errors import DataError


def stream(dataset: TokenDataset, split: str) -> np.ndarray:
    return dataset.tokens(split, 0, dataset.split(split).num_tokens)


def documents_of(dataset: TokenDataset, split: str) -> list[bytes]:
    """Token stream -> documents, by the tokenizer's own decode."""
    tokenizer, tokens = dataset.tokenizer(), stream(dataset, split).tolist()
    assert tokens[0] == tokens[-1] == dataset.eos_id
    texts, start = [], 1
    for at, token in enumerate(tokens[1:], start=1):
        if token == dataset.eos_id:
            texts.append(tokenizer.decode(tokens[start:at]).encode())
            start = at + 1
    return texts


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_both_splits_together_are_the_corpus(corpus, tmp_path, spec):
    path, texts = corpus
    out = tmp_path / "deep" / "out"
    manifest = build([path], spec, out, shard_tokens=777)
    dataset = TokenDataset.open(out)
    assert dataset.manifest == manifest
    by_split = {name: documents_of(dataset, name) for name in ("train", "heldout")}
    total = 0
    for name, documents in by_split.items():
        split = dataset.split(name)
        assert split.num_documents == len(documents)
        assert split.num_bytes == sum(map(len, documents))
        assert split.num_tokens == sum(shard.num_tokens for shard in split.shards)
        assert all(shard.num_tokens == 777 for shard in split.shards[:-1])
        total += split.num_bytes
    assert total == len("".join(texts).encode())
    assert b"".join(by_split["heldout"]) == dataset.heldout_text()
    assert 0.03 < dataset.split("heldout").num_bytes / total < 0.08
    # Each document is whole in one split, or a run of its parts alternates between the splits.
    whole = {text.encode() for text in texts}
    parts = [part for documents in by_split.values() for part in documents if part not in whole]
    assert len(parts) <= 2 * 2 * 4
    assert all(any(part in text for text in whole) for part in parts)
    assert manifest.tokenizer_sha256 == dataset.tokenizer().sha256
    assert manifest.vocab_size == (257 if spec == "bytes" else 300)


def test_training_never_sees_heldout_text_not_even_the_tokenizer(corpus, tmp_path):
    path, _ = corpus
    manifest = build([path], "bpe:280", tmp_path / "out")
    pieces = read_pieces(list_files([str(path)])[0])
    segments = list(cut(pieces, manifest.segment_bytes, 0.05))
    train = [p.data.decode() for s in segments if not s.heldout for p in s.pieces]
    assert train_bpe(train, 280).sha256 == manifest.tokenizer_sha256
    heldout = b"".join(p.data for s in segments if s.heldout for p in s.pieces)
    assert heldout == TokenDataset.open(tmp_path / "out").heldout_text()


def test_the_gap_of_a_heldout_part_is_closed_on_both_sides(tmp_path):
    """One document: each side of a held-out part begins and ends with end-of-document."""
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i} of one document\n" for i in range(2000)))
    build([path], "bytes", tmp_path / "out")
    dataset = TokenDataset.open(tmp_path / "out")
    train, heldout = (documents_of(dataset, name) for name in ("train", "heldout"))
    assert len(heldout) == 2
    assert len(train) in (2, 3)
    rest = path.read_bytes()
    for part in heldout:
        assert part.startswith(b"line ")
        assert part.endswith(b"\n")
        before, rest = rest.split(part)
        assert before == (train.pop(0) if before else b"")
    assert [rest] == train or (not rest and not train)


def test_rebuilding_gives_the_same_data_whatever_the_shard_size(corpus, tmp_path):
    manifests = [
        build([corpus[0]], "bpe:270", tmp_path / f"{size}", shard_tokens=size)
        for size in (500, 10**6)
    ]
    manifests.insert(1, build([corpus[0]], "bpe:270", tmp_path / "again", shard_tokens=500))
    assert manifests[0] == manifests[1]
    assert manifests[2] != manifests[0]
    assert manifests[2].data_sha256 == manifests[0].data_sha256
    other = build([corpus[0]], "bpe:270", tmp_path / "other", heldout=0.1)
    assert other.data_sha256 != manifests[0].data_sha256


def test_a_given_tokenizer_file(corpus, tmp_path):
    build([corpus[0]], "bpe:270", tmp_path / "a")
    again = build([corpus[0]], tmp_path / "a" / "tokenizer.json", tmp_path / "b")
    assert again.data_sha256 == TokenDataset.open(tmp_path / "a").data_sha256


def test_wide_vocabularies_take_uint32(corpus, tmp_path, monkeypatch):
    def wide(texts, vocab_size):
        tokenizer = train_bpe(texts, 270)
        tokenizer.vocab_size = vocab_size
        return tokenizer

    monkeypatch.setattr(shards_module, "train_bpe", wide)
    for size, dtype in ((1 << 16, "uint16"), ((1 << 16) + 1, "uint32")):
        manifest = build([corpus[0]], f"bpe:{size}", tmp_path / dtype)
        dataset = TokenDataset.open(tmp_path / dtype)
        assert manifest.dtype == dtype == dataset.tokens("train", 0, 5).dtype.name
        assert dataset.tokens("train", 0, 5).tolist()[0] == dataset.eos_id


def test_shards_are_mapped_without_a_copy(corpus, tmp_path):
    build([corpus[0]], "bytes", tmp_path / "out")
    before = pa.total_allocated_bytes()
    dataset = TokenDataset.open(tmp_path / "out")
    tokens = stream(dataset, "train")
    assert pa.total_allocated_bytes() == before
    assert tokens.base is not None
    assert not tokens.flags.writeable


def test_tokens_across_shards(dataset):
    whole = np.concatenate([dataset.tokens("train", i, 1) for i in range(2500)])
    for start, count in ((0, 2500), (999, 2), (500, 1800), (1000, 1000), (1999, 1)):
        assert (dataset.tokens("train", start, count) == whole[start : start + count]).all()
    n = dataset.split("train").num_tokens
    assert len(dataset.tokens("train", n - 3, 10)) == 3
    assert len(dataset.tokens("train", n, 10)) == 0
    with pytest.raises(DataError, match="split is test and must be one of train, heldout; "):
        dataset.tokens("test", 0, 1)


def flip(path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(bytes(data))


def test_damage_is_found_and_named(shards, tmp_path):
    manifest = json.loads((shards / "manifest.json").read_text())
    names = [s["file"] for split in manifest["splits"].values() for s in split["shards"]]
    assert len(names) > 10
    for name in [names[3], names[-1], "heldout.txt.zst"]:
        size = (shards / name).stat().st_size
        for offset in (0, size // 2, size - 1):
            copy = tmp_path / f"{name}-{offset}"
            shutil.copytree(shards, copy)
            flip(copy / name, offset)
            with pytest.raises(DataError) as caught:
                TokenDataset.open(copy)
            assert str(caught.value).startswith(f"shard {copy}/{name} is damaged: its xxh3 is ")
            assert str(caught.value).endswith("; restore the file or build the shards again.")
    copy = tmp_path / "cut"
    shutil.copytree(shards, copy)
    os.truncate(copy / names[0], 100)
    with pytest.raises(DataError, match=r"is damaged: it has 100 bytes and the manifest says \d+"):
        TokenDataset.open(copy, verify=False)
    (copy / names[0]).unlink()
    with pytest.raises(DataError) as caught:
        TokenDataset.open(copy)
    assert str(caught.value) == (
        f"shard {copy}/{names[0]} is missing; restore the file or build the shards again."
    )


def test_a_damaged_manifest_and_an_exchanged_tokenizer(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    content = json.loads(text)
    wrong = [
        text[:-20],
        "[]",
        text.replace('"eos_id": 256', '"eos_id": 255'),
        json.dumps({**content, "extra": 1}),
        json.dumps({k: v for k, v in content.items() if k != "vocab_size"}),
    ]
    for damaged in wrong:
        manifest.write_text(damaged)
        with pytest.raises(DataError) as caught:
            TokenDataset.open(copy)
        assert str(caught.value) == f"{manifest} is damaged; build the shards again."
    manifest.write_text(json.dumps({**content, "schema_version": 2}))
    with pytest.raises(DataError, match="is 2 and this dualray reads 1; build the shards again"):
        TokenDataset.open(copy)
    manifest.write_text(text)
    train_bpe(["a b c " * 9], 258).save(copy)
    with pytest.raises(DataError, match=r"and the tokenizer\.json in it has "):
        TokenDataset.open(copy).tokenizer()


def test_what_is_no_data_folder(tmp_path):
    with pytest.raises(DataError) as caught:
        TokenDataset.open(tmp_path / "none")
    assert str(caught.value) == (
        f"data folder {tmp_path}/none does not exist; build it with `dualray data build SRC "
        f"--tokenizer bpe:4096 --out {tmp_path}/none`."
    )
    with pytest.raises(DataError, match=r"has no manifest\.json; build it with "):
        TokenDataset.open(tmp_path)


def test_nothing_half_written(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DataError) as caught:
        build([corpus[0]], "bytes", out)
    assert str(caught.value) == (
        f"out is {out} and already exists; remove it or choose another folder."
    )
    out.rmdir()
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine " * 5000 + b"\xff")
    with pytest.raises(DataError, match="is not UTF-8 at byte 25000"):
        build([corpus[0], bad], "bytes", out)
    short = tmp_path / "short.txt"
    short.write_text("short")
    with pytest.raises(DataError, match="the sources hold 5 bytes of text and holding out"):
        build([short], "bytes", out)
    bad.unlink()
    short.unlink()
    assert os.listdir(tmp_path) == []

    class Stop(BaseException):
        """Ctrl-C in the middle of writing."""

    for error, expected in ((Stop, Stop), (OSError(28, "No space left on device"), DataError)):

        def fail(path, error=error):
            assert len(os.listdir(tmp_path)) == 1, "the temporary folder is there by now"
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(shards_module, "_sync", fail)
            with pytest.raises(expected) as caught:
                build([corpus[0]], "bytes", out)
        assert os.listdir(tmp_path) == []
    assert str(caught.value) == (
        f"out is {out} and cannot be written: No space left on device; check permissions and free "
        "space."
    )


def test_progress_is_told(corpus, tmp_path):
    said = []
    build([corpus[0]], "bpe:270", tmp_path / "out", progress=lambda *now: said.append(now))
    total = len("".join(corpus[1]).encode())
    assert said[-1] == ("encoding", total, total)
    assert ("training the tokenizer", total, total) in said


def test_the_heldout_text_is_plain_zstd(shards, dataset):
    with (shards / "heldout.txt.zst").open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file).read()
    assert len(text) == dataset.split("heldout").num_bytes
