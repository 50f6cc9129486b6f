#!/usr/bin/env bash
# From the built-in teacher of sheets to a one-step student that draws the subject of a reference image in another scene.
set -euo pipefail
SHEETS=${SHEETS:-1000} STEPS=${STEPS:-600} NUM=${NUM:-300}

sid distill --teacher emoji-sheets --objective self-distillation --set sheets="$SHEETS" --steps "$STEPS" --output subject --quiet
sid distill --teacher subject --steps "$STEPS" --output subject-one-step --quiet
python -c "
from PIL import Image
from sidcli.emoji.identities import render, unknown
Image.fromarray(render(unknown(0).panels[0])).save('reference.png')
"
sid sample "a lobster on a yellow background" --reference reference.png --model subject-one-step --output subject.png --overwrite --quiet
sid eval subject subject-one-step --identity --num "$NUM"
