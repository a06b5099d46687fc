#!/usr/bin/env bash
# From nothing to a trained nested embedding model, on the CPU: environment, data, backbone, tokenization, training,
# evaluation, picture. Everything it makes lies in runs/quickstart (and .venv). Interrupted, it goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

RUN=runs/quickstart
SHORTER=(${QUICKSTART_STEPS:+--set "train_steps=$QUICKSTART_STEPS"}) # CI looks whether it runs, not how well it learns
SECONDS=0
step() { printf '\n== %s (after %d s)\n' "$1" "$SECONDS"; }

step "1/6  environment"
prepare_environment plot,bm25
export PATH="$(dirname "$PYTHON"):$PATH" TOKENIZERS_PARALLELISM=true

step "2/6  raw data: names of territories in 20 languages"
[ -e $RUN/raw/.done ] || {
    python scripts/make_sample_datasets.py --corpus names --kind territory --languages 20 --rows 40000 \
        --output $RUN/raw --eval-output $RUN/evaluation_data --overwrite > /dev/null
    touch $RUN/raw/.done
}

step "3/6  backbone: a tiny Qwen3 with random weights, and a tokenizer trained on the texts"
[ -e $RUN/backbone ] ||
    python scripts/init_backbone.py --preset tiny --train-tokenizer $RUN/raw --vocab-size 4096 --output $RUN/backbone

step "4/6  tokenization"
python tokenize_data_qwen.py --tokenizer $RUN/backbone --input $RUN/raw --output $RUN/tokenized --max-seq-length 32

step "5/6  training over three axes: token-table rank, depth, vector length"
accelerate launch --config_file configs/accelerate_one_cpu.yaml \
    --num_cpu_threads_per_process "$(python -c 'import os; print(os.cpu_count())')" \
    run.py --config configs/quickstart.json --resume auto \
    "${SHORTER[@]}"

step "6/6  evaluation of every cut on what training never showed"
MODEL=$(ls -d $RUN/model/step_* | sort -t_ -k2 -n | tail -n 1)
python scripts/evaluate.py --model "$MODEL" --baseline $RUN/backbone bm25 --data $RUN/evaluation_data \
    --output $RUN/evaluation

printf '\n== done in %d s\n' "$SECONDS"
cat <<END

What happened: a model of a few megabytes learned from pairs of names which of them mean the same territory. Tested on
what it never saw: pairs of languages that were never paired, and territories that it was never told (little can be
known of these). "before" is the same model untrained; "bm25" is what words or letters find; "chance" is guessing.

model folder   $MODEL
               from ml_embed import Embedder; Embedder.from_pretrained("$MODEL").encode(["any text"])
cut it         python scripts/export_model.py --model $MODEL --output $RUN/small --rank 16 --depth 2 --dim 32
picture        $RUN/evaluation/evaluation.png
all numbers    $RUN/evaluation/evaluation.json
loss curves    tensorboard --logdir $RUN/tensorboard
start afresh   rm -r $RUN
try it         python scripts/search.py --model $MODEL "Alemania"
END
