"""How many tokens to draft: as many as make the most tokens a second.

A draft costs a pass through an MTP module in the step that proposes it and a row in the step that
verifies it, and is worth the probability that it and all drafts before it are accepted. Both
sides are measured as requests are served. With few sequences a row costs almost nothing; with
many it costs what any other row does, and drafts become shorter or stop.

Draft k of a sequence is worth g = a_1 a_2 ... a_k tokens, as its acceptances say. With P passes
and m further rows a step of n sequences makes n + sum of gains tokens in base + row (n + m) +
pass P seconds, so that for each P the best rows are those of the largest gains, and where to stop
is found by walking down them.

What is not measured drifts back to what was expected at first, so that drafts which did not pay are
tried again now and then; and so are steps without drafts once their cost has become doubtful.
Pure: the engine's clock and the verifier's verdicts come as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

from dualray.inference.step_costs import StepCosts

EXPECTED = 0.7
"""Acceptance of a draft of which nothing is known."""
_SHARED_RATE, _OWN_RATE = 1 / 64, 1 / 8
"""Share of an estimate that a verdict replaces, of all requests' and of one request's."""
_DRIFT = 1 / 512
"""Share of the way back to EXPECTED that an estimate without verdicts goes in a step."""
_EVERY = 8
"""Steps between two choices while as many sequences run."""
_RELUCTANCE = 0.97
"""What the speed without drafts must beat theirs by before they stop, as its inverse: the modules'
window begins anew afterwards, and measured costs waver."""
_DOUBT = 0.1
"""Relative standard deviation of what the other choice, drafts or none, is thought to cost, from
which on it is made for once to see."""


class Acceptance:
    """Probability that a draft is accepted if those before it are, by its place from 0 on."""

    def __init__(self, start: Sequence[float], rate: float) -> None:
        self.rates = list(start)
        self._rate = rate

    def judge(self, num_drafts: int, num_accepted: int) -> None:
        """Drafts behind the first that was not accepted were not judged."""
        for place in range(min(num_accepted + 1, num_drafts, len(self.rates))):
            verdict = 1.0 if place < num_accepted else 0.0
            self.rates[place] += (verdict - self.rates[place]) * self._rate

    def drift(self, towards: Sequence[float], share: float) -> None:
        for place, target in enumerate(towards):
            self.rates[place] += (target - self.rates[place]) * share

    def gains(self) -> list[float]:
        """Tokens that each further draft is worth."""
        gains, gain = [], 1.0
        for rate in self.rates:
            gain *= rate
            gains.append(gain)
        return gains


class DraftLengths:
    """Lengths for the sequences of an engine, at most `most`."""

    def __init__(self, most: int, costs: StepCosts | None = None) -> None:
        self.most = most
        self.costs = StepCosts() if costs is None else costs
        self._shared = Acceptance([EXPECTED] * most, _SHARED_RATE)
        self._passes = most
        self._least_gain = 0.0
        self._num_sequences = 0
        self._steps_left = 0

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Of all requests' drafts, by place, each given those before it."""
        return tuple(self._shared.rates)

    def new(self) -> Acceptance:
        """A request's own, which begins as all requests' are."""
        return Acceptance(self._shared.rates, _OWN_RATE)

    def judge(self, own: Acceptance, num_drafts: int, num_accepted: int) -> None:
        """So many drafts of a request were verified, and so many of them stand."""
        own.judge(num_drafts, num_accepted)
        self._shared.judge(num_drafts, num_accepted)

    def begin_step(self, sequences: Sequence[Acceptance], lanes: int) -> None:
        """Before `of` is asked for a step's sequences.

        `lanes` pipelines, each of which walks its own modules, run them together.
        """
        self._shared.drift([EXPECTED] * self.most, _DRIFT)
        for own in sequences:
            own.drift(self._shared.rates, _DRIFT)
        self._steps_left -= 1
        if self._steps_left > 0 and len(sequences) == self._num_sequences:
            return
        count = len(sequences)
        self._steps_left, self._num_sequences = _EVERY, count
        plain = _RELUCTANCE if self._passes else 1.0
        self._passes, self._least_gain = best_length(
            [own.gains() for own in sequences], self.costs, lanes, plain=plain
        )
        if self._passes and self.costs.doubt(count, 0) > _DOUBT:
            self._passes, self._steps_left = 0, 1
        elif not self._passes and self.costs.doubt(2 * count, lanes) > _DOUBT:
            self._passes, self._least_gain = 1, 0.0

    def of(self, own: Acceptance) -> int:
        """Drafts of one sequence."""
        gains = own.gains()[: self._passes]
        return sum(gain >= self._least_gain for gain in gains)


def best_length(
    gains: Sequence[Sequence[float]], costs: StepCosts, lanes: int, *, plain: float = 1.0
) -> tuple[int, float]:
    """(passes, least gain that is worth a row) with the most tokens a second.

    `gains[i][k]` of sequence i's draft k fall with k. At the best speed a row is worth its while if
    it alone makes tokens as fast. The speed without drafts counts `plain` times.
    """
    n = len(gains)
    row_seconds = costs.seconds(1, 0) - costs.seconds(0, 0)
    best = plain * n / costs.seconds(n, 0) if n else 0.0
    choice = 0
    for passes in range(1, max(map(len, gains), default=0) + 1):
        rows, tokens = n, float(n)
        for gain in sorted((g for own in gains for g in own[:passes]), reverse=True):
            rows += 1
            tokens += gain
            speed = tokens / costs.seconds(rows, passes * lanes)
            if speed > best:
                best, choice = speed, passes
    return choice, best * row_seconds
