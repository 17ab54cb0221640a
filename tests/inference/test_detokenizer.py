from hypothesis import given
from hypothesis import strategies as st

from dualray.inference.detokenizer import IncrementalText


class Bytes:
    """An id is a byte."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


class Pieces:
    """An id is a piece of text; the first piece of a text loses its leading space."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids).removeprefix(" ")


def spell(text, tokenizer, ids, **push):
    return [text.push(i, **push) for i in ids], text


def test_half_a_character_is_never_given():
    pieces, text = spell(IncrementalText(Bytes()), Bytes(), "a\u20acb".encode())
    assert pieces == ["a", "", "", "\u20ac", "b"]
    assert text.finish() == ""


def test_a_character_that_stays_half_is_dropped():
    text = IncrementalText(Bytes())
    assert [text.push(b) for b in "\u20ac".encode()[:2]] == ["", ""]
    assert text.finish() == ""


def test_bytes_that_are_no_text_become_replacement_characters():
    text = IncrementalText(Bytes())
    given = "".join(text.push(b) for b in b"a\xff\xffb")
    assert given == "a\ufffd\ufffdb"


def test_leading_spaces_inside_a_text_survive():
    text = IncrementalText(Pieces(" the", " cat"))
    assert [text.push(0), text.push(1)] == ["the", " cat"]


def test_a_stop_string_across_tokens_is_cut_before_it():
    text = IncrementalText(Pieces("one E", "N", "D two"), stop=["END"])
    assert text.push(0) == "one "
    assert text.push(1) == ""
    assert text.push(2) == ""
    assert text.matched_stop == "END"
    assert text.finish() == ""


def test_the_stop_string_is_kept_on_request():
    text = IncrementalText(Pieces("one E", "ND two"), stop=["END"], include_stop=True)
    assert text.push(0) + text.push(1) == "one END"


def test_what_only_looked_like_a_stop_string_is_given_later():
    text = IncrementalText(Pieces("E", "N", "x", "EN"), stop=["END"])
    assert [text.push(0), text.push(1), text.push(2), text.push(3)] == ["", "", "ENx", ""]
    assert text.finish() == "EN"


def test_the_earliest_of_several_stop_strings_wins():
    text = IncrementalText(Pieces("abc"), stop=["c", "bc"])
    assert text.push(0) == "a"
    assert text.matched_stop == "bc"


def test_no_stop_is_looked_for_before_min_tokens():
    text = IncrementalText(Pieces("a.", "b."), stop=["."])
    assert text.push(0, check_stop=False) == "a."
    assert text.push(1) == "b"


@given(st.text(max_size=30))
def test_the_pieces_make_the_whole(whole):
    text = IncrementalText(Bytes())
    assert "".join(text.push(b) for b in whole.encode()) + text.finish() == whole.removesuffix(
        "\ufffd"
    )


@given(
    st.text(alphabet="ab\u20ac", max_size=20), st.text(alphabet="ab\u20ac", min_size=1, max_size=4)
)
def test_a_stop_string_cuts_where_the_whole_text_has_it(whole, stop):
    text = IncrementalText(Bytes(), stop=[stop])
    given = ""
    for byte in whole.encode():
        given += text.push(byte)
        if text.matched_stop:
            break
    given += text.finish()
    assert given == whole.split(stop)[0]
