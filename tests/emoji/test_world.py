import hashlib
import re

import numpy as np
import pytest

from sidcli.data.prompts import shipped_folder
from sidcli.emoji import world


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert world.scene(1, 7) == world.scene(1, 7)
    assert len({world.scene(1, index) for index in range(50)} | {world.scene(2, index) for index in range(50)}) == 100


def test_every_noun_and_every_color_is_drawn() -> None:
    assert len(world.NOUN_LIST) >= 150 and len(world.COLOR_LIST) == 10
    scenes = [world.scene(0, index) for index in range(4000)]
    assert {scene.noun for scene in scenes} == set(world.NOUN_LIST)
    assert {scene.color for scene in scenes} == set(world.COLOR_LIST)


def test_held_out_pairs_appear_only_when_asked_for() -> None:
    assert 40 < len(world.HELD_OUT_PAIRS) < 120
    seen = {(scene.noun, scene.color) for scene in (world.scene(0, index) for index in range(3000))}
    held = {(scene.noun, scene.color) for scene in (world.scene(0, index, held_out=True) for index in range(300))}
    assert not seen & world.HELD_OUT_PAIRS
    assert held <= world.HELD_OUT_PAIRS


def test_a_picture_shows_its_background_outside_the_sprite_and_the_sprite_inside() -> None:
    scene = world.Scene("tomato", "blue", 36, 28, 28, False, 1.0)
    pixels = world.render(scene)
    assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8
    assert pixels[0, 0].tolist() == list(world.COLORS["blue"])
    red, green, blue = pixels[46, 46].tolist()
    assert red > 150 and red > 2 * green and red > 2 * blue


def test_a_mirrored_scene_is_the_mirror_image() -> None:
    plain = world.render(world.Scene("snail", "red", 56, 4, 4, False, 1.0))
    mirrored = world.render(world.Scene("snail", "red", 56, 4, 4, True, 1.0))
    assert not np.array_equal(plain, mirrored)
    np.testing.assert_array_equal(plain[:, ::-1], mirrored)


def test_a_caption_names_the_noun_and_the_color_it_promises() -> None:
    for index in range(300):
        scene = world.scene(3, index)
        text, color = world.caption(scene, 3, index, "train")
        assert scene.noun in text or world.plural(scene.noun) in text
        assert color in (None, scene.color)
        assert color is None or color in text


def test_no_caption_belongs_to_both_splits() -> None:
    train = {world.caption(world.scene(0, index), 0, index, "train").text for index in range(2000)}
    held = {world.caption(world.scene(0, index), 0, index, "eval").text for index in range(2000)}
    assert not train & held


def test_captions_are_those_that_the_shipped_models_were_trained_on_and_runs_continue_with() -> None:
    texts = [world.caption(world.scene(5, index), 3, index, split) for split in ("train", "eval") for index in range(-500, 3000)]
    assert (
        hashlib.sha256("".join(f"{text} / {color}\n" for text, color in texts).encode()).hexdigest().startswith("ee9036a1412711ff")
    )


def test_a_caption_that_is_shown_is_correct_english_and_otherwise_the_same() -> None:
    def shown(noun: str) -> set[str]:
        scene = world.Scene(noun, "red", 56, 4, 4, False, 1.0)
        return {world.shown_caption(scene, 0, index, "train") for index in range(600)}

    said = {noun: shown(noun) for noun in ("fries", "bread", "cat")}
    assert {"fries", "these are fries", "some fries", "the fries on a red background", "cute fries on red"} <= said["fries"]
    assert {"this is bread", "bread", "my bread"} <= said["bread"] and "this is a cat" in said["cat"]
    wrong = re.compile(r"\b(an?|one) (\w+ )?(fries|bread)\b|breads|this is fries")
    assert not [text for noun in ("fries", "bread") for text in said[noun] if wrong.search(text.replace(" a red background", ""))]
    scenes = [world.scene(3, index) for index in range(300)]
    plain = [index for index, scene in enumerate(scenes) if scene.noun not in world.PLURAL_NOUNS | world.MASS_NOUNS]
    assert len(plain) > 250
    for index in plain:
        assert world.shown_caption(scenes[index], 3, index, "train") == world.caption(scenes[index], 3, index, "train").text


@pytest.mark.parametrize(("noun", "wanted"), [("cat", "cats"), ("mouse", "mice"), ("fox", "foxes"), ("butterfly", "butterflies")])
def test_plurals_are_english(noun: str, wanted: str) -> None:
    assert world.plural(noun) == wanted


def test_the_shipped_list_holds_captions_of_the_evaluation_split() -> None:
    lines = (shipped_folder() / "emoji.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1000
    assert all(world.in_split(line, "eval") for line in lines)
