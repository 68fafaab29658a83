#!/usr/bin/env bash
# The rows of results.md that want a CUDA device, in parts; the first two take under ten minutes on one H200-class GPU each,
# the others were never timed. A run that is cut short leaves a checkpoint: locallearn train resume=FOLDER goes on.
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh short     tests, speed, memory, MNIST with measured joules
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh long      CIFAR-10 and Forward-Forward 4x2000
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh resnet    ResNet-20 on CIFAR-10: PFA, PFA-o, FA, uSF, backpropagation
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh cnn       counter-current and PEPITA with convolutions, CIFAR-10 and -100
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh mlp       counter-current and PEPITA, fully connected, five seeds
# Needs locallearn importable (installed, or its unpacked wheel on PYTHONPATH). Records go to $OUT/records; copy them to
# docs/records/ with the command that made them.
set -uo pipefail
part=${1:?say short, long, resnet, cnn or mlp}
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
elif [ "$part" = resnet ]; then
  run train -m experiment=product_feedback_alignment_cifar10 algorithm.orthogonal=false,true
  run train -m experiment=feedback_alignment_cifar10 algorithm.mode=fa,usf
  run train experiment=feedback_alignment_cifar10 algorithm=backprop
elif [ "$part" = cnn ]; then
  for data in cifar10 cifar100; do
    run train "experiment=counter_current_${data}_cnn"
    run train "experiment=pepita_${data}_cnn"
  done
  run train experiment=counter_current_cifar10_autoencoder
elif [ "$part" = mlp ]; then
  for data in mnist fashion_mnist cifar10 cifar100; do
    run train -m "experiment=counter_current_$data" seed=0,1,2,3,4 meter=none
    [ "$data" = fashion_mnist ] || run train -m "experiment=pepita_$data" seed=0,1,2,3,4 meter=none
  done
else
  run train experiment=forward_forward_mnist 'net.hidden=[2000,2000,2000,2000]' trainer.max_epochs=60
  run compare experiment=mono_forward_cifar10 trainer.precision=32-true trainer.max_epochs=60 \
    'compare.algorithms=[backprop,mono_forward]' 'compare.seeds=[0,1,2,3,4]'
fi
python3 -m locallearn.cli report "$out/records" "report.out=$out/report.html"
