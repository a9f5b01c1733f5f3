#!/usr/bin/env python3
"""Pre-train the small emoji CLIP, first stage: a stock `transformers.CLIPModel` from scratch, on emoji and icons.

Reads the pre-training pictures that `build_data.py` wrote, renders each one anew at every step (smaller, turned, gray,
on a colored background, ...) and writes captions that may say so: "a small gray drawing of a fox on a blue
background". A caption that is true of several pictures of the batch is a positive of all of them. What a caption says
about the rendering is therefore information, and a prompt's context matters to the trained model.

Writes a folder that `CLIPModel`, `CLIPProcessor` and `CLIPTokenizer` load; `pretrain_words.py`, the second stage, goes
on from there. One seed, one number of processes and threads and one torch build give the same weights.

    python examples/emoji/pretrain.py
"""

import argparse
import heapq
import json
import math
import os
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from coop_hf.demo.emoji import load_emoji


HERE = Path(__file__).resolve().parent

# Everything that a caption may claim about how a picture is drawn; a picture holds the claims that are true of it.
STYLE_CLAIMS = {
    "noto": ["emoji", "noto", "shaded", "colorful"],
    "noto-v1": ["emoji", "blob", "shaded", "colorful"],
    "fxemoji": ["emoji", "firefox", "flat", "colorful"],
    "twemoji": ["emoji", "twitter", "flat", "colorful"],
    "mdi": ["icon", "material", "one-color"],
    "ph": ["icon", "phosphor", "one-color"],
    "game-icons": ["icon", "game", "one-color"],
    "flat-color": ["icon", "flat", "colorful"],
    "fluent-color": ["icon", "shaded", "colorful"],
}
COLORS = {
    "red": (224, 60, 49), "orange": (245, 145, 40), "yellow": (250, 210, 60), "green": (70, 165, 80),
    "blue": (50, 110, 220), "purple": (140, 80, 190), "pink": (245, 150, 190), "brown": (135, 90, 60),
    "black": (20, 20, 20), "gray": (150, 150, 150),
}  # fmt: skip
EFFECTS = ["small", "large", "rotated", "upside-down", "grayscale", "inverted", "pale", "blurry", "pixelated",
           "silhouette"]  # fmt: skip
DRAWN = ["outline", "solid", "bold", "duotone"]
CLAIMS = sorted({c for claims in STYLE_CLAIMS.values() for c in claims}) + EFFECTS + DRAWN + ["plain"]
CLAIMS += [f"{color} object" for color in COLORS] + [f"{color} background" for color in COLORS]
BIT = {claim: 1 << position for position, claim in enumerate(CLAIMS)}
# How captions word a claim where the claim's own name does not do.
WORDING = {
    "small": ["small", "tiny", "little"],
    "large": ["large", "big", "close-up"],
    "rotated": ["rotated", "tilted"],
    "grayscale": ["grayscale", "gray", "black and white"],
    "inverted": ["negative", "color-inverted"],
    "pale": ["pale", "faded"],
    "blurry": ["blurry", "low resolution"],
    "pixelated": ["pixelated", "blocky"],
    "silhouette": ["black silhouette", "high contrast"],
    "shaded": ["shaded", "3d", "glossy"],
    "colorful": ["colorful", "color"],
    "one-color": ["one-color", "single-color"],
    "outline": ["outline", "line"],
    "solid": ["solid", "filled"],
    "plain": ["plain", "clean", "simple"],
}
NOUNS = ["picture", "image", "drawing", "illustration", "symbol"]


