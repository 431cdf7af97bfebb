"""A model with a classification head, and its tokenizer: what it gives for one text alone, also where it runs many.

Which position such a head reads depends on the model. Most decoders look for the last token that isn't
`config.pad_token_id`. Encoders read the first token, T5 and BART the last EOS, and a model with its own code anything.
So a batch is padded on the right with the config's own pad token, whatever the tokenizer's is. Each of these reads then
what it reads in the text alone. The first rows are scored both ways, and a model that differs is refused.
"""

import logging

import torch
from torch import nn

from ..errors import InvalidRowError, UserError, one_line
from .classifier_loading import embedding_rows, load_classifier, refuse_token_rewards

logger = logging.getLogger("nca_align")

# How far a score in a batch may be from the same alone: a share of the spread of several, and one of the largest.
# Rounding alone gives at most 1e-6, 0.002 and 0.05 of the spread, and about the dtype's eps of a large score. A head
# that reads another token gives about the spread itself.
_TOLERANCE = {torch.float32: (1e-3, 1e-4), torch.float16: (0.02, 0.004), torch.bfloat16: (0.1, 0.02)}
_COMPARED = 16  # rows that are scored both ways at the start, at most
_OWN_TEXTS = ("No.", "A short answer, and its reason.", "A longer answer: first this, then that. " * 4)

Inputs = dict[str, list[int]]  # `input_ids`, and `token_type_ids` of a model that takes them: one row without padding


