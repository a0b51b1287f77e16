"""What ``import glare`` costs beyond torch, transformers and PEFT: nothing but its own few files."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
import transformers, peft
basis = set(sys.modules)
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForSemanticSegmentation, PreTrainedModel
from transformers.backbone_utils import BackboneMixin
before = set(sys.modules)
import glare
print(json.dumps([sorted(set(sys.modules) - known) for known in (before, basis)]))
"""
HEAVY = ("datasets", "evaluate", "tensorboard", "matplotlib", "gradio")
"""What no class of transformers that glare is made of may bring either."""


def test_importing_the_package_imports_no_other() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    added, all_added = json.loads(result.stdout)
    assert {name.partition(".")[0] for name in added} == {"glare"}
    assert {name for name in added if name.count(".")} == {
        "glare.configuration_glare",
        "glare.errors",
        "glare.modeling_glare",
        "glare.segmentation_heads",
        "glare.uniadapter",
    }
    assert [name for name in all_added if name.startswith(HEAVY)] == []
