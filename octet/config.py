"""The configuration of a cluster: one frozen tree, from defaults, a YAML file and flags, in that order of strength.

Every field is documented here, or in `octet/autoscaler_config.py`; nowhere else is an environment variable or a file
consulted.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic

from octet.autoscaler_config import AutoscalerConfig, PoolScalingConfig
from octet.config_node import ConfigNode
from octet.errors import ConfigError
from octet.safe_yaml import MAX_YAML_BYTES, YamlError, load_yaml


class ModelConfig(ConfigNode):
    """What is served."""

    path: str | None = None
    """A Hugging Face model directory; null serves the embedded model. It must exist on every node."""
    max_model_len: int | None = pydantic.Field(None, gt=0)
    """Longest prompt + answer in tokens; null takes the checkpoint's, bounded by the KV pages of either pool."""


class PoolConfig(ConfigNode):
    """One actor pool and what each of its members holds of a node."""

    size: int = pydantic.Field(1, ge=1)
    threads: int | None = pydantic.Field(None, ge=1)
    """CPU threads of each member's arithmetic; null takes `num_cpus` where that is at least 1, and otherwise
    divides the machine's cores: among all members for shards, which compute while other members wait, and else among
    the pool's own."""
    num_cpus: float = pydantic.Field(0.1, ge=0)
    """Ray CPUs per member. Fractions let the pools share a laptop."""
    num_gpus: float = pydantic.Field(0, ge=0)
    resources: dict[str, float] = pydantic.Field(default_factory=dict)
    """Custom Ray resources per member, such as `octet_prefill: 1`, to pin a pool to a node type."""
    standby: int = pydantic.Field(0, ge=0)
    """Processes that are started and loaded beyond the size, so that the pool grows, or makes up for a loss, without
    waiting for that. They hold their resources."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray's placement group lays the members out over nodes."""


class PrefillPoolConfig(PoolConfig):
    niceness: int = pydantic.Field(15, ge=0, le=19)
    """Of the threads that compute, beyond the other pools', as of `nice`, while few prompts are here, and for a decode
    worker on the same CPUs: tokens that users wait for one by one go before them, at the shards as well. 0 treats all
    alike."""
    few_prompts: int = pydantic.Field(4, ge=1)
    """With more prompts than this, a worker is as nice as the other pools: answers are computed fastest together."""


class ExpertPoolConfig(PoolConfig):
    size: int = pydantic.Field(2, ge=1)
    redundant_experts: int = pydantic.Field(0, ge=0)
    """Slots per layer beyond one for each expert, over all shards: room for replicas of the busiest."""
    slots_per_shard: int | None = pydantic.Field(None, ge=1)
    """Slots per layer that each shard has memory for; null takes as many as there are experts on CPUs, where an empty
    slot takes no memory, and on GPUs what is needed at the start. Moving experts takes free ones."""


class PoolsConfig(ConfigNode):
    prefill: PrefillPoolConfig = PrefillPoolConfig()
    decode: PoolConfig = PoolConfig()
    experts: ExpertPoolConfig = ExpertPoolConfig()


class KvConfig(ConfigNode):
    """The paged KV cache of each attention worker."""

    page_size: int = pydantic.Field(16, ge=1)
    """Tokens per page."""
    prefill_pages: int | None = pydantic.Field(None, ge=1)
    """Pages of each prefill worker; null takes as many as fit `memory_gib`."""
    decode_pages: int | None = pydantic.Field(None, ge=1)
    memory_gib: float = pydantic.Field(1.0, gt=0)
    """Memory of each attention worker's KV pages where their number is not given. It is taken at the start."""


class PrefillConfig(ConfigNode):
    chunk_tokens: int = pydantic.Field(2048, ge=1)
    """Tokens computed in one step, over all packed requests: what comes meanwhile waits for its end. With few prompts,
    while a worker steps back for running streams (`pools.prefill`), a quarter of them."""
    gather_s: float = pydantic.Field(0.001, ge=0, le=0.1)
    """How long a worker that has nothing to do waits, after each prompt that does not fill a chunk, for the next one
    of a burst: together they are computed faster. It does not wait if the last prompt before came alone. 0 starts with
    whoever comes first."""
    max_requests: int = pydantic.Field(64, ge=1)
    """Requests that may hold pages at once in one worker."""
    prefix_cache: bool = True
    """Keep the pages of prompts that were computed, as long as they are not needed, for prompts that begin alike."""


