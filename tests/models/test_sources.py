"""What a model's name stands for: a path on this disk, whether it is there or misspelled, or an id of the hub."""

import os
from pathlib import Path

import pytest

from sidcli.errors import InputError
from sidcli.models import sources
from sidcli.models.hub import Fetched
from sidcli.models.sources import find, fingerprint


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that the hub is asked for; the hub itself stays out of it."""
    ids: list[str] = []

    def fetch(name: str, *_: object) -> Fetched:
        ids.append(name)
        return Fetched(tmp_path, name, "commit")

    monkeypatch.setattr(sources, "fetch", fetch)
    (tmp_path / "models" / "first").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return ids


@pytest.mark.parametrize("name", ["someone/sd", "someone/sd-v1.5", "some.one/s_d@main", "models/first@v1/x", "runs/x@main"])
def test_owner_and_name_are_an_id_of_the_hub(name: str, asked: list[str]) -> None:
    assert find(name).origin.startswith("hub:") and asked == [name]


def test_a_teacher_that_does_not_ship_is_refused_with_the_command_that_trains_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="emoji-flow does not ship with sid") as caught:
        find("emoji-flow")
    assert "python -m sidcli.emoji.train flow --output build/emoji" in caught.value.hint
    (tmp_path / "emoji-flow").mkdir()  # the working directory
    with pytest.raises(InputError, match="emoji-flow holds neither"):
        find("emoji-flow")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("x/model.safetensors", "pass a path"),
        ("x/model.SAFETENSORS", "pass a path"),
        ("x/model.ckpt", "pass a path"),
        ("x/config.json", "pass a path"),
        ("runs/typo", "pass a path"),
        ("models/frist", "did you mean models/first?"),
        ("models/second", "a model of that name on the hub is models/second@main"),
        ("a/b/c", "pass a path"),
        ("./x", "pass a path"),
        ("/x/y", "check the path"),
        ("~nobody-of-that-name/x", "pass a path"),
        ("emoji-techer", "did you mean emoji-teacher?"),
        ("", "pass a path"),
        ("é/ü", "pass a path"),
        ("x" * 5000, "pass a path"),
        ("a\0b", "pass a path"),
    ],
    ids=range(16),
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str, hint: str, asked: list[str]) -> None:
    with pytest.raises(InputError, match="there is no such file or folder") as caught:
        find(name)
    assert hint in caught.value.hint and asked == []


def test_a_link_to_nowhere_says_where_it_leads(asked: list[str]) -> None:
    os.symlink("gone", "models/link")
    with pytest.raises(InputError, match="models/link is a link to gone, which is not there"):
        find("models/link")
    assert asked == []


def test_the_ending_of_a_file_is_read_in_any_case(asked: list[str]) -> None:
    for name in ("a.SAFETENSORS", "b.SafeTensors"):
        Path(name).write_bytes(b"")
        assert find(name).is_file
    for name in ("a.CKPT", "b.Pkl"):
        Path(name).write_bytes(b"")
        with pytest.raises(InputError, match="can run code"):
            find(name)


def test_a_description_beside_a_file_belongs_to_what_it_draws_with() -> None:
    Path("a.safetensors").write_bytes(b"weights")
    alone = fingerprint(find("a.safetensors"))
    Path("a.yaml").write_text("model: {params: {parameterization: v}}")
    beside = fingerprint(find("a.safetensors"))
    Path("a.yaml").write_text("model: {params: {parameterization: eps}}")
    assert len({alone, beside, fingerprint(find("a.safetensors"))}) == 3
