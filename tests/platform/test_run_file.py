"""Run files: what they may say, and the sentence for everything they may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dualray.errors import ConfigError
from dualray.platform.run_file import RunFile, load_run_file, parse_run_file, to_mapping

TINY_MODEL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def mapping(**changed: Any) -> dict[str, Any]:
    """The least that a run file can say, with whole sections replaced."""
    return {
        "name": "t",
        "model": "tiny",
        "data": {"path": "d"},
        "layout": {"pipeline": 2, "experts": 2},
        "train": {"steps": 3, "seq_len": 16},
    } | changed


def refusal(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run_file(values, overrides)
    return str(caught.value)


# What it may say


def test_what_is_left_out_has_defaults() -> None:
    run = parse_run_file(mapping())
    assert (run.seed, run.train.lr, run.train.optimizer) == (0, 3e-4, "zero1")
    assert (run.layout.replicas, run.layout.schedule) == (1, "dualpipe")
    assert run.serve.after_training
    assert run.cluster.address is None


def test_a_preset_is_a_whole_model() -> None:
    by_name = parse_run_file(mapping(model="tiny")).model
    assert by_name.vocab_size == 512
    assert parse_run_file(mapping(model={"preset": "tiny"})).model == by_name


def test_a_preset_takes_changes() -> None:
    model = parse_run_file(mapping(model={"preset": "tiny", "vocab_size": 600})).model
    assert (model.vocab_size, model.hidden_size) == (600, 32)


def test_a_nested_section_is_converted() -> None:
    yarn = {"factor": 4, "original_max_position_embeddings": 64}
    model = parse_run_file(mapping(model={"preset": "tiny", "rope_scaling": yarn})).model
    assert model.rope_scaling is not None
    assert (model.rope_scaling.factor, model.rope_scaling.beta_fast) == (4.0, 32.0)


@pytest.mark.parametrize("text", ["3e-4", "3.0e-4", "0.0003", "3E-4"])
def test_floats_without_a_point_are_numbers(text: str) -> None:
    """YAML 1.1 reads 3e-4 as a string; people write it all the same."""
    run = parse_run_file(mapping(train=yaml.safe_load(f"{{steps: 3, seq_len: 16, lr: {text}}}")))
    assert run.train.lr == 3e-4
    assert parse_run_file(mapping(), [f"train.lr={text}"]).train.lr == 3e-4


@pytest.mark.parametrize("model", ["tiny", "demo", TINY_MODEL])
def test_what_is_written_down_is_read_back(model: Any) -> None:
    run = parse_run_file(
        mapping(
            model=model,
            train={"steps": 7, "seq_len": 32, "min_lr": 1e-5, "init_from": "runs/a"},
            serve={"max_context": 48},
            cluster={"address": "head:6379", "gpus_per_worker": 0.5},
            seed=5,
        )
    )
    assert parse_run_file(to_mapping(run)) == run
    assert parse_run_file(yaml.safe_load(yaml.safe_dump(to_mapping(run)))) == run


def test_parsing_leaves_its_argument_alone() -> None:
    values = mapping(model={"preset": "tiny"})
    before = yaml.safe_dump(values)
    parse_run_file(values, ["train.steps=9", "model.vocab_size=600", "serve.port=0"])
    assert yaml.safe_dump(values) == before


# --set


def test_overrides_are_yaml_and_the_last_one_holds() -> None:
    run = parse_run_file(
        mapping(),
        ["train.steps=10", "train.steps=11", "serve.after_training=false", "data.path=a=b"],
    )
    assert run.train.steps == 11
    assert run.serve.after_training is False
    assert run.data.path == "a=b"


def test_overrides_reach_into_a_preset() -> None:
    run = parse_run_file(mapping(), ["model.n_routed_experts=16", "model.rope_theta=5e4"])
    assert (run.model.n_routed_experts, run.model.rope_theta) == (16, 5e4)
    assert run.model.vocab_size == 512


def test_an_override_can_name_the_preset() -> None:
    assert parse_run_file(mapping(model=TINY_MODEL), ["model=demo"]).model.vocab_size == 2048


def test_an_override_can_bring_a_section() -> None:
    values = mapping()
    del values["data"]
    assert parse_run_file(values, ["data.path=x"]).data.path == "x"


def test_an_override_that_is_no_assignment() -> None:
    for text in ("train.steps", "=3"):
        assert refusal(mapping(), text) == (
            f"--set '{text}' is not KEY=VALUE; write, say, train.steps=10."
        )


# What it may not say


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("modle", "model"),
        ("layout.pipelines", "layout.pipeline"),
        ("train.micro_batchs", "train.micro_batches"),
        ("train.learning", None),
        ("data.paths", "data.path"),
        ("serve.prot", "serve.port"),
        ("cluster.adress", "cluster.address"),
        ("kubernetes.namspace", "kubernetes.namespace"),
        ("model.hiden_size", "model.hidden_size"),
    ],
)
def test_unknown_keys_at_every_level(key: str, guess: str | None) -> None:
    sentence = refusal(mapping(), f"{key}=1")
    if guess is not None:
        assert sentence == f"{key} is not a field of the run file; did you mean {guess}?"
    else:
        assert sentence.startswith(f"{key} is not a field of the run file; train has steps, ")


def test_unknown_key_in_a_section_of_a_section() -> None:
    yarn = {"factor": 4, "original_max_position_embeddings": 64, "beta_fst": 1}
    assert refusal(mapping(model={"preset": "tiny", "rope_scaling": yarn})) == (
        "model.rope_scaling.beta_fst is not a field of the run file; "
        "did you mean model.rope_scaling.beta_fast?"
    )


def test_a_scheduler_with_nothing_to_decide() -> None:
    layout = {"pipeline": 2, "schedule": "1f1b"}
    assert refusal(mapping(layout=layout, scheduler={"check_every": 5})) == (
        "section scheduler is given and layout.schedule is 1f1b, which leaves nothing to decide; "
        "set layout.schedule to auto, or remove section scheduler."
    )


def test_unknown_key_with_nothing_near() -> None:
    assert refusal(mapping(zzz=1)) == (
        "zzz is not a field of the run file; the run file has name, model, data, train, extend, "
        "layout, experts, serve, scheduler, cluster, kubernetes, seed."
    )


@pytest.mark.parametrize("missing", ["name", "model", "data", "train"])
def test_a_section_that_must_be_there(missing: str) -> None:
    values = mapping()
    del values[missing]
    assert refusal(values) == f"{missing} is missing; set {missing}."


@pytest.mark.parametrize(
    ("values", "where"),
    [
        (mapping(train={"steps": 3}), "train.seq_len"),
        (mapping(data={}), "data.path"),
        (mapping(model={k: v for k, v in TINY_MODEL.items() if k != "vocab_size"}),
         "model.vocab_size"),
    ],
)  # fmt: skip
def test_a_field_that_must_be_there(values: dict[str, Any], where: str) -> None:
    assert refusal(values) == f"{where} is missing; set {where}."


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.steps=many", "train.steps is 'many': input should be a valid integer"),
        ("train.steps=1.5", "train.steps is 1.5: input should be a valid integer"),
        ("train.lr=fast", "train.lr is 'fast': input should be a valid number"),
        ("train.lr=[1]", "train.lr is [1]: input should be a valid number"),
        ("layout.pipeline=null", "layout.pipeline is None: input should be a valid integer"),
        ("serve.after_training=perhaps", "serve.after_training is 'perhaps': input should be a"),
        ("data.path=3", "data.path is 3: input should be a valid string"),
        ("train=3", "train is 3: input should be a dictionary"),
        ("seed=x", "seed is 'x': input should be a valid integer"),
    ],
)
def test_values_of_a_wrong_type(override: str, sentence: str) -> None:
    refused = refusal(mapping(), override)
    assert refused.startswith(sentence)
    assert refused.endswith(f"; correct {override.partition('=')[0]}.")


def test_an_unknown_preset() -> None:
    assert refusal(mapping(model="tini")) == (
        "model is 'tini' and must be a preset (deepseek-v2-lite, deepseek-v3, demo, "
        "moonlight, tiny) or a mapping; did you mean tiny?"
    )
    assert refusal(mapping(model={"preset": "vast"})) == (
        "model is 'vast' and must be a preset (deepseek-v2-lite, deepseek-v3, demo, "
        "moonlight, tiny) or a mapping; name a preset."
    )


def test_the_name_becomes_a_folder() -> None:
    for name in ("../up", "", "a b", ".hidden"):
        assert refusal(mapping(name=name)) == (
            f"name is {name!r} and must be letters, digits, '.', '_' or '-', starting with a "
            "letter or digit; choose a name that can be a folder."
        )


# Rules that span sections


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["train.seq_len=257"],
            "train.seq_len 257 exceeds model.max_position_embeddings 256; shorten the sequences "
            "or raise model.max_position_embeddings.",
        ),
        (
            ["layout.experts=3"],
            "model.n_routed_experts 8 is not divisible by layout.experts 3",
        ),
        (
            ["model.n_group=3"],
            "model.n_routed_experts 8 is not divisible by model.n_group 3; choose a number of "
            "groups that divides the experts.",
        ),
        (
            ["layout.pipeline=6", "train.micro_batches=12"],
            "model.num_hidden_layers 4 is fewer than the schedule's 6 stages, and every "
            "stage needs a layer; choose layout.pipeline and layout.schedule for 4 stages or less.",
        ),
        (
            ["serve.compile_batch=1", "layout.experts=2"],
            "serve.compile_batch is 1 and layout.experts is 2, but a step that exchanges tokens "
            "cannot be compiled; leave serve.compile_batch out, or serve with layout.experts=1.",
        ),
        (["layout.pipeline=3", "layout.schedule=dualpipe"], "layout.pipeline is 3 and "),
        (["train.micro_batches=5"], "train.micro_batches is 5 and "),
        (["train.micro_batches=2"], "train.micro_batches is 2 and "),
        (["layout.schedule=dualpip"], "layout.schedule is "),
        (["layout.pipeline=0"], "layout.pipeline is 0 and must be at least 1"),
        (["train.steps=0"], "train.steps is 0 and must be at least 1"),
        (["train.dtype=float16"], "train.dtype is float16 and must be one of float32, bfloat16"),
        (
            ["train.dtype=float64"],
            "train.optimizer is zero1 and train.dtype is float64, but zero1 keeps fp32 masters; "
            "set train.optimizer to adamw.",
        ),
        (["cluster.address=http://h:8265"], "cluster.address is http://h:8265 and must be"),
        (["serve.port=70000"], "serve.port is 70000 and must lie between 0 and 65535"),
    ],
)
def test_rules(overrides: list[str], sentence: str) -> None:
    assert refusal(mapping(), *overrides).startswith(sentence)


# Files


def test_a_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: t\nmodel: tiny\ndata: {path: d}\ntrain: {steps: 3, seq_len: 16}\n")
    run = load_run_file(path)
    assert isinstance(run, RunFile)
    assert (run.layout.world_size, run.layout.schedule) == (1, "1f1b")
    assert load_run_file(path, ["layout.pipeline=2"]).layout.schedule == "dualpipe"


def refusal_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_run_file(path)
    return str(caught.value)


def test_files_that_are_no_run_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    assert refusal_of(path) == f"run file {path} does not exist; check the path."
    path.write_text("")
    assert refusal_of(path) == f"run file {path} holds no sections; see examples/."
    path.write_text("- a\n- b\n")
    assert refusal_of(path) == f"run file {path} holds no sections; see examples/."
    path.write_text("name: a\ntrain: {steps: 3\n")
    assert refusal_of(path).startswith(f"run file {path} line 3 is not YAML (")
    path.write_bytes(b"name: \xff\xfe\n")
    assert refusal_of(path).startswith(f"run file {path} cannot be read (")
    assert refusal_of(tmp_path).startswith(f"run file {tmp_path} cannot be read (")


def test_a_key_given_twice_and_a_value_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("name: a\ntrain:\n  steps: 1\n  steps: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 4 is not YAML \(steps is given twice\)"):
        load_run_file(path)
    assert "has a value that is not YAML" in refusal(mapping(), "train.steps=[1")


def test_an_override_may_name_the_preset() -> None:
    run = parse_run_file(mapping(), ["model.preset=demo", "model.vocab_size=600"])
    assert (run.model.hidden_size, run.model.vocab_size) == (160, 600)


@pytest.mark.parametrize("override", ["train.gamma=.inf", "model.rms_norm_eps=-1"])
def test_numbers_that_cannot_be_meant(override: str) -> None:
    field, _, _ = override.partition("=")
    assert refusal(mapping(), override).startswith(f"{field} is ")
