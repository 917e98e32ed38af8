"""Processes and strategy of a run: what the recipe asks for, how it is started, and whether that is what started.

    check_environment   before anything is built: variables that ask for what the CPU cannot do
    check_started       as soon as the processes know each other, before anything is loaded
    check_strategy      once the trainer's accelerator exists, which alone knows the ZeRO stage and FSDP's version
    plan_launch         the command that starts the processes of a recipe

What runs is read from the process group and from accelerate's own state. Variables are read only to find a request
that was not met: accelerate 1.15 starts one process for `--cpu --num_processes 2`, stays plain data parallel where
FSDP is asked for on the CPU, and for DeepSpeed on the CPU counts one process per rank, so that gathers fail, unless it
is told of the CPU (then DeepSpeed's engine runs, but announces itself only when the trainer's accelerator is there).
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rltok.config import ConfigError

if TYPE_CHECKING:
    from rltok.recipe import Recipe

Strategy = Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]
STRATEGIES: tuple[str, ...] = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")
SHARDED_WEIGHTS = ("zero3", "fsdp")
"""Strategies under which no process holds the whole weights."""

ACCELERATE_DIR = Path(__file__).parent / "configs" / "accelerate"
"""The shipped files for `accelerate launch`."""
FILES = {"ddp": "multi_gpu", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp": "fsdp"}
"""Strategy -> its file among them."""
COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which launchers say how many processes they started."""
ON_CPU = (
    "DeepSpeed and FSDP are for GPUs: on the CPU accelerate trains plain data parallel where FSDP is asked for, and "
    "under DeepSpeed miscounts the processes unless training.use_cpu is set"
)


@dataclass(frozen=True)
class LaunchConfig:
    """Processes and strategy; a run that got something else stops before anything is loaded."""

    processes: int | None = None
    """processes over all machines; None: as many as there are"""
    strategy: Strategy | None = None
    """`single`, `ddp` (whole model on each), DeepSpeed `zero1`, `zero2`, `zero3`, or `fsdp` (FSDP2); None: any"""

    def __post_init__(self) -> None:
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"launch.processes: {self.processes} must be >= 1", "launch.processes")
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise ConfigError(
                f"launch.strategy: {self.strategy!r}; allowed: {', '.join(STRATEGIES)}", "launch.strategy"
            )
        if self.strategy == "single" and self.processes not in (None, 1):
            raise ConfigError(
                f"launch.processes: {self.processes} with launch.strategy single, which is one process; set "
                f"launch.strategy to one of {', '.join(STRATEGIES[1:])}",
                "launch.processes",
            )


# What runs


def check_environment(recipe: Recipe, environ: Mapping[str, str] | None = None) -> None:
    """Refuse what variables ask for and this recipe or the CPU cannot have.

    For before the trainer's arguments are made: these already load DeepSpeed where a variable asks for it.

    Raises:
        ConfigError: DeepSpeed or FSDP is asked for on the CPU, or with a held-out evaluation that needs whole weights;
            names who asks, and what works.
    """
    environ = os.environ if environ is None else environ
    if runs_on_cpu(recipe, environ):
        _refuse_on_cpu(recipe.launch, environ)
    claimed = _claimed(environ)
    if claimed is not None:
        refuse_sharded_evaluation(claimed[0], recipe.evaluation.before, recipe.evaluation.after)


