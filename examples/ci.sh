#!/usr/bin/env bash
# Distill a student, evaluate it, and exit with code 5 if its CLIP score is below $CLIP.
set -euo pipefail
STEPS=${STEPS:-300} NUM=${NUM:-300} CLIP=${CLIP:-0.8}

sid distill --teacher emoji-teacher --steps "$STEPS" --output run --quiet
sid sample "a cat on a blue background" --model run --output cat.png --overwrite --quiet
sid eval run --clip --accuracy --num "$NUM" --fail-below clip="$CLIP" --json > scores.json
sid export run --format diffusers --output student --overwrite --quiet
