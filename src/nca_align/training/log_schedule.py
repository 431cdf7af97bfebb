"""When a run logs and evaluates where its user said nothing: also a run of nine steps shows what moved."""

from transformers import TrainerCallback

# Points that a run has at least, if it has as many steps, and TRL's interval, which is the widest one
_POINTS, _WIDEST = 10, 10


def logging_interval(max_steps: int) -> int:
    """Steps between two log lines of a run of `max_steps` whose user said nothing."""
    return max(1, min(_WIDEST, max_steps // _POINTS))


class LogSchedule(TrainerCallback):
    """Gives a run what is unsaid of `logging_steps`, `eval_steps` and `eval_strategy`, and logs its last step.

    Args:
        trainer: whose `eval_dataset` is evaluated at the end of a run whose `eval_strategy` is unsaid, if it has one.
    """

    def __init__(self, trainer):
        self._trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if args.is_unsaid("logging_steps"):
            state.logging_steps = logging_interval(state.max_steps)
        # with `load_best_model_at_end` they divide `save_steps`, as transformers has checked
        if args.is_unsaid("eval_steps") and not args.load_best_model_at_end:
            state.eval_steps = state.logging_steps

    def on_epoch_end(self, args, state, control, **kwargs):
        """Also of an epoch that the end of training cuts; a step that is logged already is not logged again."""
        if control.should_training_stop:
            control.should_log |= args.logging_strategy != "no"
            control.should_evaluate |= args.is_unsaid("eval_strategy") and self._trainer.eval_dataset is not None
