#!/usr/bin/env bash
# The rows of results.md that want a CUDA device, in two parts of under ten minutes on one H200-class GPU:
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh short     tests, speed, memory, MNIST with measured joules
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh long      CIFAR-10 and Forward-Forward 4x2000
# Needs locallearn importable (installed, or its unpacked wheel on PYTHONPATH). Records go to $OUT/records; copy them to
# docs/records/ with the command that made them.
set -uo pipefail
part=${1:?say short or long}
out=${OUT:-runs/gpu}
run() { echo "+ locallearn $*"; python3 -m locallearn.cli "$@" trainer.accelerator=cuda "runs_dir=$out/records" || echo "FAILED: $*"; }

if [ "$part" = short ]; then
  python3 -m pytest -q -m gpu tests 2>&1 | tail -15
  for what in step strategy memory; do
    run bench "bench.what=$what" dataset=mnist 'net.hidden=[2000,2000,2000,2000]' dataset.batch_size=512 bench.steps=200
  done
  # Windows of at least 60 s, idle measured first: joules by NVML's counter, gross and net.
  run compare experiment=mono_forward_mnist trainer.precision=32-true trainer.max_epochs=60 meter.idle_s=5 \
    'compare.algorithms=[backprop,deep_supervision,mono_forward]' 'compare.seeds=[0,1]'
else
  run train experiment=forward_forward_mnist 'net.hidden=[2000,2000,2000,2000]' trainer.max_epochs=60
  run compare experiment=mono_forward_cifar10 trainer.precision=32-true trainer.max_epochs=60 \
    'compare.algorithms=[backprop,mono_forward]' 'compare.seeds=[0,1,2,3,4]'
fi
python3 -m locallearn.cli report "$out/records" "report.out=$out/report.html"
