"""The search page with a trained model, in a headless Chromium."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver import ActionChains, Keys

import browser
from neuclip.cli.app import main
from neuclip.data.demo.build import tiny_demo

pytestmark = browser.NEEDED
GROUP = browser.GROUP  # the model is trained once


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that has learned a few characters, in seconds; and the names of its images."""
    folder = tmp_path_factory.mktemp("search")
    tiny_demo(folder / "data", characters=16)
    train = folder / "data" / "train"
    flags = ["--train-data", str(train), "--model", "glyph-tiny", "--method", "openclip"]
    flags += ["--batch-size", "16", "--epochs", "1", "--train-num-samples", str(60 * 16)]
    flags += ["--lr", "3e-3", "--warmup", "10", "--workers", "0", "--device", "cpu"]
    flags += ["--seed", "3", "--logs", str(folder / "logs"), "--name", "glyphs"]
    assert main(["train", *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def names(trained):
    """Name of the character in every image, by the image's key."""
    found = {}
    for shard in (trained / "data" / "train").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[Path(member.name).stem] = json.load(tar.extractfile(member))["name"]
    return found


@pytest.fixture(scope="module")
def address(trained):
    """A server in a process of its own, which Ctrl-C ends."""
    flags = [str(trained / "logs" / "glyphs"), "--images", str(trained / "data" / "train")]
    flags += ["--port", "0", "--workers", "0", "--embeddings", str(trained / "features"), "--index"]
    # Jobs that a shell runs in the background ignore Ctrl-C, and so would the server.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    server = subprocess.Popen(
        [sys.executable, "-m", "neuclip", "search", *flags, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    signal.signal(signal.SIGINT, before)
    with server as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"(http://127\.0\.0\.1:\d+/[\w-]+/) ", line):
                break
        else:
            pytest.fail("".join(said))
        yield found[1]
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=60)[0] == "stopped\n"
        finally:
            process.kill()
        assert process.returncode == 0


@pytest.fixture
def page(window, address):
    browser.resize(window)
    window.get("about:blank")
    window.get(address)
    yield window
    assert browser.problems(window) == []


def ask(page, text):
    """Types a query after what the field holds, and Enter."""
    browser.find(page, "#text").send_keys(text + Keys.ENTER)


def found_names(page, names, turn):
    browser.wait(page, f"document.querySelector('#grid').dataset.turn === '{turn}'")
    keys = page.execute_script(
        "return [...document.querySelectorAll('#grid .hit')].map(e => e.title)"
    )
    return [names[key] for key in keys]


def wait_for_error(page, text):
    browser.wait(page, f"document.querySelector('#error').innerText.includes('{text}')")


@GROUP
def test_a_typed_name_finds_its_glyph(page, names, tmp_path):
    asked = sorted(set(names.values()))
    right = 0
    for turn, name in enumerate(asked, start=1):
        page.execute_script("document.querySelector('#text').value = ''")
        ask(page, name)
        right += name in found_names(page, names, turn)[:5]
    assert right >= 0.8 * len(asked) > 8
    browser.wait(
        page, "[...document.querySelectorAll('.hit img')].slice(0, 5).every(e => e.naturalWidth)"
    )
    drawn = "[...document.querySelectorAll('.hit img')].slice(0, 5).map(e => e.className)"
    assert set(page.execute_script(f"return {drawn}")) == {"tiny"}  # pixels of 32 are shown
    page.save_screenshot(str(tmp_path / "search.png"))
    assert (tmp_path / "search.png").stat().st_size > 10_000
    assert f"images nearest to “{asked[-1]}”" in browser.texts(page, "#state")[0]
    assert "index: recall@10 1.000 for texts" in browser.texts(page, "header")[0]


@GROUP
def test_an_image_finds_similar_images(page, names):
    name = names[min(names)]
    ask(page, name)
    found_names(page, names, 1)
    ActionChains(page).send_keys(Keys.ARROW_DOWN).perform()
    chosen = page.execute_script("return document.activeElement.title")
    ActionChains(page).send_keys(Keys.ENTER).perform()
    like = found_names(page, names, 2)
    assert names[chosen] in like[:5]
    assert chosen not in page.execute_script(
        "return [...document.querySelectorAll('.hit')].map(e => e.title)"
    )
    page.execute_script("history.back()")
    found_names(page, names, 3)
    assert page.execute_script("return document.querySelector('#text').value") == name


@GROUP
def test_words_to_avoid(page, names):
    wanted, avoided = sorted(set(names.values()))[:2]
    ranks = []
    for turn, text in enumerate((wanted, f'{wanted} -"{avoided}"'), start=1):
        page.execute_script("document.querySelector('#text').value = ''")
        ask(page, text)
        found_names(page, names, turn)
        found = found_to_the_end(page, names)
        ranks.append(np.mean([rank for rank, name in enumerate(found) if name == avoided]))
        assert wanted in found[:5]
    assert ranks[1] > ranks[0] + 5
    assert f'“{wanted} -"{avoided}"”' in browser.texts(page, "#state")[0]


@pytest.fixture
def files(names, trained, tmp_path):
    """An image file of each of two characters, by key."""
    found = {}
    for shard in sorted((trained / "data" / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key = Path(member.name).stem
                seen = {names[each] for each in found}
                if member.name.endswith(".png") and names[key] not in seen and len(found) < 2:
                    found[key] = tmp_path / f"{key}.png"
                    found[key].write_bytes(tar.extractfile(member).read())
    return found


def check_both_are_as_near(page, names, files):
    """The mean of two unit vectors is as near to one as to the other."""
    found_to_the_end(page, names)
    cards = zip(
        page.execute_script("return [...document.querySelectorAll('.hit')].map(e => e.title)"),
        browser.texts(page, "#grid .score"),
        strict=True,
    )
    scores = [float(score.removeprefix("cosine ")) for key, score in cards if key in files]
    assert len(scores) == 2 and scores[0] == pytest.approx(scores[1], abs=0.0011)
    assert scores[0] > 0.5


@GROUP
def test_uploaded_images(page, names, files):
    (one, first), (two, second) = ((names[key], path) for key, path in files.items())
    browser.find(page, "#file").send_keys(str(first))
    assert found_names(page, names, 1)[0] == one
    assert "images nearest to your image" in browser.texts(page, "#state")[0]
    assert page.execute_script("return document.querySelector('#chips img').naturalWidth") == 32
    browser.find(page, "#file").send_keys(str(second))
    found_names(page, names, 2)
    check_both_are_as_near(page, names, files)
    assert "images nearest to 2 images" in browser.texts(page, "#state")[0]
    ask(page, one)  # words count with them
    found_names(page, names, 3)
    assert f"“{one}” and 2 images" in browser.texts(page, "#state")[0]
    page.execute_script("history.back()")
    found_names(page, names, 4)
    browser.find(page, "#chips button").click()  # removes the first
    assert found_names(page, names, 5)[0] == two
    browser.find(page, "#chips button").click()
    browser.wait(page, "!document.querySelectorAll('#chips li, #grid li').length")


@GROUP
def test_several_images_at_once(page, names, files):
    browser.find(page, "#file").send_keys("\n".join(map(str, files.values())))
    found_names(page, names, 1)
    check_both_are_as_near(page, names, files)
    assert "images nearest to 2 images" in browser.texts(page, "#state")[0]


@GROUP
def test_captions_that_contain_a_text(page, names):
    browser.find(page, "#caption").send_keys("BOLD")
    ask(page, names[min(names)])
    found_names(page, names, 1)
    found_to_the_end(page, names)
    captions = browser.texts(page, "#grid .caption")
    assert captions and all("bold" in caption for caption in captions)
    assert len(captions) < len(names)
    browser.find(page, "#caption").clear()
    browser.find(page, "#caption").send_keys("nowhere" + Keys.ENTER)
    assert found_names(page, names, 2) == []
    assert "No image for" in browser.texts(page, "#state")[0]


def found_to_the_end(page, names):
    """Scrolls until nothing more comes."""
    shown = "document.querySelector('#rest').innerText.startsWith('All ')"
    browser.wait(page, f"(scrollTo(0, document.body.scrollHeight), {shown})")
    keys = page.execute_script("return [...document.querySelectorAll('.hit')].map(e => e.title)")
    return [names[key] for key in keys]


@GROUP
def test_the_grid_loads_as_one_scrolls(page, names):
    ask(page, names[min(names)])
    assert len(found_names(page, names, 1)) == 48
    found = found_to_the_end(page, names)
    assert sorted(found) == sorted(names.values())
    assert f"All {len(names)} are shown." in browser.texts(page, "#rest")


def focused(page):
    return page.execute_script("return document.activeElement.id || document.activeElement.title")


@GROUP
def test_the_way_by_keys(page, names):
    ask(page, names[min(names)])
    found_names(page, names, 1)
    ActionChains(page).send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT).perform()
    second = page.execute_script("return document.querySelectorAll('.hit')[1].title")
    assert focused(page) == second
    style = "return getComputedStyle(document.activeElement)"
    assert page.execute_script(f"{style}.outlineStyle") == "solid"  # the focus is seen
    ActionChains(page).send_keys(Keys.ARROW_LEFT, Keys.ARROW_UP).perform()
    assert focused(page) == "text"
    ActionChains(page).send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, "+").perform()
    found_names(page, names, 2)
    assert second not in page.execute_script(
        "return [...document.querySelectorAll('.hit')].map(e => e.title)"
    )
    assert "and “" in browser.texts(page, "#state")[0]
    ActionChains(page).send_keys(Keys.TAB).perform()
    ActionChains(page).send_keys("/").perform()
    assert focused(page) == "text"
    ActionChains(page).send_keys(Keys.ARROW_DOWN, Keys.ESCAPE).perform()
    assert focused(page) == "text"


@GROUP
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_colours_and_widths(page, names, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.resize(page, width)
    try:
        ask(page, names[min(names)])
        found_names(page, names, 1)
        color = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        lightness = np.mean([int(part) for part in re.findall(r"\d+", color)[:3]])
        assert lightness > 200 if scheme == "light" else lightness < 60
        assert page.execute_script("return document.scrollingElement.scrollWidth") == width
        columns = page.execute_script(
            "const all = [...document.querySelectorAll('#grid li')];"
            "return all.filter(e => e.offsetTop === all[0].offsetTop).length"
        )
        assert columns == (2 if width == 390 else 6)
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@GROUP
def test_what_cannot_be_searched_is_said(window, address, tmp_path):
    window.get("about:blank")
    window.get(address)
    ask(window, "letter")
    browser.wait(window, "document.querySelectorAll('#grid .hit').length")
    assert browser.texts(window, "#grid .score")[0].startswith("cosine 0.")
    browser.find(window, "#text").clear()
    ask(window, "  ")
    assert "Type a few words" in browser.texts(window, "#error")[0]
    assert browser.texts(window, "#grid .hit") == []  # old results are not the answer
    (tmp_path / "bad.png").write_bytes(b"no picture")
    browser.find(window, "#file").send_keys(str(tmp_path / "bad.png"))
    wait_for_error(window, "cannot be read as an image")
    assert browser.texts(window, "#grid .hit") == []
    (tmp_path / "words.txt").write_text("words")
    browser.find(window, "#file").send_keys(str(tmp_path / "words.txt"))
    wait_for_error(window, "not an image.")
    assert [text for text in browser.problems(window) if "status of 400" not in text] == []


@GROUP
def test_the_page_asks_no_other_machine(page, names, address):
    ask(page, names[min(names)])
    found_names(page, names, 1)
    asked = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert asked and all(one.startswith((address, "data:", "blob:")) for one in asked)
    assert (
        page.execute_script(
            "return document.querySelectorAll('button:not([type]), img:not([alt])').length"
        )
        == 0
    )


@GROUP
def test_bad_input_of_the_command(trained, capsys, address):
    run, data = str(trained / "logs" / "glyphs"), str(trained / "data" / "train")
    port = re.search(r":(\d+)/", address)[1]
    for flags, words in (
        ([run, "--images", str(trained / "nowhere")], "nowhere"),
        ([str(trained), "--images", data], "is neither a run folder"),
        ([run, "--images", data, "--port", "99999"], "--port: 99999 is out of range"),
        ([run, "--images", data, "--port", port], f"--port {port} is in use"),
    ):
        features = ["--embeddings", str(trained / "features"), "--workers", "0"]
        assert main(["search", *flags, *features, "--device", "cpu"]) == 2
        assert words in capsys.readouterr().err
