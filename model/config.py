"""The architecture of a Glm4Moe checkpoint, from its `config.json` and `generation_config.json`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

from octet.errors import CheckpointError
from octet.interval import Interval
from octet.request import SAMPLING_RANGES

ARCHITECTURE = "Glm4MoeForCausalLM"
CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_MAX_INTEGER = 2**31 - 1
_MAX_EXPERTS = 2**17
"""Over all layers. Each tensor's name is made before the files are looked at."""
_MAX_LAYERS = 2**12
_MAX_FILE_BYTES = 256 * 2**20
_FINITE, _POSITIVE = Interval(), Interval(0, above_low=True)
_YARN = Interval(1e-6, 1e6)
"""Its numbers, whose quotients and logarithms are to be finite."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the first `partial_rotary_factor · head_dim` dims of a head."""

    rope_type: str
    theta: float
    partial_rotary_factor: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The fields of `config.json` that the arithmetic depends on, under their Hugging Face names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    use_qk_norm: bool
    attention_bias: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_nextn_predict_layers: int
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @property
    def moe_layers(self) -> range:
        """The layers whose feed-forward is a mixture of experts."""
        return range(min(self.first_k_dense_replace, self.num_hidden_layers), self.num_hidden_layers)

    @property
    def mtp_layers(self) -> range:
        """The multi-token-prediction layers, which sit behind the last decoder layer."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def expert_layers(self, num_draft_layers: int) -> range:
        """The layers with routed experts that a cluster serves.

        Args:
            num_draft_layers: MTP layers that draft, 1 with speculation and 0 without.
        """
        return range(self.moe_layers.start, self.num_hidden_layers + num_draft_layers)

    def kv_bytes_per_token(self, element_bytes: int, num_draft_layers: int) -> int:
        """Keys and values of one token over all decoder layers, and over those that draft."""
        num_layers = self.num_hidden_layers + num_draft_layers
        return 2 * num_layers * self.num_key_value_heads * self.head_dim * element_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a request that leaves a field out gets, from `generation_config.json`.

    As in `transformers`, `do_sample` false or absent is greedy decoding.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


def read_config(model_dir: pathlib.Path) -> ModelConfig:
    """Read and check `config.json`; end-of-sequence ids of `generation_config.json` are added to its own, and those
    beyond the vocabulary, which no token ever is, are left out.

    A field left out has the default of `transformers`' `Glm4MoeConfig`, but for sizes, which have to be there: of the
    vocabulary, of rows and of experts, and how many layers, heads and experts there are.

    Raises: CheckpointError naming the field, what was found and what is supported.
    """
    fields = _Fields(CONFIG_FILE, read_json(model_dir / CONFIG_FILE))
    architectures = fields.raw.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise fields.error("architectures", architectures, f"['{ARCHITECTURE}']", "serve a Glm4Moe checkpoint")
    activation = fields.raw.get("hidden_act", "silu")
    if activation != "silu":
        raise fields.error("hidden_act", activation, "'silu'", "other activations are not implemented")
    quantization = fields.raw.get("quantization_config")
    if quantization is not None:
        raise fields.error("quantization_config", quantization, "none", "use the fp32, bf16 or fp16 checkpoint")
    hidden_size, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", default=hidden_size // max(num_heads, 1))
    max_positions = fields.integer("max_position_embeddings", default=131072)
    vocab_size = fields.integer("vocab_size")
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers"),
        num_attention_heads=num_heads,
        num_key_value_heads=fields.integer("num_key_value_heads", default=8),
        head_dim=head_dim,
        n_routed_experts=fields.integer("n_routed_experts"),
        num_experts_per_tok=fields.integer("num_experts_per_tok", default=8),
        n_shared_experts=fields.integer("n_shared_experts", default=1),
        first_k_dense_replace=fields.integer("first_k_dense_replace", default=1, minimum=0),
        n_group=fields.integer("n_group", default=1),
        topk_group=fields.integer("topk_group", default=1),
        norm_topk_prob=fields.boolean("norm_topk_prob", default=True),
        routed_scaling_factor=fields.number("routed_scaling_factor", default=1.0),
        use_qk_norm=fields.boolean("use_qk_norm", default=False),
        attention_bias=fields.boolean("attention_bias", default=False),
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-5, within=_POSITIVE),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        max_position_embeddings=max_positions,
        num_nextn_predict_layers=fields.integer("num_nextn_predict_layers", default=1, minimum=0),
        rope=_read_rope(fields, max_positions),
        eos_token_ids=tuple(token_id for token_id in _read_eos(model_dir, fields) if token_id < vocab_size),
    )
    _check_shapes(config, fields)
    return config


def read_generation_defaults(model_dir: pathlib.Path) -> GenerationDefaults:
    """Raises: CheckpointError."""
    file = model_dir / GENERATION_FILE
    if not file.exists():
        return GenerationDefaults()
    fields = _Fields(GENERATION_FILE, read_json(file))
    sampled = fields.boolean("do_sample", default=False)
    max_new_tokens = fields.raw.get("max_new_tokens")

    def number(field: str, default: float) -> float:
        return fields.number(field, default=default, within=SAMPLING_RANGES[field])

    return GenerationDefaults(
        temperature=number("temperature", 1.0) if sampled else 0.0,
        top_p=number("top_p", 1.0),
        top_k=fields.integer("top_k", default=0, minimum=0),
        min_p=number("min_p", 0.0),
        repetition_penalty=number("repetition_penalty", 1.0),
        max_new_tokens=None if max_new_tokens is None else fields.integer("max_new_tokens"),
    )


def _read_rope(fields: _Fields, max_positions: int) -> RopeConfig:
    """Accepts `rope_parameters` (nested, newer) and `rope_theta` + `rope_scaling` (flat, older).

    Where both are given `rope_scaling` holds, as in `transformers`.
    """
    source = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    nested = fields.raw.get(source) or {}
    if not isinstance(nested, dict):
        raise fields.error(source, repr(nested), "a mapping")
    rope = _Fields(CONFIG_FILE, {**fields.raw, **nested}, prefix=f"{source}." if nested else "")
    rope_type = nested.get("rope_type", nested.get("type", "default"))
    if rope_type not in ("default", "yarn"):
        raise rope.error("rope_type", repr(rope_type), "'default' or 'yarn'", "other scalings are not implemented")
    partial = rope.number("partial_rotary_factor", default=0.5, within=Interval(0, 1, above_low=True))
    theta = rope.number("rope_theta", default=10000.0, within=Interval(1, above_low=True))
    if rope_type == "default":
        return RopeConfig(rope_type="default", theta=theta, partial_rotary_factor=partial)
    original = rope.integer("original_max_position_embeddings", default=max_positions)
    attention_factor, mscale, mscale_all_dim = (
        None if rope.raw.get(name) is None else rope.number(name)
        for name in ("attention_factor", "mscale", "mscale_all_dim")
    )
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        partial_rotary_factor=partial,
        factor=rope.number("factor", default=max_positions / original, within=_YARN),
        original_max_position_embeddings=original,
        beta_fast=rope.number("beta_fast", default=32.0, within=_YARN),
        beta_slow=rope.number("beta_slow", default=1.0, within=_YARN),
        attention_factor=attention_factor,
        mscale=mscale,
        mscale_all_dim=mscale_all_dim,
        truncate=rope.boolean("truncate", default=True),
    )


def _read_eos(model_dir: pathlib.Path, fields: _Fields) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    sources = [fields]
    if (model_dir / GENERATION_FILE).exists():
        sources.append(_Fields(GENERATION_FILE, read_json(model_dir / GENERATION_FILE)))
    for source in sources:
        value = source.raw.get("eos_token_id")
        values = [] if value is None else value if isinstance(value, list) else [value]
        for token_id in values:
            if type(token_id) is not int or not 0 <= token_id <= _MAX_INTEGER:
                raise source.error("eos_token_id", value, "a token id or a list of them")
            ids[token_id] = None
    return tuple(ids)


def _check_shapes(config: ModelConfig, fields: _Fields) -> None:
    num_layers = config.num_hidden_layers + config.num_nextn_predict_layers
    if num_layers > _MAX_LAYERS:
        raise fields.error("num_hidden_layers", num_layers, f"at most {_MAX_LAYERS} layers, with those for drafting")
    if num_layers * config.n_routed_experts > _MAX_EXPERTS:
        found = f"{config.n_routed_experts} in each of {num_layers} layers"
        raise fields.error("n_routed_experts", found, f"at most {_MAX_EXPERTS} experts over all layers")
    if config.num_attention_heads % config.num_key_value_heads:
        raise fields.error(
            "num_key_value_heads", config.num_key_value_heads, f"a divisor of {config.num_attention_heads} query heads"
        )
    rotary_dim = int(config.head_dim * config.rope.partial_rotary_factor)
    if rotary_dim % 2 or rotary_dim == 0:
        expected = "an even number of rotated dims (head_dim × partial_rotary_factor)"
        raise fields.error("head_dim", config.head_dim, expected)
    if config.n_routed_experts % config.n_group:
        raise fields.error(
            "n_routed_experts", config.n_routed_experts, f"a multiple of n_group ({config.n_group})", "fix n_group"
        )
    per_group = config.n_routed_experts // config.n_group
    if config.n_group > 1 and per_group < 2:
        raise fields.error("n_group", config.n_group, "at least two experts per group")
    if config.topk_group > config.n_group:
        raise fields.error("topk_group", config.topk_group, f"at most n_group ({config.n_group})")
    eligible = per_group * config.topk_group
    if config.num_experts_per_tok > eligible:
        raise fields.error(
            "num_experts_per_tok", config.num_experts_per_tok, f"at most the {eligible} experts a token may choose from"
        )


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The JSON object in one of a model directory's files. Raises: CheckpointError."""
    try:
        value = json.loads(read_bytes(file).decode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file.name, "", f"invalid JSON ({error})", "a JSON object") from error
    if not isinstance(value, dict):
        raise CheckpointError(file.name, "", f"a JSON {type(value).__name__}", "a JSON object")
    return value


