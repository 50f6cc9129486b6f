"""Distill a student, evaluate it, generate images with it and export it, from Python instead of the command line.

python examples/distill.py [FOLDER] [STEPS] [IMAGES]
"""

import sys
from pathlib import Path

from sidcli import distill, evaluate, export, load, sample


def main(folder: Path, steps: int, images: int) -> None:
    result = distill("emoji-teacher", folder / "run", steps=steps, objective="sid", guidance=2.0)
    print(f"{result.step} steps in {result.seconds:.0f} s: {result.student}")

    outcome = evaluate(["emoji-teacher,steps=10", str(result.run)], ["fid", "clip", "accuracy"], num=images)
    header, rows = outcome.table()
    for row in [header, *rows]:
        print("  ".join(row))

    student = load(str(result.run))  # once, for as many calls as you like
    drawn = sample(["a cat on a blue background", "a red car"], student, num=2)
    for index, image in enumerate(drawn.images):
        image.save(folder / f"{index}.png")

    exported = export(str(result.run), folder / "student", "diffusers", overwrite=True)
    print(f"{exported.folder}: at most {exported.difference}/255 from what sid draws")


if __name__ == "__main__":
    place, steps, images = [*sys.argv[1:], *["python-example", "300", "300"][len(sys.argv) - 1 :]]
    Path(place).mkdir(parents=True, exist_ok=True)
    main(Path(place), int(steps), int(images))
