"""Multi-token prediction against transformers' MtpModel, which drafts with the same modules.

Its own loss cannot be had: with labels its forward adds to None. Its layers are run here one
by one, on the tokens that training feeds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.config_json import config_jsons, examples
from support.models import random_batch, tiny_config, training_context
from support.parity import (
    TheirRouting,
    float64_inside,
    gradients,
    pair,
    same_choices,
    their_gradients,
    worst_gradient,
    worst_logit,
)
from torch import Tensor, nn
from transformers.modeling_layers import MtpModel

from dualray.model.config import ModelConfig
from dualray.model.context import RoutingTape
from dualray.model.hugging_face import is_interleaved, to_hugging_face
from dualray.model.stage import Stage
from dualray.platform.bench.hugging_face import copy_weights

pytestmark = [
    pytest.mark.parity,
    # transformers without shared experts has layers of width 0.
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
]

MTP_LAMBDA = 0.3


def published_name(name: str, config: ModelConfig) -> str | None:
    """MtpModel's name of a tensor as the checkpoint has it; None for what it shares."""
    parts = name.split(".")
    if parts[0] != "layers":
        return None
    rest = [part for part in parts[2:] if part != "mtp_block"]
    if rest[0] == "post_norm":
        rest[0] = "shared_head.norm"
    return ".".join(("model.layers", str(config.num_hidden_layers + int(parts[1])), *rest))


def mtp_pair(
    settings: Mapping[str, Any], seed: int, dtype: torch.dtype
) -> tuple[Stage, Any, MtpModel]:
    """Our model, transformers' and its MTP modules, with the same weights."""
    stage, main = pair(settings, seed, dtype)
    mtp = MtpModel(main, stage.config.num_nextn_predict_layers).to(dtype)
    own = {published_name(name, stage.config): tensor for name, tensor in mtp.state_dict().items()}
    tensors = {name: tensor for name, tensor in own.items() if name is not None}
    copy_weights(stage, tensors, interleaved=is_interleaved(settings))
    return stage, main, mtp.train()


def named_parameters(
    main: Any, mtp: MtpModel, config: ModelConfig
) -> Iterator[tuple[str, nn.Parameter]]:
    """Of both, under the names of the checkpoint, each once."""
    yield from main.named_parameters()
    for name, parameter in mtp.named_parameters():
        published = published_name(name, config)
        if published is not None:
            yield published, parameter


def their_depths(
    main: Any, mtp: MtpModel, ids: Tensor, labels: Tensor, routing: TheirRouting
) -> list[Tensor]:
    """Logits (T, vocab) of the main model and of every depth, fed with the true tokens."""
    blocks = [*main.model.layers, *(layer.mtp_block for layer in mtp.layers)]
    with routing.recording(enumerate(blocks)):
        hidden = main.model(ids, use_cache=False).last_hidden_state
        outputs = [hidden]
        for depth in range(len(mtp.layers)):
            # Its positions are those of the tokens it reads, one further at each depth.
            places = torch.arange(ids.shape[1])[None] + depth + 1
            hidden = mtp.forward_layer(depth, hidden, places, None, input_ids=labels[depth])
            outputs.append(hidden)
    return [main.lm_head(hidden).flatten(0, 1) for hidden in outputs]


@dataclass(frozen=True, kw_only=True)
class Depths:
    """Logits (T, vocab) of the main model and of every depth, the training loss, the choices."""

    logits: list[Tensor]
    loss: Tensor
    choices: dict[int, Tensor]


def our_depths(
    stage: Stage, ids: Tensor, labels: Tensor, replay: dict[int, Tensor] | None = None
) -> Depths:
    """With the recorded routing or our own."""
    tape = RoutingTape(replay or {}, replay=replay is not None)
    ctx = training_context(stage.config, (ids.shape[1],) * len(ids), tape=tape)
    hidden = stage(stage.embed(ids.flatten(), ctx), ctx)
    losses = stage.losses(hidden, labels.flatten(1), ctx)
    loss = losses.main + MTP_LAMBDA * torch.stack(losses.mtp).mean()
    hidden = stage.norm(hidden)
    logits = [stage.head(hidden, ctx)]
    for module, ahead in zip(stage.mtp_modules(), labels):
        hidden = module.predict(stage.embed(ahead.flatten(), ctx), hidden, ctx)
        logits.append(stage.head(hidden, ctx))
    return Depths(logits=logits, loss=loss / ids.numel(), choices=tape.choices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@examples(40)
@given(settings=config_jsons(), depths=st.integers(1, 2), seed=st.integers(0, 2**16))
def test_every_depth(settings: dict[str, Any], depths: int, seed: int, dtype: torch.dtype) -> None:
    settings |= {"num_nextn_predict_layers": depths}
    stage, main, mtp = mtp_pair(settings, seed, dtype)
    ids, labels = random_batch(stage.config, 2, 13, seed)
    exact = dtype == torch.float64
    routing = TheirRouting()
    with float64_inside() if exact else nullcontext():
        theirs = their_depths(main, mtp, ids, labels, routing)
    losses = [F.cross_entropy(out, to.flatten()) for out, to in zip(theirs, labels)]
    their_loss = losses[0] + MTP_LAMBDA / depths * torch.stack(losses[1:]).sum()
    their_loss.backward()
    expected = their_gradients(
        named_parameters(main, mtp, stage.config),
        stage.config,
        interleaved=settings["rope_interleave"],
    )
    agree = same_choices(our_depths(stage, ids, labels).choices, routing, stage.config)
    ours = our_depths(stage, ids, labels, routing.choices)
    ours.loss.backward()
    assert agree or not exact
    assert len(ours.logits) == len(theirs) == depths + 1
    for mine, other in zip(ours.logits, theirs):
        assert worst_logit(mine, other) < (1e-12 if exact else 1e-5)
    assert (ours.loss - their_loss).abs() <= (1e-12 if exact else 1e-6) * their_loss
    wrong = worst_gradient(gradients(stage), expected, stacked=not exact)
    assert wrong < (1e-12 if exact else 1e-5)


def test_its_drafts_are_ours() -> None:
    """MtpModel.forward chooses greedily, and each depth reads what the one before chose."""
    config = tiny_config(num_nextn_predict_layers=2)
    stage, main, mtp = mtp_pair(to_hugging_face(config, torch.float32), 0, torch.float32)
    ids, _ = random_batch(config, 1, 14)
    with torch.no_grad():
        hidden = main.model(ids, use_cache=False).last_hidden_state
        first = main.lm_head(hidden)[:, -1:].argmax(-1)
        known = torch.cat((ids[:, 1:], first), dim=1)
        places = torch.arange(1, 15)[None]
        drafts, logits, _ = mtp(known, hidden, None, places, None)
        ahead = torch.cat((known[:, 1:], drafts[:, :1]), dim=1)
        labels = torch.stack((known, ahead, ahead))
        ours = our_depths(stage, ids, labels)
    for depth in range(2):
        last = ours.logits[depth + 1][-1]
        assert last.argmax() == drafts[0, depth]
        assert worst_logit(last, logits[0, depth]) < 1e-5
