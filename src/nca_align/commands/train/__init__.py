"""`nca-align train`: options to a run folder."""
