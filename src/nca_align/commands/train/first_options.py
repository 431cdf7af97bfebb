"""What people set first: `nca-align train --help` lists these, `--help all` the other two hundred too."""

# an option → its line; the default is added
FIRST_OPTIONS = {
    "model_name_or_path": "The model to align: a Hub id, or a folder with a model or an adapter. Needed.",
    "dataset_name": "Prompts with rewarded completions: a Hub id, a file or a folder. Needed.",
    "output_dir": "The run's folder: checkpoints, the model, its log.",
    "loss_type": "`nca`, `infonca`, or another loss on K completions; a list of them with `loss_weights`.",
    "alpha": "Temperature of the targets softmax(rewards / alpha), in units of the rewards.",
    "beta": "Implicit reward per nat of log(pi / pi_ref); small lets the model go further.",
    "learning_rate": "Peak learning rate.",
    "num_train_epochs": "Times that the data is gone through.",
    "max_steps": "Steps at which the run ends, whatever the epochs; -1 for no limit.",
    "per_device_train_batch_size": "Prompts a forward and a device, each with all of its completions.",
    "gradient_accumulation_steps": "Such forwards a step.",
    "max_length": "Tokens of prompt and completion; completions are cut there.",
    "use_peft": "Train a LoRA adapter instead of the whole model; `--help lora` lists its options.",
    "lora_r": "The adapter's rank.",
    "load_in_4bit": "QLoRA: the base in 4 bits under the adapter.",
    "dtype": "Of the model's weights.",
    "eval_strategy": "When the held-out prompts are evaluated.",
    "save_steps": "Steps from one checkpoint to the next.",
    "resume_from_checkpoint": "`true` goes on from the last checkpoint in `output_dir`.",
    "seed": "Of the order of the data, dropout and new weights.",
}
