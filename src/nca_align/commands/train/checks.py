"""What `train` looks at before it reads a model or data: options without effect, what can't work, where to go on."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trl import ModelConfig, ScriptArguments

from ...config import NCAConfig, changed_options
from ...data import RewardData
from ...data.splits import find_split
from ...device import launched_sharded
from ...errors import UnsupportedError, UserError, notify, notify_once
from ...models.loading import adapter_config, is_adapter
from ...store.checkpoints import how_to_go_on, last_common_checkpoint
from ...training.best_metric import FAMILIES
from ...unread import CONFIG_RULES, LORA, NO, OF_HELD_OUT, TRAIN_RULES, sentence, unread
from .options import RunOptions

logger = logging.getLogger("nca_align")


def name_unread(given: set[str], *options: Any) -> None:
    """A line on the given options that this run doesn't read; those that NCAConfig has named itself are left out.

    Raises:
        UserError: they ask for another adapter than is trained.
    """
    values = SimpleNamespace(**{name: value for own in options for name, value in vars(own).items()})
    args = next(own for own in options if isinstance(own, NCAConfig))
    values.evaluates = evaluates(args)
    if is_adapter(str(values.model_name_or_path)):
        _refuse_another_adapter(values, given)
        given = given - LORA.keys()
    asking = {name for name in given if getattr(values, name, False) is not False}
    found = unread(values, asking - changed_options(args), CONFIG_RULES) | unread(values, asking, TRAIN_RULES)
    asked = next((name for name in found if name in LORA), None)
    if asked is not None and "use_peft" not in given:
        raise UserError(
            f"`{asked}` is {getattr(values, asked)!r}, which needs `use_peft: true`. Without it all weights of the "
            "model would be trained: `use_peft: false` asks for that."
        )
    notice = sentence(found)
    if notice is not None:
        notify_once(notice)


def _refuse_another_adapter(values: Any, given: set[str]) -> None:
    """The given options of a new adapter may only say what the adapter that is trained on is already."""
    folder = values.model_name_or_path
    if "use_peft" in given and not values.use_peft:
        raise UserError(
            f"`use_peft` is False, but `model_name_or_path` {folder} is an adapter, and only the adapter is trained. "
            "Leave it out, or merge the adapter into its base first (`nca-align export`)."
        )
    own = adapter_config(folder)
    for name in (name for name in LORA if name in given):
        asked, has = (_comparable(value) for value in (getattr(values, name), getattr(own, LORA[name], None)))
        if asked == has or asked is None:
            continue
        has = sorted(has) if isinstance(has, frozenset) else has
        if asked == "all-linear":  # PEFT keeps the modules that it finds then, and not the word
            notify_once(f"`{name}` is all-linear, but {folder} is an adapter already, and keeps its own: {has}.")
            continue
        raise UserError(
            f"`{name}` is {getattr(values, name)}, but `model_name_or_path` {folder} is an adapter already. Its own is "
            f"{has}, and it is trained as it is. Leave it out, or merge the adapter into its base first (`nca-align "
            "export`)."
        )


def _comparable(value: Any) -> Any:
    """The same for one name, a list of one, and a set; patterns stay as they are."""
    if isinstance(value, str) and value.isidentifier():
        value = [value]
    return frozenset(value) or None if isinstance(value, (list, set, tuple)) else value


def check_options(script: ScriptArguments, run: RunOptions, args: NCAConfig, model_args: ModelConfig) -> None:
    """What can't work, known before anything is read."""
    if Path(str(args.output_dir)).is_file():
        raise UserError(f"`output_dir` {args.output_dir} is a file; give a folder")
    adapter = model_args.use_peft or is_adapter(str(model_args.model_name_or_path))
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not adapter:
        raise UserError("`load_in_4bit` and `load_in_8bit` leave no weight that can be trained; add `use_peft: true`")
    if run.eval_prompts is not None and run.eval_prompts < 1:
        raise UserError(f"`eval_prompts` is {run.eval_prompts}, but must be at least 1; leave it out for all")
    if run.eval_scorer and launched_sharded(args):
        raise UnsupportedError(
            "`eval_scorer` is set, but FSDP and DeepSpeed shard the model that would answer. Leave it out, and "
            "evaluate the saved model (`nca-align evaluate --scorer`)."
        )
    if model_args.use_peft and model_args.lora_r < 1:
        raise UserError(f"`lora_r` is {model_args.lora_r}, but must be at least 1")
    if script.dataset_streaming and args.max_steps < 1:
        raise UserError("`dataset_streaming` is true, but a stream has no known end; set `max_steps`")
    if args.load_best_model_at_end and args.eval_strategy not in ("steps", "epoch"):
        raise UserError(
            "`load_best_model_at_end` is True, which needs `eval_strategy` steps or epoch. Otherwise nothing is "
            "evaluated, and the last weights would be kept."
        )
    if args.load_best_model_at_end and not _metric_is_known(args.metric_for_best_model or "loss", run):
        raise UserError(
            f"`metric_for_best_model` is {args.metric_for_best_model}, which no evaluation gives; use loss, or a "
            "metric of the log such as rewards/accuracies"
        )


