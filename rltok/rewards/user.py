"""A user's own reward function, from `module:function` or `path/file.py:function`.

It is code, and it runs: when a run, an evaluation or `rltok generate --reward` starts. Where a recipe is only looked at
(`rltok check`, `rltok compare --dry-run`, `rltok report`) its file is parsed instead, by `check_function`.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
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
    source, name = _parts(reference, path)
    with _searched_last(base_dir):
        module = _load_file(base_dir, source, path) if source.endswith(".py") else _load_module(source, path)
    found = getattr(module, name, None)
    if found is None:
        public = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ConfigError(f"{path}: {source} has no {name!r}{suggestion(name, public)}", path)
    if not callable(found):
        raise ConfigError(f"{path}: {reference!r} is a {type(found).__name__}, not a function", path)
    return found


def check_function(reference: str, options: Mapping[str, Any], base_dir: Path, path: str) -> None:
    """Check a reference and its options as far as the text of the file tells; nothing of it is imported or run.

    What is decorated, made at run time or imported from elsewhere is taken for granted here and checked by
    `load_function` and `bind_options`, when a run starts.

    Args:
        reference: as `load_function` takes it.
        options: as `bind_options` takes them.
        base_dir: usually the directory of the recipe.
        path: key path of the reward, for messages.

    Raises:
        ConfigError: no such file, module or name, a file that is not Python, or an option that the function lacks.
    """
    where = f"{path}.function"
    source, name = _parts(reference, where)
    file = _user_file(base_dir, source, where) if source.endswith(".py") else _module_file(source, base_dir, where)
    if file is None:
        return
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{where}: {source} cannot be loaded: {type(error).__name__}: {error}", where) from error
    found, is_whole = _top_level(tree)
    if name not in found:
        if is_whole:
            public = [n for n, node in found.items() if isinstance(node, _DEFINITIONS) and not n.startswith("_")]
            raise ConfigError(f"{where}: {source} has no {name!r}{suggestion(name, public)}", where)
        return
    node = found[name]
    if isinstance(node, ast.Constant):
        raise ConfigError(f"{where}: {reference!r} is a {type(node.value).__name__}, not a function", where)
    named = _named_options(node)
    if named is not None:
        check_keys(options, ["function", "weight", *named], path)


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_BINDERS = frozenset({"globals", "locals", "vars", "setattr", "exec", "eval"})
"""What may bind names that the text does not show."""


def _top_level(tree: ast.Module) -> tuple[dict[str, ast.AST], bool]:
    """Name -> what the text of a module binds it to, and whether these are surely all its names.

    A name that is bound twice, as in the branches of an `if`, is bound to nothing that can be looked at.
    """
    bound: list[tuple[str, ast.AST]] = []
    is_whole = True
    for node in _statements(tree.body):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                bound.append((name, node))
                is_whole &= name != "__getattr__"
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                bound += [((alias.asname or alias.name).split(".")[0], node) for alias in names]
                is_whole &= all(alias.name != "*" for alias in names)
            case ast.Assign(targets=targets, value=value):
                parts = [part for target in targets for part in ast.walk(target)]
                bound += [(part.id, value) for part in parts if isinstance(part, ast.Name)]
                is_whole &= not any(isinstance(part, ast.Subscript) for part in parts)
            case ast.AnnAssign(target=ast.Name(id=name)):
                bound.append((name, node.value or node))
            case ast.Expr(value=call):
                is_whole &= not any(isinstance(part, ast.Name) and part.id in _BINDERS for part in ast.walk(call))
    times = Counter(name for name, _ in bound)
    return {name: node if times[name] == 1 else ast.Pass() for name, node in bound}, is_whole


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, with those in the branches of if, try, with and loops."""
    for node in body:
        yield node
        if not isinstance(node, _DEFINITIONS):
            for inner in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _named_options(node: ast.AST) -> list[str] | None:
    """Options of a plain function, as `bind_options` counts them; None where the text does not tell."""
    if (
        not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or node.decorator_list
        or node.args.kwarg is not None
    ):
        return None
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = positional[len(positional) - len(arguments.defaults) :] if arguments.defaults else []
    return [a.arg for a in (*with_default, *arguments.kwonlyargs) if a.arg not in GIVEN]


def _module_file(name: str, base_dir: Path, path: str) -> Path | None:
    """Source of a module, found without importing it or its packages; None where it has none."""
    first, *rest = name.split(".")
    with _searched_last(base_dir):
        try:
            spec = importlib.util.find_spec(first)
        except (ImportError, ValueError):
            spec = None
    for depth, _ in enumerate(rest, start=2):
        if spec is None or spec.submodule_search_locations is None:
            break
        spec = PathFinder.find_spec(".".join(name.split(".")[:depth]), list(spec.submodule_search_locations))
    if spec is None:
        hint = f"; for a file write {name}.py:function"
        raise ConfigError(f"{path}: module {name!r} cannot be imported: ModuleNotFoundError: there is none{hint}", path)
    return Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None


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


def _parts(reference: str, path: str) -> tuple[str, str]:
    """Module or file, and name."""
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise ConfigError(f"{path}: {reference!r} is not `module:function` or `path/file.py:function`", path)
    return source, name


def _user_file(base_dir: Path, source: str, path: str) -> Path:
    file = (base_dir / Path(source).expanduser()).resolve()
    if not file.is_file():
        raise ConfigError(f"{path}: there is no file {str(file)!r} ({source!r} is relative to {str(base_dir)!r})", path)
    return file


def _load_file(base_dir: Path, source: str, path: str) -> ModuleType:
    file = _user_file(base_dir, source, path)
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