class DecodeConfig(ConfigNode):
    max_batch: int = pydantic.Field(64, ge=1)
    """Sequences advanced by one step."""
    gather_s: float = pydantic.Field(1.0, ge=0)
    """How long the first sequences of an empty batch wait for more, while the next chunk of a prefill worker on the
    same cores will bring them: a burst of answers is computed faster together. 0 starts with whoever comes first."""
    cuda_graphs: bool = True
    """On GPUs, capture a step once for each size of batch and launch it as graphs; false launches every kernel."""


class SpeculationConfig(ConfigNode):
    """Drafting with the checkpoint's MTP head. The tokens are the same with and without."""

    num_speculative_tokens: int = pydantic.Field(0, ge=0, le=16)
    """Most tokens drafted for a sequence in one decode step; 0 does without the head, and loads nothing of it."""
    adaptive: bool = True
    """Draft as many as pay, by what is accepted and what steps take, down to none; false always drafts the most."""

    @property
    def num_draft_layers(self) -> int:
        """MTP layers that are served: the first, or none."""
        return int(self.num_speculative_tokens > 0)


class LaneConfig(ConfigNode):
    timeout_s: float = pydantic.Field(30.0, gt=0)
    """Silence of a shard, or of an attention worker that owes a heartbeat, after which the lane is given up."""
    connect_s: float = pydantic.Field(60.0, gt=0)
    """Deadline for both ends of a new connection to come, once their processes are ready."""
    heartbeat_s: float = pydantic.Field(5.0, gt=0)
    """An idle attention worker tells its shards so this often; well below `timeout_s`."""
    recovery_s: float = pydantic.Field(30.0, gt=0)
    """How long the sequences of an attention worker whose lane broke wait for another one, before they fail."""
    ping_pong_rows: int | None = pydantic.Field(256, ge=2)
    """Steps of at least this many tokens are computed as two micro-batches that take turns, so that attention goes on
    while experts do; null never. Small steps lose by it: each half reads all weights. A prefill worker whose shards
    keep every core of its machine at work, beside one decode worker at most, computes its steps as a whole."""
    shared_memory: bool = True
    """Rows for a shard on the same machine lie in memory that both processes map, where they can; else, and to other
    machines, they go through the connection. On CPUs."""


class HealthConfig(ConfigNode):
    """When a member is taken for lost, though its process may still be there."""

    beat_s: float = pydantic.Field(0.2, gt=0)
    """Time between two pulses, which a process gives whatever its interpreter does; see `octet/pulse.py`."""
    silent_s: float = pydantic.Field(1.5, gt=0)
    """A process without a pulse for so long is lost, and so is one that answers nothing while none of its threads runs.
    Time in which the controller itself was not scheduled does not count."""
    period_s: float = pydantic.Field(0.5, gt=0)
    """Time between two calls that ask a member how it is."""
    timeout_s: float = pydantic.Field(10.0, gt=0)
    """How late an answer may be, of a process that is busy."""
    slow_ratio: float = pydantic.Field(3.0, gt=1)
    """A member is slow that misses so many times the beats of the others of its pool, or a shard that takes so many
    times their time for an expert."""
    slow_s: float = pydantic.Field(5.0, gt=0)
    """After so long a member is called slow, or not slow any more."""
    evict_slow_s: float | None = pydantic.Field(60.0, gt=0)
    """After so long a slow member is killed and replaced; null keeps it."""


