"""What CoOp is compared with: zero-shot CLIP, prompt ensembles, CuPL, the linear probe, PET and AutoPrompt."""

from .autoprompt import DiscretePrompt, autoprompt, project_context, prompt_vocabulary
from .cupl import CUPL_QUESTIONS, cupl_class_embeddings, generate_prompts, read_prompts, write_prompts
from .linear_probe import LinearProbe, fit_linear_probe
from .pet import PetResult, fit_pet, prompt_weights, soft_label_loss, soft_labels, teacher_logits
from .zero_shot import (
    HAND_TEMPLATES,
    IMAGENET_7_TEMPLATES,
    IMAGENET_80_TEMPLATES,
    class_embeddings,
    encode_texts,
    mean_text_embeddings,
    zero_shot_logits,
)


__all__ = [
    "CUPL_QUESTIONS",
    "HAND_TEMPLATES",
    "IMAGENET_7_TEMPLATES",
    "IMAGENET_80_TEMPLATES",
    "DiscretePrompt",
    "LinearProbe",
    "PetResult",
    "autoprompt",
    "class_embeddings",
    "cupl_class_embeddings",
    "encode_texts",
    "fit_linear_probe",
    "fit_pet",
    "generate_prompts",
    "mean_text_embeddings",
    "project_context",
    "prompt_vocabulary",
    "prompt_weights",
    "read_prompts",
    "soft_label_loss",
    "soft_labels",
    "teacher_logits",
    "write_prompts",
    "zero_shot_logits",
]
