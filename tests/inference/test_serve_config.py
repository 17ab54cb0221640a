import pytest

from dualray.errors import ConfigError
from dualray.inference.serve_config import ServeConfig


def test_the_cache_holds_a_full_batch_of_full_length():
    limits = ServeConfig(max_batch=3, block_size=16).limits(100)
    assert (limits.max_context, limits.num_blocks) == (100, 21)
    assert limits.prefix_cache


def test_blocks_are_counted_by_the_user_if_he_likes():
    config = ServeConfig(max_batch=30, num_blocks=7, prefix_cache=False)
    assert (config.limits(100).num_blocks, config.limits(100).prefix_cache) == (7, False)
    with pytest.raises(ConfigError) as raised:
        config.limits(113)
    assert str(raised.value) == (
        "serve.num_blocks is 7 and must be at least 8, which one request of 113 tokens needs in "
        "blocks of 16; set serve.num_blocks to 8 or more, or lower serve.max_context."
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"port": 70000},
            "serve.port is 70000 and must lie between 0 and 65535; choose a port, or 0 for a "
            "free one.",
        ),
        (
            {"max_batch": 0},
            "serve.max_batch is 0 and must be at least 1; set serve.max_batch to 1 or more.",
        ),
        (
            {"max_step_tokens": 8, "max_batch": 9},
            "serve.max_step_tokens 8 is less than serve.max_batch 9, and every decoding sequence "
            "needs a token of each step; raise max_step_tokens or lower max_batch.",
        ),
        (
            {"compile_batch": 3, "max_batch": 2},
            "serve.compile_batch is 3 and must lie between 0 and serve.max_batch = 2; set "
            "serve.compile_batch to 1 for single requests, or leave it out.",
        ),
        (
            {"compile_batch": 17, "max_batch": 32},
            "serve.compile_batch is 17 and must be at most 16; set serve.compile_batch to 16; "
            "larger steps are not compiled.",
        ),
        (
            {"max_context": 1},
            "serve.max_context is 1 and must hold a prompt token and a new one; set it to 2 or "
            "more, or leave it out.",
        ),
        (
            {"stream_interval_s": 11.0},
            "serve.stream_interval_s is 11.0 and must lie between 0 and 10; leave it out to send "
            "every token at once.",
        ),
        (
            {"max_request_s": 0},
            "serve.max_request_s is 0 and must be above 0; set it to a number of seconds such as "
            "600.",
        ),
        (
            {"max_message_bytes": 1023},
            "serve.max_message_bytes is 1023 and must lie between 1024 and 2147483647; leave it "
            "out for 4 MiB.",
        ),
        (
            {"max_message_bytes": 2**31},
            "serve.max_message_bytes is 2147483648 and must lie between 1024 and 2147483647; leave "
            "it out for 4 MiB.",
        ),
        (
            {"access_log": ""},
            "serve.access_log is empty and must name a file; give a path, - for standard output, "
            "or leave it out for no log.",
        ),
        (
            {"access_log_prompts": True},
            "serve.access_log_prompts is true and serve.access_log is not given, so that there is "
            "nothing to write prompts to; set serve.access_log too, or leave "
            "serve.access_log_prompts out.",
        ),
        *(
            (
                {"otlp_endpoint": wrong},
                f"serve.otlp_endpoint is {wrong} and must be http://HOST:PORT or "
                "https://HOST:PORT; give the address where a collector takes OTLP over gRPC, such "
                "as http://127.0.0.1:4317.",
            )
            for wrong in (
                "collector:4317",
                "grpc://collector:4317",
                "http://collector",
                "http://:4317",
                "http://collector:99999",
                "http://collector:4317/v1/traces",
                "",
            )
        ),
        (
            {"tls_cert": "a.pem"},
            "serve.tls_cert is a.pem and serve.tls_key is not given, but TLS needs both; set "
            "serve.tls_key too, or neither.",
        ),
        (
            {"tls_key": "a.key"},
            "serve.tls_key is a.key and serve.tls_cert is not given, but TLS needs both; set "
            "serve.tls_cert too, or neither.",
        ),
        (
            {"tls_client_ca": "ca.pem"},
            "serve.tls_client_ca is ca.pem and serve.tls_cert is not given, but only TLS carries "
            "client certificates; set serve.tls_cert and serve.tls_key too.",
        ),
    ],
)
def test_a_wrong_field_is_a_sentence(values, sentence):
    with pytest.raises(ConfigError) as raised:
        ServeConfig(**values)
    assert str(raised.value) == sentence


def test_the_context_cannot_exceed_the_models():
    with pytest.raises(ConfigError) as raised:
        ServeConfig(max_context=65).limits(64)
    assert str(raised.value) == (
        "serve.max_context 65 exceeds model.max_position_embeddings 64; lower serve.max_context "
        "or leave it out."
    )


@pytest.mark.parametrize("right", ["http://10.0.0.7:4317", "https://[::1]:4317/"])
def test_where_traces_go(right):
    assert ServeConfig(otlp_endpoint=right).otlp_endpoint == right


def test_drafts_are_on_where_the_model_has_modules_for_them():
    plain, drafting = (ServeConfig().limits(64, modules) for modules in (0, 1))
    assert (plain.draft_tokens, plain.draft_modules) == (0, 0)
    assert (drafting.draft_tokens, drafting.draft_modules) == (3, 1)
    assert ServeConfig(draft_tokens=1).limits(64, 2).draft_modules == 1
    assert ServeConfig(draft_tokens=0).limits(64, 1).draft_tokens == 0
    # Compiled steps are of a fixed number of rows: whoever wants both says so.
    assert ServeConfig(compile_batch=8).limits(64, 1).draft_tokens == 0
    assert ServeConfig(compile_batch=8, draft_tokens=2).limits(64, 1).draft_tokens == 2


@pytest.mark.parametrize(
    ("settings", "modules", "sentence"),
    [
        (
            {"draft_tokens": 9},
            1,
            "serve.draft_tokens is 9 and must lie between 0 and 8; leave it out for as many as "
            "pay, or set it to 0 for none.",
        ),
        (
            {"draft_tokens": 2, "compile_batch": 2},
            1,
            "serve.draft_tokens is 2 and serve.compile_batch 2, but a step that verifies them runs "
            "3 rows of a sequence; set serve.compile_batch to 3 or more, or drop one of the two.",
        ),
        (
            {"draft_tokens": 1},
            0,
            "serve.draft_tokens is 1 and model.num_nextn_predict_layers is 0, but drafts come from "
            "MTP modules; leave serve.draft_tokens out, or train a model with "
            "num_nextn_predict_layers: 1.",
        ),
    ],
)
def test_drafts_that_cannot_be_are_refused(settings, modules, sentence):
    with pytest.raises(ConfigError) as raised:
        ServeConfig(**settings).limits(64, modules)
    assert str(raised.value) == sentence


def test_a_compiled_step_is_not_batch_invariant():
    with pytest.raises(ConfigError) as raised:
        ServeConfig(compile_batch=2, batch_invariant=True)
    assert str(raised.value) == (
        "serve.compile_batch is 2 and serve.batch_invariant is true, but the bits of a compiled "
        "step depend on its batch; set one of the two."
    )
