"""`python benchmarks/import_memory.py`: how much memory importing and exporting take.

Writes a random Hugging Face model of several GB into a temporary folder, in bfloat16 and in FP8
blocks, never holding more than a chunk of it, and runs `dualray checkpoint import` and `export`
each in a fresh process. The peak is the kernel's VmHWM, which counts mapped pages too; it must
stay below 1.5 times the largest tensor plus 500 MB. Adds a line to results.jsonl beside
this file and deletes what it wrote. Linux only; needs 20 GB of disk.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualray.checkpoint.fp8_blocks import scale_name, scale_shape
from dualray.checkpoint.hf_names import copies_of_shared, expected_shapes
from dualray.checkpoint.hf_rows import row_ranges
from dualray.checkpoint.shard import Stream, write_streams
from dualray.model.config import ModelConfig
from dualray.model.hugging_face import to_hugging_face
from dualray.model.init import seed_for
from dualray.platform.bench.record import append, new_record

MODEL = ModelConfig(
    vocab_size=129280,
    hidden_size=2048,
    intermediate_size=11264,
    moe_intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=16,
    q_lora_rank=1024,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=8,
    topk_group=4,
    num_nextn_predict_layers=1,
)
BLOCK = (128, 128)
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
_FILE_BYTES = 2 << 30
_NOT_FP8 = ("embed_tokens", "lm_head", "gate.weight", "eh_proj")
_CHILD = """
import json, re, sys
from dualray.platform.cli import app
app(sys.argv[1:], standalone_mode=False)
status = open("/proc/self/status").read()
print(json.dumps(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024))
"""


def main() -> None:
    results = []
    with tempfile.TemporaryDirectory(prefix="dualray-import-memory-") as name:
        folder = Path(name)
        for weights in ("bf16", "fp8"):
            source = folder / weights
            write_model(source, fp8=weights == "fp8")
            for fp8 in ("dequantise", "keep") if weights == "fp8" else ("dequantise",):
                ours, back = folder / "ours", folder / "back"
                importing = ["checkpoint", "import", str(source), "--out", str(ours), "--fp8", fp8]
                results.append(measure(f"import {weights}, {fp8}", source, ours, importing))
                exporting = ["checkpoint", "export", str(ours), "--out", str(back)]
                results.append(measure(f"export of that ({fp8})", ours, back, exporting))
                shutil.rmtree(ours)
                shutil.rmtree(back)
            shutil.rmtree(source)
    line = new_record("import_memory", {"model": asdict(MODEL)}, results)
    record = Path(__file__).with_name("results.jsonl")
    append(record, line)
    show(line)
    print(f"appended to {record}")
    if not all(result["within_bound"] for result in results):
        sys.exit(1)


def measure(title: str, source: Path, out: Path, arguments: list[str]) -> dict[str, Any]:
    """Run one command of dualray in a fresh process: its seconds and its peak of memory."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    largest = max(
        (stop - start)
        for folder in (source, out)
        for file in folder.glob("*.safetensors")
        for start, stop in ranges(file)
    )
    peak = json.loads(done.stdout.splitlines()[-1])
    bound = 1.5 * largest + 500e6
    return {
        "what": title,
        "read_bytes": size(source),
        "written_bytes": size(out),
        "largest_tensor_bytes": largest,
        "peak_bytes": peak,
        "bound_bytes": round(bound),
        "within_bound": peak < bound,
        "seconds": seconds,
    }


def ranges(file: Path) -> list[tuple[int, int]]:
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return [tuple(entry["data_offsets"]) for entry in header.values()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def show(line: dict[str, Any]) -> None:
    print(f"{line['machine']['cpu']}; torch {line['versions']['torch']}")
    print(f"{'':28}{'read GB':>9}{'written GB':>12}{'largest MB':>12}{'peak MB':>9}", end="")
    print(f"{'bound MB':>10}{'s':>8}")
    for row in line["results"]:
        print(
            f"{row['what']:28}{row['read_bytes'] / 1e9:9.2f}{row['written_bytes'] / 1e9:12.2f}"
            f"{row['largest_tensor_bytes'] / 1e6:12.0f}{row['peak_bytes'] / 1e6:9.0f}"
            f"{row['bound_bytes'] / 1e6:10.0f}{row['seconds']:8.1f}"
        )


def write_model(folder: Path, *, fp8: bool) -> None:
    """A Hugging Face folder of `MODEL` with random elements, in files of 2 GiB and an index."""
    folder.mkdir()
    streams = list(random_streams(fp8=fp8))
    files: list[list[Stream]] = [[]]
    for stream in streams:
        if sum(other.nbytes for other in files[-1]) + stream.nbytes > _FILE_BYTES:
            files.append([])
        files[-1].append(stream)
    index: dict[str, str] = {}
    for number, batch in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_streams(folder / file, batch, {"format": "pt"})
        index |= {stream.key: file for stream in batch}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    config = to_hugging_face(MODEL, torch.bfloat16)
    config |= {"quantization_config": QUANTIZATION} if fp8 else {}
    (folder / "config.json").write_text(json.dumps(config))


def random_streams(*, fp8: bool) -> Iterator[Stream]:
    shapes = expected_shapes(MODEL)
    for name, shape in shapes.items():
        bias = name.endswith("e_score_correction_bias")
        if fp8 and len(shape) == 2 and not any(part in name for part in _NOT_FP8):
            yield random_stream(name, name, shape, torch.float8_e4m3fn)
            scales = scale_name(name)
            yield random_stream(scales, scales, scale_shape(shape, BLOCK), torch.float32)
        else:
            yield random_stream(name, name, shape, torch.float32 if bias else torch.bfloat16)
    for copy, name in copies_of_shared(MODEL).items():
        yield random_stream(copy, name, shapes[name], torch.bfloat16)


def random_stream(key: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Stream:
    """Elements of random bits, the same for the same `name`."""
    width = shape[1] if len(shape) == 2 else 1

    def chunks() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed_for(0, name))
        for start, stop in row_ranges(shape[0], width):
            nbytes = (stop - start) * width * dtype.itemsize
            words = torch.randint(-(1 << 62), 1 << 62, (-(-nbytes // 8),), generator=generator)
            yield words.view(torch.uint8)[:nbytes].view(dtype)

    made: Callable[[], Iterator[Tensor]] = chunks
    return Stream(key=key, shape=shape, dtype=dtype, chunks=made)


if __name__ == "__main__":
    main()
