"""`--help`: what is set first, all of it, or what a word is about; nothing is left out."""

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import pytest

from nca_align import cli
from nca_align.commands.train.command import main as train
from nca_align.commands.train.options import FIRST_OPTIONS, TRAIN_OPTIONS
from nca_align.help_page import help_topic
from nca_align.options import option, parse


@dataclass
class Base:
    seed: int = option("of the draws; 50%% more", 42)
    packing: bool = option("into one row", True)


@dataclass(kw_only=True)
class Options(Base):
    output: str = option("the file to write")
    save: Literal["no", "epoch"] = option("when", "epoch")
    optim: Literal["adamw_torch_fused_long", "adamw_torch_plain_long"] = option("Which.", "adamw_torch_plain_long")
    names: list[str] = option("some names", ["a", "b"])
    path: str | None = option("a place", None)


def page(capsys, *argv: str, **about) -> str:
    with pytest.raises(SystemExit) as stop:
        parse([Options], argv, "nca-align prog", "What it does.", **about)
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines() if line.startswith("  --")]


@pytest.mark.parametrize(
    ("argv", "topic"),
    [
        (["--seed", "1"], None),
        (["--help"], ""),
        (["-h", "--seed"], ""),
        (["--seed", "1", "--help", "all"], "all"),
        (["--help=lora"], "lora"),
        ([], None),
    ],
)
def test_what_is_asked_for(argv, topic):
    assert help_topic(argv) == topic


def test_a_command_with_few_options_lists_them_all_the_required_and_its_own_first(capsys):
    for text in (page(capsys, "--help"), page(capsys, "-h", "all"), page(capsys, "--seed", "no number", "--help")):
        assert text.startswith("usage: nca-align prog --output TEXT [--config FILE.yaml]")
        assert flags(text) == ["--output", "--save", "--optim", "--names", "--path", "--seed", "--packing", "--config"]
        assert text.index("test_help_page's Options:") < text.index("test_help_page's Base:")
    assert "of the draws; 50% more (default 42)" in text
    assert "--packing true|false    into one row (default true)" in text
    assert "--save {no,epoch}       when (default epoch)" in text
    assert "One of adamw_torch_fused_long, adamw_torch_plain_long." in " ".join(text.split())
    assert "some names (default a, b)" in text
    assert "a place\n" in text  # no default


def test_many_options_begin_with_what_is_set_first(capsys):
    first = {"seed": "Its line.", "output": ""}
    text = page(capsys, "--help", first=first)
    assert flags(text) == ["--seed", "--output", "--config"]
    assert "Its line. (default 42)" in text
    assert "the file to write (required)" in text
    assert "`nca-align prog --help all` lists all 7 options" in text
    assert len(flags(page(capsys, "--help", "all", first=first))) == 8


def test_a_word(capsys):
    assert flags(page(capsys, "--help", "save")) == ["--save"]
    assert flags(page(capsys, "--help", "PLACE")) == ["--path"]
    assert "lists all 7 options" in page(capsys, "--help", "save")
    with pytest.raises(ValueError, match="`--help zzz` finds no option of nca-align prog; `nca-align prog --help all`"):
        parse([Options], ["--help", "zzz"], "nca-align prog")


def test_training_begins_with_twenty_and_has_them_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        train(["--help"])
    short = capsys.readouterr().out
    assert short.startswith("usage: nca-align train ")
    assert flags(short) == [*(f"--{name}" for name in FIRST_OPTIONS), "--config"]
    assert len(FIRST_OPTIONS) == 20
    assert "by default at the end, where rows are held out" in " ".join(short.split())
    assert len(short.splitlines()) < 60
    with pytest.raises(SystemExit):
        train(["--help", "all"])
    everything = {name for cls in TRAIN_OPTIONS for name, f in cls.__dataclass_fields__.items() if f.init}
    assert sorted(flags(capsys.readouterr().out)) == sorted([*(f"--{name}" for name in everything), "--config"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_commands_usage_says_its_name(name, capsys):
    main = import_module(f"nca_align.commands.{cli.COMMANDS[name][0]}").main
    with suppress(SystemExit):
        main(["--help"])
    assert f"usage: nca-align {name}" in capsys.readouterr().out
