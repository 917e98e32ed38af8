"""Faults inside training: NaN, rewards that hang or die, lost processes, data and tokenizers that cannot work."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from faults_worker import CASES, DDP_TIMEOUT
from safetensors.torch import load_file
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from trl import GRPOTrainer

from rltok.config import ConfigError
from rltok.data import DataConfig, check_prompts, load_data
from rltok.data.load import DataSplits
from rltok.faults import FaultsConfig, LostProcessError, NonFiniteError, explained
from rltok.rewards import RewardError, build_rewards, guarded
from rltok.rewards.time_limit import EXIT_STATUS
from rltok.rewards.verify import VerifierProcess
from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.guarded import SKIPPED, GuardedTraining

HERE = Path(__file__).parent


# ---------------------------------------------------------------- losses and gradients that are not finite


class Spoiled(CreditTrainer):
    """The loss of some micro-batches (counted from 1) is multiplied, some gradients too; two make an optimizer step."""

    losses: dict[int, float] = {}
    gradients: dict[int, float] = {}
    computed = 0

    def _compute_loss(self, model, inputs):
        self.computed += 1
        return super()._compute_loss(model, inputs) * self.losses.get(self.computed, 1.0)


def spoiled(folder, losses=(), gradients=(), kind=Spoiled, faults=None, **changes):
    tokenizer = build_tokenizer()
    trainer = kind(
        build_model(tokenizer),
        even_reward,
        CreditConfig(**run_settings(folder, **changes), faults=faults),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    trainer.losses, trainer.gradients = dict(losses), dict(gradients)
    parameter = trainer.model.get_input_embeddings().weight
    parameter.register_hook(lambda gradient: gradient * trainer.gradients.get(trainer.computed, 1.0))
    return trainer


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


class Unguarded(Spoiled):
    """TRL's and transformers' own methods in place of the guarded ones."""

    compute_loss = GRPOTrainer.compute_loss
    _clip_grad_norm = GRPOTrainer._clip_grad_norm
    _get_grad_norm = GRPOTrainer._get_grad_norm
    log = GRPOTrainer.log


@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_a_healthy_run_is_not_changed_by_a_bit(tmp_path, max_grad_norm):
    runs = []
    for kind, faults in ((Unguarded, None), (Spoiled, None), (Spoiled, {"nonfinite": "skip"})):
        runs.append(spoiled(tmp_path, kind=kind, faults=faults, max_grad_norm=max_grad_norm))
        runs[-1].train()
    expected = weights(runs[0])
    assert not torch.equal(expected["lm_head.weight"], build_model(build_tokenizer()).lm_head.weight)
    for run in runs[1:]:
        assert all(torch.equal(value, expected[name]) for name, value in weights(run).items())
    norms = [[entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry] for run in runs]
    assert norms[0] == norms[1] == norms[2] and len(norms[0]) == 3
    assert not (tmp_path / "nonfinite").exists()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_nan_loss_stops_the_run_with_its_micro_batch_on_disk(tmp_path, max_grad_norm):
    trainer = spoiled(tmp_path, losses={4: math.nan}, max_grad_norm=max_grad_norm, log_completions=True)
    file = tmp_path / "nonfinite" / "step_2_rank_0.safetensors"
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    message = str(caught.value)
    for part in ("step 2: the loss is nan on rank 0", "micro-batch 1, rows ", str(file), "faults.nonfinite=stop"):
        assert part in message, part
    tensors, record = load_file(file), json.loads(file.with_suffix(".json").read_text())
    assert tensors["1/loss"].isnan() and tensors["1/completion_ids"].size(0) == 4
    assert {"1/prompt_ids", "1/completion_mask", "1/advantages"} <= set(tensors)
    assert not any(name.startswith("0/") for name in tensors), "the other micro-batch's loss was finite"
    assert (record["step"], record["rank"], record["not_finite"]) == (2, 0, ["1/loss"])
    assert math.isfinite(record["losses"][0]) and record["losses"][1] == "nan"
    assert set(record["gradient_norms"].values()) == {"nan"} and record["parameters_not_finite"] == []
    rows = record["rows"]
    assert len(rows) == 4 and all(isinstance(row["row"], int) and row["prompt"] for row in rows)
    first = tensors["1/completion_mask"][0].sum()
    assert len(rows[0]["tokens"]) == first and all(isinstance(token, str) for token in rows[0]["tokens"])
    assert trainer.state.global_step == 1


def test_a_gradient_alone_is_found_and_named(tmp_path):
    trainer = spoiled(tmp_path, gradients={2: math.inf})
    with pytest.raises(NonFiniteError, match=r"step 1: a gradient is not finite on rank 0 \(micro-batch 0, 1, rows"):
        trainer.train()
    file = tmp_path / "nonfinite" / "step_1_rank_0.safetensors"
    record = json.loads(file.with_suffix(".json").read_text())
    broken = [name for name, norm in record["gradient_norms"].items() if isinstance(norm, str)]
    assert broken == ["model.embed_tokens.weight"], "clipping has not spread it to the others"
    assert all(isinstance(loss, float) for loss in record["losses"]) and record["not_finite"] == []
    assert {name.split("/")[0] for name in load_file(file)} == {"0", "1"}, "nobody knows which of them it was"


def test_skipping_leaves_weights_and_optimizer_untouched(tmp_path):
    faults, schedule = {"nonfinite": "skip"}, {"max_steps": 3, "lr_scheduler_type": "linear"}
    seen = []

    class Watched(Spoiled):
        def _clip_grad_norm(self, model):
            seen.append(weights(self))
            return super()._clip_grad_norm(model)

    trainer = spoiled(tmp_path, losses={3: math.inf}, kind=Watched, faults=faults, **schedule)
    trainer.train()
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[2].items()), "step 2 was left out"
    assert not all(torch.equal(value, seen[0][name]) for name, value in seen[1].items()), "step 1 was not"
    assert not all(torch.equal(value, seen[2][name]) for name, value in weights(trainer).items()), "nor step 3"
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry[SKIPPED] for entry in log] == [0, 1, 1]
    assert math.isnan(log[1]["grad_norm"]) and math.isfinite(log[2]["grad_norm"])
    plain = spoiled(tmp_path / "plain", **schedule)
    plain.train()
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (trainer, plain)]
    assert rates[0] == rates[1], "the schedule follows the step number"
    assert (tmp_path / "nonfinite" / "step_2_rank_0.json").is_file()


def test_too_many_skips_in_a_row_end_the_run(tmp_path):
    losses = dict.fromkeys([1, 2, 5, 6, 7, 8, 9, 10], math.nan)  # steps 1, 3, 4 and 5
    trainer = spoiled(tmp_path, losses, faults={"nonfinite": "skip", "max_skips": 2}, max_steps=6)
    with pytest.raises(NonFiniteError, match=r"step 5: .*step 3 in a row.*faults\.max_skips=2"):
        trainer.train()
    assert trainer._skipped_steps == 3
    assert len(list((tmp_path / "nonfinite").glob("*.json"))) == 4


def test_the_count_of_skipped_steps_survives_a_checkpoint(tmp_path):
    faults = {"nonfinite": "skip"}
    settings = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "max_steps": 4}
    whole = spoiled(tmp_path / "whole", {1: math.nan, 3: math.nan}, faults=faults, **settings)
    whole.train()
    again = spoiled(tmp_path / "again", faults=faults, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again._skipped_steps == whole._skipped_steps == 2
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())


def test_a_full_disk_does_not_hide_the_nan(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(NonFiniteError, match=r"could not be saved to .*No space left.*faults\.nonfinite=stop"):
        spoiled(tmp_path, losses={1: math.nan}).train()


@pytest.mark.parametrize(("deepspeed", "optim"), [(True, "adamw_torch"), (False, "lomo")])
def test_skipping_is_refused_where_a_step_cannot_be_left_out(deepspeed, optim):
    args = SimpleNamespace(optim=optim)
    trainer = SimpleNamespace(_faults=FaultsConfig(nonfinite="skip"), is_deepspeed_enabled=deepspeed, args=args)
    with pytest.raises(ConfigError, match=r"faults\.nonfinite: 'skip' cannot .*; set faults\.nonfinite=stop"):
        GuardedTraining._check_faults(trainer)
    trainer._faults = FaultsConfig()
    GuardedTraining._check_faults(trainer)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"nonfinite": "ignore"}, r"faults\.nonfinite: .*'ignore'.*stop.*skip"),
        ({"max_skips": 0}, r"faults\.max_skips: 0 must be >= 1"),
        ({"reward_timeout": 0.0}, r"faults\.reward_timeout: 0.0 must be > 0"),
        ({"max_skip": 1}, r"faults\.max_skip: .*max_skips"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_touched(section, message, tmp_path):
    args = CreditConfig(**run_settings(tmp_path), faults=section)
    with pytest.raises(ConfigError, match=message):
        CreditTrainer("no such model", even_reward, args, train_dataset=digit_dataset())


# ---------------------------------------------------------------- rewards that hang or die


ROWS = {"prompts": ["p", "q"], "completions": ["x", "y"]}


def hangs(completions, **_):
    """Goes on after every error, as rewards do that score row by row."""
    for _ in completions:
        try:
            time.sleep(60)
        except Exception:  # the point of this test
            continue
    return [0.0 for _ in completions]


def backtracks(completions, **_):
    """A regular expression that takes ages, in C, without letting other threads run."""
    return [float(bool(re.match(r"(a+)+$", "a" * 40 + "b"))) for _ in completions]


def swallows(completions, **_):
    for _ in range(3):
        try:
            time.sleep(60)
        except BaseException:  # noqa: B036, S112 - even this must not make it hang
            continue
    return [0.0 for _ in completions]


@pytest.mark.parametrize("function", [hangs, backtracks, swallows])
def test_a_reward_that_hangs_is_interrupted(function, tmp_path):
    before, start = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(RewardError, match=r"'slow' took longer than faults\.reward_timeout=0\.3 s") as caught:
        guarded(function, "slow", tmp_path, timeout=0.3)(**ROWS)
    assert time.monotonic() - start < 5
    record = json.loads(caught.value.file.read_text())
    assert record["completions"] == ["x", "y"]
    assert function is swallows or function.__name__ in record["traceback"]
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert not [thread for thread in threading.enumerate() if thread.name == "time limit"]


def test_a_limit_that_is_not_reached_changes_nothing(tmp_path):
    guard = guarded(lambda completions, **_: [1.0, None], "quick", tmp_path, timeout=20.0)
    start = time.perf_counter()
    assert all(guard(**ROWS) == [1.0, None] for _ in range(50))
    assert (time.perf_counter() - start) / 50 < 0.02
    assert guard.timeout == 20.0
    with pytest.raises(ValueError, match=r"timeout=0 .*faults\.reward_timeout"):
        guarded(even_reward, "x", tmp_path, timeout=0)


def test_async_rewards_have_the_limit_where_they_await(tmp_path):
    async def waits(completions, **_):
        await asyncio.sleep(60)

    async def own_timeout(completions, **_):
        raise TimeoutError("a server's")

    with pytest.raises(RewardError, match=r"'w' took longer than faults\.reward_timeout=0\.2 s"):
        asyncio.run(guarded(waits, "w", tmp_path, timeout=0.2)(**ROWS))
    with pytest.raises(RewardError, match=r"'o' raised TimeoutError: a server's \(row 0 of 2\)"):
        asyncio.run(guarded(own_timeout, "o", tmp_path, timeout=5.0)(**ROWS))


HANG = """
import asyncio, ctypes, signal, sys, time
from rltok.rewards import time_limit
from rltok.rewards.guard import guarded

