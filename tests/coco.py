"""A stand-in for COCO's validation set of 2014: its layout, file names, sizes and JSON keys, with scenes of the emoji world inside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sidcli.emoji import world
from sidcli.randomness import numpy_generator

SEED = 2014
SIZES = ((640, 480), (640, 480), (480, 640), (333, 500), (427, 640))
CAPTIONS_PER_IMAGE = 5
LICENSE = {
    "url": "http://creativecommons.org/licenses/by-nc-sa/2.0/",
    "id": 1,
    "name": "Attribution-NonCommercial-ShareAlike License",
}


def write_coco(folder: Path, count: int) -> Path:
    """Writes `count` images to folder/val2014 and their captions to folder/annotations/captions_val2014.json; returns `folder`.

    As in the real set, image ids start at 42 with gaps, neither images nor annotations are in the order of ids, and some captions
    end in white space.
    """
    rng = numpy_generator(SEED, "coco")
    image_ids = [int(number) for number in np.cumsum([42, *rng.integers(1, 28, count - 1)])]
    (folder / "val2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    images, annotations = [], []
    annotation_id = 38
    for index, image_id in enumerate(image_ids):
        file_name = f"COCO_val2014_{image_id:012d}.jpg"
        picture = _photo(index)
        picture.save(folder / "val2014" / file_name, quality=90)
        images.append(
            {
                "license": LICENSE["id"],
                "file_name": file_name,
                "coco_url": f"http://images.cocodataset.org/val2014/{file_name}",
                "height": picture.height,
                "width": picture.width,
                "date_captured": "2013-11-14 16:28:13",
                "flickr_url": f"http://farm4.staticflickr.com/3153/{image_id}_z.jpg",
                "id": image_id,
            }
        )
        for text in _captions(index):
            annotation_id += int(rng.integers(1, 9))
            annotations.append({"image_id": image_id, "id": annotation_id, "caption": text})
    content = {
        "info": {
            "description": "A stand-in for the COCO 2014 dataset",
            "url": "http://cocodataset.org",
            "version": "1.0",
            "year": 2014,
            "contributor": "sid",
            "date_created": "2017/09/01",
        },
        "images": [images[i] for i in rng.permutation(len(images))],
        "licenses": [LICENSE],
        "annotations": [annotations[i] for i in rng.permutation(len(annotations))],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def _photo(index: int) -> Image.Image:
    """A scene, enlarged, somewhere on a gradient with noise."""
    rng = numpy_generator(SEED, "photo", index)
    width, height = SIZES[rng.integers(len(SIZES))]
    corners = rng.integers(40, 216, (2, 2, 3), dtype=np.uint8)
    gradient = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    noisy = np.asarray(gradient) + rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    photo = Image.fromarray(noisy)
    side = int(rng.uniform(0.5, 0.9) * min(width, height))
    place = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
    scene = Image.fromarray(world.render(world.scene(SEED, index)))
    photo.paste(scene.resize((side, side), Image.Resampling.BICUBIC), place)
    return photo


def _captions(index: int) -> list[str]:
    """Sentences of the scene; of every seven captions one ends in a line end, one in a space, and one has two spaces inside."""
    scene = world.scene(SEED, index)
    captions = []
    for number in range(index * CAPTIONS_PER_IMAGE, (index + 1) * CAPTIONS_PER_IMAGE):
        text = world.caption(scene, SEED, number, "train").text.capitalize() + "."
        captions.append({0: text + "\n", 1: text + " ", 2: text.replace(" ", "  ", 1)}.get(number % 7, text))
    return captions
