#!/usr/bin/env bash
# What needs a GPU, in two parts of at most ten minutes each:
#
#     bash bench/gpu.sh 1 [folder]    caps, decode, extraction and products of the Qwen3-8B shape
#     bash bench/gpu.sh 2 [folder]    memory of the Qwen3-32B shape, generation and extraction
#                                     of the Qwen3-8B shape against transformers with hooks
#     SMALL=1 bash bench/gpu.sh 1     a rehearsal on a CPU with small shapes
#
# Needs python with jax, flax, safetensors, transformers and PyTorch; nothing is installed. Results
# are JSON lines in the folder: bench/results by default, a temporary folder for a rehearsal, which
# is never written to bench/results. HLO=folder keeps the compiled text of the profiled programs
# there. PARTS and BENCHES select from a part: PARTS="weights1 start", BENCHES="peers extract".
# FORMS, PEERS, PEER and ROWS change what part 2 compares; LIMIT is a bench's time limit in seconds.
# Every bench has its own time limit.
set -u
cd "$(dirname "$0")/.."
part=${1:-}
out=${2:-${OUT:-}}
python=${PYTHON:-python3}
case $part in 1 | 2) ;; *) echo "give the part, 1 or 2: bash bench/gpu.sh 1"; exit 2 ;; esac
if [ "${SMALL:-0}" = 1 ]; then
    out=${out:-$(mktemp -d)}
    if [ "$(realpath -m "$out")" = "$(realpath -m bench/results)" ]; then
        echo "SMALL=1 is a rehearsal; give another folder than bench/results"; exit 2
    fi
    echo "results: $out"
fi
out=${out:-bench/results}
mkdir -p "$out"

# the package's folders lie apart in the repository: put them together by links
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
mkdir "$package/jaxpersona"
ln -s "$PWD"/jaxpersona/* "$package/jaxpersona/"
ln -s "$PWD/kernels" "$PWD/ckpts" "$package/jaxpersona/"
export PYTHONPATH="$package${PYTHONPATH:+:$PYTHONPATH}" TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1
status=0

if [ "$part" = 1 ]; then
    shape=()
    [ "${SMALL:-0}" = 1 ] && shape=(--model mini --dtype float32 --small --budget 2)
    XLA_PYTHON_CLIENT_MEM_FRACTION=.92 timeout 345 "$python" bench/gpu.py --out "$out" \
        --seconds "${LATEST:-300}" ${BUDGET:+--budget "$BUDGET"} ${PARTS:+--parts $PARTS} \
        ${HLO:+--hlo "$HLO"} ${shape[@]+"${shape[@]}"} || status=1
    exit $status
fi

# torch and jax share the card: neither may take all of its memory at the start
export XLA_PYTHON_CLIENT_PREALLOCATE=false
if [ "${SMALL:-0}" = 1 ]; then
    tag=small huge=mini peer=mini kind=float32 count=16 budget=2
    new=24 some=2:6 rows=4 context=192 forms="plain static"
else
    tag=gpu huge=random:qwen3-32b peer=${PEER:-random:qwen3-8b} kind=bfloat16 count=256 budget=20
    new=32 some=46:54 rows=${ROWS:-8} context=2048 forms="${FORMS:-static compiled}"
fi
run() {  # name of the result, seconds, script, arguments
    local name=$1 limit=$2 script=$3; shift 3
    [[ " ${BENCHES:-fit peers extract} " == *" $name "* ]] || return
    [ $SECONDS -gt 400 ] && { echo "$name: not begun after $SECONDS s"; return; }
    if timeout "$limit" "$python" "bench/$script.py" "$@" > "$out/$name.log" 2>&1; then
        tail -n 1 "$out/$name.log" > "$out/$name-$tag.json"
        tail -n 1 "$out/$name.log" | cut -c1-1200
    else
        status=1
        echo "$name failed or was cut off:"; tail -n 12 "$out/$name.log"
    fi
    rm -f "$out/$name.log"
    echo "   $SECONDS s"
}
run fit 170 fit --model "$huge" --dtype "$kind" --batch "$rows" --context "$context" \
    --new $((context / 4)) --layers "$some" --chip "${CHIP:-h100:1}"
run peers "${LIMIT:-240}" peers --model "$peer" --dtypes "$kind" --peer-dtypes "$kind" \
    --batch 1 32 --new "$new" --budget "$budget" --forms $forms
run extract "${LIMIT:-200}" extract --model "$peer" --dtype "$kind" --peer-dtype "$kind" \
    --conversations "$count" --repeats 3 --without-plain --peers ${PEERS:-hooks sorted}
exit $status
