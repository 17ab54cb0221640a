"""Every format yields the same documents; every bad input is one sentence with its place."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from dualray.data import documents
from dualray.data.documents import read_pieces
from dualray.data.sources import list_files
from dualray.errors import DataError

TEXTS = ["First line\nzweite Zeile, \u00fc\u20ac\U0001f600\n", "no line end", "\r\n tabs\t"]


def read(*sources: Path) -> list[str]:
    texts, open_text = [], b""
    for file in list_files(str(source) for source in sources):
        for piece in read_pieces(file):
            open_text += piece.data
            if piece.ends_document:
                texts.append(open_text.decode())
                open_text = b""
        assert not open_text, "the last piece of a file ends its document"
    return texts


def refused(*sources: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(*sources)
    return str(caught.value).replace(f"{sources[0].parent}/", "")


def compress(data: bytes, suffix: str) -> bytes:
    # Two members or frames each: concatenated files are valid gzip and zstd.
    half = len(data) // 2
    parts = (data[:half], data[half:])
    if suffix == ".gz":
        return b"".join(gzip.compress(part) for part in parts)
    if suffix == ".zst":
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)
    return data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_and_text_plain_and_compressed(tmp_path, suffix):
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)]
    lines.insert(1, "")
    lines.append(json.dumps({"text": ""}))
    rows = tmp_path / f"rows.jsonl{suffix}"
    rows.write_bytes(compress("\n".join(lines).encode(), suffix))
    assert read(rows) == TEXTS
    plain = tmp_path / f"plain.txt{suffix}"
    plain.write_bytes(compress(TEXTS[0].encode(), suffix))
    assert read(plain) == TEXTS[:1]


@pytest.mark.parametrize("layout", ["parquet", "ipc file", "ipc stream", "feather", "dictionary"])
def test_tables(tmp_path, layout):
    table = pa.table({"n": range(4), "text": [*TEXTS, ""]})
    path = tmp_path / ("t.parquet" if layout == "parquet" else "t.arrow")
    if layout == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif layout == "feather":
        pyarrow.feather.write_feather(table, str(path), compression="zstd")
    elif layout == "ipc stream":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
    else:
        if layout == "dictionary":
            column = table["text"].combine_chunks().dictionary_encode()
            table = pa.table({"text": column})
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert read(path) == TEXTS


def test_text_is_streamed_in_pieces_that_never_cut_a_character(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 7)
    text = TEXTS[0] * 20
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = list(read_pieces(list_files([str(path)])[0]))
    assert len(pieces) > 50
    assert max(len(piece.data) for piece in pieces) <= 7 + 3
    assert "".join(piece.data.decode() for piece in pieces) == text
    assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_folders_are_recursive_and_sorted_and_skip_only_markers(tmp_path):
    names = ["b.txt", "a/z.txt", "a/_first.txt", ".hidden.txt", ".git/x.txt", "_SUCCESS"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read(tmp_path) == ["a/_first.txt", "a/z.txt", "b.txt"]
    assert list_files([str(tmp_path)])[0].name == f"{tmp_path}/a/_first.txt"
    assert read(Path(f"{tmp_path}/b.txt"), tmp_path / "a") == ["b.txt", "a/_first.txt", "a/z.txt"]


def test_uri(tmp_path):
    (tmp_path / "a.txt").write_text("by address")
    files = list_files([f"file://{tmp_path}"])
    assert [piece.data for piece in read_pieces(files[0])] == [b"by address"]


BAD_FILES = {
    "empty.txt": (b"", "empty.txt is empty: it holds no document; remove it from the sources."),
    "empty.parquet": (
        b"",
        "empty.parquet is empty: it holds no document; remove it from the sources.",
    ),
    "blank.jsonl": (
        b"\n\n",
        "blank.jsonl is empty: it holds no document; remove it from the sources.",
    ),
    "binary.txt": (
        b"MZ\x90"[:2] + b"\x00\x03",
        "binary.txt is a binary file: byte 2 is NUL; only UTF-8 text can be read; convert it or "
        "remove it from the sources.",
    ),
    "latin.txt": (
        "gr\u00fcn und".encode("latin-1"),
        "latin.txt is not UTF-8 at byte 2 (0xfc); convert it, for instance with "
        "`iconv -f LATIN1 -t UTF-8`.",
    ),
    "cut.txt": (
        "gr\u00fc".encode()[:-1],
        "cut.txt is not UTF-8 at byte 2 (0xc3); convert it, for instance with "
        "`iconv -f LATIN1 -t UTF-8`.",
    ),
    "latin.jsonl": (
        b'{"text": "a"}\n{"text": "\xfc"}\n',
        "latin.jsonl is not UTF-8 at byte 24 in line 2 (0xfc); convert it, for instance with "
        "`iconv -f LATIN1 -t UTF-8`.",
    ),
    "json.jsonl": (
        b'{"text": "a"}\n\n{"text": "b"\n',
        "json.jsonl line 3 is not JSON: Expecting ',' delimiter at column 13; each line must be "
        "one JSON object.",
    ),
    "long.jsonl": (
        b'{"text": "a"}\n{"n": ' + b"9" * 5000 + b"}\n",
        "long.jsonl line 2 has a number too long or nesting too deep to be read; shorten or remove "
        "that line.",
    ),
    "field.jsonl": (
        b'{"text": "a"}\n{"title": "b", "body": "c"}\n',
        "field.jsonl line 2 has no string field `text` (found: body, title); each line must look "
        'like {"text": "..."}.',
    ),
    "list.jsonl": (
        b'["text"]\n',
        "list.jsonl line 1 has no string field `text` (found: list); each line must look like "
        '{"text": "..."}.',
    ),
    "number.jsonl": (
        b'{"text": 3}\n',
        "number.jsonl line 1 has no string field `text` (found: text); each line must look like "
        '{"text": "..."}.',
    ),
    "surrogate.jsonl": (
        b'{"text": "\\ud800"}\n',
        "surrogate.jsonl line 1 has half a surrogate pair in `text`; repair the \\u escapes of "
        "that line.",
    ),
    "not.parquet": (
        b"PAR1 no, it is not",
        "not.parquet cannot be read as parquet: ",
    ),
    "not.arrow": (b"ARROW1 no, it is not", "not.arrow cannot be read as arrow: Not an Arrow file"),
    "stream.arrow": (b"plain words", "stream.arrow cannot be read as arrow: "),
    "not.txt.gz": (b"plain words", "not.txt.gz cannot be read as text: incorrect header check"),
    "cut.txt.gz": (
        gzip.compress(b"words " * 999)[:-9],
        "cut.txt.gz cannot be read as text: Truncated compressed stream; the file is damaged or "
        "not what its suffix says.",
    ),
    "cut.jsonl.zst": (
        zstandard.ZstdCompressor().compress(b'{"text": "words"}\n' * 9)[:-2],
        "cut.jsonl.zst cannot be read as jsonl: Truncated compressed stream; the file is damaged "
        "or not what its suffix says.",
    ),
    "paper.pdf": (
        b"%PDF",
        "paper.pdf has a suffix that data build does not know; it reads .txt, .text, .md, .rst, "
        ".py and .jsonl (each also .gz or .zst), .parquet, .arrow, .feather and .ipc; rename the "
        "file or keep it out of the folder.",
    ),
    "table.parquet.gz": (b"x", "table.parquet.gz has a suffix that data build does not know"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(tmp_path, name):
    content, sentence = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    said = refused(tmp_path / name)
    assert said == sentence if sentence.endswith(".") else said.startswith(sentence)
    assert "\n" not in said
    assert refused(tmp_path / name) == said


def test_offsets_count_from_the_start_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 5)
    path = tmp_path / "a.txt"
    path.write_bytes("\u20ac\u20ac\u20ac\u20ac".encode() + b"abc\xff")
    assert refused(path).startswith("a.txt is not UTF-8 at byte 15 (0xff)")
    path.write_bytes("\u20ac\u20ac\u20ac\u20ac".encode() + b"abc\x00")
    assert refused(path).startswith("a.txt is a binary file: byte 15 is NUL")


def test_bad_tables(tmp_path):
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pa.table({"body": ["a"], "url": ["b"]}), path)
    assert refused(path) == (
        "t.parquet has no column `text`, its columns are body, url; rename the column that holds "
        "the text to `text`."
    )
    pyarrow.parquet.write_table(pa.table({"text": [1, 2]}), path)
    assert refused(path) == ("t.parquet has a column `text` of type int64; it must hold strings.")
    pyarrow.parquet.write_table(pa.table({"text": ["a", None]}), path)
    assert refused(path) == "t.parquet row 1 has null in `text`; drop such rows."
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert refused(path) == (
        "t.parquet is empty: it holds no document; remove it from the sources."
    )


def test_bad_sources(tmp_path):
    assert refused(tmp_path / "none.txt") == (
        f"source {tmp_path}/none.txt does not exist; check the path."
    ).replace(f"{tmp_path}/", "")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refused(folder) == (
        "source folder is a folder without files; name a folder that holds text."
    )
    (folder / "a.txt").write_text("a")
    assert refused(folder, folder / "a.txt") == (
        "folder/a.txt is named twice by the sources; name it once."
    )
    with pytest.raises(DataError, match="no source was given; name at least one file or folder"):
        list_files([])
    with pytest.raises(DataError, match="source nowhere://x cannot be reached: "):
        list_files(["nowhere://x"])
