"""What is kept on disk: whole files, shards, locks, checkpoints, provenance; and the Hub."""