def runs_on_cpu(recipe: Recipe, environ: Mapping[str, str] | None = None) -> bool:
    """Whether a recipe trains on the CPU of this machine."""
    import torch

    environ = os.environ if environ is None else environ
    given = recipe.training.get("use_cpu")
    return bool(given) or _is_true(environ, "ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def check_started(config: LaunchConfig, state: Any, environ: Mapping[str, str] | None = None) -> None:
    """Compare what runs with what the recipe and the environment asked for.

    Args:
        config: of the recipe.
        state: accelerate's `PartialState`: number of processes, kind of distribution, device.
        environ: the environment; the process's own by default.

    Raises:
        ConfigError: another number of processes or another strategy; names both, and the command that starts it right.
    """
    environ = os.environ if environ is None else environ
    if state.device.type == "cpu":
        _refuse_on_cpu(config, environ)
    _check_processes(config, state, environ)
    _refuse_data_parallel(config, state)
    real = _strategy_so_far(state)
    claimed = _claimed(environ)
    if claimed is not None and not _may_become(real, claimed[0], state.num_processes):
        _stop(config, "launch.strategy", f"{claimed[1]} asks for {claimed[0]}", _named(real, state), claimed[0])
    if config.strategy is None:
        return
    if claimed is not None and _family(claimed[0]) != _family(config.strategy):
        _stop(config, "launch.strategy", f"{config.strategy} asked for", f"{claimed[0]} ({claimed[1]})")
    if not _may_become(real, config.strategy, state.num_processes):
        _stop(config, "launch.strategy", f"{config.strategy} asked for", _named(real, state))


def check_strategy(config: LaunchConfig, accelerator: Any, environ: Mapping[str, str] | None = None) -> None:
    """Compare the strategy of the trainer's accelerator, to the ZeRO stage, with what was asked for.

    Args:
        config: of the recipe.
        accelerator: accelerate's `Accelerator`, as the trainer has made it.
        environ: the environment; the process's own by default.

    Raises:
        ConfigError: another strategy, or a number of processes that is not torch's; names both.
    """
    environ = os.environ if environ is None else environ
    _check_processes(config, accelerator, environ)
    real = running_strategy(accelerator)
    claimed = _claimed(environ)
    if claimed is not None and _family(claimed[0]) != _family(real):
        _stop(config, "launch.strategy", f"{claimed[1]} asks for {claimed[0]}", _named(real, accelerator), claimed[0])
    if config.strategy in (None, real):
        return
    if not (config.strategy == "single" and real == "ddp" and accelerator.num_processes == 1):
        _stop(config, "launch.strategy", f"{config.strategy} asked for", _named(real, accelerator))


def running_strategy(accelerator: Any) -> str:
    """The strategy of an accelerator, one of `STRATEGIES`, else accelerate's name for it; FSDP1 is `fsdp1`."""
    real = _strategy_so_far(accelerator)
    if real == "zero":
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if real == "fsdp" and accelerator.state.fsdp_plugin.fsdp_version != 2:
        return f"fsdp{accelerator.state.fsdp_plugin.fsdp_version}"
    return real


def refuse_sharded_evaluation(strategy: str, before: bool, after: bool) -> None:
    """Held-out evaluations complete each rank's own rows, which takes whole weights on every rank.

    Raises:
        ConfigError: `evaluation.before` or `evaluation.after` with a strategy that shards the weights.
    """
    wanted = [name for name, on in (("evaluation.before", before), ("evaluation.after", after)) if on]
    if strategy in SHARDED_WEIGHTS and wanted:
        raise ConfigError(
            f"{' and '.join(wanted)}: no process holds the whole weights under {strategy}, so the policy cannot be "
            f"evaluated in place; set {' '.join(f'{name}=false' for name in wanted)} and run `rltok eval CHECKPOINT`",
            wanted[0],
        )


def _strategy_so_far(state: Any) -> str:
    """`single`, `ddp`, `zero` (stage not known) or `fsdp`, else accelerate's name; FSDP is `ddp` until it is set up."""
    kind = str(getattr(state.distributed_type, "value", state.distributed_type))
    if kind.startswith("MULTI_"):
        return "ddp"
    return {"NO": "single", "DEEPSPEED": "zero", "FSDP": "fsdp"}.get(kind, kind.lower())


def _may_become(real: str, wanted: str, processes: int) -> bool:
    if wanted == "single":
        return processes == 1 and real in ("single", "ddp")
    if wanted == "fsdp":
        return real in ("fsdp", "ddp")
    return real == _family(wanted)


def _family(strategy: str) -> str:
    return strategy.rstrip("0123456789")


def _named(real: str, state: Any) -> str:
    kind = getattr(state.distributed_type, "value", state.distributed_type)
    return f"{real} ({kind} on {state.device.type}, {state.num_processes} process(es))"


def _claimed(environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The strategy that accelerate's variables ask for, and the variable."""
    if _is_true(environ, "ACCELERATE_USE_DEEPSPEED"):
        return f"zero{environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}", "ACCELERATE_USE_DEEPSPEED=true"
    if _is_true(environ, "ACCELERATE_USE_FSDP"):
        return "fsdp", "ACCELERATE_USE_FSDP=true"
    return None


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _refuse_on_cpu(config: LaunchConfig, environ: Mapping[str, str]) -> None:
    claimed = _claimed(environ)
    if claimed is None and config.strategy not in (None, "single", "ddp"):
        claimed = str(config.strategy), f"launch.strategy={config.strategy}"
    if claimed is not None:
        raise ConfigError(
            f"launch.strategy: {claimed[1]} asks for {claimed[0]}, but this run is on the CPU. {ON_CPU}. Unset it and "
            f"start several processes with: {_right_command(config.processes, 'ddp')}",
            "launch.strategy",
        )


def _check_processes(config: LaunchConfig, state: Any, environ: Mapping[str, str]) -> None:
    real, world = state.num_processes, _world_size()
    if world not in (None, real):
        _stop(config, "launch.processes", f"torch runs {world} process(es)", f"accelerate counts {real}")
    if config.processes is not None:
        if config.processes != real:
            why = " (`accelerate launch --cpu` starts one, whatever --num_processes says)" if real == 1 else ""
            _stop(config, "launch.processes", f"{config.processes} asked for", f"{real}{why}")
        return
    for name in COUNTS:
        value = environ.get(name, "")
        if value.isdigit() and int(value) > real:
            raise ConfigError(
                f"launch.processes: {name}={value} asks for {value}, but what runs is {real}: every process would "
                f"train alone, in one folder. Start it with: {_right_command(int(value), config.strategy)}\n"
                f"If {real} is meant, set launch.processes={real}.",
                "launch.processes",
            )


def _world_size() -> int | None:
    """Processes of torch's group, None where there is none."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else None


def _refuse_data_parallel(config: LaunchConfig, state: Any) -> None:
    """transformers' Trainer spreads a process without a launcher over all GPUs it sees, with a larger batch."""
    import torch

    if state.device.type != "cuda" or _strategy_so_far(state) != "single" or torch.cuda.device_count() < 2:
        return
    seen = torch.cuda.device_count()
    raise ConfigError(
        f"launch.processes: {config.processes or 1} asked for, but one process that sees {seen} GPUs would train with "
        f"nn.DataParallel and a batch {seen} times as large. Start it with: {_right_command(seen, 'ddp')}\n"
        "For one GPU, set CUDA_VISIBLE_DEVICES=0.",
        "launch.processes",
    )


def _stop(config: LaunchConfig, path: str, asked: str, real: str, strategy: str | None = None) -> NoReturn:
    command = _right_command(config.processes, config.strategy or strategy)
    raise ConfigError(f"{path}: {asked}, but what runs is {real}. Start it with: {command}", path)


def _right_command(processes: int | None, strategy: str | None) -> str:
    """`rltok launch` for the run at hand, as far as its command line is known."""
    given = sys.argv[2:] if sys.argv[1:2] == ["train"] and len(sys.argv) > 2 else ["RECIPE"]
    command = ["rltok", "launch", *_without_launch(given)]
    command += ["--processes", str(processes)] if processes is not None else []
    command += ["--strategy", strategy] if strategy in STRATEGIES else []
    return shlex.join(command)


def _without_launch(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if not text.startswith(("launch.processes=", "launch.strategy="))]


# How it is started


@dataclass(frozen=True)
class Machines:
    """This machine among those of a run, and where the others find the first."""

    count: int = 1
    rank: int = 0
    """0 is the machine that the others connect to"""
    address: str | None = None
    """name or IP of machine 0"""
    port: int = 29500
    """free port on machine 0"""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--machines {self.count} must be >= 1")
        if not 0 <= self.rank < self.count:
            raise ConfigError(
                f"--machine-rank {self.rank} must be from 0 to {self.count - 1} with {self.count} machines"
            )
        if self.count > 1 and self.address is None:
            raise ConfigError(f"--machines {self.count} needs --main-address, the name or IP of machine 0")


@dataclass(frozen=True)
class LaunchPlan:
    """A command with the variables that it needs beside those of the shell."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for a shell."""
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.arguments)])

    def start(self) -> NoReturn:
        """Become that command: signals, output and exit status are its own."""
        sys.stdout.flush()
        sys.stderr.flush()
        os.execvpe(self.arguments[0], self.arguments, os.environ | self.environment)


