"""The sentences a person reads when a schedule cannot exist."""

import pytest

from dualray.errors import ConfigError
from dualray.schedule.make import make_schedule
from dualray.schedule.verify import verify


@pytest.mark.parametrize(
    ("kind", "ranks", "chunks", "sentence"),
    [
        (
            "dualpip",
            2,
            8,
            "layout.schedule is dualpip and must be one of gpipe, 1f1b, zb1p, dualpipev, dualpipe; "
            "did you mean dualpipe? set layout.schedule to dualpipe.",
        ),
        (
            "chimera",
            2,
            8,
            "layout.schedule is chimera and must be one of gpipe, 1f1b, zb1p, dualpipev, dualpipe; "
            "choose 1f1b, which runs with any numbers.",
        ),
        (
            "dualpipev",
            1,
            1,
            "train.micro_batches is 1 and dualpipev needs at least 2 x layout.pipeline = 2; "
            "set train.micro_batches to 2, or layout.schedule to 1f1b.",
        ),
        (
            "dualpipev",
            3,
            5,
            "train.micro_batches is 5 and dualpipev needs at least 2 x layout.pipeline = 6; "
            "set train.micro_batches to 6, or layout.schedule to 1f1b.",
        ),
        (
            "zb1p",
            4,
            0,
            "train.micro_batches is 0 and must be at least 1; set train.micro_batches to 1.",
        ),
        (
            "dualpipe",
            3,
            8,
            "layout.pipeline is 3 and must be even with dualpipe; "
            "set layout.pipeline to 2 or 4, or layout.schedule to 1f1b.",
        ),
        (
            "dualpipe",
            1,
            8,
            "layout.pipeline is 1 and dualpipe needs two ends to feed; "
            "set layout.schedule to dualpipev or 1f1b, or layout.pipeline to 2.",
        ),
        (
            "dualpipe",
            4,
            9,
            "train.micro_batches is 9 and must be even with dualpipe, which splits them between "
            "two directions; set train.micro_batches to 10.",
        ),
        (
            "dualpipe",
            4,
            6,
            "train.micro_batches is 6 and dualpipe needs at least 2 x layout.pipeline = 8; "
            "set train.micro_batches to 8, or layout.schedule to 1f1b.",
        ),
        (
            "1f1b",
            0,
            4,
            "layout.pipeline is 0 and must be at least 1; set layout.pipeline to 1.",
        ),
        (
            "dualpipe",
            2,
            -2,
            "train.micro_batches is -2 and must be at least 1; set train.micro_batches to 1.",
        ),
    ],
)
def test_sentences(kind, ranks, chunks, sentence):
    with pytest.raises(ConfigError) as error:
        make_schedule(kind, ranks, chunks)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("kind", "ranks", "chunks"),
    [
        ("gpipe", 1, 1),
        ("1f1b", 1, 1),
        ("zb1p", 1, 1),
        ("dualpipev", 1, 2),
        ("dualpipev", 3, 7),
        ("dualpipe", 4, 8),
    ],
)
def test_what_is_made_is_sound(kind, ranks, chunks):
    schedule = make_schedule(kind, ranks, chunks)
    verify(schedule)
    assert (schedule.kind, schedule.num_ranks, schedule.num_micro_batches) == (kind, ranks, chunks)
