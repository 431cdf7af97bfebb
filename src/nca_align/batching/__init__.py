"""From rows to token ids, and from those to the tensors of one batch."""
