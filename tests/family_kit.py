"""Small random base models of every family, with tokenizers and image processors of the right kind.

Made of transformers alone, without a line of `coop_hf`: what a family answers here is the truth that the library is
held to. Everything is built in memory, deterministic, and kept for the session: a test that changes a model takes
`fresh_family`.

    clip            CLIPModel            byte-level BPE             causal, EOS
    metaclip2       MetaClip2Model       XLM-R (unigram)            causal, first EOS
    siglip          SiglipModel          SentencePiece, no "."      both ways, padded to 64
    siglip2_fixed   SiglipModel          Gemma (BPE, no prefix)     both ways, padded to 64
    siglip2_naflex  Siglip2Model         Gemma in lower case        the same; images of any aspect ratio
    chinese_clip    ChineseCLIPModel     BERT (WordPiece)           both ways, attention mask, first place
    altclip         AltCLIPModel         XLM-R (unigram)            the same; positions are counted from pad + 1
    align           AlignModel           BERT (WordPiece)           the same; divides by a temperature
"""

import functools
import io
import math
import random
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_image_processor
from conftest import make_tokenizer as make_clip_tokenizer
from torch import nn
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPImageProcessor,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPProcessor,
    EfficientNetImageProcessor,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)


FAMILIES = ("clip", "metaclip2", "siglip", "siglip2_fixed", "siglip2_naflex", "chinese_clip", "altclip", "align")
CAUSAL = ("clip", "metaclip2")
SIGMOID = ("siglip", "siglip2_fixed", "siglip2_naflex")
PADS_TO = 64  # what every SigLIP pads to, and the zero-shot pipeline with it
PROJECTION = 24

# Words that the tokenizers know whole. Everything else falls apart into characters, as rare words do.
WORDS = "a an the photo of cat dog sea lion this is big small red x".split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MARKS = ".,!?()'-&/"
CHINESE = "猫狗海狮一张的照片"

_FOLDER = tempfile.TemporaryDirectory()  # until the tests end


# ---------------------------------------------------------------------- tokenizers


def make_bert_tokenizer():
    """WordPiece: words, and characters as first and as later piece of a word."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *MARKS, *CHINESE]
    tokens += [c for c in LETTERS.lower() if c not in tokens]
    tokens = list(dict.fromkeys([*tokens, *(f"##{c}" for c in LETTERS.lower()), *WORDS, "##s"]))
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def _unigram_pieces() -> list[tuple[str, float]]:
    words = [(f"▁{word}", -3.0 - 0.01 * index) for index, word in enumerate(WORDS)]
    return [*words, ("▁", -6.0), *((c, -8.0 - 0.01 * i) for i, c in enumerate([*LETTERS, *MARKS, *CHINESE]))]


def make_xlm_roberta_tokenizer():
    """Unigram with XLM-R's ids of the special tokens: <s> 0, <pad> 1, </s> 2, <unk> 3, and <mask> at the end."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return XLMRobertaTokenizer(vocab=[*pieces, *_unigram_pieces(), ("<mask>", 0.0)])


