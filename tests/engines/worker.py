"""Trains the methods of the matrix on the engines that this process group can be, and writes losses and parameters.

    worker.py FOLDER PLAN     PLAN is JSON, {engine: [method, ...]} with the names of cells.py

Started by test_engine_matrix.py, alone or through torchrun. Completions are a function of the prompt and its index, or
are drawn by the engine `fast`, whose samples no number of processes changes; where arithmetic or engine do not allow
that, those of the run with one process are repeated. The order of rows in micro-batches is arranged so that every
update sees the same rows for any number of processes.

DeepSpeed and FSDP2, which accelerate does not start on a CPU, are put in where accelerate would: `Engine.prepare` takes
the place of `accelerator.prepare`, and the rest of the training loop is the one of any run.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import trl.distributed
import trl.trainer.grpo_trainer as grpo
from cells import DEEPSPEED, METHODS, SAMPLED, expected
from peft import LoraConfig, get_peft_model
from tests_support import build_model, build_tokenizer, digit_dataset, even_length, even_reward, run_settings
from torch import Tensor
from transformers import PrinterCallback

from rltok.config import ConfigError
from rltok.steering import SteeringVector, describe_model, save_vectors
from rltok.trainers import CreditConfig, CreditTrainer

MOST_RANKS = 4
GROUP, STEPS_PER_GENERATION, STEPS = 4, 6, 5  # 24 rows per rollout; on four ranks groups lie on two of them
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
RATE = 0.3
VECTORS = "vectors.safetensors"
SHARDING = (*DEEPSPEED, "FSDP2")
"""engines that accelerate does not start on a CPU"""


class MatrixTrainer(CreditTrainer):
    """Fixed completions for the methods that do not change how tokens are drawn; and a list of all completions."""

    fixed = True
    repeated: dict[tuple[int, tuple[int, ...], int], Any] | None = None
    """(call, prompt, index in its group) -> completion and log-probabilities of another run, to be used again"""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        start = self.accelerator.process_index * len(prompt_ids)
        places = [(tuple(ids), (start + i) % GROUP) for i, ids in enumerate(prompt_ids)]
        if not hasattr(self, "drawn"):
            self.drawn, self.calls = {}, -1
        self.calls += 1
        if self.repeated is not None:
            found = [self.repeated[self.calls, *place] for place in places]
            completions, logps = [ids for ids, _ in found], [values for _, values in found]
            logps = None if logps[0] is None else logps
        elif self.fixed:
            found = [fixed_completion(*place) for place in places]
            completions, logps = [ids for ids, _ in found], [values for _, values in found]
            if self.doors.rollout.resolved_correction.mode == "off":
                logps = None
        else:
            completions, logps = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        for place, ids, values in zip(places, completions, logps or [None] * len(places), strict=True):
            self.drawn[self.calls, *place] = (ids, values)
        return completions, logps


def fixed_completion(prompt: tuple[int, ...], index: int) -> tuple[list[int], list[float]]:
    """Up to ten tokens, and made-up log-probabilities of their sampler."""
    generator = torch.Generator().manual_seed(sum(k * t for k, t in enumerate(prompt, 1)) * 7 + index)
    length = int(torch.randint(1, 11, (1,), generator=generator))
    ids = torch.randint(3, 40, (length,), generator=generator).tolist()
    return ids, (-3.9 - 0.1 * torch.rand(length, generator=generator)).tolist()


def arrange(ranks: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Rows of a rollout in an order that gives micro-batch k of all ranks the same rows as on MOST_RANKS ranks."""

    def in_rank_order(rows: dict[str, Tensor]) -> dict[str, Tensor]:
        blocks = MOST_RANKS // ranks
        local = len(next(value for value in rows.values() if value.ndim)) // blocks
        micro = local // STEPS_PER_GENERATION
        order = [
            b * local + k * micro + j for k in range(STEPS_PER_GENERATION) for b in range(blocks) for j in range(micro)
        ]
        return {name: value if value.ndim == 0 else value[order] for name, value in rows.items()}

    return in_rank_order


# ---- engines below accelerate ----


class Engine:
    """What stands between the training loop and the model."""

    context: Any = staticmethod(nullcontext)

    def prepare(self, trainer: Any) -> Any:
        """Wrap `trainer.model`, and set model, optimizer and the accelerator's functions; returns the wrapped model."""
        raise NotImplementedError

    def parameters(self, trainer: Any) -> dict[str, Tensor]:
        """Whole parameters on every rank."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state of all ranks."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Read them."""
        raise NotImplementedError


