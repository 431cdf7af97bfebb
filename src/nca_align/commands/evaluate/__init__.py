"""`nca-align evaluate`: policies by their answers, implicit rewards, judges and lm-eval."""
