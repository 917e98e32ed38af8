"""What a run keeps of some completions of every rollout, until the updates have used them: the rows of `rltok.report`.

The rows of some prompts, the same on every rank, are held as CPU tensors from scoring on. Every update notes what its
loss made of their tokens over what the update before had noted, on whatever rank it ran. The file is written when the
next rollout begins, or training ends; a checkpoint holds what waits, so a run that was killed and continued writes the
same files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from rltok.attention import AttentionSignals
from rltok.batch import TokenBatch
from rltok.credit import CREDIT
from rltok.objective import OBJECTIVE, LossBatch, LossPlan
from rltok.report import Methods, SampleConfig, SampleMeta, SampleStore, chosen_groups
from rltok.sampling import DECODING
from rltok.selection import SELECTION
from rltok.trainers.door_trainer import TRACE, loss_mask

if TYPE_CHECKING:
    from rltok.trainers.door_trainer import DoorTrainer

logger = logging.getLogger(__name__)

Columns = dict[str, Any]


class SampleRecorder:
    """Records completions of one trainer. Every rank calls every method.

    Args:
        config: with rows > 0.
    """

    def __init__(self, trainer: DoorTrainer, config: SampleConfig) -> None:
        self.trainer, self.config = trainer, config
        self.rollouts = 0
        """generation batches so far"""
        self.chosen: list[int] = []
        """rows over all ranks that are recorded of the rollout at hand"""
        self.held: dict[int, Columns] = {}
        """row -> its columns, of the rows that this rank generated"""
        self.used: dict[int, Columns] = {}
        """row -> what updates on this rank made of it; all updates of a row are on one rank"""
        self.made_at = 0
        """optimizer steps before the rollout at hand"""
        self.updates = 0
        self.listeners: list[Callable[[list[Columns], int], None]] = []
        """called on the main process with the rows that were written and the step at which the batch was made"""
        self._store: SampleStore | None = None
        self._failed = False

    def begin(
        self,
        output: Mapping[str, Any],
        batch: TokenBatch,
        credit: Tensor,
        kept: Tensor | None,
        entropy: Tensor | None,
        attention: AttentionSignals | None,
    ) -> None:
        """Write the rollout before, and hold chosen rows of this one.

        Args:
            output: this rank's scored rows.
            credit: (B, T) of the credit method.
            kept: (B, T) bool of selection, None without one.
            entropy: (B, T) nats of the policy before the first update, if it was computed.
        """
        self.flush()
        count, size = batch.all_rewards.numel(), batch.group_size
        groups = chosen_groups(self.trainer.args.seed, self.rollouts, count // size, self.config.rows, size)
        self.chosen = [g * size + i for g in groups for i in range(size)]
        self.rollouts, self.made_at, self.updates = self.rollouts + 1, self.trainer.state.global_step, 0
        local = [row for row in self.chosen if batch.offset <= row < batch.offset + credit.size(0)]
        if not local:
            return
        index = torch.tensor(local, device=credit.device) - batch.offset
        values = _token_columns(output, batch) | {"in_loss": loss_mask(output).bool(), "credit": credit}
        values |= {} if kept is None else {"kept": kept}
        values |= {} if entropy is None else {"entropy": entropy}
        if attention is not None:
            values |= {"waad": attention.waad, "fai": attention.fai} | self._marks(batch)
        tokens = {name: value[index].detach().cpu() for name, value in values.items()}
        lengths = output["completion_mask"][index].sum(1).tolist()
        facts = self._facts(output, batch, index, lengths)
        for i, (row, length) in enumerate(zip(local, lengths, strict=True)):
            held = {name: value[i, :length].clone() for name, value in tokens.items()}
            self.held[row] = held | {name: value[i] for name, value in facts.items()}

    def remember(
        self,
        inputs: Mapping[str, Any],
        batch: LossBatch,
        plan: LossPlan,
        trained: Tensor,
        clipped: tuple[Tensor, Tensor] | None,
    ) -> None:
        """What an update made of a micro-batch.

        Args:
            inputs: with `row`, the rows' places over all ranks, below 0 where there is none.
            trained: (B, T) 1 where a token entered the loss.
            clipped: (B, T) flags at the lower and at the upper bound, None where the loss does not clip.
        """
        wanted = set(self.chosen)
        places = [(i, row) for i, row in enumerate(inputs["row"].tolist()) if row in wanted]
        self.updates = self.trainer.state.global_step - self.made_at + 1
        if not places:
            return
        index = torch.tensor([i for i, _ in places], device=trained.device)
        shape = batch.logps.shape
        values = {
            "credit_used": plan.advantages.detach().expand(shape),
            "learner_logp": batch.logps.detach(),
            "ratio": plan.log_weight.detach().exp().expand(shape),
            "first_entropy": batch.entropy,
            "first_logp": batch.logps.detach(),
        }
        if clipped is not None:
            low, high = clipped
            values["clipped"] = (high - low).expand(shape)
        there = trained[index].bool().cpu()
        for name, value in values.items():
            rows = torch.where(there, value[index].float().cpu(), torch.nan)
            for new, (_, row) in zip(rows, places, strict=True):
                used = self.used.setdefault(row, {})
                used[name] = _over(new, used.get(name), keep_old=name.startswith("first_"))

    def flush(self) -> None:
        """Write what is held; the main process does."""
        if not self.chosen:
            return
        parts: list[tuple[dict[int, Columns], dict[int, Columns]]] = gather_object([(self.held, self.used)])
        self.chosen, self.held, self.used = [], {}, {}
        if not self.trainer.accelerator.is_main_process or self._failed:
            return
        held = {row: columns for part, _ in parts for row, columns in part.items()}
        for row, used in ((row, used) for _, part in parts for row, used in part.items()):
            _add_update(held[row], used)
        self._write([held[row] | {"row": row} for row in sorted(held)])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        names = ("rollouts", "chosen", "held", "used", "made_at", "updates")
        return {name: getattr(self, name) for name in names}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        for name, value in state.items():
            setattr(self, name, value)
        for columns in (*self.held.values(), *self.used.values()):
            columns |= {name: value.cpu() for name, value in columns.items() if isinstance(value, Tensor)}

    def _write(self, rows: list[Columns]) -> None:
        text = self.trainer._tokenizer.decode
        known: dict[int, str] = {}
        names = dict.fromkeys(name for columns in rows for name in columns)
        table = []
        for columns in rows:
            ids = columns["token_ids"].tolist()
            known |= {token: text([token]) for token in set(ids) - known.keys()}
            plain = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in columns.items()}
            plain |= {"tokens": [known[token] for token in ids], "updates": self.updates}
            table.append({name: plain.get(name) for name in (*names, "tokens", "updates")})
        try:
            self._open().write(self.rollouts - 1, table, self._meta())
        except OSError as error:
            self._failed = True
            logger.warning("Completions are recorded no more (report.samples): %s. Training goes on.", error)
        for listener in self.listeners:
            listener(table, self.made_at)

    def _open(self) -> SampleStore:
        if self._store is None:
            folder = Path(self.trainer.args.output_dir) / "samples"
            self._store = SampleStore(folder, int(self.config.max_mb * 2**20))
            self._store.drop_from(self.rollouts - 1)
        return self._store

    def _meta(self) -> SampleMeta:
        doors, trainer = self.trainer.doors, self.trainer
        methods = Methods(
            credit=_name(CREDIT, doors.credit),
            objective=tuple(_name(OBJECTIVE, term) for term in doors.objective),
            decoding=tuple(_name(DECODING, module) for module in doors.rollout.decoding if not module.is_neutral),
            selection=None if doors.selection is None else _name(SELECTION, doors.selection),
        )
        return SampleMeta(trainer.num_generations, tuple(trainer.reward_func_names), trainer.temperature, methods)

    def _marks(self, batch: TokenBatch) -> dict[str, Tensor]:
        metrics = getattr(self.trainer.doors.credit, "metrics", None)
        values = {} if metrics is None else metrics(batch)
        if "preplan" not in values:
            return {}
        local, far = (values[name].bool().to(torch.int8) for name in ("preplan", "anchor"))
        return {"mark": local + 2 * far}

    def _facts(
        self, output: Mapping[str, Any], batch: TokenBatch, index: Tensor, lengths: list[int]
    ) -> dict[str, list[Any]]:
        """Columns with one value per completion."""
        decode, ends = self.trainer._tokenizer.decode, set(self.trainer.eos_token_ids)
        prompts, present = output["prompt_ids"][index], output["prompt_mask"][index].bool()
        completions = [row[:n] for row, n in zip(output["completion_ids"][index].tolist(), lengths, strict=True)]
        everywhere = index + batch.offset
        facts: dict[str, list[Any]] = {
            "step": [self.made_at] * len(lengths),
            "group": (everywhere // batch.group_size).tolist(),
            "prompt": [decode(row[m].tolist()) for row, m in zip(prompts, present, strict=True)],
            "completion": [decode(ids) for ids in completions],
            "ended": [bool(ids) and ids[-1] in ends for ids in completions],
            "reward": batch.all_rewards[everywhere].tolist(),
            "advantage": batch.advantages[index].tolist(),
        }
        parts = batch.reward_parts or {}
        return facts | {f"reward/{name}": part[everywhere].tolist() for name, part in parts.items()}


def _token_columns(output: Mapping[str, Any], batch: TokenBatch) -> dict[str, Tensor]:
    """(B, T) columns of scored rows."""
    ids = output["completion_ids"]
    found = {"token_ids": ids}
    old = output.get("old_per_token_logps")
    sources = {
        "sampler_logp": output.get("sampling_per_token_logps"),
        "old_logp": batch.old_logps if old is None else old,
        "weight": output.get("importance_sampling_ratio"),
        **{name: output.get(TRACE + name) for name in ("temperature", "wave", "forced")},
    }
    return found | {name: value.expand(ids.shape) for name, value in sources.items() if value is not None}


def _over(new: Tensor, old: Tensor | None, keep_old: bool) -> Tensor:
    """Values of two updates, NaN where one did not use the token; the later ones count, or the earlier ones."""
    if old is None:
        return new
    width = max(new.numel(), old.numel())
    new, old = (torch.nn.functional.pad(x, (0, width - x.numel()), value=torch.nan) for x in (new, old))
    first, second = (old, new) if keep_old else (new, old)
    return torch.where(first.isnan(), second, first)


def _add_update(held: Columns, used: Columns) -> None:
    """Enter what a rank's updates made of a row."""
    length = held["token_ids"].numel()
    values = {name: _fit(value, length) for name, value in used.items()}
    entropy, logps = values.pop("first_entropy"), values.pop("first_logp")
    held.setdefault("entropy", entropy)
    held.setdefault("old_logp", logps)
    if "clipped" in values:
        values["clipped"] = values["clipped"].nan_to_num(0.0).to(torch.int8)
    held |= {
        name: _over(value, held.get(name), False) if value.is_floating_point() else value
        for name, value in values.items()
    }


def _fit(values: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(values[:length], (0, max(length - values.numel(), 0)), value=torch.nan)


def _name(registry: Mapping[str, type], part: Any) -> str:
    return next((name for name, cls in registry.items() if cls is type(part)), type(part).__name__)
