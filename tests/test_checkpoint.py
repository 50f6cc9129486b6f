from pathlib import Path

import pytest
import torch

from sidcli import checkpoint
from sidcli.errors import EnvironmentProblem, InputError


def files(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"w": torch.full((3,), value)}, "average": {"w": torch.full((2,), value)}}


def write(root: Path, step: int) -> Path:
    return checkpoint.write(root, step, files(step), {"lr": 1.0}, "digest")


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found, problems = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5 and found.config == {"lr": 1.0} and not problems
    assert checkpoint.read(found)["generator"]["w"].tolist() == [5.0] * 3


@pytest.mark.check(8)
def test_only_the_newest_two_are_kept_in_numeric_order_and_foreign_folders_stay(tmp_path: Path) -> None:
    (tmp_path / "step-999").mkdir()
    (tmp_path / "notes").mkdir()
    for step in (9, 10, 100):
        write(tmp_path, step)
    assert sorted(checkpoint.numbered(tmp_path)) == [10, 100]
    assert (tmp_path / "step-999").is_dir() and (tmp_path / "notes").is_dir()


@pytest.mark.check(6)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_skipped_with_its_name_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / ("manifest.json" if damage == "manifest" else "generator.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(content[:-3] if damage in ("cut", "manifest") else content)
    found, problems = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 1
    assert len(problems) == 1 and "step-00000002" in problems[0]
    with pytest.raises(InputError):
        checkpoint.verify(tmp_path / "step-00000002")


@pytest.mark.check(5)
def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_half_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(EnvironmentProblem, match="No space left"):
        write(tmp_path, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 7'))
    with pytest.raises(InputError, match="format 7"):
        checkpoint.verify(manifest.parent)