def make_t5_tokenizer():
    """Unigram with T5's ids: <pad> 0, </s> 1, <unk> 2, and nothing in front of a text. Some MetaCLIP 2 have it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*pieces, *_unigram_pieces()], extra_ids=0)


def make_siglip_tokenizer():
    """A SentencePiece model trained here, with SigLIP's ids: </s> is 1 and pads, <unk> is 2.

    Lower case, without punctuation, as SigLIP prepares its texts; like the published tokenizers it gives no mask.
    """
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    pytest.importorskip("google.protobuf", reason="protobuf is not installed")
    choose = random.Random(0)
    sentences = [" ".join(choose.choices(WORDS, k=6)) for _ in range(400)] + [" ".join(LETTERS.lower())] * 5
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=110,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(_FOLDER.name) / "spiece.model"  # which copies of the tokenizer read again
    path.write_bytes(model.getvalue())
    tokenizer = SiglipTokenizer(str(path), model_input_names=["input_ids"])
    return tokenizer


def make_gemma_tokenizer(tokenizer_class=GemmaTokenizer, **kwargs):
    """Byte-fallback BPE in which a space is part of the word behind it: "cat" and " cat" are two tokens.

    No BOS, one EOS; pads to the right, and gives no mask, as the published SigLIP 2 configurations say. The class's
    own default is padding to the left with a mask.
    """
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [*LETTERS, *MARKS]
    merges = []
    for whole in [*(f"▁{word}" for word in WORDS), *WORDS]:
        for end in range(2, len(whole) + 1):
            merge = (whole[: end - 1], whole[end - 1])
            if merge not in merges:
                merges.append(merge)
                tokens.append(whole[:end])
    tokens = list(dict.fromkeys(tokens))
    options = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    options["model_input_names"] = ["input_ids"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return tokenizer_class(vocab=vocab, merges=merges, **{**options, **kwargs})


# ---------------------------------------------------------------------- models


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights so large that every token, position, norm and bias matters, and sensible scales; see
    `conftest.make_base`."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor):
        return torch.randn(tensor.shape, generator=generator)

    known = {"logit_scale": math.log(10.0), "logit_bias": -2.0, "temperature": 0.1}
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    owner = {id(p): module for module in model.modules() for p in module.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in known:
                parameter.fill_(known[name])
            elif isinstance(owner[id(parameter)], norms) and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise(parameter))
            elif isinstance(owner[id(parameter)], nn.Embedding) or name.endswith("class_embedding"):
                parameter.copy_(0.3 * noise(parameter))
            elif parameter.dim() >= 2:
                gain = 1.6 if parameter.dim() == 4 else 1.0  # convolutions would make all images alike
                parameter.copy_(gain * noise(parameter) / math.sqrt(max(parameter[0].numel(), 2)))
            else:
                parameter.copy_(0.1 * noise(parameter))
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0.0  # as training leaves it, and as ChineseCLIP is loaded
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(0.1 * noise(module.running_mean))
                module.running_var.copy_(1 + 0.2 * noise(module.running_var).abs())
    return model.eval()


def text_config(vocab_size: int, positions: int, layers: int = 2, **kwargs) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        **kwargs,
    }


def vision_config(width: int = 32, **kwargs) -> dict:
    return {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": 8,
        **kwargs,
    }


def _clip():
    tokenizer = make_clip_tokenizer()
    return make_base(tokenizer, seed=20), CLIPProcessor(make_image_processor(16), tokenizer)


def _metaclip2(tokenizer=None):
    tokenizer = tokenizer or make_xlm_roberta_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 0}
    config = MetaClip2Config(
        text_config=text_config(len(tokenizer), 40, layers=3, projection_dim=PROJECTION, **ids),
        vision_config=vision_config(image_size=16, projection_dim=PROJECTION),
        projection_dim=PROJECTION,
    )
    return MetaClip2Model(config), CLIPProcessor(make_image_processor(16), tokenizer)


def _siglip_config(config_class, vocab_size: int, **vision):
    return config_class(
        text_config=text_config(vocab_size, PADS_TO, projection_size=PROJECTION),
        vision_config=vision_config(PROJECTION, **vision),
    )


def _siglip_images():
    return SiglipImageProcessor(size={"height": 16, "width": 16})


def _siglip():
    tokenizer = make_siglip_tokenizer()
    config = _siglip_config(SiglipConfig, len(tokenizer), image_size=16)
    return SiglipModel(config), SiglipProcessor(_siglip_images(), tokenizer)


def _siglip2_fixed():
    tokenizer = make_gemma_tokenizer()
    config = _siglip_config(SiglipConfig, len(tokenizer), image_size=16)
    return SiglipModel(config), SiglipProcessor(_siglip_images(), tokenizer)


def _siglip2_naflex():
    tokenizer = make_gemma_tokenizer(Siglip2Tokenizer)
    config = _siglip_config(Siglip2Config, len(tokenizer), num_patches=16)
    images = Siglip2ImageProcessor(patch_size=8, max_num_patches=12)
    return Siglip2Model(config), Siglip2Processor(images, tokenizer)


def _chinese_clip():
    tokenizer = make_bert_tokenizer()
    config = ChineseCLIPConfig(
        text_config=text_config(len(tokenizer), 40),
        vision_config=vision_config(image_size=16, projection_dim=PROJECTION),
        projection_dim=PROJECTION,
    )
    images = ChineseCLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    return ChineseCLIPModel(config), ChineseCLIPProcessor(images, tokenizer)


def _altclip():
    tokenizer = make_xlm_roberta_tokenizer()
    config = AltCLIPConfig(
        text_config=text_config(len(tokenizer), 42, project_dim=28),  # positions 2 to 41 can be used
        vision_config=vision_config(image_size=16, projection_dim=PROJECTION),
        projection_dim=PROJECTION,
    )
    return AltCLIPModel(config), AltCLIPProcessor(make_image_processor(16), tokenizer)


def _align():
    tokenizer = make_bert_tokenizer()
    config = AlignConfig(
        text_config=text_config(len(tokenizer), 40),
        vision_config={
            "image_size": 32,
            "width_coefficient": 0.25,
            "depth_coefficient": 1.0,
            "kernel_sizes": [3, 5],
            "in_channels": [32, 64],
            "out_channels": [64, 4 * PROJECTION],  # there is no projection: these channels are the embedding
            "strides": [1, 2],
            "num_block_repeats": [1, 1],
            "expand_ratios": [1, 6],
            "hidden_dim": PROJECTION,
        },
        projection_dim=PROJECTION,
    )
    size = {"height": 32, "width": 32}
    images = EfficientNetImageProcessor(
        size={"height": 36, "width": 36},
        crop_size=size,
        do_center_crop=True,
        rescale_factor=1 / 127.5,
        rescale_offset=True,
        do_normalize=False,
        include_top=False,
    )
    return AlignModel(config), AlignProcessor(images, tokenizer)


def _metaclip2_t5():
    return _metaclip2(make_t5_tokenizer())


_MAKERS = {
    "clip": _clip,
    "metaclip2": _metaclip2,
    "siglip": _siglip,
    "siglip2_fixed": _siglip2_fixed,
    "siglip2_naflex": _siglip2_naflex,
    "chinese_clip": _chinese_clip,
    "altclip": _altclip,
    "align": _align,
    "metaclip2_t5": _metaclip2_t5,  # not in FAMILIES: the same model with another tokenizer
}


def fresh_family(name: str, seed: int = 0):
    """(base model, processor) of a family, for a test that changes them."""
    with torch.random.fork_rng():
        base, processor = _MAKERS[name]()
    return randomise(base, seed), processor


@functools.cache
def make_family(name: str):
    """(base model, processor) of a family, shared: not to be changed."""
    return fresh_family(name)


def save_family(name: str, folder) -> Path:
    """Writes a family's base and processor, as `AutoModel` and `AutoProcessor` read them; returns the folder."""
    base, processor = make_family(name)
    base.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


