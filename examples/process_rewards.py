"""A reward of each step out of labels of whole solutions, on a CPU, beside baselines without a reference or a label.

A solution is three lines `x y z z z`. Of two rules, y = x + 1 and y = x + 2 (modulo 10), each line follows one at even
odds. Its z are words that have nothing to do with it, common and rare ones. A solution is right where all of its lines
follow the first rule. A small model learns to write such solutions, right and wrong ones alike. That is the reference.
It is then trained by `loss_type: outcome` on one labelled solution a prompt, one of eight right. Nothing says which
line is wrong.

The first wrong line is told as in ProcessBench: the first one whose score is below τ. For each score, τ is chosen on
other solutions.

    python examples/process_rewards.py [BETA [SEED]]
"""

import random
import sys
import tempfile
from collections import Counter

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nca_align import NCAConfig, NCATrainer
from nca_align.evaluation.process_rewards import best_threshold, f1_of_first_errors, step_rewards
from nca_align.models.logprobs import differences, token_logps

LINES, WORDS, NOISE = 3, 8, 3
Solution = tuple[str, list[str], int]  # a prompt, the lines, and the first that follows the second rule, −1 for none


def draw_solution(draw: random.Random) -> Solution:
    x = draw.randrange(10)
    prompt, lines, wrong = f"from {x} :", [], -1
    for j in range(LINES):
        rule = draw.choice((1, 2))
        wrong = j if rule == 2 and wrong < 0 else wrong
        y = (x + rule) % 10
        noise = (f"w{min(int(draw.expovariate(0.7)), WORDS - 1)}" for _ in range(NOISE))
        lines.append(f"{x} {y} {' '.join(noise)}")
        x = y
    return prompt, lines, wrong


def balanced(draw: random.Random, n: int) -> list[Solution]:
    """n solutions of either kind."""
    kinds: dict[bool, list[Solution]] = {True: [], False: []}
    while min(map(len, kinds.values())) < n:
        one = draw_solution(draw)
        if len(kinds[one[2] < 0]) < n:
            kinds[one[2] < 0].append(one)
    return [one for pair in zip(*kinds.values(), strict=True) for one in pair]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "from", ":", *map(str, range(10)), *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_reference(tokenizer: PreTrainedTokenizerFast, draw: random.Random, steps: int = 400) -> LlamaForCausalLM:
    """A model that has learnt to write solutions, right and wrong ones alike."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        texts = (f"{prompt} {' '.join(lines)} <eos>" for prompt, lines, _ in (draw_solution(draw) for _ in range(64)))
        ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def scores(model: LlamaForCausalLM, reference: LlamaForCausalLM, tokenizer, solutions: list[Solution], counts: Counter):
    """Four scores of each line: the implicit reward, log π, log π_ref, and how often its `x y` was seen in training."""
    rows = [
        {"prompt_ids": tokenizer(prompt)["input_ids"],
         "completion_ids": [[*tokenizer(" ".join(lines))["input_ids"], tokenizer.eos_token_id]]}
        for prompt, lines, _ in solutions
    ]  # fmt: skip
    pi, ref = (token_logps(own.eval(), rows, 256) for own in (model, reference))
    numbers = [min(t // (2 + NOISE), LINES - 1) for t in range((2 + NOISE) * LINES + 1)]  # the end with the last line
    found = {"implicit reward": differences(pi, ref), "log π": pi, "log π_ref": ref}
    by_line = {
        name: [step_rewards(tokens, numbers, LINES).tolist() for (tokens,) in own] for name, own in found.items()
    }
    return by_line | {"frequency": [[float(counts[line[:3]]) for line in lines] for _, lines, _ in solutions]}


def main(beta: float = 2.0, seed: float = 0) -> dict[str, float]:
    """The F1 of each score."""
    seed = int(seed)
    torch.manual_seed(seed)
    draw, tokenizer = random.Random(seed), make_tokenizer()
    reference = write_reference(tokenizer, draw)
    model = LlamaForCausalLM(reference.config)
    model.load_state_dict(reference.state_dict())
    solutions = [draw_solution(draw) for _ in range(2048)]  # as they come: no rule is the more frequent one
    rows = [
        {"prompt": prompt, "completions": [" " + " ".join(lines)], "rewards": [float(wrong < 0)]}
        for prompt, lines, wrong in solutions
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = NCAConfig(
            folder, loss_type="outcome", beta=beta, learning_rate=1e-3, per_device_train_batch_size=32, max_steps=192,
            save_strategy="no", report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, seed=seed,
            max_length=32, logging_steps=64, disable_tqdm=True,
        )  # fmt: skip
        NCATrainer(model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    counts = Counter(line[:3] for _, lines, _ in solutions for line in lines)
    for_threshold, held_out = balanced(draw, 200), balanced(draw, 200)
    labels, other_labels = ([wrong for *_, wrong in own] for own in (held_out, for_threshold))
    found, other = (scores(model, reference, tokenizer, own, counts) for own in (held_out, for_threshold))
    print("score of a line, the least first        wrong   right      F1")
    f1 = {}
    for name, rewards in found.items():
        threshold = best_threshold(other[name], other_labels)
        figures = f1_of_first_errors(rewards, labels, threshold)
        shares = "".join(f"{100 * own.mean:6.1f} %" for own in (figures.wrong, figures.right, figures.f1))
        print(f"{name:<36}{shares}   τ = {threshold:.3g}")
        f1[name] = figures.f1.mean
    return f1


if __name__ == "__main__":
    main(*map(float, sys.argv[1:3]))
