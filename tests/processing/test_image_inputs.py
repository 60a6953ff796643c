"""Every kind of image ends as upright 8-bit RGB, and what is no image says so."""

import base64
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO, StringIO

import numpy as np
import pytest
import torch
from PIL import Image

from processing import load_image

PIXELS = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)  # height 2, width 5


def pixels(source):
    loaded = load_image(source)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def png_bytes(image):
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "source",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        torch.from_numpy(PIXELS),
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        PIXELS / 255,
        torch.from_numpy(PIXELS / np.float32(255)).permute(2, 0, 1),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.uint16) * 257,
        "data:image/png;base64," + base64.b64encode(png_bytes(Image.fromarray(PIXELS))).decode(),
        base64.b64encode(png_bytes(Image.fromarray(PIXELS))).decode(),
        base64.encodebytes(png_bytes(Image.fromarray(PIXELS))).decode(),
        "data:image/png;base64," + base64.encodebytes(png_bytes(Image.fromarray(PIXELS))).decode(),
        base64.urlsafe_b64encode(png_bytes(Image.fromarray(PIXELS))).decode(),
        png_bytes(Image.fromarray(PIXELS)),
        memoryview(png_bytes(Image.fromarray(PIXELS))),
        BytesIO(png_bytes(Image.fromarray(PIXELS))),
    ],
    ids=[
        *("pil", "hwc", "chw", "t-hwc", "t-chw", "float", "t-float", "int64", "uint16", "data-url", "base64", "lines"),
        *("data-url-lines", "base64-url", "bytes", "memoryview", "file"),
    ],
)
@pytest.mark.filterwarnings("ignore:the largest of the 16-bit values")
def test_same_pixels_from_every_form(source):
    assert np.array_equal(pixels(source), PIXELS)


def test_white_in_eight_bits_of_a_wider_integer():
    assert (pixels(np.full((4, 4, 3), 255, np.int64)) == 255).all()


def test_three_pixels_wide_and_high_is_read_by_the_habit_of_the_library():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(cube), cube)
    assert np.array_equal(pixels(torch.from_numpy(cube)), cube.transpose(1, 2, 0))


def test_paths(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert np.array_equal(pixels(tmp_path / "a.png"), PIXELS)
    assert np.array_equal(pixels(str(tmp_path / "a.png")), PIXELS)


def test_url():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/a.png" else 404)
            self.end_headers()
            self.wfile.write(png_bytes(Image.fromarray(PIXELS)) if self.path == "/a.png" else b"")

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        assert np.array_equal(pixels(f"{base}/a.png"), PIXELS)
        with pytest.raises(ValueError, match="b.png.*404"):
            load_image(f"{base}/b.png")
    finally:
        server.shutdown()
        server.server_close()


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "a.png"), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode, tmp_path):
    if mode == "P":
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putdata([0, 1])
        image.save(tmp_path / "a.png", transparency=0)
        image = Image.open(tmp_path / "a.png")
    else:
        image = Image.new(mode, (2, 1))
        image.putdata([(0,) * (len(mode) - 1) + (0,), (0,) * (len(mode) - 1) + (255,)])
    assert pixels(image).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (1, 1), 7), [7, 7, 7]),
        (Image.new("1", (1, 1), 1), [255, 255, 255]),
        (Image.new("CMYK", (1, 1), (255, 0, 0, 0)), [0, 255, 255]),
        (Image.fromarray(np.array([[200 * 257]], dtype=np.uint16)), [200, 200, 200]),
        (Image.fromarray(np.array([[200 * 257]], dtype=np.int32)), [200, 200, 200]),
        (Image.fromarray(np.array([[0.2]], dtype=np.float32)), [51, 51, 51]),
        (Image.fromarray(PIXELS[:1, :1]).quantize(), [0, 1, 2]),
    ],
    ids=["L", "1", "CMYK", "I;16", "I", "F", "P"],
)
def test_modes(image, expected):
    assert pixels(image).tolist() == [[expected]]


def test_16_bit_png(tmp_path, recwarn):
    values = np.array([[3 * 257, 64 * 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[3] * 3, [64] * 3]]
    assert not recwarn


@pytest.mark.parametrize(
    ("high", "message"),
    [
        (4095, "is 4095: it comes out dark, 16 of 255 at the most. If its values have 12 bits, multiply them by 16"),
        (16383, "is 16383.*64 of 255.*14 bits.*by 4 first"),
        (200, "is 200.*1 of 255.*8 bits.*by 256 first"),
    ],
)
def test_16_bit_values_that_may_have_fewer_bits_stay_dark_with_a_warning(tmp_path, high, message):
    values = np.array([[0, high]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.warns(UserWarning, match=rf"a\.png' .*{message}") as warned:
        shown = pixels(tmp_path / "a.png").tolist()
    assert shown == [[[0] * 3, [round(high / 257)] * 3]] and warned[0].filename == __file__
    with pytest.warns(UserWarning, match=f"given ndarray is {high}"):
        assert pixels(values).tolist() == shown
    with pytest.warns(UserWarning, match=f"given Image is {high}"):
        assert pixels(Image.fromarray(values)).tolist() == shown


def test_black_in_16_bits_is_black(recwarn):
    assert (pixels(np.zeros((2, 2), np.uint16)) == 0).all() and not recwarn


def test_12_bit_tiff(tmp_path, recwarn):
    """It says how many bits its values have. Pillow reads this kind and does not write it."""
    packed = bytes.fromhex("000fff800010")  # 0, 4095, 2048, 16
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    (tmp_path / "a.tif").write_bytes(start + packed + struct.pack("<H", len(tags)) + table + bytes(4))
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 255, 128, 1]
    assert pixels(Image.open(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 255, 128, 1]
    assert not recwarn


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif") == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (20000, 10)])
def test_odd_sizes(size, processor):
    inputs = processor(Image.new("RGB", size, "blue"), "<IMG_CONTEXT>")
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)


def test_broken_and_other_files(tmp_path):
    good = png_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    (tmp_path / "cut.png").write_bytes(good[: len(good) // 2])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.png", "notes.txt", "empty.jpg", "absent.png"):
        with pytest.raises(ValueError, match=name):
            load_image(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            load_image(str(tmp_path / name))


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(PIXELS).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(ValueError, match="bomb"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Image.new("RGB", (0, 3)), "empty"),
        (np.zeros((0, 3, 3), dtype=np.uint8), "empty"),
        (np.zeros((5, 5, 7), dtype=np.uint8), "channels"),
        (np.zeros((2, 2, 2, 3), dtype=np.uint8), "must be"),
        (np.full((2, 2), 3.0), r"\[0, 1\]"),
        (np.full((2, 2), np.nan), r"\[0, 1\]"),
        (np.full((2, 2), -1), "8- or 16-bit"),
        (np.full((2, 2), 70000), "8- or 16-bit"),
        ("", "cannot read"),
        ("photo123", "'photo123': no such file"),  # letters of base64
        (b"no image", "cannot read an image from the given bytes"),
        (StringIO("text"), "cannot read an image from the given StringIO"),
    ],
)
def test_unusable_values(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


def test_no_image_at_all():
    with pytest.raises(TypeError, match="int"):
        load_image(3)
