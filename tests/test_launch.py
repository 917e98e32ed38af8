"""What a run asks for, what starts it, and what it does when something else has started."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands import launch as accelerate_launch
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from rltok import launch
from rltok.cli import main
from rltok.config import ConfigError
from rltok.launch import (
    ACCELERATE_DIR,
    LaunchConfig,
    LaunchPlan,
    Machines,
    check_environment,
    check_machine,
    check_started,
    check_strategy,
    config_file,
    plan_launch,
    refuse_sharded_evaluation,
    running_strategy,
)
from rltok.recipe import CONFIG_DIR, load_recipe

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
SHORT = ["training.max_steps=2", "evaluation.before=false", "evaluation.after=false", "training.learning_rate=1e-3"]
WHOLE = ["evaluation.before=false", "evaluation.after=false"]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "SLURM_")) or name in launch.COUNTS:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["rltok", "train", "my.yaml", "seed=3", "launch.processes=2"])


def state(processes: int = 1, kind: str = "NO", device: str = "cpu", **plugins: Any) -> Any:
    """What accelerate's states say: processes, kind and device; with plugins, an accelerator of that state."""
    return SimpleNamespace(
        num_processes=processes,
        distributed_type=DistributedType(kind),
        device=torch.device(device),
        state=SimpleNamespace(**plugins),
    )


def zero(processes: int, stage: int) -> Any:
    return state(processes, "DEEPSPEED", "cuda", deepspeed_plugin=SimpleNamespace(zero_stage=stage))


def fsdp(processes: int, version: int) -> Any:
    return state(processes, "FSDP", "cuda", fsdp_plugin=SimpleNamespace(fsdp_version=version))


def refusal(check: Any, config: LaunchConfig, found: Any, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, found, environ or {})
    return str(caught.value)


# What runs


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LaunchConfig(), state()),
        (LaunchConfig(), state(4, "MULTI_GPU", "cuda")),
        (LaunchConfig(1), state()),
        (LaunchConfig(1, "single"), state(1, "MULTI_GPU", "cuda")),
        (LaunchConfig(1, "ddp"), state(1, "MULTI_CPU")),
        (LaunchConfig(2, "ddp"), state(2, "MULTI_CPU")),
        (LaunchConfig(None, "ddp"), state(8, "MULTI_GPU", "cuda")),
        (LaunchConfig(8, "zero2"), state(8, "DEEPSPEED", "cuda")),
        (LaunchConfig(8, "fsdp"), state(8, "MULTI_GPU", "cuda")),
    ],
)
def test_what_was_asked_for_starts(config: LaunchConfig, found: Any) -> None:
    check_started(config, found, {})


@pytest.mark.parametrize(
    ("config", "found", "words"),
    [
        (LaunchConfig(2), state(), ["launch.processes: 2 asked for", "what runs is 1", "accelerate launch --cpu"]),
        (LaunchConfig(2), state(4, "MULTI_CPU"), ["2 asked for", "what runs is 4"]),
        (LaunchConfig(None, "single"), state(2, "MULTI_CPU"), ["single asked for", "ddp (MULTI_CPU on cpu, 2 process"]),
        (LaunchConfig(None, "ddp"), state(1, "NO", "cuda"), ["ddp asked for", "single (NO on cuda, 1 process"]),
        (LaunchConfig(8, "zero2"), state(8, "MULTI_GPU", "cuda"), ["zero2 asked for", "ddp (MULTI_GPU"]),
        (LaunchConfig(8, "ddp"), state(8, "DEEPSPEED", "cuda"), ["ddp asked for", "zero (DEEPSPEED"]),
        (LaunchConfig(8, "fsdp"), state(8, "DEEPSPEED", "cuda"), ["fsdp asked for", "zero (DEEPSPEED"]),
        (LaunchConfig(2, "zero3"), state(2, "MULTI_CPU"), ["launch.strategy=zero3 asks for zero3", "on the CPU"]),
        (LaunchConfig(2, "fsdp"), state(2, "MULTI_CPU"), ["launch.strategy=fsdp asks for fsdp", "on the CPU"]),
    ],
)
def test_what_was_not_asked_for_stops(config: LaunchConfig, found: Any, words: list[str]) -> None:
    message = refusal(check_started, config, found)
    for word in (*words, "rltok launch my.yaml seed=3"):
        assert word in message


DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environ", "found", "words"),
    [
        (DEEPSPEED, state(2, "MULTI_CPU"), ["ACCELERATE_USE_DEEPSPEED=true asks for zero3", "CPU", "--strategy ddp"]),
        (DEEPSPEED, state(1, "DEEPSPEED"), ["ACCELERATE_USE_DEEPSPEED=true asks for zero3", "CPU"]),
        (DEEPSPEED, state(2, "MULTI_GPU", "cuda"), ["asks for zero3", "ddp (MULTI_GPU", "--strategy zero3"]),
        (FSDP, state(2, "MULTI_CPU"), ["ACCELERATE_USE_FSDP=true asks for fsdp", "CPU"]),
        (FSDP, state(1, "NO", "cuda"), ["ACCELERATE_USE_FSDP=true asks for fsdp", "single (NO on cuda"]),
        (
            {"WORLD_SIZE": "2"},
            state(1, "NO", "cuda"),
            ["WORLD_SIZE=2", "what runs is 1", "--processes 2", "processes=1"],
        ),
        ({"SLURM_STEP_NUM_TASKS": "8"}, state(), ["SLURM_STEP_NUM_TASKS=8", "what runs is 1"]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, state(2, "MULTI_CPU"), ["OMPI_COMM_WORLD_SIZE=4", "what runs is 2"]),
    ],
)
def test_variables_that_ask_for_what_did_not_start_stop(environ: dict[str, str], found: Any, words: list[str]) -> None:
    message = refusal(check_started, LaunchConfig(), found, environ)
    for word in words:
        assert word in message


def test_variables_that_were_met_or_overruled_pass() -> None:
    check_started(LaunchConfig(), state(2, "DEEPSPEED", "cuda"), DEEPSPEED | {"WORLD_SIZE": "2"})
    check_started(LaunchConfig(None, "zero2"), state(2, "DEEPSPEED", "cuda"), DEEPSPEED)  # the stage is known later
    check_started(LaunchConfig(), state(2, "MULTI_GPU", "cuda"), FSDP | {"SLURM_STEP_NUM_TASKS": "1"})
    check_started(LaunchConfig(1), state(), {"SLURM_STEP_NUM_TASKS": "8"})  # eight runs of one process each, as said
    assert "fsdp (ACCELERATE_USE_FSDP=true)" in refusal(
        check_started, LaunchConfig(2, "ddp"), state(2, "MULTI_GPU", "cuda"), FSDP
    )


def test_processes_are_counted_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under DeepSpeed on the CPU: torch has two processes, accelerate's state counts one."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    message = refusal(check_started, LaunchConfig(), state(1, "DEEPSPEED", "cuda"))
    assert "torch runs 2 process(es)" in message and "accelerate counts 1" in message


def test_one_process_over_all_gpus_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would spread it over them with nn.DataParallel and multiply the batch."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    message = refusal(check_started, LaunchConfig(), state(1, "NO", "cuda"))
    assert "8 GPUs" in message and "nn.DataParallel" in message and "--processes 8 --strategy ddp" in message
    check_started(LaunchConfig(), state(8, "MULTI_GPU", "cuda"), {})
    check_started(LaunchConfig(), state(), {})


