"""The command line. Everything heavy is imported by the command that needs it, so that help is immediate."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rltok.config import ConfigError, describe, first_line
from rltok.secrets import redacted

if TYPE_CHECKING:
    from rltok.recipe import Recipe

app = typer.Typer(
    name="rltok",
    help="Reinforcement-learning fine-tuning of language models with token-aware credit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings that replace the recipe's.")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of the console script; a wrong setting, or a fault of a run, is printed without a traceback, status 2."""
    # Before torch is loaded: OpenMP threads that spin while they wait bring a shared CPU to a crawl (measured: 116 s
    # against 8 s for eight updates of the demo on two cores with one other process).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # at import: kernels that this machine lacks
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app(args=list(arguments) if arguments is not None else None, prog_name="rltok")
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"error: {redacted(str(error))}\n")
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not _is_explained(error):
            raise
        sys.stderr.write(f"error: {redacted(str(error))}\n")  # on every rank: it may be one rank's alone
        raise SystemExit(2) from None


def _is_explained(error: RuntimeError) -> bool:
    """True for faults whose message says what happened, what was saved, and what to set."""
    from rltok.faults import TrainingFault
    from rltok.rewards.guard import RewardError

    return isinstance(error, TrainingFault | RewardError)


@app.command()
def train(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Train a policy by a recipe, in this process; on several processes or machines: rltok launch RECIPE."""
    from rltok.launch import check_environment
    from rltok.recipe import load_recipe
    from rltok.run import train as run_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_environment(loaded)
    raise typer.Exit(run_recipe(loaded, console))


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print the recipe with every default filled in; train nothing.")
    ] = False,
) -> None:
    """Fine-tune a model on texts by a recipe, in full precision or aware of the rounding to come (EdgeQAT)."""
    from rltok.sft_recipe import load_sft_recipe

    loaded = load_sft_recipe(recipe, overrides or ())
    if resolved:
        console.print(Text(loaded.to_yaml().rstrip()), soft_wrap=True)
        return
    from rltok.sft import sft as run_recipe

    raise typer.Exit(run_recipe(loaded, console))


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="Over all machines. Default: launch.processes, else one per GPU, or one."),
    ] = None,
    strategy: Annotated[
        Literal["single", "ddp", "zero1", "zero2", "zero3", "fsdp"] | None,
        typer.Option("--strategy", help="Default: launch.strategy, else ddp, or single for one process."),
    ] = None,
    machines: Annotated[int, typer.Option("--machines", help="Call this once on each, with its own rank.")] = 1,
    machine_rank: Annotated[int, typer.Option("--machine-rank", help="Of this machine, from 0.")] = 0,
    main_address: Annotated[
        str | None, typer.Option("--main-address", metavar="HOST", help="Name or IP of machine 0.")
    ] = None,
    main_port: Annotated[int, typer.Option("--main-port", help="A free port of machine 0.")] = 29500,
    device: Annotated[
        Literal["auto", "cpu", "gpu"], typer.Option("--device", help="auto: GPUs where there are any.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command; start nothing.")] = False,
) -> None:
    """Train a policy by a recipe on several processes: prints the command that starts them, and becomes it."""
    import torch

    from rltok.launch import Machines, check_machine, plan_launch, runs_on_cpu
    from rltok.recipe import load_recipe

    place = Machines(machines, machine_rank, main_address, main_port)
    given = [*(overrides or ())]
    given += [f"launch.processes={processes}"] if processes is not None else []
    given += [f"launch.strategy={strategy}"] if strategy is not None else []
    loaded = load_recipe(recipe, given)
    kind: Literal["cpu", "gpu"] = "cpu" if device == "cpu" or (device == "auto" and runs_on_cpu(loaded)) else "gpu"
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    # the GPUs of a machine that only prints say nothing about those of the machine that trains
    plan = plan_launch(loaded, recipe, given, place, kind, None if dry_run and not found else found)
    console.print(Text(str(plan)), soft_wrap=True)
    if dry_run:
        return
    check_machine(loaded.launch.strategy, kind, found)
    plan.start()


@app.command()
def demo(overrides: Overrides = None) -> None:
    """Train the embedded tiny reasoner with HAPO, through accelerate; minutes on a CPU, no network."""
    from rltok.recipe import CONFIG_DIR, merged
    from rltok.run import fresh_directory

    given = list(overrides or ())
    values, _ = merged("demo", given)
    if values.get("output_dir") is None and values.get("resume", "never") == "never":
        given.append(f"output_dir={fresh_directory(str(values['name']), int(values.get('seed', 0)))}")
    import torch

    kind = "gpu" if torch.cuda.is_available() else "cpu"
    if kind == "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one process that sees several would use nn.DataParallel
    config = str(CONFIG_DIR / "accelerate" / f"{kind}.yaml")
    threads = ["--num_cpu_threads_per_process", str(os.cpu_count() or 1)]
    raise typer.Exit(_launch(["--config_file", config, *threads, "-m", "rltok", "train", "demo", *given]))


def _launch(arguments: list[str]) -> int:
    """`accelerate launch`, with the exit status of what it started instead of a traceback of its own."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    console.print(Text(f"accelerate launch {shlex.join(arguments)}", style="dim"), soft_wrap=True)
    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


@app.command(name="eval")
def evaluate_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint or model directory.")],
    overrides: Overrides = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Recipe with data and rewards; default: the run's own recipe.yaml.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Also write means and rows to this JSON file.")
    ] = None,
) -> None:
    """Held-out rewards of a checkpoint, by the data, rewards and evaluation settings of its recipe."""
    from rltok.files import write_json
    from rltok.recipe import load_recipe
    from rltok.run import evaluate_path, evaluation_parts

    found = recipe or _recipe_of(checkpoint)
    loaded = load_recipe(found, [*(overrides or ()), f"model.path={json.dumps(str(checkpoint))}"])
    result = evaluate_path(loaded, console)
    console.print(f"{checkpoint}: {len(result.rows)} completions", highlight=False, soft_wrap=True)
    table = Table()
    table.add_column("")
    table.add_column("mean", justify="right")
    for name, value in result.means.items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
    if output is not None:
        facts = {"checkpoint": str(checkpoint), "settings": evaluation_parts(loaded)}
        write_json(output, facts | {"means": result.means, "rows": result.rows})