def plan_launch(
    recipe: Recipe,
    name: str,
    overrides: Sequence[str],
    machines: Machines,
    device: Literal["cpu", "gpu"],
    devices: int | None = None,
) -> LaunchPlan:
    """The command that starts this machine's processes of a recipe; starts nothing.

    On the CPU that is torch's launcher, on GPUs `accelerate launch` with a shipped file; one process needs neither.

    Args:
        recipe: with `launch` as it shall be.
        name: of the recipe, as the processes will read it.
        overrides: likewise.
        machines: this one among those of the run.
        device: where it trains.
        devices: GPUs of this machine; None: not known. Without `launch.processes` every GPU of every machine gets a
            process; on the CPU every machine one.

    Raises:
        ConfigError: a strategy that the CPU does not have, processes that do not spread evenly over machines, more
            processes than GPUs, or a strategy that a setting of the recipe rules out.
    """
    processes = recipe.launch.processes or machines.count * _default_processes(device, devices)
    strategy = recipe.launch.strategy or ("single" if processes == 1 else "ddp")
    _check_plan(strategy, processes, machines, device, devices)
    refuse_sharded_evaluation(strategy, recipe.evaluation.before, recipe.evaluation.after)
    local = processes // machines.count
    settings = [*_without_launch(overrides), f"launch.processes={processes}", f"launch.strategy={strategy}"]
    if device == "cpu" and devices and not recipe.training.get("use_cpu"):
        settings.append("training.use_cpu=true")
    train = ["-m", "rltok", "train", name, *settings]
    environment = _threads(local)
    if strategy == "single":
        if devices and devices > 1 and device == "gpu" and "CUDA_VISIBLE_DEVICES" not in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = "0"
        return LaunchPlan((_python(), *train), environment)
    if device == "cpu":
        return LaunchPlan(
            (_python(), "-m", "torch.distributed.run", *_torch_rooms(local, machines), *train), environment
        )
    launcher = [_python(), "-m", "accelerate.commands.launch", "--config_file", str(config_file(strategy))]
    return LaunchPlan((*launcher, *_accelerate_rooms(processes, machines), *train), environment)