class DeepSpeed(Engine):
    """ZeRO through `deepspeed.initialize`, driven by accelerate's own wrappers."""

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
        }

    @contextmanager
    def context(self) -> Iterator[None]:
        """While open, transformers and TRL know that parameters are sharded, as they do under accelerate."""
        if self.stage < 3:
            yield
            return
        from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

        kept = HfDeepSpeedConfig(self.config)
        known = trl.distributed.DistributedBackend.is_zero3
        trl.distributed.DistributedBackend.is_zero3 = property(lambda _: True)
        try:
            yield
        finally:
            trl.distributed.DistributedBackend.is_zero3 = known
            unset_hf_deepspeed_config()
            del kept

    def prepare(self, trainer: Any) -> Any:
        import deepspeed
        from accelerate.utils.deepspeed import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper

        trainer.create_optimizer()
        self.engine, optimizer, *_ = deepspeed.initialize(
            model=trainer.model, optimizer=trainer.optimizer, config=self.config
        )
        accelerator, wrapped = trainer.accelerator, DeepSpeedEngineWrapper(self.engine)
        trainer.optimizer = DeepSpeedOptimizerWrapper(optimizer)
        accelerator.no_sync = lambda model: nullcontext()
        accelerator.backward = lambda loss, **_: wrapped.backward(
            loss, sync_gradients=accelerator.sync_gradients, scale_wrt_gas=False
        )
        accelerator.clip_grad_norm_ = lambda *_, **__: wrapped.get_global_grad_norm()
        trainer.model_wrapped = self.engine
        return self.engine

    def parameters(self, trainer: Any) -> dict[str, Tensor]:
        import deepspeed

        model = self.engine.module
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=self.stage == 3):
            return {name: value.detach().clone() for name, value in model.named_parameters()}

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="engine")

    def load(self, folder: Path) -> None:
        assert self.engine.load_checkpoint(str(folder), tag="engine")[0] is not None


class FSDP2(Engine):
    """`fully_shard` as accelerate cuts the model: every decoder layer, the embedding, norm and head, and the rest."""

    def prepare(self, trainer: Any) -> Any:
        from accelerate.utils import FullyShardedDataParallelPlugin
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
        stand_in = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True, device="cpu"
        )
        model = fsdp2_prepare_model(stand_in, trainer.model)
        trainer.create_optimizer()
        self.model, self.optimizer = model, trainer.optimizer
        accelerator = trainer.accelerator
        accelerator.no_sync = lambda model: nullcontext()
        accelerator.backward = lambda loss, **_: loss.backward()

        def clip(parameters: Any, limit: float, **_: Any) -> float:
            norm = torch.nn.utils.clip_grad_norm_(list(parameters), limit)
            return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

        accelerator.clip_grad_norm_ = clip
        trainer.model = trainer.model_wrapped = model
        return model

    def parameters(self, trainer: Any) -> dict[str, Tensor]:
        return {name: value.full_tensor().detach().clone() for name, value in self.model.named_parameters()}

    def save(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "engine")

    def load(self, folder: Path) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "engine")
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


