"""The docs: links lead somewhere, messages that are explained are raised, tables are what is printed and logged."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig

from conftest import build_tokenizer, labelled_rows, reward_rows
from nca_align.cli import main
from nca_align.commands.inspect.command import main as inspect

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")})
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", outside_code(path.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", outside_code(page.read_text())):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target} in {page.relative_to(ROOT)}"
        assert not anchor or anchor in anchors(path), f"{target} in {page.relative_to(ROOT)}"


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} - {"README.md"}


def test_named_files_and_keys_exist():
    """Files and keys in back-ticks that look like ours are there."""
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(
            r"`((?:configs|examples|benchmarks|scripts|tests|src)/[\w./-]+\.\w+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{name} in {page.name}"


def test_pages_that_the_code_names_exist():
    named = {name: path for path in SOURCES for name in re.findall(r"docs/[\w/-]+\.md", path.read_text())}
    assert len(named) >= 4
    assert not [f"{name} in {path.relative_to(ROOT)}" for name, path in named.items() if not (ROOT / name).exists()]


def test_the_readmes_script_trains_and_leaves_its_model(tmp_path, model_dir, monkeypatch):
    """As it stands, but for the name on the Hub."""
    script = re.search(r"^```python\n(from datasets .*?)```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    theirs = '"HuggingFaceTB/SmolLM2-135M"'
    assert script.count(theirs) == 1
    assert len([line for line in script.splitlines() if line]) <= 12
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(script.replace(theirs, repr(model_dir)), names)
    assert names["trainer"].state.global_step == 4
    assert (tmp_path / "runs/mine/model.safetensors").exists()


def test_the_readmes_losses_are_ours():
    import torch
    from torch.nn.functional import log_softmax, logsigmoid, softmax

    from nca_align.losses import infonca_loss, nca_loss

    listing = re.search(r"^```python\n(logratios = .*?)```", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    pi_logps, ref_logps, rewards = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    names = {"pi_logps": pi_logps, "ref_logps": ref_logps, "rewards": rewards, "alpha": 0.3, "beta": 0.1}
    names |= {"logsigmoid": logsigmoid, "softmax": lambda x: softmax(x, 1), "log_softmax": lambda x: log_softmax(x, 1)}
    exec(listing, names)
    for name, loss in (("nca", nca_loss), ("infonca", infonca_loss)):
        assert torch.allclose(names[name], loss(pi_logps, ref_logps, rewards, 0.3, 0.1))


def test_the_snippet_of_moving_works_as_it_stands(tmp_path, model_dir, monkeypatch):
    """On a machine without a GPU as well, without a flag for it."""
    page = (ROOT / "docs" / "guide" / "from-dpotrainer.md").read_text()
    lines = re.search(r"```diff\n(.+?)```", page, re.S)[1].splitlines()
    script = "\n".join(line[1:] for line in lines if line[:1] != "-")
    assert script.count('"your/model"') == 1
    monkeypatch.chdir(tmp_path)
    names: dict = {"dataset": Dataset.from_list(reward_rows(3))}
    exec(script.replace('"your/model"', repr(model_dir)), names)
    assert (names["trainer"].args.beta, names["trainer"].args.output_dir) == (0.1, "runs/mine")


# Troubleshooting


def normalised(message: ast.expr) -> str | None:
    """A message with … for what is filled in; None for one that is passed on from elsewhere."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        parts = ["…" if isinstance(part, ast.FormattedValue) else str(part.value) for part in message.values]
        return "".join(parts)
    if isinstance(message, ast.BinOp) and isinstance(message.op, ast.Add):
        sides = [normalised(message.left), normalised(message.right)]
        return "".join(side or "…" for side in sides)
    if isinstance(message, ast.IfExp):  # either of two
        return normalised(message.body) or normalised(message.orelse)
    return None


