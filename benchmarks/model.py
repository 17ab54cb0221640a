"""`make bench`: `dualray bench model` with its result added to results.jsonl beside this file.

Options are those of the command.
"""

import sys
from pathlib import Path

from dualray.errors import DualrayError
from dualray.platform.commands.bench import app

if __name__ == "__main__":
    results = Path(__file__).with_name("results.jsonl")
    try:
        app(["model", "--record", str(results), *sys.argv[1:]])
    except DualrayError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
