"""What the trainer hands over to."""
