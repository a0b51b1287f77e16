"""Adapt self-supervised ViTs to unlabelled images of a new domain with GLARE adapters, and segment with them.

Importing the package registers the models with the Auto classes of transformers and UniAdapter with PEFT.
"""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForSemanticSegmentation

from .configuration_glare import GlareConfig
from .errors import UserError
from .modeling_glare import GlareBackbone, GlareForSemanticSegmentation, GlareModel
from .uniadapter import UniAdapterConfig, UniAdapterModel

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
