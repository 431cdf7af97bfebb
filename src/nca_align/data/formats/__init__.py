"""The data formats that are read. To add one, write its converter in a module here, and name it in `FORMATS`.

A converter is a function from a row to a `Row`. Its decorator `@data_format` makes a `Format` of it, and states its
name, the columns that tell it, and those that hold prompts and answers; `data.schema` explains each field.
"""

from . import completions, flat_rows, pairs

FORMATS = {  # the first that matches is taken
    fmt.name: fmt
    for fmt in (
        completions.rewarded_completions,
        completions.ultrafeedback,
        completions.ranked_answers,
        pairs.trajectory_pair,
        completions.generated_responses,
        completions.labelled_rollouts,
        completions.process_bench,
        pairs.preference_pair,
        flat_rows.flat_rows,
    )
}
