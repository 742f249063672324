#!/bin/sh
# All four models on both examples, four trials each, beside the floors: an hour or more on two idle cores.
#
#     RECBOLE=/tmp/recbole/bin/python sh benchmarks/rivals/recbole/all.sh runs/recbole
set -e
out=${1:?name the folder to write into}
export OMP_NUM_THREADS=1
for example in "movielens 1461" "kuairand 3"; do
    set -- $example
    config=examples/$1/conrec.toml
    .venv/bin/conrec anchors --config "$config" --out "$out/$1/anchors"
    answers=
    for model in Caser BERT4Rec FDSA S3Rec; do
        [ -f "$out/$1/$model.json" ] || "${RECBOLE:?the python of requirements.txt}" -W ignore \
            benchmarks/rivals/recbole/rival.py "$model" --anchors "$out/$1/anchors" --out "$out/$1" --validation-days "$2"
        answers="$answers --predictions $model=$out/$1/$model.parquet"
        answers="$answers --predictions $model-choice=$out/$1/${model}_candidates.parquet"
    done
    .venv/bin/conrec evaluate --config "$config" --set root="$out/$1/root" --systems floors $answers
done
