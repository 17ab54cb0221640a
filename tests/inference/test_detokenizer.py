import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from dualray.data.tokenizer import ByteTokenizer, JsonTokenizer, train_bpe
from dualray.inference.detokenizer import REPLACEMENT, IncrementalText


class Bytes:
    """An id is a byte."""

    def decode(self, ids, *, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


class Pieces:
    """An id is a piece of text; the first piece of a text loses its leading space."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, *, skip_special_tokens=True):
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


def json_tokenizer(inner: Tokenizer, end: str = "</s>") -> JsonTokenizer:
    inner.add_special_tokens([end])
    return JsonTokenizer(inner.to_str().encode(), end)


def byte_level() -> JsonTokenizer:
    """Pairs are merged anywhere, inside of characters too."""
    return train_bpe(["the cat \U0001f468\u200d\U0001f469 e\u0301 \u20ac\u20ad the"] * 3, 275)


def byte_fallback() -> JsonTokenizer:
    """As SentencePiece's: words begin with a mark, and what is unknown is spelled in bytes."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "t", "h", "e", "th", "the"]
    words += ["\u2581the", "\u20ac"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    inner = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return json_tokenizer(inner)


def word_piece() -> JsonTokenizer:
    words = ["[UNK]", "the", "cat", "##s", "s", ".", "'", "\u20ac"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return json_tokenizer(inner)


TOKENIZERS = {
    "bytes": ByteTokenizer(),
    "byte level": byte_level(),
    "byte fallback": byte_fallback(),
    "word pieces": word_piece(),
}
texts = st.lists(
    st.one_of(
        st.sampled_from(
            ["the", " the", "cats", ".", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301"]
        ),
        st.sampled_from(["\u20ac", "\u20ad", "\U0001f1e9\U0001f1ea", " ", "\n", "\u0e33", "'s"]),
        st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=3),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(whole=texts)
def test_pieces_of_a_text_are_whole_characters_and_make_it(name, whole):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(whole)
    text = IncrementalText(tokenizer)
    pieces = [text.push(i) for i in ids]
    assert "".join(pieces) + text.finish() == tokenizer.decode(ids)
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(deadline=None)
@given(whole=texts, data=st.data())
def test_a_completion_goes_on_where_its_prompt_ends(name, whole, data):
    """Spaces between the two are not lost, and what was cut inside of a character is dropped."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(whole)
    cut = data.draw(st.integers(0, len(ids)))
    prompt = tokenizer.decode(ids[:cut])
    text = IncrementalText(tokenizer, context=ids[:cut])
    given = "".join(text.push(i) for i in ids[cut:]) + text.finish()
    if not prompt.endswith(REPLACEMENT):
        assert prompt + given == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["bytes", "byte level"])
@settings(deadline=None)
@given(data=st.data())
def test_any_ids_make_the_text_of_all_of_them(name, data):
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=60))
    encode = data.draw(st.sampled_from([None, tokenizer.encode]))
    text = IncrementalText(tokenizer, encode=encode)
    given = "".join(text.push(i) for i in ids) + text.finish()
    whole = tokenizer.decode(ids)
    # At the end up to three may have been waiting for the rest of a character.
    assert whole.startswith(given)
    assert set(whole[len(given) :]) <= {REPLACEMENT}
    assert len(whole) - len(given) <= 3


@settings(deadline=None)
@given(some=st.lists(st.integers(33, 255), max_size=40))  # a space in front would be dropped
def test_byte_tokens_never_lose_a_character_to_a_wrong_neighbour(some):
    """transformers makes U+FFFD of a whole run of byte tokens that has one wrong byte."""
    tokenizer = TOKENIZERS["byte fallback"]
    text = IncrementalText(tokenizer)
    given = "".join(text.push(1 + byte) for byte in some) + text.finish()
    valid = bytes(some).decode(errors="ignore")
    shown = given.replace(REPLACEMENT, "")
    assert len(shown) <= len(valid)
    try:
        assert given == bytes(some).decode()
    except UnicodeDecodeError:
        assert all(character in valid for character in shown)


def test_work_for_an_id_stays_the_same():
    class Counting(Bytes):
        longest = 0

        def decode(self, ids, *, skip_special_tokens=True):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    for some in (b"\xff", b"\x80\xff", b"\xe2\x82\xff", b"\xf0\x9f\x98", b"\xe2\x82\xacx"):
        tokenizer = Counting()
        text = IncrementalText(tokenizer)
        given = "".join(text.push(byte) for byte in some * 100) + text.finish()
        whole = (some * 100).decode(errors="replace")
        assert given.rstrip(REPLACEMENT) == whole.rstrip(REPLACEMENT)
        assert len(given) >= len(whole) - 3
        assert tokenizer.longest < 60
    silent = Counting()
    silent.decode = lambda ids, **_: setattr(silent, "longest", max(silent.longest, len(ids))) or ""
    text = IncrementalText(silent)
    assert "".join(text.push(0) for _ in range(200)) == ""
    assert silent.longest < 60


def test_special_tokens_are_shown_on_request():
    for tokenizer in (ByteTokenizer(), byte_level()):
        ids = [*tokenizer.encode("ab"), tokenizer.eos_id, *tokenizer.encode("c")]
        for skips, whole in ((True, "abc"), (False, "ab<|endoftext|>c")):
            text = IncrementalText(tokenizer, skip_special_tokens=skips)
            assert "".join(text.push(i) for i in ids) + text.finish() == whole


@pytest.mark.parametrize("name", ["bytes", "byte level", "byte fallback"])
@pytest.mark.parametrize("said", ["a\ufffd", "\ufffd", "\ufffd\ufffd", "e \ufffd", "\u20ac\ufffd"])
@pytest.mark.parametrize("behind", ["", "\u2603", "\U0001f600"])
def test_a_final_replacement_character_that_was_said_is_given_and_half_a_character_is_not(
    name, said, behind
):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(said + behind)
    ids = ids[:-1] if behind else ids
    text = IncrementalText(tokenizer, encode=tokenizer.encode)
    given = "".join(text.push(i) for i in ids) + text.finish()
    if name == "byte fallback" and behind:
        # Of a run of byte tokens with one that is wrong it makes U+FFFD as a whole.
        assert given.rstrip(REPLACEMENT) == said.rstrip(REPLACEMENT)
    else:
        assert given == said
    assert text.finish() == ""
