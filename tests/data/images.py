"""Encoded images for tests: cut from scikit-learn's two photographs, and every odd kind that a dataset may hold."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photographs() -> list[Image.Image]:
    """Both photographs, 640×427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Cuts of the photographs of 60 to 400 pixels a side, as JPEGs."""
    rng = np.random.default_rng(seed)
    originals, files = photographs(), []
    for i in range(count):
        width, height = rng.integers(60, 400, 2)
        left, top = rng.integers(640 - width), rng.integers(427 - height)
        files.append(encoded(originals[i % 2].crop((left, top, left + width, top + height)), quality=92))
    return files


def plain(kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (90, 60), **options) -> bytes:
    """One colour: (200, 100, 50), or the grey of it, in any mode."""
    image = Image.new("RGB", size, (200, 100, 50)).convert(mode, palette=Image.Palette.ADAPTIVE)
    return encoded(image, kind, **options)


def odd() -> dict[str, tuple[bytes, tuple[int, int, int]]]:
    """Files that must be read, and the colour that each is all over."""
    orange, grey = (200, 100, 50), (124, 124, 124)
    deep = Image.fromarray(np.full((60, 90), 30_000, np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return {
        "jpeg": (plain(), orange), "cmyk jpeg": (plain(mode="CMYK"), orange), "grey jpeg": (plain(mode="L"), grey),
        "progressive jpeg": (plain(progressive=True), orange), "exif jpeg": (plain(exif=exif), orange),
        "palette png": (plain("PNG", "P"), orange), "rgba png": (plain("PNG", "RGBA"), orange),
        "grey png": (plain("PNG", "L"), grey), "bits png": (encoded(Image.new("1", (9, 6), 1), "PNG"), (255,) * 3),
        "16-bit png": (encoded(deep, "PNG"), (117,) * 3), "gif": (plain("GIF", "P"), orange),
        "webp": (plain("WEBP", lossless=True), orange), "bmp": (plain("BMP"), orange),
        "1x1 jpeg": (plain(size=(1, 1)), orange), "1x1 png": (plain("PNG", size=(1, 1)), orange),
        "1x300 png": (plain("PNG", size=(1, 300)), orange), "300x1 jpeg": (plain(size=(300, 1)), orange),
        "large jpeg": (plain(size=(3000, 2000)), orange),
    }  # fmt: skip


def damaged() -> dict[str, tuple[bytes, str]]:
    """Files that cannot be read, and what is to be said of each."""
    whole, png = jpegs(1)[0], encoded(photographs()[0].crop((0, 0, 90, 60)), "PNG")
    return {
        "zero bytes": (b"", "no image: 0 bytes"), "text": (b"<html>not found", "no image: 15 bytes that begin with"),
        "truncated jpeg": (whole[: len(whole) // 2], "truncated"),
        "jpeg without its end": (whole[:-20], "truncated"), "head of a jpeg": (whole[:30], "no image|runcated"),
        "truncated png": (png[: len(png) // 2], "truncated"),
    }  # fmt: skip
