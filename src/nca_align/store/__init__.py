"""What is kept on disk: whole files, shards, locks, checkpoints, fingerprints and provenance; and the Hub."""
