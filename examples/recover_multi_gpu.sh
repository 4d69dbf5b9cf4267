#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Recover a carved model on several GPUs: the processes share each step.
#
#     examples/recover_multi_gpu.sh MODEL OUT [OPTION...]        options of `cmoe recover`
#
# GPUS=4                    processes on this machine
# FSDP2=1                   while training, each GPU keeps a part of the weights instead of a copy
# NODES=2 NODE=0 HEAD=host  several machines: the same command on each, NODE counts from 0 at HEAD;
#                           all must see the same MODEL and OUT
#
# --batch-size is that of all processes together, a multiple of their number. What was interrupted
# goes on with OUT --resume in place of MODEL, OUT and options, by the same way of launching.
#
# Tested with two CPU processes only (ACCELERATE_USE_CPU=true GPUS=2), never with GPUs or machines.
set -eu

nodes=${NODES:-1}
set -- --num_processes $((${GPUS:-4} * nodes)) -m cmoe_hf.conversion.cli recover "$@"
if [ "$nodes" -gt 1 ]; then
    set -- --num_machines "$nodes" --machine_rank "$NODE" --main_process_ip "$HEAD" "$@"
fi
if [ "${FSDP2:-}" ]; then
    set -- --config_file "$(dirname "$0")/accelerate_fsdp2.yaml" "$@"
else
    set -- --multi_gpu "$@"
fi
exec accelerate launch --main_process_port "${PORT:-29500}" "$@"
