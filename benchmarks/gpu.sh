#!/usr/bin/env bash
# Everything that a GPU has to show, in 8 minutes, on a machine with torch and without a network:
#
#   bash benchmarks/gpu.sh fetch WHEELS           on a machine with a network: what the other one may lack, 24 MB
#   bash benchmarks/gpu.sh check WHEELS           all that can be looked at without a GPU
#   bash benchmarks/gpu.sh run WHEELS [RESULTS]   `llava doctor`, the tests that need a GPU, then benchmarks/gpu.py
#
# WHEELS is a folder. They are unpacked to a temporary folder that comes first on Python's path; nothing is installed.
# Logs and the section for RESULTS.md are written to RESULTS, gpu-results by default. LLAVA_GPU_SECONDS is the limit.
set -u -o pipefail

limit=${LLAVA_GPU_SECONDS:-480}
python=${PYTHON:-python3}
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

usage() { sed -n '2,10s/^# \{0,1\}//p' -- "${BASH_SOURCE[0]}"; exit 2; }
left() { echo $((limit - SECONDS)); }

[ $# -ge 2 ] || usage
action=$1
wheels=$2
results=${3:-gpu-results}

fetch() {
    mkdir -p -- "$wheels"
    local names=(bitsandbytes pexpect ptyprocess platformdirs prompt_toolkit wcwidth textual-image tomlkit)
    names+=(transformers typer pytest pluggy iniconfig pygments httpx httpcore h11 anyio sniffio)
    local options=(--no-deps --only-binary=:all: --python-version 3.12 --dest "$wheels" --quiet)
    local glibc
    for glibc in 2_28 2_24 2_17; do options+=(--platform "manylinux_${glibc}_x86_64"); done
    "$python" -m pip download "${options[@]}" -c "$root/constraints.txt" "${names[@]}" || exit 1
    "$python" -m pip download "${options[@]}" 'huggingface_hub<2' || exit 1  # its next version wants other libraries
    "$python" - "$wheels" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

for wheel in Path(sys.argv[1]).glob("bitsandbytes-*.whl"):  # one library for each CUDA: 60 MB
    small = wheel.with_suffix(".small")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            if not name.endswith((".so", ".dll", ".dylib")) or "cuda130" in name:
                new.writestr(name, old.read(name))
    small.replace(wheel)
PYTHON
    du -sh -- "$wheels"
}

prepare() {
    site=$(mktemp -d) || exit 1
    trap 'rm -rf -- "$site"' EXIT
    "$python" - "$wheels" "$site" <<'PYTHON' || exit 2
import sys
import zipfile
from pathlib import Path

folder, site = map(Path, sys.argv[1:])
wheels = sorted(folder.glob("*.whl"))
if not wheels:
    sys.exit(f"gpu.sh: {folder}: has no wheels; on a machine with a network: bash benchmarks/gpu.sh fetch {folder}")
for wheel in wheels:
    zipfile.ZipFile(wheel).extractall(site)
PYTHON
    export PYTHONPATH="$site:$root" PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 LLAVA_CACHE="$site/cache"
    export HOME="$site/home" PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
    mkdir -p -- "$HOME"
    "$python" - <<'PYTHON' || exit 2
import importlib
import sys

needed = "torch transformers bitsandbytes accelerate safetensors tokenizers huggingface_hub PIL jinja2 psutil rich typer "
needed += "filelock certifi idna platformdirs prompt_toolkit textual_image tomlkit pexpect pytest"
problems = []
for name in needed.split():
    try:
        importlib.import_module(name)
    except Exception as error:
        problems.append(f"{name} ({type(error).__name__}: {error})")
if problems:
    sys.exit("gpu.sh: cannot import " + "; ".join(problems))
import torch
import transformers

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}")
PYTHON
}

tests() {  # what is given: seconds, then pytest's words
    local seconds=$1
    shift
    timeout --signal=INT --kill-after=10 "$seconds" "$python" -m pytest -p no:cacheprovider -rfE --tb=short \
        --durations=5 --rootdir "$root" -c "$root/pyproject.toml" "$@"
}

check() {
    prepare
    cd -- "$root" || exit 1
    bash -n benchmarks/gpu.sh || exit 1
    LLAVA_TEST_DEVICE=cpu tests 600 tests/engine/test_gpu.py || exit 1  # the tests themselves, as far as a CPU can
    "$python" -m llava_cli doctor || exit 1
    "$python" benchmarks/gpu.py --help >/dev/null && echo "ready"
}

run() {
    mkdir -p -- "$results" || exit 1
    results=$(cd -- "$results" && pwd)
    prepare
    cd -- "$root" || exit 1
    "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: no GPU" >&2; exit 2; }
    local failed=0
    timeout 60 "$python" -m llava_cli doctor --device cuda 2>&1 | tee -- "$results/doctor.txt"
    local first=tests/engine/test_gpu.py::test_captured_steps_give_the_plain_paths_tokens
    tests $((limit / 5)) "$first" 2>&1 | tee -- "$results/captured.txt" | tail -n 20 || failed=1
    tests $((limit / 4)) tests/engine/test_gpu.py --deselect "$first" 2>&1 | tee -- "$results/tests.txt" |
        tail -n 40 || failed=1
    benchmark 7B bf16 $(($(left) * 6 / 10)) --load || failed=1
    benchmark 7B 4bit "$(left)" || failed=1
    echo
    local name
    for name in captured tests; do echo "== $name: $(tail -n 1 -- "$results/$name.txt")"; done
    grep -hE 'must hold|\| (yes|\*\*no\*\*) \|$' -- "$results"/*.md
    echo "== $SECONDS s; all of it is in $results"
    return $failed
}

benchmark() {
    local size=$1 precision=$2 seconds=$3
    shift 3
    if [ "$seconds" -lt 60 ]; then
        echo "gpu.sh: $seconds s are too few for $size in $precision"
        return 1
    fi
    timeout $((seconds + 20)) "$python" benchmarks/gpu.py --size "$size" --precision "$precision" --seconds "$seconds" \
        --results "$results/$size-$precision.md" "$@" 2>&1 | tee -- "$results/$size-$precision.log"
}

case $action in
    fetch | check | run) "$action" ;;
    *) usage ;;
esac