class SequenceClassifier:
    """A loaded model and its tokenizer.

    Args:
        name: a folder or a Hub id, of a whole model or of an adapter as PEFT or TRL's RewardTrainer saves it.
        batch_size: texts a batch.
        dtype: `auto` for bfloat16 on a GPU and float32 on a CPU, or the name of one.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: it isn't there, or has no head that was trained.
    """

    def __init__(self, name: str, batch_size: int, dtype: str = "auto", trust_remote_code: bool = False):
        self.name, self._compared, self._warned = name, False, False
        self._outputs = 0  # in each of the model's logits, as it is run
        self.tokenizer, self._model, forward = load_classifier(name, dtype, trust_remote_code)
        self.config, self._rows = self._model.config, embedding_rows(self._model)
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in forward.values())
        self._takes_mask = "attention_mask" in forward or anything
        self._taken = {"input_ids", "token_type_ids"} & {"input_ids", *forward}
        plain, special = (self.tokenizer("a", add_special_tokens=own)["input_ids"] for own in (False, True))
        where = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
        self._added = special[:where], special[where + len(plain) :]  # in front of a text, and behind it
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        self._padding = pad if isinstance(pad, int) and 0 <= pad < (self._rows or pad + 1) else None
        if self._padding is None and batch_size > 1:
            logger.warning("scorer %s: its config names no `pad_token_id`: it takes one conversation at a time.", name)
        self._batch_size = 1 if self._padding is None else batch_size
        self.window = self._find_window()
        own = [self.inputs(text, special=True)[0] for text in _OWN_TEXTS]
        self._compare(own, made_up=True)  # before much is computed: the first rows may come after hours of training

    @property
    def dtype(self) -> torch.dtype:
        """In which the model runs."""
        return self._model.dtype

    @property
    def labels(self) -> list[str]:
        """Of its outputs, by its config; LABEL_0 and on where it says of another number than there is."""
        count = self._outputs or self.config.num_labels
        named = self.config.num_labels == count
        return [self.config.id2label[i] if named else f"LABEL_{i}" for i in range(count)]

    def _find_window(self) -> int:
        """The most tokens that the model or its tokenizer takes."""
        sizes = [
            int(self.tokenizer.model_max_length),
            getattr(self.config.get_text_config(), "max_position_embeddings", 0),
        ]
        for name, module in self._model.named_modules():  # as in RoBERTa, which counts positions from its pad token on
            if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
                sizes.append(module.num_embeddings - (-1 if module.padding_idx is None else module.padding_idx) - 1)
        return min([size for size in sizes if size and size > 0] + [1 << 30])

    def inputs(self, text: str, special: bool) -> tuple[Inputs, int]:
        """What the model is given for a text; of one that is too long its BOS and its end.

        Args:
            text: as it is read.
            special: whether the tokenizer adds its special tokens, as to text that no template rendered; one that the
                text begins or ends with isn't added again.

        Returns:
            The row, at most `window` tokens, and how many tokens the text has.

        Raises:
            InvalidRowError: it gives no token.
            UserError: the tokenizer gives a token that the model has no row for.
        """
        tokenizer = self.tokenizer
        given = tokenizer(text, add_special_tokens=special, verbose=False)
        inputs = {key: list(given[key]) for key in sorted(self._taken.intersection(given))}
        ids = inputs["input_ids"]
        if not ids:
            raise InvalidRowError("prompt and completion give no token to a reward model; leave the row out")
        if self._rows is not None and max(ids) >= self._rows:
            raise UserError(
                f"`scorer` {self.name}: its tokenizer gives the token {max(ids)} "
                f"({tokenizer.convert_ids_to_tokens(max(ids))!r}), but the model has {self._rows} rows of embeddings. "
                "Give it the tokenizer that it was trained with."
            )
        if special:
            first, last = (
                len(set(pair)) == 1 < len(pair) and pair[0] in added and found(tokenizer.convert_ids_to_tokens(pair[0]))
                for pair, added, found in (
                    (ids[:2], self._added[0], text.startswith), (ids[-2:], self._added[1], text.endswith),
                )
            )  # fmt: skip
            inputs = {key: values[int(first) : len(values) - int(last)] for key, values in inputs.items()}
        kept = int(inputs["input_ids"][0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
        length = len(inputs["input_ids"])
        over = max(length - self.window, 0)
        return {key: values[:kept] + values[kept + over :] for key, values in inputs.items()}, length

    def outputs(self, rows: list[Inputs]) -> torch.Tensor:
        """float32 logits, (len(rows), n): of each row those that the model gives it alone.

        Raises:
            UserError: the model gives something else than logits (B, n), other ones in a batch than alone, or nothing.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        ordered = [rows[i] for i in order]
        if not self._compared:
            self._compared = self._compare(ordered)
        return self._in_batches(ordered)[torch.tensor(order).argsort()]

    def _compare(self, rows: list[Inputs], made_up: bool = False) -> bool:
        """Score a few of `rows`, which are sorted by length, alone and in a batch; whether there were any to compare.

        Raises:
            UserError: they differ, or the model raises at each of them, unless they are `made_up`.
        """
        few = [rows[i] for i in torch.linspace(0, len(rows) - 1, min(_COMPARED, len(rows))).round().long().tolist()]
        if len(few[0]["input_ids"]) == len(few[-1]["input_ids"]):
            return False  # nothing is padded
        ran, alone, errors = [], [], []
        for row in few:
            try:
                alone.append(self._run([row]))
                ran.append(row)
            except Exception as error:
                if isinstance(error, UserError):
                    raise
                errors.append(error)
        if not ran and made_up:
            return False
        if not ran:
            raise UserError(
                f"`scorer` {self.name} can't score a text alone ({type(errors[0]).__name__}: "
                f"{one_line(errors[0])[:200]}); give another model, or wrap it in a Python function"
            )
        own, batched = torch.cat(alone), self._in_batches(ran)
        of_spread, of_largest = _TOLERANCE.get(self.dtype, (0.1, 0.02))
        finite = own.where(own.isfinite(), 0.0)  # a score that is NaN is told later
        spread, largest = finite.amax(0) - finite.amin(0), finite.abs().max().clamp(min=0.1)  # of all outputs
        allowed = of_spread * spread + of_largest * largest
        excess = ((own - batched).abs() / allowed).where(own.isfinite(), 0.0)
        if not excess.max() <= 1:
            row, output = divmod(int(excess.argmax()), excess.shape[1])
            raise UserError(
                f"`scorer` {self.name} gives a text {own[row, output]:.4g} alone and {batched[row, output]:.4g} beside "
                "others in a batch, so its score depends on the padding. Here `nca-align score --batch_size 1` is "
                "right. Elsewhere use a Python function that gives the model one text at a time."
            )
        return True

    def _in_batches(self, rows: list[Inputs]) -> torch.Tensor:
        starts = range(0, len(rows), self._batch_size)
        return torch.cat([self._batch(rows[start : start + self._batch_size]) for start in starts])

    def _batch(self, rows: list[Inputs]) -> torch.Tensor:
        try:
            return self._run(rows)
        except Exception as error:  # as of BART, where one text holds an EOS more than the others
            if len(rows) == 1 or isinstance(error, UserError):
                raise
            if not self._warned:
                self._warned = True
                logger.warning(
                    "scorer %s: a batch failed (%s); its conversations are scored one by one, here and where it "
                    "happens again.", self.name, one_line(error)[:200],
                )  # fmt: skip
            return torch.cat([self._run([row]) for row in rows])

    @torch.inference_mode()
    def _run(self, rows: list[Inputs]) -> torch.Tensor:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        fillers = {"input_ids": self._padding or 0, "token_type_ids": 0}
        inputs = {
            key: torch.tensor([row[key] + [fillers[key]] * (int(lengths.max()) - len(row[key])) for row in rows])
            for key in rows[0]
        }
        if self._takes_mask:
            inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        given = self._model(**{key: values.to(self._model.device) for key, values in inputs.items()})
        logits = getattr(given, "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != len(rows):
            if isinstance(logits, torch.Tensor) and logits.shape[:2] == inputs["input_ids"].shape:
                refuse_token_rewards(self.name)
            shape = getattr(logits, "shape", None)
            what = f"logits of shape {tuple(shape)}" if shape else f"a {type(given).__name__} without `logits`"
            raise UserError(
                f"`scorer` {self.name} gives {what} for {len(rows)} texts, but a scorer gives logits of shape "
                f"({len(rows)}, outputs). Wrap the model in a Python function, and give module:function."
            )
        self._outputs = self._outputs or logits.shape[1]
        if logits.shape[1] != self._outputs:  # (texts, tokens)
            refuse_token_rewards(self.name)
        return logits.float().cpu()
