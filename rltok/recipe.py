"""Recipes: YAML files that say everything about one training run.

A recipe names another one in `defaults:` (a file name or a list of them, relative to itself, then among the shipped
ones) and lists only what differs. Later layers win; mappings are merged, lists are replaced. A layer that changes
`type` in a section drops that section's other inherited options. `null` takes an inherited value back: it becomes
None where the setting allows that, else the default. `${section.key}` refers to another value of the recipe.

Relative paths in a file are relative to that file, those of an override on the command line to the working directory.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rltok.batching import BatchingConfig
from rltok.config import (
    ConfigError,
    as_word,
    build,
    build_typed,
    check_keys,
    convert,
    hints,
    join,
    lookup_type,
    suggestion,
)
from rltok.expect import check_syntax
from rltok.faults import FaultsConfig
from rltok.launch import LaunchConfig
from rltok.models import TINY, ModelConfig
from rltok.report.store import SampleConfig
from rltok.secrets import redacted, refuse_secrets
from rltok.sink_config import SinkConfig

CONFIG_DIR = Path(__file__).parent / "configs"
"""Where the shipped recipes lie."""

SECTIONS = (
    "defaults",
    "name",
    "seed",
    "model",
    "data",
    "rewards",
    "rollout",
    "credit",
    "selection",
    "objective",
    "quantization_aware",
    "training",
    "batching",
    "launch",
    "faults",
    "evaluation",
    "report",
    "expect",
    "output_dir",
    "resume",
)

ELSEWHERE = {
    "seed": "`seed`",
    "output_dir": "`output_dir`",
    "run_name": "`name`",
    "reward_weights": "`rewards.<name>.weight`",
    "credit": "`credit`",
    "objective": "`objective`",
    "rollout": "`rollout`",
    "selection": "`selection`",
    "batching": "`batching`",
    "faults": "`faults`",
    "report_to": "`report.to`",
    "log_completions": "`report.completions`",
    "samples": "`report.samples`",
    "num_completions_to_print": "`rltok show RUN`",
    "disable_tqdm": "nothing; the progress display follows the terminal",
    "project": "`report.project`",
    "resume_from_checkpoint": "`resume`",
    "model_init_kwargs": "`model.dtype`, `model.attn_implementation` and the other keys of `model`",
    "trust_remote_code": "`model.trust_remote_code`",
    "hub_token": "`hf auth login`; a recipe is written to disk and must not hold a secret",
}
"""Fields of the trainer's config that a recipe sets in another place: field -> that place."""

Tracker = Literal["wandb", "tensorboard", "trackio"]


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out accuracy before and after training."""

    before: bool = True
    """evaluate the starting policy"""
    after: bool = True
    """evaluate the trained policy"""
    rows: int | None = None
    """number of held-out rows; None takes all"""
    max_new_tokens: int | None = None
    """tokens per completion; None takes training.max_completion_length"""
    batch_size: int = 64
    """completions generated at once"""
    temperature: float = 0.0
    """0 decodes greedily"""
    top_p: float = 1.0
    """nucleus of the sampling, only with temperature > 0"""
    num_samples: int = 1
    """completions per row; the accuracy is their mean"""
    seed: int = 0
    """of the sampling, apart from the training's"""
    decoding: tuple[dict[str, Any], ...] = ()
    """decoding methods, as in rollout.decoding, which evaluation never reads"""
    steering: dict[str, Any] | None = None
    """steering vectors, such as {path: FILE}; None evaluates the bare policy"""
    kv: dict[str, Any] | None = None
    """cache policy, as in rollout.kv, which evaluation never reads; None keeps every token"""
    quant: dict[str, Any] | None = None
    """how weights are quantised, as in rollout.quant, which evaluation never reads, such as {bits: 4}; None: not"""

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluation.{name}: {getattr(self, name)} must be >= 1", f"evaluation.{name}")
        if self.temperature < 0:
            raise ConfigError(f"evaluation.temperature: {self.temperature} must be >= 0", "evaluation.temperature")
        if self.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"evaluation.num_samples: {self.num_samples} greedy samples are all equal; "
                "set evaluation.temperature > 0 or evaluation.num_samples=1",
                "evaluation.num_samples",
            )


