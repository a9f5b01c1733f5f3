"""Families of base models: the only room that knows where a base model keeps its parts and how it scores.

A family is a class of a few lines below [`Family`]: where the text embeddings, layers, norms and projections are,
whether the text tower is causal, how texts are padded and pooled, and how cosines become logits. Everything runs
through the base model's own modules, so any checkpoint, dtype, LoRA layer, quantised linear layer or device map keeps
working, and nothing in the base is changed.
"""

from typing import Any, ClassVar

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask


__all__ = ["FAMILIES", "Family", "check_tokenizer", "get_family", "is_bare", "supported_models"]

FAMILIES: dict[str, type["Family"]] = {}


class Family:
    """CLIP's way of doing things; other families override what differs.

    Args:
        base_model (`PreTrainedModel`): the base model itself.

    Attributes:
        model_type (`str`): `model_type` in the base's `config.json`.
        model_class (`str`): name of its class in transformers.
        layer_class (`str`): name of its text layers' class, if the shared-prefix pass knows them; else empty.
        vision_layer_class (`str`): name of its image layers' class, if image embeddings are made of the first token
            alone, so that the last layer need not run for the others; else empty.
        is_causal (`bool`): whether a token of a text sees only those before it.
        pads_to_full (`bool`): whether texts are padded to all positions and the padding is attended to.
        is_sigmoid (`bool`): whether scores are independent probabilities.
        token_embedding_name (`str`): what the token embedding is called among the text embeddings.
    """

    model_type: ClassVar[str] = ""
    model_class: ClassVar[str] = ""
    layer_class: ClassVar[str] = ""
    vision_layer_class: ClassVar[str] = ""
    is_causal: ClassVar[bool] = True
    pads_to_full: ClassVar[bool] = False
    is_sigmoid: ClassVar[bool] = False
    token_embedding_name: ClassVar[str] = "token_embedding"

    def __init__(self, base_model: Any):
        self.base_model = base_model

    def __init_subclass__(cls, model_type: str = "", model_class: str = "", **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if model_type:
            cls.model_type, cls.model_class = model_type, model_class
            FAMILIES[model_type] = cls

    # ------------------------------------------------------------------ text

    @property
    def text_embeddings(self) -> Any:
        """The module of token and position embeddings."""
        return self.base_model.text_model.embeddings

    @property
    def token_embedding(self) -> nn.Embedding:
        """The token embedding, `(vocabulary, text_width)`."""
        return getattr(self.text_embeddings, self.token_embedding_name)

    @property
    def text_layers(self) -> Any:
        """The layers of the text tower."""
        return self.base_model.text_model.encoder.layers

    @property
    def text_width(self) -> int:
        """Dimensions of a token embedding."""
        return self.base_model.config.text_config.hidden_size

    @property
    def max_positions(self) -> int:
        """How many tokens a text may have."""
        return self.base_model.config.text_config.max_position_embeddings

    @property
    def projection_dim(self) -> int:
        """Dimensions of class and image embeddings."""
        return self.base_model.config.projection_dim

    @property
    def device(self) -> torch.device:
        """Where the text embeddings are; a buffer's device, because weights may be offloaded."""
        return self.text_embeddings.position_ids.device

    def embed_text(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """What the first layer sees, `(rows, length, text_width)`, of token embeddings at `positions` from 0."""
        return vectors + self.text_embeddings.position_embedding(positions)

    def text_mask(self, hidden: Tensor, is_token: Tensor) -> Tensor | None:
        """The mask that the layers take, for rows where `is_token` `(rows, length)` marks what is not padding."""
        return create_causal_mask(
            config=self.base_model.text_model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
        )

    def run_text_layer(self, layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """One layer of the text tower over padded rows."""
        return _hidden(layer(hidden, mask, is_causal=True) if self.is_causal else layer(hidden, mask))

    def pooled_position(self, ends: Tensor, length: int) -> Tensor:
        """The position that stands for a text, given those of EOS `(rows,)` and the length of a row."""
        return ends

    def project_text(self, pooled: Tensor) -> Tensor:
        """Class embeddings `(..., projection_dim)` of pooled hidden states `(..., text_width)`."""
        return self.base_model.text_projection(self.base_model.text_model.final_layer_norm(pooled))

    @property
    def has_shared_pass(self) -> bool:
        """Whether the shared-prefix pass knows this text tower."""
        return self.is_causal and all(_is_a(layer, self.layer_class) for layer in self.text_layers)

    def text_state(self) -> tuple[Any, ...]:
        """Changes whenever the text tower's weights are written to, moved or cast, or autocast is switched."""
        device = self.device
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        modules = [self.base_model.text_model, getattr(self.base_model, "text_projection", None)]
        weights = [w for module in modules if module is not None for w in module.parameters()]
        return (device, autocast, tuple((id(w), w._version, w.dtype) for w in weights))

    # ------------------------------------------------------------------ images

    @property
    def vision_layers(self) -> Any:
        """The layers of the image tower that prompts may enter; none where it is not a transformer."""
        return self.base_model.vision_model.encoder.layers

    @property
    def vision_width(self) -> int:
        """Dimensions of a patch embedding."""
        return self.base_model.config.vision_config.hidden_size

    @property
    def vision_dtype(self) -> torch.dtype:
        """The dtype that the image tower takes pixels in."""
        return self.base_model.vision_model.embeddings.patch_embedding.weight.dtype

    @property
    def vision_modules(self) -> list[nn.Module]:
        """What turns pixels into an image embedding."""
        parts = (self.base_model.vision_model, getattr(self.base_model, "visual_projection", None))
        return [part for part in parts if part is not None]

    def image_features(
        self, pixel_values: Tensor, prompts: dict[int, Tensor] | None = None, **image_inputs: Tensor
    ) -> Tensor:
        """Image embeddings `(batch, projection_dim)`, not normalised.

        Args:
            pixel_values (`torch.Tensor`): as the image processor gives them.
            prompts (`dict[int, torch.Tensor]`, *optional*): visual prompts `(n, vision_width)` by layer. Those of
                layer 0 stand behind the patches, after the position embeddings and before the first norm; at a deeper
                layer the last n tokens of its input are replaced.
            image_inputs: what else the image processor gives.
        """
        device = self.device
        return self.run_image_tower(
            pixel_values.to(device), prompts, **{key: value.to(device) for key, value in image_inputs.items()}
        )

    def run_image_tower(
        self, pixel_values: Tensor, prompts: dict[int, Tensor] | None = None, **image_inputs: Tensor
    ) -> Tensor:
        """`image_features` of inputs that are where the tower is."""
        pixel_values = pixel_values.to(self.vision_dtype)
        layers, reads_first = list(self.vision_layers), self._can_run_first()
        if not prompts and not reads_first:
            pooled = self.pooled_image(pixel_values, **image_inputs)
            project = getattr(self.base_model, "visual_projection", None)
            return pooled if project is None else project(pooled)
        hidden = self.embed_image(pixel_values, **image_inputs)
        by_layer = {
            index: value.to(hidden.dtype).expand(len(hidden), -1, -1) for index, value in (prompts or {}).items()
        }
        hidden = self.norm_image(torch.cat([hidden, by_layer[0]], dim=1) if by_layer else hidden)
        mask = self.image_mask(hidden, **image_inputs)
        for index, layer in enumerate(layers):
            if index and index in by_layer:
                hidden = torch.cat([hidden[:, : -by_layer[index].shape[1]], by_layer[index]], dim=1)
            is_last = layer is layers[-1]
            hidden = _run_first(layer, hidden, mask) if is_last and reads_first else _hidden(layer(hidden, mask))
        return self.pool_image(hidden, **image_inputs)

    def _can_run_first(self) -> bool:
        """Whether the last image layer may run for the first token alone."""
        if not (self.vision_layer_class and len(self.vision_layers)):
            return False
        tower, last = self.base_model.vision_model, self.vision_layers[-1]
        return _is_a(last, self.vision_layer_class) and all(map(is_bare, (tower, tower.encoder, last)))

    def pooled_image(self, pixel_values: Tensor, **image_inputs: Tensor) -> Tensor:
        """What the image tower gives for images without prompts, before the projection."""
        return self.base_model.vision_model(pixel_values=pixel_values, **image_inputs).pooler_output

    def embed_image(self, pixel_values: Tensor, **image_inputs: Tensor) -> Tensor:
        """Patch, class and position embeddings `(batch, tokens, vision_width)`."""
        return self.base_model.vision_model.embeddings(pixel_values)

    def norm_image(self, hidden: Tensor) -> Tensor:
        """The norm before the first layer."""
        return self.base_model.vision_model.pre_layrnorm(hidden)

    def image_mask(self, hidden: Tensor, **image_inputs: Tensor) -> Tensor | None:
        """The mask that the image tower's layers take."""
        return None

    def pool_image(self, hidden: Tensor, **image_inputs: Tensor) -> Tensor:
        """Image embeddings of the last layer's hidden states."""
        return self.base_model.visual_projection(self.base_model.vision_model.post_layernorm(hidden[:, 0]))

    # ------------------------------------------------------------------ scores

    @property
    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by: exp(logit_scale), fp32, scalar."""
        with align_module_device(self.base_model):
            return self.base_model.logit_scale.float().exp().reshape(())

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the scaled cosines, fp32, scalar; `None` where nothing is."""
        return None

    def probabilities(self, logits: Tensor) -> Tensor:
        """Scores `(..., num_classes)` of logits: over all classes together, or of each alone (SigLIP)."""
        return logits.float().sigmoid() if self.is_sigmoid else logits.float().softmax(dim=-1)


class Clip(Family, model_type="clip", model_class="CLIPModel"):
    """CLIP, https://arxiv.org/abs/2103.00020, and everything in its format (OpenCLIP, LAION, FashionCLIP ...)."""

    layer_class = vision_layer_class = "CLIPEncoderLayer"


class MetaClip2(Family, model_type="metaclip_2", model_class="MetaClip2Model"):
    """MetaCLIP 2, https://arxiv.org/abs/2507.22062."""

    layer_class = vision_layer_class = "MetaClip2EncoderLayer"


class Siglip(Family, model_type="siglip", model_class="SiglipModel"):
    """SigLIP, https://arxiv.org/abs/2303.15343, and SigLIP 2 of a fixed image size."""

    is_causal, pads_to_full, is_sigmoid = False, True, True

    @property
    def projection_dim(self) -> int:
        return self.base_model.config.text_config.projection_size

    def text_mask(self, hidden: Tensor, is_token: Tensor) -> Tensor | None:
        config = self.base_model.config.text_config
        return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=is_token.long())

    def pooled_position(self, ends: Tensor, length: int) -> Tensor:
        return torch.full_like(ends, length - 1)

    def project_text(self, pooled: Tensor) -> Tensor:
        return self.base_model.text_model.head(self.base_model.text_model.final_layer_norm(pooled))

    def norm_image(self, hidden: Tensor) -> Tensor:
        return hidden

    def pool_image(self, hidden: Tensor, **image_inputs: Tensor) -> Tensor:
        return self.base_model.vision_model.head(self.base_model.vision_model.post_layernorm(hidden))

    @property
    def logit_bias(self) -> Tensor:
        with align_module_device(self.base_model):
            return self.base_model.logit_bias.float().reshape(())


class Siglip2NaFlex(Siglip, model_type="siglip2", model_class="Siglip2Model"):
    """SigLIP 2 for images of any aspect ratio (NaFlex), https://arxiv.org/abs/2502.14786."""

    def pooled_image(self, pixel_values: Tensor, **image_inputs: Tensor) -> Tensor:
        # By place: the mask's name differs between versions of transformers.
        mask, shapes = image_inputs["pixel_attention_mask"], image_inputs["spatial_shapes"]
        return self.base_model.vision_model(pixel_values, mask, shapes).pooler_output

    def embed_image(self, pixel_values: Tensor, **image_inputs: Tensor) -> Tensor:
        return self.base_model.vision_model.embeddings(pixel_values, image_inputs["spatial_shapes"])

    def _patch_mask(self, hidden: Tensor, **image_inputs: Tensor) -> Tensor:
        mask = image_inputs["pixel_attention_mask"]
        return torch.cat([mask, mask.new_ones(len(mask), hidden.shape[1] - mask.shape[1])], dim=1)

    def image_mask(self, hidden: Tensor, **image_inputs: Tensor) -> Tensor | None:
        config, mask = self.base_model.vision_model.config, self._patch_mask(hidden, **image_inputs)
        return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=mask)

    def pool_image(self, hidden: Tensor, **image_inputs: Tensor) -> Tensor:
        tower = self.base_model.vision_model
        return tower.head(tower.post_layernorm(hidden), self._patch_mask(hidden, **image_inputs))


class _Bert(Family):
    """Text towers of BERT's kind: both ways, a mask for the padding, pooled at the first position."""

    is_causal = False
    token_embedding_name = "word_embeddings"

    def embed_text(self, vectors: Tensor, positions: Tensor) -> Tensor:
        return self.text_embeddings(inputs_embeds=vectors, position_ids=positions)

    def text_mask(self, hidden: Tensor, is_token: Tensor) -> Tensor | None:
        config = self.base_model.config.text_config
        return create_bidirectional_mask(config=config, inputs_embeds=hidden, attention_mask=is_token.long())

    def pooled_position(self, ends: Tensor, length: int) -> Tensor:
        return torch.zeros_like(ends)

    def project_text(self, pooled: Tensor) -> Tensor:
        return self.base_model.text_projection(pooled)


class ChineseClip(_Bert, model_type="chinese_clip", model_class="ChineseCLIPModel"):
    """Chinese CLIP, https://arxiv.org/abs/2211.01335."""

    vision_layer_class = "ChineseCLIPVisionLayer"

    @property
    def text_layers(self) -> Any:
        return self.base_model.text_model.encoder.layer


class AltClip(_Bert, model_type="altclip", model_class="AltCLIPModel"):
    """AltCLIP, https://arxiv.org/abs/2211.06679; positions count from behind the padding's id."""

    vision_layer_class = "AltCLIPEncoderLayer"

    @property
    def text_embeddings(self) -> Any:
        return self.base_model.text_model.roberta.embeddings

    @property
    def text_layers(self) -> Any:
        encoder = self.base_model.text_model.roberta.encoder
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    @property
    def max_positions(self) -> int:
        return super().max_positions - self.text_embeddings.padding_idx - 1

    def embed_text(self, vectors: Tensor, positions: Tensor) -> Tensor:
        return super().embed_text(vectors, positions + self.text_embeddings.padding_idx + 1)

    def project_text(self, pooled: Tensor) -> Tensor:
        text = self.base_model.text_model
        return self.base_model.text_projection(text.transformation(text.pre_LN(pooled)))


class Align(ChineseClip, model_type="align", model_class="AlignModel"):
    """ALIGN, https://arxiv.org/abs/2102.05918: an EfficientNet for images, and a temperature."""

    vision_layers = ()
    vision_width = 0

    @property
    def vision_dtype(self) -> torch.dtype:
        return self.base_model.vision_model.embeddings.convolution.weight.dtype

    @property
    def logit_scale(self) -> Tensor:
        with align_module_device(self.base_model):
            return 1 / self.base_model.temperature.float().reshape(())


def supported_models() -> str:
    """The supported base models, as text for messages."""
    return ", ".join(f"{family.model_class} (model_type {name!r})" for name, family in FAMILIES.items())


def get_family(model: Any) -> Family:
    """The family of a loaded base model.

    Args:
        model (`PreTrainedModel`, `PeftModel` or [`Family`]): a base model, one that PEFT has wrapped (its layers are
            used as they are), or a family, which is returned.

    Raises:
        TypeError: a model of no supported family; lists those that are.
    """
    if isinstance(model, Family):
        return model
    inner = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    family = FAMILIES.get(getattr(getattr(inner, "config", None), "model_type", ""))
    if family is None or not _is_a(inner, family.model_class):
        raise TypeError(
            f"the base model must be one of {supported_models()}; got {type(model).__name__}. Load it with its "
            "class's `from_pretrained`, or by name with `CoOpModel.from_pretrained`."
        )
    return family(inner)


def check_tokenizer(family: Family, tokenizer: Any) -> None:
    """Raises `ValueError` where a causal base would silently pool at the wrong place, because its configuration names
    another EOS than the tokenizer writes."""
    eos = getattr(family.base_model.config.text_config, "eos_token_id", None)
    ids = tokenizer("")["input_ids"]
    if family.model_type == "metaclip_2" and ids and ids[-1] != eos:
        raise ValueError(
            f"the base pools at EOS {eos} (text_config.eos_token_id), and {type(tokenizer).__name__} ends a text with "
            f"{ids[-1]}: load the tokenizer that belongs to the base."
        )


def _is_a(module: Any, class_name: str) -> bool:
    """Whether a module is of a class of this name, or one below it."""
    return class_name in {c.__name__ for c in type(module).__mro__}


def is_bare(module: nn.Module) -> bool:
    """Whether nothing stands around a module that is to see it called: hooks, accelerate's too, or compiled code."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and "forward" not in vars(module) and module._compiled_call_impl is None


def _run_first(layer: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's output for the first token, `(batch, 1, width)`: two thirds of the last layer less to compute."""
    attended = layer.self_attn(hidden_states=layer.layer_norm1(hidden), attention_mask=mask)
    first = hidden[:, :1] + _hidden(attended)[:, :1]
    return first + layer.mlp(layer.layer_norm2(first))


def _hidden(output: Any) -> Tensor:
    """A layer's hidden states; layers of some versions of transformers return a tuple."""
    return output[0] if isinstance(output, tuple) else output
