"""Where a report is written, and the sentences for what is no run."""

import pytest
import typer
from report_pages import bare_run
from synthetic_run import make_run
from typer.testing import CliRunner

from dualray.errors import RunError
from dualray.platform.commands.report import report
from dualray.platform.report import write_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def test_out_names_the_file(run_dir, tmp_path):
    out = tmp_path / "page.html"
    assert write_report(run_dir, out) == out
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def sentence(folder, out=None) -> str:
    with pytest.raises(RunError) as caught:
        write_report(folder, out)
    return str(caught.value)


def test_a_missing_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence(tmp_path / "nothing") == (
        f"{tmp_path / 'nothing'} is not a folder; "
        "name a folder that `dualray train` wrote, such as runs/demo."
    )


def test_another_folder_is_named_with_runs_nearby(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    bare_run(runs / "small")
    assert sentence(runs) == (
        f"{runs} holds none of run.yaml, run.json, metrics.jsonl and so is not the folder of a "
        f"run; name the folder of a run, for instance {runs / 'small'}."
    )
    assert not (runs / "report.html").exists()


def test_a_damaged_run_file_is_named(tmp_path):
    folder = bare_run(tmp_path / "a", text="name: [")
    assert sentence(folder) == (
        f"{folder / 'run.yaml'} cannot be parsed; restore the file or delete it."
    )
    (folder / "run.yaml").write_bytes(b"name: \xff")
    assert sentence(folder) == (
        f"byte 6 of {folder / 'run.yaml'} is not UTF-8; restore the file or delete it."
    )


def test_an_unwritable_place_is_named(run_dir, tmp_path):
    assert sentence(run_dir, tmp_path) == (
        f"--out is {tmp_path} and that is a folder; "
        f"name a file, such as {tmp_path / 'report.html'}."
    )
    out = tmp_path / "missing" / "page.html"
    assert sentence(run_dir, out) == (
        f"--out is {out} and {out.parent} is not a folder; "
        "create that folder first, or name a file elsewhere."
    )


def test_command_says_where_the_page_is(run_dir, tmp_path):
    app = typer.Typer()
    app.command()(report)
    result = CliRunner().invoke(app, [str(run_dir), "--out", str(tmp_path / "page.html")])
    assert result.exit_code == 0
    assert result.output == f"report written to {tmp_path / 'page.html'}; open it in a browser\n"
