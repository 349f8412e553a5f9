#!/bin/sh
# `make demo`: a small Kimi-K2-shaped INT4 checkpoint, converted to BF16 and verified.
set -eu
BIN=${BIN:-.venv/bin}
DIR=$(mktemp -d)
trap 'rm -rf "$DIR"' EXIT

bold=""; plain=""
if [ -t 1 ]; then bold=$(printf "\033[1m"); plain=$(printf "\033[0m"); fi
say() { printf "\n%s$ kconvert %s%s\n" "$bold" "$*" "$plain"; "$BIN/kconvert" "$@"; }

say sample "$DIR/int4" --layers 4 --experts 32 --hidden 1024 --moe-intermediate 512 --vocab 8192 --shard-size 200MB
say inspect "$DIR/int4"
say int4-to-bf16 "$DIR/int4" "$DIR/bf16" --dry-run --shard-size 200MB
say int4-to-bf16 "$DIR/int4" "$DIR/bf16" --shard-size 200MB
say verify "$DIR/int4" "$DIR/bf16"
printf '\n'
ls -lh "$DIR/bf16"
