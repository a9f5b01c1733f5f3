"""The other prompt learners: a step of each against the public procedure, in one run.

The public procedure passes every class name through the text tower as a row of 77 tokens and every image through every
tower at every step. The numbers of both are compared, too.

    python benchmarks/methods.py                        all cases
    python benchmarks/methods.py --cases maple --classes 1000
    python benchmarks/methods.py --device cuda --dtype bfloat16

A step, and what is compared:

- cocoop: the public code takes one image at a time, with a text pass of its own; here 8 cached embeddings at once.
- kgcoop, prograd: 32 cached embeddings, against the same step with CoOp's own objective.
- deep_text: the text side alone.
- maple, promptsrc: the whole step on 4 images, ViT-B/16. In PromptSRC the public frozen tower sees each image at
  every step; here its features are kept.
- tpt: the text side for 8 test images of 64 embedded views: a step on the context of each, and the prediction.

Above `--max_plain_classes` the text side of the public procedure is timed class by class group, forward and backward,
which is the same work without its memory.

Each measurement runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import math
import sys

import torch
from common import WordTokenizer, in_own_process, make_base, make_names, peak_memory_bytes, report, timed
from torch.nn import functional as F

from coop_hf import CoOpModel
from coop_hf.adapters.tpt import tpt
from coop_hf.core.plain import plain_text_features
from coop_hf.experiments.configs import make_config
from coop_hf.training.objectives import Frozen, get_objective


# case -> method, objective, images of a step, size of the towers
CASES = {
    "cocoop": ("cocoop", "cross_entropy", 8, "b32"),
    "kgcoop": ("coop", "kgcoop", 32, "b32"),
    "prograd": ("coop", "prograd", 32, "b32"),
    "deep_text": ("deep_text", None, 0, "b32"),
    "maple": ("maple", "cross_entropy", 4, "b16"),
    "promptsrc": ("ivlp", "promptsrc", 4, "b16"),
    "tpt": ("coop", None, 8, "b32"),
}


class Case:
    """A model with a fresh adapter, and the two ways of one step."""

    def __init__(self, case, classes, size, max_plain_classes, device="cpu", dtype="float32"):
        method, objective, self.batch, usual = CASES[case]
        self.case, self.classes, self.max_plain_classes = case, classes, max_plain_classes
        base = make_base(size=usual if size == "full" else size, device=device, dtype=getattr(torch, dtype))
        layers = min(base.config.text_config.num_hidden_layers, base.config.vision_config.num_hidden_layers)
        fields = {"n_ctx": 4} if case == "tpt" else {}
        words = "a to of a"  # as many tokens here as "a photo of a" has in CLIP
        names = make_names(classes)
        config = make_config(method, objective, fields, WordTokenizer(), layers, words, class_names=names)
        torch.manual_seed(0)
        self.model = CoOpModel(base, config, processor=WordTokenizer()).to(device)
        self.model.train()
        self.adapter, self.family = self.model.adapter, self.model.family
        self.learned = list(self.model.learned_parameters().values())
        self.objective = None if objective is None else get_objective(objective)
        self.cross_entropy = get_objective("cross_entropy")
        generator = torch.Generator().manual_seed(1)
        side = base.config.vision_config.image_size
        self.pixels = torch.randn(max(1, self.batch), 3, side, side, generator=generator).to(device)
        self.labels = (torch.arange(max(1, self.batch)) % classes).to(device)
        self.weights = torch.randn(classes, base.config.projection_dim, generator=generator).to(device)
        with torch.no_grad(), self.model.disable_adapter():
            self.embeds = self.model.get_image_features(self.pixels).float()  # what the feature cache holds
        self.kept: dict = {}
        self.views = torch.randn(8, 64, base.config.projection_dim, generator=generator).to(device)  # TPT's

    def clear(self):
        for parameter in self.learned:
            parameter.grad = None

    def step(self, objective=None):
        """As the trainer takes it: cached embeddings where the image tower stays as it is."""
        self.clear()
        if self.case == "tpt":
            return tpt(self.model, views=self.views).logits
        if self.objective is None:
            return self.text_step(self.model.get_text_features())
        inputs = {"pixel_values": self.pixels} if self.adapter.prompts_image_tower else {"image_embeds": self.embeds}
        output = self.model(**inputs)
        frozen = Frozen(self.model, output, image_embeds=self.embeds, kept=self.kept)
        (objective or self.objective)(output, self.labels, frozen).backward()
        return output.logits.detach()

    def text_step(self, features):
        """Forward and backward of the class embeddings."""
        (features.float() * self.weights).sum().backward()
        return features.detach()

    # ------------------------------------------------------------------ the public procedure

    def plain(self, prompts):
        """Every class a row of 77 tokens, all of them at once."""
        length = self.family.max_positions
        return plain_text_features(self.family, self.adapter.class_prompts.layout, prompts, length, self.classes)

    def public_step(self):
        self.clear()
        if self.case == "tpt":
            return torch.cat([self.public_tpt(views) for views in self.views])
        if self.objective is None:
            features = self.plain(self.adapter.prompts().text)
            (features.float() * self.weights).sum().backward()
            return features.detach()
        if self.case == "cocoop":
            return self.public_cocoop()
        vision = self.adapter.prompts().vision
        images = F.normalize(self.family.image_features(self.pixels, vision).float(), dim=-1)
        kept = {}
        if self.case == "promptsrc":  # its class embeddings of templates are computed once there, too
            with torch.no_grad():
                kept["image_embeds"] = self.family.image_features(self.pixels)
        if self.classes > self.max_plain_classes:
            return self.public_in_groups(images)
        text = F.normalize(self.plain(self.adapter.prompts().text).float(), dim=-1)
        return self.public_loss(images, text, kept)

    def public_loss(self, images, text, kept):
        logits = self.family.logit_scale * images @ text.T
        output = argparse.Namespace(logits=logits, text_embeds=text, image_embeds=images)
        frozen = Frozen(self.model, output, kept=self.kept, **kept)
        self.objective(output, self.labels, frozen).backward()
        return logits.detach()

    def public_in_groups(self, images):
        """The work of a step whose text side does not fit into memory at once: no numbers to compare."""
        images.sum().backward()
        names, length = self.model.class_names, self.family.max_positions
        for start in range(0, self.classes, self.max_plain_classes):
            group = self.adapter.layout(WordTokenizer(), names[start : start + self.max_plain_classes], length)
            features = plain_text_features(self.family, group, self.adapter.prompts().text, length, self.classes)
            features.float().sum().backward()
        return None

    def public_cocoop(self):
        """One image a step, as its code trains."""
        logits = []
        for image in range(self.batch):
            with torch.no_grad():
                embeds = F.normalize(self.family.image_features(self.pixels[image : image + 1]).float(), dim=-1)
            context = self.adapter.prompts(embeds).text[0][0]
            text = F.normalize(self.plain({0: context}).float(), dim=-1)
            logits.append(self.family.logit_scale * embeds @ text.T)
            (F.cross_entropy(logits[-1], self.labels[image : image + 1]) / self.batch).backward()
        return torch.cat(logits).detach()

    def public_tpt(self, views):
        """One image: the context starts afresh, takes a step of AdamW on six of 64 views, and predicts the first."""
        context = self.adapter.context.detach().clone().requires_grad_()
        views = F.normalize(views, dim=-1)

        def logits(images):
            return self.family.logit_scale * images @ F.normalize(self.plain({0: context}).float(), dim=-1).T

        log_p = logits(views).log_softmax(dim=-1)
        surest = (-(log_p.exp() * log_p).sum(dim=-1)).argsort()[: len(views) // 10]
        mean = log_p[surest].logsumexp(dim=0) - math.log(len(surest))
        (-(mean.exp() * mean).sum()).backward()
        torch.optim.AdamW([context], lr=5e-3).step()
        with torch.no_grad():
            return logits(views[:1])

    def gradients(self):
        return [p.grad.detach().clone() for p in self.learned if p.grad is not None]


def error(ours, theirs) -> float:
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in zip(ours, theirs))


def measure(case, classes, repeats, plain, size, max_plain_classes, device, dtype) -> dict:
    own = Case(case, classes, size, max_plain_classes, device, dtype)
    before = peak_memory_bytes()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    fast = timed(own.step, repeats, device=device)
    result = {
        "case": case,
        "classes": classes,
        "images": own.batch,
        "learned_values": sum(p.numel() for p in own.learned),
        "step": fast,
        "memory_before_bytes": before,
        "peak_memory_bytes": peak_memory_bytes() if device == "cpu" else torch.cuda.max_memory_allocated(),
    }
    if case == "cocoop":
        result["per_image_s"] = fast["median_s"] / own.batch
    if case in ("kgcoop", "prograd"):
        coop = timed(lambda: own.step(own.cross_entropy), repeats, device=device)
        again = timed(own.step, repeats, device=device)  # in turn, on a machine that is not steady
        both = (fast["median_s"] + again["median_s"]) / 2
        return result | {"coop_step": coop, "ratio_to_coop": both / coop["median_s"]}
    if plain:
        found, gradients = own.step(), own.gradients()
        expected = own.public_step()
        if expected is not None:
            result["output_error"] = error([found], [expected])
            result["gradient_error"] = error(gradients, own.gradients()) if gradients else None  # TPT leaves none
        slow = timed(own.public_step, max(1, repeats // 3), warmup=0, device=device)
        result |= {"public": slow, "speedup": slow["median_s"] / fast["median_s"]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--classes", type=int, nargs="+", help="default: 100; MaPLe, PromptSRC, CoCoOp also 1,000")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_plain", action="store_true", help="leave the public procedure out")
    parser.add_argument("--max_plain_classes", type=int, default=100)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        json.dump(measure(**json.loads(args.one)), sys.stdout)
        return
    common = {"repeats": args.repeats, "size": args.size, "max_plain_classes": args.max_plain_classes}
    common |= {"device": args.device, "dtype": args.dtype}
    todo = []
    for case in args.cases:
        for classes in args.classes or ([100, 1000] if case in ("cocoop", "maple", "promptsrc") else [100]):
            plain = not args.no_plain and not (case == "cocoop" and classes > args.max_plain_classes)
            todo.append({"case": case, "classes": classes, "plain": plain, **common})
    if args.size == "tiny":  # memory is not what is looked at
        report("methods", [measure(**given) for given in todo])
    else:
        report("methods", [in_own_process(__file__, given, given) for given in todo])


if __name__ == "__main__":
    main()
