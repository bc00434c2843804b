"""The nodes: the only rooms that import the host."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .comfy_transforms import register
from .dataset import TrainingDatasetNode
from .load import TriLoRALoader
from .methods import LoraMethodNode, TriLoraMethodNode
from .save import SaveAdapter
from .train import TrainAdapter, TrainingSettingsNode

NODES: list[type[io.ComfyNode]] = [
    TriLoRALoader, TrainingDatasetNode, TriLoraMethodNode, LoraMethodNode, TrainingSettingsNode, TrainAdapter, SaveAdapter,
]


class TriLoRAExtension(ComfyExtension):
    """What the host asks for its list of nodes."""

    def __init__(self):
        register()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
