"""Regenerates the committed protobuf code: `python -m dualray.proto.generate [--check]`.

The generated files are committed so that an installed dualray needs no compiler. `--check`
writes nothing and exits 1 when they differ from what the .proto files give.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")


def compile_protos(root: Path, out: Path) -> list[Path]:
    """Compiles every .proto under `root`/dualray/proto into `out`; returns relative paths.

    protoc runs with the repository root as its include path, so that generated modules import
    each other as `dualray.proto.*`.
    """
    from grpc_tools import protoc  # a development dependency

    protos = sorted((root / "dualray" / "proto").glob("*.proto"))
    written = []
    for proto in protos:
        relative = proto.relative_to(root)
        arguments = [
            "protoc",
            f"-I{root}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            str(relative),
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit(f"protoc could not compile {relative}; see its message above.")
        written += [relative.with_name(relative.stem + suffix) for suffix in SUFFIXES]
    return written


def stale_files(root: Path) -> list[Path]:
    """Generated files that are missing or differ from what the .proto files give."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        return [
            path
            for path in compile_protos(root, fresh)
            if not (root / path).is_file()
            or (root / path).read_bytes() != (fresh / path).read_bytes()
        ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dualray.proto.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only report stale files")
    root = Path(__file__).resolve().parents[2]
    if not parser.parse_args(argv).check:
        compile_protos(root, root)
        return 0
    stale = stale_files(root)
    if stale:
        names = ", ".join(str(path) for path in stale)
        sys.stderr.write(f"error: {names} differ from the .proto files; run `make proto`.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