@dataclass(frozen=True)
class ReportConfig:
    """Where a run reports besides its own directory; by default nowhere."""

    to: list[Tracker] = field(default_factory=list)
    """trackers; each needs its extra installed, `pip install rltok[wandb]`"""
    completions: bool = True
    """write prompts, completions, rewards and credit to completions/*.parquet"""
    samples: SampleConfig = field(default_factory=SampleConfig)
    """completions recorded with every number of their tokens in samples/*.parquet, for `rltok report`"""
    sinks: SinkConfig | None = None
    """attention sinks and dormant heads of the policy, logged as `attn/*` every so many updates; None measures none"""
    mode: Literal["offline", "online"] = "offline"
    """of wandb; offline needs neither network nor account"""
    project: str = "rltok"
    """project name for the tracker"""
    progress: Literal["auto", "live", "lines", "off"] = "auto"
    """live display in a terminal, single lines elsewhere"""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; sections that other parts own are kept as plain, resolved values."""

    name: str
    seed: int = 0
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path="tiny-reasoner"))
    data: dict[str, Any] = field(default_factory=dict)
    rewards: Any = field(default_factory=dict)
    rollout: dict[str, Any] | None = None
    credit: dict[str, Any] | None = None
    selection: dict[str, Any] | None = None
    objective: dict[str, Any] | list[Any] | None = None
    quantization_aware: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    batching: BatchingConfig = field(default_factory=BatchingConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    expect: tuple[str, ...] = ()
    output_dir: str | None = None
    resume: str = "never"

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain values, defaults filled in; written to YAML it loads back to an equal recipe."""
        return {key: _plain(value) for key, value in vars(self).items()}

    def to_yaml(self) -> str:
        """`resolved()` as the text of a recipe file."""
        return dump_yaml(self.resolved())


