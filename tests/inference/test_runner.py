"""Serving against the training forward: same weights, same tokens, same numbers."""

import pytest
import torch
from support.models import tiny_config, training_context, whole_model
from support.stages import Mailbox, split_stages

from dualray.inference.latent_cache import LatentCache, PagedAttention, PagedBatch
from dualray.inference.plan import Owner, SampleSpec, SequencePlan, StepPlan
from dualray.inference.stage_runner import StageRunner
from dualray.inference.step_runner import StepRunner
from dualray.model.attention import CausalAttention, HeadsQuery, LatentQuery
from dualray.model.context import ForwardContext, RoutingTape
from dualray.model.linear import Linear
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage

BLOCK = 4
# The absorbed sums run over the latent instead of the expanded keys: rounding only.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def sequence(name, ids, first, table, sample=True) -> SequencePlan:
    spec = SampleSpec(
        position=first + len(ids),
        seed=0,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
        logprobs=None,
    )
    return SequencePlan(
        request_id=name,
        ids=tuple(ids),
        first_position=first,
        block_table=tuple(table),
        samples=(spec,) if sample else (),
    )


def make_runner(stage: Stage, num_blocks=16) -> StageRunner:
    dispatch = LocalDispatch(stage.config.n_routed_experts)
    return StageRunner(stage, dispatch, num_blocks=num_blocks, block_size=BLOCK)


def latent_queries(T, dtype):
    H, nope, rope, v, C = 3, 10, 6, 12, 8
    kv_b = Linear(C, H * (nope + v)).to(dtype)
    torch.nn.init.normal_(kv_b.weight)
    q = torch.randn(T, H, nope + rope, dtype=dtype)
    latent, k_rope = torch.randn(T, C, dtype=dtype), torch.randn(T, rope, dtype=dtype)

    def query(select=slice(None)):
        return LatentQuery(
            layer=3,
            q_THd=q[select],
            latent_TC=latent[select],
            k_rope_TR=k_rope[select],
            kv_b=kv_b,
            softmax_scale=0.2,
        )

    return query, C + rope


def grouped_queries(T, dtype):
    H, G, d, v = 6, 2, 10, 7
    q = torch.randn(T, H, d, dtype=dtype)
    k, value = torch.randn(T, G, d, dtype=dtype), torch.randn(T, G, v, dtype=dtype)

    def query(select=slice(None)):
        return HeadsQuery(
            layer=3, q_THd=q[select], k_TGd=k[select], v_TGV=value[select], softmax_scale=0.2
        )

    return query, G * (d + v)


@pytest.mark.parametrize("make_queries", [latent_queries, grouped_queries])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("together", [False, True, None])
@pytest.mark.parametrize("before", [float("nan"), 1e4])
def test_paged_attention_equals_expanded_attention(make_queries, dtype, together, before):
    """Three sequences of odd lengths, run as prompt, prompt part plus rest, and token by token."""
    torch.manual_seed(0)
    lengths = (7, 9, 5)
    query, row_dim = make_queries(sum(lengths), dtype)
    ctx = ForwardContext(
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        seq_lens=lengths,
        attention=CausalAttention(),
        dispatch=LocalDispatch(1),
    )
    with torch.no_grad():
        expected = CausalAttention().attend(query(), ctx)
        cache = LatentCache(
            [3],
            num_blocks=9,
            block_size=BLOCK,
            row_dim=row_dim,
            dtype=dtype,
            device=torch.device("cpu"),
        )
        cache.layers[3].fill_(before)  # what a reused block may hold
        tables = ((8, 0), (3, 7, 1), (2, 5))
        starts = (0, 7, 16)
        done = [0, 0, 0]
        got = torch.empty_like(expected)
        for counts in ((7, 4, 1), (0, 4, 1), (0, 1, 1), (0, 0, 1), (0, 0, 1)):
            sequences, picks = [], []
            for i, count in enumerate(counts):
                if count:
                    first = done[i]
                    sequences.append(sequence(str(i), [0] * count, first, tables[i]))
                    picks += range(starts[i] + first, starts[i] + first + count)
                    done[i] += count
            batch = PagedBatch.build(sequences, BLOCK, torch.device("cpu"), together=together)
            got[picks] = PagedAttention(cache, batch).attend(query(picks), ctx)
    assert tuple(done) == lengths
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def training_logprobs(stage, ids, tape=None):
    """Log-probability of each next token under the training forward: (len(ids) - 1,)."""
    ctx = training_context(stage.config, (len(ids),), tape=tape)
    with torch.no_grad():
        ids_T = torch.tensor(ids)
        logits = stage.logits(stage(stage.embed(ids_T, ctx), ctx), ctx)
        return torch.log_softmax(logits, -1)[:-1].gather(1, ids_T[1:, None]).squeeze(1)


