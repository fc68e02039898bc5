#!/usr/bin/env bash
# Run the GPU benchmarks, in two parts of at most ten minutes each:
#
#     bash bench/gpu.sh 1 [folder]    Qwen3-8B shape: caps, decode, extraction and matmuls
#     bash bench/gpu.sh 2 [folder]    Qwen3-32B shape: memory; Qwen3-8B shape: generation and
#                                     extraction, compared with hooks in transformers
#     SMALL=1 bash bench/gpu.sh 1     smoke test on a CPU with small shapes
#
# The script requires Python with jax, flax, safetensors, transformers and PyTorch, and installs
# nothing. Results are written to the folder as JSON: by default to bench/results, or, for a smoke
# test, to a temporary folder. HLO=folder writes the compiled HLO text of the profiled programs to
# that folder. PARTS selects benchmarks of part 1, such as PARTS="weights1 start", and BENCHES those
# of part 2, such as BENCHES="peers extract". FORMS, PEERS, PEER and ROWS set the options of part 2.
# LIMIT is the time limit of `peers` and of `extract` in seconds.
set -u
cd "$(dirname "$0")/.."
part=${1:-}
out=${2:-${OUT:-}}
python=${PYTHON:-python3}
case $part in 1 | 2) ;; *) echo "give the part, 1 or 2: bash bench/gpu.sh 1"; exit 2 ;; esac
if [ "${SMALL:-0}" = 1 ]; then
    out=${out:-$(mktemp -d)}
    if [ "$(realpath -m "$out")" = "$(realpath -m bench/results)" ]; then
        echo "SMALL=1 runs a smoke test; give a folder other than bench/results"; exit 2
    fi
    echo "results: $out"
fi
out=${out:-bench/results}
mkdir -p "$out"

# link the package's folders, which are separate in the repository, into one package, and write its
# metadata, which contain the version
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT
version=$(grep -m1 '^version' pyproject.toml | cut -d'"' -f2)
mkdir "$package/jaxpersona" "$package/jaxpersona-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: jaxpersona\nVersion: %s\n' "$version" \
    > "$package/jaxpersona-$version.dist-info/METADATA"
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

# PyTorch and JAX share the GPU, so JAX must not preallocate its memory
export XLA_PYTHON_CLIENT_PREALLOCATE=false
if [ "${SMALL:-0}" = 1 ]; then
    tag=small huge=mini peer=mini kind=float32 count=16 budget=2
    new=24 some=2:6 rows=4 context=192 forms="plain static"
else
    tag=gpu huge=random:qwen3-32b peer=${PEER:-random:qwen3-8b} kind=bfloat16 count=256 budget=20
    new=32 some=46:54 rows=${ROWS:-8} context=2048 forms="${FORMS:-static compiled}"
fi
run() {  # name of the result, time limit in seconds, script, arguments
    local name=$1 limit=$2 script=$3; shift 3
    [[ " ${BENCHES:-fit peers extract} " == *" $name "* ]] || return
    [ $SECONDS -gt 400 ] && { echo "$name: skipped, because $SECONDS s have passed"; return; }
    if timeout "$limit" "$python" "bench/$script.py" "$@" > "$out/$name.log" 2>&1; then
        tail -n 1 "$out/$name.log" > "$out/$name-$tag.json"
        tail -n 1 "$out/$name.log" | cut -c1-1200
    else
        status=1
        echo "$name failed or reached its time limit:"; tail -n 12 "$out/$name.log"
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
