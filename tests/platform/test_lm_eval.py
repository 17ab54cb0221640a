"""The lm-eval harness asks a served tiny model; what it is told is what the model's scores are."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.models import tiny_config, whole_model
from support.secured import write
from support.serving import LIMITS, WEIGHTS, serving

from dualray.data.tokenizer import Tokenizer, train_bpe
from dualray.errors import RequestError, RunError
from dualray.inference.scoring import score
from dualray.inference.serve_config import ServeConfig
from dualray.platform.access import Access
from dualray.platform.generation_arguments import read_generation
from dualray.platform.token_client import TokenClient

TEXT = "the cat sat on the mat while the dogs ran and the birds flew over green fields. "
QUESTIONS = [
    {"question": "the cat sat on ", "choices": ["the mat", "green fields", "a"], "answer": 0},
    {"question": "the birds", "choices": [" flew", "over the dogs"], "answer": 0},
    {"question": "and then", "choices": [" the", " ran"], "answer": 1},
    {"question": "", "choices": ["the", "birds flew"], "answer": 1},
    {"question": TEXT * 4, "choices": ["the cat", "green fields " * 30], "answer": 0},
]
DOCUMENTS = [{"text": TEXT * 4}, {"text": "the dogs"}, {"text": "x"}]
PROMPTS = [{"prompt": "the cat"}, {"prompt": TEXT * 3}, {"prompt": "birds flew "}]
TASKS = {
    "ours_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "ours_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "ours_continued": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "x",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}
"""Task files as the harness reads them; the data are files of JSON lines."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 280)


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving(tokenizer=tokenizer) as served:
        yield served


