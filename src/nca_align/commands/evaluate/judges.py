"""`nca-align evaluate --judge`: a judge's questions answered, in the file that the judge's own tool reads."""

import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, Features

from ...data.prompts import load_raw
from ...errors import InvalidRowError, UserError
from ...models.sampling import seed_for
from ...options import option, require_at_least_1
from ...processes import Processes
from ...store.files import check_writable, write_json
from ...store.hub import download_file
from ...store.row_files import read_rows
from ...store.shards import Progress, Shard, ShardFunction, run_sharded
from ..sample.answers import FailedRow
from ..sample.command import WITHOUT_REASONING, causes, open_engine, sampling_record, why_no_text
from ..sample.options import Engine, EngineOptions, SampleOptions, require_json_object
from ..sample.server import resolve_model_name
from .judge_formats import JUDGES, gpt4o_encoding

_EMPTY = ", each with an empty answer, which the judge takes as a bad one"


@dataclass(kw_only=True)
class JudgeOptions(EngineOptions):
    """Options of `nca-align evaluate --judge`."""

    judge: Literal["alpaca_eval", "mt_bench", "arena_hard"] = option("whose questions to answer")
    output: str = option(
        "the file to write: model_outputs.json for alpaca_eval, model_answer/NAME.jsonl for the others"
    )
    dataset_name: str | None = option(
        "the judge's questions: a file, or a Hub id; by default the judge's own, of the Hub", None
    )
    dataset_config: str | None = option("configuration of a data set of the Hub", None)
    split: str = option("split of a data set that has several", "train")
    name: str | None = option(
        "the model's name in alpaca_eval's file, by default of its folder; elsewhere it is the file's", None
    )
    temperature: float | None = option(
        "by default MT-bench's own for each category, 0.7 for alpaca_eval, 0 for arena_hard", None
    )
    max_new_tokens: int | None = option(
        "tokens an answer; by default 1024 for mt_bench, 2048 and 4096 for the others", None
    )
    chat_template_kwargs: str = option(
        """JSON object for the chat template, such as '{"enable_thinking": false}'""", "{}"
    )

    def __post_init__(self):
        suffix = JUDGES[self.judge].suffix
        if Path(self.output).suffix != suffix:
            raise UserError(f"`output` is {self.output!r}; for {self.judge} it must end in {suffix}")
        if self.judge != "alpaca_eval" and self.name not in (None, Path(self.output).stem):
            raise UserError(
                f"`name` is {self.name!r}, but {self.judge} takes a model's name from the file, which is "
                f"{Path(self.output).name}. Make `output` end in {self.name}{suffix}, and leave `name` out."
            )
        if self.temperature is not None and self.temperature < 0:
            raise UserError(f"`temperature` is {self.temperature}; it must be 0 (greedy) or more")
        require_at_least_1(self, "max_new_tokens")
        require_json_object("chat_template_kwargs", self.chat_template_kwargs)
        super().__post_init__()


