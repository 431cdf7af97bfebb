"""`nca-align sample`: prompts to K completions each."""
