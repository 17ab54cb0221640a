"""The documents name files that exist, and what they tell people to write is right."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from dualray.platform.run_file import parse_run_file

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/serving.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_named_tests_exist(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (path.parent / link).exists()]
    files = re.findall(r"`((?:tests|dualray|examples|docs)/[\w./-]+\.\w+)`", text)
    missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing


def blocks(language: str) -> list[str]:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.M | re.S)


def test_the_readmes_run_file_is_one() -> None:
    (text,) = blocks("yaml")
    assert parse_run_file(yaml.safe_load(text)).layout.world_size == 4


def test_the_readmes_program_is_one() -> None:
    """It ran against a live server when it was written; here its syntax and parameters."""
    from dualray.inference.request import SamplingParams

    (text,) = blocks("python")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    (sampling,) = [call for call in calls if ast.unparse(call.func) == "json.dumps"]
    assert SamplingParams.parse(ast.literal_eval(sampling.args[0])).max_tokens == 24
