"""A model directory's safetensors: checked as a whole before anything is loaded, then read tensor by tensor."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import safetensors
import torch

from model.census import (
    Shapes,
    duplicate_tensors,
    is_gate_tensor,
    mtp_tensors,
    optional_mtp_tensors,
    required_tensors,
)
from model.config import ARCHITECTURE, CONFIG_FILE, ModelConfig, read_config, read_json
from model.load_progress import LoadProgress
from octet.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FILE_NAME = re.compile(r"\w[\w.+-]*\.safetensors", re.ASCII)
_DOWNLOAD_AGAIN = "copy or download the checkpoint again"
_OTHER_CONFIG = f"check that {CONFIG_FILE} belongs to these weights"
_MAX_MAPPED_BYTES = 32 << 20
_MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is, without its data."""

    file: str
    position: int
    """Its place among the file's tensors in the order of their bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dim, as stored."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes as stored."""
        return self.shape[0] * self.row_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checked model directory. It holds no tensor and no open file, and may be read from several threads."""

    config: ModelConfig
    model_dir: pathlib.Path
    has_mtp: bool
    """Whether the MTP layers that the config announces are there; `transformers` leaves them out when it saves."""
    tensors: Mapping[str, TensorInfo]
    """Every tensor of the directory, by its Hugging Face name."""

    @classmethod
    def open(cls, model_dir: pathlib.Path) -> Checkpoint:
        """Check that the directory holds exactly the tensors its `config.json` calls for. Only headers are read.

        `model.safetensors` is taken if it is there, else `model.safetensors.index.json` and the files it names.

        Raises: CheckpointError naming file and tensor if a file is missing or damaged, the index and its files
            disagree, a tensor is missing, unknown, of the wrong shape or neither F32, BF16 nor F16, or only a part of
            the MTP layers is there.
        """
        config = read_config(model_dir)
        if (model_dir / WEIGHTS_FILE).exists():
            listing, tensors = WEIGHTS_FILE, _scan_file(model_dir, WEIGHTS_FILE)
        elif (model_dir / INDEX_FILE).exists():
            listing, tensors = INDEX_FILE, _scan_index(model_dir)
        else:
            raise CheckpointError(WEIGHTS_FILE, "", "no such file", f"it or {INDEX_FILE}", f"look in {model_dir}")
        has_mtp = _check_tensors(config, listing, tensors)
        return cls(config=config, model_dir=model_dir, has_mtp=has_mtp, tensors=types.MappingProxyType(tensors))

    def read(
        self,
        names: Iterable[str],
        dtype: torch.dtype,
        into: Mapping[str, torch.Tensor] | None = None,
        progress: LoadProgress | None = None,
    ) -> dict[str, torch.Tensor]:
        """Load only the named tensors, each into memory of its own.

        The files are mapped a few MiB at a time and unmapped again, so that memory peaks near the size of the result.

        Args:
            dtype: of the tensors made here; the gates' (`census.is_gate_tensor`) are fp32 nevertheless.
            into: destinations by name, on any device. What is listed here is copied straight to its place and takes
                the destination's dtype; what is not, is made on the CPU. Names that were not asked for are ignored.
            progress: told before the first tensor what is to come, and then of each piece.
        Returns: the asked-for tensors, the destinations themselves where given. After an error their contents are
            undefined.
        Raises: CheckpointError for a name that the checkpoint lacks or a file that changed since it was opened;
            ValueError for a destination of the wrong shape.
        """
        names = tuple(dict.fromkeys(names))
        infos = {name: self._info(name) for name in names}
        given = into or {}
        tensors = {name: _destination(name, info, dtype, given.get(name)) for name, info in infos.items()}
        if progress is not None:
            progress.expect(len(infos), sum(info.num_bytes for info in infos.values()))
        for file, pieces in _groups(infos):
            self._copy(file, pieces, tensors, progress)
        return tensors

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(str(self.model_dir), name, "nothing", "a tensor of this name")
        return self.tensors[name]

    def _copy(
        self, file: str, pieces: list[_Piece], tensors: Mapping[str, torch.Tensor], progress: LoadProgress | None
    ) -> None:
        try:
            with _open(self.model_dir / file) as opened, torch.no_grad():
                for piece in pieces:
                    piece.copy(opened, tensors[piece.name])
                    if progress is not None:
                        progress.advance(int(piece.is_last), piece.num_bytes)
        except (OSError, safetensors.SafetensorError) as error:
            raise _damaged(self.model_dir / file, error) from error


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Rows of a tensor that are copied at once: a tensor larger than the mapping limit is cut."""

    name: str
    info: TensorInfo
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * self.info.row_bytes

    @property
    def is_last(self) -> bool:
        return self.stop == self.info.shape[0]

    def copy(self, opened: Any, destination: torch.Tensor) -> None:
        source = opened.get_slice(self.name)
        shape = tuple(source.get_shape())
        if shape != self.info.shape:
            expected = f"{list(self.info.shape)}, as when it was opened"
            raise CheckpointError(self.info.file, self.name, list(shape), expected, "restart to check it again")
        destination[self.start : self.stop].copy_(source[self.start : self.stop])