# ---------------------------------------------------------------------- the truth


def text_kwargs(base) -> dict:
    """How transformers' zero-shot image classification pipeline tokenises for this model."""
    if "siglip" in base.config.model_type:
        return {"padding": "max_length", "max_length": PADS_TO, "truncation": True}
    return {"padding": True}


def text_inputs(base, processor, texts) -> dict:
    return dict(processor.tokenizer(list(texts), return_tensors="pt", **text_kwargs(base)))


def image_inputs(processor, images) -> dict:
    return dict(processor.image_processor(images=list(images), return_tensors="pt"))


@torch.no_grad()
def family_texts(base, processor, texts) -> torch.Tensor:
    """The family's own text embeddings `(len(texts), projection_dim)`, projected, not normalised."""
    return base.get_text_features(**text_inputs(base, processor, texts)).pooler_output


@torch.no_grad()
def family_images(base, processor, images) -> torch.Tensor:
    """The family's own image embeddings `(len(images), projection_dim)`, projected, not normalised."""
    return base.get_image_features(**image_inputs(processor, images)).pooler_output


@torch.no_grad()
def family_logits(base, processor, images, texts) -> torch.Tensor:
    """`logits_per_image` `(len(images), len(texts))` of the family's own forward."""
    return base(**text_inputs(base, processor, texts), **image_inputs(processor, images)).logits_per_image
