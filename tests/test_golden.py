"""Results stay what they were: see tests/golden.py."""

from pathlib import Path

import pytest

from sidcli.files import read_json
from tests import golden

RECORD = read_json(golden.RECORD)


@pytest.mark.parametrize("steps", [golden.FEW, pytest.param(golden.STEPS, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", golden.SETTINGS)
def test_steps_end_as_they_were_recorded(name: str, steps: int, tmp_path: Path) -> None:
    same_machine, wanted = golden.machine() == RECORD["machine"], RECORD["runs"][name]
    found = golden.run(name, tmp_path, steps if same_machine else 1)
    if same_machine:
        assert found["measured"] == {key: values[:steps] for key, values in wanted["measured"].items()}
        assert found["gradient_norms"] == wanted["gradient_norms"][: len(found["gradient_norms"])]
        assert found["states"][steps] == wanted["states"][str(steps)]
    else:
        for key, values in wanted["measured"].items():
            assert found["measured"][key][0] == pytest.approx(values[0], rel=1e-3, abs=1e-3), key
        assert found["gradient_norms"][:2] == pytest.approx(wanted["gradient_norms"][:2], rel=1e-2)