def read_text(file: pathlib.Path) -> str:
    """Raises: CheckpointError."""
    try:
        return read_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(file.name, "", error, "UTF-8 text") from error


def read_bytes(file: pathlib.Path) -> bytes:
    """What is in one of a model directory's files beside the weights, if it is a file and of a likely size.

    Raises: CheckpointError.
    """
    try:
        # Whoever opens a pipe waits for somebody to write to it.
        if not file.is_file() and file.exists():
            raise CheckpointError(file.name, "", "something that is no file", "a readable file")
        with file.open("rb") as opened:
            content = opened.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        found, fix = getattr(error, "strerror", None) or error, f"look in {file.parent}"
        raise CheckpointError(file.name, "", found, "a readable file", fix) from error
    if len(content) > _MAX_FILE_BYTES:
        raise CheckpointError(file.name, "", f"more than {_MAX_FILE_BYTES} bytes", "a file of a likely size")
    return content


class _Fields:
    """Typed access to a JSON object, with errors that name file and field."""

    def __init__(self, file: str, raw: dict[str, Any], prefix: str = "") -> None:
        self.raw, self._file, self._prefix = raw, file, prefix

    def error(self, field: str, found: object, expected: str, fix: str = "") -> CheckpointError:
        return CheckpointError(self._file, self._prefix + field, found, expected, fix)

    def integer(self, field: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self._get(field, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(field, repr(value), f"an integer ≥ {minimum}")
        if value > _MAX_INTEGER:
            raise self.error(field, repr(value), f"an integer of at most {_MAX_INTEGER}")
        return value

    def number(self, field: str, *, default: float | None = None, within: Interval = _FINITE) -> float:
        value = self._get(field, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(field, repr(value), str(within))
        # JSON knows integers that no float holds.
        if not abs(value) <= sys.float_info.max or value not in within:
            raise self.error(field, repr(value), str(within))
        return float(value)

    def boolean(self, field: str, *, default: bool) -> bool:
        value = self._get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, repr(value), "true or false")
        return value

    def _get(self, field: str, default: object) -> object:
        value = self.raw.get(field)
        value = default if value is None else value
        if value is None:
            raise self.error(field, "nothing", "a value")
        return value
