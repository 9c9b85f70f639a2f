#!/usr/bin/env bash
# Every benchmark row that fits into a budget, on this GPU: the rows at sizes that fill it first,
# then those of the CPU sweep. No network, no install. Rows are written one by one.
#   benchmarks/gpu_sweep.sh [--budget 540] [--out FILE] [--peers FOLDER] [--python PYTHON] [--dry-run]
# --peers: a folder of wheels (or unpacked packages) to compare with; what is missing is a row that
# says so. --dry-run: on any machine; names every row, and times the toy form of the GPU's rows.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} budget=540 out='' peers=() dry=''
while (($#)); do
    case $1 in
    --dry-run) dry=1 ;;
    --budget) budget=${2:?--budget needs seconds} && shift ;;
    --out) out=${2:?--out needs a file} && shift ;;
    --peers) peers=(--peers "${2:?--peers needs a folder}") && shift ;;
    --python) python=${2:?--python needs a value} && shift ;;
    *) echo "gpu_sweep.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done
PYTHONPATH=$(printf '%s:' "$PWD" "$PWD"/shared-kernels/src "$PWD"/packages/*/src)${PYTHONPATH:-}
export PYTHONPATH PYTHONDONTWRITEBYTECODE=1
began=$SECONDS
run() {
    printf '\n==> %s\n' "$*"
    "$@"
}

if [[ $dry ]]; then
    run "$python" benchmarks/machine.py --dry-run
    rows=$(mktemp)
    trap 'rm -f "$rows"' EXIT
    run "$python" -m benchmarks --device cpu --only gpu --budget "$budget" "${peers[@]}" --out "$rows"
    run "$python" -m benchmarks --table "$rows" >/dev/null
    echo "gpu_sweep: dry run, $(wc -l <"$rows") rows; on a GPU: --device cuda"
    exit
fi
run "$python" benchmarks/machine.py
out=${out:-benchmarks/results/gpu-$(date -u +%Y-%m-%d).jsonl}
run "$python" -m benchmarks --device cuda --only gpu --budget "$budget" "${peers[@]}" --out "$out"
for name in adasplash dsalt diffmax flashdiffusion difflayers density scaling; do
    left=$((budget - SECONDS + began))
    ((left > 0)) || break
    # a package whose case fails costs its own rows only
    run "$python" -m benchmarks --device cuda --only "$name" --budget "$left" "${peers[@]}" \
        --out "$out" || echo "FAILED: $name"
done
run "$python" -m benchmarks --table "$out"
echo "gpu_sweep: $(wc -l <"$out") rows in $out"
