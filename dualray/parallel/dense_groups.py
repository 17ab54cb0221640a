"""The parameters that a worker shares with all copies of its stages, by who shares them."""

from __future__ import annotations

from dualray.parallel.groups import Groups
from dualray.parallel.held import EMBEDDING, HeldStages
from dualray.parallel.optimizer import ParamGroup
from dualray.parallel.weight_grads import attach_main_grads


def dense_groups_of(held: HeldStages, groups: Groups) -> list[ParamGroup]:
    """The worker's parameters but routed experts by who shares them, with `main_grad` attached.

    An embedding that the last stage copies has its own group over both ends of the
    pipeline, which sums the gradients of the two uses.
    """
    dense = held.dense_parameters()
    embedding = {}
    if held.embedding_copy is not None:
        embedding[EMBEDDING] = held.embedding_copy.weight
    elif EMBEDDING in dense and held.embedding_is_copied:
        embedding[EMBEDDING] = dense.pop(EMBEDDING)
    result = []
    for params, group, ranks in (
        (dense, groups.dense, groups.dense_ranks),
        (embedding, groups.embedding, groups.embedding_ranks),
    ):
        if params:
            attach_main_grads(params.values())
            result.append(
                ParamGroup(
                    params=list(params.items()),
                    process_group=group if len(ranks) > 1 else None,
                    group_ranks=ranks,
                )
            )
    return result
