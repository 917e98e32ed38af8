"""What others wrote runs no code here, and what is secret is not written down. Every plant is live: it would fire."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from tests_support import build_model, build_tokenizer, digit_dataset, even_reward, run_settings
from transformers import dynamic_module_utils

from rltok.cli import main
from rltok.config import ConfigError
from rltok.data import DataConfig, load_data
from rltok.expect import check_expectations
from rltok.models import ModelConfig, load_model, load_model_config, load_tokenizer
from rltok.pickles import NEVER_READ, load_tensors, names_in, refuse_code
from rltok.prompts import read_rows
from rltok.recipe import find_recipe, load_recipe, merged, shipped_recipes
from rltok.report import load
from rltok.report.environment import environment
from rltok.rewards import RewardError, build_rewards, guarded
from rltok.rewards.check import check_rewards
from rltok.sampler_stats import checkpoint_stats
from rltok.secrets import is_secret_name, redacted, refuse_secrets, without_secrets
from rltok.steering import load_vectors
from rltok.trainers import CreditConfig, CreditTrainer
from rltok.trainers.checkpoint import write_manifest

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_" + "abcdefGHIJ0123456789"
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"
JUDGE_KEY = "sk-proj-abcdefghijklmnop"
SMOKE = [
    "training.max_steps=2",
    "training.save_steps=1",
    "training.learning_rate=1e-3",
    "evaluation.before=false",
    "evaluation.after=false",
    "report.progress=lines",
]


class Planted:
    """Makes a directory where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a plant that fires leaves behind; every test that asks for it checks that there is none in the end."""
    place = tmp_path / "planted-code-ran"
    yield place
    assert not place.exists()


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


def code(marker: Path) -> str:
    """Python that leaves the marker behind."""
    return f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"


# Pickles: the reader that runs nothing


def test_a_plant_is_live(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Planted(tmp_path / "fired")))
    assert (tmp_path / "fired").is_dir()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("pickler", [pickle.Pickler, pickle._Pickler], ids=["C", "Python"])
def test_every_name_of_a_pickle_is_found(marker: Path, tmp_path: Path, protocol: int, pickler: type) -> None:
    stream = io.BytesIO()
    pickler(stream, protocol).dump({"weights": [1, {2.0, "x"}, Planted(marker)], "more": np.float64})
    (tmp_path / ".metadata").write_bytes(stream.getvalue())
    names = names_in(tmp_path / ".metadata")
    assert {f"{os.mkdir.__module__}.mkdir", "numpy.float64"} <= names


CRAFTED = {
    # what a call returned is called
    "call of a result": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nX\x02\x00\x00\x00os\x85RX\x05\x00\x00\x00mkdirtRX%s\x85R.",
        "builtins.getattr",
    ),
    # the name comes from two strings on the stack
    "names from the stack": (b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93X%s\x85R.", "posix.mkdir"),
    # the old instruction that looks up and calls at once
    "instance": (b"(X%sios\nmkdir\n.", "os.mkdir"),
    "object": (b"(cos\nmkdir\nX%so.", "os.mkdir"),
    # a name behind a name that is allowed
    "dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x18OrderedDict.fromkeys.__x\x93.", "OrderedDict.fromkeys"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_crafted_pickles_hide_nothing(marker: Path, tmp_path: Path, kind: str) -> None:
    stream, found = CRAFTED[kind]
    text = str(marker).encode()
    (tmp_path / ".metadata").write_bytes(stream.replace(b"%s", struct.pack("<I", len(text)) + text))
    assert any(found in name for name in names_in(tmp_path / ".metadata"))
    with pytest.raises(ConfigError, match=r"\.metadata is not loaded: loading it would call"):
        refuse_code(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95", b"PK\x03\x04 no zip", b"\x80\x02\x82\x01."])
def test_a_file_that_cannot_be_followed_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("optimizer.pt", ".metadata"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} is not loaded: it cannot be checked"):
            refuse_code(tmp_path)
        (tmp_path / name).unlink()


def test_the_old_format_of_torch_is_refused(marker: Path, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"optimizer\.pt is not loaded: .*zip format"):
        refuse_code(tmp_path)


@pytest.mark.parametrize(
    "name", ["global_step1/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/optimizer.bin", "rng_state_3.pth"]
)
def test_files_of_other_engines_are_looked_at(marker: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {"w": torch.ones(2)}, "step": Planted(marker)}, tmp_path / name)
    with pytest.raises(ConfigError, match=f"{Path(name).name} is not loaded: .*mkdir"):
        refuse_code(tmp_path)


def test_objects_in_a_distributed_checkpoint_are_looked_at(marker: Path, tmp_path: Path) -> None:
    """torch reads them with weights_only=False."""
    import torch.distributed.checkpoint as dcp

    weights = {"model": {"w": torch.ones(4)}, "step": 3, "betas": (0.9, 0.999)}
    dcp.save(weights, checkpoint_id=str(tmp_path / "clean"), no_dist=True)
    refuse_code(tmp_path / "clean")
    dcp.save({**weights, "extra": Planted(marker)}, checkpoint_id=str(tmp_path / "planted"), no_dist=True)
    with pytest.raises(ConfigError, match=r"\.metadata is not loaded: .*mkdir"):
        refuse_code(tmp_path / "planted")


# Pickles: a resume


def small_trainer(folder: Path, **changes: object) -> CreditTrainer:
    tokenizer = build_tokenizer()
    return CreditTrainer(
        build_model(tokenizer),
        even_reward,
        CreditConfig(**run_settings(folder, save_strategy="steps", save_steps=1, max_steps=2, **changes)),
        train_dataset=digit_dataset(),
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    small_trainer(folder).train()
    return folder / "checkpoint-1"


def planted_copy(checkpoint: Path, folder: Path, name: str, marker: Path) -> Path:
    """The checkpoint with one file that holds a plant beside what it held, under a manifest that says all is well."""
    copy = Path(shutil.copytree(checkpoint, folder / checkpoint.name))
    old = torch.load(copy / name, weights_only=False) if (copy / name).is_file() else {}
    torch.save({"kept": old, "planted": Planted(marker)}, copy / name)
    write_manifest(copy)
    return copy


def test_a_clean_checkpoint_passes(checkpoint: Path) -> None:
    pickled = {file.name for file in checkpoint.iterdir() if file.suffix in (".pt", ".pth", ".bin")}
    assert pickled == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "rltok_state_0.pt", *NEVER_READ}
    refuse_code(checkpoint)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rltok_state_0.pt"])
def test_a_resume_runs_no_planted_code(checkpoint: Path, tmp_path: Path, marker: Path, name: str) -> None:
    copy = planted_copy(checkpoint, tmp_path, name, marker)
    with pytest.raises(ConfigError, match=rf"{name} is not loaded: loading it would call \w+\.mkdir"):
        refuse_code(copy)
    with pytest.raises((pickle.UnpicklingError, ConfigError)):  # torch itself, should the check be forgotten
        small_trainer(tmp_path / "run").train(resume_from_checkpoint=str(copy))


@pytest.mark.parametrize("name", ["training_args.bin", "pytorch_model.bin"])
def test_files_that_nobody_reads_do_no_harm(checkpoint: Path, tmp_path: Path, marker: Path, name: str) -> None:
    copy = planted_copy(checkpoint, tmp_path, name, marker)
    small_trainer(tmp_path / "run").train(resume_from_checkpoint=str(copy))  # model.safetensors lies beside them
    load_model(ModelConfig(path=str(copy)))


def test_a_planted_checkpoint_stops_the_command_with_the_name_of_the_file(
    finished: Path, tmp_path: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = planted_copy(finished / "checkpoint-1", tmp_path, "optimizer.pt", marker)
    given = ["train", "smoke", *SMOKE, f"output_dir={tmp_path / 'run'}", f"resume={copy}"]
    assert run_cli(*given) == 2
    assert f"{copy}/optimizer.pt is not loaded" in capsys.readouterr().err


def test_statistics_of_a_planted_checkpoint(checkpoint: Path, tmp_path: Path, marker: Path) -> None:
    """`rltok eval` and `rltok generate` read them from the trainer's state."""
    copy = planted_copy(checkpoint, tmp_path, "rltok_state_0.pt", marker)
    with pytest.raises(ConfigError, match=r"rltok_state_0\.pt is not loaded"):
        checkpoint_stats(copy)
    with pytest.raises(ConfigError, match=r"rltok_state_0\.pt is not loaded"):
        load_tensors(copy / "rltok_state_0.pt")


