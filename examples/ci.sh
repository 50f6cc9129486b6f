#!/usr/bin/env bash
# Distill a student, measure it beside its teacher, and fail with exit code 5 where it is too far away.
set -euo pipefail
STEPS=${STEPS:-300} NUM=${NUM:-300} FID=${FID:-40}

sid distill --teacher emoji-teacher --steps "$STEPS" --output run --quiet
sid sample "a cat on a blue background" --model run --output cat.png --overwrite --quiet
sid eval run --fid --clip --num "$NUM" --fail-above fid="$FID" --json > scores.json
sid export run --format diffusers --output student --overwrite --quiet
