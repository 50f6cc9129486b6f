#!/usr/bin/env bash
# Distill a student, measure it, and fail with exit code 5 where it does not draw what it is asked for.
set -euo pipefail
STEPS=${STEPS:-300} NUM=${NUM:-300} CLIP=${CLIP:-0.8}

sid distill --teacher emoji-teacher --steps "$STEPS" --output run --quiet
sid sample "a cat on a blue background" --model run --output cat.png --overwrite --quiet
sid eval run --clip --accuracy --num "$NUM" --fail-below clip="$CLIP" --json > scores.json
sid export run --format diffusers --output student --overwrite --quiet
