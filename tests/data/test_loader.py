"""batch(step) is a pure function, independent of how many ranks slice it; nothing is left out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualray.data.dataset import TokenDataset
from dualray.data.loader import IGNORED, DataConfig, Loader
from dualray.errors import ConfigError, DataError
from dualray.model.stage import IGNORED_LABEL


def test_what_the_loader_masks_is_what_the_loss_ignores():
    assert IGNORED == IGNORED_LABEL


def all_tokens(dataset: TokenDataset, split: str) -> np.ndarray:
    return dataset.tokens(split, 0, dataset.split(split).num_tokens).astype(np.int64)


@settings(deadline=None, max_examples=30)
@given(
    seq_len=st.integers(1, 300),
    depths=st.integers(0, 3),
    step=st.integers(0, 10**6),
    data=st.data(),
)
def test_labels_are_what_follows(dataset, seq_len, depths, step, data):
    loader = Loader(dataset, seed=1, seq_len=seq_len, depths=depths)
    num = data.draw(st.integers(1, min(8, loader.num_samples())))
    batch = loader.batch(step, num)
    tokens = loader.sequences(step, 0, num, num)
    assert tokens.ids.shape == (num, seq_len)
    assert tokens.labels.shape == (depths + 1, num, seq_len)
    for array in (tokens.ids, tokens.labels):
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
    whole = all_tokens(dataset, "train")
    for b, sample in enumerate(batch.sample_ids):
        at = sample * seq_len
        assert (tokens.ids[b] == whole[at : at + seq_len]).all()
        for d in range(depths + 1):
            assert (tokens.labels[d, b] == whole[at + 1 + d : at + 1 + d + seq_len]).all()


@settings(deadline=None, max_examples=40)
@given(
    per_rank=st.integers(1, 3),
    ranks=st.sampled_from([1, 2, 3, 4, 6]),
    step=st.integers(0, 5000),
    seed=st.integers(0, 2**63),
)
def test_slices_over_ranks_are_the_step(dataset, per_rank, ranks, step, seed):
    """Any number of ranks, each with a loader of its own, together read the same samples."""
    num = per_rank * ranks

    def loader() -> Loader:
        return Loader(dataset, seed=seed, seq_len=64, depths=1)

    whole = loader().sequences(step, 0, num, num)
    parts = [loader().sequences(step, r * per_rank, per_rank, num) for r in range(ranks)]
    assert (np.concatenate([part.ids for part in parts]) == whole.ids).all()
    assert (np.concatenate([part.labels for part in parts], axis=1) == whole.labels).all()


def test_an_epoch_visits_every_sample_once_and_epochs_differ(dataset):
    loader = Loader(dataset, seed=0, seq_len=50, depths=1)
    n = loader.num_samples()
    assert n == (dataset.split("train").num_tokens - 2) // 50
    num = 7
    ids = np.concatenate([loader.batch(s, num).sample_ids for s in range(-(-3 * n // num))])
    epochs = [ids[e * n : (e + 1) * n] for e in range(3)]
    for epoch in epochs:
        assert (np.sort(epoch) == np.arange(n)).all()
    assert (epochs[0] != epochs[1]).mean() > 0.9
    assert (epochs[1] != epochs[2]).mean() > 0.9
    assert (epochs[0] != np.arange(n)).mean() > 0.9


def test_growing_batches_skip_and_repeat_nothing(dataset):
    loader = Loader(dataset, seed=0, seq_len=50, depths=1)
    straight = loader.samples(0, 60).sample_ids
    ramp = [loader.samples(*part).sample_ids for part in ((0, 4), (4, 8), (12, 16), (28, 32))]
    assert (np.concatenate(ramp) == straight).all()
    assert (loader.batch(3, 10).sample_ids == straight[30:40]).all()


def test_seed_and_data_decide_the_order(dataset):
    def order(seed: int, seq_len: int = 50) -> list[int]:
        loader = Loader(dataset, seed=seed, seq_len=seq_len, depths=0)
        return loader.batch(0, 50).sample_ids.tolist()

    assert order(0) == order(0)
    assert order(0) != order(1)


@settings(deadline=None, max_examples=30)
@given(seq_len=st.integers(1, 2000), depths=st.integers(0, 3), num=st.integers(1, 5))
def test_heldout_covers_every_token_but_the_first(dataset, seq_len, depths, num):
    loader = Loader(dataset, seed=0, seq_len=seq_len, depths=depths)
    whole = all_tokens(dataset, "heldout")
    steps = range(loader.num_batches(num, "heldout"))
    batches = [loader.sequences(step, 0, num, num, "heldout") for step in steps]
    labels = np.concatenate([b.labels for b in batches], axis=1).reshape(depths + 1, -1)
    ids = np.concatenate([b.ids for b in batches]).ravel()
    for d in range(depths + 1):
        assert (labels[d][labels[d] != IGNORED] == whole[1 + d :]).all()
        assert (labels[d][len(whole) - 1 - d :] == IGNORED).all()
    assert (ids[: len(whole) - 1] == whole[:-1]).all()
    # Padding must be a token that the model can embed.
    assert ids.min() >= 0
    assert (ids[len(whole) :] == dataset.eos_id).all()


def test_heldout_is_fixed_and_ends(dataset):
    loaders = [Loader(dataset, seed=seed, seq_len=100, depths=1) for seed in (0, 1)]
    n = loaders[0].num_samples("heldout")
    assert loaders[0].batch(1, 3, "heldout").sample_ids.tolist() == [3, 4, 5]
    assert loaders[1].batch(0, n + 2, "heldout").sample_ids.tolist() == [*range(n), -1, -1]
    with pytest.raises(DataError) as caught:
        loaders[0].batch(n, 1, "heldout")
    assert str(caught.value) == (
        f"the heldout split has {n} sequences of 100 tokens and number {n} was asked for; ask for "
        f"at most {n} batches of 1."
    )


def test_too_little_text(dataset):
    num_tokens = dataset.split("train").num_tokens
    loader = Loader(dataset, seed=0, seq_len=num_tokens // 3, depths=0)
    with pytest.raises(DataError) as caught:
        loader.batch(0, 4)
    assert str(caught.value) == (
        f"the train split has 3 sequences of {num_tokens // 3} tokens and one step needs 4; give "
        "more text, or lower train.seq_len, train.micro_batches or train.micro_batch_size."
    )
    assert Loader(dataset, seed=0, seq_len=num_tokens - 1, depths=0).num_samples() == 1
    assert Loader(dataset, seed=0, seq_len=num_tokens - 1, depths=1).num_samples() == 0
    with pytest.raises(DataError, match="has 0 sequences of"):
        Loader(dataset, seed=0, seq_len=num_tokens, depths=0).batch(0, 1)


def test_fingerprint_is_small_and_names_the_first_difference(dataset):
    loader = Loader(dataset, seed=3, seq_len=64, depths=1)
    saved = json.loads(json.dumps(loader.fingerprint()))
    assert len(json.dumps(saved)) < 1024
    loader.require(saved)
    Loader(dataset, seed=3, seq_len=64, depths=1).require(saved)
    with pytest.raises(DataError) as caught:
        Loader(dataset, seed=3, seq_len=128, depths=2).require(saved)
    assert str(caught.value) == (
        "seq_len is 128 and the checkpoint was trained with 64; resume with the same data, seed, "
        "sequence length and phases before, or start a new run with train.init_from."
    )
    with pytest.raises(DataError, match=r"^data_sha256 is \w{12} and the checkpoint was trained"):
        loader.require(saved | {"data_sha256": "0" * 64})


def test_a_phase_goes_on_in_the_corpus(dataset):
    whole = Loader(dataset, seed=3, seq_len=16, depths=1)
    later = Loader(dataset, seed=3, seq_len=16, depths=1, first_step=5, first_sample=7)
    assert (later.batch(5, 4).sample_ids == whole.samples(7, 4).sample_ids).all()
    assert (later.batch(6, 4).sample_ids == whole.samples(11, 4).sample_ids).all()
    assert (later.batch(1, 4, "heldout").sample_ids == [4, 5, 6, 7]).all()
    with pytest.raises(DataError, match="first_step is 5 and the checkpoint was trained with 0;"):
        later.require(whole.fingerprint())
    old = {k: v for k, v in whole.fingerprint().items() if not k.startswith("first_")}
    whole.require(old)


def test_bad_arguments(dataset):
    for seq_len, depths in ((0, 1), (8, -1)):
        with pytest.raises(ConfigError, match="they must be at least 1 and 0; set "):
            Loader(dataset, seed=0, seq_len=seq_len, depths=depths)
    with pytest.raises(ConfigError) as caught:
        DataConfig(path="")
    assert str(caught.value) == (
        "data.path is empty and must name a folder of token shards; build one with `dualray data "
        "build`."
    )
    loader = Loader(dataset, seed=0, seq_len=8, depths=0)
    with pytest.raises(ValueError, match=r"\[2, 5\) is not within 4"):
        loader.sequences(0, 2, 3, 4)
