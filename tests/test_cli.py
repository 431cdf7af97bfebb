"""The command line: dispatch, options from YAML and flags, and one sentence for a user's mistake."""

import ast
import importlib
import logging
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest

import nca_align
from nca_align import NCAConfig, cli
from nca_align.errors import (
    HubError,
    NotFoundError,
    UnsupportedError,
    UserError,
    UserTypeError,
    cli_main,
    nearest,
    one_line,
)  # fmt: skip
from nca_align.options import given_options, parse


@dataclass
class Options:
    output: str
    beta: float = 0.01
    steps: int = 3
    max_length: int | None = 512
    packing: bool = False
    save: Literal["no", "epoch"] = "epoch"
    names: list[str] = field(default_factory=lambda: ["a"])
    scorer: list[str] = field(default_factory=list, metadata={"action": "extend"})

    def __post_init__(self):
        if self.beta <= 0:
            raise ValueError(f"`beta` is {self.beta}; it must be above 0")


def parsed(tmp_path, text: str, *flags: str) -> Options:
    (tmp_path / "o.yaml").write_text(text)
    return parse([Options], ["--config", str(tmp_path / "o.yaml"), *flags], "prog")[0]


def test_ctrl_c_while_a_command_is_imported(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err.strip() == "nca-align: interrupted; nothing was begun"


class TestParse:
    def test_yaml_reads_numbers_that_yaml_takes_for_text(self, tmp_path):
        options = parsed(tmp_path, "output: x\nbeta: 5e-6\nsteps: '7'")
        assert options.beta == 5e-6
        assert options.steps == 7

    def test_a_flag_overrides_the_file(self, tmp_path):
        text = "output: x\nbeta: 0.5\nscorer: [a, b]"
        assert parsed(tmp_path, text, "--beta", "1e-3").beta == 1e-3
        assert parsed(tmp_path, text).scorer == ["a", "b"]
        assert parsed(tmp_path, text, "--scorer", "c", "--scorer", "d").scorer == ["c", "d"]
        assert parsed(tmp_path, text, "--scorer=c").scorer == ["c"]

    def test_one_value_is_a_list_of_one(self, tmp_path):
        assert parsed(tmp_path, "output: x\nnames: q_proj").names == ["q_proj"]

    def test_yaml_words_for_booleans_are_read_by_what_the_option_takes(self, tmp_path):
        options = parsed(tmp_path, "output: x\nsave: no\npacking: yes")
        assert options.save == "no"
        assert options.packing is True
        assert parsed(tmp_path, "output: x\npacking: 'true'").packing is True

    def test_null_where_the_type_has_it(self, tmp_path):
        assert parsed(tmp_path, "output: x\nmax_length: null").max_length is None

    def test_environment_variables(self, tmp_path, monkeypatch):
        monkeypatch.setenv("NCA_TEST", "old")
        parsed(tmp_path, "output: x\nenv: {NCA_TEST: 5}")
        import os

        assert os.environ["NCA_TEST"] == "5"

    def test_config_with_an_equals_sign(self, tmp_path):
        (tmp_path / "o.yaml").write_text("output: x")
        assert parse([Options], [f"--config={tmp_path}/o.yaml"], "prog")[0].output == "x"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("output: x\nbta: 1", "unknown key `bta` in .*o.yaml \\(did you mean `beta`\\?\\)"),
            ("output: x\nbeta: abc", "`beta` in .* is 'abc'; it must be a number"),
            ("output: x\nbeta: true", "`beta` in .* is True; it must be a number"),
            ("output: x\nbeta: [1]", "`beta` in .* is \\[1\\]; it must be a number"),
            ("output: x\nbeta:", "`beta` in .* has no value; give it one, or leave it out for 0.01"),
            ("output: x\nsteps: 1.5", "`steps` in .* is 1.5; it must be a whole number"),
            ("output: x\npacking: maybe", "`packing` in .* is 'maybe'; it must be true or false"),
            ("output: x\npacking: 3", "`packing` in .* is 3; it must be true or false"),
            ("output: x\nsave: epochs", "`save` in .* 'epochs'; .* no, epoch \\(did you mean `epoch`\\?\\)"),
            ("output: x\nbeta: -1", "`beta` is -1; it must be above 0"),
            ("output: x\nenv: 3", "`env` in .* is 3; it must map names"),
            ("- a", "is a list; it must be a YAML mapping"),
            ("", "is empty; it must be a YAML mapping"),
            ("output: [", "is not valid YAML"),
            ("output: x\nbeta: 1\nbeta: 2", "`beta` is given twice in .*o.yaml \\(lines 2 and 3\\); keep one"),
            ("output: x\nenv: {A: 1, B: 2, A: 3}", "`A` is given twice in .*o.yaml \\(lines 2 and 2\\)"),
            ("output: x\nenv:\n  A:\n  - {b: 1, b: 1}", "`b` is given twice in .*o.yaml \\(lines 4 and 4\\)"),
            ("beta: 1", "the following arguments are required: --output"),
        ],
    )
    def test_mistakes_in_the_file(self, tmp_path, text, message):
        with pytest.raises(UserError, match=message):
            parsed(tmp_path, text)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--betta", "1"], "unknown option `--betta` \\(did you mean `--beta`\\?\\)"),
            (["--betta=1"], "unknown option `--betta` \\(did you mean `--beta`\\?\\)"),
            (["--zzzzzz"], "unknown option `--zzzzzz`$"),
            (["--beta", "abc"], "argument --beta: invalid float value: 'abc'"),
            (["--bet", "1"], "unknown option `--bet` \\(did you mean `--beta`"),
            (["stray"], "`stray` belongs to no option"),
            (["--config"], "`--config` needs the path"),
            (["--config", "nowhere.yaml"], "`--config` nowhere.yaml can't be read: No such file"),
        ],
    )
    def test_mistakes_in_the_flags(self, flags, message):
        with pytest.raises(UserError, match=message):
            parse([Options], ["--output", "x", *flags], "prog")

    def test_a_file_that_is_no_text(self, tmp_path):
        (tmp_path / "o.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="can't be read: it is not text"):
            parse([Options], ["--config", str(tmp_path / "o.yaml")], "prog")

    def test_what_is_given_by_flags_and_file(self, tmp_path):
        (tmp_path / "o.yaml").write_text("beta: 1\npacking: false\nsave: null")
        argv = ["--config", str(tmp_path / "o.yaml"), "--steps=3", "--output", "x"]
        assert given_options(argv) == {"beta", "steps", "output"}
        assert argv[0] == "--config"  # as it was, for the parser
        assert given_options([]) == set()

    def test_what_is_given_as_false(self, tmp_path):
        (tmp_path / "o.yaml").write_text("packing: false\nsave: null")
        argv = ["--config", str(tmp_path / "o.yaml"), "--max-length", "3"]
        assert given_options(argv, false=True) == {"packing", "max_length"}

    def test_a_merged_mapping_may_be_overridden(self, tmp_path):
        """`<<` is YAML's own way to say a key again; the mapping with it may be merged once more."""
        text = "output: x\nenv:\n  NCA_A: &a {<<: &b {x: 1, y: 2}, x: 3}\n  NCA_B: {<<: *a, y: 4}"
        assert parsed(tmp_path, text).output == "x"

    def test_what_must_be_given_is_asked_for_before_values_are_looked_at(self):
        required = {"max_length": "a number"}
        with pytest.raises(UserError, match="`max_length` is missing; give a number, in the YAML"):
            parse([Options], ["--output", "x", "--beta", "-1", "--max_length", "0"], "prog", required=required)
        with pytest.raises(UserError, match="`beta` is -1"):
            parse([Options], ["--output", "x", "--beta", "-1"], "prog", required=required)

    def test_nearest(self):
        assert nearest("learning_rte", ["beta", "learning_rate"]) == " (did you mean `learning_rate`?)"
        assert nearest("--model", ["--help", "--model_name_or_path"]) == " (did you mean `--model_name_or_path`?)"
        assert nearest("zzz", ["beta"]) == ""


class TestErrors:
    def test_what_the_package_raises_is_a_users_mistake(self):
        """A plain ValueError of ours would be told as a bug, with a traceback."""
        plain = {"ValueError", "TypeError", "NotImplementedError", "OSError", "FileNotFoundError", "ConnectionError"}
        package = Path(nca_align.__file__).parent
        raised = [
            (path.name, node.lineno, node.exc.func.id)
            for path in package.rglob("*.py")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
        ]
        assert len(raised) > 100
        assert [own for own in raised if own[2] in plain] == []

    @pytest.mark.parametrize(
        ("kind", "also"),
        [
            (UserError, ValueError),
            (UserTypeError, TypeError),
            (UnsupportedError, NotImplementedError),
            (NotFoundError, FileNotFoundError),
            (HubError, ConnectionError),
        ],
    )
    def test_a_mistake_is_caught_by_its_python_class_and_told_in_one_sentence(self, kind, also, capsys):
        with pytest.raises(also, match=r"^x$"):
            raise kind("x")

        @cli_main("prog")
        def main(argv=None):
            raise kind("x")

        assert main([]) == 2
        assert capsys.readouterr().err == "prog: error: x\n"

    def test_one_sentence_and_exit_code_2(self, capsys):
        @cli_main("prog")
        def main(argv=None):
            raise UserError("first\n  second")

        assert main([]) == 2
        assert capsys.readouterr().err == "prog: error: first second\n"

    def test_a_file_that_an_option_names_and_that_is_not_there(self):
        with pytest.raises(UserError, match=r"No such file or directory: 'nofile.json'"):
            parse(
                [NCAConfig], ["--output_dir", "x", "--accelerator_config", "nofile.json", "--use_cpu", "true"], "prog"
            )

    @pytest.mark.parametrize(
        ("name", "words"), [("inspect", "nothing of it is kept"), ("report", "the same command writes all of it again")]
    )
    def test_what_keeps_nothing_does_not_promise_to_go_on(self, name, words, monkeypatch, capsys):
        module = import_module(f"nca_align.commands.{name}.command")

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "parse", interrupted)
        assert module.main([]) == 130
        assert capsys.readouterr().err == f"nca-align {name}: interrupted; {words}\n"

    def test_a_bug_keeps_its_traceback(self):
        @cli_main("prog")
        def main(argv=None):
            return int("x")

        with pytest.raises(ValueError, match="invalid literal"):
            main([])

    def test_interrupted(self, capsys):
        @cli_main("prog")
        def main(argv=None):
            raise KeyboardInterrupt

        assert main([]) == 130
        assert "the same command goes on from here" in capsys.readouterr().err

    def test_one_line_of_an_error_without_text(self):
        assert one_line(TimeoutError()) == "TimeoutError"


