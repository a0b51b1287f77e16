"""Adapt self-supervised ViTs to unlabelled images of a new domain with GLARE adapters, and segment with them.

Importing the package registers the models with the Auto classes of transformers and UniAdapter with PEFT.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from .configuration_glare import GlareConfig
from .errors import UserError
from .modeling_glare import GlareBackbone, GlareForSemanticSegmentation, GlareModel, GlarePreTrainedModel
from .uniadapter import UniAdapterConfig, UniAdapterModel

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = [
    "GlareBackbone",
    "GlareConfig",
    "GlareForSemanticSegmentation",
    "GlareModel",
    "UniAdapterConfig",
    "UniAdapterModel",
    "UserError",
]

AutoConfig.register("glare", GlareConfig)
AutoModel.register(GlareConfig, GlareModel)
AutoBackbone.register(GlareConfig, GlareBackbone)
AutoModelForSemanticSegmentation.register(GlareConfig, GlareForSemanticSegmentation)


def _push_to_hub(self: GlarePreTrainedModel, repo_id: str, **options: Any) -> "CommitInfo":
    """Publish as `glare push` does: one commit with model, adapters, code, image processor and card."""
    from .model_push import push_model

    return push_model(self, repo_id, **options)


# the class travels with checkpoints, publishing does not: without this package it is that of transformers
GlarePreTrainedModel.push_to_hub = _push_to_hub
