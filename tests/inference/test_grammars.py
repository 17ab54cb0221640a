"""Grammars that make no sense, ask for too much, or are made to hurt; and what a mask says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from dualray.actors.vllm_tokenizer import byte_level_json
from dualray.data.tokenizer import train_bpe
from dualray.errors import RequestError
from dualray.inference.grammars import Grammars, grammar_failure
from dualray.inference.request import SamplingParams
from dualray.inference.structured_outputs import StructuredOutputs, read_structured_outputs
from dualray.inference.token_history import TokenHistory
from dualray.inference.token_masks import ids_in, mask_of, without

EOS = 256
BYTES = Grammars(byte_level_json(), EOS)


def compiled(**wanted):
    return BYTES.compile(StructuredOutputs(**wanted))


def nested(kind: str, depth: int) -> str:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema} if kind == "items" else {kind: [schema]}
    return json.dumps(schema)


def many(count: int) -> str:
    rules = [f'r{i}: "a" r{(i * 7 + 1) % count} | "b"' for i in range(count)]
    return "\n".join(["start: " + " | ".join(f"r{i}" for i in range(count)), *rules])


REFUSED = {
    "no schema": {"json": '{"type": "nope"}'},
    "a keyword it does not know": {"json": '{"not": {"type": "string"}}'},
    "the same, called lenient": {"json": '{"not": {}, "x-guidance": {"lenient": true}}'},
    "nothing fits": {"json": '{"type": "string", "minLength": 3, "maxLength": 2}'},
    "a loop of references": {
        "json": '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, '
        '"b": {"$ref": "#/$defs/a"}}}'
    },
    "itself": {"json": '{"$ref": "#"}'},
    "a schema elsewhere": {"json": '{"$ref": "http://example.com/x.json"}'},
    "deep items": {"json": nested("items", 200)},
    "deep allOf": {"json": nested("allOf", 200)},
    "many of many": {
        "json": json.dumps(
            {
                "allOf": [
                    {"oneOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(2)]}
                    for i in range(18)
                ]
            }
        )
    },
    "a large multiple": {"json": '{"type": "integer", "multipleOf": 999999937}'},
    "half a surrogate": {"json": '{"const": "\\ud800"}'},
    "an open group": {"regex": "(ab"},
    "look-ahead": {"regex": "a(?=b)"},
    "a back-reference": {"regex": r"(a)\1"},
    "repetitions of repetitions": {"regex": "(a{1000}){1000}"},
    "the same thrice": {"regex": "((a{100}){100}){100}"},
    "deep groups": {"regex": "(" * 5000 + "a" + ")" * 5000},
    "a half surrogate in text": {"regex": "\ud800"},
    "no such rule": {"grammar": "start: foo"},
    "no rule at all": {"grammar": ""},
    "a rule of itself": {"grammar": "start: start"},
    "deep Lark": {"grammar": "start: " + "(" * 20000 + '"a"' + ")" * 20000},
    "deep GBNF": {"grammar": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000},
    "half of GBNF": {"grammar": "root ::= [a-z"},
    "repetitions in Lark": {"grammar": 'start: a{1000000}\na: b{1000000}\nb: "x"'},
    "many rules": {"grammar": many(1500)},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_a_sentence(name):
    (kind,) = REFUSED[name]
    with pytest.raises(RequestError) as raised:
        compiled(**REFUSED[name])
    sentence = str(raised.value)
    assert sentence.startswith(f"sampling_parameters.structured_outputs.{kind} cannot be used: ")
    assert sentence.endswith(f"; correct structured_outputs.{kind}.")
    assert "\n" not in sentence
    assert len(sentence) < 400
    assert raised.value.field == "structured_outputs"


BEARABLE = {
    "long strings": {"json": '{"type": "string", "minLength": 1000000000}'},
    "long arrays": {"json": '{"type": "array", "minItems": 1000000000}'},
    "many names": {"json": json.dumps({"enum": [f"x{i:06}" for i in range(5000)]})},
    "references that double": {
        "json": json.dumps(
            {
                "$ref": "#/$defs/a20",
                "$defs": {"a0": {"type": "string"}}
                | {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i - 1}"}] * 2} for i in range(1, 21)},
            }
        )
    },
    "an automaton of 2^300 states": {"regex": "(a|b)*a(a|b){300}"},
    "ambiguous in every place": {"grammar": 'start: start start | "a" | ""'},
}


@pytest.mark.parametrize("name", BEARABLE)
def test_what_looks_hostile_and_is_not_goes_on(name):
    matcher = compiled(**BEARABLE[name])
    for _ in range(100):
        tokens = [i for i in ids_in(matcher.allowed()) if i != EOS]
        if matcher.is_complete or not tokens:
            break
        assert matcher.accept(tokens[len(tokens) // 2])
    assert matcher.error is None


PIECES = 'start: |root ::=|"x"|/a+/|{1,3}|%json {}|<[256]>|%ignore /b/|%import common.INT|a:|lazy'
KEYWORDS = (
    "type properties required items pattern enum const anyOf allOf oneOf $ref $defs a minimum "
    "maxLength minItems additionalProperties patternProperties multipleOf x-guidance"
)
words = st.lists(
    st.sampled_from([*"ab.()[]{}*+?|\\^$,0123:<!&~ \n\ud800", *PIECES.split("|")]), max_size=14
).map("".join)
some_json = st.recursive(
    st.one_of(
        st.sampled_from(["string", "object", "#", "#/$defs/a", "(a", "date", "a|b*", "\ud800"]),
        st.sampled_from([None, True, 0, -1, 2**64, -(10**40), 1e308, 1e-9]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(KEYWORDS.split()),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=10,
)


@settings(deadline=None, max_examples=300)
@given(
    wanted=st.one_of(
        st.builds(lambda schema: {"json": schema}, some_json),
        st.builds(lambda text: {"regex": text}, words),
        st.builds(lambda text: {"grammar": text}, words),
        st.builds(lambda text: {"json_object": True, "whitespace_pattern": text}, words),
        st.builds(lambda texts: {"choice": texts}, st.lists(words, max_size=3)),
    )
)
def test_whatever_callers_write_is_compiled_or_refused(wanted):
    try:
        what = read_structured_outputs("structured_outputs", wanted)
        assert what is not None
        matcher = BYTES.compile(what)
    except RequestError:
        return
    for _ in range(10):
        token = next(ids_in(matcher.allowed()), None)
        if token is None or matcher.is_complete or matcher.error is not None:
            break
        assert matcher.accept(token)


def test_states_are_not_shared_by_completions():
    """Each compiles its own: in one lexer for all, the hundredth would find no state left."""
    for start in range(6):
        matcher = compiled(regex="(a|b)*a(a|b){20}")
        for step in range(4000):
            matcher.allowed()
            assert matcher.accept(b"ab"[(start * 7919 + step * step) % 5 % 2]), step
            if matcher.error is not None:
                break
        assert matcher.error is None


def test_what_costs_too_much_later_ends_with_a_reason():
    properties = {f"p{i}": {"type": "string"} for i in range(2000)}
    inner = {"type": "object", "properties": properties}
    schema = {"type": "array", "prefixItems": [{"type": "boolean"}, inner], "minItems": 2}
    wanted = StructuredOutputs(json=json.dumps(schema), disable_any_whitespace=True)
    matcher = BYTES.compile(wanted)
    history = TokenHistory(SamplingParams(structured_outputs=wanted), [], grammar=matcher)
    for token in b'[true,{"p':
        history.adjustment(())
        history.add(token)
        if history.error is not None:
            break
    assert history.error is not None
    assert not history.is_complete
    assert str(grammar_failure(matcher)).startswith("the completion cannot go on in its grammar: ")


def test_what_is_ambiguous_in_every_place_ends_before_a_token_takes_long():
    matcher = compiled(grammar='start: e\ne: e e e | e e | "a" | ""')
    for _ in range(300):
        matcher.allowed()
        if not matcher.accept(ord("a")):
            break
    assert matcher.error is not None
    assert "items; max is 700" in matcher.error


def test_an_object_may_have_many_properties_that_may_be_left_out():
    properties = {f"p{i}": {"type": "integer"} for i in range(150)}
    schema = json.dumps({"properties": properties, "additionalProperties": False})
    matcher = compiled(json=schema, disable_any_whitespace=True)
    for token in b'{"p0":1,"p149":2}':
        assert token in ids_in(matcher.allowed())
        assert matcher.accept(token)
    assert matcher.is_complete


def test_the_end_is_allowed_exactly_where_the_grammar_may_end():
    matcher = compiled(regex="ab?")
    assert list(ids_in(matcher.allowed())) == [ord("a")]
    assert not matcher.accept(ord("b"))
    assert matcher.accept(ord("a"))
    assert list(ids_in(matcher.allowed())) == [ord("b"), EOS]
    assert not matcher.is_complete
    assert matcher.accept(ord("b"))
    assert matcher.is_complete


def test_drafts_are_followed_and_taken_back():
    wanted = StructuredOutputs(regex="abc|abd")
    history = TokenHistory(
        SamplingParams(structured_outputs=wanted), [], grammar=BYTES.compile(wanted)
    )
    assert history.num_possible(b"abx") == 2
    assert history.num_possible(b"abd") == 3
    later, masks = history, []
    for draft in b"ab":
        later = later.after(draft)
        change = later.adjustment(())
        assert change is not None
        masks.append(bytes(ids_in(change.allowed)))
    assert masks == [b"b", b"cd"]
    now = history.adjustment(())
    assert now is not None
    assert list(ids_in(now.allowed)) == [ord("a")]
    for token in b"abd":
        history.add(token)
    assert history.is_complete
    assert not later.is_complete


def test_tokens_of_several_bytes_and_half_characters():
    tokenizer = train_bpe(["the cat sat on the mat \U0001f600"] * 3, 270)
    grammars = Grammars(tokenizer.content, tokenizer.eos_id)
    matcher = grammars.compile(StructuredOutputs(choice=("the cat \U0001f600", "then")))
    whole = tokenizer.encode("the cat \U0001f600")
    # What both begin with is said in the tokenizer's own words.
    assert [tokenizer.decode([i]) for i in ids_in(matcher.allowed())] == ["the"]
    for token in whole:
        assert token in ids_in(matcher.allowed())
        assert matcher.accept(token)
    assert matcher.is_complete


def test_byte_fallback_is_understood():
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "\u2581a",
    ]
    inner = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.add_special_tokens(["<s>", "</s>", "<unk>"])
    matcher = Grammars(inner.to_str().encode(), 2).compile(StructuredOutputs(regex="\u20ac a"))
    for word in ("<0xE2>", "<0x82>", "<0xAC>", "\u2581", "a"):
        assert list(ids_in(matcher.allowed())) == [words.index(word)]
        assert matcher.accept(words.index(word))
    assert matcher.is_complete


def test_a_tokenizer_of_whole_words_has_no_grammars():
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    with pytest.raises(RequestError) as raised:
        Grammars(inner.to_str().encode(), 2).compile(StructuredOutputs(regex="a"))
    assert str(raised.value).startswith(
        "sampling_parameters.structured_outputs is set and the tokenizer's tokens are no bytes: "
    )


def test_sets_of_tokens():
    mask = mask_of([0, 9, 17])
    assert list(ids_in(mask)) == [0, 9, 17]
    assert list(ids_in(without(mask, [9, 900]))) == [0, 17]
    assert without(mask, [0, 9, 17]) == mask
    assert mask_of([]) == b""
