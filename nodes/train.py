"""Training Settings and Train Adapter."""

from __future__ import annotations

import time

import torch
from comfy_api.latest import io

from ..training.config import PRECISIONS, TIMESTEPS, TrainingConfig
from ..training.schedule import SCHEDULES
from ..trilora_ops.targets import TARGETS
from . import compat
from .notices import collected
from .types import Dataset, EncodedDataset, LoraModel, LossMap, Method, Plan, Settings, StackEntry


class TrainingSettingsNode(io.ComfyNode):
    """How long, how fast, how much at once."""

    @classmethod
    def define_schema(cls):
        default = TrainingConfig()
        return compat.Schema(
            node_id="TriLoRATrainingSettings",
            display_name="Training Settings",
            category="TriLoRA/train",
            description="Steps, learning rate and batch; the defaults suit a style or a subject from ten to fifty images.",
            inputs=[
                io.Int.Input("steps", default=default.steps, min=1, max=1_000_000, tooltip="Optimizer steps. 30 to 100 for each image is common."),
                io.Float.Input("learning_rate", default=default.learning_rate, min=1e-8, max=1.0, step=1e-6, round=1e-8,
                               tooltip="AdamW's learning rate at the top of the schedule."),
                io.Int.Input("batch_size", default=default.batch_size, min=1, max=256, tooltip="Images in one pass. Each keeps its own caption, noise and noise level."),
                # not "seed": the front end would add its "randomize after each run", and train anew at every queue
                io.Int.Input("training_seed", display_name="seed", default=default.seed, min=0, max=2**32 - 1, tooltip="Of every random draw: start values, order, noise, noise levels."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=default.schedule, tooltip="Course of the learning rate after the warm-up; cosine and linear end at 0."),
                compat.advanced(io.Float.Input("warmup", default=default.warmup, min=0.0, max=0.9, step=0.01, tooltip="Share of the steps over which the learning rate rises from 0.")),
                compat.advanced(io.Int.Input("accumulation", default=default.accumulation, min=1, max=1024, tooltip="Passes that make one step: a larger batch in the same memory.")),
                compat.advanced(io.Float.Input("weight_decay", default=default.weight_decay, min=0.0, max=1.0, step=0.001, round=0.0001, tooltip="AdamW's pull of the factors towards zero. Σ is exempt.")),
                compat.advanced(io.Float.Input("grad_clip", default=default.grad_clip, min=0.0, max=100.0, step=0.1, tooltip="Largest gradient norm; 0 = no limit.")),
                compat.advanced(io.Combo.Input("timesteps", options=list(TIMESTEPS), default=default.timesteps, tooltip="Which noise levels are practised: auto is uniform for eps and v models and logit-normal (mostly the middle) for flow models.")),
                compat.advanced(io.Float.Input("min_snr_gamma", default=default.min_snr_gamma, min=0.0, max=100.0, step=0.5, tooltip="Cap of the weight of nearly clean images, for eps and v models (min-SNR); 0 = off.")),
                compat.advanced(io.Float.Input("caption_dropout", default=default.caption_dropout, min=0.0, max=0.9, step=0.01, tooltip="Share of images trained with an empty prompt, which keeps guidance working.")),
                compat.advanced(io.Boolean.Input("checkpointing", default=default.checkpointing, tooltip="Compute blocks twice instead of keeping their activations: much less memory, about a third more time.")),
                compat.advanced(io.Float.Input("prior_weight", default=default.prior_weight, min=0.0, max=100.0, step=0.05, round=0.001, tooltip="Weight w of a regularisation set in loss = data + w · prior; only where Train Adapter has one. 0 = off.")),
                compat.advanced(io.Combo.Input("precision", options=list(PRECISIONS), default=default.precision, tooltip="What the base model computes in while it is trained through; the adapter itself is always fp32. auto: its own precision, but bf16 for fp32 models where the processor has instructions for it. model: its own. bf16: always bf16.")),
            ],
            outputs=[Settings.Output(display_name="settings", tooltip="For Train Adapter.")],
        )

    @classmethod
    def execute(cls, training_seed, **values) -> io.NodeOutput:
        return io.NodeOutput(TrainingConfig(seed=training_seed, **values))


class TrainAdapter(io.ComfyNode):
    """Trains and returns the adapter, the model with it, the losses and a report."""

    @classmethod
    def define_schema(cls):
        return compat.Schema(
            node_id="TriLoRATrainAdapter",
            display_name="Train Adapter",
            category="TriLoRA/train",
            description="Trains an adapter on a dataset. Cancelling saves what was learned so far to output/loras.",
            search_aliases=["train lora", "lora trainer", "finetune"],
            inputs=[
                io.Model.Input("model", tooltip="The model to train for. Its own weights do not change."),
                Dataset.Input("dataset", tooltip="From Training Dataset or Training Dataset (images)."),
                Method.Input("method", tooltip="From one of the method nodes: TriLoRA, LoRA / LoCon or Transform."),
                Settings.Input("settings", tooltip="From Training Settings."),
                io.Combo.Input("target", options=list(TARGETS), default="attention",
                               tooltip="Which layers learn. " + " ".join(f"{name}: {what}." for name, what in TARGETS.items())),
                Plan.Input("plan", optional=True, tooltip="From Block Plan: which blocks are trained, and with which rank, alpha, learning rate and method. "
                                                          "Without it all layers of the target are."),
                Dataset.Input("regularisation", optional=True,
                              tooltip="Images that the base model gives by itself for prompts without the trigger: what shall stay as it is (prior preservation). "
                                      "Each step then costs twice the time."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the new adapter at strength 1, for trying it out at once."),
                LoraModel.Output(display_name="adapter", tooltip="The adapter, for Save Adapter or any node that takes a LORA_MODEL."),
                LossMap.Output(display_name="loss", tooltip="The loss of every step."),
                io.String.Output(display_name="report", tooltip="What was trained, how long it took, and the loss before and after."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, dataset: EncodedDataset, method, settings: TrainingConfig, target, plan=None,
                regularisation: EncodedDataset | None = None) -> io.NodeOutput:
        from .applying import apply_state
        from .comfy_host import ComfyHost
        from .kept_file import KeptFile
        from .training_report import last_line, picture
        from .training_run import run

        node_id, started = cls.hidden.unique_id, time.perf_counter()
        with collected() as said, KeptFile(node_id) as kept:
            # ComfyUI runs nodes in inference mode, whose tensors cannot be trained
            with torch.inference_mode(False):
                state, progress, report, fixed = run(ComfyHost(model, settings.precision), dataset, method, settings, target, node_id, plan, regularisation, kept)
                adapted, _ = apply_state(state, StackEntry("the trained adapter", 1.0, 0.0), model, None)
            curve = picture(cls, progress, f"{method.name}: {progress.done} steps", fixed) if progress.losses else None
            losses = {"loss": progress.losses} | ({"data": progress.data_losses, "prior": progress.prior_losses} if progress.prior_losses else {})
            compat.show_text("\n".join([last_line(progress, time.perf_counter() - started, fixed), *said]), node_id)
        return io.NodeOutput(adapted, state, losses, report, ui=curve)
