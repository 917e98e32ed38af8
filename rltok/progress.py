"""Progress of a run: a live bar in a terminal, one line per logged step elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from rltok.fast import LoopProgress

Mode = Literal["auto", "live", "lines", "off"]

METRICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward",)),
    ("strict", ("rewards/strict/mean",)),
    ("length", ("completions/mean_length",)),
    ("entropy", ("entropy",)),
    ("clipped", ("clip_ratio/region_mean", "clip_ratio")),
    ("tokens/s", ("rollout/tokens_per_second",)),
)
"""What is shown: label -> the first of these logged metrics that there is."""
DIGITS = {"length": 1, "tokens/s": 0}
"""Decimals of a label's value, where not 3."""
ROLLOUT_LINE = 30.0
"""Seconds between two lines of one rollout."""


def resolve_mode(mode: Mode, console: Console) -> Mode:
    """`auto` as what suits the console."""
    if mode != "auto":
        return mode
    return "live" if console.is_terminal else "lines"


class ProgressDisplay(TrainerCallback):
    """Shows step, reward, strict accuracy, completion length, entropy, clip fraction and time left."""

    def __init__(self, console: Console, mode: Mode = "auto") -> None:
        self.console = console
        self.mode = resolve_mode(mode, console)
        self._live: Live | None = None
        self._progress = bar(console)
        self._task: Any = None
        self._line = Text()  # below the bar, so that both fit a narrow terminal
        self._started = time.monotonic()
        self._first_step = 0
        self._last: dict[str, Any] = {}
        self._phases = {"rollout": 0.0, "score": 0.0, "update": 0.0}  # seconds since the start
        self._rollout_line_at = ROLLOUT_LINE  # seconds of the rollout at which the next line is due

    def install(self, trainer: Trainer) -> None:
        """Add to a trainer in place of transformers' own progress bar and log printer."""
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if trainer.is_world_process_zero():
            trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started, self._first_step = time.monotonic(), state.global_step
        if self.mode == "live":
            self._task = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, detail="updates"
            )
            self._line.plain = "first rollout"
            self._live = Live(Group(self._progress, self._line), console=self.console, refresh_per_second=4)
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._live is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "train_runtime" in logs:
            return
        self._last |= logs  # what is measured once per rollout stays on display until the next one
        for name in self._phases:
            self._phases[name] += logs.get(f"time/{name}", 0.0)
        shown = self._shown()
        if self._live is not None:
            self._line.plain = shown
        elif self.mode == "lines":
            left = self._seconds_left(state)
            line = f"step {state.global_step}/{state.max_steps}  {shown}  {clock(left)} left"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_rollout(self, progress: LoopProgress) -> None:
        """Show how far a rollout is: below the bar, or as a line in every half minute that it takes."""
        if self._live is not None:
            done = progress.ended == progress.rows
            self._line.plain = self._shown() if done else describe_rollout(progress)
        elif self.mode == "lines":
            due, seconds = self._rollout_line_at, progress.seconds
            if seconds >= due:
                self.console.print(describe_rollout(progress), highlight=False, soft_wrap=True)
            self._rollout_line_at = ROLLOUT_LINE * (seconds // ROLLOUT_LINE + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def _shown(self) -> str:
        return "  ".join(part for part in (describe_metrics(self._last), describe_phases(self._phases)) if part)

    def stop(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _seconds_left(self, state: TrainerState) -> float:
        done = state.global_step - self._first_step
        return (time.monotonic() - self._started) / max(done, 1) * (state.max_steps - state.global_step)


class EvaluationBar(AbstractContextManager["EvaluationBar"]):
    """Progress of an evaluation; call it with the numbers of completions that ended and of tokens just sampled.

    A bar in a terminal, elsewhere a line for every half minute that it takes.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int,
        mode: Mode = "auto",
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.label, self.total = console, label, total
        self.mode = resolve_mode(mode, console)
        self.done = self.tokens = 0
        self._progress: Progress | None = None
        self._task: Any = None
        self._timer = timer
        self._started = self._last_line = timer()

    def __enter__(self) -> EvaluationBar:
        self._started = self._last_line = self._timer()
        if self.mode == "live":
            self._progress = bar(self.console)
            self._task = self._progress.add_task(self.label, total=self.total, detail="completions")
            self._progress.start()
        elif self.mode == "lines":
            self.console.print(f"{self.label}: {self.total} completions", highlight=False)
        return self

    def __call__(self, done: int, tokens: int = 0) -> None:
        self.done += done
        self.tokens += tokens
        if self._progress is not None:
            if done:  # a step without an end would count as a sample of the speed
                self._progress.advance(self._task, done)
        elif self.mode == "lines" and self._timer() - self._last_line >= ROLLOUT_LINE:
            self._last_line = self._timer()
            rate = self.tokens / (self._last_line - self._started)
            self.console.print(
                f"{self.label}: {self.done}/{self.total} completions  {self.tokens} tokens  {rate:.0f} tokens/s",
                highlight=False,
                soft_wrap=True,
            )

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def bar(console: Console) -> Progress:
    """The bar that training and evaluation share."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        console=console,
    )


def describe_metrics(logs: Mapping[str, Any]) -> str:
    """`reward 0.412  strict 0.350  ...` for the metrics that there are; empty when there is none."""
    parts = []
    for label, keys in METRICS:
        value = next((logs[key] for key in keys if isinstance(logs.get(key), int | float)), None)
        if value is not None and math.isfinite(value):
            parts.append(f"{label} {value:.{DIGITS.get(label, 3)}f}")
    return "  ".join(parts)


def describe_phases(seconds: Mapping[str, float]) -> str:
    """`rollout 31 %  score 20 %  update 49 %` of the time; empty before any."""
    total = sum(seconds.values())
    return "  ".join(f"{name} {value / total:.0%}".replace("%", " %") for name, value in seconds.items() if total > 0)


def describe_rollout(progress: LoopProgress) -> str:
    """`rollout 12/64 completions  3456 tokens  1152 tokens/s`."""
    rate = progress.tokens / max(progress.seconds, 1e-9)
    return f"rollout {progress.ended}/{progress.rows} completions  {progress.tokens} tokens  {rate:.0f} tokens/s"


def clock(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    whole = max(int(seconds), 0)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
