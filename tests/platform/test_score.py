"""`dualray score` on a tiny checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.checkpoints import save_stage
from support.models import tiny_config, whole_model
from typer.testing import CliRunner

from dualray.data.tokenizer import ByteTokenizer
from dualray.errors import DualrayError
from dualray.inference.scoring import score
from dualray.model.stage import Stage
from dualray.platform.cli import app


@pytest.fixture(scope="module")
def stage() -> Stage:
    return whole_model(tiny_config(vocab_size=257, max_position_embeddings=16))


@pytest.fixture(scope="module")
def checkpoint(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    ByteTokenizer().save(tokenizer)
    save_stage(stage, folder / "checkpoints", tokenizer=tokenizer)
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["score", *map(str, arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refusal(*arguments: object) -> str:
    error = CliRunner().invoke(app, ["score", *map(str, arguments)]).exception
    assert isinstance(error, DualrayError), error
    return str(error)


def test_tokens_as_json(stage: Stage, checkpoint: Path, tmp_path: Path) -> None:
    sequences = [[1, 2, 3, 250], [9], [256, 0]]
    file = tmp_path / "ids.json"
    file.write_text(json.dumps(sequences))
    printed = json.loads(run(checkpoint, "--tokens", file, "--json"))
    expected = score(stage, sequences)
    assert printed["logprobs"] == expected
    scored = torch.tensor([value for values in expected for value in values], dtype=torch.float64)
    assert printed["nll"] == pytest.approx(-scored.mean().item(), abs=1e-12)
    assert set(printed) == {"logprobs", "nll"}


def test_tokens_as_a_table(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "ids.json"
    file.write_text("[[1, 2, 3], [9]]")
    step = checkpoint / "checkpoints" / "step-1"
    output = run(step, "--tokens", file)
    nll = json.loads(run(step, "--tokens", file, "--json"))["nll"]
    assert re.search(rf"^ +0 +2 +{nll:.4f} +-\d\.\d\d at token [12]\s*$", output, re.M)
    assert re.search(r"^ +1 +0\s*$", output, re.M)
    assert f"step-1: {nll:.4f} nats a token over 2 tokens, perplexity " in output


def test_text_is_cut_where_the_context_ends(stage: Stage, checkpoint: Path, tmp_path: Path) -> None:
    text = "To be, or not to be, that is the question."
    file = tmp_path / "text.txt"
    file.write_text(text)
    printed = json.loads(run(checkpoint, "--text", file, "--json"))
    ids = list(text.encode())
    # Windows of 16 overlap by one token, so each but the first is scored once.
    assert printed["logprobs"] == score(stage, [ids[0:16], ids[15:31], ids[30:]])
    assert sum(map(len, printed["logprobs"])) == len(ids) - 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[[1, 2", " line 1 is not JSON; write a list of lists of token ids."),
        ("[" * 100_000, " is not JSON; write a list of lists of token ids."),
        (
            '{"a": 1}',
            " must be a list of lists of token ids and is an object; write, say, "
            "[[1, 2, 3], [4, 5]].",
        ),
        (
            "[]",
            " must be a list of lists of token ids and is an empty list; write, say, "
            "[[1, 2, 3], [4, 5]].",
        ),
        ("[1, 2]", "0 must be a list of token ids and is a number; write"),
        ("[[1, 2], []]", "1 must be a list of token ids and is an empty list; write"),
        (
            '[[1, 2], [3, "4"]]',
            '1 has "4" at position 1, which is no token id; write whole numbers.',
        ),
        ("[[1.0, 2]]", "0 has 1.0 at position 0, which is no token id; write whole numbers."),
        ("[[true, 2]]", "0 has true at position 0, which is no token id; write whole numbers."),
        (
            "[[1, 257]]",
            "0 has token 257 at position 1 and model.vocab_size is 257; use the tokenizer that "
            "the checkpoint was trained with.",
        ),
        ("[[1, -1]]", "0 has token -1 at position 1 and model.vocab_size is 257; use"),
        (
            json.dumps([[5] * 17]),
            "0 has 17 tokens and model.max_position_embeddings is 16; cut it into shorter "
            "sequences.",
        ),
        (
            "[[1], [2]]",
            " has no second token in any sequence, and the first is given; give sequences of two "
            "tokens or more.",
        ),
    ],
)
def test_tokens_that_cannot_be_scored(
    checkpoint: Path, tmp_path: Path, content: str, sentence: str
) -> None:
    file = tmp_path / "ids.json"
    file.write_text(content)
    said = refusal(checkpoint, "--tokens", file).replace(f" of --tokens {file}", "")
    said = said.removeprefix("sequence ").removeprefix(f"--tokens {file}")
    assert said.startswith(sentence)


def test_which_file(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "none"
    assert refusal(checkpoint) == "neither --tokens nor --text is given; give one of the two."
    assert refusal(checkpoint, "--tokens", file, "--text", file) == (
        "both --tokens and --text are given; give one of the two."
    )
    for option in ("--tokens", "--text"):
        assert refusal(checkpoint, option, file) == (
            f"{option} {file} cannot be read (No such file or directory); check the path."
        )
    file.write_bytes(b"ab\xff")
    assert refusal(checkpoint, "--text", file) == (
        f"byte 2 of --text {file} is not UTF-8; convert the file."
    )
    file.write_text("a")
    assert refusal(checkpoint, "--text", file) == (
        f"--text {file} has no second token in any sequence, and the first is given; give "
        "sequences of two tokens or more."
    )


def test_a_checkpoint_without_a_tokenizer_scores_tokens_only(stage: Stage, tmp_path: Path) -> None:
    folder = save_stage(stage, tmp_path)
    file = tmp_path / "text"
    file.write_text("[[1, 2]]")
    assert run(folder, "--tokens", file)
    assert refusal(folder, "--text", file) == (
        f"checkpoint {folder} holds no tokenizer; give --tokens, or import the model with its "
        "tokenizer.json."
    )


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    stage = whole_model(tiny_config())
    stage.norm.weight.data[3] = torch.nan
    folder = save_stage(stage, tmp_path)
    file = tmp_path / "ids.json"
    file.write_text("[[1], [1, 2]]")
    for options in ((), ("--json",)):
        assert refusal(folder, "--tokens", file, *options) == (
            f"checkpoint {folder} gives token 1 of sequence 1 a log-probability of nan, which is "
            "no finite number; use an earlier checkpoint, or look where its training diverged."
        )


def test_a_perplexity_beyond_floating_point(tmp_path: Path) -> None:
    stage = whole_model(tiny_config())
    stage.lm_head.weight.data *= 1e5
    file = tmp_path / "ids.json"
    file.write_text("[[1, 2, 3]]")
    assert re.search(
        r"over 2 tokens, perplexity inf$", run(save_stage(stage, tmp_path), "--tokens", file), re.M
    )
