"""What is shipped: the wheel's content, and the files that set up and describe the project."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    subprocess.run([*command, "-q", "--disable-pip-version-check"], check=True, timeout=300)
    (path,) = folder.glob("rltok-*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_one_package_with_its_data(wheel: zipfile.ZipFile) -> None:
    names = [PurePosixPath(name) for name in wheel.namelist()]
    tops = {name.parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rltok"}
    shipped = {str(name) for name in names}
    for folder, pattern in (("configs", "*.yaml"), ("assets", "*"), (".", "*.py")):
        for path in (ROOT / "rltok" / folder).rglob(pattern):
            if path.is_file() and "__pycache__" not in path.parts:
                assert path.relative_to(ROOT).as_posix() in shipped
    assert "rltok/py.typed" in shipped
    assert "rltok/configs/accelerate/cpu.yaml" in shipped
    assert any(name.startswith("rltok/assets/tiny_reasoner/") and name.endswith(".safetensors") for name in shipped)
    assert sum(item.file_size for item in wheel.infolist()) < 8 * 2**20


def test_wheel_has_entry_point_and_license(wheel: zipfile.ZipFile) -> None:
    info = next(name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    assert "rltok = rltok.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata


def test_wheel_runs_outside_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The demo's recipe and model are found in the unpacked wheel, not in the checkout."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import rltok.recipe, rltok.models, pathlib; r = rltok.recipe.load_recipe('demo');"
        "p = pathlib.Path(rltok.models.resolve_path(r.model.path)); assert (p / 'config.json').is_file(), p;"
        "print(rltok.__file__); print(p)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert all(line.startswith(str(tmp_path / "site")) for line in done.stdout.split())


def test_constraints_pin_every_dependency_inside_its_range() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("+" not in line and "/" not in line and " @ " not in line for line in lines), "public versions only"
    pinned = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"], *extras["wandb"], *extras["tensorboard"]]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_make_and_ci_run_the_same_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in ("demo:", "test:", "ruff check", "ruff format --check", "mypy", "pytest"):
        assert word in makefile
    runner = ROOT / ".ci" / "run"
    assert os.access(runner, os.X_OK) and "make test" in runner.read_text()
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert "make test" in steps and "make demo" in steps


def test_only_the_trainers_import_trl() -> None:
    """Also inside of functions: methods and commands stay usable with another trainer."""
    importers = set()
    for path in (ROOT / "rltok").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "trl" for name in names):
                importers.add(path.relative_to(ROOT / "rltok").parts[0])
    assert importers == {"trainers"}
