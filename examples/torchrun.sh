#!/bin/sh
# One conversion by the ranks of torchrun: sh examples/torchrun.sh SRC DST [OPTIONS]
# On several nodes the same line runs on each, with torchrun's own options in TORCHRUN_OPTIONS, such as
# "--nnodes 4 --node-rank 0 --master-addr node0 --master-port 29500 --nproc-per-node 1".
set -eu
KCONVERT=${KCONVERT:-kconvert}
TORCHRUN=${TORCHRUN:-torchrun}
COMMAND=${COMMAND:-int4-to-bf16}

# torchrun ends all ranks when one fails, and starts them again as often as it is told; each goes on from what it had.
# shellcheck disable=SC2086
"$TORCHRUN" ${TORCHRUN_OPTIONS:---standalone --nproc-per-node 2} --max-restarts 3 --no-python \
    "$KCONVERT" "$COMMAND" "$@" --worker torchrun --finalize-when-complete
