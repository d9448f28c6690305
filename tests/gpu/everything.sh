#!/usr/bin/env bash
# All that needs a GPU, on a machine that has one with a CUDA build of torch and nvcc:
#
#     tests/gpu/everything.sh OUT [STEP...]
#
# Steps, all of them unless some are named: build, test, sanitize, ops, model. Each writes its log, and the timings
# their JSON, into OUT. A step that fails does not stop the others; the exit status says whether one did.
set -uo pipefail
out=$(realpath -m "$1"); shift
cd "$(dirname "$0")/../.." && mkdir -p "$out"
python=${PYTHON:-python3}
failed=0

step() {
  name=$1; shift
  if "$@" >"$out/$name.log" 2>&1; then echo "$name: ok"; else echo "$name: FAILED, see $name.log"; failed=1; fi
  tail -n 15 "$out/$name.log"
}

build() {
  CLARA_FAST_BUILD_CUDA=ON $python -m pip install --no-build-isolation --no-deps . && clara-fast info
}

[ $# -gt 0 ] || set -- build test sanitize ops model
for wanted in "$@"; do
  case $wanted in
    build) step build build ;;
    test) step test $python -m pytest -q -p no:cacheprovider tests/gpu ;;
    sanitize) step sanitize $python -m tests.packaging.sanitize_gpu ;;
    ops) step ops $python benchmarks/ops.py --device cuda --json "$out/ops.json" --plot "$out/roofline.png" ;;
    model) step model $python benchmarks/model.py --device cuda --json "$out/model.json" ;;
    *) echo "unknown step $wanted"; failed=1 ;;
  esac
done
exit $failed
