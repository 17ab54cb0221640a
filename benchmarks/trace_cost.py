"""`python benchmarks/trace_cost.py`: what a timeline costs a step of the demo.

Adds a line to results.jsonl beside this file. Two minutes on two cores.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dualray.parallel.train_config import TrainConfig
from dualray.platform.bench.record import append, new_record
from dualray.platform.bench.trace_cost import Task, measure
from dualray.platform.preset import load_model

TASK = Task(
    model=load_model("demo"),
    train=TrainConfig(steps=1000, seq_len=128, micro_batches=4, micro_batch_size=4, lr=1e-3),
    warmup=3,
    pairs=60,
)


def main() -> None:
    found = measure(TASK)
    print(f"median step without a timeline   {1e3 * found['step_s']:8.1f} ms")
    for name, seconds in found["parts"].items():
        print(f"{name.removesuffix('_s'):<32} {1e3 * seconds:8.3f} ms")
    print(f"all parts                        {found['share']:8.2%} of a step that is traced")
    print(f"noting alone                     {found['share_noting']:8.3%} of every step")
    for of in ("wall", "cpu"):
        ratio = found[f"{of}_ratio"]
        quartiles = f"(quartiles {ratio['low']:.3f}, {ratio['high']:.3f})"
        print(f"{of} time, with / without in pairs {ratio['median']:9.3f} {quartiles}")
    append(
        Path(__file__).with_name("results.jsonl"), new_record("trace_cost", asdict(TASK), [found])
    )


if __name__ == "__main__":
    main()
