#!/usr/bin/env bash
# Is everything right on this GPU? Needs Python with torch, triton, numpy, scipy and pytest; no
# network and no install: the packages are read from this checkout. Stops at nothing, says at the
# end what failed, and exits with 1 then.
#   benchmarks/gpu_check.sh [--dry-run] [--python PYTHON]
# --dry-run: on any machine. Collects what a GPU would run, and runs the CPU form where there is one.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python} dry=
while (($#)); do
    case $1 in
    --dry-run) dry=1 ;;
    --python) python=${2:?--python needs a value} && shift ;;
    *) echo "gpu_check.sh: unknown argument $1" >&2 && exit 2 ;;
    esac
    shift
done
PYTHONPATH=$(printf '%s:' "$PWD" "$PWD"/shared-kernels/src "$PWD"/packages/*/src)${PYTHONPATH:-}
export PYTHONPATH PYTHONDONTWRITEBYTECODE=1
failed=()
step() { # step NAME COMMAND...
    printf '\n==> %s: %s\n' "$1" "${*:2}"
    "${@:2}" || failed+=("$1")
}
quiet=(-q -p no:cacheprovider --no-header)
on_the_card=tests-integration/test_on_the_card.py

step machine "$python" benchmarks/machine.py ${dry:+--dry-run}
if [[ $dry ]]; then
    step 'kernels (listed)' "$python" -m pytest "${quiet[@]}" -m gpu --collect-only -qq \
        shared-kernels packages
    step 'properties (CPU form)' "$python" -m pytest "${quiet[@]}" -m '' "$on_the_card"
else
    step kernels "$python" -m pytest "${quiet[@]}" -m gpu shared-kernels packages
    step properties "$python" -m pytest "${quiet[@]}" -m gpu -rs "$on_the_card"
fi
echo
if ((${#failed[@]})); then
    printf 'FAILED: %s\n' "${failed[*]}"
    exit 1
fi
echo "gpu_check: ${dry:+dry run, }all steps passed"
