"""Which owner takes a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dualray.inference.plan import Owner


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An owner that has room for the request."""

    load: int
    """Sequences that it runs."""
    num_reusable: int
    """Tokens of the request that it has in its cache."""


def choose_owner(candidates: Mapping[Owner, Candidate], max_lead: int) -> Owner | None:
    """The owner with most of the request in its cache, among those not too busy.

    Too busy is who runs more than `max_lead` sequences more than the least loaded: otherwise
    everybody would crowd where the common beginning of all prompts was run first. Among equals
    the least loaded, then the first; None without candidates.
    """
    if not candidates:
        return None
    limit = min(c.load for c in candidates.values()) + max_lead
    near = {owner: c for owner, c in candidates.items() if c.load <= limit}
    return max(near, key=lambda owner: (near[owner].num_reusable, -near[owner].load))
