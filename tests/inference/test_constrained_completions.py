"""A model with random weights, held to what callers ask for: what ends is valid.

The checks are jsonschema's and Python's `re`, which know nothing of the library that made the
masks.
"""

from __future__ import annotations

import dataclasses
import json
import re

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.completing import Completed, Completing
from support.models import tiny_config, whole_model

from dualray.actors.vllm_tokenizer import byte_level_json
from dualray.data.tokenizer import ByteTokenizer
from dualray.inference.grammars import Grammars
from dualray.inference.limits import Limits
from dualray.inference.request import FinishReason, Request, SamplingParams
from dualray.inference.structured_outputs import read_structured_outputs

EOS = ByteTokenizer.eos_id
PROMPT = tuple(b"Answer: ")
LIMITS = Limits(num_blocks=256, block_size=16, max_batch=16, max_context=320)
GRAMMARS = Grammars(byte_level_json(), EOS)
MODEL = Completing(
    whole_model(tiny_config(vocab_size=257, num_nextn_predict_layers=0)), LIMITS, EOS
)


def request(name: str, wanted: dict, seed: int = 0, **params) -> Request:
    values = {"max_tokens": 200, "structured_outputs": wanted} | params
    parsed = SamplingParams.parse(values)
    assert parsed.structured_outputs is not None
    return Request(
        request_id=name,
        prompt_ids=PROMPT,
        params=parsed,
        seed=seed,
        grammar=GRAMMARS.compile(parsed.structured_outputs),
    )


def text(completed: Completed) -> str:
    return bytes(completed.ids).decode()


def complete(*wanted: dict, seed: int = 0, **params) -> list[Completed]:
    requests = [request(str(i), w, seed + i, **params) for i, w in enumerate(wanted)]
    return list(MODEL.run(requests).values())


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)
leaves = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 6)),
    st.builds(
        lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
        st.integers(-2000, 2000),
        st.integers(0, 3000),
    ),
    st.builds(lambda values: {"enum": values}, st.lists(names, min_size=1, max_size=4)),
    st.builds(lambda value: {"const": value}, st.one_of(names, st.integers(-9, 9), st.none())),
)


def arrays(items):
    return st.builds(
        lambda item, low, more: {
            "type": "array",
            "items": item,
            "minItems": low,
            "maxItems": low + more,
        },
        items,
        st.integers(0, 2),
        st.integers(0, 2),
    )


def objects(items):
    return st.builds(
        lambda properties, required: {
            "type": "object",
            "properties": properties,
            "required": [name for name in properties if name in required],
            "additionalProperties": False,
        },
        st.dictionaries(names, items, max_size=3),
        st.sets(names, max_size=3),
    )


schemas = st.recursive(
    leaves,
    lambda items: st.one_of(
        arrays(items),
        objects(items),
        st.builds(lambda some: {"anyOf": some}, st.lists(items, min_size=1, max_size=2)),
    ),
    max_leaves=5,
)


@settings(max_examples=25, deadline=None)
@given(some=st.lists(schemas, min_size=1, max_size=4), compact=st.booleans(), seed=st.integers(0))
def test_every_completion_that_stops_fits_its_schema(some, compact, seed):
    wanted = [{"json": schema, "disable_any_whitespace": compact} for schema in some]
    for schema, completed in zip(some, complete(*wanted, seed=seed), strict=True):
        if completed.finish is FinishReason.STOP:
            jsonschema.validate(json.loads(text(completed)), schema)
        else:
            assert completed.finish is FinishReason.LENGTH
            assert len(completed.ids) == 200


expressions = st.recursive(
    st.one_of(
        st.sampled_from(["a", "b", "[a-c]", "[0-9]", "\u20ac", "\u00e9", "\U0001f600", "[^x]"]),
        st.sampled_from(["\\.", "\\{", "x?", "(?:ab)?"]),
    ),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: f"(?:{a}|{b})", inner, inner),
        st.builds(
            lambda a, n, m: f"(?:{a}){{{n},{n + m}}}", inner, st.integers(0, 2), st.integers(0, 3)
        ),
        st.builds(lambda a: f"(?:{a})*", inner),
    ),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None)
@given(some=st.lists(expressions, min_size=1, max_size=4), seed=st.integers(0))
def test_every_completion_that_stops_matches_its_expression(some, seed):
    for regex, completed in zip(some, complete(*({"regex": r} for r in some), seed=seed)):
        if completed.finish is FinishReason.STOP:
            # Rust's dot and negated sets take any character but what they name, as here.
            assert re.fullmatch(regex, text(completed), re.DOTALL)
        else:
            assert completed.finish is FinishReason.LENGTH


@settings(max_examples=25, deadline=None)
@given(
    choices=st.lists(names.filter(bool), min_size=1, max_size=5, unique=True),
    seed=st.integers(0),
    budget=st.integers(1, 20),
)
def test_a_choice_is_made_and_never_left(choices, seed, budget):
    (completed,) = complete({"choice": choices}, seed=seed, max_tokens=budget)
    ids = bytes(completed.ids)
    assert any(choice.encode().startswith(ids) for choice in choices)
    if completed.finish is FinishReason.STOP:
        assert ids.decode() in choices
    else:
        assert len(ids) == budget


def test_what_can_only_end_ends_at_once():
    yes, empty = complete({"choice": ["yes"]}, {"regex": ""})
    assert (text(yes), yes.finish) == ("yes", FinishReason.STOP)
    assert len(yes.sampled) == 3  # no step for the end of sequence
    assert (empty.ids, empty.finish) == ([], FinishReason.STOP)


