"""What a pickled file would call, found without loading it, and checkpoints whose files call nothing but tensors.

transformers resumes with `weights_only=True`, where torch refuses everything else by itself, but its message does not
name the file. DeepSpeed (`torch.load(weights_only=False)`) and torch's distributed checkpoints (`pickle.load` of
`.metadata`, `torch.load(weights_only=False)` of what is no tensor) call whatever the file says. All kinds are read here
first by an unpickler for which every name is an inert stand-in: it runs nothing, and a pickle is a straight line of
instructions, so the names it has asked for are all that a real load would ask for.

A manifest in a checkpoint (`rltok.trainers.checkpoint`) does not help here: whoever writes the files writes it too.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rltok.config import ConfigError

SUFFIXES = (".pt", ".pth", ".bin")
"""Of files that are made by `torch.save`."""
NEVER_READ = ("training_args.bin",)
"""Files that transformers writes and nobody reads."""
DCP_METADATA = ".metadata"
"""Of torch's distributed checkpoints (FSDP with sharded states)."""

_TENSORS = re.compile(
    r"torch\.(\w*Storage|Size|device|bool|u?int\d+|float\d+\w*|bfloat16|complex\d+|Tensor|dtype)"
    r"|torch\.storage\.(\w*Storage)"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|device_tensor_from_numpy)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter"
    r"|torch\.serialization\._get_layout"
    r"|collections\.(OrderedDict|defaultdict|Counter)"
    r"|builtins\.(set|frozenset|dict|list|tuple|int|float|str|bool|bytes|bytearray|complex|slice)"
    r"|_codecs\.encode|pathlib\.(Pure)?PosixPath"
    r"|numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+DType"
)
"""Names that build tensors, arrays and containers."""
_DEEPSPEED = re.compile(
    r"deepspeed\.runtime\.fp16\.loss_scaler\.(LossScaler|DynamicLossScaler)"
    r"|deepspeed\.utils\.tensor_fragment\.fragment_address"
    r"|deepspeed\.runtime\.zero\.config\.ZeroStageEnum"
)
"""Plain records in DeepSpeed's files."""
_DCP = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|TensorStorageMetadata|BytesStorageMetadata"
    r"|ChunkStorageMetadata|TensorProperties|StorageMeta|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\.(_StorageInfo|_StorageWriterTransforms)"
)
"""Plain records in the metadata of torch's distributed checkpoints."""


def names_in(file: Path) -> set[str]:
    """Every `module.name` that loading a pickled file would look up; nothing of the file is run.

    Args:
        file: made by `torch.save` in its zip format, or one plain pickle.

    Raises:
        pickle.UnpicklingError: the file cannot be followed to its end, so nothing is known of it.
    """
    return _names(file.read_bytes() if file.name == DCP_METADATA else file)


def _names(source: Path | bytes, is_zip: bool = False) -> set[str]:
    names: set[str] = set()
    try:
        plain = isinstance(source, bytes) and not is_zip
        stream = source if plain else _pickle_in_zip(source)
        _Inert(io.BytesIO(stream), names).load()  # type: ignore[arg-type]
    except Exception as error:  # a crafted stream may fail anywhere in the unpickler
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    return names


def refuse_code(checkpoint: str | Path) -> None:
    """Refuse a checkpoint with a file that would call anything but what builds tensors and plain records.

    Reads the pickled part of every file that a resume reads, also of those that DeepSpeed and FSDP write, and no
    tensor data: milliseconds.

    Raises:
        ConfigError: names the file and what it would call.
    """
    for file in _read_on_resume(Path(checkpoint)):
        try:
            _refuse_calls(file, names_in(file))
            for names in _objects_beside(file) if file.name == DCP_METADATA else ():
                _refuse_calls(file, names)
        except pickle.UnpicklingError as error:
            raise _refused(file, f"it cannot be checked ({error})") from error


def _refuse_calls(file: Path, names: set[str]) -> None:
    calls = sorted(name for name in names if not _is_data(name))
    if calls:
        raise _refused(file, f"loading it would call {', '.join(calls[:3])}")


def load_tensors(file: str | Path, **options: Any) -> Any:
    """`torch.load` of tensors and plain values alone.

    Args:
        file: made by `torch.save`.
        options: of `torch.load`, such as `map_location` and `mmap`.

    Raises:
        ConfigError: the file is damaged or holds anything else; names it.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise _refused(Path(file), reason) from error


def _refused(file: Path, reason: str) -> ConfigError:
    return ConfigError(
        f"resume: {file} is not loaded: {reason}. It was not written by rltok, or was changed since; start a new run "
        "from the weights (model.path) if you trust those",
        "resume",
    )


def _is_data(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_TENSORS, _DEEPSPEED, _DCP))


def _read_on_resume(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name not in NEVER_READ and (file.suffix in SUFFIXES or file.name == DCP_METADATA):
            yield file


def _objects_beside(metadata: Path) -> Iterator[set[str]]:
    """Names in the objects that a distributed checkpoint of torch keeps beside its tensors, in `.distcp` files."""
    try:
        about = pickle.loads(metadata.read_bytes())  # its names have been checked
        for index, place in about.storage_data.items():
            if type(about.state_dict_metadata.get(index.fqn)).__name__ == "TensorStorageMetadata":
                continue  # read with weights_only=True
            with (metadata.parent / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                yield _names(file.read(place.length), is_zip=True)
    except (AttributeError, TypeError, ValueError, OSError) as error:
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def _pickle_in_zip(source: Path | bytes) -> bytes:
    """The pickle in what `torch.save` wrote, as torch itself finds it."""
    data: Any = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with data:
        if data.read(4) != b"PK\x03\x04":
            raise ValueError("not the zip format of torch.save")
        data.seek(0)
        reader: Any = torch._C.PyTorchFileReader(data)
        if reader.has_record("constants.pkl"):
            raise ValueError("a TorchScript archive")
        return reader.get_record("data.pkl")


class _StandIn:
    """Takes part in any instruction of a pickle and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> _StandIn:
        return _StandIn()

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None:
        """As of a list."""

    def extend(self, _: Any) -> None:
        """As of a list."""

    def add(self, _: Any) -> None:
        """As of a set."""


class _Inert(pickle.Unpickler):
    """Collects the names that a pickle asks for and gives it stand-ins."""

    def __init__(self, stream: io.BytesIO, names: set[str]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        """Nothing is imported."""
        self._names.add(f"{module}.{name}")
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        """A stand-in for a tensor's storage."""
        return _StandIn()

    def get_extension(self, code: int) -> Any:
        """No registered extension is taken for granted."""
        raise pickle.UnpicklingError(f"extension code {code}")
