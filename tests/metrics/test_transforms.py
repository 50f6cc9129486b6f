import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import Compose, InterpolationMode, Normalize, ToTensor
from torchvision.transforms.functional import center_crop, resize

from sidcli.metrics.transforms import quantized, square


@pytest.mark.parametrize("size", [32, 100])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (48, 61), (61, 48), (48, 63), (63, 48), (49, 50), (48, 48), (1, 4)])
def test_the_square_is_torchvisions_center_crop_and_lanczos(shape: tuple[int, int], size: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    crop = center_crop(Image.fromarray(image), [min(shape), min(shape)])
    wanted = np.asarray(resize(crop, [size, size], InterpolationMode.LANCZOS))
    made = square(image, size)
    assert made.dtype == np.uint8 and made.flags.writeable
    np.testing.assert_array_equal(made, wanted)


def test_half_pixels_are_rounded_to_even_as_torchvision_does() -> None:
    """Widths of 5 and 7 leave 0.5 and 1.5 pixels on the left of a crop of 4: 0 and 2 of them go."""
    columns = np.arange(7, dtype=np.uint8)[None, :, None].repeat(4, 0).repeat(3, 2)
    assert square(columns[:, :5], 4)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert square(columns, 4)[0, :, 0].tolist() == [2, 3, 4, 5]


def test_63_of_256_values_come_out_one_lower_as_in_gigagans_code() -> None:
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    tensor = Compose([ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])(Image.fromarray(image))
    theirs = ((tensor + 1.0) * 127.5).clamp(0.0, 255.0).byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(quantized(image), theirs)
    assert (image.astype(int) - quantized(image))[..., 0].sum() == 63