def _recipe_of(checkpoint: Path) -> str:
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint}: no such checkpoint directory")
    for folder in (checkpoint, checkpoint.resolve().parent):
        if (folder / "recipe.yaml").is_file():
            return str(folder / "recipe.yaml")
    raise ConfigError(f"{checkpoint}: there is no recipe.yaml in it or beside it; name one with --recipe RECIPE")


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    rows: Annotated[int, typer.Option("--rows", "-n", help="Number of completions.")] = 4,
    source: Annotated[
        Literal["after", "before", "training"],
        typer.Option("--source", help="Held-out completions after or before training, or the last sampled ones."),
    ] = "after",
) -> None:
    """Look at a run: its figures, and completions with their rewards."""
    import pandas as pd

    from rltok.run import RunDirectory

    directory = RunDirectory(run)
    if not directory.recipe.is_file():
        raise ConfigError(f"{run}: not a run directory (it has no recipe.yaml)")
    if directory.summary.is_file():
        summary = json.loads(directory.summary.read_text(encoding="utf-8"))
        kept = {key: value for key, value in summary.items() if not isinstance(value, dict)}
        console.print(
            "  ".join(f"{key} {_short(value)}" for key, value in kept.items()), highlight=False, soft_wrap=True
        )
    sampled = sorted(directory.completions.glob("*.parquet"))
    file = directory.evaluation_rows(source) if source != "training" else (sampled or [directory.completions])[-1]
    if not file.is_file():
        raise ConfigError(f"{file}: not written by this run; try --source after, before or training")
    table = pd.read_parquet(file)
    console.print(f"{file}: {len(table)} completions", highlight=False, soft_wrap=True)
    for record in table.head(rows).to_dict("records"):
        _print_completion(record)


def _print_completion(record: Mapping[str, Any]) -> None:
    texts = {key: _text(record[key]) for key in ("prompt", "completion")}
    rest = {key: value for key, value in record.items() if key not in texts and isinstance(value, int | float | str)}
    console.rule(style="dim")
    console.print(Text(texts["prompt"], style="dim"))
    if record.get("credit") is None or record.get("tokens") is None:
        console.print(Text(texts["completion"]))
    else:
        console.print(_by_credit(list(record["tokens"]), [float(value) for value in record["credit"]]))
    console.print(Text("  ".join(f"{key} {_short(value)}" for key, value in rest.items()), style="bold"))


