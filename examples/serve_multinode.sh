#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Serve a carved model from several machines with vLLM 0.32. Run this on every machine:
#
#     examples/serve_multinode.sh MODEL HEAD_ADDRESS NODES RANK     # RANK 0 on the head, then 1, 2, ...
#
# MODEL must be the same folder everywhere, or a Hub id. Only the head answers, on port 8000.
#
# NOT TESTED on several real machines, nor on GPUs. The option names are those of
# `vllm serve --help=all` of vLLM 0.32.0; set the environment up with examples/vllm_setup.sh.
#
# GPUS       GPUs of each machine (default 8)
# PARALLEL   how the model is spread:
#   pipeline  (default) Consecutive layers on each machine, every layer over its GPUs. Little passes
#             between the machines: right for an ordinary network.
#   tensor    Every layer over all GPUs: needs a very fast network. The attention heads must be
#             divisible by their number.
#   data      A copy of attention, router and shared expert on every machine, its own requests for
#             each; the routed experts are spread over all GPUs. For many requests at a time.
set -eu

MODEL=$1 HEAD=$2 NODES=$3 RANK=$4
GPUS=${GPUS:-8}

case ${PARALLEL:-pipeline} in
pipeline) SPREAD="--tensor-parallel-size $GPUS --pipeline-parallel-size $NODES" ;;
tensor) SPREAD="--tensor-parallel-size $((GPUS * NODES))" ;;
data)
    SPREAD="--tensor-parallel-size $GPUS --data-parallel-size $NODES --enable-expert-parallel"
    SPREAD="$SPREAD --data-parallel-address $HEAD --data-parallel-rpc-port 29550"
    ;;
*) echo "PARALLEL is pipeline, tensor or data" >&2 && exit 2 ;;
esac

# All but the head compute and do not answer requests.
[ "$RANK" -eq 0 ] || SPREAD="$SPREAD --headless"

# Multiprocessing needs nothing but vLLM. With a Ray cluster that runs already (`ray start --head` on
# the head, `ray start --address=HEAD:6379` elsewhere) the head alone would be started, with
# --distributed-executor-backend ray instead of the options --nnodes, --node-rank and --master-*.
# shellcheck disable=SC2086 # the options are words
exec "${VLLM:-.venv-vllm/bin/vllm}" serve "$MODEL" \
    --trust-remote-code --model-impl transformers \
    --distributed-executor-backend mp \
    --nnodes "$NODES" --node-rank "$RANK" --master-addr "$HEAD" --master-port 29501 \
    $SPREAD
