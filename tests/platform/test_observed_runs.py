"""What a run in real Ray actors lets be seen of its serving: metrics over TLS, and a log."""

from __future__ import annotations

import json
import ssl
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.certificates import Authority
from support.runs import dualray, make_corpus, started, write_run_file

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def samples_of(url: str, trusts: Path) -> dict[tuple[str, str], float]:
    """By name and layer, which is empty where there is none."""
    context = ssl.create_default_context(cafile=trusts)
    with urllib.request.urlopen(url, timeout=60, context=context) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, s.labels.get("layer", "")): s.value for f in families for s in f.samples}


def test_metrics_are_where_the_run_says_and_its_log_has_every_request(tmp_path: Path) -> None:
    """Two expert ranks, so that there is a balance to show."""
    data = make_corpus(tmp_path / "corpus")
    ca = Authority(tmp_path, "ca")
    server = ca.issue("server")
    write_run_file(
        tmp_path / "tiny.yaml",
        data,
        layout={"pipeline": 1, "experts": 2, "schedule": "1f1b"},
        train={"steps": 1, "micro_batches": 2},
        serve={
            "metrics_port": 0,
            "tls_cert": server.cert.name,
            "tls_key": server.key.name,
            "access_log": "access.jsonl",
        },
    )
    with started("train", "tiny.yaml", cwd=tmp_path) as train:
        target = train.line(r"serving at (\S+:\d+) from")[1]
        metrics = train.line(r"metrics at (https://127\.0\.0\.1:\d+/metrics)$")[1]
        train.line("^first token")
        num_asked = 0
        # The workers are asked every ten seconds, behind a step.
        while not (balance := _balance(samples_of(metrics, ca.cert))):
            answered = dualray(
                "generate", "the cat", "--target", target, "--ca", ca.cert, "--max-tokens", "3",
                cwd=tmp_path,
            )  # fmt: skip
            assert answered.code == 0, answered
            num_asked += 1
        assert all(0.5 <= value <= 1 for value in balance.values()), balance
        assert dualray("stop", "tiny", cwd=tmp_path).code == 0
        assert train.end().code == 0
    own, *lines = [json.loads(x) for x in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert own["peer"].startswith("unix:"), "the run's own first token"
    assert len(lines) == num_asked
    for line in lines:
        assert (line["model"], line["training_step"], line["code"]) == ("tiny", 1, "OK")
        assert (line["prompt_tokens"], line["output_tokens"]) == (7, 3)


def _balance(samples: dict[tuple[str, str], float]) -> dict[str, float]:
    return {
        layer: v for (name, layer), v in samples.items() if name == "dualray:expert_balancedness"
    }


def test_a_log_that_cannot_be_written_ends_the_run_before_it_trains(tmp_path: Path) -> None:
    data = make_corpus(tmp_path / "corpus")
    write_run_file(
        tmp_path / "tiny.yaml",
        data,
        layout={"pipeline": 1, "experts": 1, "schedule": "1f1b"},
        serve={"access_log": "none/access.jsonl"},
    )
    ended = dualray("train", "tiny.yaml", cwd=tmp_path)
    assert ended.code == 2
    assert ended.err == (
        "error: serve.access_log is none/access.jsonl and cannot be written (No such file or "
        "directory); make its folder, see to its permissions, or choose another path.\n"
    )
    assert not (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