class BalancingConfig(ConfigNode):
    """How experts follow their load from shard to shard."""

    auto: bool = False
    """Move experts when their loads have drifted; false only when it is asked for."""
    check_every_s: float = pydantic.Field(5.0, gt=0)
    """How often the loads of the telemetry window are looked at."""
    cooldown_s: float = pydantic.Field(60.0, ge=0)
    """Least time from one automatic move of experts to the next."""
    min_gain: float = pydantic.Field(0.05, ge=0, lt=1)
    """Least part of the fullest shards' load that a plan by the window's earlier half has to take away in its later."""
    min_tokens: int = pydantic.Field(4096, ge=1)
    """Least tokens of a window: fewer say little about the next."""
    max_moves: int | None = pydantic.Field(None, ge=0)
    """Most slots filled at a time, over all layers; null takes a tenth of all."""
    two_domains: bool = False
    """Keep every expert on two nodes if there are slots for it, so that the loss of one takes no expert with it; on two
    shards where all are on one node."""
    move_mib_per_s: float | None = pydantic.Field(512.0, gt=0)
    """Most MiB per second that one shard sends another; null sends as fast as it goes."""


class HandoffConfig(ConfigNode):
    lease_s: float = pydantic.Field(60.0, gt=0)
    """How long a prefill worker keeps pages for a decode worker that neither takes them nor says that it will."""
    timeout_s: float = pydantic.Field(30.0, gt=0)
    """Deadline of one part of a transfer; a prompt's pages go in parts of at most 4 MiB."""


class TlsConfig(ConfigNode):
    """PEM files on the node of the frontend. Without them gRPC is in the clear."""

    cert: str | None = None
    """The server's certificate, with the chain that signs it."""
    key: str | None = None
    client_ca: str | None = None
    """If given, clients must show a certificate signed by one of these."""

    @pydantic.model_validator(mode="after")
    def _cert_and_key_come_together(self) -> TlsConfig:
        if (self.cert is None) != (self.key is None) or (self.client_ca is not None and self.cert is None):
            raise ValueError("cert and key come together, and client_ca only with them")
        return self


class FrontendConfig(ConfigNode):
    host: str = "127.0.0.1"
    """Address that the gRPC server listens on; 0.0.0.0, or "::" with IPv6, for every interface."""
    port: int = pydantic.Field(50051, ge=0, le=65535)
    """0 picks a free one."""
    tls: TlsConfig = TlsConfig()
    max_requests: int = pydantic.Field(1024, ge=1)
    """Live requests; one more is answered RESOURCE_EXHAUSTED."""
    max_queued_tokens: int = pydantic.Field(1_000_000, ge=1)
    """Tokens of prompts that wait for their first token; a longer queue is refused likewise. One prompt always may."""
    reserve: float = pydantic.Field(0.1, ge=0, lt=0.5)
    """Share of these limits, and of the time up to a deadline, that requests of priority 0 leave to those below 0;
    those above 0 leave twice as much."""
    default_timeout_s: float = pydantic.Field(600.0, gt=0)
    """Deadline of a request whose call carries none."""
    max_attempts: int = pydantic.Field(10, ge=1)
    """How often a choice is computed again because its workers were lost or failed; preemptions do not count."""
    resume_grace_s: float = pydantic.Field(30.0, ge=0)
    """How long a resumable request runs on without a client."""
    keep_results_s: float = pydantic.Field(60.0, ge=0)
    """How long the answer of an ended request is kept, if its client gave it an id or asked for it to be resumable."""
    max_kept_results: int = pydantic.Field(1024, ge=0)
    max_kept_mib: int = pydantic.Field(64, ge=0)
    """Of all kept answers; the oldest go first."""
    max_unread_tokens: int = pydantic.Field(8192, ge=1)
    """A client that lets more than this wait is cut off."""
    max_stall_s: float = pydantic.Field(30.0, gt=0)
    """So is one that takes nothing for so long while something waits."""
    stream_interval: int = pydantic.Field(1, ge=1)
    """Tokens of a choice in a chunk of a stream, where a request does not say; the first one is always told at once. A
    chunk costs the frontend and its client as much, however many tokens are in it."""
    max_n: int = pydantic.Field(16, ge=1)
    max_logprobs: int = pydantic.Field(20, ge=0)
    max_stop_strings: int = pydantic.Field(16, ge=0)
    default_max_new_tokens: int = pydantic.Field(256, ge=1)
    """Where neither the request nor generation_config.json says."""
    max_message_mib: int = pydantic.Field(16, ge=1, le=2047)
    """Of a request or an answer; gRPC counts in 32 bits."""
    drain_s: float = pydantic.Field(30.0, ge=0)
    """How long live requests may go on after a stop is asked for."""

    @pydantic.model_validator(mode="after")
    def _a_chunk_may_wait(self) -> FrontendConfig:
        if self.stream_interval > self.max_unread_tokens:
            raise ValueError(
                f"stream_interval ({self.stream_interval}) must be at most max_unread_tokens "
                f"({self.max_unread_tokens}), or every client is cut off before its second chunk"
            )
        return self