# Pickles: weights


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A whole model with its tokenizer."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def conversion(message: str) -> str:
    """The code of the command in an error."""
    return message.split('python -c "', 1)[1].rstrip('"')


def test_pickled_weights_are_refused_and_the_command_converts_them(policy: Path) -> None:
    weights = load_file(policy / "model.safetensors")
    (policy / "model.safetensors").unlink()
    torch.save(weights, policy / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only as pickle \(pytorch_model\.bin\)") as caught:
        load_model(ModelConfig(path=str(policy)))
    exec(conversion(str(caught.value)), {})
    found = load_model(ModelConfig(path=str(policy))).state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())


def adapter_of(policy: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_model(ModelConfig(path=str(policy))), settings).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_a_pickled_adapter_is_refused_and_the_command_converts_it(policy: Path, tmp_path: Path, marker: Path) -> None:
    adapter = adapter_of(policy, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"only as pickle \(adapter_model\.bin\)") as caught:
        load_model(ModelConfig(path=str(adapter)))
    exec(conversion(str(caught.value)), {})
    load_model(ModelConfig(path=str(adapter)))
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Planted(marker)}, adapter / "adapter_model.bin")
    with pytest.raises(pickle.UnpicklingError):  # and the conversion reads tensors alone
        exec(conversion(str(caught.value)), {})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_planted_weights(policy: Path, marker: Path, name: str) -> None:
    (policy / "model.safetensors").unlink()
    torch.save({"x": Planted(marker)}, policy / name)
    with pytest.raises(ConfigError, match=name):
        load_model(ModelConfig(path=str(policy)))


