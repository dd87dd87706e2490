"""What `cnn.images` makes of files and arrays."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnn import folders, images
from cnn.folders import find_images
from cnn.images import FORMATS, IMAGE_SIZE, decode, resize


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, file_format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def slowly_resized(plane, size=IMAGE_SIZE):
    """Bilinear, antialiased, one axis after the other, straight from the definition."""
    for _ in range(2):
        scale = len(plane) / size
        reach = max(scale, 1.0)
        rows = []
        for i in range(size):
            centre = (i + 0.5) * scale
            weights = [max(0.0, 1 - abs(j + 0.5 - centre) / reach) for j in range(len(plane))]
            rows.append(sum(w * row for w, row in zip(weights, plane, strict=True)) / sum(weights))
        plane = np.array(rows, dtype=float).T
    return plane


# decode


def test_an_rgb_image_of_32_by_32_keeps_its_very_pixels():
    pixels = noise(32, 32, 3)
    result = decode(encoded(Image.fromarray(pixels)))
    assert result.dtype == np.uint8
    assert result.flags.writeable
    np.testing.assert_array_equal(result, pixels)


def test_a_jpeg_has_the_pixels_that_pillow_reads(tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(noise(32, 32, 3)).save(file)
    with Image.open(file) as image:
        np.testing.assert_array_equal(decode(file), np.asarray(image.convert("RGB")))


def test_a_file_and_its_bytes_decode_alike(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(Image.fromarray(noise(50, 20, 3))))
    np.testing.assert_array_equal(decode(file), decode(file.read_bytes()))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("size", [(32, 32), (45, 17)])
def test_every_8_bit_mode_is_read_as_its_rgb(mode, size):
    image = Image.fromarray(noise(size[1], size[0], 3)).convert(mode)
    file_format = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA") else "TIFF"
    data = encoded(image, file_format)
    with Image.open(io.BytesIO(data)) as opened:
        expected = opened.convert("RGB")
    if size != (32, 32):
        expected = expected.resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(decode(data), np.asarray(expected))


@pytest.mark.parametrize("file_format", [name for name in FORMATS if name != "GIF"])
def test_every_named_format_is_read(file_format):
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    pixels = np.asarray(Image.fromarray(noise(4, 4, 3)).resize((32, 32)))
    result = decode(encoded(Image.fromarray(pixels), file_format, **lossless.get(file_format, {})))
    np.testing.assert_allclose(result.astype(int), pixels.astype(int), atol=6)


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(file_format):
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32)
    result = decode(encoded(Image.fromarray(values), file_format))
    expected = np.round(values / 65535 * 255)
    for channel in range(3):
        np.testing.assert_array_equal(result[:, :, channel], expected)


def test_bytes_of_transparency_in_a_palette_are_dropped_without_a_warning():
    image = Image.new("P", (32, 32), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    assert (decode(encoded(image, transparency=bytes([0, 128]))) == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda p: p),
        (2, lambda p: p[:, ::-1]),
        (3, lambda p: p[::-1, ::-1]),
        (4, lambda p: p[::-1]),
        (5, lambda p: p.transpose(1, 0, 2)),
        (6, lambda p: np.rot90(p, -1)),
        (7, lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda p: np.rot90(p)),
    ],
)
def test_exif_orientation_is_applied(orientation, undo):
    pixels = noise(32, 32, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), exif=exif)), undo(pixels))


def test_other_sizes_are_squashed_with_an_antialiased_bilinear_filter():
    pixels = noise(100, 41, 3)
    result = decode(encoded(Image.fromarray(pixels)))
    for channel in range(3):
        np.testing.assert_allclose(
            result[:, :, channel], slowly_resized(pixels[:, :, channel]), atol=1.01
        )


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (31, 32), (2000, 3)])
def test_any_size_comes_out_as_32_by_32(size):
    assert decode(encoded(Image.new("RGB", size, (1, 2, 3)))).shape == (32, 32, 3)
    assert (decode(encoded(Image.new("RGB", size, (1, 2, 3)))) == (1, 2, 3)).all()


def make_truncated(file, suffix="PNG"):
    data = encoded(Image.fromarray(noise(64, 64, 3)), suffix)
    file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda file: file.write_bytes(b""), "it is empty"),
        (lambda file: file.write_text("height,width\n3,4\n"), "is no image"),
        (make_truncated, "is no readable image"),
        (lambda file: make_truncated(file, "JPEG"), "is no readable image"),
        (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "is no"),
        (lambda file: Image.new("RGB", (9, 9)).save(file, "EPS"), r"is no image \(known: JPEG"),
        (lambda file: Image.new("F", (9, 9)).save(file, "TIFF"), "floats"),
        (lambda file: Image.new("I", (9, 9), 70000).save(file, "TIFF"), "70000"),
        (lambda file: None, "it is not there"),
        (lambda file: file.symlink_to("nowhere"), "it is not there"),
        (lambda file: file.symlink_to(file), "it is not there"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_what_is_no_image_is_named_in_one_line(tmp_path, make, complaint):
    file = tmp_path / "bad\nname.png"
    make(file)
    with pytest.raises(ValueError, match=complaint) as caught:
        decode(file)
    assert "bad\\nname.png" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_bytes_are_refused_without_printing_them():
    with pytest.raises(ValueError, match=r"^9 bytes is no image"):
        decode(b"not image")


def bomb(width, height):
    """Return a PNG of a few dozen bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