class TelemetryConfig(ConfigNode):
    """How the router service looks at what members count. Counting itself is always on."""

    step_s: float = pydantic.Field(1.0, ge=0.1)
    """How often every member is asked; also the deadline of its answer."""
    window_s: float = pydantic.Field(60.0, gt=0)
    """Length of the sliding window, in whole steps."""
    half_life_s: float = pydantic.Field(60.0, gt=0)
    """Of the exponentially weighted means beside the window: after so long, a moment counts half."""
    silent_s: float = pydantic.Field(10.0, gt=0)
    """A member that has not answered for so long is left out, until it does again."""


class ChaosConfig(ConfigNode):
    """For tests that do harm on purpose."""

    enabled: bool = False
    """Let faults be armed in the processes; see `octet.faults`. Only for clusters whose Ray nobody else can reach."""
    audit_dir: str | None = None
    """A directory on the frontend's node, for a record of every token that is committed; null keeps none."""


class RayConfig(ConfigNode):
    address: str | None = None
    """A running Ray cluster (`auto` for this machine's); null starts one here and stops it at the end."""
    namespace: str = "octet"
    """Actors of one Octet cluster share a namespace; two clusters on one Ray need two."""
    start_timeout_s: float = pydantic.Field(300.0, gt=0)
    """Deadline for placing, loading and connecting every pool."""
    fork_workers: bool = True
    """On each node, processes are forks of one that has imported everything; false has each start by itself."""


