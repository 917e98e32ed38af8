"""What a sharded run must be able to do beside training on: checks on one engine, or on one process for comparison.

    below_worker.py FOLDER ENGINE     `one process` or an engine of worker.py

Started by test_below_accelerate.py. Cases: `plain` is five updates with AdamW; `tied` has one table for embedding and
head, and selected rows; `adapter` is LoRA; `resumed` stops after two updates and goes on from its sealed checkpoint; in
`nothing` selection leaves no row; in `generated` transformers' generate draws completions of different lengths.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trl.trainer.grpo_trainer as grpo
from accelerate.utils import gather_object
from tests_support import build_tokenizer
from worker import (
    FSDP2,
    EngineTrainer,
    adapted_model,
    arrange,
    build,
    engine_named,
    matrix_model,
    run,
    run_below,
    settings,
)

from rltok.config import ConfigError
from rltok.trainers.checkpoint import damage, latest_checkpoint
from rltok.trainers.engine_support import check_engine_support

ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-6, "weight_decay": 0.1}
NOTHING = {"reward_weights": [0.0, 0.0]}
HAPO, D3S, GROUP = "objective: hapo", "selection: d3s", "credit: group"


def trained(folder: Path, method: str, engine: str, ranks: int, **changes: Any) -> dict[str, Any]:
    if engine == "one process":
        changes.pop("resume", None)
        return run(folder, method, ranks, **changes)
    return run_below(folder, method, ranks, engine_named(engine), **changes)


def resumed(folder: Path, engine: str, ranks: int) -> dict[str, Any]:
    """Two updates, a checkpoint in the middle of a rollout, and three more in a new trainer."""
    place = folder / f"resumed {engine}"
    changes = ADAM | {"output_dir": str(place), "logging_steps": 1}
    trained(folder, HAPO, engine, ranks, **changes, max_steps=2, save_strategy="steps", save_steps=2)
    found = latest_checkpoint(place)
    assert found is not None and found.name == "checkpoint-2" and damage(found) is None, found
    whole = trained(folder, HAPO, engine, ranks, **changes, resume=str(found))
    if ranks > 1:
        dist.barrier()
    first = int(os.environ.get("RANK", "0")) == 0
    files = sorted(p for p in found.rglob("*") if p.is_file() and p.stat().st_size > 1000)
    if first:
        shard = next(p for p in files if "engine" in p.parts)
        shard.write_bytes(shard.read_bytes()[:-1])
        assert damage(found) is not None and latest_checkpoint(place) is None
    return whole | {"files": [str(p.relative_to(found)) for p in files]}


def generated(folder: Path, ranks: int) -> dict[str, Any]:
    """One rollout drawn by a model that is sharded as by accelerate's FSDP2."""
    rollout = {"engine": "transformers", "correction": {"mode": "truncate"}}
    ends = {"eos_token_id": list(range(1, 13))}
    args = settings(
        folder, GROUP, ranks, rollout=rollout, generation_kwargs=ends, max_steps=1, max_completion_length=60
    )
    trainer = build(folder, GROUP, args, cls=EngineTrainer)
    trainer.fixed, trainer.engine = False, FSDP2()
    trainer._dist.fsdp_version = 2  # as accelerate's plugin says it
    check_engine_support(trainer)
    trainer.train()
    steps = gather_object([max(len(ids) for ids, _ in trainer.drawn.values())])
    return {"steps": steps, "apart": trainer.state.log_history[0]["correction/max_abs_diff"]}


def main(folder: Path, engine: str) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    grpo.shuffle_sequence_dict = arrange(ranks)
    results = {
        "plain": trained(folder, HAPO, engine, ranks, **ADAM),
        "tied": trained(folder, D3S, engine, ranks, model=matrix_model(build_tokenizer(), tie_word_embeddings=True)),
        "adapter": trained(folder, HAPO, engine, ranks, model=adapted_model("LoRA")),
        "nothing": trained(folder, D3S, engine, ranks, **NOTHING),
    }
    if engine != "one process":
        try:
            results["resumed"] = resumed(folder, engine, ranks)
        except ConfigError as error:  # of every rank alike; the other cases are still worth reading
            results["resumed"] = {"error": str(error)}
    if engine == "FSDP2":
        results["generated"] = generated(folder, ranks)
    if int(os.environ.get("RANK", "0")) == 0:
        for result in results.values():
            result.pop("drawn", None)
        torch.save(results, folder / f"below {engine}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
