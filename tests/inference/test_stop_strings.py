from hypothesis import given
from hypothesis import strategies as st

from dualray.inference.stop_strings import Beginning


def overlap(text: str, whole: str) -> int:
    """The slow twin."""
    lengths = range(min(len(text), len(whole) - 1), 0, -1)
    return next((n for n in lengths if whole.startswith(text[-n:])), 0)


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    whole=st.text(alphabet="ab", min_size=1, max_size=7),
)
def test_it_knows_what_the_text_ends_with(pieces, whole):
    beginning, text = Beginning(whole), ""
    for piece in pieces:
        text += piece
        if whole in text:
            break
        beginning.add(piece)
        assert beginning.length == overlap(text, whole)


def test_after_forgetting_the_text_before_does_not_count():
    beginning = Beginning("aab")
    beginning.add("aa")
    beginning.forget()
    assert beginning.length == 0
    beginning.add("a")
    assert beginning.length == 1


def test_a_character_costs_the_same_however_long_the_string_is():
    class Counting(str):
        looked_at = 0

        def __getitem__(self, key):
            Counting.looked_at += 1
            return super().__getitem__(key)

    whole = Counting("a" * 1023 + "b")
    beginning = Beginning(whole)
    for _ in range(5000):
        beginning.add("a")
    assert beginning.length == 1023
    assert Counting.looked_at < 6 * 5000 + 6 * 1024
