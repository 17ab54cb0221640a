"""The split depends on the text alone, keeps all of it, and holds out what it was asked to."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.data.documents import Piece
from dualray.data.segments import MAX_SEGMENT_BYTES, cut, segment_size
from dualray.errors import DataError

TEXTS = st.lists(
    st.text(alphabet="ab \n\u00fc\U0001f600", min_size=1, max_size=400), min_size=1, max_size=12
)


def whole(texts: list[str]) -> list[Piece]:
    return [Piece(data=text.encode(), ends_document=True) for text in texts]


def rejoin(segments) -> list[str]:
    texts, open_text = [], b""
    for segment in segments:
        for piece in segment.pieces:
            open_text += piece.data
            if piece.ends_document:
                texts.append(open_text.decode())
                open_text = b""
    assert not open_text
    return texts


@settings(deadline=None, max_examples=60)
@given(texts=TEXTS, size=st.integers(16, 300))
def test_segments_hold_all_text_in_pieces_of_whole_characters(texts, size):
    segments = list(cut(whole(texts), size, 0.1))
    assert rejoin(segments) == texts
    assert [segment.index for segment in segments] == list(range(len(segments)))
    assert all(0 < segment.num_bytes <= size for segment in segments)
    for segment in segments:
        for piece in segment.pieces:
            piece.data.decode()


@settings(deadline=None, max_examples=60)
@given(texts=TEXTS, size=st.integers(16, 300), step=st.integers(1, 50))
def test_the_readers_pieces_do_not_matter(texts, size, step):
    pieces = []
    for text in texts:
        parts = [text[i : i + step] for i in range(0, len(text), step)]
        pieces += [Piece(data=part.encode(), ends_document=False) for part in parts[:-1]]
        pieces.append(Piece(data=parts[-1].encode(), ends_document=True))
    assert list(cut(pieces, size, 0.1)) == list(cut(whole(texts), size, 0.1))


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("document_bytes", [40, 1000, 1_000_000])
def test_the_fraction_is_met_for_small_and_large_documents(fraction, document_bytes):
    line = b"some words of a line\n"
    total = 1_000_000
    document = (line * (document_bytes // len(line) + 1))[:document_bytes]
    pieces = [Piece(data=document, ends_document=True)] * (total // document_bytes)
    size = segment_size(total, fraction)
    segments = list(cut(pieces, size, fraction))
    heldout = sum(segment.num_bytes for segment in segments if segment.heldout)
    # The last block of 1 / fraction segments may be incomplete: up to one segment more or less.
    assert abs(heldout - fraction * total) <= 1.1 * size
    assert sum(segment.heldout for segment in segments) >= 2


def test_cuts_fall_behind_lines_then_spaces():
    def ends(text: bytes) -> list[bytes]:
        pieces = [Piece(data=text, ends_document=True)]
        return [s.pieces[-1].data[-1:] for s in cut(pieces, 64, 0.1)][:-1]

    assert set(ends(b"one two three\n" * 40)) == {b"\n"}
    assert set(ends(b"one two three " * 40)) == {b" "}
    assert set(ends(b"x" * 400)) == {b"x"}


def test_documents_end_segments_once_half_full():
    segments = list(cut(whole(["a" * 40] * 6), 100, 0.1))
    assert [segment.num_bytes for segment in segments] == [80, 80, 80]


def test_segment_size():
    assert segment_size(5_057_198, 0.05) == 126_429
    assert segment_size(1 << 40, 0.05) == MAX_SEGMENT_BYTES
    with pytest.raises(DataError) as caught:
        segment_size(10_239, 0.05)
    assert str(caught.value) == (
        "the sources hold 10239 bytes of text and holding out 0.05 of them needs 10240; give more "
        "text."
    )
    for fraction in (0, 0.6, -1, float("nan")):
        with pytest.raises(DataError, match=r"must be above 0 and at most 0\.5; 0\.05 is a good"):
            segment_size(1 << 30, fraction)
