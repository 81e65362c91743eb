"""From the bytes of an image file to uint8 pixels of the size that the model takes, on the host.

For training a random crop, fast; for evaluation what timm does, exactly. Both take the pixels as they are stored: EXIF
orientation is ignored, as in timm and TensorFlow, with which published accuracies were measured.

Axes: h and w height and width, c channels (1 grey, 3 RGB).
"""

import dataclasses
import io
import math

import cv2
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

INTERPOLATIONS = ("bilinear", "bicubic", "random")
EVAL_MODES = ("center", "squash")

_MODES = {1: "L", 3: "RGB"}
_FLAGS = {  # OpenCV's, for decoding at 1/n of the size to so many channels; the reduced colours come as BGR
    (1, 1): cv2.IMREAD_GRAYSCALE, (2, 1): cv2.IMREAD_REDUCED_GRAYSCALE_2, (4, 1): cv2.IMREAD_REDUCED_GRAYSCALE_4,
    (8, 1): cv2.IMREAD_REDUCED_GRAYSCALE_8, (1, 3): cv2.IMREAD_COLOR_RGB, (2, 3): cv2.IMREAD_REDUCED_COLOR_2,
    (4, 3): cv2.IMREAD_REDUCED_COLOR_4, (8, 3): cv2.IMREAD_REDUCED_COLOR_8,
}  # fmt: skip


def random_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: a uniform part of the area, a log-uniform ratio width / height.

    After ten boxes that do not fit, the largest one in the middle whose ratio is allowed ('Going deeper with
    convolutions', section 6; the ratio's range is timm's).
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            return (int(rng.integers(height - box_height + 1)), int(rng.integers(width - box_width + 1)),
                    box_height, box_width)
    box_height = min(height, max(1, round(width / ratio[0])))
    box_width = min(width, max(1, round(height * ratio[1])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resize(pixels: UInt8[np.ndarray, "h w c"], size: int, interpolation: str) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Bilinear or bicubic, antialiased: about what PIL's filters, which widen with the shrinking, give, in a third of
    the time (mean difference 1 grey level, where PIL's two filters differ by 1.3).

    OpenCV's filters do not widen, so a narrow one first takes away the variance that they lack, (r² - 1) / 6 for
    shrinking by r; shrinking by more than 2 averages areas.
    """
    shrink = [side / size for side in pixels.shape[:2]]
    if max(shrink) > 2:
        method = cv2.INTER_AREA
    else:
        method = cv2.INTER_CUBIC if interpolation == "bicubic" else cv2.INTER_LINEAR
        if max(shrink) > 1:
            tails = [max(0.0, r * r - 1) / 12 for r in shrink]
            rows, columns = (np.array([tail, 1 - 2 * tail, tail], np.float32) for tail in tails)
            pixels = cv2.sepFilter2D(pixels, -1, columns, rows, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(pixels, (size, size), interpolation=method).reshape(size, size, -1)


def open_image(data: bytes) -> Image.Image:
    """The image, not yet decoded. Raises ValueError if it is none that PIL knows."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise ValueError(f"no image: {len(data)} bytes that begin with {data[:8]!r}") from error


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """An opened image as grey (1 channel) or RGB (3), 8 bits; of 16-bit ones the upper 8. Decodes it.

    Raises OSError and others of PIL's errors if the file is damaged.
    """
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip at 255
        values = np.asarray(image, np.int64)
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(_MODES[channels])


@dataclasses.dataclass(frozen=True)
class TrainCrop:
    """A random crop of an encoded image, resized to `size` × `size`; see `random_box` and `resize`."""

    size: int
    channels: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str

    def __call__(self, data: bytes, rng: np.random.Generator) -> UInt8[np.ndarray, "size size c"]:
        """Raises ValueError, or an error of PIL's, if `data` is no whole image."""
        image = open_image(data)
        width, height = image.size
        top, left, box_height, box_width = random_box(height, width, self.scale, self.ratio, rng)
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = INTERPOLATIONS[rng.integers(2)]

        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size in much less time; the box then grows to whole pixels.
        reduced = max(n for n in (1, 2, 4, 8) if n == 1 or min(box_height, box_width) >= n * self.size)
        pixels = None
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            flags = _FLAGS[reduced, self.channels] | cv2.IMREAD_IGNORE_ORIENTATION
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        if pixels is None:  # another format, or damaged: PIL then says how
            pixels, reduced = np.asarray(to_mode(image, self.channels)), 1
        pixels = pixels.reshape(*pixels.shape[:2], self.channels)
        bottom, right = -(-(top + box_height) // reduced), -(-(left + box_width) // reduced)
        crop = resize(pixels[top // reduced : bottom, left // reduced : right], self.size, interpolation)
        return np.ascontiguousarray(crop[..., ::-1]) if reduced > 1 and self.channels == 3 else crop


@dataclasses.dataclass(frozen=True)
class EvalCrop:
    """The middle of an encoded image, `size` × `size`, as timm's evaluation takes it: bicubic with antialiasing.

    'center' makes the short side size / crop long, 'squash' both sides.
    """

    size: int
    channels: int
    crop: float
    mode: str

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> UInt8[np.ndarray, "size size c"]:
        """Raises ValueError, or an error of PIL's, if `data` is no whole image."""
        image = to_mode(open_image(data), self.channels)
        side = math.floor(self.size / self.crop)
        width, height = image.size
        if self.mode == "squash":
            width, height = side, side
        elif width < height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        pixels = np.asarray(image.crop((left, top, left + self.size, top + self.size)))
        return pixels.reshape(self.size, self.size, -1)


def train_crop(config: ConfigDict) -> TrainCrop:
    """As config.data says. Raises ValueError for what cannot be."""
    data = config.data
    for name in ("crop_scale", "crop_ratio"):
        low, high = data[name]
        if not 0 < low <= high or (name == "crop_scale" and high > 1):
            raise ValueError(f"config.data.{name}={data[name]}: expected 0 < low <= high"
                             f"{' <= 1' if name == 'crop_scale' else ''}")
    if data.interpolation not in INTERPOLATIONS:
        raise ValueError(f"config.data.interpolation={data.interpolation!r}: expected one of {INTERPOLATIONS}")
    return TrainCrop(data.image_size, config.model.in_chans, tuple(data.crop_scale), tuple(data.crop_ratio),
                     data.interpolation)


def eval_crop(config: ConfigDict) -> EvalCrop:
    """As config.data says. Raises ValueError for what cannot be."""
    data = config.data
    if not 0 < data.eval_crop <= 1:
        raise ValueError(f"config.data.eval_crop={data.eval_crop}: expected more than 0 and at most 1, the part of the "
                         "image that is seen")
    if data.eval_mode not in EVAL_MODES:
        raise ValueError(f"config.data.eval_mode={data.eval_mode!r}: expected one of {EVAL_MODES}")
    return EvalCrop(data.image_size, config.model.in_chans, data.eval_crop, data.eval_mode)
