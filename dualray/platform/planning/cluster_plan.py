"""The plan of training one model on one cluster: the fastest layouts, the report's, the run's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dualray.errors import ConfigError
from dualray.model.config import ModelConfig
from dualray.model.formulas import original_context
from dualray.parallel.held import split_layers
from dualray.platform.planning import published
from dualray.platform.planning.estimate import Estimate, estimate
from dualray.platform.planning.fit import outline
from dualray.platform.planning.hardware import Cluster
from dualray.platform.planning.layouts import Ranking, candidates, planned, rank
from dualray.platform.planning.memory import least_bytes
from dualray.platform.planning.precision import FP8, PRECISIONS
from dualray.platform.planning.setting import Candidate, Setting
from dualray.platform.run_file import RunFile

NUM_RANKED = 10
"""So many layouts are reported."""

# Nobody has more GPUs of one kind in one cluster.
_LARGEST_CLUSTER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Named:
    """A layout that was asked for, or why there is none."""

    estimate: Estimate | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Everything `dualray plan --cluster` says."""

    setting: Setting
    ranking: Ranking
    report: Named
    """The layout of DeepSeek-V3's report."""
    run: Named | None
    """The layout of the run file, its layers cut as the trainer cuts them."""

    @property
    def layouts(self) -> tuple[Estimate, ...]:
        """The fastest layouts, and at their places the report's and the run's."""
        named = [each.estimate for each in (self.report, self.run) if each is not None]
        found = (*self.ranking.estimates, *(each for each in named if each is not None))
        distinct = {each.candidate: each for each in found}
        return tuple(sorted(distinct.values(), key=lambda each: -each.tokens_per_s_per_gpu))


def preset_setting(name: str, model: ModelConfig, cluster: Cluster) -> Setting:
    """A preset trained as the report trains: FP8, and its batch in sequences of the model's
    original context."""
    return Setting(
        name=name,
        model=model,
        cluster=cluster,
        precision=FP8,
        seq_len=original_context(model),
        num_sequences=published.NUM_SEQUENCES,
    )


def run_setting(run: RunFile, cluster: Cluster) -> Setting:
    """A run with its batch and precision, on this cluster."""
    if run.train.dtype not in PRECISIONS:
        raise ConfigError(
            f"train.dtype is {run.train.dtype} and plans know the speed of {', '.join(PRECISIONS)}",
            hint="set train.dtype to bfloat16",
        )
    return Setting(
        name=run.name,
        model=run.model,
        cluster=cluster,
        precision=PRECISIONS[run.train.dtype],
        seq_len=run.train.seq_len,
        num_sequences=run.train.global_sequences(run.layout),
    )


def make_cluster_plan(setting: Setting, run: RunFile | None = None) -> ClusterPlan:
    """Ranks the layouts of a setting. Raises ConfigError if there is none that fits."""
    ranking = rank(setting, NUM_RANKED)
    own = None if run is None else _named(setting, _run_candidate(setting, run))
    if not ranking.estimates and (own is None or own.estimate is None):
        raise _nothing_fits(setting, ranking)
    return ClusterPlan(
        setting=setting,
        ranking=ranking,
        report=_named(setting, published.report_candidate(setting)),
        run=own,
    )


def _named(setting: Setting, candidate: Candidate | str) -> Named:
    if isinstance(candidate, str):
        return Named(estimate=None, reason=candidate)
    return Named(estimate=estimate(setting, planned(setting, candidate)), reason=None)


def _run_candidate(setting: Setting, run: RunFile) -> Candidate | str:
    layout, train = run.layout.concrete, run.train
    if layout.world_size > setting.cluster.num_gpus:
        return (
            f"its {layout.world_size} workers are more than the {setting.cluster.num_gpus} GPUs of "
            f"{setting.cluster.spec}"
        )
    stages = outline(layout.schedule, layout.pipeline).num_stages
    candidate = Candidate(
        pipeline=layout.pipeline,
        experts=layout.experts,
        replicas=layout.replicas,
        schedule=layout.schedule,
        micro_batch_size=train.micro_batch_size,
        micro_batches=train.micro_batches,
        layers_per_stage=tuple(
            len(each) for each in split_layers(run.model.num_hidden_layers, stages, layout.layers)
        ),
    )
    fit = planned(setting, candidate)
    if not fit.is_within(setting):
        hardware = setting.cluster.hardware
        return (
            f"it takes {fit.memory.total / 1e9:.1f} GB on its fullest GPU and {hardware.title} has "
            f"{hardware.memory_bytes / 1e9:.1f}"
        )
    return candidate


def _nothing_fits(setting: Setting, ranking: Ranking) -> ConfigError:
    cluster, size = setting.cluster, setting.cluster.hardware.memory_bytes
    if not ranking.num_possible:
        return ConfigError(
            f"no layout of {setting.name} on {cluster.spec} divides a step of "
            f"{setting.num_sequences} sequences, its {setting.model.n_routed_experts} experts and "
            f"{cluster.num_gpus} GPUs",
            hint=f"try --cluster {cluster.hardware.name}x{_power_of_two(cluster.num_gpus)}",
        )
    least = _smallest_bytes(setting)
    enough = _enough(setting)
    return ConfigError(
        f"no layout of {setting.name} fits {cluster.spec}: the smallest takes "
        f"{least / 1e9:.1f} GB on its fullest GPU and {cluster.hardware.title} has "
        f"{size / 1e9:.1f}",
        hint=f"try --cluster {enough}" if enough else "choose GPUs with more memory",
    )


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def _smallest_bytes(setting: Setting) -> float:
    """What the least demanding layout takes on its fullest GPU."""
    smallest = float("inf")
    for candidate in sorted(candidates(setting), key=lambda each: least_bytes(setting, each)):
        if least_bytes(setting, candidate) >= smallest:
            break
        smallest = min(smallest, planned(setting, candidate).memory.total)
    return smallest


def _enough(setting: Setting) -> str | None:
    """The spec of the smallest cluster, in doublings of this one, that some layout fits."""
    num_gpus, size = 2 * setting.cluster.num_gpus, setting.cluster.hardware.memory_bytes
    while num_gpus <= _LARGEST_CLUSTER:
        larger = replace(setting, cluster=replace(setting.cluster, num_gpus=num_gpus))
        if any(
            least_bytes(larger, each) <= size and planned(larger, each).is_within(larger)
            for each in candidates(larger)
        ):
            return larger.cluster.spec
        num_gpus *= 2
    return None
