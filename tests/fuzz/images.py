"""Image files of many formats, and mutations that know where their sizes stand."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random

from PIL import Image, PngImagePlugin

from tests.fuzz.raw import bytes_mutated

SIZES = [0, 1, 2, 65535, 2**16, 5999, 6001, 16383, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1]


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def seeds() -> dict[str, bytes]:
    """Small pictures by file name: several formats, modes, frames, EXIF, ICC, text."""
    gradient = Image.linear_gradient("L").resize((16, 12))
    colour = Image.merge("RGB", (gradient, gradient.rotate(180), gradient))
    frames = [colour.rotate(90 * i) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2000, zip=True)
    return {
        "grey.png": _saved(gradient, "PNG"),
        "alpha.png": _saved(colour.convert("RGBA"), "PNG", pnginfo=text),
        "palette.png": _saved(colour.quantize(16), "PNG"),
        "deep.png": _saved(gradient.convert("I;16"), "PNG"),
        "icc.png": _saved(colour, "PNG", icc_profile=b"\0" * 5000),
        "moving.png": _saved(colour, "PNG", save_all=True, append_images=frames[1:]),
        "turned.jpg": _saved(colour, "JPEG", exif=exif),
        "cmyk.jpg": _saved(colour.convert("CMYK"), "JPEG"),
        "steps.jpg": _saved(colour, "JPEG", progressive=True),
        "moving.gif": _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "moving.webp": _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "still.webp": _saved(colour, "WEBP", lossless=True, exif=exif),
        "pages.tif": _saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "packed.tif": _saved(colour, "TIFF", compression="tiff_lzw"),
        "plain.bmp": _saved(colour, "BMP"),
        "plain.ppm": _saved(colour, "PPM"),
        "plain.avif": _saved(colour, "AVIF"),
    }


def mutated(random: Random, name: str, data: bytes) -> bytes:
    """The file changed in some bytes, in its sizes, or into a file of another kind."""
    fate = random.random()
    if fate < 0.5:
        return bytes_mutated(random, data)
    if fate < 0.8:
        return _resized(random, name, data)
    if fate < 0.803:
        return _bomb(random)
    return random.choice(OTHERS)


def _resized(random: Random, name: str, data: bytes) -> bytes:
    """Another width or height in the header, checksums right."""
    size, changed = random.choice(SIZES), bytearray(data)
    kind = name.rsplit(".", 1)[-1]
    if kind == "png":
        changed[(at := 16 + 4 * random.randrange(2)) : at + 4] = struct.pack(">I", size)
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    elif kind == "jpg":
        at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5 + 2 * random.randrange(2)
        changed[at : at + 2] = struct.pack(">H", size % 2**16)
    elif kind == "gif":
        changed[(at := 6 + 2 * random.randrange(2)) : at + 2] = struct.pack("<H", size % 2**16)
    elif kind == "bmp":
        changed[(at := 18 + 4 * random.randrange(2)) : at + 4] = struct.pack("<I", size)
    elif kind == "webp" and b"VP8X" in data:
        at = data.find(b"VP8X") + 12 + 3 * random.randrange(2)
        changed[at : at + 3] = struct.pack("<I", size % 2**24)[:3]
    elif kind == "ppm":
        return data.replace(b"16 12", b"%d %d" % (size, random.choice(SIZES)), 1)
    else:
        return bytes_mutated(random, data, head=200)
    return bytes(changed)


def _bomb(random: Random) -> bytes:
    """A few kilobytes that are 35 megapixels, or claim to be more than that."""
    side = random.choice([5900, 6100])
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * (side * (1 + (side + 7) // 8)))
    chunks = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


OTHERS = [
    b"", b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"BM",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    b"%PDF-1.4\n", b"8BPS\0\1" + b"\0" * 40, b"\0\0\1\0\1\0" + b"\0" * 40,
    b"II*\0\x08\0\0\0\xff\xff",
    b"P6 99999 99999 255\n", b"P3\n2 2\n255\n" + b"1 " * 5, b"\x80\4\x95" + b"\0" * 20, b"PK\3\4",
    b"#!/bin/sh\nexit 1\n", b"\x93NUMPY\1\0" + b"\0" * 40, b"SIMPLE  =                    T",
]  # fmt: skip
