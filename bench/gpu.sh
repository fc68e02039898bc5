#!/usr/bin/env bash
# Everything that needs an accelerator, on one card, in under ten minutes:
#
#     bash bench/gpu.sh [folder for the results]            the card, Qwen3-8B shape, bfloat16
#     SMALL=1 bash bench/gpu.sh [folder]                    the same on a CPU with small shapes
#
# Needs python with jax, flax, safetensors, transformers and PyTorch; nothing is installed. Every bench
# has its own time limit, so one that hangs costs its own figure alone; its last line is its result.
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-bench/results}}
python=${PYTHON:-python3}
mkdir -p "$out"

# the package's folders lie apart in the repository: put them together by links
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/jaxpersona"
ln -s "$PWD"/jaxpersona/* "$package/jaxpersona/"
ln -s "$PWD/kernels" "$PWD/ckpts" "$package/jaxpersona/"
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}"
# torch and jax share the card: neither may take all of its memory at the start
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3

if [ "${SMALL:-0}" = 1 ]; then
    tag=small big=mini peer=mini kind=float32 steps=24 rows=32 budget=2 limit=120 count=16 new=24
else
    tag=gpu big=random:qwen3-8b peer=random:qwen3-0.6b kind=bfloat16 steps=192 rows=256 budget=15
    limit=75 count=256 new=64
fi

run() {  # name of the result, script, arguments
    local name=$1 script=$2; shift 2
    local begun=$SECONDS
    echo "== $script $*"
    if timeout "$limit" "$python" "bench/$script.py" "$@" > "$out/$name.log" 2>&1; then
        tail -n 1 "$out/$name.log" > "$out/$name-$tag.json"
        tail -n 1 "$out/$name.log" | cut -c1-400
    else
        echo "failed or cut off after $limit s:"; tail -n 5 "$out/$name.log"
    fi
    echo "   $((SECONDS - begun)) s, $SECONDS s in all"
}

run roofline roofline --model "$big" --dtype "$kind" --batch 1 8 32 --steps "$steps"
run cap_overhead cap_overhead --model "$big" --dtype "$kind" --steps "$steps" --budget "$budget"
run cap_overhead_sampled cap_overhead --model "$big" --dtype "$kind" --steps "$steps" \
    --budget "$budget" --temperature 0.7 --top-p 0.9
run rows rows --model "$big" --dtype "$kind" --batch "$rows" --steps "$steps" --budget "$budget"
run decode decode --model "$big" --dtype "$kind" --batch 1 32 --steps "$steps" --budget "$budget"
run peers peers --model "$peer" --dtypes "$kind" --peer-dtypes "$kind" --batch 1 32 --new "$new" \
    --budget "$budget"
run extract extract --model "$peer" --dtype "$kind" --peer-dtype "$kind" --conversations "$count" \
    --repeats 1 --peers hooks sorted
run pipeline pipeline --model "$peer" --dtype "$kind" --peer-dtype "$kind" --prompts "$((count * 2))" \
    --new "$new" --budget "$budget"
echo "results: $out, $SECONDS s"