def _by_credit(tokens: Sequence[str], credit: Sequence[float]) -> Text:
    """Tokens coloured by the credit the loss used, then the same as numbers: green pushes up, red down."""
    strongest = max((abs(value) for value in credit), default=0.0) or 1.0
    shown = Text()
    for token, value in zip(tokens, credit, strict=True):
        strength = round(200 * abs(value) / strongest)
        colour = f"rgb(0,{strength},0)" if value > 0 else f"rgb({strength},0,0)"
        shown.append(token, style=f"on {colour}" if value else "")
    shown.append("\n" + " ".join(f"{token!r}:{value:+.2f}" for token, value in zip(tokens, credit, strict=True)), "dim")
    return shown


def _text(value: Any) -> str:
    """A prompt or completion as text; of a conversation the messages' content."""
    if isinstance(value, str):
        return value
    return "\n".join(str(message["content"]) for message in value)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# options that `attend` and `heads` share
Probed = Annotated[
    str, typer.Argument(help="A checkpoint or model directory, tiny-reasoner, or a hub id.", metavar="CHECKPOINT")
]
FirstRows = Annotated[int | None, typer.Option("--rows", "-n", help="Read only the first rows of FILE.")]
AsChat = Annotated[
    bool, typer.Option("--chat", help="Make a plain prompt the user message of the tokenizer's chat template.")
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of preplan_anchor, such as window=5; repeatable."),
]
WeightType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the weights.")
]
EngineName = Literal["fast", "transformers"]
COMPLETIONS = typer.Option("--completions", metavar="FILE", help="JSON lines or Parquet: columns prompt, completion.")


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are laid over one another.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file to write. Default: report.html in the first run.")
    ] = None,
    max_mb: Annotated[
        float, typer.Option("--max-mb", help="Largest size of the file; fewer completions fit less.")
    ] = 9.5,
    completions: Annotated[
        int | None, typer.Option("--completions", help="Completions per run at most. Default: as many as fit.")
    ] = None,
) -> None:
    """Write one HTML page about runs: curves, recipes, and completions token by token with their credit."""
    from rltok.report import load, resolve_runs
    from rltok.report.html import Limits, build

    limits = Limits(max_bytes=int(max_mb * 1e6), max_completions=completions)
    loaded = [load(path, name) for name, path in resolve_runs(runs).items()]
    path = build(loaded, out or runs[0] / "report.html", limits)
    for run in loaded:
        for problem in run.problems:
            console.print(f"{run.name}: {problem}", highlight=False, soft_wrap=True, markup=False)
    size = path.stat().st_size / 1e6
    console.print(f"{path} ({size:.1f} MB)", highlight=False, soft_wrap=True, markup=False)


@app.command(name="compare")
def compare_methods(
    comparison: Annotated[
        str,
        typer.Argument(
            metavar="COMPARISON", help="A YAML file, or the name of a shipped one: demo, kv, quant, edge_qat."
        ),
    ],
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Run only this arm, task or task/arm; may be repeated.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and the expected time; run nothing.")
    ] = False,
) -> None:
    """Train methods and controls over seeds, evaluate them on the same problems, and say what is more than noise."""
    from rltok.compare import compare

    raise typer.Exit(compare(comparison, console, only, dry_run, overrides or ()))


@app.command()
def attend(
    checkpoint: Probed,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt to complete; may be repeated.")
    ] = None,
    completions: Annotated[Path | None, COMPLETIONS] = None,
    rows: FirstRows = None,
    chat: AsChat = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest completion of a prompt; default 256.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the completion of a prompt; default 0, which is greedy.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampling; default 0.")] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option("--engine", help="Of the completion of a prompt: the rollout loop (default), or generate."),
    ] = None,
    settings: MethodOptions = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the files.")] = Path("attend"),
    pictures: Annotated[int, typer.Option("--pictures", help="Draw at most so many completions.")] = 4,
    dtype: WeightType = "float32",
) -> None:
    """Attention signals of completions (WAAD, FAI, preplan and anchor tokens): JSON, Parquet and a picture."""
    from rltok.attend import AttendOptions, run_attend

    options = AttendOptions(
        checkpoint=checkpoint,
        prompts=tuple(prompt or ()),
        completions=completions,
        rows=rows,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        engine=engine,
        settings=tuple(settings or ()),
        out=out,
        pictures=pictures,
        dtype=dtype,
    )
    raise typer.Exit(run_attend(options, console))


