"""What the trainer hands over to.

- `arguments`: what it is given is checked and completed.
- `startup_checks`: the log-probabilities are the model's own (`own_logits`, within `rounding`), and the policy is its
  reference.
- `layout`: packed or padded is chosen; `dropout`: what TRL leaves on is turned off.
- `row_weights`: prompts that are repeated to fill a batch don't count; `streams`: batches of rows nobody can count.
- `reference`, `reference_cache`: the reference's log-probabilities, live or from the disk.
- `objective`: a batch's loss; `gradients`: a step in chunks; `metrics`: what is logged.
- `guards`: a run that diverges is stopped; `resume`, `run_identity`: a stopped run goes on.
- `model_card`: what a reader of its model is told.
"""
