"""Settings, from `FLEXGATE_*` variables and the options of `flexgate serve`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from flexgate.server.inference.request.limits import Limits
from flexgate.server.ledger.errors import LedgerFailure
from flexgate.server.lifecycle.addresses import is_loopback, is_origin, is_web
from flexgate.server.lifecycle.slot_kinds import SlotKinds, parse_slot_kinds
from flexgate.server.lifecycle.store_settings import StoreSettings, load

DEMO_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


class Settings(StoreSettings):
    """One server. Options given to the command win over variables."""

    model: Annotated[Path | None, Field(description="Folder of a checkpoint.")] = None
    host: Annotated[str, Field(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to listen on.")] = 8000
    admin_port: Annotated[
        int | None,
        Field(
            ge=0,
            le=65535,
            description="Serve the admin API on this port (loopback only); --port then serves tenants only.",
        ),
    ] = None
    allow_remote: Annotated[
        bool,
        Field(description="Allow an address other than loopback. The server has no TLS of its own."),
    ] = False
    served_model_name: Annotated[
        tuple[str, ...],
        Field(description="Model name accepted in requests; by default the folder's name."),
    ] = ()
    chat_template: Annotated[
        Path | None, Field(description="Jinja file that replaces the checkpoint's chat template.")
    ] = None
    tool_call_parser: Annotated[
        str | None, Field(description="vLLM's parser of tool calls; needed for tool_choice 'auto'.")
    ] = None
    max_experts: Annotated[
        int | None,
        Field(ge=1, description="Number of expert slots; by default the checkpoint's experts plus two, if they fit."),
    ] = None
    slots: Annotated[
        str | None,
        Field(
            description="Free expert slots by kind, such as full=2,r64=8: two full ones, and eight for experts of a "
            "rank up to 64. Replaces --max-experts; ranks need --moe-kernels flexgate."
        ),
    ] = None
    experts_dir: Annotated[Path | None, Field(description="Folder of expert packages that can be added by name.")] = (
        None
    )
    trusted_keys: Annotated[
        Path | None,
        Field(description="Folder with the public keys (OWNER.pem) of the owners whose expert packages are accepted."),
    ] = None
    allow_unsigned_experts: Annotated[
        bool, Field(description="Accept expert packages without checking signatures. Insecure; on with --demo.")
    ] = False
    max_experts_per_owner: Annotated[
        int | None,
        Field(
            ge=1,
            description="Most slots that packages added with an owner's key may fill; default half of the free ones.",
        ),
    ] = None
    max_package_bytes: Annotated[
        int, Field(ge=1, description="Largest expert package that can be uploaded, in bytes.")
    ] = 64 << 30
    dtype: Annotated[
        Literal["auto", "bfloat16", "float32"], Field(description="Data type of the weights; auto is bfloat16.")
    ] = "auto"
    max_model_len: Annotated[
        int | None, Field(ge=1, description="Largest number of tokens of a request; by default the model's limit.")
    ] = None
    max_num_seqs: Annotated[
        int,
        Field(
            ge=1,
            description="Largest number of sequences in one batch. A request takes one for each choice of each prompt.",
        ),
    ] = 64
    kv_cache_memory_bytes: Annotated[
        int | None, Field(ge=1, description="Size of the KV cache, in bytes; by default 1 GiB on CPU.")
    ] = None
    tensor_parallel_size: Annotated[int, Field(ge=1, description="Number of ranks that the model is split over.")] = 1
    enable_expert_parallel: Annotated[
        bool, Field(description="Expert parallelism: place whole experts on ranks instead of splitting every expert.")
    ] = False
    moe_kernels: Annotated[
        Literal["flexgate", "vllm"],
        Field(description="Kernels of the expert layers. The server does not start if they are unavailable."),
    ] = "vllm"
    enforce_eager: Annotated[bool, Field(description="Do not compile the model: faster start, slower decoding.")] = (
        False
    )
    project_share: Annotated[
        float,
        Field(gt=0, le=1, description="Largest share of the batch for one project; the rest is kept free for others."),
    ] = 0.5
    max_queued: Annotated[
        int, Field(ge=1, description="Prompts of one project that may wait for the engine; further ones get 429.")
    ] = 1024
    queue_seconds: Annotated[
        float, Field(gt=0, description="Seconds that a prompt may wait for the engine; after that it gets 503.")
    ] = 300.0
    max_body_bytes: Annotated[int, Field(ge=1024, description="Largest request body, in bytes.")] = 1 << 20
    max_n: Annotated[int, Field(ge=1, description="Maximum number of choices per prompt.")] = 8
    max_prompts: Annotated[int, Field(ge=1, description="Maximum number of prompts per request.")] = 16
    max_logprobs: Annotated[int, Field(ge=0, le=20, description="Maximum number of log-probabilities per token.")] = 20
    max_grammar_bytes: Annotated[int, Field(ge=1, description="Largest schema, pattern or grammar, in bytes.")] = (
        16 * 1024
    )
    body_seconds: Annotated[float, Field(gt=0, description="Seconds in which a request's body must arrive.")] = 30.0
    revoked_keys: Annotated[
        Literal["end", "finish"],
        Field(description="When a key is revoked or expires: end its running requests, or let them finish."),
    ] = "end"
    audit_denials_days: Annotated[
        int,
        Field(ge=1, description="Days to keep audit entries of denied requests. Entries of changes are kept forever."),
    ] = 90
    ledger_failure: Annotated[
        LedgerFailure,
        Field(
            description="While the ledger cannot be written: refuse all requests with 503, or serve those whose "
            "agreements have no duties, unrecorded."
        ),
    ] = "refuse"
    usage_events: Annotated[
        str | None,
        Field(description="Send each ended request as a CloudEvent to this http(s) URL, or append it to this file."),
    ] = None
    usage_events_token: Annotated[
        Path | None, Field(description="File with the bearer token that --usage-events is sent with.")
    ] = None
    otlp_endpoint: Annotated[
        str | None,
        Field(
            description="Send OpenTelemetry spans of requests to this collector (OTLP over HTTP); by default to that "
            "of OTEL_EXPORTER_OTLP_ENDPOINT, if it is set."
        ),
    ] = None
    receipt_key: Annotated[
        Path | None,
        Field(
            description="PEM file with the Ed25519 key that signs receipts; by default receipts.pem in the state "
            "directory, made at the first start."
        ),
    ] = None
    receipt_signer: Annotated[
        str | None,
        Field(
            description="Command that signs receipts instead: it reads a message and prints the signature in "
            "hexadecimal. --receipt-key is its public key then."
        ),
    ] = None
    heads_file: Annotated[
        Path | None,
        Field(
            description="File to which the numbers and hashes of the newest audit entries and receipts are appended "
            "(their heads); best on another machine's disk."
        ),
    ] = None
    heads_seconds: Annotated[float, Field(gt=0, description="Seconds between two additions to --heads-file.")] = 3600.0
    usage_days: Annotated[
        int,
        Field(ge=32, description="Days to keep usage of requests, for statements, disputes and sums."),
    ] = 400
    keep_alive_seconds: Annotated[
        int,
        Field(
            ge=1,
            description="Idle timeout of connections, in seconds. Set a proxy's timeout for connections to it lower.",
        ),
    ] = 75
    cors_origin: Annotated[
        tuple[str, ...],
        Field(description="Web origin whose pages may call the tenants' routes; '*' allows all."),
    ] = ()
    drain_seconds: Annotated[
        int, Field(ge=0, description="Seconds that running requests have to finish at shutdown.")
    ] = 30
    policy_poll_seconds: Annotated[
        float, Field(gt=0, description="Seconds between two polls of the policy database for changes.")
    ] = 0.25
    policy_lease_seconds: Annotated[
        float,
        Field(gt=0, description="Refuse all requests once the policy database has not answered for so many seconds."),
    ] = 2.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Lowest level that is logged.")
    ] = "info"

    log_format: Annotated[
        Literal["auto", "json", "text"],
        Field(description="Format of log lines; auto is text on a terminal, else JSON."),
    ] = "auto"

    @field_validator("chat_template")
    @classmethod
    def _a_file(cls, path: Path | None) -> Path | None:
        with suppress(OSError):  # a template itself, say, is no name that a file could have
            if path is None or path.is_file():
                return path
        raise ValueError(f"{str(path)[:80]} is not a file")

    @field_validator("usage_events")
    @classmethod
    def _a_sink(cls, sink: str | None) -> str | None:
        if sink is None or is_web(sink):
            return sink
        if "://" in sink:
            raise ValueError("not an http(s) URL without a user name; --usage-events-token names a file with a token")
        if Path(sink).is_dir() or not Path(sink).absolute().parent.is_dir():
            raise ValueError(f"{sink[:80]!r} is neither an http(s) URL nor a file in a folder that exists")
        return sink

    @field_validator("otlp_endpoint")
    @classmethod
    def _a_collector(cls, url: str | None) -> str | None:
        if url is None or is_web(url):
            return url
        raise ValueError(f"{url[:80]!r} is not an http(s) URL, such as 'http://127.0.0.1:4318'")

    @field_validator("usage_events_token")
    @classmethod
    def _a_token(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError(f"'{path}' is not a file")
        return path

    @field_validator("experts_dir")
    @classmethod
    def _a_folder(cls, path: Path | None) -> Path | None:
        if path is None or path.is_dir():
            return path
        raise ValueError(f"'{path}' is not a folder")

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not is_origin(origin):
                raise ValueError(
                    f"{origin[:80]!r} is not an origin: give a scheme and a host, such as 'https://app.example.com'"
                )
        return origins

    @property
    def slot_kinds(self) -> SlotKinds:
        """What `slots` asks for."""
        return SlotKinds() if self.slots is None else parse_slot_kinds(self.slots)

    @model_validator(mode="after")
    def _slots_fit(self) -> Self:
        if self.slots is not None and self.max_experts is not None:
            raise ValueError("--slots and --max-experts both say how many slots there are: leave one of them out")
        _ = self.slot_kinds
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.demo and self.model is None:
            raise ValueError("no model is given: name a model's folder, or start with --demo")
        if self.demo and self.model is not None:
            raise ValueError(
                "--demo and MODEL name two models: leave one of them out, or unset FLEXGATE_DEMO or FLEXGATE_MODEL"
            )
        if self.demo and not is_loopback(self.host):
            raise ValueError(f"--demo listens on loopback only, not on {self.host}")
        if self.receipt_signer is not None and self.receipt_key is None:
            raise ValueError("--receipt-signer is given without --receipt-key: name the PEM file with its public key")
        if self.admin_port == self.port != 0:
            raise ValueError(f"--admin-port and --port are both {self.port}; give administration a port of its own")
        if not is_loopback(self.host) and not self.allow_remote:
            raise ValueError(
                f"{self.host} is not a loopback address; --allow-remote allows it, behind a proxy with TLS"
            )
        return self

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that a Host header may have; None allows all."""
        return DEMO_HOSTS if self.demo else None

    @property
    def limits(self) -> Limits:
        """Limits of one request."""
        return Limits(
            n=self.max_n,
            prompts=self.max_prompts,
            logprobs=self.max_logprobs,
            grammar_bytes=self.max_grammar_bytes,
        )


def load_settings(**given: Any) -> Settings:
    """Settings from the environment and `given`; None means not given.

    Raises:
        SettingsError: naming the option and what is wrong.
    """
    return load(Settings, given)
