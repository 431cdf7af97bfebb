"""A plain TRL script for DPO with `NCATrainer` dropped in: the lines with `was:` are all that changed.

    python examples/trl_script.py --model_name_or_path your/model --dataset_name your/data --output_dir runs/mine

Without a GPU, TRL's `DPOConfig` wants `--use_cpu true` or `--bf16 false` beside it; `NCAConfig` chooses by itself.
Its data may be TRL's `prompt, chosen, rejected` as before, or K rewarded completions: `prompt, completions, rewards`.
"""

from datasets import load_dataset
from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from nca_align import NCATrainer  # was: from trl import DPOTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)
    trainer = NCATrainer(  # was: DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main()