@app.command()
def generate(
    checkpoint: Probed,
    overrides: Overrides = None,
    decoding: Annotated[
        str,
        typer.Option(
            "--decoding", metavar="RECIPE|none", help="A recipe, or a YAML file with a list `decoding`; default: none."
        ),
    ] = "none",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt to complete; may be repeated.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="JSON lines or Parquet: a column prompt, and what the rewards read."
        ),
    ] = None,
    recipe_data: Annotated[bool, typer.Option("--recipe-data", help="The recipe's held-out rows.")] = False,
    rows: Annotated[int | None, typer.Option("--rows", "-n", help="Only the first rows of FILE or recipe.")] = None,
    chat: AsChat = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 is greedy; default: the recipe's, else 1.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Default: the recipe's, else 1.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="0 is no limit; default: the recipe's, else 0.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Longest completion; default: the recipe's, else 256.")
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option("--min-new-tokens", help="No end token is sampled before; default 0.")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Ends a completion, as its last part; repeatable."),
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num-samples", metavar="N", help="Completions per prompt; default 1.")
    ] = None,
    best_of: Annotated[
        int | None, typer.Option("--best-of", metavar="N", help="Of N completions choose that of the highest reward.")
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            "--reward",
            metavar="NAME|FILE.py:FUNCTION",
            help="Score by it; may be repeated; default: the recipe's rewards with --best-of and --recipe-data.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampling; default 0.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Completions generated at once.")] = 16,
    engine: Annotated[
        EngineName | None,
        typer.Option("--engine", help="The rollout loop, or transformers' generate; default: the recipe's, else fast."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the files.")] = Path("generate"),
    dtype: WeightType = "float32",
) -> None:
    """Complete prompts with a recipe's decoding methods: text, and log-probability, temperature and wave per token."""
    from rltok.generate import GenerateOptions, run_generate

    options = GenerateOptions(
        checkpoint=checkpoint,
        decoding=decoding,
        overrides=tuple(overrides or ()),
        prompts=tuple(prompt or ()),
        prompts_file=prompts,
        recipe_data=recipe_data,
        rows=rows,
        chat=chat,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop=tuple(stop or ()),
        num_samples=num_samples,
        best_of=best_of,
        rewards=tuple(reward or ()),
        seed=seed,
        batch_size=batch_size,
        engine=engine,
        out=out,
        dtype=dtype,
    )
    raise typer.Exit(run_generate(options, console))


@app.command()
def heads(
    checkpoint: Probed,
    completions: Annotated[Path, COMPLETIONS],
    rows: FirstRows = None,
    chat: AsChat = False,
    settings: MethodOptions = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the section to a YAML file.")] = None,
    dtype: WeightType = "float32",
) -> None:
    """Local and global heads of a model, ranked once: a credit section with head_scope static."""
    from rltok.attend import AttendOptions
    from rltok.calibrate import run_heads

    options = AttendOptions(
        checkpoint=checkpoint,
        completions=completions,
        rows=rows,
        chat=chat,
        settings=tuple(settings or ()),
        dtype=dtype,
    )
    raise typer.Exit(run_heads(options, out, console))


@app.command()
def sinks(
    checkpoint: Probed,
    completions: Annotated[Path | None, COMPLETIONS] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Plain text, cut into rows of --tokens.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Read at most so many rows.")] = 8,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Of a row at most; default 512, or the model's context.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="N,...", help="Decoder layers, from 0; default: all.")
    ] = None,
    check: Annotated[
        int,
        typer.Option(
            "--check", metavar="N", help="Measure the loss without N heads that stand out, and without N active ones."
        ),
    ] = 0,
    chat: AsChat = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything that was measured.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw heat maps, heads by layers, as PNG.")
    ] = None,
    dtype: WeightType = "float32",
) -> None:
    """Attention sinks and dormant heads of a model, and how many first tokens a streaming cache should keep.

    Reads the completions or the text of a file; tiny-reasoner also completes problems of its own task.
    """
    from rltok.sinks import SinkOptions, run_sinks
    from rltok.steer import parse_layers

    options = SinkOptions(
        checkpoint=checkpoint,
        completions=completions,
        text=text,
        rows=rows,
        tokens=tokens,
        layers=None if layers is None else parse_layers(layers),
        check=check,
        chat=chat,
        json=json_file,
        picture=picture,
        dtype=dtype,
    )
    raise typer.Exit(run_sinks(options, console))


