"""Runs as Ray jobs: ship the code and the run file to a cluster, follow the log, stop it.

What travels is a working directory: the files of this very package, the run file and, where they
are here and small, the token shards. Ray names such a directory by its content, so changed code is
never mistaken for cached code, and lays it before everything installed on every node. (A wheel
under `py_modules` is cached by its file name, and installing it would fetch torch again.)

The run itself works in `workspace`, a folder on the cluster that outlives the job: there its
relative paths begin and `runs/NAME` appears. On more than one node that folder must be shared.

A stopped job's driver gets SIGTERM and then RAY_JOB_STOP_WAIT_TIME_S until it is killed. Ray's
default of 3 s is too short for a last checkpoint; jobs from here get `STOP_WAIT_S`.
"""

from __future__ import annotations

import asyncio
import logging
import shlex
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from dualray.errors import ConfigError, RunError
from dualray.platform.run_file import RunFile, load_run_file, to_mapping

STOP_WAIT_S = 120
"""Seconds a stopped job has for its last checkpoint."""
DATA_LIMIT_BYTES = 256 << 20
"""Largest folder of token shards that travels with a job."""
STOPPED_EXIT_CODE = 143
"""What `follow` returns for a job that somebody stopped: 128 + SIGTERM, as a shell would say."""

_CONNECT_LIMIT_S = 5.0
_POLL_S = 0.5
_NARRATORS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_NOT_CODE = shutil.ignore_patterns("__pycache__", "*.pyc")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted run."""

    address: str
    """The head's dashboard, `http://HOST:8265`."""
    submission_id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str = ""
    exit_code: int | None = None
    """The driver's, once it has ended by itself."""

    @property
    def is_final(self) -> bool:
        return JobStatus(self.status).is_terminal()


def submit(
    run_file: Path,
    address: str,
    *,
    overrides: Sequence[str] = (),
    submission_id: str | None = None,
    workspace: str = "~/dualray",
    entrypoint: str | None = None,
) -> Job:
    """Send a run to the cluster whose dashboard is at `address`; returns once it is accepted.

    `entrypoint` replaces the training command. Raises ConfigError for a bad run file, RunError
    for an unreachable head or a taken id; nothing is sent in either case.
    """
    run = load_run_file(run_file, overrides)
    client = _client(address)
    chosen = _free_id(client, address, run.name, submission_id)
    with staged(run) as folder:
        command = entrypoint or train_command(workspace, ships_data=(folder / "data").is_dir())
        with _explained(address, chosen):
            client.submit_job(
                entrypoint=command,
                submission_id=chosen,
                runtime_env={
                    "working_dir": str(folder),
                    "env_vars": {
                        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
                        "PYTHONUNBUFFERED": "1",
                    },
                },
                metadata={"dualray_run": run.name},
            )
    return job_status(address, chosen)


def follow(address: str, submission_id: str, write: Callable[[str], object]) -> int:
    """Pass the job's log to `write` as it grows, from its beginning; the driver's exit code.

    Raises RunError where Ray could not start the driver, or the connection breaks.
    """
    client = _client(address)

    async def tail() -> None:
        async for text in client.tail_job_logs(submission_id):
            write(text)

    with _explained(address, submission_id), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's use of aiohttp
        client.get_job_info(submission_id)  # An unknown id has an empty log otherwise.
        asyncio.run(tail())
    job = _settled(address, submission_id)
    if job.status == JobStatus.STOPPED:
        return STOPPED_EXIT_CODE
    if job.exit_code is None and job.status == JobStatus.FAILED:
        raise RunError(
            f"job {submission_id} did not start ({_last_line(job.message)})",
            hint="see the dashboard's page of the job",
        )
    return job.exit_code or 0


def job_status(address: str, submission_id: str) -> Job:
    """How the job is. Raises RunError if there is none of this id, or no head."""
    client = _client(address)
    with _explained(address, submission_id):
        details: Any = client.get_job_info(submission_id)
    return Job(
        address=address,
        submission_id=submission_id,
        status=details.status.value,
        message=details.message or "",
        exit_code=details.driver_exit_code,
    )


def job_logs(address: str, submission_id: str) -> str:
    """All the job has written so far. Raises RunError as `job_status` does."""
    client = _client(address)
    with _explained(address, submission_id):
        return client.get_job_logs(submission_id)