def dump_yaml(values: Any) -> str:
    """YAML text of plain values that `load_recipe` reads back equal: `${` is escaped, numbers stay numbers."""
    return yaml.dump(_escape(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        recipe: a YAML file, or the name of a shipped recipe such as `demo`.
        overrides: `key.path=value` with a YAML value; list items are `objective[0].alpha=0.5` or `objective.0.alpha`.

    Raises:
        ConfigError: no such recipe, a circle in `defaults`, an unknown key or type, or a value of the wrong type.
            The message starts with file and line where the setting stands.
    """
    values, marks = merged(recipe, overrides)
    try:
        return _recipe(values)
    except ConfigError as error:
        raise located(error, marks) from error


@dataclass(frozen=True)
class DecodingRecipe:
    """How completions are made, by a recipe."""

    decoding: list[dict[str, Any]] = field(default_factory=list)
    """decoding methods as plain values, defaults filled in"""
    steering: dict[str, Any] | None = None
    """steering vectors likewise"""
    kv: dict[str, Any] | None = None
    """cache policy likewise"""
    quant: dict[str, Any] | None = None
    """how weights are quantised, likewise"""
    recipe: Recipe | None = None
    """the whole recipe; None for a file of decoding methods alone"""


def load_decoding(recipe: str | Path, overrides: Sequence[str] = ()) -> DecodingRecipe:
    """Decoding of a recipe's rollouts, or of a YAML file with nothing but `decoding:`, `steering:`, `kv:`, `quant:`.

    Raises:
        ConfigError: as `load_recipe`.
    """
    if not {"decoding", "steering", "kv", "quant"} & merged(recipe)[0].keys():  # none is a section of a whole recipe
        loaded = load_recipe(recipe, overrides)
        rollout = loaded.rollout or {}
        from rltok.quant.config import spec_of

        quant = spec_of(rollout.get("quant"))
        return DecodingRecipe(rollout.get("decoding") or [], rollout.get("steering"), rollout.get("kv"), quant, loaded)
    values, marks = merged(recipe, overrides)
    try:
        check_keys(values, ("name", "decoding", "steering", "kv", "quant"), "")
        steering, kv, quant = (values.get(name) for name in ("steering", "kv", "quant"))
        return DecodingRecipe(
            filled_decoding(values.get("decoding"), "decoding"),
            None if steering is None else filled_steering(steering, "steering"),
            None if kv is None else filled_kv(kv, "kv"),
            None if quant is None else filled_spec(quant, "quant"),
        )
    except ConfigError as error:
        raise located(error, marks) from error


def merged(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The merged but unchecked values of a recipe, and where each key path was set (`file:line`)."""
    path = find_recipe(recipe)
    values, marks = _load_layers(path, ())
    values.setdefault("name", path.stem)
    parsed = [_parse_override(text) for text in overrides]
    # `credit.type=x` first, so that it does not drop an option that another override sets; likewise `data.source`
    for keys, value, text in sorted(parsed, key=lambda item: item[0][-1] not in ("type", "source")):
        values = _apply_override(values, keys, value, text)
        for depth in range(1, len(keys)):
            marks.setdefault(_spell(keys[:depth]), f"override '{text}'")
        marks[_spell(keys)] = f"override '{text}'"
    return _interpolate(values), marks


def find_recipe(recipe: str | Path, beside: Path | None = None, shipped: Path = CONFIG_DIR) -> Path:
    """File of a recipe: a path (relative to `beside`, if given), else the name of one that lies in `shipped`.

    Raises:
        ConfigError: there is none; lists the shipped ones, nearest name first.
    """
    given = Path(recipe).expanduser()
    names = [given] if given.suffix in (".yaml", ".yml") else [given, given.with_name(given.name + ".yaml")]
    for folder in (beside or Path.cwd(), shipped):
        for name in names:
            if (folder / name).is_file():
                return (folder / name).resolve()
    raise ConfigError(f"{recipe}: no such recipe file{suggestion(given.stem, shipped_recipes(shipped))}")


def shipped_recipes(folder: Path = CONFIG_DIR) -> dict[str, str]:
    """Name of every recipe that lies in `folder` -> its first comment line."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        found[path.stem] = first.lstrip("# ").rstrip() if first.startswith("#") else ""
    return found


# Layers


def _load_layers(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """A file merged onto its `defaults`, and the line of every key path."""
    if path in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(path) :], path))
        raise ConfigError(f"{path}: `defaults` goes in a circle: {circle}", "defaults")
    layer, layer_marks = _read(path)
    parents = layer.pop("defaults", None) or []
    parents = [parents] if isinstance(parents, str) else parents
    if not (isinstance(parents, list) and all(isinstance(p, str) for p in parents)):
        raise ConfigError(f"{path}: defaults: {parents!r} is not a file name or a list of them", "defaults")
    values: dict[str, Any] = {}
    marks: dict[str, str] = {}
    for parent in parents:
        parent_path = find_recipe(parent, beside=path.parent)
        if parent_path == path and (CONFIG_DIR / parent).is_file():  # a user's demo.yaml on top of the shipped one
            parent_path = (CONFIG_DIR / parent).resolve()
        parent_values, parent_marks = _load_layers(parent_path, (*chain, path))
        parent_values.pop("name", None)  # a recipe is named by itself or its file
        values, marks = _merge(values, parent_values), marks | parent_marks
    try:
        _anchor_paths(layer, path.parent)
    except ConfigError as error:
        raise located(error, layer_marks) from error
    return _merge(values, layer), marks | layer_marks


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Plain values of one file (interpolations not yet resolved) and `file:line` of every key path."""
    text = path.read_text(encoding="utf-8")
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{where}: not valid YAML: {problem}") from error
    if not isinstance(values, dict) or (root is not None and not isinstance(root, yaml.MappingNode)):
        raise ConfigError(f"{path}: a recipe is a mapping of sections; Allowed: {', '.join(SECTIONS)}")
    marks: dict[str, str] = {}
    _collect_marks(root, "", path, marks)
    return values, marks  # type: ignore[return-value]


def _collect_marks(node: yaml.Node | None, prefix: str, path: Path, marks: dict[str, str]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            where = join(prefix, key.value)
            marks[where] = f"{path}:{key.start_mark.line + 1}"
            _collect_marks(value, where, path, marks)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            where = f"{prefix}[{index}]"
            marks[where] = f"{path}:{item.start_mark.line + 1}"
            _collect_marks(item, where, path, marks)


def _merge(base: Any, layer: Any, path: str = "") -> Any:
    """`layer` over `base`: mappings key by key; a new `type` drops the options of the old one."""
    if not (isinstance(base, dict) and isinstance(layer, dict)):
        return layer
    if "type" in layer and "type" in base and layer["type"] != base["type"]:
        return layer
    if path == "data" and layer.get("source", base.get("source")) != base.get("source"):
        base = _for_source(base, layer["source"])
    out = dict(base)
    for key, value in layer.items():
        out[key] = _merge(base[key], value, join(path, key)) if key in base else value
    return out


def _for_source(data: dict[str, Any], source: Any) -> dict[str, Any]:
    """The inherited settings of `data` that another source understands."""
    from rltok.data.config import NOT_FOR_REASONING_GYM, ONLY_FOR

    others = {key for key, owner in ONLY_FOR.items() if owner != source}
    others |= set(NOT_FOR_REASONING_GYM) if source == "reasoning_gym" else set()
    return {key: value for key, value in data.items() if key not in others}


def located(error: ConfigError, marks: Mapping[str, str]) -> ConfigError:
    """The error with `file:line` in front, if its key path or a part of it stands in a file."""
    path = error.path or ""
    while path:
        if path in marks:
            return ConfigError(f"{marks[path]}: {error}", error.path)
        path = re.sub(r"(\[\d+\]|\.?[^.\[\]]+)$", "", path)
    return error


# Overrides


def _parse_override(text: str) -> tuple[list[str | int], Any, str]:
    key, equals, raw = text.partition("=")
    text = redacted(text)  # for messages
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: write key.path=value, such as training.learning_rate=1e-5")
    keys: list[str | int] = [int(k) if k.isdigit() else k for k in re.findall(r"[^.\[\]]+", key.strip())]
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {raw}"), resolve=False)["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"override {text!r}: not a YAML value ({str(error).splitlines()[0]})") from error
    return keys, value, text


def _apply_override(values: dict[str, Any], keys: list[str | int], value: Any, text: str) -> dict[str, Any]:
    layer = value
    for depth in range(len(keys) - 1, -1, -1):
        key = keys[depth]
        if not isinstance(key, int):
            layer = {key: layer}
            continue
        items = _get(values, keys[:depth])
        if isinstance(items, dict) and str(key) in items:  # a mapping with a numeric key
            layer = {str(key): layer}
            continue
        where = _spell(keys[:depth])
        if not isinstance(items, list):
            raise ConfigError(f"override {text!r}: {where} is not a list, it is {items!r}", where)
        if key >= len(items):
            raise ConfigError(
                f"override {text!r}: {where} has {len(items)} items, the last is [{len(items) - 1}]", where
            )
        layer = [_merge(item, layer) if i == key else item for i, item in enumerate(items)]
    _anchor_paths(layer, Path.cwd())
    return _merge(values, layer)


def _get(values: Any, keys: Sequence[str | int]) -> Any:
    for key in keys:
        if isinstance(values, dict):
            values = values.get(str(key))
        elif isinstance(values, list) and isinstance(key, int) and key < len(values):
            values = values[key]
        else:
            return None
    return values


def _spell(keys: Sequence[str | int]) -> str:
    path = ""
    for key in keys:
        path = f"{path}[{key}]" if isinstance(key, int) else join(path, key)
    return path


def _interpolate(values: dict[str, Any]) -> dict[str, Any]:
    _refuse_resolvers(values)
    try:
        return OmegaConf.to_container(OmegaConf.create(values), resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        where = getattr(error, "full_key", None) or ""
        raise ConfigError(
            f"{where}: {str(error).splitlines()[0]}; write \\${{...}} for text that is no reference", where
        ) from error


def _refuse_resolvers(value: Any, path: str = "") -> None:
    """Refuse `${name:...}`, which calls a function: `${oc.env:NAME}` would write a variable into the run directory."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_resolvers(item, join(path, str(key)))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _refuse_resolvers(item, f"{path}[{index}]")
    elif isinstance(value, str) and _calls_resolver(value):
        raise ConfigError(
            f"{path}: {value!r} calls a resolver; a recipe says the same on every machine, so only values of its own "
            "can be named, such as ${training.max_completion_length}; give others as overrides on the command line",
            path,
        )


def _calls_resolver(text: str) -> bool:
    depth = 0
    for part in re.findall(r"\\.|\$\{|[{}:]", text, flags=re.DOTALL):
        if part == "${" or (part == "{" and depth):
            depth += 1
        elif part == "}" and depth:
            depth -= 1
        elif part == ":" and depth:
            return True
    return False


# Paths


def _anchor_paths(layer: Mapping[str, Any], folder: Path) -> None:
    """Make the relative paths of a layer absolute, in place."""
    for section, keys in (("data", ("path", "heldout_path")), ("model", ("path",))):
        block = layer.get(section)
        for key in keys:
            if isinstance(block, dict) and isinstance(block.get(key), str):
                block[key] = _anchor(block[key], folder, always=section == "data")
    for owner in (layer, layer.get("rollout"), layer.get("evaluation")):
        steering = owner.get("steering") if isinstance(owner, dict) else None
        if isinstance(steering, dict) and isinstance(steering.get("path"), str):
            steering["path"] = _anchor(steering["path"], folder, always=True)
        kv = owner.get("kv") if isinstance(owner, dict) else None
        if isinstance(kv, dict) and isinstance(kv.get("table"), str):
            kv["table"] = _anchor(kv["table"], folder, always=True)
    rewards = layer.get("rewards")
    for options in rewards.values() if isinstance(rewards, dict) else []:
        if isinstance(options, dict) and "function" in options:
            options["function"] = _anchor_function(options["function"], folder)


def _anchor(text: str, folder: Path, always: bool) -> str:
    """Absolute form of a file path; `always=False` leaves a name alone unless it is there or spelled as a path."""
    if "${" in text or "://" in text or (text == TINY and not always):
        return text
    path = Path(text).expanduser()
    spelled = text.startswith((".", "~")) or path.is_absolute()
    if always or spelled or (folder / path).is_dir():
        return str(path if path.is_absolute() else (folder / path).resolve())
    return text


def _anchor_function(value: Any, folder: Path) -> Any:
    """`path/file.py:function` with an absolute path; anything else unchanged."""
    if not (isinstance(value, str) and re.fullmatch(r"[^:\s][^\n]*\.py:[A-Za-z_]\w*", value)):
        return value
    file, _, function = value.rpartition(":")
    return f"{_anchor(file, folder, always=True)}:{function}"


# Checks


def checked_plain(
    values: dict[str, Any], kind: type[Recipe], sections: Sequence[str], mappings: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values without nulls, and those of them that are no sections, of the types of a recipe's fields.

    Raises:
        ConfigError: an unknown key, a secret, a wrong type or expectation, or a section that is no mapping.
    """
    check_keys(values, sections, "")
    refuse_secrets(values)
    values = {key: value for key, value in values.items() if value is not None}
    types = hints(kind)
    plain: dict[str, Any] = {
        key: convert(types[key], values[key], key)
        for key in ("name", "seed", "output_dir", "resume", "expect")
        if key in values
    }
    if not 0 <= plain.get("seed", 0) < 2**32:
        raise ConfigError(f"seed: {plain['seed']}; allowed: 0 to {2**32 - 1}", "seed")
    for index, expression in enumerate(plain.get("expect", ())):
        check_syntax(expression, f"expect[{index}]")
    for key in mappings:
        if not isinstance(values.get(key, {}), dict):
            raise ConfigError(f"{key}: {values[key]!r} is not a mapping of settings", key)
    return values, plain


def _recipe(values: dict[str, Any]) -> Recipe:
    mappings = ("model", "data", "training", "batching", "launch", "faults", "evaluation", "report")
    values, plain = checked_plain(values, Recipe, SECTIONS, mappings)
    return Recipe(
        **plain,
        model=build_section(ModelConfig, values, "model"),
        training=_check_training(values.get("training", {})),
        batching=build_section(BatchingConfig, values, "batching"),
        launch=build_section(LaunchConfig, values, "launch"),
        faults=build_section(FaultsConfig, values, "faults"),
        evaluation=checked_evaluation(values.get("evaluation") or {}),
        report=build_section(ReportConfig, values, "report"),
        **_check_doors(values),
        data=_check_data(values),
        rewards=checked_rewards(values),
    )


def build_section(cls: type, values: Mapping[str, Any], name: str) -> Any:
    """The section `name` of `values` as an instance of the dataclass `cls`; one that is not there has its defaults.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    return build(cls, without_nulls(cls, values.get(name)), name)


def without_nulls(cls: type, values: Mapping[str, Any] | None) -> dict[str, Any]:
    """`values` less those that are None where the field of `cls` does not take None: these mean its default."""
    kept = {}
    for key, value in (values or {}).items():
        if value is None and not _takes_none(hints(cls).get(key, Any)):
            continue
        kept[key] = value
    return kept


def _takes_none(hint: Any) -> bool:
    return hint is Any or type(None) in get_args(hint)


def _check_training(values: Mapping[str, Any]) -> dict[str, Any]:
    from rltok.trainers import CreditConfig

    return checked_training(values, CreditConfig, ELSEWHERE)


def checked_training(values: Mapping[str, Any], cls: type, elsewhere: Mapping[str, str]) -> dict[str, Any]:
    """The section `training`, every value checked against the type of the field of that name.

    Args:
        values: the section.
        cls: the trainer's configuration, a dataclass.
        elsewhere: fields that a recipe sets in another place -> that place.

    Raises:
        ConfigError: such a field, an unknown one, or a value of another type.
    """
    for key in values:
        if key in elsewhere:
            where = f"training.{key}"
            raise ConfigError(f"{where}: set {elsewhere[key]} instead of `{where}`", where)
    values = without_nulls(cls, values)
    fields = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in elsewhere]
    check_keys(values, fields, "training")
    values = {key: as_word(hints(cls)[key], value) for key, value in values.items()}
    for key, value in values.items():
        convert(hints(cls)[key], value, f"training.{key}")
    return values


def _check_doors(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the doors with the defaults of their methods filled in."""
    from rltok.credit import CREDIT
    from rltok.objective import OBJECTIVE
    from rltok.selection import SELECTION

    doors: dict[str, Any] = {}
    if "credit" in values:
        doors["credit"] = _filled(CREDIT, values["credit"], "credit")
    if "selection" in values:
        doors["selection"] = _filled(SELECTION, values["selection"], "selection")
    if "objective" in values:
        terms = values["objective"]
        if isinstance(terms, list):
            doors["objective"] = [_filled(OBJECTIVE, term, f"objective[{i}]") for i, term in enumerate(terms)]
        else:
            doors["objective"] = _filled(OBJECTIVE, terms, "objective")
    if "rollout" in values:
        doors["rollout"] = _check_rollout(values["rollout"])
    if "quantization_aware" in values:
        from rltok.quant.qat_config import filled_quantization_aware

        doors["quantization_aware"] = filled_quantization_aware(values["quantization_aware"])
    return doors


def _check_rollout(values: Any) -> dict[str, Any]:
    from rltok.rollout import RolloutConfig, build_rollout

    decoding: list[dict[str, Any]] = []
    if isinstance(values, dict):
        decoding = filled_decoding(values.get("decoding"), "rollout.decoding")
        values = without_nulls(RolloutConfig, values) | {"decoding": decoding}
        if values.get("kv") is not None:
            values["kv"] = filled_kv(values["kv"], "rollout.kv")
        if values.get("quant") is not None:
            values["quant"] = filled_quant(values["quant"], "rollout.quant")
    own = {name: values.get(name) for name in ("kv", "quant")} if isinstance(values, dict) else {}
    return _plain(build_rollout(values)) | {"decoding": decoding} | own


def checked_evaluation(values: Mapping[str, Any]) -> EvaluationConfig:
    """The section `evaluation`, the defaults of its own sections filled in.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    values = without_nulls(EvaluationConfig, values)
    if "decoding" in values:
        values["decoding"] = filled_decoding(values["decoding"], "evaluation.decoding")
    if values.get("steering") is not None:
        values["steering"] = filled_steering(values["steering"], "evaluation.steering")
    if values.get("kv") is not None:
        values["kv"] = filled_kv(values["kv"], "evaluation.kv")
        if values["kv"]["hold"] is not None:
            where = "evaluation.kv.hold"
            raise ConfigError(f"{where}: an evaluation has one budget, which nothing moves; remove it", where)
    if values.get("quant") is not None:
        values["quant"] = filled_spec(values["quant"], "evaluation.quant")
    return build(EvaluationConfig, values, "evaluation")


def filled_decoding(items: Any, path: str) -> list[dict[str, Any]]:
    """A list of decoding methods with their defaults filled in, as plain values.

    Raises:
        ConfigError: no list, unknown key or type, a wrong value, or a method listed twice.
    """
    from rltok.rollout import build_decoding, check_decoding
    from rltok.sampling import DECODING

    if isinstance(items, list | tuple):
        items = [_without_null_options(DECODING, item, f"{path}[{i}]") for i, item in enumerate(items)]
    modules = build_decoding(items, path)
    try:
        check_decoding(modules)
    except ValueError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix('decoding ')}", path) from error
    return [{"type": item["type"], **_plain(module)} for item, module in zip(items or (), modules, strict=True)]


def filled_steering(section: Any, path: str) -> dict[str, Any]:
    """Settings of steering vectors with the defaults filled in, as plain values.

    Raises:
        ConfigError: unknown key or wrong value.
    """
    from rltok.steering import SteeringConfig

    values = without_nulls(SteeringConfig, section) if isinstance(section, Mapping) else section
    return _plain(build(SteeringConfig, values, path))


def filled_kv(section: Any, path: str) -> dict[str, Any]:
    """Settings of a cache policy with the defaults filled in, as plain values.

    Raises:
        ConfigError: unknown policy or option, or a wrong value.
    """
    from rltok.kv.config import KVConfig, kv_settings, policy_type

    known = {**hints(policy_type(section, path)), **hints(KVConfig), "policy": str}
    values = {key: value for key, value in section.items() if value is not None or _takes_none(known.get(key, Any))}
    return _plain(kv_settings(values, path))


def filled_quant(section: Any, path: str) -> dict[str, Any]:
    """Settings of quantised rollouts with the defaults filled in, as plain values.

    Raises:
        ConfigError: unknown key or a wrong value.
    """
    from rltok.quant.config import KEYS, NoiseConfig, quant_settings

    values = _without_null_keys(section, KEYS)
    if isinstance(values, Mapping) and isinstance(values.get("noise"), Mapping):
        values = {**values, "noise": without_nulls(NoiseConfig, values["noise"])}
    return _plain(quant_settings(values, path))


def filled_spec(section: Any, path: str) -> dict[str, Any]:
    """How weights are quantised, with the defaults filled in, as plain values.

    Raises:
        ConfigError: unknown key or a wrong value.
    """
    from rltok.quant.config import SPEC, build_spec, spec_settings

    spec = build_spec(_without_null_keys(section, SPEC), path)
    assert spec is not None
    return _plain(spec_settings(spec))


def _without_null_keys(section: Any, keys: tuple[str, ...]) -> Any:
    """A section of `rltok.quant` less its values null that mean a default."""
    from rltok.quant.config import section_hints

    if not isinstance(section, Mapping):
        return section
    known = section_hints(keys)
    return {key: value for key, value in section.items() if value is not None or _takes_none(known.get(key, Any))}


def _filled(registry: Mapping[str, type], values: Any, path: str) -> dict[str, Any]:
    values = _without_null_options(registry, values, path)
    return {"type": values["type"], **_plain(build_typed(registry, values, path))}


def _without_null_options(registry: Mapping[str, type], values: Any, path: str) -> dict[str, Any]:
    cls = lookup_type(registry, values, path)
    return {"type": values["type"], **without_nulls(cls, {k: v for k, v in values.items() if k != "type"})}


def _check_data(values: Mapping[str, Any]) -> dict[str, Any]:
    from rltok.data import DataConfig

    if "data" not in values:
        raise ConfigError("data: missing; a recipe says where its prompts come from (`data.source`)", "data")
    return _plain(build(DataConfig, without_nulls(DataConfig, values["data"]), "data"))


def checked_rewards(values: Mapping[str, Any]) -> Any:
    """The section `rewards` of `values`, less what is null.

    Raises:
        ConfigError: missing, or an entry that is no reward function.
    """
    from rltok.rewards.check import check_rewards

    section = values.get("rewards")
    if not section:
        raise ConfigError("rewards: missing; a recipe names at least one reward function", "rewards")
    if isinstance(section, dict):
        section = {name: value for name, value in section.items() if value is not None}
    check_rewards(section)  # a recipe that is only looked at runs no code
    return section


# Plain values


def _plain(value: Any) -> Any:
    """Dataclasses, tuples, paths and enums as what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _escape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    return value


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block; floats always with a point, which the YAML 1.1 reader needs."""


def _represent_str(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _represent_str)
