"""The demo's page in a real browser: one server and one headless Chromium, which is driven as a visitor would."""

import base64
import io
import json
import os
import shutil
import socket
import time
import zipfile
from pathlib import Path

import pytest
from test_demo import NAMES, make_adapter, make_zip, png

from coop_hf import CoOpModel, emoji_model_path, load_emoji
from coop_hf.demo.answers import ask, load_shelf


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server"
).split()

pytest.importorskip("gradio", reason="the page needs Gradio: pip install coop_hf[demo]")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser")
exceptions = pytest.importorskip("selenium.common.exceptions")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("no Chromium with chromedriver here (Debian: chromium, chromium-driver)", allow_module_level=True)

SECONDS = 90  # on a busy machine; nothing here takes more than a few

DROP = """
const [target, name, type, data] = arguments;
const given = new DataTransfer();
given.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type}));
if (target === null) {
  document.dispatchEvent(new ClipboardEvent("paste", {clipboardData: given, bubbles: true}));
} else {
  for (const kind of ["dragenter", "dragover", "drop"]) {
    target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: given}));
  }
}
"""


@pytest.fixture(scope="module")
def looked_up():
    """Every host name that this process has looked up."""
    names, look_up = set(), socket.getaddrinfo

    def remember(host, *args, **kwargs):
        names.add(host.decode() if isinstance(host, bytes) else host)
        return look_up(host, *args, **kwargs)

    socket.getaddrinfo = remember
    yield names
    socket.getaddrinfo = look_up


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder / "one-for-all"), make_adapter(folder / "one-for-each", True)]


