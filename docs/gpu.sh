#!/usr/bin/env bash
# The rows of results.md that want a CUDA device, in parts; the first two take under ten minutes on one H200-class GPU each,
# the others were never timed. A run that is cut short leaves a checkpoint: locallearn train resume=FOLDER goes on.
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh short     tests, speed, memory, MNIST with measured joules
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh long      CIFAR-10 and Forward-Forward 4x2000
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh resnet    ResNet-20 on CIFAR-10: PFA, PFA-o, FA, uSF, backpropagation
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh cnn       counter-current and PEPITA with convolutions, CIFAR-10 and -100
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh mlp       counter-current and PEPITA, fully connected, five seeds
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh moonshot1 ResNet-18 in four blocks: light and mirrored heads and all controls
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh moonshot2 the hardest half of every batch, seventy epochs, and its controls
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh moonshot3 the ladder of heads, thirty epochs of each
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh predsim   VGG8b layer by layer, MNIST and CIFAR-10
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh cafo      Cascaded Forward with blocks trained by DFA, CIFAR-10
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh monocnn   Mono-Forward's four convolutions, CIFAR-10 and MNIST
#   OUT=folder LOCALLEARN_DATA=data bash docs/gpu.sh forward   LocalMixer by local forward gradients and its controls; guesses on ResNet-18, CIFAR-10
# These seven take LIMIT seconds at most (default 570): what then runs is stopped as by Ctrl-C, and the same command again takes over
# what is finished and goes on with the rest. The most valuable runs come first.
# Needs locallearn importable (installed, or its unpacked wheel on PYTHONPATH). Records go to $OUT/records; copy them to
# docs/records/ with the command that made them.
set -uo pipefail
part=${1:?say short, long, resnet, cnn, mlp, moonshot1, moonshot2, moonshot3, predsim, cafo, monocnn or forward}
out=${OUT:-runs/gpu}
run() { echo "+ locallearn $*"; python3 -m locallearn.cli "$@" trainer.accelerator=cuda "runs_dir=$out/records" || echo "FAILED: $*"; }
# One rule of a comparison at a time, so that each has its place in the order; all seeds of it before the next one.
until=$((SECONDS + ${LIMIT:-570}))
arm() {
  local rule=$1 left=$((until - SECONDS))
  shift
  [ "$left" -gt 20 ] || { echo "no time left for $rule"; return; }
  echo "+ locallearn compare 'compare.algorithms=[\"$rule\"]' $*"
  timeout -s INT -k 20 "$left" python3 -m locallearn.cli compare "compare.algorithms=[\"$rule\"]" "$@" compare.resume=true \
    trainer.accelerator=cuda meter=measured "runs_dir=$out/records" "compare.report=$out/$part.html" || echo "NOT DONE: $rule $*"
}
# Fast recipe for ResNet-18, the same for every rule: Muon on convolutions, smoothed labels, mirrored crops.
fast=(experiment=backprop_cifar10_resnet18 optimizer=muon '~optimizer.nesterov' optimizer.lr=0.02 optimizer.momentum=0.95
  optimizer.weight_decay=0.01 optimizer.sgd_weight_decay=5e-4 task.label_smoothing=0.2 task.views=2 dataset.batch_size=512
  dataset.augment.padding_mode=reflect trainer.check_val_every_n_epoch=5)
light='head=conv1,loss=predsim,similarity_side=8'

if [ "$part" = moonshot1 ]; then
  long=("${fast[@]}" trainer.max_epochs=60 'compare.seeds=[0]')
  for rule in "local_heads($light,net.cuts=B)" backprop "local_heads($light,net.cuts=A)" \
    'backprop(checkpoint=auto,net.cuts=units)' 'local_heads(head=mirror,width=0.25,net.cuts=B)' \
    "deep_supervision($light,net.cuts=B)" 'local_heads(head=mirror,width=0.5,net.cuts=A)' 'local_heads(head=mirror,width=0.25,net.cuts=A)' \
    "deep_supervision($light,net.cuts=A)"; do
    arm "$rule" "${long[@]}"
  done
elif [ "$part" = moonshot2 ]; then
  # Cuts A for all; the first block chooses. The whole batch is the first control, then halves: any, and backpropagation's own.
  half=("${fast[@]}" trainer.max_epochs=70 'compare.seeds=[0]' net.cuts=A)
  for rule in "local_heads($light,keep=0.5)" "local_heads($light)" "local_heads($light,keep=0.5,keep_by=random)" \
    'backprop(keep=0.5)' backprop 'backprop(keep=0.5,keep_by=random)' "local_heads($light,keep=0.5,keep_after=layer2)"; do
    arm "$rule" "${half[@]}"
  done
elif [ "$part" = moonshot3 ]; then
  ladder=("${fast[@]}" trainer.max_epochs=30 'compare.seeds=[0]')
  for head in "$light" head=conv1 head=mirror,width=0.25 head=mirror,width=0.5 head=mirror head=dgl head=auglocal,depth=2 \
    head=conv1,movement=0.01; do
    arm "local_heads($head,net.cuts=A)" "${ladder[@]}"
  done
  arm backprop "${ladder[@]}"
  arm "local_heads($light,net.cuts=B)" "${ladder[@]}"
  arm 'local_heads(head=mirror,width=0.5,net.cuts=B)' "${ladder[@]}"
elif [ "$part" = predsim ]; then
  for data in mnist cifar10; do
    arm local_heads "experiment=local_heads_${data}_vgg8b" 'compare.seeds=[0]'
    arm backprop "experiment=local_heads_${data}_vgg8b" net.activation=relu 'compare.seeds=[0]'
  done
elif [ "$part" = cafo ]; then
  dfa=(net=cafo_cnn dataset=cifar10 schedule=sequential schedule.patience=8 optimizer.lr=1.374e-4 trainer.max_epochs=250
    trainer.probe_samples=0)
  arm 'cafo(blocks=dfa)' "${dfa[@]}" 'compare.seeds=[0,1,2]'
elif [ "$part" = monocnn ]; then
  for data in cifar10 mnist; do
    for rule in mono_forward backprop; do
      arm "$rule" "experiment=mono_forward_${data}_cnn" 'compare.seeds=[0,1,2]'
    done
  done
elif [ "$part" = forward ]; then
  for rule in forward_gradient 'forward_gradient(losses=global,mask=true)' backprop 'forward_gradient(perturb=weights)' \
    'forward_gradient(losses=global,perturb=weights)'; do
    arm "$rule" experiment=lg_fg_a_cifar10 'compare.seeds=[0]'
  done
  for space in weights activities; do
    arm "forward_gradient(perturb=$space)" experiment=forward_gradient_cifar10_resnet18 'compare.seeds=[0]'
  done
  arm backprop experiment=forward_gradient_cifar10_resnet18 'compare.seeds=[0]'
elif [ "$part" = short ]; then
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
