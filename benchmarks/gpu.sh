#!/usr/bin/env bash
# The first run on a GPU, what tells most first, 15 minutes at most; from the top of the tree:
#   bash benchmarks/gpu.sh OUT [cpu [STEP...]]
# What there is is packed into OUT/all.tgz after every step, so a run that is cut short leaves what it had. `cpu` is a
# dry run on the tiny preset; STEPs are run alone. docs/findings/gpu.md says what to look at.
set -u
here=$(cd "$(dirname "$0")" && pwd); out=$1; only=" ${*:3} "; o=$(mktemp -d); w=$(mktemp -d); mkdir -p "$out"
trap 'rm -rf "$o" "$w"' EXIT
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
jax=gpu; torch=cuda; preset=qwen3-0.6b; layer=2; dry=""
[ "${2:-}" = cpu ] && { jax=cpu; torch=cpu; preset=tiny; layer=1; dry=--cpu; }
python=${PYTHON:-python3}; svf="$python -m cli --no-progress"; t0=$SECONDS
step() {  # NAME LIMIT COMMAND...: stdout to a file; exit code and time to the log
    local name=$1 limit=$2 at=$SECONDS left=$((870 + t0 - SECONDS)); shift 2
    [ "$only" = "  " ] || [[ $only == *" $name "* ]] || return
    [ "$left" -gt 5 ] || { echo "$name: no time left" | tee -a "$o/log"; return; }
    [ "$left" -gt "$limit" ] || limit=$left
    timeout "$limit" "$@" > "$o/$name.json" 2> "$o/$name.err"; local code=$?
    echo "$name: exit $code, $((SECONDS - at)) s, $((SECONDS - t0)) s in all" | tee -a "$o/log"
    [ -s "$o/$name.err" ] && tail -n 2 "$o/$name.err"
    tar czf "$out/all.tgz" -C "$o" .
}
forward="$svf forward $w/m --tokens 1,2,3,5,8,13,21,34 --layers 0-1 --json"
step doctor 60 $svf doctor --json
for part in units narrow_sums xla functions repeats; do step $part 60 $python "$here/gpu.py" $part $dry; done
step synth 60 $svf synth "$w/m" --preset $preset --vector "$w/r.npy" --layers $layer
for dtype in bfloat16 float32 float16; do
    step jax-$dtype 60 $forward --no-production --backend jax --device $jax --dtype $dtype --out "$w/j-$dtype"
    step audit-$dtype 30 $svf audit "$w/j-$dtype" --json
done
step torch-bfloat16 60 $forward --no-production --backend torch --device $torch --dtype bfloat16 --out "$w/t"
step diff 30 $svf diff "$w/j-bfloat16" "$w/t" --json
step decompose 60 $svf decompose "$w/m" --vector "$w/r.npy" --layers $layer --out "$w/c"
step replay-torch 40 $svf replay "$w/c" --backend torch --device $torch --json
step replay-jax 40 $svf replay "$w/c" --backend jax --device $jax --json
step calibrate 90 $svf calibrate --backend jax --device $jax --json
step production 90 $forward --backend jax --device $jax --dtype bfloat16 --out "$w/p"  # last: XLA tunes all of it
$python "$here/gpu.py" summary "$o"