def read_pictures(work_dir, size):
    """The pictures in the model's size, what is known of each picture, and the words known of each emoji.

    The pictures are uint8 of shape `(n, 4, size, size)`: red, green and blue, multiplied by alpha, and alpha.
    """
    described = json.loads((work_dir / "pretrain.json").read_text())
    with np.load(work_dir / "pretrain.npz") as file:
        pixels = torch.from_numpy(file["pixels"]).permute(0, 3, 1, 2)
    resized = []
    for part in pixels.split(1024):
        rgb, alpha = part[:, :3].float(), part[:, 3:].float()
        layers = torch.cat([rgb * alpha / 255, alpha], 1)
        if size != layers.shape[-1]:  # the image processor's way: bicubic, with antialiasing
            layers = F.interpolate(layers, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
        resized.append(layers.clamp(0, 255).round().to(torch.uint8))
    return torch.cat(resized), described["pictures"], described["emoji"]


def learn_merges(words, count):
    """Byte-pair encoding: join the most frequent pair of neighbours, again and again; ties go by the alphabet.

    The trainer of `tokenizers` settles ties by chance, and no two runs would get the same token ids.

    Args:
        words (`Counter`): word as byte-level characters -> how often it occurs.
        count (`int`): how many pairs to join.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    weights, places, totals = list(words.values()), defaultdict(set), Counter()

    def add(index, sign):
        for pair in zip(pieces[index], pieces[index][1:], strict=False):
            totals[pair] += sign * weights[index]
            places[pair].add(index)

    for index in range(len(pieces)):
        add(index, 1)
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < count:
        total, best = heapq.heappop(heap)
        if totals[best] != -total or not total:
            continue  # an outdated entry: the pair has been joined elsewhere since
        merges.append(best)
        changed = set()
        for index in sorted(places[best]):
            add(index, -1)
            changed.update(zip(pieces[index], pieces[index][1:], strict=False))
            joined = []
            for piece in pieces[index]:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            pieces[index] = joined
            add(index, 1)
            changed.update(zip(joined, joined[1:], strict=False))
        for pair in changed:
            heapq.heappush(heap, (-totals[pair], pair))
    return merges


def train_tokenizer(texts, vocab_size, max_length):
    """A CLIP tokenizer with a vocabulary of its own: bytes, bytes at a word's end, merges, start, end."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    backend, words = CLIPTokenizer().backend_tokenizer, Counter()
    for text in texts:
        pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
        words.update(word for word, _ in pieces)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges(words, vocab_size - 2 * len(alphabet) - 2)
    tokens = dict.fromkeys([*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)])
    vocab = {token: index for index, token in enumerate([*tokens, start, end])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


class Captions:
    """Writes captions of pictures and knows which captions are true of which pictures.

    Args:
        pictures (`list[dict]`): style, names and drawing claims of each picture.
        emoji (`dict`): emoji name -> group, subgroup and tags.
    """

    def __init__(self, pictures, emoji):
        self.pictures, self.emoji = pictures, emoji
        self.concepts, self.style_bits = [], []
        for picture in pictures:
            concepts = {name.lower() for name in picture["names"]}
            for name in picture["names"]:
                words = emoji.get(name)
                if words:
                    concepts |= {self.group(words["group"]), self.group(words["subgroup"])}
                    concepts |= {f"tag:{tag.lower()}" for tag in words["tags"]}
            self.concepts.append(concepts)
            claims = STYLE_CLAIMS[picture["style"]] + picture["drawn"]
            self.style_bits.append(sum(BIT[claim] for claim in claims))

    @staticmethod
    def group(name):
        return f"group:{name.replace('-', ' ')}"

    def texts(self):
        """Words to train the tokenizer on: names, tags, groups and the wording of claims, as often as they occur."""
        for picture in self.pictures:
            yield from picture["names"]
        for name, words in self.emoji.items():
            yield from [name, words["group"], words["subgroup"].replace("-", " "), *words["tags"]]
        for _ in range(50):
            yield from [
                *CLAIMS,
                *(w for words in WORDING.values() for w in words),
                *NOUNS,
                "a an the of on some kind .",
            ]

    def write(self, index, bits, room, kinds, rng):
        """One caption of a picture: `(text, concept, claims)`.

        Args:
            index (`int`): which picture.
            bits (`int`): the claims that are true of it as it is rendered.
            room (`int`): about how many words the caption may take.
            kinds (`float`): how often an emoji's caption names its kind, not the emoji: "food fruit", "vehicle".
            rng (`random.Random`): where the choices come from.
        """
        picture = self.pictures[index]
        name = rng.choice(picture["names"])
        words, subject, concept = self.emoji.get(name), name, name.lower()
        roll = rng.random()
        if words and roll < 0.7 * kinds:
            kind = words["subgroup"] if roll < 0.5 * kinds else words["group"]
            concept = self.group(kind)
            subject = kind.replace("-", " ")
        elif words and words["tags"] and roll < kinds:
            tag = rng.choice(words["tags"])
            subject, concept = tag, f"tag:{tag.lower()}"
        elif words and words["tags"] and (roll < kinds + 0.2 or room > 16):
            extra = rng.sample(words["tags"], min(len(words["tags"]), rng.randint(1, max(1, room // 3))))
            if rng.random() < 0.5:
                extra.append(words["subgroup"].replace("-", " "))
            subject = f"{name}, {', '.join(extra)}"
        true = [claim for claim in CLAIMS if bits & BIT[claim]]
        said = [claim for claim in true if rng.random() < 0.5]
        if len(said) > 3:
            said = rng.sample(said, 3)
        if rng.random() < 0.25:
            said = []
        text = self.phrase(subject, said, rng)
        return text, concept, sum(BIT[claim] for claim in said)

    @staticmethod
    def phrase(subject, said, rng):
        """Put the subject and the claims into a sentence."""
        if not said and rng.random() < 0.4:
            return rng.choice([subject, f"{subject}."])
        noun = next((claim for claim in said if claim in ("emoji", "icon")), rng.choice(NOUNS))
        before, after, color = [], "", ""
        for claim in said:
            if claim.endswith(" background"):
                after = f" on a {claim}"
            elif claim.endswith(" object"):
                color = claim.removesuffix("object")
            elif claim != noun:
                before.append(rng.choice(WORDING.get(claim, [claim])))
        rng.shuffle(before)
        determiner = "" if color else rng.choice(["a ", "a ", "a ", "the ", ""])
        link = rng.choice([" of ", " of ", ": ", " showing "])
        start = rng.choice(["a ", "a ", "the ", ""])
        form = rng.random()
        if form < 0.25 and not after:
            text = f"{' '.join([*before, color + subject, noun])}"
        else:
            text = f"{start}{' '.join([*before, noun])}{link}{determiner}{color}{subject}{after}"
        return re.sub(r"\ba (?=[aeiou])", "an ", text) + rng.choice(["", ".", "."])

    def truth(self, indices, bits, captions):
        """`(pictures, captions)` boolean matrix: is the caption true of the picture?"""
        said = np.array([claims for _, _, claims in captions], dtype=np.int64)
        allowed = (said[None, :] & ~np.array(bits, dtype=np.int64)[:, None]) == 0
        wanted = [concept for _, concept, _ in captions]
        shown = np.array([[concept in self.concepts[i] for concept in wanted] for i in indices])
        return torch.from_numpy(allowed & shown)


def render(pixels, style_bits, rng, generator):
    """Render pictures with random effects.

    Args:
        pixels (`torch.Tensor`): uint8 of shape `(n, 4, size, size)`: color multiplied by alpha, and alpha.
        style_bits (`list[int]`): what is true of each picture however it is rendered.

    Returns:
        `tuple`: float RGB in 0..1 of shape `(n, 3, size, size)` and the claims true of each result as bits.
    """
    n, size = len(pixels), pixels.shape[-1]
    white = (255, 255, 255)
    effects, bits, colors, grounds, scale, angle = [], [], [], [], [], []
    for known in style_bits:
        one_color = bool(known & BIT["one-color"])
        chosen, color, ground = set(), None, None
        if rng.random() < 0.5:
            free = [e for e in EFFECTS if not (one_color and e in ("silhouette", "grayscale", "pale"))]
            chosen = set(rng.sample(free, 1 if rng.random() < 0.7 else 2))
            if {"small", "large"} <= chosen:
                chosen.remove("large")
            if {"rotated", "upside-down"} <= chosen:
                chosen.remove("rotated")
        if "silhouette" in chosen:
            chosen -= {"grayscale", "inverted", "pale"}
            known &= ~BIT["shaded"]
        if chosen & {"silhouette", "grayscale", "inverted"}:
            known &= ~BIT["colorful"]
        if one_color and "inverted" not in chosen and rng.random() < 0.35:
            color = rng.choice(list(COLORS))
            known |= BIT[f"{color} object"]
        if not chosen & {"inverted", "grayscale", "pale"} and rng.random() < 0.2:
            ground = rng.choice(list(COLORS))
            if ground == color or (ground == "black" and (one_color or "silhouette" in chosen)):
                ground = None
            else:
                known |= BIT[f"{ground} background"]
        known |= sum(BIT[effect] for effect in chosen)
        if not chosen and color is None and ground is None:
            known |= BIT["plain"]
        low, high = (0.4, 0.6) if "small" in chosen else (1.25, 1.6) if "large" in chosen else (0.85, 1.1)
        scale.append(rng.uniform(low, high))
        low, high = (25, 100) if "rotated" in chosen else (170, 190) if "upside-down" in chosen else (0, 8)
        angle.append(rng.choice([-1, 1]) * rng.uniform(low, high) * math.pi / 180)
        paint = COLORS[color] if color else (0, 0, 0) if one_color or "silhouette" in chosen else None
        colors.append(paint or (-1, -1, -1))
        fade = rng.uniform(0, 0.3)
        grounds.append([(1 - fade) * c + fade * 255 for c in COLORS[ground]] if ground else white)
        effects.append(chosen)
        bits.append(known)

    def having(*names):
        return torch.tensor([bool(chosen & set(names)) for chosen in effects])

    # Shapes: one affine warp of color and alpha.
    scale, angle = torch.tensor(scale), torch.tensor(angle)
    stretch = 1 + (torch.rand(n, generator=generator) - 0.5) * 0.1
    shift = (torch.rand(n, 2, generator=generator) - 0.5) * 0.16
    flip = torch.where(torch.rand(n, generator=generator) < 0.3, -1.0, 1.0)
    flip[torch.tensor([bool(known & BIT["icon"]) for known in bits])] = 1  # letters and arrows, mostly
    cos, sin = angle.cos() / scale, angle.sin() / scale
    rows = [cos * flip * stretch, -sin * flip, shift[:, 0], sin * stretch, cos, shift[:, 1]]
    grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), (n, 4, size, size), align_corners=False)
    layers = pixels.float() / 255
    paint = torch.tensor(colors, dtype=torch.float32).view(n, 3, 1, 1) / 255
    layers[:, :3] = torch.where(paint >= 0, paint * layers[:, 3:], layers[:, :3])
    small = having("small")
    if small.any():  # blur before shrinking, or sampling would skip pixels
        layers[small] = F.avg_pool2d(layers[small], 3, stride=1, padding=1)
    layers = F.grid_sample(layers, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    result = layers[:, :3] + torch.tensor(grounds).view(n, 3, 1, 1) / 255 * (1 - layers[:, 3:])
    # Colors, then resolution.
    jitter = 1 + (torch.rand(n, 3, 1, 1, generator=generator) - 0.5) * 0.2
    result = 1 - (1 - result) * jitter
    luma = (result * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    result = torch.where(having("grayscale").view(n, 1, 1, 1), luma, result)
    result = torch.where(having("inverted").view(n, 1, 1, 1), 1 - result, result)
    result = torch.where(having("pale").view(n, 1, 1, 1), 0.65 + 0.35 * result, result)
    for name, mode in (("blurry", "bilinear"), ("pixelated", "nearest")):
        some = having(name)
        if some.any():
            coarse = F.avg_pool2d(result[some], size // 12)
            result[some] = F.interpolate(coarse, size=(size, size), mode=mode)
    return result.clamp(0, 1), bits


def image_features(model, pixels, keep, generator):
    """Normalised image features; with `keep` below 1, of a random part of the patches only (cheaper, and harder)."""
    vision = model.vision_model
    hidden = vision.embeddings(pixels)
    if keep < 1:
        patches = hidden.shape[1] - 1
        order = torch.rand(len(hidden), patches, generator=generator).argsort(1)[:, : round(keep * patches)] + 1
        order = torch.cat([torch.zeros(len(hidden), 1, dtype=torch.long), order], 1)
        hidden = hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[2]))
    hidden = vision.encoder(inputs_embeds=vision.pre_layrnorm(hidden)).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(hidden[:, 0])), dim=-1)


def text_features(model, tokenizer, texts, max_length, chunks=1):
    """Normalised text features of captions, cut to `max_length` tokens; short and long ones go through in `chunks`."""
    ids = tokenizer(texts, truncation=True, max_length=max_length).input_ids
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    features = []
    for part in np.array_split(order, chunks):
        tokens = tokenizer.pad({"input_ids": [ids[index] for index in part]}, return_tensors="pt")
        features.append(model.get_text_features(**tokens).pooler_output)
    return F.normalize(torch.cat(features)[np.argsort(order)], dim=-1)


def contrastive_loss(logits, truth):
    """Every true pair against all false ones of its row, and of its column; other true pairs do not compete.

    The mean is over the rows, and the columns, that have a true pair.
    """
    loss = 0
    for scores, true in ((logits, truth), (logits.T, truth.T)):
        false = scores.masked_fill(true, -torch.inf).logsumexp(1, keepdim=True)
        pairs = F.softplus(false - scores) * true
        loss = loss + (pairs.sum(1) / true.sum(1).clamp(min=1)).sum() / true.any(1).sum() / 2
    return loss


class Cycle:
    """Items for ever, in a new random order each round; what is drawn at a position depends on the seed alone."""

    def __init__(self, items, seed):
        self.items, self.seed, self.round, self.order = list(items), seed, None, []

    def __getitem__(self, position):
        number, place = divmod(position, len(self.items))
        if number != self.round:
            self.round, self.order = number, list(self.items)
            random.Random(f"{self.seed}-{number}").shuffle(self.order)
        return self.order[place]


def average_gradients(parameters, shared, rank, barrier):
    """Replace each process's gradients by the mean of all processes', through memory that they share.

    Args:
        shared (`torch.Tensor`): one row of floats per process, in shared memory.
        barrier (`multiprocessing.Barrier`): where the processes wait for each other.
    """
    torch.cat([p.grad.flatten() for p in parameters], out=shared[rank])
    barrier.wait()
    mean = shared.mean(0)
    barrier.wait()
    for p, grad in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def build_model(args, tokenizer):
    """A `CLIPModel` with random weights in the sizes asked for, and its processor."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.text_width,
        "intermediate_size": 4 * args.text_width,
        "num_hidden_layers": args.text_layers,
        "num_attention_heads": args.text_width // 32,
        "hidden_act": "gelu",  # twice as fast as CLIP's usual "quick_gelu" on a CPU
        "max_position_embeddings": args.positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": args.width,
        "intermediate_size": 4 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.width // 32,
        "hidden_act": "gelu",
        "image_size": args.image_size,
        "patch_size": args.patch_size,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=args.projection)
    model = CLIPModel(config)
    half = [0.5, 0.5, 0.5]
    processor = CLIPImageProcessor(
        size={"shortest_edge": args.image_size},
        crop_size={"height": args.image_size, "width": args.image_size},
        image_mean=half,
        image_std=half,
    )
    return model, CLIPProcessor(image_processor=processor, tokenizer=tokenizer)


def save(model, processor, folder, weights=None):
    """Write model and processor, weights in half precision, replacing each file of an earlier save in one step."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    weights = model.state_dict() if weights is None else weights
    weights = {key: value.detach().half().contiguous() for key, value in weights.items()}
    model.save_pretrained(fresh, state_dict=weights)
    processor.save_pretrained(fresh)
    config = json.loads((fresh / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half precision, meant to run in single precision
    (fresh / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (fresh / "model.safetensors").chmod(0o644)
    for file in sorted(fresh.iterdir()):
        os.replace(file, folder / file.name)
    fresh.rmdir()


@torch.no_grad()
def validate(model, processor):
    """Zero-shot accuracy on the validation part of the default style, one plain prompt."""
    part = load_emoji()["validation"]
    names, model = part.features["label"].names, model.eval()
    pixels = processor(images=list(part["image"]), return_tensors="pt")["pixel_values"]
    text = text_features(model, processor.tokenizer, [f"an emoji of a {name}." for name in names], 32)
    guess = (image_features(model, pixels, 1, None) @ text.T).argmax(1)
    model.train()
    return (guess == torch.tensor(part["label"])).float().mean().item()


def train(rank, args, shared, barrier):
    """The training loop of one process; process 0 writes and prints."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    pixels, pictures, emoji = read_pictures(args.work_dir, args.image_size)
    captions = Captions(pictures, emoji)
    tokenizer = train_tokenizer(captions.texts(), args.vocab_size, args.positions)
    model, processor = build_model(args, tokenizer)
    model.train()
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    if rank == 0:
        print(f"{len(pictures)} pictures, {len(emoji)} emoji names, {len(tokenizer)} tokens")
        print(f"{size / 1e6:.2f} M parameters", flush=True)

    is_emoji = [bool(bits & BIT["emoji"]) for bits in captions.style_bits]
    pools = [Cycle((i for i, yes in enumerate(is_emoji) if yes is want), args.seed) for want in (True, False)]
    batch = args.batch_size // args.processes
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)

    def learning_rate(step):  # rise, stay, fall: before the fall, nothing depends on the number of steps
        falling = (args.steps - step) / (args.fall * args.steps)
        return args.lr * min(1.0, step / args.warmup, 0.01 + 0.99 * falling)

    first, state_file = 1, args.out.with_name(args.out.name + ".state.pt")
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        first = state["step"] + 1
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if barrier:
            barrier.wait()
    start, total, hits = time.time(), 0.0, 0.0
    for step in range(first, args.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        rng = random.Random(f"{args.seed}-{step}-{rank}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        share, kinds = (0.6, 0.2) if step <= args.turn else (0.8, 0.5)
        indices, from_emoji = [], round(batch * share)
        for pool, count in zip(pools, (from_emoji, batch - from_emoji), strict=True):
            position = ((step - 1) * args.processes + rank) * count
            indices += [pool[position + offset] for offset in range(count)]
        rendered, bits = render(pixels[indices], [captions.style_bits[i] for i in indices], rng, generator)
        room, length = rng.choices([(6, 20), (10, 28), (20, args.positions)], [0.6, 0.25, 0.15])[0]
        written = [captions.write(index, b, room, kinds, rng) for index, b in zip(indices, bits, strict=True)]
        truth = captions.truth(indices, bits, written)
        keep = args.keep if step < args.whole_from * args.steps else 1.0
        images = image_features(model, (rendered - 0.5) / 0.5, keep, generator)
        texts = text_features(model, tokenizer, [text for text, _, _ in written], length, chunks=2)
        logits = model.logit_scale.exp() * images @ texts.T
        loss = contrastive_loss(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        if args.processes > 1:
            average_gradients(parameters, shared[:, :size], rank, barrier)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(args.max_scale))
            best = logits.argmax(1, keepdim=True)
            total, hits = total + loss.item(), hits + truth.gather(1, best).float().mean().item()
        if rank > 0:
            continue
        if step % args.log_every == 0 or step == args.steps:
            speed = (step - first + 1) * args.batch_size / (time.time() - start)
            print(
                f"step {step:6} loss {total / args.log_every:.3f} true caption first {hits / args.log_every:.3f} "
                f"scale {model.logit_scale.exp().item():.1f} pictures/s {speed:.0f}",
                flush=True,
            )
            total, hits = 0.0, 0.0
        if step % args.save_every == 0 or step == args.steps:
            save(model, processor, args.out)
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)
            print(f"step {step:6} zero-shot on validation {100 * validate(model, processor):.1f} %", flush=True)
    if rank == 0:
        print(f"{(time.time() - start) / 60:.1f} minutes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=HERE / "build", help="where build_data.py left its pictures")
    parser.add_argument("--out", type=Path, default=HERE / "build" / "first-stage")
    parser.add_argument("--steps", type=int, default=7200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--turn", type=int, default=2400, help="from this step on, more emoji and more of their kinds")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--fall", type=float, default=0.3, help="part of the steps, the last, in which the rate falls")
    parser.add_argument("--keep", type=float, default=0.4, help="part of the patches that the image tower sees")
    parser.add_argument("--whole-from", type=float, default=0.9, help="from this part of the steps on it sees all")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--text-width", type=int, default=192)
    parser.add_argument("--text-layers", type=int, default=3)
    parser.add_argument("--projection", type=int, default=192)
    parser.add_argument("--positions", type=int, default=48)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-scale", type=float, default=100.0, help="upper bound of exp(logit_scale)")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--resume", action="store_true", help="go on from <out>.state.pt, as if never stopped")
    parser.add_argument("--processes", type=int, default=2, help="each takes its part of every batch")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    if args.processes == 1:
        return train(0, args, None, None)
    shared = torch.zeros(args.processes, 1 << 24).share_memory_()
    barrier = torch.multiprocessing.get_context("fork").Barrier(args.processes)
    torch.multiprocessing.start_processes(train, (args, shared, barrier), args.processes, start_method="fork")


if __name__ == "__main__":
    main()
