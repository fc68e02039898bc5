#!/usr/bin/env bash
# What needs an accelerator, on one card, in under ten minutes:
#
#     bash bench/gpu.sh [folder for the results [names]]   the card, Qwen3-8B shape, bfloat16
#     BUDGET=60 bash bench/gpu.sh folder names             longer pairs, two seconds of each of three
#                                                          arms, where 15 gives half a second
#     SMALL=1 bash bench/gpu.sh [folder [names]]           the same on a CPU with small shapes
#
# `names` chooses among the results (as "cap_overhead fit"), and then also those marked "more" below:
# other batches, sampled, all layers, and more of the Qwen3-32B shape. Needs python with jax, flax,
# safetensors, transformers and PyTorch; nothing is installed. Every bench has its own time limit:
# one that hangs costs its own figure alone, and none is begun after nine and a half minutes; its
# last line is its result.
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

names=${2:-}

if [ "${SMALL:-0}" = 1 ]; then
    tag=small big=mini huge=mini peer=mini kind=float32 steps=24 rows=48 count=16
    budget=${BUDGET:-2}
    new=24 few=2:6 some=2:6 long=96 context=192 forms="plain static"
else
    tag=gpu big=random:qwen3-8b huge=random:qwen3-32b peer=random:qwen3-0.6b kind=bfloat16 steps=64
    budget=${BUDGET:-15} rows=256 count=256 new=32 few=24:32 some=46:54 long=1856 context=2048
    forms="static compiled"
fi
case $budget in
    '' | 0* | *[!0-9]*) echo "BUDGET is $budget; give whole seconds, as 60"; exit 2 ;;
esac
limit=$((90 + 2 * budget))  # seconds of one bench; most pair twice

ran=0
run() {  # "always" or "more", name of the result, script, arguments
    local when=$1 name=$2 script=$3; shift 3
    if [ -n "$names" ]; then
        [[ " $names " = *" $name "* ]] || return 0
    elif [ "$when" = more ]; then
        return 0
    fi
    if [ $SECONDS -gt 570 ]; then echo "== $name: not begun after $SECONDS s"; return 0; fi
    ran=$((ran + 1))
    local begun=$SECONDS left=$((595 - SECONDS))
    echo "== $script $*"
    if timeout $((left < limit ? left : limit)) "$python" "bench/$script.py" "$@" \
            > "$out/$name.log" 2>&1; then
        tail -n 1 "$out/$name.log" > "$out/$name-$tag.json"
        tail -n 1 "$out/$name.log" | cut -c1-400
    else
        echo "failed or cut off after $((SECONDS - begun)) s:"; tail -n 5 "$out/$name.log"
    fi
    echo "   $((SECONDS - begun)) s, $SECONDS s in all"
}

decoding=(--model "$big" --dtype "$kind" --steps "$steps" --budget "$budget")
sampled=(--temperature 0.7 --top-p 0.9)
run always cap_overhead cap_overhead "${decoding[@]}" --layers "$few" --batch 32
run always cap_overhead_1 cap_overhead "${decoding[@]}" --layers "$few" --batch 1
run always fit fit --model "$huge" --dtype "$kind" --batch 32 --context "$context" \
    --new $((context / 4)) --layers "$some"
run always roofline roofline --model "$big" --dtype "$kind" --batch 1 32 --steps "$steps" \
    --prompt "$long"
run always rows rows --model "$big" --dtype "$kind" --batch "$rows" --steps "$steps" \
    --budget "$budget" --distinct "$rows"
run always decode decode --model "$big" --dtype "$kind" --batch 1 32 --steps "$steps" \
    --budget "$budget"
run always extract extract --model "$peer" --dtype "$kind" --peer-dtype "$kind" \
    --conversations "$count" --repeats 1 --peers hooks sorted
run always peers peers --model "$peer" --dtypes "$kind" --peer-dtypes "$kind" --batch 1 32 \
    --new "$new" --budget "$budget" --forms $forms
run always pipeline pipeline --model "$peer" --dtype "$kind" --peer-dtype "$kind" \
    --prompts "$count" --new "$new" --budget "$budget"
run more cap_overhead_256 cap_overhead "${decoding[@]}" --layers "$few" --batch "$rows"
for batch in 1 32 "$rows"; do
    run more "cap_overhead_sampled_$batch" cap_overhead "${decoding[@]}" --layers "$few" \
        --batch "$batch" "${sampled[@]}"
    run more "cap_overhead_all_$batch" cap_overhead "${decoding[@]}" --batch "$batch" --sweep
    run more "cap_overhead_huge_$batch" cap_overhead --model "$huge" --dtype "$kind" \
        --batch "$batch" --layers "$some" --steps "$steps" --budget "$budget"
done
run more roofline_huge roofline --model "$huge" --dtype "$kind" --batch 1 32 --steps "$steps" \
    --prompt "$long"
run more peers_big peers --model "$big" --dtypes "$kind" --peer-dtypes "$kind" --batch 1 32 \
    --new "$new" --budget "$budget" --forms $forms
if [ "$ran" = 0 ]; then echo "no result is called: $names"; exit 2; fi
echo "results: $out, $SECONDS s"
