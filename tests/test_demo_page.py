"""The page: what it refuses, what it answers, and in a browser what a visitor does with it."""

import base64
import io
import json
import pathlib
import re
import shutil
import struct
import tempfile
import threading
import time
import types
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from concurrent.futures import CancelledError

import cv2
import numpy as np
import pytest
from PIL import Image

from concat_jax import demo
from concat_jax.core.files import ImageError
from concat_jax.core.mask_codes import ids_to_rgb
from concat_jax.inference.images import open_picture
from concat_jax.inference.panoptic import ImageSegments
from concat_jax.inference.result import Result
from concat_jax.page import desk as desks
from concat_jax.page.desk import Desk, check_upload, split_names
from concat_jax.page.view import notice_html, outline, result_html
from data_pipelines.labels import parse_classes
from data_pipelines.synthetic.presets import PRESETS

HOSTILE = "<img src=x onerror=\"document.title='pwned'\">"


class Halves:
    """A model that names the left half of a picture by the first name, the right by the second."""

    vocabulary = PRESETS["texture"].vocabulary
    card = types.SimpleNamespace(text="read")
    keep_rule = "objectness"

    def __init__(self):
        self.calls, self.at_once, self.most, self.delay = [], 0, 0, 0.0

    def __call__(self, image, classes=None, **settings):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        time.sleep(self.delay)
        self.calls.append((classes, settings))
        classes = self.vocabulary if classes is None else parse_classes(classes, self.vocabulary)[0]
        pixels = open_picture(image, "image")
        ids = np.ones(pixels.shape[:2], np.int32)
        ids[:, ids.shape[1] // 2 :] = 2
        rows = [
            dict(
                id=k + 1,
                label=k % len(classes),
                score=0.9 - 0.25 * k,
                area=int((ids == k + 1).sum()),
            )
            for k in range(2)
        ]
        if settings.get("objectness_threshold", 0) > 0.8:
            ids, rows = np.where(ids == 1, ids, 0), rows[:1]
        self.at_once -= 1
        found = ImageSegments(ids, rows, dict.fromkeys(("merged", "no_object"), 0), 0.9)
        source = image.rsplit("/", 1)[-1] if isinstance(image, str) else "image.png"
        return Result(pixels, classes, source, found)


@pytest.fixture
def desk():
    return Desk(Halves())


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(path)
    return str(path)


def large_png(path, side):
    """A valid PNG of side x side black pixels, of few bytes."""
    rows = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    body = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    with open(path, "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        for kind, content in ((b"IHDR", head), (b"IDAT", body), (b"IEND", b"")):
            check = struct.pack(">I", zlib.crc32(kind + content))
            file.write(struct.pack(">I", len(content)) + kind + content + check)


def hostile_files(folder):
    """Name of a file, the file, and what the page must say of it."""
    with zipfile.ZipFile(folder / "pictures.zip", "w") as archive:
        archive.writestr("../../x.png", "no picture")
    (folder / "script.svg").write_text(
        "<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>"
    )
    (folder / "page.png").write_text("<html><script>alert(1)</script></html>")
    (folder / "ghost.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (folder / "empty.png").write_bytes(b"")
    (folder / "noise.jpg").write_bytes(np.random.default_rng(0).bytes(200_000))
    large_png(folder / "large.png", 10_000)
    large_png(folder / "bomb.png", 20_000)
    return {
        "pictures.zip": "is no picture",
        "script.svg": "is no picture",
        "page.png": "is no picture",
        "ghost.png": "is no picture",
        "noise.jpg": "is no picture",
        "empty.png": "is empty",
        "large.png": "has more than 25 million pixels",
        "bomb.png": "has more than 25 million pixels",
        "gone.png": "is no longer here",
    }


def test_what_is_no_picture_gets_a_sentence_and_is_not_decoded(tmp_path, desk, monkeypatch):
    def decoded(*_):
        raise AssertionError("pixels were decoded")

    sentences = hostile_files(tmp_path)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    for name, sentence in sentences.items():
        with pytest.raises(ValueError) as error:
            desk.ask(str(tmp_path / name))
        assert str(error.value).startswith(f"{name} {sentence}") and str(error.value)[-1] == "."
    assert not desk.model.calls


def test_a_file_over_the_limit_is_refused_by_its_size(tmp_path):
    with open(tmp_path / "noise.bin", "wb") as file:
        file.truncate(50 * 10**6)
    with pytest.raises(ValueError, match="noise.bin has 50 megabytes where 20 are the limit"):
        check_upload(str(tmp_path / "noise.bin"))


def test_what_the_model_says_of_a_file_names_no_path(photo, desk, monkeypatch):
    def refuse(image, *_, **__):
        raise ImageError(f"{image} cannot be decoded: it is cut short.")

    monkeypatch.setattr(desk, "model", refuse)
    with pytest.raises(ValueError, match=r"^photo.png cannot be decoded: it is cut short.$"):
        desk.ask(photo)


def test_a_port_that_cannot_be_is_refused_before_the_model_is_read():
    with pytest.raises(SystemExit, match="port=99999: 99999 is not an integer in the range"):
        demo.main(["demo", "--port=99999", "--model=none"])


def test_a_port_that_is_taken_is_not_the_one_that_is_advised():
    class Taken:
        def launch(self, **_):
            raise OSError("Cannot find empty port in range: 8123-8123.")

    pytest.importorskip("gradio")
    for port, other in ((8123, 8124), (None, 8123), (80, 8123), (65535, 8123)):
        with pytest.raises(ValueError, match=f"or not for us; give another, as --port={other}"):
            demo.launch(Taken(), types.SimpleNamespace(scenes=[]), port)


def test_names_come_with_commas_or_lines(desk, photo):
    assert split_names(" cat, remote  control;\n sofa,,\n") == ["cat", "remote control", "sofa"]
    desk.ask(photo, "cat, dog", "sky", gamma=1.5)
    desk.ask(photo, " ,", "\n")
    named = {"things": ["cat", "dog"], "stuff": ["sky"]}
    assert desk.model.calls == [(named, {"gamma": 1.5}), (None, {})]
    desk.ask(photo, "cat; road", "sky")  # as on a command line
    assert desk.model.calls[-1] == ({"things": ["cat"], "stuff": ["road", "sky"]}, {})
    for things, sentence in (
        (", ".join(map(str, range(201))), "201 names are too many"),
        ("x" * 81, "has 81 letters; give up to 80"),
        ("cat; sky; dog", "several semicolons; one ends the things"),
        ("cat, Cat", "holds? the name 'Cat' more than once"),
    ):
        with pytest.raises(ValueError, match=sentence):
            desk.ask(photo, things)
    result = desk.ask(photo, "../../x", "configs/demo_zps.py")  # names, no files
    assert {s.name for s in result.segments} == {"../../x", "configs/demo_zps.py"}


def test_examples_are_of_the_world_that_the_model_knows(desk):
    assert len(desk.scenes) == desks.NUM_SCENES
    assert desk.ask(1).image.shape == (desks.SCENE_SIDE, desks.SCENE_SIDE, 3)
    with pytest.raises(ValueError, match="no such example"):
        desk.ask(desks.NUM_SCENES)
    other = Halves()
    other.vocabulary = parse_classes("cat; sky", Halves.vocabulary)[0]
    assert Desk(other).scenes == []


def test_what_takes_too_long_is_given_up_and_the_next_is_answered(desk, photo):
    desk.model.delay = 0.4
    with pytest.raises(ValueError, match="more than 0.05 seconds"):
        desk.ask(photo, time_limit=0.05)
    desk.model.delay = 0.0
    assert len(desk.ask(photo).segments) == 2


def test_twenty_at_once_take_turns_and_none_is_lost(desk, photo):
    desk.model.delay = 0.005
    found = []
    threads = [
        threading.Thread(target=lambda k=k: found.append((k, desk.ask(photo, f"a{k}, b{k}"))))
        for k in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(k for k, _ in found) == list(range(20)) and desk.model.most == 1
    assert all(result.segments[0].name == f"a{k}" for k, result in found)


@pytest.mark.parametrize("size", [(24, 40), (240, 400)])
def test_an_outline_is_that_of_its_mask(size):
    """Drawn again it covers the mask, hole and all, but for a smooth edge."""
    mask = np.zeros((48, 80), bool)
    mask[8:40, 10:60] = True
    mask[18:28, 25:45] = False
    parts = outline(mask, *size).strip("MZ").split("ZM")
    points = [np.array(re.findall(r"(\d+) (\d+)", part), np.int32) for part in parts]
    drawn = np.zeros(size, np.uint8)
    cv2.fillPoly(drawn, points, 1)  # even-odd
    right = cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
    assert len(points) == 2
    assert (drawn & right).sum() / (drawn | right).sum() > 0.93


def test_a_single_pixel_has_an_outline():
    mask = np.zeros((2000, 2000), bool)
    mask[700, 900] = True
    assert outline(mask, 1000, 1000).startswith("M450 350")
    assert not outline(np.zeros((5, 5), bool), 50, 50)


def files_of(page):
    return {
        name: base64.b64decode(content)
        for name, content in re.findall(
            r'download="([^"]*)" href="data:[a-z/]+;base64,([^"]*)"', page
        )
    }


def test_the_view_holds_the_segments_and_their_files(desk, photo):
    result = desk.ask(photo, "red plain balloon, teapot")
    page = result_html(result)
    assert re.findall('data-say="([^"]*)"', page) == ["red plain balloon · 90%", "teapot* · 65%"]
    assert page.count("type=checkbox") == 2 and "2 segments" in page and "60 × 40" in page
    files = files_of(page)
    assert list(files) == ["photo.overlay.png", "photo.json", "photo.png"]
    assert json.loads(files["photo.json"]) == json.loads(json.dumps(result.to_coco()))
    read = {
        name: np.asarray(Image.open(io.BytesIO(files[name]))) for name in files if "png" in name
    }
    np.testing.assert_array_equal(read["photo.overlay.png"], np.asarray(result.overlay()))
    np.testing.assert_array_equal(read["photo.png"], ids_to_rgb(result.panoptic))


def test_names_and_files_are_text_and_no_markup(desk, photo, tmp_path):
    path = shutil.copy(photo, tmp_path / "a\"onload='x'&.png")
    page = result_html(desk.ask(str(path), f"{HOSTILE}, {HOSTILE[5:]}")) + notice_html(HOSTILE)
    for value in ("fill-rule=evenodd", "type=checkbox", "tabindex=0", "role=img", "role=group"):
        name, word = value.split("=")
        page = page.replace(value, f'{name}="{word}"')
    # As XML every tag and quote must fit; what is markup here is ours.
    page = re.sub(r" (class|role|preserveAspectRatio)=([\w-]+)", r' \1="\2"', page)
    page = page.replace(" checked ", ' checked="" ').replace('">\n', '">')
    page = re.sub(r"(<input[^>]*)>", r"\1/>", page)
    tree = ElementTree.fromstring(f"<page>{page}</page>")
    tags = {element.tag for element in tree.iter()}
    assert tags <= set("page div svg image path p span ul li label input i b a".split())
    assert not [key for element in tree.iter() for key in element.keys() if key.startswith("on")]
    assert any(HOSTILE[5:] in element.get("data-say", "") for element in tree.iter("path"))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the page, its model, and Gradio's folder."""
    desk, folder = Desk(Halves()), tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        pytest.importorskip("gradio")
        blocks = demo.build(desk)
        yield demo.launch(blocks, desk, None), desk, folder
        blocks.close()


def test_uploads_lie_in_the_pages_folder_alone(served, photo):
    httpx = pytest.importorskip("httpx")
    address, _, folder = served
    elsewhere = pathlib.Path(tempfile.gettempdir(), "gradio")
    before = set(elsewhere.rglob("*"))
    with httpx.Client(base_url=address, trust_env=False) as client, open(photo, "rb") as file:
        answer = client.post("gradio_api/upload", files={"files": ("photo.png", file)})
    (path,) = answer.json()
    assert folder in pathlib.Path(path).parents and pathlib.Path(path).is_file()
    assert set(elsewhere.rglob("*")) == before


def test_a_page_that_is_closed_says_so(photo):
    desk = Desk(Halves())
    desk.close()
    with pytest.raises(ValueError, match="is being closed; start it again"):
        desk.ask(photo)


def test_who_waits_as_a_page_is_closed_is_told(photo, monkeypatch):
    desk = Desk(Halves())

    def cancelled(time_limit):
        raise CancelledError

    turn = types.SimpleNamespace(result=cancelled)
    monkeypatch.setattr(desk, "_worker", types.SimpleNamespace(submit=lambda work: turn))
    with pytest.raises(ValueError, match="is being closed; start it again"):
        desk.ask(photo)


def test_no_path_of_the_server_is_served(served):
    httpx = pytest.importorskip("httpx")
    address, _, _ = served
    assert address.startswith("http://127.0.0.1:")
    with httpx.Client(base_url=address, trust_env=False) as client:
        for path in (
            "/etc/passwd",
            "README.md",
            demo.__file__,
            "../../etc/passwd",
            "%2Fetc%2Fpasswd",
        ):
            for route in ("gradio_api/file=", "file=", "gradio_api/proxy=", "static/", "assets/"):
                assert client.get(route + path).status_code >= 400, route + path
        assert client.get("").status_code == 200


def test_twenty_requests_at_once_through_the_queue(served):
    client_module = pytest.importorskip("gradio_client")
    address, desk, _ = served
    client = client_module.Client(address, verbose=False, httpx_kwargs={"timeout": 120})
    desk.model.delay = 0.02
    jobs = [client.submit(f"a{k}", f"b{k}", 0.5, 0.5, 0.0, api_name="/segment") for k in range(20)]
    answers = [job.result(timeout=120) for job in jobs]
    desk.model.delay = 0.0
    assert all(f"a{k} · 90%" in view.replace("*", "") for k, (_, view) in enumerate(answers))
    assert desk.model.most == 1


def test_an_emptied_box_of_a_slider_is_its_default(served, capfd):
    client_module = pytest.importorskip("gradio_client")
    address, desk, _ = served
    client = client_module.Client(address, verbose=False, httpx_kwargs={"timeout": 120})
    view = client.predict("a", "b", None, 0.5, None, api_name="/segment")[1]
    assert "a · 90%" in view.replace("*", "")
    assert desk.model.calls[-1][1] == dict(objectness_threshold=0.5, mask_threshold=0.5, gamma=0)
    assert "Traceback" not in capfd.readouterr().err


NEEDS_BROWSER = "needs a browser: pip install playwright, and Chromium"
CHROMIUM_FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync""".split()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason=NEEDS_BROWSER)
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip(NEEDS_BROWSER)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.mark.slow
def test_a_visitor_in_a_browser(served, browser, photo, tmp_path):
    address, desk, folder = served
    elsewhere = set(pathlib.Path(tempfile.gettempdir(), "gradio").rglob("*"))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(60_000)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address)
    page.wait_for_selector("#view path")  # an example, segmented
    assert page.locator("#view .facts span").inner_text() == "256 × 256"

    page.set_input_files("#upload input[type=file]", photo)
    page.wait_for_selector("#view .facts:has-text('60 × 40')")
    page.get_by_label("Things").fill(f"teapot, {HOSTILE}")
    page.get_by_role("button", name="Segment").click()
    page.wait_for_selector("#view .legend:has-text('teapot')")
    assert page.title() == "concat_jax" and page.locator("#view img").count() == 0

    left, right = page.locator("#view path").all()
    left.hover()
    assert page.locator("#tip").inner_text() == "teapot* · 90%"
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()
    page.locator("#examples button").last.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.say") == "teapot* · 90%"
    assert page.locator("#tip").inner_text() == "teapot* · 90%"

    page.get_by_role("checkbox", name="teapot").uncheck()
    assert not left.is_visible() and right.is_visible()
    page.locator("#ask input[type=range]").first.focus()
    page.keyboard.press("End")  # objectness 1: the second segment goes
    page.wait_for_selector("#view .facts:has-text('1 segment')")
    assert desk.model.calls[-1][1]["objectness_threshold"] == 1
    assert not page.locator("#view path").is_visible()  # hidden it stays
    with page.expect_download() as download:
        page.get_by_role("link", name="JSON").click()
    assert download.value.suggested_filename == "photo.json"
    assert json.loads(open(download.value.path()).read())["images"][0]["file_name"] == "photo.png"

    with open(tmp_path / "huge.png", "wb") as file:
        file.write(np.random.default_rng(0).bytes(50 * 10**6))
    for name in ("huge.png", "pictures.zip"):  # what Gradio refuses before it is sent
        hostile_files(tmp_path)
        page.set_input_files("#upload input[type=file]", str(tmp_path / name))
        page.wait_for_selector(".toast-body")
        page.locator(".toast-close").first.click()
        page.wait_for_selector(".toast-body", state="detached")
    for name, sentence in hostile_files(tmp_path).items():
        if (tmp_path / name).exists() and name != "pictures.zip":
            page.set_input_files("#upload input[type=file]", str(tmp_path / name))
            page.wait_for_selector(f".notice:has-text('{name} {sentence}')")
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("button", name="Example 2").click()
    page.wait_for_selector("#view .facts:has-text('256 × 256')")
    assert page.locator(".notice").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not errors
    assert any(folder.rglob("photo.png"))
    assert set(pathlib.Path(tempfile.gettempdir(), "gradio").rglob("*")) == elsewhere
    assert {re.match(r"data:|blob:|http://127.0.0.1:", url) is not None for url in asked} == {True}