def test_the_accelerator_tells_stage_and_version() -> None:
    for stage in (1, 2, 3):
        assert running_strategy(zero(4, stage)) == f"zero{stage}"
        check_strategy(LaunchConfig(4, f"zero{stage}"), zero(4, stage), DEEPSPEED)  # type: ignore[arg-type]
    check_strategy(LaunchConfig(4, "fsdp"), fsdp(4, 2), FSDP)
    check_strategy(LaunchConfig(1, "single"), state(1, "MULTI_GPU", "cuda"), {})
    check_strategy(LaunchConfig(), fsdp(4, 1), FSDP)
    assert "zero2 asked for, but what runs is zero3" in refusal(check_strategy, LaunchConfig(4, "zero2"), zero(4, 3))
    assert "fsdp asked for, but what runs is fsdp1" in refusal(check_strategy, LaunchConfig(4, "fsdp"), fsdp(4, 1))
    assert "what runs is ddp" in refusal(check_strategy, LaunchConfig(4, "fsdp"), state(4, "MULTI_GPU", "cuda"))
    message = refusal(check_strategy, LaunchConfig(), state(4, "MULTI_GPU", "cuda"), FSDP)
    assert "ACCELERATE_USE_FSDP=true asks for fsdp" in message and "ddp (MULTI_GPU" in message


def test_accelerates_own_states_are_understood() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True)
        assert running_strategy(accelerator) == "single"
        for check, found in ((check_started, PartialState()), (check_strategy, accelerator)):
            check(LaunchConfig(1, "single"), found, {})
            assert "2 asked for, but what runs is 1" in refusal(check, LaunchConfig(2), found)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_variables_are_checked_before_deepspeed_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("smoke", ["training.use_cpu=true"])
    check_environment(recipe, {})
    for environ in (DEEPSPEED, FSDP):
        with pytest.raises(ConfigError, match="on the CPU"):
            check_environment(recipe, environ)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    recipe = load_recipe("smoke")
    for environ in (DEEPSPEED, FSDP):  # rank 0 alone may hold weights before training, and none after it
        with pytest.raises(ConfigError, match="evaluation.before and evaluation.after: no process holds the whole"):
            check_environment(recipe, environ)
        check_environment(load_recipe("smoke", WHOLE), environ)
    check_environment(recipe, {"ACCELERATE_USE_DEEPSPEED": "true"})
    with pytest.raises(ConfigError, match="set evaluation.after=false"):
        refuse_sharded_evaluation("fsdp", False, True)


def test_wrong_settings_are_refused() -> None:
    for values, word in [((0, None), "must be >= 1"), ((2, "single"), "single, which is one process")]:
        with pytest.raises(ConfigError, match=word):
            LaunchConfig(*values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"launch\.strategy: 'zero4' is not valid"):
        load_recipe("smoke", ["launch.strategy=zero4"])
    for given, word in [((0,), ">= 1"), ((2, 2, "h"), "from 0 to 1"), ((2, 0), "needs --main-address")]:
        with pytest.raises(ConfigError, match=word):
            Machines(*given)


# How it is started


def planned(overrides: list[str], *place: Any, device: str = "gpu", devices: int | None = 8) -> str:
    recipe = load_recipe("smoke", overrides)
    return str(plan_launch(recipe, "smoke", overrides, Machines(*place), device, devices))  # type: ignore[arg-type]


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(launch, "_python", lambda: "python")


