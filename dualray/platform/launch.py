"""From a run file to a living run, and following it: the client side of a controller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.placement_group import remove_placement_group

from dualray.actors.cluster import NAMESPACE, Connection, connect
from dualray.actors.placement import reserve
from dualray.actors.stage_worker import phase_loader
from dualray.checkpoint.reader import Reader, expect
from dualray.checkpoint.store import find
from dualray.data.dataset import TokenDataset
from dualray.errors import CheckpointError, ConfigError, DataError, RunError
from dualray.model.config import ModelConfig
from dualray.model.count import count_parameters
from dualray.parallel.phases import Phase, phase_behind
from dualray.platform.assignment import Assignment
from dualray.platform.console import Console, RunSummary
from dualray.platform.controller import Controller
from dualray.platform.folder import RunFolder
from dualray.platform.following import Following, interrupts, named_actor
from dualray.platform.live import LOST, look
from dualray.platform.readable import count
from dualray.platform.run_file import RunFile, parse_run_file
from dualray.platform.scheduler import SchedulerConfig
from dualray.platform.serving import ON_HEAD_NODE
from dualray.platform.states import RunState

_ANSWER_WITHIN_S = 30.0
_POSITIONS = ("rope_scaling", "max_position_embeddings")


def plan_training(run: RunFile, *, resume: bool, console: Console) -> Assignment:
    """Check everything that can be checked without a cluster, and find what to start from.

    Raises DualrayError; nothing has been written then.
    """
    folder = RunFolder.named(run.name)
    phases = run.phases()
    if run.serve.after_training:
        model = phases[-1].model
        run.serve.limits(model.max_position_embeddings, model.num_nextn_predict_layers)
    dataset = TokenDataset.open(run.data.path, verify=False)
    _refuse_little_data(run, dataset)
    if resume:
        found = find(folder.path)
        _say(found.messages, console)
        reader = _reader(found.path)
        phase = phase_behind(phases, reader.meta["step"])
        expect(reader, asdict(phase.model), dataset.tokenizer_sha256, dataset.data_sha256)
        phase_loader(dataset, phase, seed=run.seed).require(reader.meta["loader"])
        _refuse_other_steps(reader, run, phase)
        return Assignment(
            run=run,
            folder=folder,
            trains=True,
            restore_from=found.path,
            first_step=reader.meta["step"],
            resumes=True,
            remembered=reader.meta.get("arrangement"),
            placement=reader.meta.get("experts"),
        )
    folder.refuse_if_used()
    start = None
    if run.train.init_from is not None:
        found = find(Path(run.train.init_from))
        _say(found.messages, console)
        reader = _reader(found.path)
        _expect_but_for_positions(reader, run.model, dataset.tokenizer_sha256, console)
        start = reader.folder.absolute()
    return Assignment(run=run, folder=folder, trains=True, restore_from=start)


def plan_serving(checkpoint: Path, overrides: list[str], *, console: Console) -> Assignment:
    """Find and check a checkpoint, and take the run file that is stored in it.

    The server is called NAME-serve, so that it can live beside the run it came from.
    """
    found = find(checkpoint)
    _say(found.messages, console)
    assert found.path is not None, "find raises when there is none"
    meta = Reader(found.path).meta
    if meta["tokenizer_sha256"] is None:
        raise CheckpointError(
            f"checkpoint {found.path} was imported without a tokenizer.json, so no text can be "
            "served from it",
            hint="put tokenizer.json beside the Hugging Face files and import them again",
        )
    stored = meta["run"] | {"name": f"{meta['run']['name']}-serve"}
    run = parse_run_file(stored, ["serve.after_training=true", *overrides])
    phase = phase_behind(run.phases(), meta["step"])
    run = replace(
        run,
        model=phase.model,
        train=phase.train,
        extend=None,
        layout=run.layout.concrete,
        scheduler=SchedulerConfig(),
    )
    return Assignment(
        run=run,
        folder=RunFolder.named(run.name),
        trains=False,
        restore_from=found.path.absolute(),
        first_step=meta["step"],
        placement=meta.get("experts"),
    )


def _say(messages: Any, console: Console) -> None:
    for message in messages:
        console.warn(message)


def _reader(path: Path | None) -> Reader:
    assert path is not None, "find raises when there is none"
    return Reader(path)


def _expect_but_for_positions(
    reader: Reader, model: ModelConfig, tokenizer_sha256: str, console: Console
) -> None:
    """As `expect`, but says no more than a word about another context: weights do not depend on
    it."""
    values, theirs = asdict(model), reader.meta["model"]
    other = {
        field: theirs[field]
        for field in _POSITIONS
        if field in theirs and theirs[field] != values[field]
    }
    expect(reader, values | other, tokenizer_sha256)
    for field, value in other.items():
        console.note(
            f"model.{field} is {values[field]} here and {value} in {reader.folder}, "
            "whose weights go on with the one here"
        )


def _refuse_other_steps(reader: Reader, run: RunFile, phase: Phase) -> None:
    """A resumed run's steps must go on where the old ones ended, with the same arithmetic."""
    steps, train = reader.meta["global_sequences"], phase.train
    if steps != train.global_sequences(run.layout):
        raise ConfigError(
            f"a step has {train.global_sequences(run.layout)} sequences (layout.replicas x "
            f"layout.experts x train.micro_batches x train.micro_batch_size) and the checkpoint's "
            f"steps have {steps}, so samples would be repeated or skipped",
            hint="keep the product, or start a new run with train.init_from",
        )
    dtype = reader.meta["run"]["train"]["dtype"]
    if dtype != train.dtype:
        raise ConfigError(
            f"train.dtype is {train.dtype} and the checkpoint was trained in {dtype}",
            hint=f"set train.dtype to {dtype}, or start a new run with train.init_from",
        )


