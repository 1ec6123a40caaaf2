#!/usr/bin/env bash
# What both modes bring to a model on one GPU, in ten minutes: decoding as it is, a CLLM, a lossless adapter, a table.
#
#     examples/benchmarks/gpu.sh MODEL DATA OUT
#
# MODEL is a folder of transformers with a chat template, DATA one with the data of GSM8K (train.jsonl, test.jsonl) or
# Spider (train.json, dev.json, tables.json, database/). Nothing is loaded from the network. Each stage has a limit of
# its own; one that fails or runs out of time leaves the others running. OUT/summary.md grows stage by stage, beside
# the log of each. The same command goes on after an interruption.
#
#     SIZE=tiny                  all stages in a minute or two on a CPU, with a tiny model, to see that they work
#     LIMITS="collect=300 ..."   other limits than the usual ones, in seconds
#     PYTHON=python3.12          the interpreter, by default `python`
set -uo pipefail

if [[ $# -ne 3 ]]; then
    echo "usage: $0 MODEL DATA OUT" >&2
    exit 2
fi
model=$1 data=$2 out=$3
examples=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
export PYTHONPATH="${examples%/*}${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

if [[ -f $data/test.jsonl ]]; then
    task=gsm8k prompts=$data/test.jsonl
elif [[ -f $data/dev.json ]]; then
    task=spider prompts=$data/dev.json
else
    echo "DATA must hold test.jsonl, as GSM8K does, or dev.json, as Spider does, got '$data'." >&2
    exit 2
fi
mkdir -p "$out" || exit 2
summary=$out/summary.md

decode=(--num-prompts 2 --max-new-tokens 128 --block-sizes 16)
changes=("model.name=$model")
case ${SIZE:-full} in
full) ;;
tiny)
    decode=(--num-prompts 2 --max-new-tokens 8 --block-sizes 4)
    changes+=(block_size=4 max_new_tokens=12 model.attn_implementation=null)
    # A model that has learned nothing repeats itself.
    changes+=(collect.num_prompts=8 collect.max_prompt_tokens=null collect.max_token_run=null)
    changes+=(collect.max_sentence_repeats=null collect.drop_empty=false)
    changes+=(train.max_steps=2 train.warmup_steps=0 train.per_device_train_batch_size=2 train.bf16=false)
    changes+=(train.use_cpu=true evaluate.num_prompts=2 evaluate.more_prompts=2 evaluate.max_new_tokens=null)
    ;;
*)
    echo "SIZE must be full or tiny, got '$SIZE'." >&2
    exit 2
    ;;
esac

# limit NAME SECONDS: the seconds that LIMITS has for a stage, or the usual ones
limit() {
    local seconds=$2 pair
    for pair in ${LIMITS:-}; do
        [[ ${pair%%=*} == "$1" ]] && seconds=${pair#*=}
    done
    echo "$seconds"
}

# stage NAME SECONDS COMMAND...: run it under its limit; the summary gets its outcome, and OUT/NAME.md or else its log
stage() {
    local name=$1 seconds status outcome start=$SECONDS
    seconds=$(limit "$name" "$2")
    shift 2
    timeout -s INT -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
    0) outcome="done" ;;
    124 | 137) outcome="not done within $seconds s" ;;
    *) outcome="failed with status $status" ;;
    esac
    {
        echo "## $name: $outcome, $((SECONDS - start)) s"
        echo
        if [[ $status -eq 0 && -f $out/$name.md ]]; then
            cat "$out/$name.md"
        else
            echo '```'
            tail -n 40 "$out/$name.log"
            echo '```'
        fi
        echo
    } | tee -a "$summary"
}

# pipeline MODE STEP: the command of a step of the pipeline of a mode, `cllm` or `lossless`
pipeline() {
    local config=$examples/configs/$task-gpu-10min.yaml
    [[ $1 == lossless ]] && config=${config%.yaml}-lossless.yaml
    command=("$python" "$examples/$task.py" "$2" --config "$config" --data "$data" --output-dir "$out/$1")
    command+=(--set "${changes[@]}")
}

# The rows of a report's first table, with its two lines of head if $2 is 1
rows() {
    awk -v first="$2" '/^\|/ { number++; if (number >= first) print; next } number { exit }' "$1" 2>/dev/null
}

echo "# $(basename "$model") on $task, $(date -u '+%Y-%m-%d %H:%M') UTC" >"$summary"
echo >>"$summary"

stage environment 20 "$python" -c '
import platform, torch, transformers, trl, peft, datasets, cllm_hf
print("Python", platform.python_version(), "on", platform.platform())
for package in (cllm_hf, torch, transformers, trl, peft, datasets):
    print(package.__name__, package.__version__)
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
'
benchmark=("$python" -m cllm_hf benchmark decode --chat --model "$model" --prompts "$prompts" "${decode[@]}")
stage decode 40 "${benchmark[@]}" --markdown "$out/decode.md"
stage decode-compiled 85 "${benchmark[@]}" --compile --markdown "$out/decode-compiled.md"

pipeline cllm collect
stage collect 70 "${command[@]}"
# Both modes train on the same responses. The record of what is complete is copied last.
record=steps/trajectories.json
if [[ ! -f $out/lossless/$record ]] && grep -qs '"is_complete": true' "$out/cllm/$record"; then
    mkdir -p "$out/lossless/steps"
    rm -rf "$out/lossless/trajectories"
    cp -r "$out/cllm/trajectories" "$out/lossless" && cp "$out/cllm/$record" "$out/lossless/$record"
fi
for mode in cllm lossless; do
    pipeline "$mode" train
    stage "train-$mode" 85 "${command[@]}"
done
for mode in cllm lossless; do
    pipeline "$mode" evaluate
    stage "evaluate-$mode" 105 "${command[@]}"
done

{
    echo "## Both modes"
    echo
    rows "$out/cllm/report.md" 1
    # Without a first report, the second one has its head too.
    if [[ -f $out/cllm/report.md ]]; then first=3; else first=1; fi
    rows "$out/lossless/report.md" "$first"
} | tee -a "$summary"
[[ -f $out/cllm/report.md && -f $out/lossless/report.md ]]
