"""`dualray k8s`: a run as Kubernetes objects for KubeRay."""

from __future__ import annotations

import enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dualray.k8s.deployment import Deployment
    from dualray.platform.run_file import RunFile

app = typer.Typer(
    no_args_is_help=True, help="Run on Kubernetes through KubeRay.", add_completion=False
)


class KindOption(enum.StrEnum):
    RAYJOB = "rayjob"
    RAYCLUSTER = "raycluster"


@app.callback()
def group() -> None:
    """Keeps `render` a subcommand while it is the only one."""


@app.command(name="render")
def render_command(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")],
    kind: Annotated[
        KindOption,
        typer.Option(help="rayjob trains at once; raycluster waits for `dualray submit`."),
    ] = KindOption.RAYJOB,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the run file.")
    ] = None,
) -> None:
    """Print the objects, for `kubectl apply -f -`. Needs the KubeRay operator, 1.7 or later."""
    from dualray.k8s.render import render, to_yaml
    from dualray.platform.run_file import load_run_file

    run = load_run_file(run_file, set_ or ())
    deployment = deployment_of(run)
    typer.echo(_note(run, kind), nl=False)
    typer.echo(to_yaml(render(deployment, kind.value)), nl=False)


def deployment_of(run: RunFile) -> Deployment:
    """The run as its pods see it: any interface, and the Ray that they are part of."""
    import yaml

    from dualray.k8s.deployment import Deployment
    from dualray.platform.run_file import to_mapping

    values = to_mapping(run)
    values["serve"]["host"] = "0.0.0.0"
    values["cluster"]["address"] = None
    return Deployment(
        name=run.name,
        run_yaml=yaml.safe_dump(values, sort_keys=False),
        num_workers=run.layout.world_size,
        cpus_per_worker=run.cluster.cpus_per_worker,
        gpus_per_worker=run.cluster.gpus_per_worker,
        grpc_port=run.serve.port if run.serve.after_training else None,
        engine_metrics_port=run.serve.metrics_port if run.serve.after_training else None,
        engine_metrics_tls=run.serve.tls_cert is not None,
        drain_s=run.serve.drain_s,
        kubernetes=run.kubernetes,
        ray_version=version("ray"),
    )


def _note(run: RunFile, kind: KindOption) -> str:
    """What a person still has to see to, as comments."""
    lines = [f"The image {run.kubernetes.image} needs Ray {version('ray')} and dualray."]
    if run.kubernetes.claim is None:
        lines.append("The claim, with all checkpoints, ends when these objects are deleted;")
        lines.append("name one of your own in kubernetes.claim to keep them.")
    if kind is KindOption.RAYJOB and not Path(run.data.path).is_absolute():
        lines.append(f"The shards belong into the claim, under {run.data.path}.")
    if kind is KindOption.RAYCLUSTER:
        lines.append("Then: dualray submit RUN.yaml --address http://HEAD:8265")
        lines.append("      --workspace /workspace --set serve.host=0.0.0.0")
    return "".join(f"# {line}\n" for line in lines)