class Reference:
    """The same weights, without a server: whole sequences in one forward."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocab_size = tokenizer.vocab_size
        self._stage = whole_model(tiny_config(vocab_size=vocab_size, num_nextn_predict_layers=0))
        self._tokenizer = tokenizer

    def continuation(self, context: str, continuation: str) -> float:
        """As the harness defines it: spaces at the end of the context are the continuation's, the
        border is where the context alone ends, and what follows nothing follows a document."""
        if not context:
            ids = self._tokenizer.encode(continuation)
            return self.tail([self._tokenizer.eos_id, *ids], len(ids))
        whole = self._tokenizer.encode(context + continuation)
        border = len(self._tokenizer.encode(context.rstrip(" ")))
        return self.tail(whole, len(whole) - border)

    def document(self, text: str) -> float:
        """In windows of the longest context, of which each scores what the one before did not."""
        ids = [self._tokenizer.eos_id, *self._tokenizer.encode(text)]
        longest = LIMITS.max_context - 1
        total, scored = 0.0, 1
        while scored < len(ids):
            end = min(len(ids), max(longest, scored + longest - 1))
            total += self.tail(ids[max(0, end - longest) : end], end - scored)
            scored = end
        return total

    def tail(self, ids: list[int], count: int) -> float:
        """Of the last `count` tokens, or as many of them as the context holds."""
        [values] = score(self._stage, [ids[-(LIMITS.max_context - 1) :]])
        return math.fsum(values[-count:])


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    data = {"ours_choice": QUESTIONS, "ours_text": DOCUMENTS, "ours_continued": PROMPTS}
    for name, task in TASKS.items():
        lines = folder / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in data[name]))
        source = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(lines)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(source | task))


def lm_eval(folder: Path, model_args: str, tasks: str) -> subprocess.CompletedProcess[str]:
    """The harness in a process of its own, as a person runs it, with nothing from the network."""
    write_tasks(folder / "tasks")
    arguments = [
        *("--model", "dualray", "--model_args", model_args),
        *("--tasks", tasks, "--include_path", str(folder / "tasks")),
        *("--output_path", str(folder / "out"), "--log_samples"),
    ]
    return subprocess.run(
        [sys.executable, "-m", "dualray.platform.evaluation", *arguments],
        env=os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    ended = lm_eval(tmp_path, "target=127.0.0.1:1", "ours_choice")
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (
        2,
        "error: --target is 127.0.0.1:1 and no server answers there; start one with dualray serve, "
        "or take the target from dualray status.",
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_the_harness_evaluates_a_served_model(served, tokenizer, tmp_path):
    ended = lm_eval(tmp_path, f"target={served.target},num_concurrent=4", ",".join(TASKS))
    assert ended.returncode == 0, ended.stderr
    [results] = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(results.read_text())
    assert {name: written["config"][name] for name in ("model", "model_name")} == {
        "model": "dualray",
        "model_name": "tiny",
    }
    assert written["config"]["training_steps"] == [WEIGHTS.training_step]
    assert written["config"]["weight_digests"] == [WEIGHTS.digest]
    samples = {}
    for name in TASKS:
        [path] = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        lines = map(json.loads, path.read_text().splitlines())
        samples[name] = sorted(lines, key=lambda line: line["doc_id"])
    reference = Reference(tokenizer)
    assert len(tokenizer.encode(DOCUMENTS[0]["text"])) > 2 * LIMITS.max_context
    assert len(tokenizer.encode(QUESTIONS[-1]["choices"][1])) > LIMITS.max_context
    # fp32 sums in another order, and log-probabilities that travel as fp32.
    for line, asked in zip(samples["ours_choice"], QUESTIONS, strict=True):
        told = [float(response[0][0]) for response in line["resps"]]
        own = [reference.continuation(asked["question"], choice) for choice in asked["choices"]]
        assert told == pytest.approx(own, abs=1e-4)
        right = own.index(max(own)) == asked["answer"]
        assert line["acc"] == right
    total = 0.0
    for line, asked in zip(samples["ours_text"], DOCUMENTS, strict=True):
        [[told]] = line["resps"]
        own = reference.document(asked["text"])
        assert float(told) == pytest.approx(own, abs=1e-4)
        total += own
    size = sum(len(document["text"].encode()) for document in DOCUMENTS)
    bits = written["results"]["ours_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(-total / size / math.log(2), abs=1e-4)
    with TokenClient(served.target) as client:
        for line, asked in zip(samples["ours_continued"], PROMPTS, strict=True):
            [[told]] = line["resps"]
            ids = tokenizer.encode(asked["prompt"])[-(LIMITS.max_context - 9) :]
            whole = tokenizer.decode(client.complete(ids, {"max_tokens": 9}).ids)
            assert told == whole.partition("e")[0]


def test_scores_are_those_of_one_forward_and_know_what_greedy_would_say(served, tokenizer):
    ids = tokenizer.encode(TEXT)[:40]
    with TokenClient(served.target) as client:
        assert client.tokenizer().encode(TEXT) == tokenizer.encode(TEXT)
        greedy = client.complete(ids, {"max_tokens": 5, "ignore_eos": True})
        assert (greedy.stamp.model, greedy.stamp.training_step) == ("tiny", WEIGHTS.training_step)
        scored = client.score([*ids, *greedy.ids])
        assert scored.likeliest[-5:] == (True,) * 5
        least = client.score([*ids, (greedy.ids[0] + 1) % tokenizer.vocab_size])
        assert not least.likeliest[-1]
    reference = Reference(tokenizer)
    assert math.fsum(scored.logprobs) == pytest.approx(
        reference.tail([*ids, *greedy.ids], len(ids) + 4), abs=1e-4
    )


def test_a_secured_server_is_asked_with_a_token_and_refusals_are_sentences(tokenizer, tmp_path):
    write(tmp_path / "tokens", "let-me-in\n")
    config = ServeConfig(tokens_file=str(tmp_path / "tokens"))
    with serving(tokenizer=tokenizer, security=config, files=False) as secured:
        with (
            pytest.raises(RunError, match="the call carries no bearer token"),
            TokenClient(secured.target) as stranger,
        ):
            stranger.model()
        with TokenClient(secured.target, Access(token="let-me-in")) as client:
            assert client.model().max_context == LIMITS.max_context
            with pytest.raises(RunError, match="started without the files of its tokenizer"):
                client.tokenizer()
            with pytest.raises(RequestError, match="must leave room for one more"):
                client.score([1] * LIMITS.max_context)


@pytest.mark.parametrize(
    ("given", "sampling", "until"),
    [
        ({}, {"max_tokens": 63, "temperature": 0.0}, ()),
        (
            {"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.7},
            {"max_tokens": 5, "temperature": 0.0, "stop": ["\n"]},
            ("\n",),
        ),
        (
            {"until": ["a", "", "b"], "do_sample": True, "top_k": 3, "num_beams": 1, "seed": None},
            {"max_tokens": 63, "temperature": 1.0, "stop": ["a", "b"], "top_k": 3},
            ("a", "b"),
        ),
        ({"temperature": 0.5, "max_new_tokens": 7}, {"max_tokens": 7, "temperature": 0.5}, ()),
    ],
)
def test_a_tasks_generation_arguments_in_our_words(given, sampling, until):
    read = read_generation(given, LIMITS.max_context)
    assert (read.sampling, read.until) == (sampling, until)


def test_an_argument_that_nobody_would_heed_is_refused():
    with pytest.raises(RequestError) as raised:
        read_generation({"num_beams": 4}, 64)
    assert str(raised.value).startswith(
        "generation_kwargs.num_beams is 4 and the server does not offer it; leave it out"
    )


def test_the_plugin_is_where_the_package_says():
    """Later harnesses find it by this entry point, which names what 0.4.13 is told to register."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {
        "dualray": "dualray.platform.evaluation:DualrayLM"
    }