class EngineTrainer(MatrixTrainer):
    """The training loop of any run on an `Engine`; its checkpoints hold the engine's state."""

    engine: Engine

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        model = self.engine.prepare(self)
        self.create_scheduler(num_training_steps=max_steps)
        if resume_from_checkpoint is not None:
            self.engine.load(Path(resume_from_checkpoint))
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        for attribute in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, attribute, getattr(self, attribute))
        self.callback_handler.train_dataloader = train_dataloader
        return model, train_dataloader

    def _save_optimizer_and_scheduler(self, output_dir):
        dist.barrier()
        self.engine.save(Path(output_dir))

    def save_model(self, output_dir=None, _internal_call=False):
        Path(output_dir).mkdir(parents=True, exist_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """The engine does."""


class PretendingTrainer(MatrixTrainer):
    """Built as if accelerate ran the engine of this name: what is refused then is refused there."""

    pretended = ""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = self.pretended.startswith("FSDP")
        self.is_deepspeed_enabled = self.pretended.startswith("ZeRO")


def refusal(
    folder: Path, method: str, engine: str, rollout: Mapping[str, Any] | None = None, **changes: Any
) -> str | None:
    """The ConfigError of a trainer on an engine, None if it can be built. FSDP takes transformers' generate."""
    args = settings(folder, method, 1, **changes)
    if engine.startswith("FSDP") and "use_transformers_continuous_batching" not in changes:
        args.rollout = {"engine": "transformers"} | (args.rollout or {})
    args.rollout = (args.rollout or {}) | (rollout or {})
    stage, version = (int(engine[-1]), None) if engine.startswith("ZeRO") else (0, int(engine[-1]))
    backend = SimpleNamespace(zero_stage=stage, fsdp_version=version, is_zero3=stage == 3, is_fsdp=version is not None)
    known, grpo.DistributedBackend = grpo.DistributedBackend, lambda _: backend
    try:
        build(folder, method, args, cls=type("Pretending", (PretendingTrainer,), {"pretended": engine}))
    except ConfigError as error:
        return str(error)
    finally:
        grpo.DistributedBackend = known
    return None


# ---- runs ----


def settings(folder: Path, method: str, ranks: int, **changes: Any) -> CreditConfig:
    doors = copy.deepcopy(METHODS[method])
    if "steering" in doors.get("rollout", {}):
        doors["rollout"]["steering"]["path"] = str(folder / VECTORS)
    shape = {"per_device_train_batch_size": MOST_RANKS // ranks, "steps_per_generation": STEPS_PER_GENERATION}
    shape |= {"num_generations": GROUP, "max_completion_length": 12, "max_steps": STEPS}
    # plain descent: Adam divides rounding differences of tiny gradients by their size
    shape |= {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "gradient_checkpointing": False}
    name = "".join(c for c in method if c.isalnum())
    return CreditConfig(**run_settings(folder / "runs" / f"{name}{ranks}", **(shape | doors | changes)))


def build(folder: Path, method: str, args: CreditConfig, model: Any = None, cls: Any = MatrixTrainer, **kwargs: Any):
    tokenizer = build_tokenizer()
    model = matrix_model(tokenizer) if model is None else model
    rows = digit_dataset(6 if method == "rollout: prompt_skipping" else 48)
    trainer = cls(model, [even_reward, even_length], args, train_dataset=rows, processing_class=tokenizer, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.fixed = method not in SAMPLED
    return trainer


def matrix_model(tokenizer: Any, **changes: Any) -> Any:
    return build_model(tokenizer, **({"initializer_range": 0.2} | changes))


def adapter(kind: str, **changes: Any) -> LoraConfig:
    """LoRA or DoRA that changes the policy from the start."""
    options = {"task_type": "CAUSAL_LM", "use_dora": kind == "DoRA", "init_lora_weights": False, **ADAPTER}
    return LoraConfig(**(options | changes))


def adapted_model(kind: str) -> Any:
    """The matrix' model with an adapter, as after some training."""
    torch.manual_seed(7)
    model = get_peft_model(matrix_model(build_tokenizer()), adapter(kind))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # no longer the norm of what it scales
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    return model


def write_vectors(folder: Path) -> None:
    """Steering vectors of the matrix' model."""
    model = matrix_model(build_tokenizer())
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    save_vectors(folder / VECTORS, [SteeringVector(1, direction, 2.0)], describe_model(model, "matrix"))


def outcome(trainer: Any, parameters: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, Any]:
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [entry.get("grad_norm", 0.0) for entry in log],
        "parameters": parameters,
        "moved": max((parameters[name] - value).abs().max().item() for name, value in start.items()),
        "drawn": trainer.drawn,
    }


def snapshot(trainer: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def run(
    folder: Path, method: str, ranks: int, model: Any = None, repeated: Any = None, **changes: Any
) -> dict[str, Any]:
    """A run through accelerate: one process, or plain data parallel."""
    trainer = build(folder, method, settings(folder, method, ranks, **changes), model)
    assert trainer.accelerator.num_processes == ranks, (trainer.accelerator.num_processes, ranks)
    trainer.repeated = repeated
    start = snapshot(trainer)
    trainer.train()
    assert trainer.model.is_gradient_checkpointing == trainer.args.gradient_checkpointing
    return outcome(trainer, snapshot(trainer), start)


def run_below(folder: Path, method: str, ranks: int, engine: Engine, repeated: Any = None, **changes: Any):
    """A run on an engine that accelerate does not start here."""
    resume = changes.pop("resume", None)
    model = changes.pop("model", None)
    with engine.context():
        trainer = build(folder, method, settings(folder, method, ranks, **changes), model, EngineTrainer)
        assert trainer.accelerator.num_processes == ranks
        trainer.engine, trainer.repeated = engine, repeated
        start = snapshot(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return outcome(trainer, engine.parameters(trainer), start)


def run_adapter(folder: Path, method: str, kind: str) -> dict[str, Any]:
    """One update of an adapter, the same update of the model it is merged into, and what the chain rule makes of it."""
    inner = adapted_model(kind)
    use_dora = kind == "DoRA"
    trainer = build(folder, method, settings(folder, method, 1, max_steps=1, max_grad_norm=0.0), inner)
    before = snapshot(trainer)
    layers = {
        name: layer
        for name, layer in inner.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
    }
    weights = {}
    for name, layer in layers.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts = [a, b]
        merged = layer.base_layer.weight.detach() + layer.scaling["default"] * b @ a
        if use_dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            parts.append(magnitude)
            norm = merged.norm(dim=1).detach()  # constant for the gradient, as the method's authors have it
            merged = (magnitude / norm)[:, None] * merged
        weights[name] = (merged, parts)
    merged_model = matrix_model(build_tokenizer())
    state = {
        name.removeprefix("base_model.model.") + ".weight": merged.detach() for name, (merged, _) in weights.items()
    }
    missing = merged_model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys, missing
    whole = build(folder, method, settings(folder, method, 1, max_steps=1, max_grad_norm=0.0), merged_model)
    start = snapshot(whole)
    whole.train()
    moved = {name: (value - start[name]) / -RATE for name, value in snapshot(whole).items()}
    wanted, found, gradients = [], [], {}
    for name, (merged, parts) in weights.items():
        pull = moved[name.removeprefix("base_model.model.") + ".weight"]
        gradients[name] = torch.autograd.grad(merged, parts, grad_outputs=pull)
    trainer.train()
    after = snapshot(trainer)
    for name in weights:
        keys = [f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"]
        keys += [f"{name}.lora_magnitude_vector.default.weight"] if use_dora else []
        for key, gradient in zip(keys, gradients[name], strict=True):
            wanted.append(gradient.flatten())
            found.append(((after[key] - before[key]) / -RATE).flatten())
    frozen = [k for k, v in after.items() if "lora_" not in k and not torch.equal(v, before[k])]
    logs = [[entry["loss"] for entry in t.state.log_history if "loss" in entry][0] for t in (trainer, whole)]
    return {
        "losses": logs,
        "gradient": torch.cat(found),
        "wanted": torch.cat(wanted),
        "frozen_moved": frozen,
        "same_tokens": {k: ids for k, (ids, _) in trainer.drawn.items()}
        == {k: ids for k, (ids, _) in whole.drawn.items()},
    }


def engine_named(name: str) -> Engine:
    return FSDP2() if name == "FSDP2" else DeepSpeed(int(name[-1]))


def cell(folder: Path, method: str, engine: str, ranks: int, reference: dict[str, Any] | None) -> dict[str, Any]:
    """What a cell of the matrix trains, or the error that refuses it."""
    if engine in SHARDING:
        error = refusal(folder, method, engine)
        if error is not None or expected(method, engine) == "refused":
            return {"refused": error}
    drawn = None if reference is None else reference["drawn"]
    if engine in ("one process", "two processes", "four processes"):
        return run(folder, method, ranks)
    if engine == "gradient checkpointing":
        return run(folder, method, ranks, gradient_checkpointing=True)
    if engine == "bf16":  # first updates alone: later ones start from other weights
        plain = run(folder, method, ranks, repeated=drawn, max_steps=1)
        half = run(folder, method, ranks, repeated=drawn, max_steps=1, bf16=True)
        start = {name: value.detach() for name, value in matrix_model(build_tokenizer()).named_parameters()}
        return half | {"plain": plain["parameters"], "start": start}
    if engine in ("LoRA", "DoRA"):
        return run_adapter(folder, method, engine)
    repeats = engine == "FSDP2" and method in SAMPLED  # the engine `fast` does not run there
    return run_below(folder, method, ranks, engine_named(engine), drawn if repeats else None)


def main(folder: Path, plan: Mapping[str, list[str]]) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    grpo.shuffle_sequence_dict = arrange(ranks)
    if ranks == 1 and not (folder / VECTORS).is_file():
        write_vectors(folder)
    first = int(os.environ.get("RANK", "0")) == 0
    reference_file = folder / "one process.pt"
    reference = torch.load(reference_file, weights_only=True) if reference_file.is_file() else {}
    for engine, methods in plan.items():
        results = {method: cell(folder, method, engine, ranks, reference.get(method)) for method in methods}
        if engine == "one process":
            reference = results
        if first:
            torch.save(results, folder / f"{engine}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