@pytest.fixture(scope="module")
def url(adapters, looked_up):
    from coop_hf.demo.app import launch

    app, address, _ = launch(adapters, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield address
    app.get_blocks().close(verbose=False)


class Visitor:
    """One browser, and what a person does in it."""

    def __init__(self, url, folder):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.url, self.downloads = url, folder / "downloads"
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)
        place = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.driver.execute_cdp_cmd("Browser.setDownloadBehavior", place)
        self.urls = set()

    def requested(self):
        """Addresses that the pages have asked for."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.urls.add(message["params"]["request"]["url"])
        return {url for url in self.urls if url.startswith(("http", "ws"))}

    def visit(self, width=1280, height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url)
        ready = ("#image button[aria-dropeffect]", "#names textarea", "#learned .answer", "#template .answer")
        self.until(lambda: all(self.all(selector) for selector in ready))

    def until(self, condition):
        end = time.monotonic() + SECONDS
        while True:
            try:
                result = condition()
            except exceptions.WebDriverException:  # the element was just replaced
                result = False
            if result or time.monotonic() > end:
                assert result, self.driver.find_element("tag name", "body").text[:2000]
                return result
            time.sleep(0.05)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def click(self, selector, number=0):
        self.until(lambda: len(self.all(selector)) > number)
        self.driver.execute_script("arguments[0].click()", self.all(selector)[number])

    def tab(self, name):
        button = f"//button[@role='tab'][normalize-space()='{name}']"
        self.until(lambda: self.driver.find_elements("xpath", button))[0].click()

    def drop(self, name, content, selector="#image button[aria-dropeffect]"):
        if selector and not self.all(selector):
            self.click("#image button[aria-label='Remove Image']")
            self.until(lambda: self.all(selector))
        target = self.all(selector)[0] if selector else None
        self.driver.execute_script(DROP, target, name, "image/png", base64.b64encode(content).decode())

    def write(self, text):
        box = self.all("#names textarea")[0]
        box.send_keys(webdriver.Keys.CONTROL, "a")
        box.send_keys(text)

    def choose(self, name):
        self.driver.find_element("css selector", "#prompt input").click()
        options = f"//*[@role='option'][contains(., '{name}')]"
        self.until(lambda: self.driver.find_elements("xpath", options))[0].click()

    def scores(self, part="learned"):
        """Names and shown percentages of a column."""
        script = """return [...document.querySelectorAll(`#${arguments[0]} .share`)].map(
            (bar) => [bar.querySelector(".name").textContent, bar.querySelector(".number").textContent])"""
        return [tuple(pair) for pair in self.driver.execute_script(script, part)]

    def said(self, place="said"):
        script = "return document.querySelector(`#${arguments[0]} .say`)?.textContent ?? ''"
        return self.driver.execute_script(script, place)


@pytest.fixture(scope="module")
def visitor(url, tmp_path_factory):
    os.environ["SE_OFFLINE"] = "true"  # selenium fetches no driver
    visitor = Visitor(url, tmp_path_factory.mktemp("visitor"))
    yield visitor
    visitor.driver.quit()


@pytest.fixture(scope="module")
def shelf(adapters):
    return load_shelf(adapters)


@pytest.fixture(scope="module")
def heart():
    test, file = load_emoji()["test"], io.BytesIO()
    test[test["label"].index(1)]["image"].save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def expected(shelf, heart, tmp_path_factory):
    """What the page is to show of the heart."""
    path = tmp_path_factory.mktemp("heart") / "heart.png"
    path.write_bytes(heart)

    def expect(key, names, part="learned"):
        answer = ask(shelf, key, path, "\n".join(names))
        return [(name, f"{score:.1%}") for name, score in getattr(answer, part)]

    return expect


def test_an_image_is_dropped(visitor, heart, expected):
    visitor.visit()
    assert "No answer yet" in visitor.all("#learned")[0].text
    visitor.drop("heart.png", heart)
    visitor.until(visitor.scores)
    assert visitor.scores() == expected("one-for-all", NAMES)
    assert visitor.scores("template") == expected("one-for-all", NAMES, "template")
    assert visitor.scores() != visitor.scores("template")
    assert "an emoji of a {}." in visitor.all("#template")[0].text and visitor.said() == ""
    visitor.drop("other.png", png())  # in its place
    visitor.until(lambda: visitor.scores() and visitor.scores() != expected("one-for-all", NAMES))


def test_class_names_are_edited(visitor, heart, expected):
    visitor.visit()
    visitor.drop("heart.png", heart)
    visitor.write("cat\nheart\ncat")
    visitor.until(lambda: "stands there more than once" in visitor.said())
    visitor.until(lambda: visitor.scores() == expected("one-for-all", ["cat", "heart"]))
    visitor.write("clock\nheart")
    visitor.until(lambda: visitor.scores() == expected("one-for-all", ["clock", "heart"]))
    assert visitor.said() == ""
    visitor.write(" ")
    visitor.until(lambda: visitor.said() == "Write the names of the classes, one in a line.")
    assert visitor.scores() == []


def test_two_visitors_do_not_see_each_other(visitor, heart, expected):
    visitor.visit()
    visitor.drop("heart.png", heart)
    visitor.write("clock\nheart")
    visitor.until(lambda: visitor.scores() == expected("one-for-all", ["clock", "heart"]))
    first = visitor.driver.current_window_handle
    visitor.driver.switch_to.new_window("tab")
    visitor.visit()
    visitor.drop("heart.png", heart)
    visitor.until(lambda: visitor.scores() == expected("one-for-all", NAMES))
    visitor.driver.close()
    visitor.driver.switch_to.window(first)
    assert visitor.scores() == expected("one-for-all", ["clock", "heart"])


def test_what_belongs_to_its_classes_is_not_edited(visitor, heart, expected):
    visitor.visit()
    visitor.drop("heart.png", heart)
    visitor.until(visitor.scores)
    visitor.choose("one-for-each")
    visitor.until(lambda: visitor.scores() == expected("one-for-each", NAMES))
    visitor.until(lambda: "so they cannot be edited" in visitor.all("#names")[0].text)
    assert not visitor.all("#names textarea")[0].is_enabled()


def test_nearest_words(visitor):
    visitor.visit()
    visitor.driver.find_element("xpath", "//button[contains(., 'What was learned')]").click()
    visitor.until(lambda: visitor.all("#about li"))
    assert [item.text.split()[0] for item in visitor.all("#about li")] == ["an", "emoji", "of", "a"]


def test_a_broken_file_gets_a_message(visitor, heart, expected):
    visitor.visit()
    visitor.drop("broken.png", b"this is no image")
    visitor.until(lambda: visitor.said().startswith("“broken.png” cannot be read as an image: it is damaged"))
    assert visitor.scores() == []
    visitor.drop("heart.png", heart)
    visitor.until(lambda: visitor.scores() == expected("one-for-all", NAMES))
    assert visitor.said() == ""


def test_an_image_is_pasted(visitor, heart, expected):
    visitor.visit()
    visitor.drop("heart.png", heart, selector=None)
    visitor.until(lambda: visitor.scores() == expected("one-for-all", NAMES))


def test_an_example_is_clicked(visitor, expected):
    visitor.visit()
    assert len(visitor.all("#examples img")) == 12
    visitor.click("#examples button", 1)  # the first heart of the test part, as in `heart`
    visitor.until(lambda: visitor.scores() == expected("one-for-all", NAMES))


def emoji_files(classes=3, each=8):
    """Paths and encoded images of a visitor's folder."""
    train, files = load_emoji()["train"], []
    for label in range(classes):
        rows = [row for row, other in enumerate(train["label"]) if other == label][:each]
        for row in rows:
            content = io.BytesIO()
            train[row]["image"].save(content, "PNG")
            files.append((f"mine/{train.features['label'].names[label]}/{row}.png", content.getvalue()))
    return files


def learn(visitor, path, box="zip", is_dropped=False):
    """Brings a zip or a folder, and starts learning."""
    visitor.tab("Learn")
    field = visitor.until(lambda: visitor.all(f"#{box} input[type=file]"))[0]
    if is_dropped:  # as the system does it, since a script cannot make folders
        visitor.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", visitor.all(f"#{box}")[0])
        place = visitor.driver.execute_script("return arguments[0].getBoundingClientRect()", visitor.all(f"#{box}")[0])
        spot = {"x": place["x"] + place["width"] / 2, "y": place["y"] + place["height"] / 2}
        for kind in ("dragEnter", "dragOver", "drop"):
            data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
            visitor.driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "data": data, **spot})
    else:
        field.send_keys(str(path))
    visitor.until(lambda: visitor.all(f"#{box} .file-preview") or visitor.all(f"#{box} table"))
    visitor.click("#start")