# Just above our limit, where Pillow only warns; and where Pillow refuses.
@pytest.mark.parametrize("size", [(9460, 9460), (50_000, 50_000), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(images, "pixels", lambda *_: pytest.fail("it was decoded"))
    for action in ("ignore", "error"):
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match="more than 89,478,485 pixels"):
            decode(bomb(*size))


def test_the_limit_is_on_pixels_not_on_a_side(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    assert decode(encoded(Image.new("RGB", (100, 1)))).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="more than 100 pixels"):
        decode(encoded(Image.new("RGB", (101, 1))))


def test_a_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "a.png").open("wb") as stream:
        stream.truncate(images.MAX_BYTES + 1)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="536,870,913 bytes"):
        decode(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(89_478_485, 1), (1, 89_478_485), (1_000_001, 2)])
def test_a_long_side_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(images, "pixels", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="a side of more than 1,000,000 pixels"):
        decode(bomb(*size))


def test_the_longest_side_is_resized_in_little_memory():
    image = Image.new("L", (images.MAX_SIDE, 1), 7)
    assert (decode(encoded(image)) == 7).all()


def test_an_image_without_memory_for_it_is_refused_and_others_are_decoded(monkeypatch):
    pixels = images.pixels

    def fail_for_some(image, image_size):
        if image.width == 9:
            raise MemoryError
        return pixels(image, image_size)

    monkeypatch.setattr(images, "pixels", fail_for_some)
    data = [encoded(Image.new("RGB", (width, 9))) for width in (8, 9, 10)]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(decode, item) for item in data]
    assert [type(future.exception()) for future in futures] == [type(None), ValueError, type(None)]
    assert "takes more memory than there is" in str(futures[1].exception())