@app.command()
def steer(
    checkpoint: Probed,
    triples: Annotated[
        Path,
        typer.Option(
            "--triples", metavar="FILE", help="JSON lines or Parquet: columns prompt, preferred, dispreferred."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The safetensors file to write.")],
    layers: Annotated[str, typer.Option("--layers", metavar="N,...", help="Decoder layers, from 0.")],
    k: Annotated[int, typer.Option("--k", help="Tokens that are replaced per sequence.")] = 10,
    mode: Annotated[
        Literal["pos", "neg", "both", "abs", "random"],
        typer.Option("--mode", help="Which tokens, by signed score; both: pos minus neg; random: the control."),
    ] = "both",
    method: Annotated[Literal["pca", "mean"], typer.Option("--method", help="Direction of the differences.")] = "pca",
    steps: Annotated[int, typer.Option("--steps", help="Quadrature nodes of the attribution.")] = 20,
    strength: Annotated[float, typer.Option("--strength", help="Factor of the vectors, kept in the file.")] = 40.0,
    score: Annotated[
        Literal["response", "last_token"],
        typer.Option("--score", help="Log-probability of the response; last_token is that of the released code."),
    ] = "response",
    baseline: Annotated[
        Literal["zero", "mean"],
        typer.Option("--baseline", help="Embedding where attribution starts; mean (with --steps 50) is more exact."),
    ] = "zero",
    protect_special: Annotated[bool, typer.Option("--protect-special", help="Never replace special tokens.")] = False,
    ablate_with: Annotated[Literal["pad", "unk"], typer.Option("--ablate-with", help="The replacement.")] = "pad",
    seed: Annotated[int, typer.Option("--seed", help="Of mode random.")] = 0,
    rows: FirstRows = None,
    chat: AsChat = False,
    dtype: WeightType = "float32",
) -> None:
    """Steering vectors (GrAInS) of a model, from preferred and dispreferred responses."""
    from rltok.steer import SteerOptions, parse_layers, run_steer
    from rltok.steering import ContrastOptions

    try:
        contrast = ContrastOptions(k, mode, steps, score, baseline, protect_special, ablate_with, seed)
    except ValueError as error:
        raise ConfigError(f"--{error}") from error
    options = SteerOptions(
        checkpoint=checkpoint,
        triples=triples,
        out=out,
        layers=parse_layers(layers),
        contrast=contrast,
        method=method,
        strength=strength,
        rows=rows,
        chat=chat,
        dtype=dtype,
    )
    raise typer.Exit(run_steer(options, console))


@app.command()
def profile(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="compress_kv or razor_attention.")],
    checkpoint: Probed,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSON file to write.")],
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--texts",
            metavar="FILE",
            help="compress_kv: JSON lines or Parquet, column text, or prompt and completion; repeatable, each file is "
            "a data set. tiny-reasoner needs none.",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", "-n", help="Read only the first rows of each file.")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="compress_kv: needles per data set; default 16.")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", help="compress_kv: tokens of a prompt; default 2048, or what the model has room for."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="compress_kv: longest answer; default 50.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option("--heads", help="compress_kv: query heads of a layer that choose; default 4.")
    ] = None,
    error_budget: Annotated[
        int | None,
        typer.Option("--error-budget", help="compress_kv: tokens of the cache whose error is measured; default 32."),
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option("--recall", help="compress_kv: an answer counts above this share of the needle; default 0.5."),
    ] = None,
    teacher_forced: Annotated[
        bool,
        typer.Option(
            "--teacher-forced",
            help="compress_kv: take the needle as the answer, for a model too weak to repeat it (not of the paper).",
        ),
    ] = False,
    question: Annotated[
        str | None,
        typer.Option(
            "--question", metavar="TEXT", help="compress_kv: stands between the texts and the needle's start."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="compress_kv: texts and question are the user message of the chat template.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", help="razor_attention: random tokens; default 2500, or what the model has room for."),
    ] = None,
    copies: Annotated[
        int | None, typer.Option("--copies", help="razor_attention: times they are repeated; default 4.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of needles and texts, or of random tokens.")] = 0,
    dtype: WeightType = "float32",
) -> None:
    """What a cache policy needs to know of a model, measured once: a JSON table that rollout.kv.table names."""
    from rltok.kv_profile import ProfileOptions, run_profile

    options = ProfileOptions(
        policy=policy,
        checkpoint=checkpoint,
        out=out,
        texts=tuple(texts or ()),
        rows=rows,
        samples=samples,
        length=length,
        max_new_tokens=max_new_tokens,
        heads=heads,
        error_budget=error_budget,
        recall=recall,
        teacher_forced=teacher_forced,
        question=question,
        chat=chat,
        tokens=tokens,
        copies=copies,
        seed=seed,
        dtype=dtype,
    )
    raise typer.Exit(run_profile(options, console))


