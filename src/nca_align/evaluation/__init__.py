"""A policy judged by its answers and by its ranking of completions, also during training."""
