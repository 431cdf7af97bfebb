"""The blocks of code on the pages that users read, the commands in them, and the folder that a page presupposes."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHELLS = ("bash", "sh", "console")


@dataclass(frozen=True)
class Block:
    """What stands between two lines of ```."""

    page: str  # as seen from the project's folder
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs/README.md", *ROOT.glob("docs/**/*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(*languages: str) -> list[Block]:
    """All blocks in these languages, in the order of the pages."""
    found = []
    for page in pages():
        text = (ROOT / page).read_text()
        for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S):
            found.append(Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return [block for block in found if block.language in languages]


def words(line: str) -> list[str]:
    """A line as the shell splits it, with `|`, `>`, `&&` and `;` as words of their own, and without its comment."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def commands(block: Block) -> list[str]:
    """One a line, with continuation lines joined, prompts and comments stripped; a loop is one command."""
    found: list[str] = []
    inside = False
    for line in re.sub(r"\s*\\\n\s*", " ", block.text).splitlines():
        line = re.sub(r"\s*(?<!\S)#[^'\"]*$", "", line.strip().removeprefix("$ "))
        given = words(line)
        if inside:
            found[-1] += "\n" + line
            inside = given != ["done"]
        elif given:
            found.append(line)
            inside = given[0] == "for"
    return found


def all_commands() -> list[tuple[str, str]]:
    """Every command of every page, behind its page."""
    return [(block.page, command) for block in blocks(*SHELLS) for command in commands(block)]


def arguments(command: str) -> Iterator[list[str]]:
    """What each `nca-align` in a command gets, also where a launcher or a script of ours passes it on."""
    for line in command.splitlines():
        given = words(line)
        for i, word in enumerate(given):
            rest = given[i + 1 :]
            rest = rest[: next((k for k, own in enumerate(rest) if set(own) <= set("();<>|&")), None)]
            if word == "nca-align":
                yield rest
            elif word == "scripts/train.py":
                yield ["train", *rest]
            elif word == "scripts/slurm/train.sbatch":
                yield ["train", "--output_dir", *rest]
            elif word == "scripts/rounds.sh":
                yield ["train", "--config", "configs/quickstart.yaml", *rest]


@dataclass
class Stage:
    """A folder as the project's, in which the names of the pages lead to tiny models.

    Where a model's name on the pages is that of the Hub or of no folder in particular, a folder of this name is here,
    which is what `from_pretrained` takes first. SmolLM2 is the tiny model as well: it is looked for in `cache`.
    """

    folder: Path
    model: Path
    reward_model: Path
    run: Path  # of an adapter on `model`, as `nca-align train` leaves it

    def __post_init__(self):
        for name in ("configs", "data", "examples", "scripts", "tests/lm_eval_tasks"):
            shutil.copytree(ROOT / name, self.folder / name, copy_function=os.symlink)  # written files stay here
        self.link("cache/nca-align/SmolLM2-135M-Instruct", self.model)
        for name in ("your/model", "your/base", "HuggingFaceTB/SmolLM2-135M-Instruct"):
            self.link(name, self.model)
        for name in ("your/reward-model", "MODEL"):
            self.link(name, self.reward_model)

    def link(self, name: str, target: Path) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).symlink_to(target)

    def trained(self, *names: str) -> None:
        """Leave runs of these names."""
        for name in names:
            shutil.copytree(self.run, self.folder / name)

    def rows(self, name: str, rows: list[dict]) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def block(self, name: str, page: str, language: str, n: int = 0) -> None:
        """Make a file of the n-th block of a page."""
        (self.folder / name).write_text([b.text for b in blocks(language) if b.page == page][n])
