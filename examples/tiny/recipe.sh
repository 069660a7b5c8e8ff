#!/usr/bin/env bash
# The tiny Cosmos3 from nothing, on one GPU: bash examples/tiny/recipe.sh [RUNS]
#
# The embedded checkpoint was made by these commands, with one difference: its autoencoders trained
# side by side, on an H100, in 5.5 minutes; one after the other, about 8 by estimate. The bank took 0.8
# and the towers 11 on an H200, compilation included. The sampler's settings were not searched for,
# and the table was made on a CPU, in 28.
# What is there already is not made again, and a run that was killed goes on: start it once more.
# All that can be set here: MINUTES for the towers, CLIPS in their bank (on an H200 encoded at 6,000
# a second), WORKERS for what the host does, TUNE=yes to search for the sampler's settings.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "${1:-runs/tiny}"
RUNS=$(realpath "${1:-runs/tiny}")
MINUTES=${MINUTES:-11}
CLIPS=${CLIPS:-20480}
WORKERS=${WORKERS:-12}
PYTHON=${PYTHON:-python}
export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$RUNS/compiled}

stage() { echo "== $* ($(date +%T))"; }

for what in sound video; do
  if [ ! -f "$RUNS/$what/report.json" ]; then
    stage "$what autoencoder"
    # The video's program is products of matrices alone: choosing among kernels for them gains little.
    FLAGS=${XLA_FLAGS:-}
    if [ $what = video ]; then FLAGS+=" --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"; fi
    XLA_FLAGS=$FLAGS $PYTHON -m examples.tiny.train_autoencoders --what $what --out "$RUNS/$what"
  fi
done
if [ ! -f "$RUNS/base/model_index.json" ]; then
  stage "towers that know nothing"
  $PYTHON -m examples.tiny.assemble base --video "$RUNS/video/vae" \
    --sound "$RUNS/sound/sound_tokenizer" --out "$RUNS/base"
fi
if [ ! -f "$RUNS/towers/done" ]; then
  stage "towers"
  $PYTHON -m examples.tiny.train_towers --base "$RUNS/base" --out "$RUNS/towers" \
    --minutes "$MINUTES" --clips "$CLIPS" --workers "$WORKERS" \
    --sentences 0 --evaluations 5 --every 100
  touch "$RUNS/towers/done"
fi
if [ "${TUNE:-no}" = yes ] && [ ! -f "$RUNS/tuned/tune.json" ]; then
  stage "settings, on sentences of training combinations"
  $PYTHON -m examples.tiny.evaluate --checkpoint "$RUNS/towers/checkpoint" --tune --apply \
    --count 100 --batch 100 --workers "$WORKERS" --out "$RUNS/tuned"
fi
stage "200 held-out sentences"
if [ ! -d "$RUNS/random" ]; then
  $PYTHON -c "import pathlib, sys; from cosmos3_jax.checkpoint import random_checkpoint; \
    random_checkpoint.write(pathlib.Path(sys.argv[1]))" "$RUNS/random.partial"
  mv "$RUNS/random.partial" "$RUNS/random"
fi
$PYTHON -m examples.tiny.evaluate --checkpoint "$RUNS/towers/checkpoint" \
  --beside "random=$RUNS/random" --count 200 --batch 100 --workers "$WORKERS" --out "$RUNS/table"
$PYTHON -m examples.tiny.curves --runs "$RUNS" --out "$RUNS/curves.png"
stage "made $RUNS/towers/checkpoint"
