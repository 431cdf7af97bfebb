"""What gives completions their rewards: `scorers` opens the functions and models that `--scorer` names."""
