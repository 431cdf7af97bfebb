"""Models: `loading`, their `adapters`, `logprobs` of completions, `sampling` of answers, and the demo model."""