@pytest.mark.parametrize("shard", ["pytorch_model-00001.bin", "../elsewhere.safetensors"])
def test_an_index_cannot_lead_elsewhere(policy: Path, marker: Path, shard: str) -> None:
    torch.save({"x": Planted(marker)}, policy / "pytorch_model-00001.bin")
    (policy / "model.safetensors").rename(policy.parent / "elsewhere.safetensors")
    names = dict.fromkeys(load_file(policy.parent / "elsewhere.safetensors"), shard)
    (policy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json names"):
        load_model(ModelConfig(path=str(policy)))


def test_planted_steering_vectors(tmp_path: Path, marker: Path) -> None:
    for name, write in (("a.safetensors", torch.save), ("b.safetensors", pickle_to)):
        write({"layer.1": Planted(marker)}, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: cannot be read as safetensors"):
            load_vectors(tmp_path / name)


def pickle_to(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


# Pickles: data and the files of a run


def planted_parquet(path: Path, marker: Path) -> Path:
    """Metadata that old readers unpickled: an extension type of Arrow's, and the footer of pandas."""
    serialized = pickle.dumps(Planted(marker))
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": serialized}
    fields = [
        pa.field("prompt", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("x", pa.int64(), metadata=extension),
    ]
    rows = [pa.array([f"{i}+1=" for i in range(4)]), pa.array(list("1234")), pa.array([1, 2, 3, 4])]
    schema = pa.schema(fields, metadata={b"pandas": serialized.hex().encode(), b"rltok": serialized})
    pq.write_table(pa.table(rows, schema=schema), path)
    return path


def test_parquet_metadata_is_never_unpickled(tmp_path: Path, marker: Path) -> None:
    file = planted_parquet(tmp_path / "rows.parquet", marker)
    assert len(read_rows(file, "--prompts", ["prompt"])) == 4
    config = DataConfig(source="file", path=str(file), conversational=False, heldout_size=1)
    assert len(load_data(config).train) == 3
    with pytest.raises(ValueError):  # json
        pd.read_parquet(file)


def test_planted_files_of_a_run_are_told_and_left_out(finished: Path, tmp_path: Path, marker: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*")))
    shutil.rmtree(run / "samples")
    (run / "samples").mkdir()
    planted_parquet(run / "samples" / "rollout_00000000.parquet", marker)
    planted_parquet(run / "evaluation_after.parquet", marker)
    planted = ["recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "evaluation_after.json"]
    for name in planted[1:]:
        (run / name).write_bytes(pickle.dumps(Planted(marker), protocol=0))
    (run / "recipe.yaml").write_text(f"name: x\nmodel: !!python/object/apply:os.mkdir ['{marker}']\n")
    found = load(run)
    found.evaluation_rows("after")
    found.samples()
    told = "\n".join(found.problems)
    assert [name for name in planted if name not in told] == []
    assert "rollout_00000000.parquet is damaged" in told


READERS = {
    "load": "torch.load without weights_only=True, pickle.load, np.load, yaml.load, joblib.load",
    "loads": "pickle.loads",
    "read_pickle": "pandas",
    "unsafe_load": "yaml",
    "full_load": "yaml",
}
KNOWN = {
    "rltok/pickles.py": {"pickle.loads", "load"},  # after its names were checked; the reader that runs nothing
}


def test_nothing_else_in_the_package_unpickles_or_evaluates() -> None:
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "rltok").rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (what := suspicious(node)):
                found.setdefault(name, set()).add(what)
    assert found == KNOWN


def suspicious(call: ast.Call) -> str | None:
    """The call, where it could run what a file says."""
    text = ast.unparse(call.func)
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    last = text.split(".")[-1]
    if text in ("eval", "exec", "compile", "__import__", "os.system", "os.popen") or keywords.get("shell") == "True":
        return text
    if "allow_pickle" in keywords or (keywords.get("trust_remote_code") == "True"):
        return text
    if text in ("json.load", "json.loads") or text.endswith((".load_state_dict",)):
        return None
    if text == "torch.load":
        return None if keywords.get("weights_only") == "True" else text
    owner = text.split(".")[0]
    if last in READERS and owner in ("pickle", "np", "numpy", "yaml", "joblib", "pd", "dill", "cloudpickle", "marshal"):
        return text
    return "load" if text.endswith(")._load") or text.startswith("_Inert") else None


# Code of a model folder


@pytest.fixture
def foreign(policy: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A model folder that brings its own modelling, tokenizer and generation code."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    (policy / "modeling_mine.py").write_text(
        code(marker)
        + "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        + "class MineConfig(Qwen3Config):\n    model_type = 'mine'\n"
        + "class MineForCausalLM(Qwen3ForCausalLM):\n    config_class = MineConfig\n"
    )
    (policy / "tokenization_mine.py").write_text(
        code(marker) + "from transformers import PreTrainedTokenizerFast\n"
        "class MineTokenizer(PreTrainedTokenizerFast): ...\n"
    )
    (policy / "custom_generate").mkdir()
    (policy / "custom_generate" / "generate.py").write_text(code(marker) + "def generate(model, **kwargs): ...\n")
    edit_json(
        policy / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"},
    )
    return policy


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def own_tokenizer(folder: Path) -> None:
    auto_map = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    edit_json(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=auto_map)


def test_code_of_a_model_folder_runs_only_where_the_recipe_says_so(foreign: Path, marker: Path) -> None:
    for loaded in (load_model_config, load_model):
        with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
            loaded(ModelConfig(path=str(foreign)))
    assert not marker.exists()
    load_model(ModelConfig(path=str(foreign), trust_remote_code=True))
    assert marker.is_dir()  # the plant is live
    marker.rmdir()


def test_a_known_model_with_code_beside_it_runs_without_that_code(foreign: Path, marker: Path) -> None:
    edit_json(foreign / "config.json", model_type="qwen3")
    own_tokenizer(foreign)
    config = ModelConfig(path=str(foreign))
    load_tokenizer(config)
    model = load_model(config)
    assert type(model).__module__ == "transformers.models.qwen3.modeling_qwen3"
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)


def test_the_model_below_an_adapter_runs_no_code_either(policy: Path, tmp_path: Path, marker: Path) -> None:
    adapter = adapter_of(policy, tmp_path / "adapter")
    (policy / "modeling_mine.py").write_text(code(marker))
    edit_json(policy / "config.json", model_type="mine", auto_map={"AutoConfig": "modeling_mine.MineConfig"})
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true"):
        load_model(ModelConfig(path=str(adapter)))


def test_no_command_runs_the_code_of_a_folder(
    foreign: Path, marker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own_tokenizer(foreign)
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "1+1=", "completion": "2", "preferred": "2", "dispreferred": "3"}
    rows.write_text(json.dumps(row) + "\n")
    path = str(foreign)
    commands = [
        ["eval", path, "--recipe", "smoke"],
        ["train", "smoke", f"model.path={path}", *SMOKE],
        ["attend", path, "--prompt", "1+1="],
        ["generate", path, "--prompt", "1+1="],
        ["heads", path, "--completions", str(rows)],
        ["steer", path, "--triples", str(rows), "--out", "v.safetensors", "--layers", "0"],
    ]
    for command in commands:
        assert run_cli(*command) == 2, command
        assert "model.trust_remote_code" in capsys.readouterr().err, command
    assert run_cli("check", "smoke", f"model.path={path}") == 0  # says that the memory is unknown, and why
    assert "model.trust_remote_code" in capsys.readouterr().out


def test_kernels_of_the_hub_are_code(policy: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.attn_implementation: 'someone/kernel' .*trust_remote_code"):
        ModelConfig(path=str(policy), attn_implementation="someone/kernel")
    edit_json(policy / "config.json", attn_implementation="someone/kernel")
    with pytest.raises(ConfigError, match=r"asks for the attention kernel 'someone/kernel'"):
        load_model(ModelConfig(path=str(policy)))
    load_model(ModelConfig(path=str(policy), attn_implementation="sdpa"))


def test_the_reference_of_the_trainer_is_loaded_as_the_policy(policy: Path, tmp_path: Path) -> None:
    from rltok.run import training_arguments

    recipe = load_recipe("smoke", [f"model.path={policy}", "training.beta=0.1"])
    options = training_arguments(recipe, tmp_path, [1.0] * len(recipe.rewards)).model_init_kwargs
    assert options["use_safetensors"] is True and options["trust_remote_code"] is False


def test_a_reward_model_cannot_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown reward 'someone/reward-model'"):
        load_recipe("smoke", ["rewards.judge={function: someone/reward-model}"])


def test_a_script_in_a_dataset_folder_is_not_run(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text(code(marker) + "import datasets\n")
    config = DataConfig(source="hub", name=str(folder), columns={"prompt": "prompt"})
    with pytest.raises((ConfigError, RuntimeError)):
        load_data(config)


# Recipes


def recipe_file(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_text(f"defaults: smoke.yaml\n{text}\n")
    return folder / "mine.yaml"


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir ['{marker}']",
        "!!python/object/new:os.mkdir ['{marker}']",
        "!!python/name:os.mkdir ''",
        "!!python/module:os ''",
        "!!python/object/apply:pathlib.Path ['{marker}']",
    ],
)
def test_tags_of_yaml_make_no_objects(tmp_path: Path, marker: Path, tag: str) -> None:
    path = recipe_file(tmp_path, "seed: " + tag.format(marker=marker))
    with pytest.raises(ConfigError, match="mine.yaml"):
        load_recipe(path)
    with pytest.raises(ConfigError):
        load_recipe("smoke", ["seed=" + tag.format(marker=marker)])


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:PLANTED_VALUE}",
        "before ${oc.env:PLANTED_VALUE,none} after",
        "${oc.decode:${oc.env:PLANTED_VALUE}}",
        "${oc.create:{a: 1}}",
        "${${data.source}:x}",
        "${oc.select:name}",
    ],
)
def test_resolvers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PLANTED_VALUE", "top-secret-value")
    for load_it in (
        lambda: load_recipe(recipe_file(tmp_path, f"report: {{project: '{text}'}}")),
        lambda: load_recipe("smoke", [f"report.project='{text}'"]),
        lambda: merged("smoke", [f"report.project='{text}'"]),
    ):
        with pytest.raises(ConfigError, match=r"report\.project") as caught:
            load_it()
        assert "top-secret-value" not in str(caught.value)


def test_references_within_a_recipe_remain(tmp_path: Path) -> None:
    text = "seed: 7\ntraining: {data_seed: '${seed}'}\nreport: {project: 'costs \\${a:b} {x: 1} ${seed}'}"
    recipe = load_recipe(recipe_file(tmp_path, text))
    assert recipe.training["data_seed"] == 7 and recipe.report.project == "costs ${a:b} {x: 1} 7"


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').mkdir('x')",
        "max(reward).__class__",
        "(lambda: 1)() > 0",
        "max(open)",
        "[x for x in (1,)] > 0",
        "max(reward, key=print)",
        "f'{reward}' > 0",
        "reward ** 99999999",
        "reward[0] > 0",
        "(reward := 1) > 0",
    ],
)
def test_expectations_are_no_python(expression: str) -> None:
    (outcome,) = check_expectations([expression], {"steps": 1}, [{"step": 1, "reward": 0.5}])
    assert outcome.held is False and "expect: " in outcome.reason