def progressive(size, *, scans):
    """Return a progressive JPEG, whose last scan is repeated until it has so many."""
    data = encoded(Image.fromarray(noise(size, size, 3)), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    repeats = scans - data.count(b"\xff\xda")
    return data[:end] + data[start:end] * repeats + data[end:]


@pytest.mark.parametrize("size", [16, 6000])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(size, monkeypatch):
    monkeypatch.setattr(images, "pixels", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(images, "_decode_confined", lambda *_: pytest.fail("it was decoded"))
    data = progressive(16, scans=3000)
    position = data.index(b"\xff\xc2") + 5
    data = data[:position] + struct.pack(">HH", size, size) + data[position + 4 :]
    with pytest.raises(ValueError, match="more than 100 scans"):
        decode(data)


def test_a_film_behind_a_jpeg_is_not_taken_for_scans():
    data = progressive(40, scans=90)
    film = noise(2**25 - len(data)).tobytes()
    assert film.count(b"\xff\xda") > 400
    np.testing.assert_array_equal(decode(data + film), decode(data))


def test_a_jpeg_of_many_scans_for_its_size_is_decoded_by_a_process_with_limits():
    def is_demanding(scans):
        with Image.open(io.BytesIO(progressive(16, scans=scans))) as image:
            image._size = (5000, 5000)
            return images._is_demanding(image, progressive(16, scans=scans))

    assert not is_demanding(12)
    assert is_demanding(90)


@pytest.mark.parametrize("mode", ["RGB", "P", "I;16"])
def test_what_is_decoded_by_a_process_with_limits_has_the_same_pixels(mode, monkeypatch):
    image = Image.fromarray(noise(90, 50, 3)).convert(mode.removesuffix(";16")).convert(mode)
    data = encoded(image, exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0")
    expected = decode(data)
    monkeypatch.setattr(images, "_LARGE", 100)
    monkeypatch.setattr(images, "pixels", None)
    result = decode(data)
    assert result.flags.writeable
    np.testing.assert_array_equal(result, expected)


def confine_all(monkeypatch, **limits):
    monkeypatch.setattr(images, "_LARGE", 0)
    for name, value in limits.items():
        monkeypatch.setattr(images, name, value)


def test_an_image_that_takes_too_much_memory_is_refused(monkeypatch):
    confine_all(monkeypatch, MAX_MEMORY=5 * 10**8)
    assert decode(encoded(Image.new("RGB", (9, 9)))).shape == (32, 32, 3)
    with pytest.raises(ValueError, match=r"^\d+ bytes is .*0.5 GB of memory"):
        decode(encoded(Image.new("L", (9400, 9400)), compress_level=1))


def test_an_image_that_takes_too_long_is_refused(monkeypatch):
    confine_all(monkeypatch, MAX_SECONDS=0.001)
    with pytest.raises(ValueError, match=r"^\d+ bytes is refused: it takes more than 0.001 sec"):
        decode(encoded(Image.new("RGB", (9, 9))))


def test_a_process_with_limits_says_what_is_wrong_with_an_image(monkeypatch, tmp_path):
    confine_all(monkeypatch, _LARGE_FILE=10)
    (tmp_path / "a.png").write_text("no image at all")
    with pytest.raises(ValueError, match=r"a.png' is no image \(known: JPEG"):
        decode(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a side of more than 1,000,000 pixels"):
        decode(bomb(1_000_001, 1))


def test_a_decoder_that_is_killed_is_reported(monkeypatch):
    confine_all(monkeypatch)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match="its decoder ended with status 1"):
        decode(encoded(Image.new("RGB", (9, 9))))


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    at_work, most = [], []

    def watched(command, **options):
        at_work.append(command)
        most.append(len(at_work))
        time.sleep(0.01)
        at_work.pop()
        return subprocess.CompletedProcess(command, 0, stdout=bytes(32 * 32 * 3))

    confine_all(monkeypatch)
    monkeypatch.setattr(subprocess, "run", watched)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, [encoded(Image.new("RGB", (9, 9)))] * 8))
    assert most == [1] * 8


def test_the_larger_of_two_sizes_that_a_jpeg_2000_claims_counts():
    data = encoded(Image.new("RGB", (16, 16)), "JPEG2000")
    position = data.index(b"\xff\x4f\xff\x51") + 8
    larger = data[:position] + struct.pack(">II", 5000, 5000) + data[position + 8 :]
    for content, demanding in ((data, False), (larger, True)):
        with Image.open(io.BytesIO(content)) as image:
            assert image.size == (16, 16)
            assert images._is_demanding(image, content) == demanding


def tiled(side):
    """Return the head of a TIFF of 16 × 16 grey pixels in one tile of side × side."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 9}
    entries = [struct.pack("<HHLL", tag, 4, 1, value) for tag, value in tags.items()]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize(("side", "demanding"), [(256, False), (60_000, True)])
def test_a_tiff_of_one_huge_tile_is_decoded_by_a_process_with_limits(side, demanding):
    with Image.open(io.BytesIO(tiled(side))) as image:
        assert image.size == (16, 16)
        assert images._is_demanding(image, tiled(side)) == demanding


def test_a_link_to_what_never_ends_is_not_read(tmp_path):
    """As root, to read /proc/kmsg waits for the kernel to say something."""
    (tmp_path / "a.png").symlink_to("/proc/kmsg")
    script = (
        "import sys; from pathlib import Path; from cnn.images import decode\n"
        "try: decode(Path(sys.argv[1]))\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.png")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, cwd=root, capture_output=True, text=True, timeout=60)
    assert re.search("it is empty|can't be read|not a regular file", done.stdout)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    os.mkfifo(file)
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    written = []
    writer = threading.Timer(5, lambda: written.append(os.open(file, os.O_RDWR)))  # ends a wait
    writer.start()
    try:
        with pytest.raises(ValueError, match="not a regular file"):
            decode(file)
        assert not written
    finally:
        writer.cancel()


def test_a_file_that_may_not_be_looked_at_is_named(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(ValueError, match=r"a.png' can't be read: Permission denied"):
        decode(tmp_path / "a.png")


def test_what_an_ending_says_makes_no_difference(tmp_path):
    pixels = noise(32, 32, 3)
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(decode(tmp_path / "a.jpg"), pixels)


# find_images


def test_finds_all_files_below_sorted_by_relative_path(tmp_path):
    for name in ("b/c/2.png", "b/1.png", "a.png", "b-c.png", "Z.jpg", "b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [file.relative_to(tmp_path).as_posix() for file in find_images(tmp_path)]
    assert found == ["Z.jpg", "a.png", "b-c.png", "b/1.png", "b/c.txt", "b/c/2.png"]


def test_leaves_out_and_counts_hidden_files_and_what_systems_leave(tmp_path):
    left = (
        *(".DS_Store", "sub/.DS_Store", ".cache/a.png", "Thumbs.db", "ehthumbs.db", "Icon\r"),
        *("sub/desktop.ini", "sub/._b.png", "sub/._c.png", "@eaDir/b/SYNOPHOTO_THUMB_M.jpg"),
        *("__MACOSX/b.png", "$RECYCLE.BIN/b.png", "System Volume Information/x", "lost+found/x"),
        *("#recycle/b.png", "sub/@eaDir/c.png"),
    )
    for name in (*left, "b", "sub/Folder.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == [tmp_path / "b", tmp_path / "sub" / "Folder.jpg"]
    passed_over = Counter()
    assert list(folders.walk(tmp_path, passed_over)) == ["b", "sub/Folder.jpg"]
    assert passed_over.total() == len(left)
    assert (passed_over["._*"], passed_over[".DS_Store"], passed_over["@eaDir"]) == (2, 2, 2)
    (note,) = folders.note_on_skipped(passed_over)
    assert note.startswith("skipped 16 hidden or system files or folders: '")
    assert note.endswith(" and 10 other names")
    assert folders.note_on_skipped(Counter()) == ()


def test_follows_links_and_ends_on_a_loop(tmp_path):
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "deep" / "up").symlink_to("..")
    (tmp_path / "images" / "deep" / "a.png").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.png").touch()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    names = [
        str(file.relative_to(tmp_path / "images")) for file in find_images(tmp_path / "images")
    ]
    assert names == ["deep/a.png", "linked/b.png"]


def test_a_broken_link_is_found_rather_than_left_out(tmp_path):
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    assert find_images(tmp_path) == [tmp_path / "gone.png"]


def test_a_link_to_itself_is_found_rather_than_followed(tmp_path):
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert find_images(tmp_path) == [tmp_path / "loop.png"]


def test_the_order_is_that_of_whole_paths(tmp_path):
    generator = np.random.default_rng(0)
    for _ in range(200):
        parts = ["".join(generator.choice(list("ab-.0"), 2)) for _ in range(3)]
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            (tmp_path / parts[0] / parts[1]).mkdir(parents=True, exist_ok=True)
            (tmp_path / "/".join(parts[: generator.integers(1, 4)])).touch()
    found = [str(file.relative_to(tmp_path)) for file in find_images(tmp_path)]
    assert len(found) > 20
    assert found == sorted(found)


@pytest.mark.parametrize("name", ["missing", "file"])
def test_a_folder_that_cannot_be_listed_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=name):
        find_images(tmp_path / name)


# resize


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 1), (3, 8, 8, 3), (2, 50, 40, 3)])
def test_arrays_are_resized_as_the_definition_says(shape):
    images = noise(*shape)
    result = resize(images)
    assert result.shape == (shape[0], 32, 32, 3)
    assert result.dtype == np.uint8
    planes = np.broadcast_to(images.reshape(*shape[:3], -1), (*shape[:3], 3))
    for image, plane in zip(result, planes, strict=True):
        for channel in range(3):
            np.testing.assert_allclose(
                image[:, :, channel], slowly_resized(plane[:, :, channel]), atol=1.01
            )


@pytest.mark.parametrize("shape", [(20, 50), (20, 50, 3), (32, 32), (32, 32, 3)])
def test_an_array_and_a_file_of_the_same_pixels_give_the_same(shape):
    pixels = noise(*shape)
    np.testing.assert_array_equal(resize(pixels[None])[0], decode(encoded(Image.fromarray(pixels))))


def test_arrays_of_the_right_size_come_back_untouched():
    images = noise(4, 32, 32, 3)
    assert resize(images) is images


def test_strided_and_empty_arrays_are_taken():
    images = noise(4, 20, 20, 3)
    np.testing.assert_array_equal(resize(images[::2, ::-1]), resize(images[::2, ::-1].copy()))
    assert resize(np.empty((0, 8, 8), np.uint8)).shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 8, 8), np.uint16),
        np.zeros((8, 8), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 0, 8), np.uint8),
        np.zeros((2, 8, 8, 3, 1), np.uint8),
    ],
)
def test_other_arrays_are_refused_with_what_is_allowed(images):
    with pytest.raises(ValueError, match=r"must be uint8 and .*N, H, W, 3") as caught:
        resize(images)
    assert str(images.shape) in str(caught.value)
    assert str(images.dtype) in str(caught.value)


# The module


def test_the_first_decodings_of_a_process_may_come_from_several_threads(tmp_path):
    """Pillow loads its parsers on first use, and not all at once."""
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "a.tiff")
    script = (
        "import sys; from pathlib import Path; from cnn.images import decode\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(8) as pool: list(pool.map(decode, [Path(sys.argv[1])] * 64))\n"
        "assert 'torch' not in sys.modules, 'imports torch'\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "a.tiff")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])


def test_threads_decode_alike():
    data = [encoded(Image.fromarray(noise(40, 40, 3, seed=i))) for i in range(20)]
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(decode, data))
    np.testing.assert_array_equal(parallel, [decode(item) for item in data])


def _saved(file_format: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, file_format)
    return stream.getvalue()


def _tiff_of_strips(count: int) -> bytes:
    """Return a grey TIFF of 32 × 32 pixels that names so many strips, all at byte 8."""
    tags = [(256, 3, 1, 32), (257, 3, 1, 32), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    tags += [(273, 4, count, 8), (277, 3, 1, 1), (278, 3, 1, 1), (279, 4, count, 8)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    strips = b"\x08\0\0\0" * count
    return b"II*\0" + struct.pack("<I", 8 + len(strips)) + strips + directory + bytes(4)


@pytest.mark.parametrize(
    ("encoded", "demanding"),
    [
        (_saved("TIFF"), False),
        (_tiff_of_strips(100_000), True),
        (b"P3\n32 32\n255\n" + b"7 " * 3072, False),
        (b"P3\n32 32\n255\n" + b"#\n" * 200_000 + b"7 " * 3072, True),
    ],
)
def test_what_takes_pillow_long_to_parse_is_left_to_a_process_with_limits(
    encoded, demanding, monkeypatch
):
    confined = []
    monkeypatch.setattr(images, "_decode_confined", lambda data, _: confined.append(data))

    decode(encoded)

    assert bool(confined) == demanding