def test_a_prompt_is_learned_from_a_zip(visitor, heart, tmp_path):
    visitor.visit()
    learn(visitor, make_zip(tmp_path / "mine.zip", emoji_files()))
    visitor.until(lambda: "Learning" in visitor.all("#result")[0].text and "%" in visitor.all("#result")[0].text)
    visitor.until(lambda: len(visitor.all("#result .share")) == 2)
    text = visitor.all("#result")[0].text
    assert "Accuracy on 6 test images, 3 classes, learned from 18 images" in text
    before, after = [float(n.text.rstrip("%")) / 100 for n in visitor.all("#result .number")]
    assert 0 <= before <= 1 and after >= 0.5  # of three classes, two of which are nothing like each other

    visitor.until(lambda: visitor.all("#download")[0].is_displayed())
    visitor.click("#download")
    archive = visitor.downloads / "my-prompt.zip"
    visitor.until(archive.exists)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    folder = tmp_path / "my-prompt"
    assert sorted(os.listdir(folder)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    for name in ("README.md", "adapter_config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert str(Path(emoji_model_path()).parent) not in text and "/tmp" not in text
    assert f"| This prompt | **{100 * after:.1f}**" in (folder / "README.md").read_text(encoding="utf-8")
    model = CoOpModel.from_pretrained(folder, base_model=emoji_model_path())
    assert model.class_names == ["hand", "heart", "smiley face"]

    visitor.click("#use")
    visitor.until(lambda: visitor.all("#image button[aria-dropeffect]") and visitor.all("#image")[0].is_displayed())
    visitor.until(lambda: visitor.all("#names textarea")[0].get_attribute("value") == "hand\nheart\nsmiley face")
    visitor.drop("heart.png", heart)
    (tmp_path / "heart.png").write_bytes(heart)
    prediction = [(p["label"], f"{p['score']:.1%}") for p in model.predict(str(tmp_path / "heart.png"))]
    visitor.until(lambda: visitor.scores() == prediction)


def test_a_folder_is_brought(visitor, tmp_path):
    for name, content in emoji_files(classes=2, each=3):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "mine" / "heart" / "broken.png").write_bytes(b"broken")
    visitor.visit()
    learn(visitor, tmp_path / "mine", "folder")
    visitor.until(lambda: len(visitor.all("#result .share")) == 2)
    assert "2 test images, 2 classes, learned from 4 images" in visitor.all("#result")[0].text
    assert visitor.said("learn-said").startswith("1 files cannot be read as images and were left out")


def test_a_folder_is_dropped(visitor, tmp_path):
    (tmp_path / "mine" / "sea lion").mkdir(parents=True)
    for number in range(120):  # a browser gives a hundred at a time
        (tmp_path / "mine" / "sea lion" / f"{number}.png").write_bytes(png())
    visitor.visit()
    learn(visitor, tmp_path / "mine", "folder", is_dropped=True)
    visitor.until(lambda: "There is one class only, “sea lion”" in visitor.said("learn-said"))


@pytest.mark.parametrize(
    "entries, message",
    [
        ([], "There is no image in it"),
        ([("cat/a.png", png()), ("cat/b.png", png())], "There is one class only, “cat”"),
        ([(f"{name}/{n}.png", png()) for name in ("my_cat", "My cat") for n in range(2)], "are one name to a prompt"),
    ],
)
def test_zips_that_get_a_message(visitor, tmp_path, entries, message):
    visitor.visit()
    learn(visitor, make_zip(tmp_path / "mine.zip", entries))
    visitor.until(lambda: message in visitor.said("learn-said"))
    assert not visitor.all("#result .share")


def test_nothing_is_brought(visitor):
    visitor.visit()
    visitor.tab("Learn")
    visitor.click("#start")
    visitor.until(lambda: visitor.said("learn-said") == "Choose a zip or a folder first.")


def test_a_phone_scrolls_down_only(visitor, heart):
    visitor.visit(390, 844)
    visitor.drop("heart.png", heart)
    visitor.write("heart\na long name of a class that goes on andonandonandonandon")
    visitor.until(lambda: len(visitor.scores()) == 2)
    for tab in ("Try", "Learn"):
        visitor.tab(tab)
        assert visitor.driver.execute_script("return document.documentElement.scrollWidth") <= 390
        outside = """return [...document.querySelectorAll("main *")]
            .filter((e) => e.getBoundingClientRect().right > 391 && e.offsetWidth && !e.closest("svg"))
            .map((e) => e.outerHTML.slice(0, 99))"""
        assert visitor.driver.execute_script(outside) == []


def test_nobody_is_called(visitor, url, looked_up):
    """Of all that was done before: the page asked its own server alone, and the server nobody."""
    visitor.visit()
    assert len(visitor.requested()) > 20 and "127.0.0.1" in looked_up
    assert {address for address in visitor.requested() if not address.startswith(url)} == set()
    assert looked_up <= {"127.0.0.1", "localhost", "::1", "0.0.0.0", None}
