"""ComfyUI-TriLoRA: train, combine and control adapters inside node graphs.

Importing this imports nothing else, so that it works without ComfyUI and costs its start nothing.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host's door (V3): nodes and everything they need are imported here, not before."""
    from .nodes import TriLoRAExtension

    return TriLoRAExtension()
