import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from sidcli.errors import EnvironmentProblem, InputError
from sidcli.files import check_space
from sidcli.training import checkpoint


def files(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"generator": {"w": torch.full((3,), value)}, "average": {"w": torch.full((2,), value)}}


def write(root: Path, step: int) -> Path:
    return checkpoint.write(root, step, files(step), {"lr": 1.0}, {"prompts": "digest"})


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path, 5)
    found, problems = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 5 and found.config == {"lr": 1.0} and not problems
    assert checkpoint.read(found)["generator"]["w"].tolist() == [5.0] * 3


@pytest.mark.check(7)
def test_a_flipped_bit_that_leaves_the_sense_of_a_manifest_is_seen_all_the_same(tmp_path: Path) -> None:
    folder = checkpoint.write(tmp_path, 1, files(1), {"lr": 1e-5}, {})
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace("1e-05", "1E-05"))
    with pytest.raises(InputError, match=r"manifest\.json is damaged"):
        checkpoint.verify(folder)


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


def rewritten(folder: Path, **changes: object) -> None:
    """Another version's manifest: a whole one, with its own digest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest |= changes
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest}, indent=2) + "\n")


def test_a_checkpoint_of_another_version_is_refused_and_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    rewritten(newest, format=7)
    for look in (lambda: checkpoint.verify(newest), lambda: checkpoint.latest(tmp_path)):
        with pytest.raises(checkpoint.UnknownFormat, match="format 7; this version of sid reads formats 3 and 4"):
            look()
    (newest / "manifest.json").write_text('{"format": 1, "step": 2}')
    with pytest.raises(checkpoint.UnknownFormat, match="format 1"):
        checkpoint.latest(tmp_path)


@pytest.mark.check(6)
@pytest.mark.parametrize("damage", ["cut", "missing", "empty"])
def test_whatever_file_of_the_newest_checkpoint_is_not_whole_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    folder = write(tmp_path, 2)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
        found, problems = checkpoint.latest(tmp_path)
        assert found is not None and found.step == 1
        assert len(problems) == 1 and file.name in problems[0]
        with pytest.raises(InputError) as refused:
            checkpoint.verify(folder)
        assert refused.value.exit_code == 3
        file.write_bytes(whole)
    assert checkpoint.latest(tmp_path) == (checkpoint.verify(folder), [])


@pytest.mark.check(8)
def test_what_was_set_aside_is_no_longer_the_newest_and_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    for _ in range(2):
        aside = checkpoint.set_aside(tmp_path, 1)
        assert len(aside) == 1 and aside[0].name.startswith("set-aside-step-00000002")
        write(tmp_path, 2)
    for step in (3, 4):
        write(tmp_path, step)
    names = sorted(folder.name for folder in tmp_path.iterdir())
    assert names == ["set-aside-step-00000002", "set-aside-step-00000002-1", "step-00000003", "step-00000004"]


@pytest.mark.check(8)
def test_steps_beyond_eight_digits_keep_their_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 100_000_001):
        write(tmp_path, step)
    assert sorted(checkpoint.numbered(tmp_path)) == [100_000_000, 100_000_001]


@pytest.mark.check(8)
def test_a_folder_whose_name_says_another_step_than_its_manifest_is_not_the_newest(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    found, problems = checkpoint.latest(tmp_path)
    assert found is not None and found.step == 2
    assert problems == [f"{tmp_path / 'step-00000003'} holds step 1, whatever its name says"]


def writer(root: Path) -> checkpoint.Writer:
    return checkpoint.Writer(root, {"lr": 1.0}, {"prompts": "digest"})


def test_a_checkpoint_begun_in_a_block_is_there_after_it_even_where_an_error_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), writer(tmp_path) as ours:
        ours.write(1, files(1))
        raise ZeroDivisionError
    assert checkpoint.verify(tmp_path / "step-00000001").step == 1


@pytest.mark.check(5)
def test_a_write_that_fails_behind_the_training_stops_it_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = writer(tmp_path)
    ours.write(1, files(1))
    ours.finish()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    ours.write(2, files(2))
    with pytest.raises(EnvironmentProblem, match="No space left"):
        ours.write(3, files(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.check(5)
def test_a_disk_too_small_is_told_with_what_is_free_and_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=r"has [\d.e+]+ GB of disk space free; 3 checkpoints need 3e\+09 GB") as refused:
        check_space(tmp_path / "not" / "yet", 3 * 10**18, "3 checkpoints need")
    assert refused.value.exit_code == 4 and not (tmp_path / "not").exists()