@pytest.mark.parametrize("template", ["{prompt.__class__}", "{prompt.__class__.__init__.__globals__}", "{answer.x[0]}"])
def test_templates_reach_no_attributes(tmp_path: Path, template: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "answer": "1"}) + "\n")
    with pytest.raises(ConfigError, match=r"data\.template: .*attribute"):
        load_data(DataConfig(source="file", path=str(tmp_path / "rows.jsonl"), template=template))


def test_chat_templates_run_in_a_sandbox(marker: Path) -> None:
    import jinja2

    tokenizer = build_tokenizer()
    messages = [{"role": "user", "content": "a"}]
    reach = "{{ cycler.__init__.__globals__.os.mkdir('" + str(marker) + "') }}"
    for template in (reach, "{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"):
        tokenizer.chat_template = template
        with pytest.raises(jinja2.exceptions.TemplateError):
            tokenizer.apply_chat_template(messages, tokenize=False)


def test_defaults_outside_are_data_and_never_quoted(tmp_path: Path) -> None:
    outside = tmp_path / "outside.yaml"
    outside.write_text("top-secret-line\n")
    for text in ("top-secret-line\n", "a: [top-secret-line\n"):
        outside.write_text(text)
        path = tmp_path / "inside" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("defaults: ../outside.yaml\n")
        with pytest.raises(ConfigError) as caught:
            load_recipe(path)
        assert "top-secret-line" not in str(caught.value)


