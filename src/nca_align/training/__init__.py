"""What the trainer hands over to.

`arguments` checks and prepares what it is given, `layout` chooses packed or padded, `row_weights` leaves out repeated
prompts, `reference` and `reference_cache` give the reference's log-probabilities, `objective` a batch's loss,
`gradients` a step in chunks, `metrics` what is logged. `guards` stop a run that diverges. `resume` and `run_identity`
let it go on.
"""
