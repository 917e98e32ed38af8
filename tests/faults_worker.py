"""Ranks of tiny runs in which something goes wrong on rank 1, in the second optimizer step.

    python faults_worker.py FOLDER CASE      this process is one rank, as the environment says (torchrun)
    python faults_worker.py FOLDER           every case on two processes that nobody watches over

The second form forks the ranks, so that libraries are imported once, and writes for every case and rank the exit
status, the seconds from the fault to its error, and its output. Cases:

    kill     rank 1 is killed in a training step          frozen   rank 1 stops to answer (SIGSTOP)
    reward   a reward function raises on rank 1           nan      the loss is NaN on rank 1: skipped, then stopped
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings

from rltok.faults import NonFiniteError
from rltok.rewards import guarded
from rltok.trainers import CreditConfig, CreditTrainer

CASES = ("kill", "frozen", "reward", "nan")
DDP_TIMEOUT = 5
PATIENCE = 60


class Faulty(CreditTrainer):
    """Something happens on rank 1 in the second micro-batch of the second optimizer step."""

    case, folder = "", Path()
    computed = 0

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        self.computed += 1
        if self.computed != 4 or self.accelerator.process_index != 1:
            return loss
        if self.case in ("kill", "frozen"):
            mark(self.folder, self.case)
            os.kill(os.getpid(), signal.SIGKILL if self.case == "kill" else signal.SIGSTOP)
        return loss * float("nan") if self.case == "nan" else loss


def mark(folder: Path, case: str) -> None:
    """Leave the time of the fault."""
    (folder / f"{case}.time").write_text(str(time.time()))


def build_trainer(folder: Path, case: str, **faults: object) -> Faulty:
    tokenizer = build_tokenizer()

    def reward(completions, **columns):
        if case == "reward" and os.environ["RANK"] == "1":
            mark(folder, case)
            raise ZeroDivisionError("rank 1 only")
        return even_reward(completions)

    args = CreditConfig(**run_settings(folder / case, ddp_timeout=DDP_TIMEOUT), faults=faults or None)
    trainer = Faulty(
        build_model(tokenizer),
        guarded(reward, "mine", folder / case),
        args,
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )
    trainer.case, trainer.folder = case, folder
    return trainer


def run_case(folder: Path, case: str) -> None:
    if case != "nan":
        try:
            build_trainer(folder, case).train()
        finally:
            (folder / f"{case}_{os.environ['RANK']}.time").write_text(str(time.time()))
        return
    skipping = build_trainer(folder, case, nonfinite="skip")
    skipping.train()
    rank = skipping.accelerator.process_index
    log = [entry for entry in skipping.state.log_history if "loss" in entry]
    result = {
        "parameters": {n: p.detach() for n, p in skipping.accelerator.unwrap_model(skipping.model).named_parameters()},
        "skipped": [entry["faults/skipped_steps"] for entry in log],
        "gradient_is_nan": [entry["grad_norm"] != entry["grad_norm"] for entry in log],
    }
    stopping = build_trainer(folder, case)
    try:
        stopping.train()
    except NonFiniteError as error:
        result["message"], result["steps"] = str(error), stopping.state.global_step
    torch.save(result, folder / f"nan_{rank}.pt")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fork_rank(folder: Path, case: str, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    output = os.open(folder / f"{case}_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_case(folder, case)
    sys.exit(0)


def watch(folder: Path, case: str) -> list[dict[str, object]]:
    """Run a case on two processes; exit status (None: had to be ended), and seconds from the fault to the error."""
    port = free_port()
    children = [fork_rank(folder, case, rank, port) for rank in range(2)]
    ended: dict[int, tuple[int, float]] = {}
    deadline = time.time() + PATIENCE
    waits_for = 1 if case == "frozen" else 2  # the frozen rank never ends by itself
    while len(ended) < waits_for and time.time() < deadline:
        for child in set(children) - set(ended):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended[child] = os.waitstatus_to_exitcode(status), time.time()
        time.sleep(0.02)
    for child in set(children) - set(ended):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    file = folder / f"{case}.time"
    fault = float(file.read_text()) if file.is_file() else 0.0
    results = []
    for rank, child in enumerate(children):
        raised = folder / f"{case}_{rank}.time"
        seconds = float(raised.read_text()) - fault if raised.is_file() else None
        results.append({"status": ended[child][0] if child in ended else None, "seconds": seconds})
    return results


def main(folder: Path) -> None:
    results = {case: watch(folder, case) for case in CASES}
    (folder / "cases.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        run_case(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
