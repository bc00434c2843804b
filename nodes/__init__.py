"""The nodes: the only rooms that import the host.

A node's file is its face: what it needs only when it runs is imported then, since the host's start waits for all faces.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from . import compat
from .bake import BakeAdapter
from .block_plan import BlockPlanNode, PlanFromAdapter
from .blocks import BlockWeightsNode
from .comfy_diffusers import DiffusersLoRA
from .comfy_transforms import TransformPatch
from .dataset import TrainingDatasetNode
from .extract import ExtractAdapter
from .hook import AdapterHookNode
from .image_dataset import ImageDatasetNode
from .inspect import InspectAdapter
from .load import TriLoRALoader
from .methods import LoraMethodNode, TransformMethodNode, TriLoraMethodNode
from .picture_grid import PictureGridNode
from .save import SaveAdapter
from .stack import AdapterStack, ApplyStack
from .tools import LoadAdapter, MergeAdapters, ResizeAdapter
from .train import TrainAdapter, TrainingSettingsNode

NODES: list[type[io.ComfyNode]] = [
    TriLoRALoader, AdapterStack, ApplyStack, AdapterHookNode, BlockWeightsNode, BlockPlanNode, PlanFromAdapter, TrainingDatasetNode, ImageDatasetNode, TriLoraMethodNode, LoraMethodNode, TransformMethodNode, TrainingSettingsNode, TrainAdapter, SaveAdapter,
    LoadAdapter, MergeAdapters, ResizeAdapter, BakeAdapter, ExtractAdapter, InspectAdapter, PictureGridNode,
]


class TriLoRAExtension(ComfyExtension):
    """What the host asks for its list of nodes."""

    def __init__(self):
        compat.register_adapter(TransformPatch)
        compat.register_adapter(DiffusersLoRA)

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
