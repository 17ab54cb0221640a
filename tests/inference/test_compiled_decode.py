"""The compiled decode step against the eager one. Inductor takes a minute, so the traced graph
is run without it here; `dualray bench model` compares what it compiles."""

import pytest
import torch
from support.drafting import Request, make_runner, run
from support.models import attention_changes, tiny_config, whole_model

from dualray.inference import compiled_decode
from dualray.inference.plan import SampleSpec, SequencePlan
from dualray.inference.serve_config import MAX_COMPILED
from dualray.inference.stage_runner import StageRunner
from dualray.model.moe import LocalDispatch
from dualray.model.stage import Stage

BLOCK = 4


def plan(name, ids, first, table) -> SequencePlan:
    spec = SampleSpec(position=first + len(ids), seed=0, temperature=0.0, top_p=1.0, top_k=0,
                      min_p=0.0, logprobs=3)  # fmt: skip
    return SequencePlan(
        request_id=name, ids=ids, first_position=first, block_table=table, samples=(spec,)
    )


def served(stage, compile_batch):
    """A prompt step, then decode steps in batches of 1 and 2 whose contexts grow by a block."""
    dispatch = LocalDispatch(stage.config.n_routed_experts)
    runner = StageRunner(
        stage, dispatch, num_blocks=9, block_size=BLOCK, compile_batch=compile_batch
    )
    tables = {"a": (8, 0, 5), "b": (3, 7, 1), "c": (2, 6, 4)}
    lengths = {"a": 3, "b": 7, "c": 1}
    out = runner.run([plan(n, tuple(range(k)), 0, tables[n]) for n, k in lengths.items()], None)
    results, last = [out.sampled], {s.request_id: s.token_id for s in out.sampled}
    for names in ("a", "cb", "cb", "ac", "cb", "a"):
        batch = [plan(n, (last[n],), lengths[n], tables[n]) for n in names]
        sampled = runner.run(batch, None).sampled
        for one in sampled:
            last[one.request_id] = one.token_id
            lengths[one.request_id] += 1
        results.append(sampled)
    return results


@pytest.fixture
def traced_only(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(
        compiled_decode.torch, "compile", lambda f, **k: compiled(f, backend="eager", **k)
    )
    torch.compiler.reset()


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("kind", ["mla", "gqa"])
def test_traced_decode_steps_choose_what_eager_ones_choose(kind):
    config = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=0, **attention_changes(kind))
    stage = whole_model(config)
    eager = served(stage, 0)
    for expected, got in zip(eager, served(stage, 2)):
        for one, other in zip(expected, got, strict=True):
            assert (one.request_id, one.token_id) == (other.request_id, other.token_id)
            # Log-probabilities of order one; sums in another order.
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            for (i, a), (j, b) in zip(one.top, other.top):
                assert i == j
                assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.usefixtures("traced_only")
def test_drafts_are_verified_in_compiled_steps(monkeypatch):
    """The rows of a sequence as sequences of one row: they see each other in the cache."""
    stage = whole_model(tiny_config(num_hidden_layers=2, num_nextn_predict_layers=1))
    length = 18
    plain = Request("plain", range(20))
    run(make_runner(stage), [plain], length)

    def right(ids):
        return plain.ids[len(ids) : len(ids) + 1]

    def wrong(ids):
        return [token + 1 for token in right(ids)]

    compiled_rows: list[int] = []
    run_compiled = compiled_decode.CompiledDecode.run

    def counting(self, sequences, hidden_TD):
        compiled_rows.append(len(sequences))
        return run_compiled(self, sequences, hidden_TD)

    monkeypatch.setattr(compiled_decode.CompiledDecode, "run", counting)
    asked = {"num_drafts": lambda position: 1}
    proposed = []
    for compile_batch in (0, 4):
        requests = [
            Request("right", range(20), propose=right, **asked),
            Request("wrong", range(20, 40), propose=wrong, **asked),
        ]
        runner = make_runner(stage, compile_batch=compile_batch)
        compiled_rows.clear()
        run(runner, requests, length)
        assert [request.ids[:length] for request in requests] == [plain.ids[:length]] * 2
        assert requests[0].steps < requests[1].steps == plain.steps
        proposed.append([request.proposed for request in requests])
    assert proposed[0] == proposed[1]
    # A token and a draft of both; then one of them goes on alone.
    assert {4, 2} <= set(compiled_rows)


@pytest.mark.usefixtures("traced_only")
def test_more_steps_than_torch_compile_keeps_of_one_function():
    """Under DualPipe a worker holds two stages, and a size is compiled for each of them."""
    config = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    sizes = MAX_COMPILED.bit_length()  # 1, 2, 4 ... 16
    assert 2 * sizes > torch._dynamo.config.recompile_limit, "a single code object would do"
    dispatch = LocalDispatch(config.n_routed_experts)
    for layers in (range(1), range(1, 2)):
        stage = Stage(config, layers)
        StageRunner(stage, dispatch, num_blocks=1, block_size=BLOCK, compile_batch=MAX_COMPILED)


def test_only_steps_of_single_tokens_are_compiled(monkeypatch):
    monkeypatch.setattr(compiled_decode.torch, "compile", lambda f, **k: f)
    config = tiny_config(num_nextn_predict_layers=0)
    runner = StageRunner(
        whole_model(config), LocalDispatch(8), num_blocks=4, block_size=BLOCK, compile_batch=2
    )
    compiled = runner._compiled
    assert compiled is not None
    one, two = plan("a", (1,), 0, (0,)), plan("b", (1, 2), 0, (1,))
    assert compiled.takes([one])
    assert compiled.takes([one, one])
    assert not compiled.takes([one, one, one])
    assert not compiled.takes([one, two])
    assert not compiled.takes([])
