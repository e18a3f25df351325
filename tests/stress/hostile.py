"""Hostile images and texts, each a function of its number alone.

``image(i)`` and ``text(i)`` never end; a test tries as many as it is given.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image


class Hostile(NamedTuple):
    """A file's bytes or a text, and how it was made."""

    kind: str
    data: bytes | str


# --- sound files ---------------------------------------------------------------


def picture(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """A smooth RGB picture with some grain."""
    coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(0, 24, (height, width, 3), dtype=np.uint8)
    return Image.fromarray((np.asarray(smooth) // 8 * 7 + grain).astype(np.uint8))


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def _grey16(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)


def _unit_floats(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture.convert("L"), np.float32) / 255)


def _with_alpha(picture: Image.Image) -> Image.Image:
    found = picture.copy()
    found.putalpha(Image.linear_gradient("L").resize(picture.size))
    return found


def _in_mode(mode: str) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.convert(mode)


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _palette(picture: Image.Image) -> Image.Image:
    return picture.quantize(40)


# Name -> how the picture is prepared, format, options.
SOUND: dict[str, tuple[Callable, str, dict]] = {
    "jpeg": (_same, "JPEG", {"quality": 90}),
    "jpeg progressive": (_same, "JPEG", {"progressive": True}),
    "jpeg grey": (_in_mode("L"), "JPEG", {}),
    "jpeg cmyk": (_in_mode("CMYK"), "JPEG", {}),
    "png": (_same, "PNG", {}),
    "png grey": (_in_mode("L"), "PNG", {}),
    "png 1 bit": (_in_mode("1"), "PNG", {}),
    "png 16 bits": (_grey16, "PNG", {}),
    "png alpha": (_with_alpha, "PNG", {}),
    "png grey alpha": (_in_mode("LA"), "PNG", {}),
    "png palette": (_palette, "PNG", {}),
    "png palette, clear": (_palette, "PNG", {"transparency": bytes(range(40))}),
    "gif": (_palette, "GIF", {}),
    "gif clear": (_palette, "GIF", {"transparency": 3}),
    "webp": (_same, "WEBP", {}),
    "webp lossless alpha": (_with_alpha, "WEBP", {"lossless": True}),
    "avif": (_same, "AVIF", {"speed": 10}),
    "tiff": (_same, "TIFF", {}),
    "tiff lzw": (_same, "TIFF", {"compression": "tiff_lzw"}),
    "tiff deflate": (_same, "TIFF", {"compression": "tiff_adobe_deflate"}),
    "tiff packbits": (_palette, "TIFF", {"compression": "packbits"}),
    "tiff jpeg": (_same, "TIFF", {"compression": "jpeg"}),
    "tiff group 4": (_in_mode("1"), "TIFF", {"compression": "group4"}),
    "tiff 16 bits": (_grey16, "TIFF", {}),
    "tiff floats": (_unit_floats, "TIFF", {}),
    "tiff cmyk": (_in_mode("CMYK"), "TIFF", {}),
    "tiff lab": (_in_mode("LAB"), "TIFF", {}),
    "bmp": (_same, "BMP", {}),
    "ppm": (_same, "PPM", {}),
    "pgm 16 bits": (_grey16, "PPM", {}),
    "tga": (_same, "TGA", {}),
    "ico": (lambda p: _with_alpha(p.resize((32, 32))), "ICO", {"sizes": [(32, 32)]}),
    "icns": (lambda p: p.resize((32, 32)), "ICNS", {}),
    "jpeg 2000": (_same, "JPEG2000", {}),
    "pcx": (_same, "PCX", {}),
    "sgi": (_same, "SGI", {}),
    "dds": (_with_alpha, "DDS", {}),
    "qoi": (_same, "QOI", {}),
}
ANIMATED = ("GIF", "PNG", "WEBP", "TIFF")
TURNED = ("JPEG", "PNG", "WEBP", "TIFF")
TURN = 6  # the orientation that a broken EXIF block once had
SHAPES = ((33, 47), (1, 90), (90, 1), (1, 1), (64, 20), (17, 200))


@functools.cache
def sound(name: str, variant: int) -> bytes:
    """One of a few files of that name, as an encoder wrote it."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), variant])
    prepare, format, options = SOUND[name]
    shape = SHAPES[variant] if variant < len(SHAPES) else (40, 60)
    return encoded(prepare(picture(*shape, rng)), format, **options)


def animated(rng) -> Hostile:
    format = str(rng.choice(ANIMATED))
    frames = [picture(24, 36, rng).quantize(16).convert("RGB") for _ in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    more = {"save_all": True, "append_images": frames[1:], **options}
    return Hostile(f"animated {format}", encoded(frames[0], format, **more))


def turned(rng) -> Hostile:
    """Any of the eight orientations, and numbers that are none."""
    format, exif = str(rng.choice(TURNED)), Image.Exif()
    exif[0x0112] = int(rng.integers(0, 11))
    return Hostile(f"turned {format}", encoded(picture(30, 44, rng), format, exif=exif))


def broken_exif(rng) -> Hostile:
    format = str(rng.choice(TURNED[:3]))
    exif = Image.Exif()
    exif[0x0112] = TURN
    exif[0x010E] = "a description of some length"
    block = bytearray(exif.tobytes())
    for _ in range(int(rng.integers(1, 6))):
        block[int(rng.integers(6, len(block)))] = int(rng.integers(256))
    block = bytes(block[: int(rng.integers(6, len(block) + 1))])
    return Hostile(f"exif {format}", encoded(picture(30, 44, rng), format, exif=block))


def wide(rng) -> Hostile:
    """20,000 pixels along one side, seldom more than one along the other."""
    format = str(rng.choice(["PNG", "JPEG", "TIFF", "GIF", "BMP"]))
    sides = [20_000, int(rng.choice([1, 1, 2, 60]))]
    rng.shuffle(sides)
    colour = tuple(rng.integers(0, 256, 3).tolist())
    found = Image.new("RGB", (sides[0], sides[1]), colour)
    return Hostile(f"wide {format}", encoded(found, format))


# --- damage --------------------------------------------------------------------


def truncated(data: bytearray, rng) -> bytearray:
    return data[: int(rng.integers(len(data)))]


def flipped_head(data: bytearray, rng) -> bytearray:
    return _flipped(data, rng, min(len(data), 64))


def flipped_body(data: bytearray, rng) -> bytearray:
    return _flipped(data, rng, len(data))


def _flipped(data: bytearray, rng, below: int) -> bytearray:
    for at in rng.integers(0, below, int(rng.integers(1, 8))).tolist():
        data[at] ^= int(rng.integers(1, 256))
    return data


def zeroed(data: bytearray, rng) -> bytearray:
    start = int(rng.integers(len(data)))
    data[start : start + 40] = bytes(len(data[start : start + 40]))
    return data


def cut_out(data: bytearray, rng) -> bytearray:
    start = int(rng.integers(len(data)))
    del data[start : start + int(rng.integers(1, 60))]
    return data


def followed(data: bytearray, rng) -> bytearray:
    """Two files in one."""
    return data + _any_sound(rng).data


def preceded(data: bytearray, rng) -> bytearray:
    return bytearray(rng.bytes(int(rng.integers(1, 20)))) + data


def spliced(data: bytearray, rng) -> bytearray:
    """The beginning of one file, the end of another."""
    other = _any_sound(rng).data
    return data[: len(data) // 2] + other[len(other) // 2 :]


def random_after_magic(data: bytearray, rng) -> bytearray:
    return data[:16] + bytearray(rng.bytes(200))


DAMAGE = (
    truncated,
    truncated,
    flipped_head,
    flipped_head,
    flipped_body,
    flipped_body,
    zeroed,
    cut_out,
    followed,
    preceded,
    spliced,
    random_after_magic,
)


def _any_sound(rng) -> Hostile:
    name = str(rng.choice(list(SOUND)))
    return Hostile(name, sound(name, int(rng.integers(len(SHAPES) + 2))))


def damaged(rng) -> Hostile:
    kind, data = _any_sound(rng)
    damage = DAMAGE[int(rng.integers(len(DAMAGE)))]
    return Hostile(f"{damage.__name__} {kind}", bytes(damage(bytearray(data), rng)))


def noise(rng) -> Hostile:
    length = int(rng.choice([0, 1, 2, 8, 100, 3000]))
    fill = rng.bytes(length) if rng.random() < 0.7 else bytes(length)
    return Hostile("noise", fill)


def image(i: int) -> Hostile:
    """Hostile file number ``i``."""
    rng = np.random.default_rng([1, i])
    makers = (damaged, _any_sound, turned, broken_exif, animated, noise, wide)
    shares = (0.7, 0.1, 0.06, 0.05, 0.03, 0.04, 0.02)
    return makers[int(rng.choice(len(makers), p=shares))](rng)


# --- bombs ---------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">L", len(data)) + body + struct.pack(">L", zlib.crc32(body))


def png(width: int, height: int, *, colour=0, bits=1, more=b"", lines=None) -> bytes:
    """A black PNG of which no pixel is ever held here; ``lines`` fewer than claimed."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = bytes(1 + (width * bits * channels + 7) // 8)
    packer, parts = zlib.compressobj(9), []
    for _ in range(height if lines is None else lines):
        parts.append(packer.compress(line))
    head = struct.pack(">LLBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = png_chunk(b"PLTE", bytes(6)) if colour == 3 else b""
    pixels = b"".join([*parts, packer.flush()])
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", head),
            palette,
            more,
            png_chunk(b"IDAT", pixels),
            png_chunk(b"IEND", b""),
        ]
    )


def deflated(n_bytes: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(2**20)
    parts = [packer.compress(block) for _ in range(n_bytes // 2**20)]
    return b"".join([*parts, packer.flush()])


def refused_bombs() -> dict[str, bytes]:
    """Files that must be refused, before what they claim is held."""
    # The header of an ICO says 16 x 16, the PNG in it something else.
    inner = png(60_000, 60_000, lines=1)
    icon = struct.pack("<HHHBBBBHHLL", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
    card = "{:<8}= {:>20}".format
    fits = [("SIMPLE", "T"), ("BITPIX", 8), ("NAXIS", 0), ("EXTEND", "T")]
    table = [
        ("XTENSION", "'BINTABLE'"),
        ("BITPIX", 8),
        ("NAXIS", 2),
        ("NAXIS1", 1),
        ("NAXIS2", 1),
        ("ZIMAGE", "T"),
        ("ZBITPIX", 8),
        ("ZNAXIS", 2),
        ("ZNAXIS1", 13_000),
        ("ZNAXIS2", 13_000),
    ]

    def unit(cards, more=()):
        lines = [card(*c).ljust(80) for c in cards] + list(more) + ["END".ljust(80)]
        return "".join(lines).ljust(2880).encode()

    gzipped = unit(table, ["ZCMPTYPE= 'GZIP_1  '".ljust(80)])
    return {
        "pixels over the limit": png(20_000, 9_000),
        "pixels far over the limit": png(2**20, 2**31 - 1, lines=1),
        "claimed pixels in BMP": b"BM"
        + struct.pack(
            "<LLLLllHHLLllLL", 99, 0, 54, 40, 60_000, 60_000, 1, 24, *[0] * 6
        ),
        "claimed pixels in GIF": b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0"
        + bytes([1, 0, 1, 0, 0, 2, 2, 68, 1, 0, 59]),
        "claimed pixels in PPM": b"P6 60000 60000 255\n" + bytes(99),
        "claimed pixels in JPEG": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03"
        + bytes([1, 34, 0, 2, 17, 1, 3, 17, 1])
        + b"\xff\xda"
        + bytes(99),
        "a PNG in an ICO": icon + inner,
        "a text of 128 MB": png(
            8, 8, more=png_chunk(b"zTXt", b"a\0\0" + deflated(2**27))
        ),
        "pixels decoded in python": unit(fits) + gzipped + bytes(300),
    }


# --- texts ---------------------------------------------------------------------

ALPHABETS = {
    "control characters": "".join(map(chr, [*range(32), 127, *range(128, 160)])),
    "lone surrogates": "ab \ud800\udbff\udc00\udfff",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽☠️",
    "right to left": "שלום مرحبا \u202e\u202d\u2066\u2069\u200f",
    "combining marks": "ae" + "".join(map(chr, range(0x300, 0x370))),
    "NUL": "\0 a",
    "byte-order marks": "\ufeff\ufffea ",
    "blank": " \t\n\r\u00a0\u2003\u200b\u2028\u3000",
    "CJK": "漢字かな交じり文한국어",
    "private and unassigned": "\ue000\uf8ff\U000f0000\U0010ffff\ufffe\uffff",
    "words": [f"{w} " for w in "cat dog bird fish red green good bad dull".split()],
    "special tokens": ["[CLS]", "[SEP]", "[PAD]", "[UNK]", "<s>", "</s>", "##a", " "],
    "anything": None,
}
LENGTHS = (0, 1, 2, 3, 7, 20, 60, 300, 2000)
MEGABYTE = 2**20


def text(i: int) -> Hostile:
    """Hostile text number ``i``; one in 200 is a megabyte long."""
    rng = np.random.default_rng([2, i])
    kind = list(ALPHABETS)[int(rng.integers(len(ALPHABETS)))]
    alphabet = ALPHABETS[kind]
    length = int(rng.choice(LENGTHS))
    if alphabet is None:
        found = "".join(map(chr, rng.integers(0, 0x110000, length).tolist()))
    else:
        letters = rng.integers(0, len(alphabet), length).tolist()
        found = "".join(alphabet[letter] for letter in letters)
    if i % 200 == 7:
        once = found or "a"
        return Hostile(
            f"1 MB of {kind}", (once * (MEGABYTE // len(once) + 1))[:MEGABYTE]
        )
    return Hostile(kind, found)


def peak_megabytes() -> float:
    """The most memory that this process has held so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