def test_commands_on_the_cpu(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = planned(["seed=2"], device="cpu", devices=0)
    assert one == "python -m rltok train smoke seed=2 launch.processes=1 launch.strategy=single"
    two = planned(["launch.processes=2"], device="cpu", devices=0)
    rest = "-m rltok train smoke launch.processes=2 launch.strategy=ddp"
    assert two == f"OMP_NUM_THREADS=8 python -m torch.distributed.run --standalone --nproc-per-node=2 {rest}"
    far = planned(["launch.processes=4"], 2, 1, "node0", 4000, device="cpu", devices=0)
    place = "--nnodes=2 --node-rank=1 --nproc-per-node=2 --master-addr=node0 --master-port=4000"
    assert f"python -m torch.distributed.run {place} -m rltok train smoke launch.processes=4" in far
    assert planned(["launch.processes=2"], device="cpu", devices=8).endswith("training.use_cpu=true")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert planned(["launch.processes=2"], device="cpu", devices=0).startswith("python -m torch")


def test_commands_on_gpus(cores: None) -> None:
    everything = planned([])
    assert everything.startswith(
        f"OMP_NUM_THREADS=2 python -m accelerate.commands.launch --config_file {ACCELERATE_DIR}"
    )
    assert "multi_gpu.yaml --num_processes 8 --num_machines 1" in everything
    assert everything.endswith("-m rltok train smoke launch.processes=8 launch.strategy=ddp")
    for strategy in ("zero1", "zero2", "zero3", "fsdp"):
        text = planned([f"launch.strategy={strategy}", *WHOLE], 2, 1, "node0", 4000)
        assert f"{strategy}.yaml --num_processes 16 --num_machines 2 --machine_rank 1 --main_process_ip node0 " in text
        assert "--main_process_port 4000 --same_network" in text
        assert text.endswith(f"launch.processes=16 launch.strategy={strategy}")
    assert planned(["launch.processes=1"]).startswith("CUDA_VISIBLE_DEVICES=0 python -m rltok train smoke")
    assert planned(["launch.processes=1"], devices=1).startswith("python -m rltok train smoke")


@pytest.mark.parametrize(
    ("overrides", "place", "device", "devices", "words"),
    [
        (["launch.strategy=zero2"], (), "cpu", 0, ["zero2 on the CPU", "miscounts", "launch.strategy=ddp"]),
        (["launch.strategy=fsdp"], (), "cpu", 0, ["fsdp on the CPU", "plain data parallel"]),
        (["launch.processes=3"], (2, 0, "h"), "cpu", 0, ["3 do not spread evenly over 2 machines"]),
        (["launch.processes=4"], (), "gpu", 2, ["4 processes on a machine with 2 GPU(s)", "at most 2"]),
        (["launch.strategy=single"], (), "gpu", 2, ["single is one process, but there are 2"]),
        (["launch.strategy=zero3"], (), "gpu", 2, ["evaluation.before=false evaluation.after=false", "zero3"]),
        ([], (), "gpu", None, ["no GPU here to count"]),
    ],
)
def test_plans_that_cannot_work_are_refused(
    overrides: list[str], place: tuple[Any, ...], device: str, devices: int | None, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        planned(overrides, *place, device=device, devices=devices)
    for word in words:
        assert word in str(caught.value)


def test_a_machine_that_lacks_something_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        check_machine("ddp", "gpu", 0)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"zero2 needs DeepSpeed.*rltok\[deepspeed\]"):
        check_machine("zero2", "gpu", 8)
    check_machine("ddp", "gpu", 8)
    check_machine(None, "cpu", 0)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["launch", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_dry_run_prints_a_command_to_copy(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("started"))
    code, out, _ = printed(capsys, "smoke", "--processes", "2", "--dry-run", "--device", "cpu", "name=a b")
    assert code == 0 and out.count("\n") == 1
    words = [word for word in shlex.split(out) if not word.startswith("OMP_NUM_THREADS=")]
    assert words[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert words[5:] == ["-m", "rltok", "train", "smoke", "name=a b", "launch.processes=2", "launch.strategy=ddp"]
    code, out, _ = printed(
        capsys, "gsm8k_vllm_server", "--dry-run", "--device", "gpu", "--machines", "2", "--main-address", "n0"
    )
    assert code == 0 and "zero2.yaml --num_processes 4 --num_machines 2 --machine_rank 0" in out
    code, _, err = printed(capsys, "smoke", "--strategy", "zero2", "--processes", "2", "--device", "cpu")
    assert code == 2 and err.startswith("error: launch.strategy: zero2 on the CPU")
    if not torch.cuda.is_available():
        code, _, err = printed(capsys, "smoke", "--processes", "2", "--device", "gpu")
        assert code == 2 and "2 processes on a machine with 0 GPU(s)" in err


# The files for accelerate


def launched(file: Path, *given: str) -> tuple[Any, dict[str, str]]:
    """Arguments and environment of the processes that `accelerate launch` would start."""
    words = ["--config_file", str(file), *given, "-m", "rltok", "train", "demo"]
    args = accelerate_launch.launch_command_parser().parse_args(words)
    args, defaults, _ = accelerate_launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    if args.use_deepspeed:
        return args, prepare_deepspeed_cmd_env(args)[1]
    return args, prepare_multi_gpu_env(args) if args.use_fsdp or args.multi_gpu else {}


@pytest.mark.parametrize(
    ("name", "kind", "processes", "machines"),
    [
        ("cpu", None, 1, 1),
        ("gpu", None, 1, 1),
        ("multi_gpu", "multi_gpu", 8, 1),
        ("two_machines", "multi_gpu", 16, 2),
        ("zero1", "use_deepspeed", 8, 1),
        ("zero2", "use_deepspeed", 8, 1),
        ("zero3", "use_deepspeed", 8, 1),
        ("fsdp", "use_fsdp", 8, 1),
    ],
)
def test_accelerate_reads_the_shipped_files(name: str, kind: str | None, processes: int, machines: int) -> None:
    file = ACCELERATE_DIR / f"{name}.yaml"
    args, environment = launched(file, *(["--machine_rank", "1"] if machines > 1 else []))
    assert [k for k in ("multi_gpu", "use_deepspeed", "use_fsdp") if getattr(args, k)] == ([kind] if kind else [])
    assert (args.num_processes, args.num_machines) == (processes, machines)
    assert args.module and args.mixed_precision == "no", "precision has one place: training.bf16"
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ") and len(lines[0]) > 20
    if kind:
        assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
        assert any("rltok launch RECIPE" in line for line in lines) and f"--config_file {name}.yaml" in "".join(lines)


def test_every_shipped_file_is_covered() -> None:
    assert {path.stem for path in ACCELERATE_DIR.glob("*.yaml")} == {
        *launch.FILES.values(),
        *("cpu", "gpu", "two_machines"),
    }
    assert all(config_file(strategy).is_file() for strategy in launch.STRATEGIES if strategy != "single")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_files_give_that_stage(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args, environment = launched(config_file(f"zero{stage}"), "--num_processes", "2")
    assert args.num_processes == 2
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.zero3_init_flag == plugin.zero3_save_16bit_model == (stage == 3)
    assert plugin.deepspeed_config["gradient_clipping"] == "auto"
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto"
    plugin.set_mixed_precision("bf16")
    assert plugin.deepspeed_config["bf16"]["enabled"] is True
    monkeypatch.setattr(sys, "argv", ["rltok"])
    check_strategy(LaunchConfig(2, f"zero{stage}"), zero(2, plugin.zero_stage), environment)  # type: ignore[arg-type]


def test_fsdp_file_gives_fsdp2_with_whole_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    _, environment = launched(config_file("fsdp"), "--num_processes", "4")
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for name, value in environment.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_planned_commands_are_read_by_accelerate_as_meant(strategy: str) -> None:
    overrides = [f"launch.strategy={strategy}", *WHOLE]
    recipe = load_recipe("smoke", overrides)
    plan = plan_launch(recipe, "smoke", overrides, Machines(2, 1, "127.0.0.1", 4000), "gpu", 8)
    args = accelerate_launch.launch_command_parser().parse_args(list(plan.arguments[3:]))
    args, defaults, _ = accelerate_launch._validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    prepare = prepare_deepspeed_cmd_env if strategy == "zero2" else prepare_multi_gpu_env
    made = prepare(args)
    assert made[0] is None if strategy == "zero2" else made, "DeepSpeed's own launcher, with ssh, is not used"
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", 1, "8")
    assert (args.master_addr, args.master_port) == ("127.0.0.1", "4000")
    assert [args.training_script, *args.training_script_args[:2]] == ["rltok", "train", "smoke"]


# Recipes and the SLURM script


def test_the_vllm_server_recipe_says_how_to_start_the_server() -> None:
    from rltok.trainers.vllm import server_command

    recipe = load_recipe("gsm8k_vllm_server")
    comments = " ".join(
        line.strip("#\\ ")
        for line in (CONFIG_DIR / "gsm8k_vllm_server.yaml").read_text().splitlines()
        if line.startswith("#")
    )
    for part in server_command(recipe.model.path).split(" --"):
        assert part.strip() in comments
    assert recipe.training["use_vllm"] and recipe.training["vllm_mode"] == "server"
    assert recipe.launch == LaunchConfig(4, "zero2")
    assert int(comments.split("--max-model-len ")[1].split()[0]) > recipe.training["max_completion_length"]
    rows = recipe.training["per_device_train_batch_size"] * recipe.launch.processes  # type: ignore[operator]
    assert rows * recipe.training["steps_per_generation"] == 1024 and 1024 % recipe.training["num_generations"] == 0
    assert "gsm8k_vllm_server.yaml" not in comments and "rltok launch gsm8k_vllm_server" in comments


def written_commands() -> list[str]:
    """Every `rltok launch` of the document and of comments in recipes, as one line each."""
    files = [ROOT / "docs" / "scale.md", *CONFIG_DIR.glob("*.yaml")]
    text = "\n".join(re.sub(r"(?m)^# ?", "", file.read_text(encoding="utf-8")) for file in files)
    lines = re.findall(r"^ *((?:\w+=\S+ )?rltok launch .*)$", re.sub(r" *\\\n *", " ", text), flags=re.MULTILINE)
    return [line.split("   #")[0] for line in lines if "RECIPE" not in line]


def test_written_commands_can_be_planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = written_commands()
    assert len(commands) >= 12 and any("7b_qlora" in text for text in commands)
    for text in commands:
        words = shlex.split(text)
        code, out, err = printed(capsys, *words[words.index("launch") + 1 :], "--dry-run", "--device", "gpu")
        assert code == 0 and "-m rltok train" in out, f"{text}\n{err}"
        updates = [word for word in words if word.startswith(("training.gradient_acc", "training.steps_per_gen"))]
        assert all(word in out for word in updates)


def test_slurm_script_starts_one_launcher_per_node(tmp_path: Path) -> None:
    """SLURM's commands and rltok are stand-ins that say what they were called with."""
    bodies = {
        "scontrol": 'printf "alpha\\nbeta\\n"',
        "srun": 'shift\nfor node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "rltok": 'printf "%s|" "$@"; echo "threads $OMP_NUM_THREADS"',
    }
    for name, body in bodies.items():
        path = tmp_path / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "alpha,beta", "SLURM_JOB_ID": "123456"}
    environ |= {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "STRATEGY": "zero3"}
    script = CONFIG_DIR / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", str(script), "demo", "name=a b"], env=environ, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    options = "--device|gpu|--strategy|zero3|--processes|16|--machines|2|--main-address|alpha|--main-port|23456"
    assert lines == [f"launch|demo|name=a b|resume=auto|{options}|--machine-rank|{rank}|threads 8" for rank in (0, 1)]
    assert subprocess.run(["bash", str(script)], env=environ, capture_output=True, timeout=30).returncode == 2


# Processes


LIMIT = 400
"""Seconds that a whole run may take; a busy machine needs several times the usual half minute."""


def begin(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """A module of Python in a process group of its own, its output and errors in one stream."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-m", *arguments]
    return subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, start_new_session=True, **streams)


def finish(started: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and output; what still runs after `LIMIT` is ended, ranks included."""
    try:
        output, _ = started.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        raise
    return started.returncode, output


@pytest.fixture(scope="module")
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two processes on one machine."""
    folder = tmp_path_factory.mktemp("one")
    options = ["--processes", "2", "--device", "cpu"]
    code, output = finish(begin(["rltok", "launch", "smoke", *options, *SHORT, "output_dir=out"], folder))
    assert code == 0, output[-4000:]
    assert "-m torch.distributed.run --standalone --nproc-per-node=2 -m rltok train smoke" in output
    return folder / "out"


def test_launch_trains_on_two_processes(one_machine: Path) -> None:
    facts = json.loads((one_machine / "environment.json").read_text())
    assert facts["processes"] == 2 and "launch.processes=2" in facts["argv"]
    assert json.loads((one_machine / "summary.json").read_text())["steps"] == 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_machines_train_like_two_processes_of_one(one_machine: Path, tmp_path: Path) -> None:
    """Two launchers that meet on the loopback address, as two machines would on a network."""
    options = ["--processes", "2", "--machines", "2", "--main-address", "127.0.0.1", "--main-port", str(free_port())]
    arguments = ["rltok", "launch", "smoke", *options, "--device", "cpu", *SHORT, f"output_dir={tmp_path / 'out'}"]
    machines = [begin([*arguments, "--machine-rank", str(rank)], tmp_path) for rank in (0, 1)]
    for code, output in [finish(machine) for machine in machines]:
        assert code == 0, output[-4000:]
    assert json.loads((tmp_path / "out" / "environment.json").read_text())["processes"] == 2
    expected, found = (
        load_file(path / "checkpoint-2" / "model.safetensors") for path in (one_machine, tmp_path / "out")
    )
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_accelerate_on_the_cpu_starts_one_process_and_the_run_stops(tmp_path: Path) -> None:
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "rltok", "train", "smoke"]
    code, output = finish(begin([*words, *SHORT, "launch.processes=2", "output_dir=out"], tmp_path))
    assert code != 0 and "error: launch.processes: 2 asked for, but what runs is 1" in output
    assert "rltok launch smoke" in output and "--processes 2" in output
    assert not (tmp_path / "out").exists()


def two_ranks(folder: Path, code: str) -> subprocess.Popen[str]:
    """Another module in place of rltok, started on two processes as `rltok launch` would start it."""
    header = "import os, pathlib, sys, time\npathlib.Path(os.environ['RANK']).write_text(str(os.getpid()))\n"
    (folder / "other.py").write_text(header + code)
    plan = plan_launch(load_recipe("smoke", ["launch.processes=2"]), "smoke", [], Machines(), "cpu", 0)
    arguments = [*plan.arguments[: plan.arguments.index("rltok")], "other"]
    started = subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not all((folder / rank).is_file() and (folder / rank).read_text() for rank in "01"):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return started


def assert_both_ended(folder: Path) -> None:
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((folder / rank).read_text()), 0)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    """Rank 0 would wait for an hour; the launcher ends it when rank 1 has died."""
    wait = "while not (os.path.exists('0') and os.path.exists('1')): time.sleep(0.05)\n"
    started = two_ranks(tmp_path, f"{wait}sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(3600)\n")
    died = time.monotonic()
    _, errors = started.communicate(timeout=120)
    assert started.returncode != 0 and re.search(r"rank +: 1 .*\n.*exitcode +: 7", errors)
    assert time.monotonic() - died < 60
    assert_both_ended(tmp_path)


def test_ctrl_c_ends_every_rank(tmp_path: Path) -> None:
    started = two_ranks(tmp_path, "time.sleep(3600)\n")
    started.send_signal(signal.SIGINT)
    started.communicate(timeout=120)
    assert started.returncode != 0
    assert_both_ended(tmp_path)


def test_the_launcher_becomes_the_command(tmp_path: Path) -> None:
    """Output, variables and exit status are the command's, and so are signals: no process stands in between."""
    code = "import os, signal, sys; print(os.getpid(), os.environ['GIVEN']); sys.exit(5)"
    plan = LaunchPlan((sys.executable, "-c", code), {"GIVEN": "x y"})
    script = f"from rltok.launch import LaunchPlan; LaunchPlan({plan.arguments!r}, {plan.environment!r}).start()"
    started = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    out, _ = started.communicate(timeout=120)
    assert started.returncode == 5 and out.split(maxsplit=1) == [str(started.pid), "x y\n"]
    waits = LaunchPlan((sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"))
    script = f"from rltok.launch import LaunchPlan; LaunchPlan({waits.arguments!r}).start()"
    started = subprocess.Popen([sys.executable, "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=60) == -signal.SIGTERM
    started.stdout.close()
