"""Hypothesis strategies for hostile protobuf messages: a good one, changed in a few places.

A message made of random fields alone is refused by the first check. One that was good before a
few of its fields were set to hostile values comes deeper. B base messages are the caller's.
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from hypothesis import strategies as st
from support.chains import chained_rules, chained_schemas, optional_words, optional_words_in

INTEGERS = (0, 1, -1, 2, 7, 128, 129, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32, 1 << 62, 1 << 64)
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"))
WORDS = (
    *("", "x", "tiny", "7", "-1", "1e400", "nan", "null", "true", "[]", "{}", '"', "\\", "\x00"),
    *("\ud7ff", "\ufffd", "\U0001f9ff", "e\u0301", "a" * 300, "(", "(a+)+$", "../../etc/passwd"),
    *("BYTES", "BOOL", "FP32", "text_input", "stream", "sampling_parameters", "text_output"),
)
NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "min_tokens", "stop"),
    *("stop_token_ids", "logprobs", "prompt_logprobs", "logit_bias", "ignore_eos", "best_of"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "structured_outputs"),
    *("include_stop_str_in_output", "skip_special_tokens", "timeout", "priority", "sequence_id"),
    *("triton_enable_empty_final_response", "bad_words", "allowed_token_ids", "nothing"),
)
SCHEMAS = (
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    {"json": {"type": 7}},
    {"json": "{"},
    {"regex": "(a|b){2}"},
    {"regex": "(("},
    {"regex": "((a{1,999}){1,999}){1,999}"},
    {"choice": ["yes", "no"]},
    {"choice": []},
    {"grammar": "root ::= root"},
    {"json_object": True},
    {"json": {"$ref": "#"}},
    chained_rules(300),
    chained_rules(3000),
    chained_schemas(900),
    chained_schemas(900, "anyOf"),
    optional_words(1500),
    optional_words_in("terminal", 1500),
    optional_words_in("white space", 1500),
)

texts = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))
scalars = st.one_of(
    st.sampled_from(INTEGERS), st.sampled_from(FLOATS), texts, st.booleans(), st.none()
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(texts, scalars, max_size=3),
    st.sampled_from(SCHEMAS),
)
sampling = st.one_of(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=3).map(json.dumps),
    texts,
    st.sampled_from(SCHEMAS).map(lambda wanted: json.dumps({"structured_outputs": wanted})),
)


@st.composite
def hostile(draw: Any, bases: tuple[Message, ...]) -> bytes:
    """Bytes of one of `bases` after up to three changes, now and then cut or with bytes changed."""
    message = type(base := draw(st.sampled_from(bases)))()
    message.CopyFrom(base)
    for _ in range(draw(st.integers(0, 3))):
        _change(draw, message)
    data = message.SerializeToString()
    if data and draw(st.integers(0, 15)) == 0:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=4)) + data[at + draw(st.integers(0, 3)) :]
    return data


def _change(draw: Any, message: Any) -> None:
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw(st.sampled_from(fields))
    if draw(st.integers(0, 7)) == 0:
        message.ClearField(field.name)
        return
    held = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        _change_map(draw, held, field.message_type)
    elif field.is_repeated and field.message_type is not None:
        new = not held or draw(st.booleans())
        _change(draw, held.add() if new else draw(st.sampled_from(list(held))))
    elif field.message_type is not None:
        held.SetInParent()
        _change(draw, held)
    elif field.is_repeated:
        held.extend(draw(st.lists(_scalar(field), min_size=1, max_size=3)))
    else:
        setattr(message, field.name, draw(_scalar(field)))


def _change_map(draw: Any, held: Any, entry: Any) -> None:
    key_field, value_field = entry.fields_by_name["key"], entry.fields_by_name["value"]
    key = st.sampled_from(NAMES) if key_field.type == Field.TYPE_STRING else _scalar(key_field)
    if value_field.message_type is None:
        held[draw(key)] = draw(_scalar(value_field))
    else:
        _change(draw, held[draw(key)])


_RANGES = {
    Field.CPPTYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    Field.CPPTYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    Field.CPPTYPE_UINT32: (0, (1 << 32) - 1),
    Field.CPPTYPE_UINT64: (0, (1 << 64) - 1),
}


def _scalar(field: Any) -> st.SearchStrategy[Any]:
    kind = field.cpp_type
    if kind in _RANGES:
        low, high = _RANGES[kind]
        return st.sampled_from([i for i in INTEGERS if low <= i <= high])
    if kind in (Field.CPPTYPE_FLOAT, Field.CPPTYPE_DOUBLE):
        return st.sampled_from(FLOATS)
    if kind == Field.CPPTYPE_BOOL:
        return st.booleans()
    if kind == Field.CPPTYPE_ENUM:
        return st.sampled_from([value.number for value in field.enum_type.values])
    if field.type == Field.TYPE_BYTES:
        return st.one_of(sampling.map(str.encode), st.binary(max_size=12))
    return st.one_of(texts, sampling)
