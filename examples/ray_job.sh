#!/bin/sh
# One conversion by the nodes of a Ray cluster: sh examples/ray_job.sh SRC DST [OPTIONS] on a machine of it, or from elsewhere
# ray job submit --address http://HEAD:8265 --working-dir examples -- sh ray_job.sh SRC DST [OPTIONS]
# SRC and DST are whole paths that all nodes see. Started again, it goes on from what is finished.
set -eu
KCONVERT=${KCONVERT:-kconvert}
COMMAND=${COMMAND:-int4-to-bf16}

"$KCONVERT" "$COMMAND" "$@" --engine ray
