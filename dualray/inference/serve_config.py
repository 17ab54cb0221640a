"""How a run serves: the run file's `serve` section."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dualray.errors import ConfigError
from dualray.inference.block_pool import blocks_for
from dualray.inference.limits import Limits
from dualray.inference.serve_admin import check_admin
from dualray.inference.serve_drafts import check_drafts, most_drafts
from dualray.inference.serve_modes import check_modes
from dualray.inference.serve_records import check_records

DEFAULT_CONTEXT = 4096
"""Tokens of context that nobody has to ask for."""
MAX_COMPILED = 16
"""Largest batch whose steps can be compiled: more tokens go to their experts in ragged groups,
which torch.compile does not take in fp32."""
MAX_STREAM_INTERVAL_S = 10.0
MIN_MESSAGE_BYTES = 1024
MAX_MESSAGE_BYTES = 2**31 - 1
"""gRPC's own largest limit."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Address and limits of the gRPC server and the inference scheduler."""

    after_training: bool = True
    """Serve from the same actors when the last step is done."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 50051
    """Port to listen on; 0 takes a free one."""
    metrics_port: int | None = None
    """Port on which Prometheus scrapes the engine's metrics at serve.host, over HTTPS if tls_cert
    is given and then with a client's certificate if tls_client_ca is, otherwise over HTTP; it
    asks for no token. 0 takes a free one, None serves none."""
    access_log: str | None = None
    """File to which each request adds a line of JSON when it ends, on the head node; `-` is the
    engine's standard output, None keeps no log. A file that was moved away is made anew."""
    access_log_prompts: bool = False
    """Write the prompts too; the file is then readable by its owner only (mode 0600)."""
    otlp_endpoint: str | None = None
    """http://HOST:PORT or https://HOST:PORT of an OpenTelemetry collector that takes OTLP over
    gRPC; each request becomes a trace there, a child of its caller's. None traces nothing."""
    admin_port: int | None = None
    """Port of the admin service, which switches modes and pauses generation; 0 takes a free one,
    None has no admin service. It has the TLS of serve.port, and tokens of its own."""
    admin_host: str = "127.0.0.1"
    """Address that the admin service listens on; any but this machine's own needs
    admin_tokens_file or tls_client_ca."""
    admin_tokens_file: str | None = None
    """File with the bearer tokens of the admin service, like tokens_file, whose tokens do not count
    there; needed where tokens_file is given. None asks for no token."""
    optimizer: str = "keep"
    """Where optimizer state is while a run serves that can go on training: `keep` where it is,
    `park` in host memory, or `drop`, which commits a checkpoint of the step first and reads it to
    train again. Workers without a GPU park what is in host memory already: nothing is copied."""
    drain_s: float = 30.0
    """Seconds that accepted requests get to end when the run stops or leaves serving."""
    retry_after_s: float = 30.0
    """Seconds after which refused callers are asked to come again while the run does not serve."""
    max_batch: int = 16
    """Sequences that one (replica, expert rank, direction) decodes together."""
    max_context: int | None = None
    """Longest prompt plus completion in tokens; None takes model.max_position_embeddings, but
    no more than 4096: the cache is taken in full when serving starts."""
    block_size: int = 16
    """Tokens per block of the latent cache."""
    num_blocks: int | None = None
    """Blocks of each latent cache; None takes what max_batch sequences of max_context tokens need.
    With fewer, long completions may lose theirs to older ones and be run again from the start."""
    prefix_cache: bool = True
    """Share the blocks of prompts that begin alike, and keep them for later ones."""
    max_step_tokens: int = 2048
    """Tokens that one (replica, expert rank, direction) runs in a step, prompts included."""
    compile_batch: int = 0
    """Largest batch whose decode steps torch.compile prepares when serving starts, at up to a
    minute for each power of two up to it; at most 16, 0 for none. Faster for small batches."""
    batch_invariant: bool = False
    """Give a request the same tokens and log-probabilities, to the last bit, whatever runs beside
    it, at 0.7 to 1 times the tokens a second. For CPUs; the bits depend on threads."""
    draft_tokens: int | None = None
    """Most tokens that the model's MTP modules draft behind a sequence in a step, 0 to 8; what the
    model itself would say is kept of them, so that only the time changes. Fewer are drafted where
    that is faster. None takes 3 if the model has MTP modules and compile_batch is 0, else 0."""
    max_waiting: int = 1024
    """Requests that may wait before new ones are refused."""
    stream_interval_s: float = 0.0
    """Least time in seconds between two messages of a stream but its last: tokens made within it
    come together. 0 sends each as soon as it is made; 0.05 looks as smooth and costs less."""
    max_request_s: float = 600.0
    """Longest time in seconds that a request may take, whatever its own deadline says."""
    max_message_bytes: int = 4 * 1024 * 1024
    """Most bytes of one message that a client may send; at least 1024."""
    max_streams: int = 1024
    """Calls that one connection may have open; further ones wait at the client."""
    tls_cert: str | None = None
    """PEM file with the server's certificate and the chain below it; None serves without TLS.
    Paths are the head node's. Replaced files count from the next connection on."""
    tls_key: str | None = None
    """PEM file with the key of tls_cert, not encrypted."""
    tls_client_ca: str | None = None
    """PEM file with authorities, of which one must have signed every client's certificate."""
    tokens_file: str | None = None
    """File with a bearer token a line, lines that start with # skipped; every call but health
    and reflection must carry one. Read again when it changes; None asks for no token."""

    def __post_init__(self) -> None:
        for field in ("max_batch", "block_size", "max_waiting", "max_streams"):
            if getattr(self, field) < 1:
                raise ConfigError(
                    f"serve.{field} is {getattr(self, field)} and must be at least 1",
                    hint=f"set serve.{field} to 1 or more",
                )
        if not 0 <= self.compile_batch <= self.max_batch:
            raise ConfigError(
                f"serve.compile_batch is {self.compile_batch} and must lie between 0 and "
                f"serve.max_batch = {self.max_batch}",
                hint="set serve.compile_batch to 1 for single requests, or leave it out",
            )
        if self.compile_batch > MAX_COMPILED:
            raise ConfigError(
                f"serve.compile_batch is {self.compile_batch} and must be at most {MAX_COMPILED}",
                hint=f"set serve.compile_batch to {MAX_COMPILED}; larger steps are not compiled",
            )
        if self.compile_batch and self.batch_invariant:
            raise ConfigError(
                f"serve.compile_batch is {self.compile_batch} and serve.batch_invariant is true, "
                "but the bits of a compiled step depend on its batch",
                hint="set one of the two",
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(
                f"serve.port is {self.port} and must lie between 0 and 65535",
                hint="choose a port, or 0 for a free one",
            )
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            raise ConfigError(
                f"serve.metrics_port is {self.metrics_port} and must lie between 0 and 65535",
                hint="choose a port, 0 for a free one, or leave it out for no metrics",
            )
        if self.metrics_port and self.metrics_port == self.port:
            raise ConfigError(
                f"serve.metrics_port and serve.port are both {self.port} and must differ",
                hint="choose another serve.metrics_port",
            )
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(
                f"serve.max_context is {self.max_context} and must hold a prompt token and a "
                "new one",
                hint="set it to 2 or more, or leave it out",
            )
        if self.max_step_tokens < self.max_batch:
            raise ConfigError(
                f"serve.max_step_tokens {self.max_step_tokens} is less than serve.max_batch "
                f"{self.max_batch}, and every decoding sequence needs a token of each step",
                hint="raise max_step_tokens or lower max_batch",
            )
        if not 0 <= self.stream_interval_s <= MAX_STREAM_INTERVAL_S:
            raise ConfigError(
                f"serve.stream_interval_s is {self.stream_interval_s} and must lie between 0 and "
                f"{MAX_STREAM_INTERVAL_S:g}",
                hint="leave it out to send every token at once",
            )
        if not 0 < self.max_request_s < math.inf:
            raise ConfigError(
                f"serve.max_request_s is {self.max_request_s} and must be above 0",
                hint="set it to a number of seconds such as 600",
            )
        self._check_security()
        check_modes(
            optimizer=self.optimizer,
            drain_s=self.drain_s,
            retry_after_s=self.retry_after_s,
            port=self.port,
            metrics_port=self.metrics_port,
            admin_port=self.admin_port,
        )
        check_admin(
            admin_port=self.admin_port,
            admin_host=self.admin_host,
            admin_tokens_file=self.admin_tokens_file,
            tokens_file=self.tokens_file,
            tls_client_ca=self.tls_client_ca,
        )
        check_drafts(self.draft_tokens, self.compile_batch)
        check_records(
            access_log=self.access_log,
            access_log_prompts=self.access_log_prompts,
            otlp_endpoint=self.otlp_endpoint,
        )

    def _check_security(self) -> None:
        """What holds without a look at the files, which lie on the machine that serves."""
        if not MIN_MESSAGE_BYTES <= self.max_message_bytes <= MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"serve.max_message_bytes is {self.max_message_bytes} and must lie between "
                f"{MIN_MESSAGE_BYTES} and {MAX_MESSAGE_BYTES}",
                hint="leave it out for 4 MiB",
            )
        given, missing = "tls_cert", "tls_key"
        if self.tls_cert is None:
            given, missing = missing, given
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                f"serve.{given} is {getattr(self, given)} and serve.{missing} is not given, but "
                "TLS needs both",
                hint=f"set serve.{missing} too, or neither",
            )
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ConfigError(
                f"serve.tls_client_ca is {self.tls_client_ca} and serve.tls_cert is not given, "
                "but only TLS carries client certificates",
                hint="set serve.tls_cert and serve.tls_key too",
            )

    def limits(self, max_position_embeddings: int, num_mtp_modules: int = 0) -> Limits:
        """The inference scheduler's limits.

        Raises:
            ConfigError: max_context is longer than the model allows or num_blocks can hold, or
                draft_tokens asks for MTP modules and the model has none.
        """
        draft_tokens = most_drafts(self.draft_tokens, self.compile_batch, num_mtp_modules)
        max_context = self.max_context or min(max_position_embeddings, DEFAULT_CONTEXT)
        if max_context > max_position_embeddings:
            raise ConfigError(
                f"serve.max_context {max_context} exceeds model.max_position_embeddings "
                f"{max_position_embeddings}",
                hint="lower serve.max_context or leave it out",
            )
        longest = blocks_for(max_context, self.block_size)
        if self.num_blocks is not None and self.num_blocks < longest:
            raise ConfigError(
                f"serve.num_blocks is {self.num_blocks} and must be at least {longest}, which one "
                f"request of {max_context} tokens needs in blocks of {self.block_size}",
                hint=f"set serve.num_blocks to {longest} or more, or lower serve.max_context",
            )
        return Limits(
            num_blocks=self.num_blocks or self.max_batch * longest,
            block_size=self.block_size,
            max_batch=self.max_batch,
            max_context=max_context,
            max_step_tokens=self.max_step_tokens,
            max_waiting=self.max_waiting,
            prefix_cache=self.prefix_cache,
            draft_tokens=draft_tokens,
            draft_modules=min(num_mtp_modules, draft_tokens),
        )
