"""A user's own reward function, from `module:function` or `path/file.py:function`."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rltok.config import ConfigError, build, check_keys, suggestion

GIVEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""Parameters that the trainer fills; every other named one with a default may be set as an option."""


def load_function(reference: str, base_dir: Path, path: str) -> Callable[..., Any]:
    """The object that `module:name` or `file.py:name` names.

    Args:
        reference: a file is relative to `base_dir` and loaded under a name of its own, so a file called
            `rewards.py` shadows nothing. A module is imported as usual, with `base_dir` searched last.
        base_dir: usually the directory of the recipe.
        path: key path of the setting, for messages.

    Raises:
        ConfigError: no such file, module or name, or the file fails to load.
    """
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise ConfigError(f"{path}: {reference!r} is not `module:function` or `path/file.py:function`", path)
    with _searched_last(base_dir):
        module = _load_file(base_dir, source, path) if source.endswith(".py") else _load_module(source, path)
    found = getattr(module, name, None)
    if found is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(f"{path}: {source} has no {name!r}{suggestion(name, public)}", path)
    if not callable(found):
        raise ConfigError(f"{path}: {reference!r} is a {type(found).__name__}, not a function", path)
    return found


def bind_options(function: Callable[..., Any], options: Mapping[str, Any], path: str) -> Callable[..., Any]:
    """`function` with `options` set; a dataclass is instantiated with them.

    Raises:
        ConfigError: an option that is not a parameter with a default (or keyword-only parameter) of the function.
    """
    if inspect.isclass(function):
        if not dataclasses.is_dataclass(function):
            raise ConfigError(f"{path}: {function.__name__} is a class; give a function or a dataclass", path)
        reward: Any = build(function, options, path)
        return reward
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if _is_option(p)]
    check_keys(options, ["function", "weight", *named], path)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if not options and takes_all:
        return function
    accepted = None if takes_all else frozenset(p.name for p in parameters)
    kind = _AsyncBound if inspect.iscoroutinefunction(function) else _Bound
    return kind(function, tuple(options.items()), accepted)


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with its options; one without `**kwargs` gets only the arguments that it names."""

    function: Callable[..., Any]
    options: tuple[tuple[str, Any], ...]
    accepted: frozenset[str] | None

    @property
    def __name__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def __call__(self, **arguments: Any) -> Any:
        return self.function(**self.merged(arguments))

    def merged(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the trainer and options together."""
        clash = [name for name, _ in self.options if name in arguments]
        if clash:
            raise ValueError(f"{clash[0]!r} is both an option of {self.__name__} and a column of the data; rename one")
        kept = {k: v for k, v in arguments.items() if self.accepted is None or k in self.accepted}
        return {**kept, **dict(self.options)}


class _AsyncBound(_Bound):
    async def __call__(self, **arguments: Any) -> Any:
        return await self.function(**self.merged(arguments))


def _is_option(parameter: inspect.Parameter) -> bool:
    if parameter.name in GIVEN or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return False
    return parameter.kind is parameter.KEYWORD_ONLY or parameter.default is not parameter.empty


def _load_file(base_dir: Path, source: str, path: str) -> ModuleType:
    file = (base_dir / Path(source).expanduser()).resolve()
    if not file.is_file():
        raise ConfigError(f"{path}: there is no file {str(file)!r} ({source!r} is relative to {str(base_dir)!r})", path)
    digest = hashlib.sha256(str(file).encode() + b"\n" + file.read_bytes()).hexdigest()[:12]
    name = f"rltok_user_{digest}_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by its name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ConfigError(f"{path}: {source} cannot be loaded: {type(error).__name__}: {error}", path) from error
    return module


def _load_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        hint = f"; for a file write {name}.py:function" if isinstance(error, ModuleNotFoundError) else ""
        message = f"{path}: module {name!r} cannot be imported: {type(error).__name__}: {error}{hint}"
        raise ConfigError(message, path) from error


@contextmanager
def _searched_last(directory: Path) -> Iterator[None]:
    """Imports also look into `directory`, after everything that is installed."""
    entry = str(directory.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        if sys.path and sys.path[-1] == entry:
            sys.path.pop()
        else:
            sys.path.remove(entry)