@app.command()
def quantize(
    checkpoint: Probed,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The directory to write; must not exist.")],
    overrides: Overrides = None,
    method: Annotated[
        Literal["rsq", "gptq", "rtn"],
        typer.Option("--method", help="GPTQ with tokens weighed by importance, plain GPTQ, or rounding to nearest."),
    ] = "rsq",
    bits: Annotated[int, typer.Option("--bits", help="Of a weight, 2 to 8.")] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Weights of a row that share a scale; -1: the whole row.")
    ] = 128,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="JSON lines or Parquet: column text, or prompt and completion; repeatable. Default: the model's own "
            "rollouts on the recipe's training prompts.",
        ),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval-text",
            metavar="FILE",
            help="Held-out texts, likewise; repeatable. Default: own rollouts on the recipe's held-out prompts.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Recipe whose prompts are completed, and whose held-out rows and rewards give the accuracy; "
            "tiny-reasoner has its demo.",
        ),
    ] = None,
    rows: FirstRows = None,
    samples: Annotated[int, typer.Option("--samples", help="Calibration sequences, and held-out ones at most.")] = 128,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens of a sequence at most; default 2048, or the model's context.")
    ] = None,
    chat: AsChat = False,
    rotation: Annotated[
        Literal["hadamard", "orthogonal", "none"] | None,
        typer.Option("--rotation", help="Of the residual stream before; default: hadamard for rsq, else none."),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option("--importance", metavar="SCORE", help="rsq: what weighs tokens; default attention_concentration."),
    ] = None,
    r_min: Annotated[
        float | None,
        typer.Option("--r-min", help="rsq: importance of a sequence's least token; default 0.01, unrotated 0.1."),
    ] = None,
    r_max: Annotated[float | None, typer.Option("--r-max", help="rsq: of its first; default 1.")] = None,
    power: Annotated[
        int | None, typer.Option("--power", help="rsq: weights are importance to the power 1 (default) or 2.")
    ] = None,
    discount: Annotated[
        Literal["linear", "root"] | None,
        typer.Option("--discount", help="rsq: divide scores by the queries that see the token, or by their root."),
    ] = None,
    expansion: Annotated[
        int | None,
        typer.Option("--expansion", help="Times a sequence is used, rolled; default 8 for rsq, else 1."),
    ] = None,
    clip_search: Annotated[
        bool, typer.Option("--clip-search/--no-clip-search", help="Choose scales among 80 shrunk ones.")
    ] = True,
    percdamp: Annotated[
        float, typer.Option("--percdamp", help="Damping of the Hessian, share of its mean diagonal.")
    ] = 0.01,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences computed at once.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of the calibration's choice and rollouts, and rotation.")] = 0,
    format: Annotated[
        Literal["compressed-tensors", "dequantized"],
        typer.Option("--format", help="Packed codes, or plain weights that load anywhere and save nothing."),
    ] = "compressed-tensors",
    picture: Annotated[bool, typer.Option("--picture/--no-picture", help="Draw quality.png and quality.svg.")] = True,
    dtype: WeightType = "auto",
) -> None:
    """Weights in few bits by RSQ, GPTQ or rounding: a checkpoint that transformers loads, and what it cost."""
    from rltok.quantize import QuantizeOptions, run_quantize

    options = QuantizeOptions(
        checkpoint=checkpoint,
        out=out,
        method=method,
        bits=bits,
        group_size=group_size,
        calibration=tuple(calibration or ()),
        eval_text=tuple(eval_text or ()),
        recipe=recipe,
        overrides=tuple(overrides or ()),
        rows=rows,
        samples=samples,
        length=length,
        chat=chat,
        rotation=rotation,
        importance=importance,
        r_min=r_min,
        r_max=r_max,
        power=power,
        discount=discount,
        expansion=expansion,
        clip_search=clip_search,
        percdamp=percdamp,
        batch_size=batch_size,
        seed=seed,
        format=format,
        picture=picture,
        dtype=dtype,
    )
    raise typer.Exit(run_quantize(options, console))


