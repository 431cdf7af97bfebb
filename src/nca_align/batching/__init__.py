"""From rows to token ids, and from those to the tensors of one batch.

`rendering` makes text of a row's messages, `tokenization` makes ids of it and cuts them, `collator` lays out a batch,
padded or as one packed prefix tree, and `attention` lets each of its tokens see its own conversation alone.
"""
