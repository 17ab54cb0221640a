"""What is forgotten is really gone, and comes back to the bit."""

from __future__ import annotations

import pytest
import torch
from support.models import forward_losses, random_batch, tiny_config, training_context, whole_model
from torch.multiprocessing.reductions import StorageWeakRef

from dualray.model.recompute import Recompute


class Watched(Recompute):
    """Remembers what was forgotten by weak references to its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[StorageWeakRef] = []
        self.num_bytes = 0

    def forget(self, make, *tensors):
        for tensor in tensors:
            self.memory.append(StorageWeakRef(tensor.untyped_storage()))
            self.num_bytes += tensor.untyped_storage().nbytes()
        return super().forget(make, *tensors)


def step(config, recompute, dtype):
    stage = whole_model(config, dtype=dtype)
    # Long enough for the attention in strips, which saves views.
    ids, labels = random_batch(config, 2, 120, seed=1)
    ctx = training_context(config, (120, 120), balance_scale=1e-3)
    ctx.recompute = recompute
    losses = forward_losses(stage, ids, labels, ctx)
    loss = losses.main + sum(losses.mtp) + ctx.balance_loss()
    gone = [memory.expired() for memory in getattr(recompute, "memory", [])]
    loss.backward()
    return loss, {name: p.grad for name, p in stage.named_parameters()}, gone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_forgotten_tensors_are_freed_and_gradients_are_the_same_bits(q_lora_rank, dtype) -> None:
    config = tiny_config(q_lora_rank=q_lora_rank, max_position_embeddings=128)
    watched = Watched()
    loss, gradients, gone = step(config, watched, dtype)
    kept_loss, kept_gradients, _ = step(config, None, dtype)
    assert torch.equal(loss, kept_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, kept_gradients[name]), name
    # Per layer two norms, the latent's, expanded keys and values, and compressed queries.
    per_layer = 5 if q_lora_rank is None else 7
    assert len(gone) == 6 * per_layer
    assert all(gone)
    assert watched.num_bytes > 6 * 240 * 24 * dtype.itemsize


def test_an_unknown_tensor_is_saved_as_it_is() -> None:
    recompute = Recompute()
    x = torch.randn(3, requires_grad=True)
    with recompute.scope():
        y = x.exp()
        recompute.forget(lambda: (x.detach() * 2,), doubled := x * 2)
        z = (y * doubled).sum()
    z.backward()
    torch.testing.assert_close(x.grad, 2 * x.exp() * (1 + x), rtol=1e-6, atol=1e-6)