def config_file(strategy: str) -> Path:
    """The shipped file of a strategy, for `accelerate launch --config_file`."""
    return ACCELERATE_DIR / f"{FILES[strategy]}.yaml"


def check_machine(strategy: str | None, device: Literal["cpu", "gpu"], devices: int) -> None:
    """Refuse to start what this machine lacks: GPUs, or DeepSpeed.

    Raises:
        ConfigError: names what is missing.
    """
    if device == "gpu" and not devices:
        raise ConfigError("--device gpu: torch finds no GPU on this machine; --dry-run prints the command all the same")
    if strategy is not None and _family(strategy) == "zero" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"launch.strategy: {strategy} needs DeepSpeed, which is not installed; pip install 'rltok[deepspeed]', or "
            "set launch.strategy to ddp or fsdp",
            "launch.strategy",
        )


def _default_processes(device: str, devices: int | None) -> int:
    if device == "gpu" and not devices:
        raise ConfigError("--processes: there is no GPU here to count; say how many processes", "launch.processes")
    return devices or 1 if device == "gpu" else 1


def _check_plan(strategy: str, processes: int, machines: Machines, device: str, devices: int | None) -> None:
    if device == "cpu" and strategy not in ("single", "ddp"):
        raise ConfigError(
            f"launch.strategy: {strategy} on the CPU. {ON_CPU}. Set launch.strategy=ddp, or start it where there are "
            "GPUs (--device gpu --dry-run prints the command from here)",
            "launch.strategy",
        )
    if strategy == "single" and processes > 1:
        raise ConfigError(
            f"launch.strategy: single is one process, but there are {processes}; set launch.strategy=ddp, or "
            "launch.processes=1",
            "launch.strategy",
        )
    if processes % machines.count:
        raise ConfigError(
            f"launch.processes: {processes} do not spread evenly over {machines.count} machines; give a multiple",
            "launch.processes",
        )
    local = processes // machines.count
    if device == "gpu" and devices is not None and local > devices:
        raise ConfigError(
            f"launch.processes: {local} processes on a machine with {devices} GPU(s); each needs one of its own. Set "
            f"launch.processes to at most {devices * machines.count}",
            "launch.processes",
        )


def _torch_rooms(local: int, machines: Machines) -> list[str]:
    processes = [f"--nproc-per-node={local}"]
    if machines.count == 1:
        return ["--standalone", *processes]
    place = [f"--nnodes={machines.count}", f"--node-rank={machines.rank}"]
    return [*place, *processes, f"--master-addr={machines.address}", f"--master-port={machines.port}"]


def _accelerate_rooms(processes: int, machines: Machines) -> list[str]:
    numbers = ["--num_processes", str(processes), "--num_machines", str(machines.count)]
    if machines.count == 1:
        return [*numbers, "--main_process_port", "0"]  # 0: any free port, so that two runs fit one machine
    place = ["--machine_rank", str(machines.rank), "--main_process_ip", str(machines.address)]
    return [*numbers, *place, "--main_process_port", str(machines.port), "--same_network"]


def _threads(local: int) -> dict[str, str]:
    """The cores of this machine, shared by its processes; a number that the user has set stays."""
    if local == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // local))}


def _python() -> str:
    """`python` where the shell finds this interpreter by that name, else its path."""
    found = shutil.which("python")
    return "python" if found is not None and Path(found) == Path(sys.executable) else sys.executable