def _refuse_little_data(run: RunFile, dataset: TokenDataset) -> None:
    if dataset.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {run.model.vocab_size} and the tokenizer of {run.data.path} "
            f"has {dataset.vocab_size} ids",
            hint=f"set model.vocab_size to {dataset.vocab_size} or more",
        )
    for phase in run.phases():
        loader = phase_loader(dataset, phase, seed=run.seed)
        try:
            loader.batch(phase.first_step, phase.train.global_sequences(run.layout))
        except DataError as error:
            raise DataError(
                error.sentence, hint=error.hint.replace("train.", f"{phase.section}.")
            ) from None


def summary_of(assignment: Assignment) -> RunSummary:
    """What the console says before the first step."""
    run = assignment.run
    counted = count_parameters(run.model)
    phases = run.phases()
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
        + (f"auto, beginning as {layout.concrete.schedule}" if layout.is_open else layout.schedule),
        corpus=corpus,
        num_steps=phases[-1].end_step if assignment.trains else 0,
        phases=_in_words(phases) if assignment.trains and run.extend is not None else "",
        first_step=assignment.first_step + 1,
        folder=str(assignment.folder.path),
    )


def _in_words(phases: Sequence[Phase]) -> str:
    stretches = (f"{phase.train.steps} at {phase.train.seq_len} tokens" for phase in phases)
    context = phases[-1].model.max_position_embeddings
    return f"{', then '.join(stretches)} (YaRN up to {context})"


def launch(assignment: Assignment, console: Console) -> None:
    """Run an assignment to its end, showing what happens.

    Ctrl-C or SIGTERM stops it after the present step, with a committed checkpoint; a second
    one does not wait. Raises RunError with the reason if the run fails.
    """
    run = assignment.run
    with interrupts() as received:
        try:
            _refuse_if_alive(assignment.folder)
            connection = connect(run.cluster, run.layout.world_size)
            try:
                following = _create(assignment, connection, console)
            except BaseException:
                connection.close()
                raise
        except KeyboardInterrupt:
            console.note("stopped before the run had started")
            return
        received.listen(count=True)
        try:
            console.header(summary_of(assignment))
            following.controller.run.remote()
            following.follow(console, received)
        finally:
            following.end()


def _refuse_if_alive(folder: RunFolder) -> None:
    """Two controllers must not write into one folder, whichever Ray they live in."""
    if not folder.run_json.is_file():
        return
    state = look(folder)["state"]
    if state != LOST and not RunState(state).is_final:
        raise _taken(folder.path.name, f"{state} already")


def _taken(name: str, state: str) -> RunError:
    return RunError(
        f"run {name} is {state}",
        hint=f"stop it with `dualray stop {name}`, or give this run another name",
    )


def _create(assignment: Assignment, connection: Connection, console: Console) -> Following:
    """Reserve places and start the controller; leaves neither behind if that fails."""
    run = assignment.run
    _refuse_name(run.name)
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
    try:
        controller: Any = actor.remote(assignment, group, connection)
    except BaseException:
        remove_placement_group(group)
        raise
    return Following(assignment.folder, connection, controller, group)


def _refuse_name(name: str) -> None:
    """Raises RunError if the cluster has a run of that name; one that has ended is cleared away."""
    old = named_actor(f"{name}.controller")
    if old is None:
        return
    try:
        state = ray.get(old.status.remote(), timeout=_ANSWER_WITHIN_S)["state"]
    except RayActorError:
        return
    except GetTimeoutError:
        raise _taken(name, "on this cluster already, and busy") from None
    if not RunState(state).is_final:
        raise _taken(name, f"{state} on this cluster already")
    ray.kill(old)
