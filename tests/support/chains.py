"""Structured outputs of a few kB that a compiler recurses or grows with, N links long."""

from __future__ import annotations

import json


def chained_rules(count: int, name: str = "r") -> dict:
    """Of a capital letter: terminals."""
    links = [f"{name}{i}: {name}{i + 1}" for i in range(count)]
    return {"grammar": "\n".join([f"start: {name}0", *links, f'{name}{count}: "a"'])}


def chained_schemas(count: int, kind: str = "properties") -> dict:
    def link(i: int) -> dict:
        follower = {"$ref": f"#/$defs/{i}"}
        return {kind: {"a": follower} if kind == "properties" else [follower, {"type": "null"}]}

    links = {str(i): link(i + 1) for i in range(count)} | {str(count): {"type": "null"}}
    return {"json": json.dumps({"$defs": links, "$ref": "#/$defs/0"}, separators=(",", ":"))}


def optional_words(count: int) -> dict:
    return {"regex": r"\w?" * count}


def optional_words_in(kind: str, count: int) -> dict:
    regex = r"\w?" * count
    if kind == "pattern":
        return {"json": {"type": "string", "pattern": f"^({regex})+$"}}
    if kind == "terminal":
        return {"grammar": f"start: X\nX: /{regex}/"}
    return {"json": {"type": "object"}, "whitespace_pattern": regex}
