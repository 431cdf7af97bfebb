"""`nca-align env`: versions as installed, what is missing, and nothing that is private."""

import os
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nca_align import NCAConfig
from nca_align.commands import env
from nca_align.commands.env import main


def said(capsys) -> dict[str, str]:
    assert main([]) == 0
    return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())


def test_versions_are_those_that_are_installed(capsys):
    lines = said(capsys)
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes"):
        assert lines[name] == version(name)
    assert lines["nca-align"].startswith(version("nca-align"))
    assert lines["python"].startswith(".".join(map(str, __import__("sys").version_info[:3])))


def test_nothing_private(capsys, monkeypatch, tmp_path):
    """A home, a token, a user's name and addresses are in what it reads, and not in what it prints."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "someone"))
    monkeypatch.setenv("USER", "someone")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = tmp_path / "someone" / "accelerate"
    folder.mkdir(parents=True)
    (folder / "default_config.yaml").write_text(
        "distributed_type: FSDP\nmain_process_ip: 10.1.2.3\nnum_processes: 8\ncommand_file: /home/someone/x\n"
    )
    lines = said(capsys)
    text = "\n".join(lines.values())
    assert lines["launch"] == "distributed_type FSDP, num_processes 8"
    assert "CUDA_VISIBLE_DEVICES=" in lines["variables"]
    for private in ("hf_secret", "someone", "10.1.2.3", str(tmp_path), str(Path.home()), os.getcwd()):
        assert private not in text


def test_a_launch_file_that_is_broken_or_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert env.launch() == "no file of `accelerate config`"
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text("a: [")
    assert "can't be read" in env.launch()


def test_a_card(monkeypatch):
    card = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(env, "_driver", lambda: "570.1")
    assert env.accelerator().startswith("NVIDIA H200 (139 GiB, capability 9.0); NVIDIA H200")
    assert "driver 570.1" in env.accelerator()
    assert env._tf32() == "not on this card"
    assert "a call a segment" in env.attention()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert env.attention().startswith("one `torch.nn.attention.varlen` call")


@pytest.mark.parametrize("bfloat16", [True, False])
def test_bfloat16_is_said_of_what_computes_in_it(bfloat16, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16, "amx_bf16": False})
    monkeypatch.setattr("nca_align.device.has_accelerator", lambda: False)
    monkeypatch.setattr(env, "has_accelerator", lambda: False)
    expected = f"on the accelerator: none; on the CPU: {'yes' if bfloat16 else 'no'}"
    assert said(capsys)["bf16"] == expected
    assert NCAConfig("x", bf16=None).bf16 is False  # on a CPU only where it is asked for


def test_extras_are_those_of_the_package_and_say_what_is_missing(monkeypatch):
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
    ours = {"test", "browser", "docs"}  # for our tests and our site
    assert set(env.EXTRAS) == set(project["optional-dependencies"]) - ours
    asked = {
        "nca-align": ["torch>=2", "nowhere-a; extra == 'vllm'", "torch[more]; extra == 'serving'"],
        "torch": ["nowhere-b; extra == 'more'", "nowhere-c"],
    }
    monkeypatch.setattr(env, "requires", asked.get)
    found = env.extras()
    assert found["vllm"].startswith("missing nowhere-a: for `nca-align sample --engine vllm`")
    assert "missing nowhere-b: for" in found["serving"]  # the extra's extra, without what torch needs anyhow
    assert found["quickstart"] == "there"


def test_it_takes_no_option(capsys):
    assert main(["--x"]) == 2
    assert "`nca-align env` takes no option, but `--x` is given" in capsys.readouterr().err
