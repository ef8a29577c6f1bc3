#!/usr/bin/env bash
# This script wrote the archives of this folder, in a checkout of commit 0a48fca with this folder
# copied into it. It documents how they were made; do not run it again.
#   run.tar.gz          run/: half of a training run, 20 of its 40 steps
#                       finished/: the whole run by the same commit: losses, samples, evaluation
#   ablation.tar.gz     ablation/: the table and the classifier of two arms with two seeds each
#   schedule.s=*.tar.gz ablation/arms/: one arm and seed each
# The archives have no pictures, report, locks or tensorboard/ (its file names contain a host name).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
rm -rf runs/stored
mkdir -p runs/stored
export JAX_PLATFORMS=cpu TFDS_DATA_DIR=runs/data
main() { python main.py --config=tests/stored/config.py "$@"; }

main --workdir=runs/stored/run --config.train.num_steps=20
cp -r runs/stored/run runs/stored/finished
main --workdir=runs/stored/finished
main --workdir=runs/stored/finished --mode=evaluate
main --workdir=runs/stored/ablation --mode=ablate

cd runs/stored
find . -name commit_success.txt -exec sed -i "s|$PWD/||" {} +  # Orbax writes these files; nothing reads them
pack() {
    tar --sort=name --owner=0 --group=0 --numeric-owner --exclude=tensorboard --exclude='*.png' \
        --exclude='*.gif' --exclude='.lock*' -cf - "${@:2}" | gzip -9n >"$here/$1.tar.gz"
}
pack run run finished/metrics.jsonl finished/evaluation.json finished/samples/samples.npz
pack ablation ablation/ablation.csv ablation/classifier-digits-0.npz
for job in ablation/arms/*/*; do pack "$(tr / _ <<<"${job#ablation/arms/}")" "$job"; done
