"""From a run file to a living run, and following it: the client side of a controller."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from dualray.actors.cluster import NAMESPACE, Connection, connect
from dualray.actors.placement import reserve
from dualray.checkpoint.reader import Reader, expect
from dualray.checkpoint.store import find
from dualray.data.dataset import TokenDataset
from dualray.data.loader import Loader
from dualray.errors import ConfigError, RunError
from dualray.model.count import count_parameters
from dualray.platform.console import Console, RunSummary
from dualray.platform.controller import ON_HEAD_NODE, Assignment, Controller
from dualray.platform.events import Note, StateChange
from dualray.platform.folder import RunFolder
from dualray.platform.metrics import StepMetrics
from dualray.platform.readable import count
from dualray.platform.run_file import RunFile, parse_run_file, to_mapping
from dualray.platform.states import RunState

_POLL_S = 0.5


def plan_training(run: RunFile, *, resume: bool, console: Console) -> Assignment:
    """Check everything that can be checked without a cluster, and find what to start from.

    Raises DualrayError; nothing has been written then.
    """
    folder = RunFolder.named(run.name)
    if run.serve.after_training:
        run.serve.limits(run.model.max_position_embeddings)
    dataset = TokenDataset.open(run.data.path, verify=False)
    loader = _checked_loader(run, dataset)
    if resume:
        found = find(folder.path)
        _say(found.messages, console)
        reader = _matching(found.path, run, dataset)
        loader.require(reader.meta["loader"])
        return Assignment(
            run=run,
            folder=folder,
            trains=True,
            restore_from=found.path,
            first_step=reader.meta["step"],
            resumes=True,
        )
    folder.refuse_if_used()
    start = None
    if run.train.init_from is not None:
        found = find(Path(run.train.init_from))
        _say(found.messages, console)
        _matching(found.path, run, dataset, same_data=False)
        start = None if found.path is None else found.path.absolute()
    return Assignment(run=run, folder=folder, trains=True, restore_from=start)


def plan_serving(checkpoint: Path, overrides: list[str], *, console: Console) -> Assignment:
    """Find and check a checkpoint, and take the run file that is stored in it.

    The server is called NAME-serve, so that it can live beside the run it came from.
    """
    found = find(checkpoint)
    _say(found.messages, console)
    assert found.path is not None, "find raises when there is none"
    meta = Reader(found.path).meta
    stored = meta["run"] | {"name": f"{meta['run']['name']}-serve"}
    run = parse_run_file(stored, ["serve.after_training=true", *overrides])
    return Assignment(
        run=run,
        folder=RunFolder.named(run.name),
        trains=False,
        restore_from=found.path.absolute(),
        first_step=meta["step"],
    )


def _say(messages: Any, console: Console) -> None:
    for message in messages:
        console.warn(message)


def _matching(
    path: Path | None, run: RunFile, dataset: TokenDataset, *, same_data: bool = True
) -> Reader:
    assert path is not None, "find raises when there is none"
    reader = Reader(path)
    model = to_mapping(run)["model"]
    expect(reader, model, dataset.tokenizer_sha256, dataset.data_sha256 if same_data else None)
    return reader


def _checked_loader(run: RunFile, dataset: TokenDataset) -> Loader:
    if dataset.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {run.model.vocab_size} and the tokenizer of {run.data.path} "
            f"has {dataset.vocab_size} ids",
            hint=f"set model.vocab_size to {dataset.vocab_size} or more",
        )
    loader = Loader(
        dataset,
        seed=run.seed,
        seq_len=run.train.seq_len,
        depths=run.model.num_nextn_predict_layers,
    )
    loader.batch(0, global_sequences(run))
    return loader


def global_sequences(run: RunFile) -> int:
    """Sequences of one optimizer step over all workers."""
    return (
        run.layout.replicas
        * run.layout.experts
        * run.train.micro_batches
        * run.train.micro_batch_size
    )


def summary_of(assignment: Assignment) -> RunSummary:
    """What the console says before the first step."""
    run = assignment.run
    counted = count_parameters(run.model)
    layout = run.layout
    corpus = run.data.path
    if assignment.trains:
        tokens = TokenDataset.open(run.data.path, verify=False).split("train").num_tokens
        corpus = f"{corpus}, {count(tokens)} tokens"
    return RunSummary(
        name=run.name,
        model=f"{count(counted.total)} parameters, {count(counted.active)} active a token, "
        f"{count(counted.mtp)} more for MTP",
        layout=f"{layout.replicas} x {layout.pipeline} pipeline x {layout.experts} expert ranks, "
        f"{layout.schedule}",
        corpus=corpus,
        num_steps=run.train.steps,
        first_step=assignment.first_step + 1,
        folder=str(assignment.folder.path),
    )


def launch(assignment: Assignment, console: Console) -> None:
    """Run an assignment to its end, showing what happens.

    Ctrl-C or SIGTERM stops it after the present step, with a committed checkpoint; a second
    one does not wait. Raises RunError with the reason if the run fails.
    """
    run = assignment.run
    connection = connect(run.cluster, run.layout.world_size)
    controller: Any = None
    try:
        controller = _create(assignment, connection, console)
        console.header(summary_of(assignment))
        controller.run.remote()
        _follow(controller, console)
    finally:
        if controller is not None:
            ray.kill(controller)
        connection.close()


def _create(assignment: Assignment, connection: Connection, console: Console) -> Any:
    run = assignment.run
    _refuse_if_live(run.name)
    group = reserve(
        run.layout.world_size,
        run.cluster,
        console.note,
        embedded=connection.embedded,
        lifetime="detached",
    )
    actor = ray.remote(Controller).options(
        name=f"{run.name}.controller",
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0,
        resources=ON_HEAD_NODE,
        max_concurrency=8,
    )
    controller: Any = actor.remote(assignment, group, connection)
    ray.get(controller.poll.remote(0, 0.0))
    return controller


def _refuse_if_live(name: str) -> None:
    try:
        old: Any = ray.get_actor(f"{name}.controller", namespace=NAMESPACE)
    except ValueError:
        return
    state = ray.get(old.status.remote(), timeout=10)["state"]
    if not RunState(state).is_final:
        raise RunError(
            f"run {name} is {state} on this cluster already",
            hint=f"stop it with `dualray stop {name}`, or give this run another name",
        )
    ray.kill(old)


def _follow(controller: Any, console: Console) -> None:
    seen = 0
    with _interrupts() as interrupts:
        told = 0
        while True:
            if interrupts.count > told:
                told = interrupts.count
                if told > 1:
                    raise RunError("the run was ended without waiting", hint="resume with --resume")
                console.note("stopping after this step; once more to end at once")
                controller.stop.remote()
            events = ray.get(controller.poll.remote(seen, _POLL_S))
            seen += len(events)
            for event in events:
                if isinstance(event, StepMetrics):
                    console.step(event)
                elif isinstance(event, Note):
                    (console.warn if event.warning else console.note)(event.text)
                elif event.state is RunState.FAILED:
                    sentence, _, hint = event.reason.rstrip(".").rpartition("; ")
                    raise RunError(sentence or hint, hint=hint if sentence else "see the log")
                elif isinstance(event, StateChange) and event.state.is_final:
                    return


class _Interrupts:
    count = 0


@contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    """Counts SIGINT and SIGTERM instead of dying of them."""
    received = _Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: Any) -> None:
        received.count += 1

    old = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