class TestDispatch:
    def test_no_arguments_list_the_commands(self, capsys):
        assert cli.main([]) == 0
        out = capsys.readouterr().out
        for name, (_, what) in cli.COMMANDS.items():
            assert name in out
            assert what in out

    def test_every_command_has_its_module(self):
        for module, _ in cli.COMMANDS.values():
            assert find_spec(f"nca_align.commands.{module}") is not None

    def test_unknown_command(self, capsys):
        assert cli.main(["smple"]) == 2
        assert "unknown command `smple` (did you mean `sample`?)" in capsys.readouterr().err

    def test_version(self, capsys):
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("nca-align 0.")

    def test_a_commands_own_mistakes_come_through(self, capsys):
        assert cli.main(["sample", "--num_completion", "3", "--dataset_name", "x", "--output", "y"]) == 2
        assert "did you mean `--num_completions`?" in capsys.readouterr().err

    @pytest.mark.slow
    def test_the_list_of_commands_costs_no_torch(self):
        code = "import sys; from nca_align.cli import main; main([]); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_library_that_warns_at_its_import_is_not_heard_before_the_command(monkeypatch, caplog):
    """bitsandbytes, on some CPUs, of a kernel that it does without; whatever else it says is heard."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.setattr(logger, "filters", [])
    warning = "Failed to load CPU gemm_4bit_forward from kernels-community: %s"
    logger.warning(warning, "no module")
    assert "gemm_4bit_forward" in caplog.text
    caplog.clear()

    importlib.reload(nca_align)
    logger.warning(warning, "no module")
    logger.warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]
    assert len(logger.filters) == 1


@pytest.mark.parametrize("flag", ["--use_cpu", "--bf16", "--tf32"])
def test_a_flag_alone_means_true_whatever_its_default(flag):
    assert getattr(parse((Words,), [flag], "x")[0], flag.removeprefix("--")) is True


@dataclass
class Words:
    use_cpu: bool | None = None
    bf16: bool = False
    tf32: bool | None = field(default=None, metadata={"help": "as transformers has it"})