time_limit.GRACE, time_limit.LAST_RESORT = 1.2, 1.0
rows = {"prompts": ["p"], "completions": ["x"]}

def uninterruptible(completions, **_):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(60)

def keeps_the_interpreter(completions, **_):
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    ctypes.PyDLL(None).sleep(60)

async def blocks_the_loop(completions, **_):
    time.sleep(60)

guard = guarded(globals()[sys.argv[1]], "stuck", sys.argv[2], timeout=0.3)
result = guard(**rows)
if sys.argv[1] == "blocks_the_loop":
    asyncio.run(result)
"""


def test_a_reward_that_cannot_be_interrupted_ends_its_process(tmp_path):
    names = ("uninterruptible", "blocks_the_loop", "keeps_the_interpreter")
    start = time.monotonic()
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", HANG, name, str(tmp_path / name)], stderr=subprocess.PIPE, text=True
        )
        for name in names
    }
    errors = {name: process.communicate(timeout=55)[1] for name, process in processes.items()}
    assert time.monotonic() - start < 55
    for name in names[:2]:
        assert processes[name].returncode == EXIT_STATUS, errors[name][-2000:]
        assert "reward function 'stuck' did not return within faults.reward_timeout=0.3 s" in errors[name]
        (file,) = (tmp_path / name).glob("stuck-batch-*.json")
        record = json.loads(file.read_text())
        assert str(file) in errors[name] and record["completions"] == ["x"] and name in record["traceback"]
    last = names[2]  # no thread of Python could run: only the stacks are left
    assert processes[last].returncode == 1 and f"in {last}" in errors[last], errors[last][-2000:]
    assert "Timeout" in errors[last] and not list(tmp_path.glob(f"{last}/*"))


def test_the_limit_reaches_the_rewards_of_a_recipe_and_of_a_trainer(tmp_path):
    (function,) = build_rewards({"f": {"function": "length"}}, save_dir=tmp_path, timeout=7.0).functions
    assert function.timeout == 7.0
    tokenizer = build_tokenizer()
    trainer = CreditTrainer(
        build_model(tokenizer),
        [hangs, function],
        CreditConfig(**run_settings(tmp_path), faults={"reward_timeout": 0.5}),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    assert [f.timeout for f in trainer.reward_funcs] == [0.5, 7.0], "a limit that it has already stays"
    assert trainer.reward_func_names == ["hangs", "f"]
    with pytest.raises(RewardError, match=r"'hangs' took longer than faults\.reward_timeout=0\.5 s"):
        trainer.train()


def test_a_verifier_killed_while_it_judges_is_started_again():
    verifier = VerifierProcess()
    assert verifier.ask({"kind": "math", "answer": "2/4", "gold": "0.5", "is_text": False}, 30.0).score == 1.0
    killer = threading.Timer(0.3, lambda: os.kill(verifier.pid, signal.SIGKILL))
    killer.start()
    first = verifier.pid
    endless = verifier.ask({"kind": "math", "answer": "9" + "**9" * 9, "gold": "0.5", "is_text": False}, 1.0)
    assert endless.score == 0.0 and verifier.pid != first
    assert verifier.ask({"kind": "math", "answer": "1/3", "gold": "2/6", "is_text": False}, 30.0).score == 1.0
    verifier.close()


def test_a_reward_that_ends_the_process_ends_the_run_with_its_status():
    code = (
        "import os; from rltok.rewards.guard import guarded\n"
        "guarded(lambda completions, **_: os._exit(3), 'dies', '.', timeout=5.0)(prompts=['p'], completions=['x'])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=55, check=False).returncode == 3


# ---------------------------------------------------------------- processes that die


def environment() -> dict[str, str]:
    paths = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **paths}


def slack() -> float:
    """Seconds that things may take beside their time limit, more on a busy machine."""
    return 5 + 5 * os.getloadavg()[0]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(HERE / "faults_worker.py"), str(folder)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder, json.loads((folder / "cases.json").read_text())


@pytest.mark.parametrize("case", ["kill", "frozen", "reward"])
def test_the_other_process_stops_in_time_and_says_why(cases, case):
    folder, results = cases
    survivor, lost = results[case]
    output = (folder / f"{case}_0.log").read_text()
    assert survivor["status"] == 1, (survivor, output[-3000:])
    # transformers alone waits half an hour on the CPU; a process that fails closes its connections as it ends
    assert survivor["seconds"] < {"kill": 0, "frozen": DDP_TIMEOUT, "reward": 5}[case] + slack()
    assert lost["status"] == {"kill": -signal.SIGKILL, "frozen": None, "reward": 1}[case]
    message = output[output.index("LostProcessError") :]
    assert "rank 0: another process" in message and "resume=auto" in message
    timed_out = f"did not answer within training.ddp_timeout={DDP_TIMEOUT} s" in message
    if case == "frozen":
        assert survivor["seconds"] > DDP_TIMEOUT and timed_out
    else:  # on a busy machine a process that failed takes longer to end than the others wait
        assert "died or stopped with an error" in message or (case == "reward" and timed_out)
    if case == "reward":
        assert "reward function 'mine' raised ZeroDivisionError" in (folder / "reward_1.log").read_text()


def test_all_ranks_skip_or_stop_together(cases):
    folder, results = cases
    assert [rank["status"] for rank in results["nan"]] == [0, 0], (folder / "nan_0.log").read_text()[-3000:]
    zero, one = (torch.load(folder / f"nan_{rank}.pt", weights_only=True) for rank in range(2))
    for result in (zero, one):
        assert result["steps"] == 1
        assert "step 2: the loss is nan on rank 1 (micro-batch 1" in result["message"]
        assert "step_2_rank_1.safetensors" in result["message"] and "rank 0" not in result["message"]
    assert zero["skipped"] == [0, 1, 1] and zero["gradient_is_nan"] == [False, True, False]
    for name, value in zero["parameters"].items():
        assert torch.equal(value, one["parameters"][name]) and value.isfinite().all(), name
    names = {path.name for path in (folder / "nan" / "nonfinite").iterdir()}
    assert names == {"step_2_rank_1.json", "step_2_rank_1.safetensors"}, "rank 0's losses were finite"


def test_under_torchrun_a_killed_worker_ends_the_run(tmp_path):
    worker = [str(HERE / "faults_worker.py"), str(tmp_path), "kill"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *worker]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, cwd=tmp_path)
    ended = time.time()
    assert run.returncode != 0 and "SIGKILL" in run.stderr
    assert ended - float((tmp_path / "kill.time").read_text()) < 10 + slack()


def test_errors_of_other_kinds_are_not_explained_away():
    with pytest.raises(RuntimeError, match="^plain$") as caught, explained(0, 10.0):
        raise RuntimeError("plain")
    assert not isinstance(caught.value, LostProcessError)
    with pytest.raises(NonFiniteError, match="gloo/"), explained(0, 10.0):
        raise NonFiniteError("saved to runs/gloo/x")
    too_late = r"rank 3: another process did not answer .*ddp_timeout=10 s"
    with pytest.raises(LostProcessError, match=too_late), explained(3, 10.0):
        raise RuntimeError("Application timeout caused pair closure")
    assert set(CASES) == {"kill", "frozen", "reward", "nan"}


# ---------------------------------------------------------------- before the first step


def splits(train=("1+1=", "2+2="), heldout=("3+3=",)):
    return DataSplits(*(Dataset.from_dict({"prompt": list(p), "answer": [""] * len(p)}) for p in (train, heldout)))


def checked(data, tokenizer=None, positions=256, completion=8, evaluation=8, **settings):
    config = DataConfig(task="chain_sum", train_size=1, heldout_size=0, conversational=False, **settings)
    model = build_model(build_tokenizer(), max_position_embeddings=positions)
    tokenizer = tokenizer or build_tokenizer()
    return check_prompts(data, config, tokenizer, model.config, completion=completion, evaluation=evaluation)


def test_prompts_that_fit_pass_with_hardly_any_tokenized(monkeypatch):
    tokenizer, asked = build_tokenizer(), []
    kind = type(tokenizer)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, text, **k: asked.append(text) or original(self, text, **k))
    data = splits()
    assert checked(data, tokenizer) == data
    assert set(asked) == {""}, "text that cannot be too long is not tokenized"


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (
            splits(("1" * 249, "2")),
            {},
            r"training\.max_completion_length: 1 of 2 training rows .* 248, .*256 positions",
        ),
        (
            splits(("1" * 249, "2")),
            {},
            r"row 0 has 249\. Lower training\.max_completion_length, or .*long_prompts=drop",
        ),
        (splits(heldout=("1" * 20,)), {"evaluation": 240}, r"evaluation\.max_new_tokens: 1 of 1 held-out rows"),
        (splits(("1" * 9,)), {"max_prompt_tokens": 8}, r"data\.max_prompt_tokens: .* than 8, .*Raise data\.max_prompt"),
        (splits(), {"completion": 256}, r"training\.max_completion_length: 256 leaves no room .* 256 positions"),
        (splits(("1" * 9,)), {"max_prompt_tokens": 8, "long_prompts": "drop"}, r"long_prompts: 'drop' leaves no train"),
        (splits(()), {}, r"data: there is no row to train on"),
        (splits(heldout=()), {}, r"data\.heldout_size: no row is held out, .*evaluation\.before=false"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        checked(data, **settings)


def test_long_prompts_are_dropped_if_so_asked(caplog):
    data = splits(("1" * 248, "1" * 249, "3"), ("4", "5" * 300))
    train, heldout = checked(data, long_prompts="drop")
    assert train["prompt"] == ["1" * 248, "3"] and heldout["prompt"] == ["4"]
    assert "1 of 3 training rows" in caplog.text and "row 1 has 249" in caplog.text
    assert len(checked(splits(heldout=("5" * 300,)), evaluation=None).heldout) == 1, "not evaluated, not checked"


def test_the_length_includes_the_chat_template():
    prompt = [{"role": "user", "content": "1" * 10}]  # the template adds "u:", a line end and "a:"
    data = DataSplits(*(Dataset.from_list([{"prompt": prompt, "answer": ""}]) for _ in range(2)))
    assert len(checked(data, max_prompt_tokens=15).train) == 1
    with pytest.raises(ConfigError, match=r"row 0 has 15\b"):
        checked(data, max_prompt_tokens=14)


def test_a_tokenizer_without_chat_template_is_refused_for_conversations_only():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    prompt = [{"role": "user", "content": "1"}]
    data = DataSplits(*(Dataset.from_list([{"prompt": prompt, "answer": ""}]) for _ in range(2)))
    with pytest.raises(ConfigError, match=r"data\.conversational: .*no chat template; set data\.conversational=false"):
        checked(data, tokenizer)
    assert len(checked(splits(), tokenizer).train) == 2


def test_a_tokenizer_without_padding_and_end_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"model\.path: .*neither a padding nor an end-of-sequence token"):
        checked(splits(), tokenizer)


def test_a_run_that_pads_with_the_end_token_trains_as_one_with_its_own(tmp_path):
    ends = []
    for pad in ("<pad>", "<eos>"):
        tokenizer = build_tokenizer()
        tokenizer.pad_token = None if pad == "<eos>" else pad
        trainer = CreditTrainer(
            build_model(build_tokenizer()),
            even_reward,
            CreditConfig(**run_settings(tmp_path)),
            train_dataset=digit_dataset(),
            processing_class=tokenizer,
        )
        assert tokenizer.pad_token == pad, "the end token pads where there is no other"
        trainer.train()
        ends.append(weights(trainer))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("suffix", "content"),
    [("jsonl", ""), ("jsonl", "\n"), ("json", "[]"), ("csv", ""), ("csv", "prompt,answer\n"), ("parquet", "")],
)
def test_an_empty_file_is_refused(suffix, content, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"data\.path: 'rows\.{suffix}' has no rows"):
        load_data(DataConfig(source="file", path=path.name), base_dir=tmp_path)


def test_an_empty_held_out_file_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1", "answer": "1"}) + "\n")
    (tmp_path / "held.csv").write_text("prompt,answer\n")
    config = DataConfig(source="file", path="train.jsonl", heldout_path="held.csv")
    with pytest.raises(ConfigError, match=r"data\.heldout_path: .*held\.csv' has no rows"):
        load_data(config, base_dir=tmp_path)


def test_an_empty_dataset_is_refused_by_the_trainer(tmp_path):
    args = CreditConfig(**run_settings(tmp_path))
    with pytest.raises(ConfigError, match="train_dataset: it has no rows"):
        CreditTrainer("no such model", even_reward, args, train_dataset=Dataset.from_dict({"prompt": []}))


@pytest.mark.parametrize("setting", [{"max_prompt_tokens": 0}, {"long_prompts": "cut"}])
def test_wrong_limits_are_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=rf"data\.{name}: "):
        DataConfig(task="chain_sum", train_size=1, heldout_size=0, **setting)