# Reward files


@pytest.fixture
def with_reward(tmp_path: Path, marker: Path) -> Path:
    """A recipe whose reward file would leave a mark when it is imported."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "score.py").write_text(
        code(marker) + "def score(completions, scale=1.0, **columns):\n    return [scale for _ in completions]\n"
    )
    path = tmp_path / "mine" / "mine.yaml"
    path.write_text("defaults: smoke.yaml\nrewards: {own: {function: 'score.py:score', weight: 0.5}}\n")
    return path


def test_looking_at_a_recipe_does_not_run_its_rewards(
    with_reward: Path, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("check", str(with_reward)) == 0
    comparison = tmp_path / "mine" / "two.yaml"
    comparison.write_text(f"base: {with_reward}\nbaseline: a\nmetric: own\nseeds: [0]\narms: {{a: {{}}, b: {{}}}}\n")
    comparison.write_text(comparison.read_text() + "tasks: {x: {}}\n")
    text = comparison.read_text().replace("b: {}", "b: {settings: {training: {learning_rate: 1.0e-5}}}")
    comparison.write_text(text + "settings: {evaluation: {after: true}}\n")
    assert run_cli("compare", str(comparison), "--dry-run") == 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(load_recipe(with_reward).to_yaml())
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    assert run_cli("report", str(run)) == 0
    assert not marker.exists()
    build_rewards(load_recipe(with_reward).rewards)  # what a run does
    assert marker.is_dir()
    marker.rmdir()


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        ("none.py:score", {}, "there is no file"),
        ("score.py:scor", {}, "has no 'scor'; did you mean 'score'"),
        ("score.py:score", {"scal": 2}, "rewards.own.scal.*did you mean 'scale'"),
        ("score.py:LIMIT", {}, "is a int, not a function"),
        ("broken.py:score", {}, "cannot be loaded: SyntaxError"),
        ("nomodule:score", {}, "module 'nomodule' cannot be imported"),
        ("score", {}, "unknown reward 'score'"),
        ("score.py:", {}, "is not `module:function`"),
    ],
)
def test_what_the_text_of_a_reward_file_tells(
    tmp_path: Path, marker: Path, reference: str, options: dict, message: str
) -> None:
    (tmp_path / "score.py").write_text(
        code(marker) + "LIMIT = 3\ndef score(completions, scale=1.0):\n    return [scale for _ in completions]\n"
    )
    (tmp_path / "broken.py").write_text("def score(:\n")
    with pytest.raises(ConfigError, match=message):
        check_rewards({"own": {"function": reference, **options}}, tmp_path)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("from os.path import *\n", "f.py:anything"),
        ("def __getattr__(name): ...\n", "f.py:anything"),
        ("globals().update(score=print)\n", "f.py:score"),
        ("try:\n    from fast import score\nexcept ImportError:\n    def score(completions): ...\n", "f.py:score"),
        ("import functools\nscore = functools.partial(print, 1)\n", "f.py:score"),
        ("if True:\n    class score: ...\n", "f.py:score"),
        ("a = {}\na['x'], score = 1, print\n", "f.py:score"),
        ("def score(completions, **options): ...\n", "f.py:score"),
        ("def score(completions, *, any_option): ...\n", "f.py:score"),
        ("@decorated\ndef score(completions): ...\n", "f.py:score"),
        ("", "os.path:join"),
        ("", "rltok.rewards.length:Length"),
    ],
)
def test_what_the_text_does_not_tell_is_left_to_the_run(tmp_path: Path, text: str, reference: str) -> None:
    (tmp_path / "f.py").write_text(text)
    weights = {"own": {"function": reference, "weight": 0.25, "any_option": 1}, "short": {"function": "length"}}
    checked = check_rewards(weights, tmp_path)
    assert checked.names == ["own", "short"] and checked.weights == [0.25, 1.0]


def test_a_module_is_found_without_importing_its_package(tmp_path: Path, marker: Path) -> None:
    for name in ("planted_package", "planted_package/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code(marker))
    (tmp_path / "planted_package" / "inner" / "score.py").write_text(code(marker) + "def score(completions): ...\n")
    section = {"own": {"function": "planted_package.inner.score:score"}}
    check_rewards(section, tmp_path)
    with pytest.raises(ConfigError, match="has no 'scor'"):
        check_rewards({"own": {"function": "planted_package.inner.score:scor"}}, tmp_path)
    with pytest.raises(ConfigError, match=r"planted_package\.other.* cannot be imported"):
        check_rewards({"own": {"function": "planted_package.other:score"}}, tmp_path)


# Secrets


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "hub_token", "api_key", "OPENAI_API_KEY", "apiKey", "api-key", "password", "db_password", "secret"]
    + ["client_secret", "token", "rewards.judge.token", "authorization", "wandb_key", "WANDB_API_KEY", "credentials"]
    + ["AWS_SECRET_ACCESS_KEY", "aws_access_key"],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["pad_token", "eos_token", "max_tokens", "cache_tokens", "protect_special", "key", "keys", "prompt_key"]
    + ["tokenizer", "secretary", "wait_tokens", "TOKENIZERS_PARALLELISM", "author", "monkey", "api_key_env"],
)
def test_names_of_no_secrets(name: str) -> None:
    assert not is_secret_name(name)


SHOWN = [
    ("https://me:pw123@host/a?b=1", "https://***@host/a?b=1"),
    (f"GET /x?token={TOKEN}&n=1", "GET /x?token=***&n=1"),
    (f"tried {TOKEN}, refused", "tried ***, refused"),
    (f"WANDB_API_KEY={WANDB_KEY}", "WANDB_API_KEY=***"),
    ('{"password": "hunter2", "n": 1}', '{"password": ***, "n": 1}'),
    ("api_key = 'x y'", "api_key = ***"),
    ("Bearer abcdefghijklmnop", "Bearer ***"),
    ("max_tokens: 5, for token in tokens: pass", "max_tokens: 5, for token in tokens: pass"),
    ("https://host/a:b@c", "https://host/a:b@c"),
    ("task-sk-1, hf_transfer, commit " + WANDB_KEY, "task-sk-1, hf_transfer, commit " + WANDB_KEY),
]


@pytest.mark.parametrize(("text", "shown"), SHOWN)
def test_secrets_in_texts(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(redacted(text)) == shown


def test_secrets_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_PASSWORD", "plainlooking")
    values = {"judge": {"api_key": "abc", "n": 3, "none": None}, "list": [{"token": "x"}, ("a", f"k {JUDGE_KEY}")]}
    shown = {"judge": {"api_key": "***", "n": 3, "none": None}, "list": [{"token": "***"}, ("a", "k ***")]}
    assert redacted(values) == shown
    assert redacted("said plainlooking twice") == "said *** twice"
    assert values["judge"]["api_key"] == "abc"  # a copy


def test_a_command_line_without_its_secrets() -> None:
    argv = ["rltok", "train", "x", f"rewards.j.api_key={JUDGE_KEY}", "--hub-token", "abc", "token=abc", "seed=1"]
    facts = environment(argv, seed=0, processes=1)
    assert facts["argv"] == [
        "rltok",
        "train",
        "x",
        "rewards.j.api_key=***",
        "--hub-token",
        "***",
        "token=***",
        "seed=1",
    ]
    assert JUDGE_KEY not in json.dumps(facts) and "abc" not in facts["command"]


def test_shipped_recipes_hold_no_secrets() -> None:
    for name in shipped_recipes():
        if "data" in merged(name)[0]:
            refuse_secrets(load_recipe(name).resolved())
        assert find_recipe(name).is_file()


@pytest.mark.parametrize(
    ("override", "setting", "instead"),
    [
        (
            f"rewards.judge={{function: 'j.py:f', api_key: {JUDGE_KEY}}}",
            "rewards.judge.api_key",
            "environment variable",
        ),
        ("rewards.judge={function: 'j.py:f', password: hunter2}", "rewards.judge.password", "environment"),
        (f"training.hub_token={TOKEN}", "training.hub_token", "hf auth login"),
        (f"training.chat_template_kwargs={{x: {TOKEN}}}", "training.chat_template_kwargs.x", "environment"),
        ("model.path=https://me:pw123@host/model", "model.path", "environment"),
        ("data.path=https://me:pw123@host/rows.jsonl", "data.path", "environment"),
        ("report.project=wandb_v1_abcdefghijklmnopqrstuvwxyz", "report.project", "environment"),
    ],
)
def test_a_recipe_with_a_secret_is_refused_without_saying_it(override: str, setting: str, instead: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("smoke", [override])
    assert setting in str(caught.value) and instead in str(caught.value)
    for secret in (TOKEN, JUDGE_KEY, "hunter2", "pw123", "wandb_v1_"):
        assert secret not in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run in a process of its own, with secrets in its environment."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "score.py").write_text(
        "import os\ndef score(completions, judge='none', **_):\n    assert os.environ['HF_TOKEN']\n"
        "    return [float(len(text) % 3) for text in completions]\n"
    )
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": WANDB_KEY, "JUDGE_API_KEY": JUDGE_KEY}
    own = ["rewards.own={function: 'score.py:score', weight: 0.1}", "output_dir=run"]
    done = subprocess.run(
        [sys.executable, "-m", "rltok", "train", "smoke", *SMOKE, *own],
        cwd=folder,
        env=os.environ | secrets | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert not [s for s in secrets.values() if s in done.stdout + done.stderr]
    return folder / "run"


def test_no_file_of_a_run_holds_a_secret_of_its_environment(finished: Path) -> None:
    files = [file for file in finished.rglob("*") if file.is_file()]
    assert {"recipe.yaml", "environment.json", "metrics.jsonl", "summary.json"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert not [s for s in (TOKEN, WANDB_KEY, JUDGE_KEY) if s.encode() in content], file


def test_the_process_that_judges_what_a_model_wrote_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    from rltok.rewards.verify import VerifierProcess

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert without_secrets({"HF_TOKEN": TOKEN, "PATH": "/bin"}) == {"PATH": "/bin"}
    process = VerifierProcess()
    try:
        process.ask({"kind": "math", "answer": "1/2", "gold": "0.5", "is_text": False}, 60.0)
        variables = Path(f"/proc/{process.pid}/environ").read_bytes()
        assert b"PATH=" in variables and TOKEN.encode() not in variables
    finally:
        process.close()


def test_a_failed_reward_is_saved_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "plainlooking")

    def judge(completions: list[str], **_: object) -> list[float]:
        raise ConnectionError(f"401 for https://me:pw123@judge/?api_key={JUDGE_KEY}, sent plainlooking")

    with pytest.raises(RewardError, match=r"401 for https://\*\*\*@judge") as caught:
        guarded(judge, "judge", tmp_path)(prompts=["a"], completions=["b"])
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert record["completion"] == "b" and "ConnectionError" in record["traceback"]
    for secret in (JUDGE_KEY, "pw123", "plainlooking"):
        assert secret not in file.read_text() + str(caught.value)


WRITTEN = [
    "__import__('os').mkdir('{marker}')",
    "__import__('os').system('mkdir {marker}')",
    "__import__('subprocess').run(['mkdir', '{marker}'])",
    "open('{marker}', 'w')",
    "__import__('ctypes').CDLL(None).mkdir(b'{marker}', 511)",
    "__import__('socket').create_connection(('127.0.0.1', 9))",
]


@pytest.mark.parametrize("task", ["countdown", "puzzle24"])
def test_what_a_model_wrote_is_evaluated_without_side_effects(marker: Path, task: str) -> None:
    """Verifiers of reasoning-gym evaluate answers as Python."""
    import reasoning_gym

    from rltok.rewards import encode_entry
    from rltok.rewards.verify import ReasoningJob, judge

    entry = reasoning_gym.create_dataset(task, seed=0, size=1)[0]
    right = entry["metadata"]["expression"] if task == "countdown" else entry["answer"]
    for text in [right, *(text.format(marker=marker) for text in WRITTEN), right]:
        (verdict,) = judge([ReasoningJob(str(text), task, encode_entry(entry))], 20.0)
        assert (verdict.score == 1.0) is (text == right), (text, verdict)
        assert not marker.exists(), text
