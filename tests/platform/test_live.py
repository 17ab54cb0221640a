"""`status` and `stop` where there is no run to be reached."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support.fake_cluster import free_port

from dualray.errors import RunError
from dualray.platform import cli
from dualray.platform.folder import RunFolder
from dualray.platform.live import end, look


def run_folder(name: str, **changes) -> RunFolder:
    """The folder that a run on a Ray that is gone has left."""
    folder = RunFolder.named(name)
    folder.create({"name": name})
    state = {
        "run_id": "1", "name": name, "state": "training", "address": f"127.0.0.1:{free_port()}",
        "target": "127.0.0.1:9", "workers": [{"rank": 0, "pid": 7, "node": "127.0.0.1"}],
        "auth_token": "secret",
    }  # fmt: skip
    folder.write_state(state | changes)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(monkeypatch, capsys):
    """command(...) runs a command and returns its code, output and errors."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dualray", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


def test_a_run_that_has_ended_is_not_asked() -> None:
    folder = run_folder("old", state="stopped", target=None)
    assert look(folder)["state"] == "stopped"
    assert end(folder, timeout_s=1) == "run old has ended already (stopped)"


def test_a_run_that_nobody_answers_for_is_lost() -> None:
    folder = run_folder("gone")
    found = look(folder)
    assert (found["state"], found["target"]) == ("lost", None)
    address = folder.read_state()["address"]
    with pytest.raises(RunError) as caught:
        end(folder, timeout_s=1)
    assert str(caught.value) == (
        f"run gone is lost (cluster.address is {address} and no Ray head answers there); continue "
        "it with dualray train --resume."
    )


def test_a_run_that_does_not_live_is_not_switched(command) -> None:
    folder = run_folder("old", state="stopped", target=None)
    assert command("mode", "old", "train") == (
        2, "",
        "error: run old has ended (stopped) and cannot be switched; start it again, or serve it "
        f"with dualray serve {folder.path}.\n",
    )  # fmt: skip
    address = run_folder("gone").read_state()["address"]
    assert command("mode", "gone", "serve") == (
        2, "",
        f"error: run gone is lost (cluster.address is {address} and no Ray head answers there); "
        "continue it with dualray train --resume.\n",
    )  # fmt: skip


def test_status_shows_all_runs_and_no_secret(command) -> None:
    run_folder("one", state="failed")
    run_folder("two")
    code, out, err = command("status", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [(row["name"], row["state"]) for row in rows] == [("one", "failed"), ("two", "lost")]
    assert "secret" not in out
    code, out, _ = command("status", "one")
    assert code == 0
    assert "failed" in out
    assert "two" not in out


def test_no_runs(command) -> None:
    code, out, _ = command("status")
    assert code == 0
    assert out.endswith("no run was started here; next: dualray train RUN.yaml\n")
    assert command("stop", "demo") == (
        2, "",
        "error: run demo has no run.json in runs/demo; no run was started here yet.\n",
    )  # fmt: skip


def test_another_name_is_answered_with_those_that_are_there(command) -> None:
    run_folder("demo", state="stopped")
    assert command("status", "dmeo") == (
        2, "", "error: run dmeo has no run.json in runs/dmeo; runs here: demo.\n",
    )  # fmt: skip


def test_a_run_is_found_by_its_folder_too(command) -> None:
    folder = run_folder("demo", state="stopped")
    assert RunFolder.find(str(folder.path)) == folder
    assert command("stop", "runs/demo") == (0, "run demo has ended already (stopped)\n", "")
