#!/usr/bin/env python3
"""Second stage of the emoji CLIP: what is said around a name shades it, and no longer destroys it.

Goes on from the model of `pretrain.py` with other captions: many wordings, synonyms, keywords and kinds; fillers
that say nothing; lists ("a fox or a hammer"); nonsense words and random tokens; and vectors of noise, as large as
token embeddings, before and behind the name, as an untrained context of CoOp has them. The text tower learns, and the
image tower's last norm and projection; all before them stays, so each picture goes through it once.

At the end the text tower is rescaled: token embeddings get a root mean square of 0.02, as CLIP's have, and all that is
added to them the same factor, so the function stays and a context of noise means what it means on CLIP.

    python examples/emoji/pretrain_words.py
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pretrain import (
    BIT,
    CLAIMS,
    HERE,
    Captions,
    Cycle,
    contrastive_loss,
    read_pictures,
    render,
    save,
    text_features,
    validate,
)
from transformers import CLIPModel, CLIPProcessor


NOISE = "<|startoftext|>"  # stands for a vector of noise wherever it is not the first token
TOKEN_RMS = 0.02  # of the token embeddings of CLIP

NOUNS = ["photo", "photograph", "picture", "image", "painting", "sketch", "cartoon", "graphic", "clip art", "sticker",
         "rendering", "logo", "snapshot", "artwork", "print", "doodle", "drawing", "illustration", "view"]  # fmt: skip
ADJECTIVES = ["good", "bad", "nice", "great", "cool", "weird", "pretty", "beautiful", "cropped", "old", "new", "funny",
              "cute", "typical", "single", "random", "dirty", "interesting", "lovely", "certain", "simple", "my",
              "clear", "hand-made", "usual", "well-known", "unknown", "digital"]  # fmt: skip
STARTS = ["this is", "here is", "look at", "we see", "there is", "i like", "one can see", "it shows", "an example of",
          "a kind of", "a type of", "think of", "what about", "is it", "it looks like", "you may know"]  # fmt: skip
TAILS = ["here", "in the picture", "on a page", "of the usual kind", "that i like", "for you", "by an artist",
         "today", "in a message", "as one draws it", "and nothing else", "seen from the front",
         "or something like it"]  # fmt: skip
SYLLABLES = [c + v for c in "bcdfghjklmnprstvwxz" for v in ("a", "e", "i", "o", "u", "ar", "en", "ist", "om", "ul")]


class Sentences(Captions):
    """Captions of the second stage: other words, fillers, nonsense and noise around them.

    Args:
        pictures (`list[dict]`), emoji (`dict`): as for `Captions`.
        words (`dict`): name -> keywords and kinds.
        tokenizer (`CLIPTokenizer`): random tokens are of its vocabulary.
    """

    def __init__(self, pictures, emoji, words, tokenizer):
        super().__init__(pictures, emoji)
        self.words = words
        self.groups = {}  # emoji name -> its Unicode group and subgroup, and the words of both
        for name, known in emoji.items():
            said = [known["subgroup"].replace("-", " "), known["group"].replace("-", " ")]
            self.groups[name] = said[:1] * 3 + said + [w for text in said for w in text.split() if len(w) > 2]
        self.concepts = []
        for picture in pictures:
            concepts = set()
            for name in picture["names"]:
                concepts |= {name.lower(), *words[name]["keywords"], *words[name]["kinds"]}
                concepts |= {*self.groups.get(name, ()), *(t.lower() for t in emoji.get(name, {}).get("tags", ()))}
            self.concepts.append(concepts)
        plain = [token for token in tokenizer.get_vocab() if token.endswith("</w>") and token[:-4].isalpha()]
        self.tokens = sorted(token[:-4] for token in plain if token.isascii())

    def thing(self, index, rng):
        """One of the words that are true of a picture, most often a sure one: its Unicode groups or its own name."""
        name = rng.choice(self.pictures[index]["names"])
        known, roll = self.words[name], rng.random()
        if rng.random() < 0.5:
            return rng.choice(self.groups.get(name, [name]))
        if roll < 0.5 and (known["kinds"] or name in self.groups):
            if name in self.groups and (rng.random() < 0.6 or not known["kinds"]):
                return rng.choice(self.groups[name])
            return rng.choice(known["kinds"])
        return rng.choice(known["keywords"]) if roll < 0.65 and known["keywords"] else name

    def nonsense(self, count, rng):
        """Words that mean nothing here: invented ones, or any from the vocabulary."""
        if rng.random() < 0.5:
            return " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(count))
        return " ".join(rng.choices(self.tokens, k=count))

    def write(self, index, bits, rng):
        """One caption of a picture: `(text, concepts, claims)`; it is true of what is any of its concepts."""
        subject, said = self.thing(index, rng), []
        concepts, roll, form = {subject.lower()}, rng.random(), rng.random()
        if roll < 0.15:  # a list: true of each of its things
            others = [self.thing(rng.randrange(len(self.pictures)), rng) for _ in range(rng.choice([1, 1, 2]))]
            things = [subject, *others]
            rng.shuffle(things)
            concepts = {thing.lower() for thing in things}
            subject = ", ".join(things[:-1]) + rng.choice([" or ", " or a ", " and "]) + things[-1]
        elif roll < 0.3:  # more of the same thing's words
            name = rng.choice(self.pictures[index]["names"])
            more = self.words[name]["keywords"] + self.words[name]["kinds"]
            more = rng.sample(more, min(len(more), rng.randint(1, 4)))
            if more:
                subject += rng.choice([" with ", ", ", ": ", ", a ", " - ", " that is "]) + ", ".join(more)
        elif roll < 0.35 and not subject.endswith("s"):
            subject += "s"
        if form < 0.4:
            said = [claim for claim in CLAIMS if bits & BIT[claim] and rng.random() < 0.5]
            said = rng.sample(said, min(len(said), 3)) if rng.random() < 0.75 else []
            text = self.phrase(subject, said, rng)
        elif form < 0.65:
            front = [rng.choice(STARTS)] if rng.random() < 0.3 else []
            if rng.random() < 0.7:
                words = rng.sample(ADJECTIVES, rng.choice([0, 0, 1, 1, 2]))
                front.append(" ".join([rng.choice(["a", "a", "the"]), *words, rng.choice(NOUNS), "of"]))
            front.append(rng.choice(["a", "a", "the", ""]))
            if rng.random() < 0.3:
                front.append(rng.choice(ADJECTIVES))
            tail = " " + rng.choice(TAILS) if rng.random() < 0.3 else ""
            text = " ".join([*front, subject]) + tail + rng.choice([".", ".", ""])
        elif form < 0.85:
            text = rng.choice(["{}", "{}.", "{}.", "a {}."]).format(subject)
        else:
            behind = " " + self.nonsense(rng.randint(1, 3), rng) if rng.random() < 0.2 else ""
            text = f"{self.nonsense(rng.randint(1, 8), rng)} {subject}{behind}."
        if form > 0.55 and rng.random() < 0.7 or rng.random() < 0.1:
            count = rng.choice([rng.randint(1, 20), 4, 8, 16, 16])
            behind = rng.randint(1, count) if rng.random() < 0.15 else 0
            text = NOISE * (count - behind) + text.removesuffix(".") + NOISE * behind + text[len(text.rstrip(".")) :]
        return re_article(text), concepts, sum(BIT[claim] for claim in said)

    def truth(self, indices, bits, captions):
        """`(pictures, captions)` boolean matrix: is the caption true of the picture?"""
        said = np.array([claims for _, _, claims in captions], dtype=np.int64)
        allowed = (said[None, :] & ~np.array(bits, dtype=np.int64)[:, None]) == 0
        wanted = [concepts for _, concepts, _ in captions]
        shown = np.array([[not concepts.isdisjoint(self.concepts[i]) for concepts in wanted] for i in indices])
        return torch.from_numpy(allowed & shown)


def re_article(text):
    """`"a apple"` -> `"an apple"`, and single spaces."""
    for vowel in "aeio":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return " ".join(text.split())


def put_noise(model, generator):
    """Make the text tower read vectors of noise where `NOISE` stands."""
    table = model.text_model.embeddings.token_embedding
    bos = model.config.text_config.bos_token_id

    def hook(module, inputs, output):
        slots = inputs[0] == bos
        slots[:, 0] = False
        rms = module.weight.detach().square().mean().sqrt()
        size = rms * torch.empty(len(output), 1, 1).uniform_(-1.2, 0.9, generator=generator).exp()
        noise = size * torch.randn(output.shape, generator=generator)
        return torch.where(slots[..., None], noise, output)

    table.register_forward_hook(hook)


@torch.no_grad()
def see(model, captions, pixels, renderings, seed, batch=256):
    """What the image tower's layers make of every picture, rendered a number of times.

    Returns:
        `tuple`: class tokens before the last norm `(renderings, n, width)` in half precision, and claims
        `(renderings, n)`.
    """
    rng = random.Random(f"{seed}-renderings")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    vision, seen, claims = model.vision_model, [], []
    for _ in range(renderings):
        for start in range(0, len(pixels), batch):
            known = captions.style_bits[start : start + batch]
            rendered, bits = render(pixels[start : start + batch], known, rng, generator)
            with torch.autocast("cpu", torch.bfloat16):
                states = vision.pre_layrnorm(vision.embeddings((rendered - 0.5) / 0.5))
                states = vision.encoder(inputs_embeds=states).last_hidden_state[:, 0]
            seen.append(states.half())
            claims += bits
    return torch.cat(seen).view(renderings, len(pixels), -1), torch.tensor(claims).view(renderings, -1)


@torch.no_grad()
def rescale(model):
    """A copy of the model's weights whose text tower has token embeddings of CLIP's scale, and the same function."""
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    table = "text_model.embeddings.token_embedding.weight"
    factor = TOKEN_RMS / weights[table].square().mean().sqrt()
    for key in weights:  # all that is added up from layer to layer; each layer's own norm takes the factor out again
        added = ("embedding.weight", "out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
        if key.startswith("text_model.") and key.endswith(added):
            weights[key] *= factor
    return weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=HERE / "build", help="where build_data.py left its pictures")
    parser.add_argument("--first", type=Path, default=HERE / "build" / "first-stage", help="model of pretrain.py")
    parser.add_argument("--out", type=Path, default=HERE / "emoji-clip")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--renderings", type=int, default=1, help="of each picture")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--fall", type=float, default=0.5, help="part of the steps, the last, in which the rate falls")
    parser.add_argument("--share", type=float, default=0.85, help="part of a batch that are emoji")
    parser.add_argument("--more-images", type=int, default=3000, help="besides those that captions are written for")
    parser.add_argument("--max-scale", type=float, default=100.0, help="upper bound of exp(logit_scale)")
    parser.add_argument("--save-every", type=int, default=60)
    parser.add_argument("--resume", action="store_true", help="go on from <out>.state.pt, as if never stopped")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    model = CLIPModel.from_pretrained(args.first).train()
    processor = CLIPProcessor.from_pretrained(args.first)
    pixels, pictures, emoji = read_pictures(args.work_dir, model.config.vision_config.image_size)
    words = json.loads((args.work_dir / "words.json").read_text())
    captions = Sentences(pictures, emoji, words, processor.tokenizer)
    start = time.time()
    seen, claims = see(model, captions, pixels, args.renderings, args.seed)
    print(f"{args.renderings} renderings of {len(pixels)} pictures: {time.time() - start:.0f} s", flush=True)

    learned = [model.logit_scale, model.visual_projection.weight, model.text_projection.weight]
    learned += [*model.text_model.parameters(), *model.vision_model.post_layernorm.parameters()]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    is_emoji = [bool(bits & BIT["emoji"]) for bits in captions.style_bits]
    pools = [Cycle((i for i, yes in enumerate(is_emoji) if yes is want), args.seed) for want in (True, False)]
    first, state_file = 1, args.out.with_name(args.out.name + ".state.pt")
    if args.resume:
        state = torch.load(state_file, weights_only=True)
        first = state["step"] + 1
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    generator = torch.Generator()
    put_noise(model, generator)
    longest = model.config.text_config.max_position_embeddings
    start, total, hits = time.time(), 0.0, 0.0
    for step in range(first, args.steps + 1):
        # Rise, stay, fall: before the fall, nothing depends on the number of steps.
        rate = args.lr * min(1.0, step / args.warmup, 0.01 + 0.99 * (args.steps - step) / (args.fall * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rng = random.Random(f"{args.seed}-words-{step}")
        generator.manual_seed(rng.getrandbits(60))
        indices = []
        for pool, share in zip(pools, (args.share, 1 - args.share), strict=True):
            count = round(share * args.batch_size)
            indices += [pool[(step - 1) * count + offset] for offset in range(count)]
        for pool, share in zip(pools, (args.share, 1 - args.share), strict=True):
            indices += rng.choices(pool.items, k=round(share * args.more_images))
        views = [rng.randrange(args.renderings) for _ in indices]
        bits = [int(claims[view, i]) for view, i in zip(views, indices, strict=True)]
        written = [captions.write(i, b, rng) for i, b in zip(indices[: args.batch_size], bits, strict=False)]
        truth = captions.truth(indices, bits, written)
        with torch.autocast("cpu", torch.bfloat16):
            images = model.vision_model.post_layernorm(seen[views, indices].float())
            images = F.normalize(model.visual_projection(images), dim=-1)
            texts = text_features(model, processor.tokenizer, [text for text, _, _ in written], longest, chunks=4)
        logits = model.logit_scale.exp() * images.float() @ texts.float().T
        loss = contrastive_loss(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(args.max_scale))
            best = logits.argmax(1, keepdim=True)
            total, hits = total + loss.item(), hits + truth.gather(1, best).float().mean().item()
        if step % 25 == 0 or step == args.steps:
            seconds = (time.time() - start) / (step - first + 1)
            print(
                f"step {step:6} loss {total / 25:.3f} true caption first {hits / 25:.3f} "
                f"scale {model.logit_scale.exp().item():.1f} seconds/step {seconds:.2f}",
                flush=True,
            )
            total, hits = 0.0, 0.0
        if step % args.save_every == 0 or step == args.steps:
            scores = 100 * validate(model, processor)
            fresh = CLIPProcessor.from_pretrained(args.first)  # the one in use keeps lengths that it was called with
            save(model, fresh, args.out, rescale(model))
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, state_file.with_suffix(".new"))
            os.replace(state_file.with_suffix(".new"), state_file)
            print(f"step {step:6} zero-shot on validation {scores:.1f} %", flush=True)
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