def _groups(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, list[_Piece]]]:
    """Files with the pieces to copy while mapped once, in the order of their bytes.

    Touched pages of a mapping count as resident until it is closed, hence the limit per mapping.
    """
    ordered = sorted(infos.items(), key=lambda item: (item[1].file, item[1].position))
    for file, items in itertools.groupby(ordered, key=lambda item: item[1].file):
        group: list[_Piece] = []
        group_bytes = 0
        for piece in itertools.chain.from_iterable(_cut(name, info) for name, info in items):
            if group and group_bytes + piece.num_bytes > _MAX_MAPPED_BYTES:
                yield file, group
                group, group_bytes = [], 0
            group.append(piece)
            group_bytes += piece.num_bytes
        yield file, group


def _cut(name: str, info: TensorInfo) -> Iterator[_Piece]:
    num_rows = max(_MAX_MAPPED_BYTES // info.row_bytes, 1)
    for start in range(0, info.shape[0], num_rows):
        yield _Piece(name=name, info=info, start=start, stop=min(start + num_rows, info.shape[0]))


def _destination(name: str, info: TensorInfo, dtype: torch.dtype, given: torch.Tensor | None) -> torch.Tensor:
    if given is None:
        return torch.empty(info.shape, dtype=torch.float32 if is_gate_tensor(name) else dtype)
    if tuple(given.shape) != info.shape:
        raise ValueError(f"destination of '{name}': found shape {list(given.shape)}, expected {list(info.shape)}")
    return given


def _scan_index(model_dir: pathlib.Path) -> dict[str, TensorInfo]:
    """Every tensor of the files that the index names. Raises: CheckpointError where the two disagree."""
    weight_map = _read_weight_map(model_dir / INDEX_FILE)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        scanned = _scan_file(model_dir, file)
        for name in scanned:
            if weight_map.get(name) != file:
                found = f"it in {file}"
                raise CheckpointError(INDEX_FILE, name, found, weight_map.get(name, "an entry for it"), _DOWNLOAD_AGAIN)
        tensors |= scanned
    for name, file in weight_map.items():
        if name not in tensors:
            raise CheckpointError(INDEX_FILE, name, f"no such tensor in {file}", f"it in {file}", _DOWNLOAD_AGAIN)
    return tensors


def _read_weight_map(path: pathlib.Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        found = f"a {type(weight_map).__name__}" if weight_map else "nothing"
        raise CheckpointError(INDEX_FILE, "weight_map", found, "a mapping of tensor to file name", _DOWNLOAD_AGAIN)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            expected = "the plain name of a .safetensors file in the model directory"
            raise CheckpointError(INDEX_FILE, name, repr(file), expected)
    return weight_map


def _scan_file(model_dir: pathlib.Path, file: str) -> dict[str, TensorInfo]:
    """The file's tensors, in the order of their bytes."""
    path = model_dir / file
    # Whoever opens a pipe waits for somebody to write to it.
    if path.exists() and not path.is_file():
        raise CheckpointError(file, "", "something that is no file", "a readable safetensors file")
    try:
        with _open(model_dir / file) as opened:
            return {
                name: _describe(file, name, position, opened.get_slice(name))
                for position, name in enumerate(opened.offset_keys())
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise _damaged(model_dir / file, error) from error


def _describe(file: str, name: str, position: int, header: Any) -> TensorInfo:
    dtype = header.get_dtype()
    if dtype not in _DTYPES:
        expected = "F32, BF16 or F16"
        raise CheckpointError(file, name, f"dtype {dtype}", expected, "serve the checkpoint in one of them")
    return TensorInfo(file=file, position=position, shape=tuple(header.get_shape()), dtype=_DTYPES[dtype])


def _open(path: pathlib.Path) -> Any:
    opened: Any = safetensors.safe_open
    return opened(path, framework="pt", device="cpu")


def _check_tensors(config: ModelConfig, listing: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the MTP layers are there. Raises: CheckpointError."""
    required, mtp, optional = required_tensors(config), mtp_tensors(config), optional_mtp_tensors(config)
    known = required | mtp | optional | duplicate_tensors(config)
    unknown = [name for name in tensors if name not in known]
    if unknown:
        found = f"a tensor that the model does not have{_others(unknown)}"
        raise CheckpointError(
            tensors[unknown[0]].file, unknown[0], found, f"the tensors of {ARCHITECTURE}", _OTHER_CONFIG
        )
    _check_present(listing, required, tensors, _OTHER_CONFIG)
    has_mtp = any(name in tensors for name in mtp | optional)
    if has_mtp:
        _check_present(listing, mtp, tensors, "the MTP layers must be there with all their tensors, or with none")
    for name, info in tensors.items():
        if info.shape != known[name]:
            found, expected = f"shape {list(info.shape)}", f"{list(known[name])}, from {CONFIG_FILE}"
            raise CheckpointError(info.file, name, found, expected, _OTHER_CONFIG)
    return has_mtp


def _check_present(listing: str, shapes: Shapes, tensors: Mapping[str, TensorInfo], fix: str) -> None:
    missing = [name for name in shapes if name not in tensors]
    if missing:
        expected = f"a tensor of shape {list(shapes[missing[0]])}"
        raise CheckpointError(listing, missing[0], f"nothing{_others(missing)}", expected, fix)


def _others(names: list[str]) -> str:
    return f" (and so for {len(names) - 1} others)" if len(names) > 1 else ""


def _damaged(path: pathlib.Path, error: Exception) -> CheckpointError:
    """Says by how much a file is too short or too long, where its header tells."""
    if isinstance(error, OSError):
        found = error.strerror or str(error)
        return CheckpointError(path.name, "", found, "a readable safetensors file", f"look in {path.parent}")
    found, expected = f"damaged contents ({error})", "a safetensors file"
    try:
        size_bytes, expected_bytes = path.stat().st_size, _expected_bytes(path)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return CheckpointError(path.name, "", found, expected, _DOWNLOAD_AGAIN)
    if size_bytes != expected_bytes:
        found, expected = f"{size_bytes} bytes", f"{expected_bytes} bytes, by its own header"
    return CheckpointError(path.name, "", found, expected, _DOWNLOAD_AGAIN)


def _expected_bytes(path: pathlib.Path) -> int:
    """The size that a safetensors file should have, by as much of its header as is there.

    Raises: ValueError, TypeError, LookupError or AttributeError if it is no safetensors header.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > _MAX_HEADER_BYTES:
            raise ValueError("no header")
        header = file.read(header_bytes)
    start = len(prefix) + header_bytes
    if len(header) < header_bytes:
        return start
    entries: dict[str, Any] = json.loads(header)
    ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    if not all(isinstance(end, int) for end in ends):
        # JSON has fractions, and Python's reads infinities.
        raise TypeError("offsets that are no whole numbers")
    return start + max(ends, default=0)
