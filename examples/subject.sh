#!/usr/bin/env bash
# From the built-in teacher to a one-step student that draws the subject of a reference image in another scene: a teacher that draws
# sheets, pairs of panels, a model that takes a reference image, its student. Each command continues where it was interrupted.
set -euo pipefail
TEACHING=${TEACHING:-16500} SHEETS=${SHEETS:-8000} STEPS=${STEPS:-3000} NUM=${NUM:-300}

python -m sidcli.emoji.train sheets --steps "$TEACHING" --output build
sid distill --teacher build/sheets --objective self-distillation --set sheets="$SHEETS" --set shared_noise=0.8 --steps "$STEPS" --output subject --quiet
sid distill --teacher subject --steps "$STEPS" --output subject-one-step --quiet
python -c "
from PIL import Image
from sidcli.emoji.identities import render, unknown
Image.fromarray(render(unknown(0).panels[0])).save('reference.png')
"
sid sample "a lobster on a yellow background" --reference reference.png --model subject-one-step --output subject.png --overwrite --quiet
sid eval subject subject-one-step --identity --num "$NUM"
