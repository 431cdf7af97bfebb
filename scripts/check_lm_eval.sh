#!/usr/bin/env bash
# lm-evaluation-harness itself on `nca-align evaluate --lm_eval`, offline, in the environment that it is given:
# the tests with lm_eval's own loading beside, then SmolLM2-135M before and after four steps of training that are far too
# large, so that the figures move.
#
#     bash scripts/check_lm_eval.sh .venv-lm-eval
set -euo pipefail
bin=$(cd "$1/bin" && pwd)
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$bin/python" -m pytest -q tests/test_lm_eval.py

"$bin/nca-align" train --config configs/quickstart.yaml --max_steps 4 --learning_rate 2e-3 --eval_strategy no --output_dir "$out/run"
evaluate=("$bin/nca-align" evaluate --model_name_or_path "$out/run" --output "$out/table.json")
"${evaluate[@]}" --lm_eval opposites,sums --include_path tests/lm_eval_tasks

echo "and a task whose data is not here:"
if "${evaluate[@]}" --lm_eval gsm8k; then
    echo "gsm8k was run without its data" >&2
    exit 1
fi
