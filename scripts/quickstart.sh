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
prepare_environment plot
export PATH="$(dirname "$PYTHON"):$PATH" TOKENIZERS_PARALLELISM=true

step "2/6  raw data: the Declaration of Human Rights, three tasks"
[ -e $RUN/raw/.done ] || {
    python scripts/make_sample_datasets.py --output $RUN/raw --eval-output $RUN/evaluation_data \
        --languages 12 --eval-rows 150 --overwrite > /dev/null
    touch $RUN/raw/.done
}

step "3/6  backbone: a tiny Qwen3 with random weights, and a tokenizer trained on the texts"
[ -e $RUN/backbone ] ||
    python scripts/init_backbone.py --preset tiny --train-tokenizer $RUN/raw --vocab-size 8192 --output $RUN/backbone

step "4/6  tokenization"
python tokenize_data_qwen.py --tokenizer $RUN/backbone --input $RUN/raw --output $RUN/tokenized --max-seq-length 64

step "5/6  training over three axes: token-table rank, depth, vector length"
accelerate launch --config_file configs/accelerate_one_cpu.yaml \
    --num_cpu_threads_per_process "$(python -c 'import os; print(os.cpu_count())')" \
    run.py --config configs/quickstart.json --resume auto \
    "${SHORTER[@]}"

step "6/6  evaluation of every cut on what training never showed"
MODEL=$(ls -d $RUN/model/step_* | sort -t_ -k2 -n | tail -n 1)
python scripts/evaluate.py --model "$MODEL" --baseline $RUN/backbone --data $RUN/evaluation_data/udhr_retrieval.parquet \
    --output $RUN/evaluation

printf '\n== done in %d s\n' "$SECONDS"
cat <<END

What happened: a model of a few megabytes learned from 24 articles in 12 languages to find the same article in another
language. Tested on what it never saw: other pairs of languages, other articles, other languages (the hardest: little
can carry over to a language whose words were never seen). "before" is the same model untrained; "chance" is guessing.

model folder   $MODEL
               from ml_embed import Embedder; Embedder.from_pretrained("$MODEL").encode(["any text"])
cut it         python scripts/export_model.py --model $MODEL --output $RUN/small --rank 16 --depth 2 --dim 32
picture        $RUN/evaluation/evaluation.png
all numbers    $RUN/evaluation/evaluation.json
loss curves    tensorboard --logdir $RUN/tensorboard
start afresh   rm -r $RUN
END