def judge(options: JudgeOptions) -> None:
    """Answer every question, each turn after the model's own earlier answers, and write `options.output`.

    Killed and started again with the same options it goes on; answers of another configuration are not mixed in.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    spec = JUDGES[options.judge]
    processes = Processes.of_launch()
    questions = processes.in_turn(lambda: load_questions(options))
    model = resolve_model_name(options)
    path = Path(options.output)
    name = path.stem if spec.suffix == ".jsonl" else options.name or Path(options.adapter or model).name
    lines = path.with_suffix(".jsonl")
    if lines != path:
        check_writable(path)
    sampling = SampleOptions(
        dataset_name=options.dataset_name or spec.hub[0], output=str(lines), num_completions=1,
        max_new_tokens=options.max_new_tokens or spec.max_new_tokens,
        **{option.name: getattr(options, option.name) for option in fields(EngineOptions)},
    )  # fmt: skip
    step = processes.once(lambda: sampling_record(sampling, questions, model))
    step["command"] = f"evaluate --judge {options.judge}"
    asked = {"temperature": options.temperature, "chat_template_kwargs": options.chat_template_kwargs}
    step["config"] |= asked | {"name": name}

    def start() -> ShardFunction:
        if options.judge == "arena_hard" and gpt4o_encoding() is None:
            print(
                "`token_len` is left out of `metadata`: Arena-Hard counts by tiktoken's encoding of gpt-4o, which is "
                "not here; for its style control run its utils/add_markdown_info.py on the answers",
                file=sys.stderr,
            )
        return _shard_function(open_engine(sampling, model), sampling, options, name)

    counts = run_sharded(
        str(lines), questions, Features({}), start, step, shard_size=options.shard_size, unit="question",
        at_once=options.shards_at_once, processes=processes,
    )  # fmt: skip
    if not processes.first:
        return
    if lines != path:  # AlpacaEval reads an array; the lines stay, and say what made them
        write_json(path, read_rows(lines), ensure_ascii=False)
    print(
        f"{options.output}: {counts['rows']} questions answered by {name}, {counts.get('truncated', 0)} of "
        f"{counts['answers']} answers cut at {sampling.max_new_tokens} tokens"
        + (f", {counts['empty']} without text" if counts.get("empty") else "")
        + (f", {counts['thoughts']} {WITHOUT_REASONING}" if counts.get("thoughts") else "")
        + (f"; questions that failed: {counts['failed']}{causes(counts, 'failed')}{_EMPTY}" if counts["failed"] else "")
        + f"; docs/guide/evaluation.md says how {options.judge} judges it",
        file=sys.stderr,
    )


def load_questions(options: JudgeOptions) -> Dataset:
    """The judge's questions, with the columns that it needs and no others.

    Raises:
        UserError: they can't be had, lack a column, or a row is no question.
    """
    spec = JUDGES[options.judge]
    source = options.dataset_name or download_file(
        *spec.hub, f"`dataset_name` is not given, and {options.judge}'s own questions"
    )
    dataset = load_raw(source, options.dataset_config, options.split)
    for column in spec.columns:
        if column not in dataset.column_names:
            raise UserError(
                f"`dataset_name` {source} has no column `{column}`; {options.judge} needs {', '.join(spec.columns)}, "
                f"as in {spec.hub[2]} of {spec.hub[0]}"
            )
    dataset = dataset.select_columns(list(spec.columns))
    key, question = spec.columns[0], spec.columns[-1]
    first: dict[Any, int] = {}
    for i, row in enumerate(dataset):
        turns = spec.turns(row)
        if not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
            required = "a list of texts, one a turn" if question == "turns" else "text"
            raise UserError(f"row {i}: `{question}` is {row[question]!r}; it must be {required}, and not empty")
        if key != question and first.setdefault(row[key], i) != i:
            raise UserError(
                f"row {i}: `{key}` is {row[key]!r}, as in row {first[row[key]]}. Every question needs its own, since "
                f"{options.judge} keeps one answer for each."
            )
    return dataset


def _shard_function(engine: Engine, sampling: SampleOptions, options: JudgeOptions, name: str) -> ShardFunction:
    spec = JUDGES[options.judge]
    template = {"chat_template_kwargs": options.chat_template_kwargs}

    def answer_shard(shard: int, first_row: int, rows: list[dict], progress: Progress) -> Shard:
        result = Shard([])
        asked = [spec.turns(row) for row in rows]
        temperatures = [spec.temperature(row) if options.temperature is None else options.temperature for row in rows]
        said: list[list[dict]] = [[] for _ in rows]
        failed: dict[int, str | InvalidRowError] = {}  # their causes; such rows are asked for no further turn
        last = max(map(len, asked)) - 1
        for turn in range(last + 1):
            waiting = [i for i in range(len(rows)) if turn < len(asked[i]) and i not in failed]
            for i in waiting:
                said[i].append({"role": "user", "content": asked[i][turn]})
            for temperature in dict.fromkeys(temperatures[i] for i in waiting):  # a call of an engine has one
                settings = replace(sampling, temperature=temperature, seed=seed_for(options.seed, turn))
                prompts = {
                    first_row + i: {"prompt": said[i], **template} for i in waiting if temperatures[i] == temperature
                }
                found = engine(settings, shard, prompts, progress if turn == last else lambda n: progress(0))
                for number, samples in found.items():
                    i = number - first_row
                    one = samples if isinstance(samples, InvalidRowError) else samples[0]
                    if isinstance(one, InvalidRowError) or one.failed:
                        failed[i] = one if isinstance(one, InvalidRowError) else str(one.failed)
                        continue
                    said[i].append({"role": "assistant", "content": one.text.strip()})
                    result.counts["answers"] += 1
                    result.counts["truncated"] += one.truncated
                    result.counts.update(["thoughts"] * one.thought + ["empty"] * (not one.text.strip()))
            if shard == turn == 0 and 1 < len(rows) == len(failed):
                _refuse_unanswered(failed, first_row, sampling)
        for cause in failed.values():
            result.counts["failed"] += 1
            known = cause.cause if isinstance(cause, FailedRow) else cause
            result.counts[f"failed: {'no completion' if isinstance(known, InvalidRowError) else known}"] += 1
        for row, turns, messages in zip(rows, asked, said, strict=True):
            answers = [message["content"] for message in messages[1::2]]
            result.rows.append(spec.record(row, answers + [""] * (len(turns) - len(answers)), name))
        return result

    return answer_shard


def _refuse_unanswered(failed: dict[int, str | InvalidRowError], first_row: int, sampling: SampleOptions) -> None:
    """Raise where no question of the first shard was answered, so that not all of them are asked in vain."""
    for i, why in failed.items():
        if isinstance(why, InvalidRowError):
            raise why.named(first_row + i)
    counts: Counter[str | None] = Counter(map(str, failed.values()))
    raise UserError(f"the first {len(failed)} questions have no answer{why_no_text(counts, sampling)}")