def job_stop(address: str, submission_id: str) -> Job:
    """Ask the job to stop, and wait until it has (at most `STOP_WAIT_S` and a little).

    A job that has ended already stays as it is. Raises RunError as `job_status` does.
    """
    client = _client(address)
    with _explained(address, submission_id):
        client.stop_job(submission_id)
    return _settled(address, submission_id, limit_s=STOP_WAIT_S + 30)


def train_command(workspace: str, *, ships_data: bool) -> str:
    """The job's shell command; it begins in the shipped directory."""
    home, rest = ('"$HOME"/', workspace[2:]) if workspace.startswith("~/") else ("", workspace)
    place = home + shlex.quote(rest)
    data = ' --set data.path="$SHIPPED/data"' if ships_data else ""
    return (
        f"SHIPPED=$PWD; mkdir -p {place} && cd {place} && "
        f'exec python -m dualray.platform.cli train "$SHIPPED/run.yaml" --address auto{data}'
    )


@contextmanager
def staged(run: RunFile) -> Iterator[Path]:
    """A temporary folder with what travels: `dualray/`, `run.yaml` and maybe `data/`.

    Raises ConfigError where the shards are here and too large to send.
    """
    with tempfile.TemporaryDirectory(prefix="dualray-submit-") as name:
        folder = Path(name)
        with resources.as_file(resources.files("dualray")) as package:
            shutil.copytree(package, folder / "dualray", ignore=_NOT_CODE)
        text = yaml.safe_dump(to_mapping(run), sort_keys=False)
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        shards = Path(run.data.path)
        if not shards.is_absolute() and shards.is_dir():
            size_bytes = sum(f.stat().st_size for f in shards.rglob("*") if f.is_file())
            if size_bytes > DATA_LIMIT_BYTES:
                raise ConfigError(
                    f"data.path {run.data.path} holds {size_bytes >> 20} MiB, and at most "
                    f"{DATA_LIMIT_BYTES >> 20} MiB travel with a job",
                    hint="copy the folder to storage that every node sees and give its absolute "
                    "path",
                )
            shutil.copytree(shards, folder / "data")
        yield folder


def _client(address: str) -> JobSubmissionClient:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--address is {address} and must be the head's dashboard",
            hint="write http://HOST:8265",
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    unreachable = RunError(
        f"--address is {address} and no Ray dashboard answers there",
        hint="check the host, the port (8265 by default) and that the cluster has its dashboard",
    )
    try:
        # Requests to Ray have no time-out of their own.
        socket.create_connection((parts.hostname, port), _CONNECT_LIMIT_S).close()
        with _explained(address, ""):
            client = JobSubmissionClient(address)
    except (OSError, ConnectionError) as error:
        raise unreachable from error
    for name in _NARRATORS:
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


def _free_id(client: JobSubmissionClient, address: str, name: str, asked: str | None) -> str:
    """The asked id, or the run's name, numbered where earlier runs of that name have ended."""
    with _explained(address, asked or name):
        known: list[Any] = client.list_jobs()
    jobs = {job.submission_id: job for job in known}
    if asked is not None:
        if asked in jobs:
            raise _taken(asked, jobs[asked])
        return asked
    candidate, number = name, 1
    while candidate in jobs:
        if not jobs[candidate].status.is_terminal():
            raise _taken(candidate, jobs[candidate])
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _taken(submission_id: str, job: Any) -> RunError:
    return RunError(
        f"job {submission_id} exists already ({job.status.value})",
        hint="give another --id"
        if job.status.is_terminal()
        else "stop it first with `dualray stop`, or give another --id",
    )


def _settled(address: str, submission_id: str, limit_s: float = 30.0) -> Job:
    """The job once its status is final: it follows the end of the driver by a moment."""
    deadline = time.monotonic() + limit_s
    while not (job := job_status(address, submission_id)).is_final:
        if time.monotonic() > deadline:
            raise RunError(
                f"job {submission_id} is still {job.status} after {limit_s:g} s",
                hint="ask again with `dualray status`",
            )
        time.sleep(_POLL_S)
    return job


@contextmanager
def _explained(address: str, submission_id: str) -> Iterator[None]:
    """Ray's many errors as one of ours."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        if "404" in text and "does not exist" in text:
            raise RunError(
                f"job {submission_id} is unknown to the cluster at {address}",
                hint="the dashboard lists the jobs that it knows",
            ) from error
        if "uthentication" in text:
            raise RunError(
                f"--address is {address} and the cluster there refuses this process's token",
                hint="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's token",
            ) from error
        raise RunError(
            f"the cluster at {address} answered: {_last_line(text)}",
            hint="check that a Ray head's dashboard is there",
        ) from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"