def evaluates(args: NCAConfig) -> bool:
    """Whether a run evaluates by itself; where nothing is said, it does at its end if prompts are held out."""
    return args.eval_strategy != "no" or args.eval_on_start or args.is_unsaid("eval_strategy")


def evaluates_held_out(args: NCAConfig, data: RewardData, split: str) -> bool:
    """Whether held-out prompts are evaluated: where nothing was said of it, if there are any."""
    if not args.is_unsaid("eval_strategy") or args.eval_on_start:
        return evaluates(args)
    return _is_held_out(data, split)


def how_to_evaluate(data: RewardData, split: str) -> str:
    """What would have held-out prompts evaluated, in words."""
    if _is_held_out(data, split):
        return "`eval_strategy: epoch`"
    return "rows that are held out (`validation_fraction`, or a test split in the data)"


def name_unevaluated(given: set[str], *options: Any) -> None:
    """A line on the given options of evaluations, where nothing was said of these and no rows are held out."""
    values = {name: value for own in options for name, value in vars(own).items()}
    names = [name for name in OF_HELD_OUT if name in given and values[name]]
    if names:
        notify(f"Without effect in this run: {', '.join(f'`{name}`' for name in names)} (no rows are held out).")


def _is_held_out(data: RewardData, split: str) -> bool:
    try:
        find_split(data.dataset, split)
    except UserError:
        return False
    return True


def _metric_is_known(name: str, run: RunOptions) -> bool:
    known = FAMILIES | {"loss"} | ({"generation"} if run.eval_scorer else set())
    return name.removeprefix("eval_").split("/")[0] in known


def checkpoint_to_go_on_from(args: NCAConfig) -> str | bool | None:
    """What to go on from, for `NCATrainer.train`; an error where the output folder holds another run's checkpoints."""
    wanted = str(args.resume_from_checkpoint).lower()
    last = last_common_checkpoint(str(args.output_dir))
    if wanted in NO:
        if last is not None:
            raise UserError(
                f"`output_dir` {args.output_dir} holds checkpoints of an earlier run ({last.name}); "
                f"{how_to_go_on(str(args.output_dir))}, and a run in another folder begins anew"
            )
        return None
    if wanted in ("true", "yes"):
        if last is None and args.process_index == 0:
            logger.warning(
                "`resume_from_checkpoint` is true, but %s holds no checkpoint: starting anew.", args.output_dir
            )
        return last is not None
    if not Path(str(args.resume_from_checkpoint)).is_dir():
        raise UserError(
            f"`resume_from_checkpoint` is {args.resume_from_checkpoint}, which is not a folder; give a checkpoint, or "
            "`true`"
        )
    return args.resume_from_checkpoint