def raised_messages() -> dict[str, str]:
    """The message of each `raise` of the package → where it stands."""
    found = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            name = getattr(call.func, "id", getattr(call.func, "attr", "")) if isinstance(call, ast.Call) else ""
            refuses = name == "refuse_changes"  # which raises its first argument, what differs, and some advice
            if not refuses and not (isinstance(node, ast.Raise) and isinstance(call, ast.Call) and call.args):
                continue
            last = normalised(call.args[0 if refuses else -1])
            if last is None or not words(last):  # what another sentence is put into
                continue
            if name == "PackingError":
                last = f"`layout: prefix_shared` can't be used here: {last}. Use `layout: padded`."
            if name == "RowError":
                last = f"`…` {last}"
            elif name == "_wrong_type":
                last = f"`…` is … (…); it must be {last}"
            elif name == "refuse":
                last = f"`…` in … is …; it must be {last}"
            found[last] = f"{path.relative_to(ROOT)}:{node.lineno}"
    return found


def entries() -> list[str]:
    page = (ROOT / "docs" / "reference" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (``.+?``|`[^`]+`) \| .+ \|$", page, re.M)
    return [re.fullmatch(r"(`+)(.+)\1", row)[2].strip() for row in rows]


def words(text: str) -> str:
    """What is left of a message without what is filled in."""
    return re.sub(r"[…`\W]", "", text)


def matches(entry: str, message: str) -> bool:
    """The entry's words stand in the message in their order, with anything for each …, names that are filled in too."""
    place = 0
    for piece in filter(None, entry.split("…")):
        place = message.find(piece, place)
        if place < 0:
            return False
        place += len(piece)
    return True


def test_every_entry_is_a_message():
    messages, known = raised_messages(), entries()
    assert (len(messages) > 150, len(known) > 30) == (True, True)
    assert all(len(words(entry)) >= 5 for entry in known)  # one that matched anything would prove nothing
    stale = [entry for entry in known if not any(matches(entry, text) for text in messages)]
    assert not stale, f"docs/reference/troubleshooting.md has entries for what is never said: {stale}"


# What the pages show


def test_the_table_of_alpha_is_what_inspect_prints(monkeypatch, capsys):
    page = (ROOT / "docs" / "guide" / "alpha-and-beta.md").read_text()
    command, shown = re.search(r"```bash\nnca-align inspect (.+?)\n```\n\n```text\n(.+?)```", page, re.S).groups()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    assert inspect(command.split()) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert len(lines) > 8
    assert all(line in printed for line in lines)