def test_several_kinds_run_beside_each_other_and_beside_free_text():
    number = {"type": "integer", "minimum": 10, "maximum": 99}
    wanted = {
        "json": {"json": number},
        "regex": {"regex": "[a-f]{8}"},
        "choice": {"choice": ["left", "right"]},
        "gbnf": {"grammar": 'root ::= "<" [0-9]+ ">" | "(" root ")"'},
        "lark": {"grammar": 'start: "a" start "b" | "c"'},
    }
    requests = [request(name, w, seed=3) for name, w in wanted.items()]
    free = SamplingParams(max_tokens=9, ignore_eos=True)
    requests += [Request(request_id="free", prompt_ids=PROMPT, params=free, seed=3)]
    together = MODEL.run(requests)
    texts = {name: text(together[name]) for name in wanted}
    assert re.fullmatch("[1-9][0-9]", texts["json"].strip())
    assert re.fullmatch("[a-f]{8}", texts["regex"])
    assert texts["choice"] in ("left", "right")
    assert re.fullmatch(r"\(*<[0-9]+>\)*", texts["gbnf"])
    assert texts["gbnf"].count("(") == texts["gbnf"].count(")")
    assert re.fullmatch("(a*)c(b*)", texts["lark"])
    assert texts["lark"].count("a") == texts["lark"].count("b")
    # Each is what it is alone: nobody's grammar touches another one's row.
    for name, w in wanted.items():
        alone = MODEL.run([request(name, w, seed=3)])[name]
        assert alone.ids == together[name].ids


def test_any_json_object_is_one():
    for seed in range(6):
        (completed,) = complete({"json_object": True}, seed=seed, temperature=0.7)
        if completed.finish is FinishReason.STOP:
            assert isinstance(json.loads(text(completed)), dict)


def test_greedy_takes_the_likeliest_of_what_is_allowed():
    (completed,) = complete({"regex": "[a-f]{5}"}, temperature=0, logprobs=20)
    for sampled in completed.sampled:
        better = [i for i, value in sampled.top if value > sampled.logprob]
        assert not any(chr(i) in "abcdef" for i in better)
    # Log-probabilities stay those of all tokens.
    assert any(sampled.rank > 1 for sampled in completed.sampled)


def test_max_tokens_may_cut():
    (completed,) = complete({"regex": "[a-f]{40}"}, max_tokens=7)
    assert (len(completed.ids), completed.finish) == (7, FinishReason.LENGTH)


@pytest.mark.parametrize("early", [{"min_tokens": 6}, {"ignore_eos": True, "max_tokens": 6}])
def test_the_end_waits_while_anything_else_may_come(early):
    wanted = [{"regex": "a*"}] * 30
    assert any(len(completed.ids) < 6 for completed in complete(*wanted))
    for completed in complete(*wanted, **early):
        assert len(completed.ids) >= 6
        assert EOS not in completed.ids


def test_the_grammar_outweighs_min_tokens_and_bans():
    (short,) = complete({"choice": ["ab"]}, min_tokens=10, ignore_eos=True)
    assert (text(short), short.finish) == ("ab", FinishReason.STOP)
    (biased,) = complete({"choice": ["abc"]}, logit_bias={str(ord("b")): -100})
    assert text(biased) == "abc"


def test_a_stop_token_ends_where_the_grammar_has_it():
    (completed,) = complete({"choice": ["abc"]}, stop_token_ids=[ord("b")])
    assert (text(completed), completed.finish) == ("a", FinishReason.STOP)


def test_penalties_and_cuts_choose_among_what_is_allowed():
    values = {"top_k": 1, "top_p": 0.1, "min_p": 0.5, "repetition_penalty": 2.0}
    for completed in complete({"regex": "[a-z]{20}"}, **values, frequency_penalty=2.0):
        assert re.fullmatch("[a-z]{20}", text(completed))


def test_the_parameter_may_come_as_text():
    wanted = read_structured_outputs("structured_outputs", '{"json": "{\\"type\\": \\"null\\"}"}')
    assert wanted == read_structured_outputs("structured_outputs", {"json": {"type": "null"}})


DRAFTING = tiny_config(vocab_size=257)
WANTED = (
    {"regex": "[ab]{30}c"},
    {"json": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 8}},
    {"grammar": 'start: "a" start "b" | "c"'},
    {"choice": ["abababab", "abaabaaa"]},
)
LIKELY = {str(ord(letter)): 60 for letter in 'ab["]'}  # so that drafts come true at times


@pytest.mark.parametrize(("temperature", "num_blocks"), [(0.0, 64), (1.0, 64), (1.0, 9)])
def test_neither_drafts_nor_preemption_change_what_is_said(temperature, num_blocks):
    values = {"temperature": temperature, "logit_bias": LIKELY, "repetition_penalty": 1.2}
    limits = Limits(num_blocks=num_blocks, block_size=8, max_batch=4, max_context=64)
    drafting = dataclasses.replace(limits, draft_tokens=3, draft_modules=2)
    told, accepted = [], 0
    for each in (dataclasses.replace(limits, num_blocks=64), drafting):
        model = Completing(whole_model(DRAFTING), each, EOS)
        requests = [
            request(str(i), wanted, 7, max_tokens=50, **values) for i, wanted in enumerate(WANTED)
        ]
        told.append({name: c.ids for name, c in model.run(requests).items()})
        accepted = sum(map(len, told[-1].values())) - sum(
            bool(s.samples) for p in model.plans for s in next(iter(p.owners.values()))
        )
    assert told[0] == told[1]
    assert accepted > 0
    assert (model.counts.num_preemptions > 0) == (num_blocks == 9)
