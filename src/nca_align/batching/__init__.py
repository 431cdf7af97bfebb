"""From rows to token ids, and from those to the tensors of one batch.

- `rendering`: a row's messages as text, and the ids of texts.
- `tokenization`: ids of prompts and completions, cut to length.
- `collator`: a batch, padded or as one packed prefix tree.
- `attention`: each token of a packed row sees its own conversation alone.
"""