class OctetConfig(ConfigNode):
    model: ModelConfig = ModelConfig()
    pools: PoolsConfig = PoolsConfig()
    kv: KvConfig = KvConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    lane: LaneConfig = LaneConfig()
    health: HealthConfig = HealthConfig()
    balancing: BalancingConfig = BalancingConfig()
    handoff: HandoffConfig = HandoffConfig()
    frontend: FrontendConfig = FrontendConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    autoscaler: AutoscalerConfig = AutoscalerConfig()
    chaos: ChaosConfig = ChaosConfig()
    ray: RayConfig = RayConfig()

    @pydantic.model_validator(mode="after")
    def _heartbeats_keep_lanes_alive(self) -> OctetConfig:
        if self.lane.heartbeat_s * 2 > self.lane.timeout_s:
            raise ValueError(
                f"lane.heartbeat_s ({self.lane.heartbeat_s}) must be at most half of lane.timeout_s "
                f"({self.lane.timeout_s}), or idle lanes are taken for dead ones"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _a_lost_beat_is_no_death(self) -> OctetConfig:
        health = self.health
        if health.beat_s * 4 > health.silent_s or health.silent_s > health.timeout_s:
            raise ValueError(
                f"health.beat_s ({health.beat_s}) must be at most a quarter of health.silent_s ({health.silent_s}), "
                f"and that at most health.timeout_s ({health.timeout_s}), or living members are taken for lost"
            )
        if health.period_s * 2 > health.silent_s:
            raise ValueError(
                f"health.period_s ({health.period_s}) must be at most half of health.silent_s ({health.silent_s}), or "
                "members that are not asked meanwhile are taken for lost"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _a_window_has_steps(self) -> OctetConfig:
        telemetry = self.telemetry
        if telemetry.window_s < telemetry.step_s or telemetry.silent_s < 2 * telemetry.step_s:
            raise ValueError(
                f"telemetry.step_s ({telemetry.step_s}) must be at most telemetry.window_s ({telemetry.window_s}), and "
                f"at most half of telemetry.silent_s ({telemetry.silent_s}), or answers come too late to count"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _pools_start_within_the_autoscalers_bounds(self) -> OctetConfig:
        scaler = self.autoscaler
        if not scaler.enabled:
            return self
        least = spent = 0.0
        for name in ("prefill", "decode", "experts"):
            pool: PoolConfig = getattr(self.pools, name)
            bounds: PoolScalingConfig = getattr(scaler, name)
            if not max(1, bounds.min_replicas) <= pool.size <= bounds.max_replicas:
                raise ValueError(
                    f"pools.{name}.size ({pool.size}) must lie within autoscaler.{name}.min_replicas "
                    f"({bounds.min_replicas}) and max_replicas ({bounds.max_replicas})"
                )
            least += bounds.min_replicas * (pool.num_gpus or 1)
            spent += pool.size * (pool.num_gpus or 1)
        if scaler.max_gpus is not None and max(least, spent) > scaler.max_gpus:
            raise ValueError(
                f"autoscaler.max_gpus ({scaler.max_gpus:g}) is less than the pools' sizes ({spent:g}) or minima "
                f"({least:g}) take"
            )
        return self


def load_config(
    file: pathlib.Path | None = None, overrides: Sequence[str] = (), values: Mapping[str, object] | None = None
) -> OctetConfig:
    """Build the tree from defaults, then `file` (YAML), then `overrides` (`a.b=value`, value in YAML).

    Args:
        values: by field `a.b`, after all of these, and taken as they are: a directory may be called `null`.

    Raises: ConfigError naming the field, what was found and the nearest valid name.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        tree = _read_yaml(file)
    for override in overrides:
        _set(tree, *_parsed(override))
    for path, value in (values or {}).items():
        _set(tree, path, value)
    _reject_unknown_keys(tree, OctetConfig, "")
    try:
        return OctetConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "config"
        raise _invalid(field, first["type"], first["input"], first["msg"]) from error


def _invalid(field: str, kind: str, found: object, message: str) -> ConfigError:
    """In our words rather than pydantic's."""
    if kind == "value_error":
        # A check of ours, often of several fields together.
        return ConfigError(field, "a contradiction", "fields that agree", message.removeprefix("Value error, "))
    expected = message.removeprefix("Input should be ")
    if expected.startswith(("greater", "less")):
        expected = f"a value {expected}"
    return ConfigError(field, repr(found), expected)


def _read_yaml(file: pathlib.Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(file), error.strerror, "a readable YAML file") from error
    try:
        tree = load_yaml(content)
    except YamlError as error:
        raise ConfigError(str(file), f"invalid YAML ({error})", "a YAML mapping") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(str(file), type(tree).__name__, "a YAML mapping of sections")
    return tree


def _parsed(override: str) -> tuple[str, object]:
    path, separator, text = override.partition("=")
    if not separator or not all(path.split(".")):
        raise ConfigError("--set", repr(override), "section.field=value")
    try:
        return path, load_yaml(text)
    except YamlError as error:
        raise ConfigError(path, repr(text), "a YAML value") from error


def _set(tree: dict[str, Any], path: str, value: object) -> None:
    *parents, leaf = path.split(".")
    node = tree
    for parent in parents:
        # An empty section of a file is null.
        child = node[parent] = node[parent] if node.get(parent) is not None else {}
        if not isinstance(child, dict):
            raise ConfigError(path, f"a value at '{parent}'", "a section there")
        node = child
    node[leaf] = value


def _reject_unknown_keys(tree: dict[str, Any], cls: type[pydantic.BaseModel], prefix: str) -> None:
    for key, value in tree.items():
        field = cls.model_fields.get(str(key))
        if field is None:
            near = difflib.get_close_matches(str(key)[:100], cls.model_fields, n=1, cutoff=0)
            raise ConfigError(f"{prefix}{key}" or "''", "an unknown name", f"one of {', '.join(cls.model_fields)}",
                              f"did you mean '{prefix}{near[0]}'?")  # fmt: skip
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            if value is None:
                tree[key] = {}
            elif isinstance(value, dict):
                _reject_unknown_keys(value, field.annotation, f"{prefix}{key}.")