@app.command()
def methods() -> None:
    """Every method of the four doors and every reward, with options and defaults."""
    from rltok.correction import CorrectionConfig
    from rltok.credit import CREDIT
    from rltok.kv import POLICIES, HoldConfig, KVConfig
    from rltok.objective import OBJECTIVE
    from rltok.quant import RolloutQuantSpec
    from rltok.quant.config import NoiseConfig, QuantConfig
    from rltok.rewards import REWARDS
    from rltok.rollout import DynamicSamplingConfig, RolloutConfig
    from rltok.sampling import DECODING
    from rltok.selection import SELECTION
    from rltok.selection.prompts import PromptSkippingConfig
    from rltok.steering import SteeringConfig

    doors: dict[str, Mapping[str, Any]] = {
        "credit: {type: ...}": CREDIT,
        "selection: {type: ...}": SELECTION,
        "objective: {type: ...}": OBJECTIVE,
        "rollout.decoding: [{type: ...}]": DECODING,
        "rollout.kv: {policy: ..., budget: ...}": POLICIES,
        "rewards.<name>.function": REWARDS,
    }
    for title, registry in doors.items():
        table = Table(title=title, title_justify="left", expand=True)
        table.add_column("name", no_wrap=True)
        table.add_column("what it does", ratio=3)
        table.add_column("options and defaults", ratio=4)
        for name, cls in registry.items():
            table.add_row(name, Text(first_line(cls)), Text(_options(cls)))
        console.print(table)
    sections = {
        "kv": KVConfig,
        "kv.hold": HoldConfig,
        "quant": QuantConfig,
        "quant: weights": RolloutQuantSpec,
        "quant.noise": NoiseConfig,
        "steering": SteeringConfig,
        "correction": CorrectionConfig,
        "dynamic_sampling": DynamicSamplingConfig,
        "prompt_skipping": PromptSkippingConfig,
    }
    console.print(Text(f"rollout: {_options(RolloutConfig, skip=('decoding', *sections))}"))
    for name, cls in sections.items():
        console.print(Text(f"rollout.{name}: {_options(cls, skip=('policy', 'hold', 'spec', 'noise'))}"))
    console.print("training: every field of TRL's GRPOConfig, such as loss_type, epsilon, epsilon_high, delta")


def _options(cls: type, skip: Sequence[str] = ()) -> str:
    return "  ".join(f"{field.name}={field.default}" for field in describe(cls) if field.name not in skip)


@app.command()
def recipes() -> None:
    """The recipes that come with rltok."""
    from rltok.recipe import CONFIG_DIR, shipped_recipes

    table = Table()
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for name, line in shipped_recipes().items():
        table.add_row(name, Text(line))
    console.print(table)
    table = Table(title="of rltok sft", title_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it is")
    for name, line in shipped_recipes(CONFIG_DIR / "sft").items():
        table.add_row(name, Text(line))
    console.print(table)
    console.print(f"in {CONFIG_DIR}", highlight=False, soft_wrap=True)


@app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    processes: Annotated[
        int | None, typer.Option("--processes", help="It will run on. Default: launch.processes, else one.")
    ] = None,
    brief: Annotated[
        bool, typer.Option("--brief", help="Leave out training settings that keep TRL's default.")
    ] = False,
) -> None:
    """Check a recipe and print its effective configuration and estimates; trains and loads nothing."""
    from rltok.estimate import check_combination, estimate
    from rltok.recipe import dump_yaml, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    args = check_combination(loaded)
    values = loaded.resolved()
    if not brief:
        values["training"] = _every_setting(loaded, args)
    console.print(Text(dump_yaml(values).rstrip()), soft_wrap=True)
    for line in estimate(loaded, args, processes or loaded.launch.processes or 1):
        console.print(Text(line), soft_wrap=True)


def _every_setting(recipe: Recipe, args: Any) -> dict[str, Any]:
    """The recipe's training settings, then those of TRL that it leaves alone."""
    import dataclasses

    from rltok.recipe import ELSEWHERE

    defaults = {}
    for field in dataclasses.fields(args):
        if field.init and field.name not in ELSEWHERE and field.name not in recipe.training:
            value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            defaults[field.name] = getattr(value, "value", value)
    return recipe.training | defaults