def test_the_table_of_targets_is_softmax():
    import torch

    from nca_align.reward_tensors import targets

    page = (ROOT / "docs" / "guide" / "alpha-and-beta.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 5
    for alpha, *shown in rows:
        expected = targets(torch.tensor([[9.0, 7.5, 4.0, 2.0]]), float(alpha))[0].tolist()
        assert [float(value) for value in shown] == pytest.approx(expected, abs=0.0051)


def test_the_reference_lists_each_metric_of_the_log_with_its_lines(tmp_path):
    """A run that logs all there is: labels, several rewards, pairs, experts, and answers."""
    from nca_align import GenerationCallback
    from test_generation import evaluator
    from test_routing import build
    from test_trainer import trainer

    tokenizer = build_tokenizer()
    rows = labelled_rows(6, [2, 3, 4])
    for row in rows:
        row |= {"score_a": row["rewards"], "score_b": [float(len(c[0]["content"])) for c in row["completions"]]}
    nca = trainer(
        tmp_path, build("Mixtral", len(tokenizer)), rows, rows, tokenizer, loss_type=["outcome", "nca"], max_steps=2,
        eval_strategy="steps", eval_steps=2, peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )  # fmt: skip
    nca.add_callback(GenerationCallback(nca, {"": evaluator(tokenizer)}))
    nca.train()
    logged: dict[str, set[str]] = {}
    for line in nca.state.log_history:
        evaluation = any(key.startswith("eval_") for key in line)
        kind = "evaluation" if evaluation else "end" if "train_runtime" in line else "training"
        for key in line:
            name = re.sub(r"(generation/)\w+_error$", r"\1NAME_error", key.removeprefix("eval_"))
            name = re.sub(r"(?<=/rank_)\d$", "k", re.sub(r"(?<=_bin_)\d$", "i", name))
            name = re.sub(r"(?<=/corr_)b$", "OTHER", re.sub(r"(?<=^objectives/)[ab](?=/)", "NAME", name))
            logged.setdefault(name, set()).add(kind)
    page = (ROOT / "docs" / "reference" / "metrics.md").read_text()
    table = re.findall(r"^\| (`.+?`) \| .+ \| ([a-z, ]+) \|$", page, re.M)
    listed = {name: set(lines.split(", ")) for names, lines in table for name in re.findall(r"`(.+?)`", names)}
    assert listed == logged


FORMATS = (ROOT / "docs" / "guide" / "data.md").read_text()
BEGIN = FORMATS[FORMATS.index("## Where to begin") : FORMATS.index("## What is recognised")]
# what is in bold, the first code behind it, and the row
KINDS = {name: row for name, *row in re.findall(r"\*\*(.+?)\*\*[^`]*`([^`]+)`.*?```json\n(.*?)```", BEGIN, re.S)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_data_trains_by_its_row_and_line_of_config(kind, model_dir, tmp_path, monkeypatch, capsys):
    (config,) = re.findall(r"```yaml\n(.*?)```", BEGIN, re.S)
    commands = re.findall(r"^nca-align ([^#\n]+)", BEGIN, re.M)
    assert (len(KINDS), len(commands)) == (5, 3)
    more, row = KINDS[kind]
    (tmp_path / "run.yaml").write_text(config.replace("smollm2-135m-instruct", model_dir) + more + "\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    monkeypatch.chdir(tmp_path)
    for command in [*commands, f"{commands[0]} --example 0"]:
        assert main(command.split()) == 0, capsys.readouterr()
    assert ("⟦…⟧ is context" in capsys.readouterr().out) is kind.startswith("Trajectories")
    assert (tmp_path / "runs" / "mine" / "adapter_model.safetensors").exists()


# examples/trl_script.py

WITHOUT = [  # the script as it was, by what its comments say
    ("from nca_align import NCATrainer  # was: from trl import DPOTrainer", "from trl import DPOTrainer"),
    ("NCATrainer(  # was: DPOTrainer(", "DPOTrainer("),
]


@pytest.mark.parametrize("kind", ["as it was", "pairs", "pairs, with sft", "four rewarded completions"])
def test_an_existing_trl_script(kind, model_dir, tmp_path, monkeypatch, caplog):
    text = (ROOT / "examples" / "trl_script.py").read_text()
    if kind == "as it was":
        for now, before in WITHOUT:
            assert text.count(now) == 1
            text = text.replace(now, before)
        assert "NCATrainer(" not in text
    script = tmp_path / "script.py"
    script.write_text(text)
    rows = reward_rows(8)
    if kind != "four rewarded completions":
        rows = [{"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]} for r in rows]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "run"
    options = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "data", "output_dir": run, "max_steps": 2,
        "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": "true", "bf16": "false", "report_to": "none",
        "gradient_checkpointing": "false", "learning_rate": "1e-3", "save_steps": 2,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    losses = ["--loss_type", "sigmoid", "sft"] if kind == "pairs, with sft" else []
    monkeypatch.setattr(sys, "argv", ["script.py", *words, *losses])
    runpy.run_path(str(script), run_name="__main__")
    assert (run / "model.safetensors").exists()
    log = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    # DPO begins at ln 2, NCA at 2 ln 2 whatever K is
    start = 0.6931 if kind == "as it was" else 1.3863
    if losses:
        assert sum("the loss is nca+sft instead of sigmoid+sft" in line for line in caplog.messages) == 1
        tokens = -2 * log[0]["logps/chosen"] / (log[0]["loss"] - start)  # of two rows: sft is the mean over these
        assert (tokens > 10, tokens) == (True, pytest.approx(round(tokens), abs=0.01))
    else:
        assert log[0]["loss"] == pytest.approx(start, abs=1e-3)
    assert ("rewards/rank_4" in log[0]) == (kind == "four rewarded completions")