def test_replayed_expert_choices_are_used():
    stage = whole_model(tiny_config())
    ids = (5, 17, 3, 60, 8)
    tape = RoutingTape()
    training_logprobs(stage, ids, tape)
    other = {layer: (choice + 1) % 8 for layer, choice in tape.choices.items()}
    free, same, forced = (
        make_runner(stage).run([sequence("a", ids, 0, (0, 1))], None, t).sampled[0].logprob
        for t in (None, RoutingTape(tape.choices, replay=True), RoutingTape(other, replay=True))
    )
    assert free == same
    assert forced != free


def test_two_stages_give_what_one_gives():
    config = tiny_config(num_nextn_predict_layers=0)
    prompt = sequence("a", (5, 17, 3, 60, 8), 0, (1, 4))
    plan = StepPlan(step=1, owners={Owner(0, 0, 0): (prompt,)})
    (expected,) = StepRunner(replica=0, expert=0, stages={0: make_runner(whole_model(config))}).run(
        plan
    )
    first, last = split_stages(config, 2)
    mail = Mailbox()
    one = StepRunner(replica=0, expert=0, stages={0: make_runner(first)}, transport=mail)
    two = StepRunner(replica=0, expert=0, stages={0: make_runner(last)}, transport=mail)
    assert one.run(plan) == []
    assert two.run(plan) == [expected]


def test_a_worker_runs_its_early_stage_first_so_that_mirrors_do_not_wait_for_each_other():
    config = tiny_config(num_nextn_predict_layers=0)
    order = []

    class Watched(StageRunner):
        def run(self, *args, **kwargs):
            order.append(self.stage.layer_range.start)
            return super().run(*args, **kwargs)

    def held():
        first, last = split_stages(config, 2)
        dispatch = LocalDispatch(config.n_routed_experts)
        return [Watched(s, dispatch, num_blocks=4, block_size=BLOCK) for s in (first, last)]

    mail = Mailbox()
    (a0, a1), (b0, b1) = held(), held()
    mirror = StepRunner(replica=0, expert=0, stages={1: b0, 0: b1}, transport=mail)
    plan = StepPlan(
        step=1,
        owners={Owner(0, 0, d): (sequence(f"r{d}", (5, 6, 7), 0, (0,)),) for d in (0, 1)},
    )
    mail.boxes[1] = torch.zeros(3, config.hidden_size)  # as if the mirror had sent already
    worker = StepRunner(replica=0, expert=0, stages={1: a1, 0: a0}, transport=mail)
    assert [s.request_id for s in worker.run(plan)] == ["r1"]
    assert [s.request_id for s in mirror.run(plan)] == ["r0"]
    assert order == [0, 2, 0, 2]


def test_a_worker_without_sequences_runs_on_zero_tokens():
    """Its expert ranks' exchange needs it; nothing is sent or received, nothing is sampled."""
    config = tiny_config(num_nextn_predict_layers=0)
    dispatched = []

    class Counting(LocalDispatch):
        def dispatch(self, layer, x_TD, routing):
            dispatched.append((layer, x_TD.shape[0]))
            return super().dispatch(layer, x_TD, routing)

    plan = StepPlan(step=1, owners={Owner(0, 0, 0): (sequence("a", (1, 2), 0, (0,)),)})
    for stage in split_stages(config, 2):
        runner = StageRunner(stage, Counting(8), num_blocks=4, block_size=BLOCK)
        idle = StepRunner(replica=0, expert=1, stages={0: runner})
        assert idle.run(plan) == []
    assert dispatched == [(1, 0), (2, 0), (3, 0)]


def test_a_replica_without_work_does_nothing():
    plan = StepPlan(step=1, owners={Owner(1, 0, 0): (sequence("a", (1, 2), 0, (0,)),)})
    runner = make_runner(whole_model(tiny_config()))
    assert StepRunner(replica=0, expert=0, stages={0: runner}).run(plan) == []
