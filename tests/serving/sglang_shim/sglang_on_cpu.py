"""What SGLang 0.5.23 needs to run on a CPU without its compiled kernels; import it before SGLang.

SGLang starts processes of its own. They run the top of the main script again, so a script that imports this module
brings it into all of them.
"""

import torch

# torchvision's build on PyPI is for CUDA: its library does not load beside a CPU torch, and its Python part then
# fails on operators that were never declared. SGLang imports it for images, which are not used here.
_declarations = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declarations.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from sglang.srt.layers.rotary_embedding import factory  # noqa: E402
from sglang.srt.models.deepseek_common import attention_backend_handler  # noqa: E402
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod  # noqa: E402


def _plain_rope(*shape_and_device):
    """SGLang's CPU factory knows scaled RoPE only; its general one, which GPUs use, knows the plain kind too."""
    return factory.get_rope(*shape_and_device[:-1])


factory.get_rope_cpu = _plain_rope

# Backends without a handler get Triton's, which sends prompts to a kernel that `torch_native` does not have; absorbed
# latent attention is what `torch_native` computes.
attention_backend_handler.AttentionBackendRegistry.register(
    "torch_native", lambda attention, batch: AttnForwardMethod.MLA
)
