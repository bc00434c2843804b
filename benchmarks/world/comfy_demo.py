"""`trilora demo --comfyui PATH`: the demo through a real ComfyUI in this process, wired as the bundled workflows wire it."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...trilora_ops.checkpoint import read_adapter
from ...trilora_ops.errors import TriLoRAError
from .. import installation
from ..workflow import to_prompt
from . import demo
from .scenes import caption, draw, draw_set
from .world import to_tensor

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "trilora_demo"


def run(comfyui: Path, checkpoint: str | None, output: Path, style: str, seed: int, steps: int = demo.SETTINGS.steps) -> dict:
    """Learn, save, apply and draw with the pack's own nodes; returns the report that is written as report.json.

    comfyui: a ComfyUI directory that this interpreter can run. checkpoint: one of its checkpoints, or None for the small
    world. The rest as in `demo.run`; the host reads and writes inside `output` only, but for its models.
    """
    started = time.perf_counter()
    output = output.resolve()
    host = Host(comfyui, output)
    if checkpoint is not None and checkpoint not in host.checkpoints():
        raise TriLoRAError(f"checkpoint={checkpoint!r}: not in this ComfyUI's models/checkpoints, which holds: {', '.join(host.checkpoints()) or 'nothing'}")
    _write_lessons(output / "input" / FOLDER, style, seed, scale=2 if checkpoint is None else 16)
    prompts = [caption(scene, demo.TRIGGER) for scene in demo.HELD_OUT]

    training = host.prompt("train_trilora.json")
    _choose(training, checkpoint, prompts[0], seed)
    _set(training, "TriLoRATrainingDataset", folder=FOLDER, trigger=demo.TRIGGER, resolution=64 if checkpoint is None else 256)
    _set(training, "TriLoRATrainingSettings", steps=steps, training_seed=seed, batch_size=demo.SETTINGS.batch_size,
         caption_dropout=demo.SETTINGS.caption_dropout)
    _set(training, "TriLoRASaveAdapter", name="demo")
    if checkpoint is None:
        _set(training, "TriLoRATrainingSettings", learning_rate=demo.SETTINGS.learning_rate, precision=demo.SETTINGS.precision)
        _set(training, "TriLoRAMethodTriLoRA", rank=demo.METHOD.residual.rank)
        _set(training, "TriLoRATrainAdapter", target=demo.TARGET)
    trained = host.execute(training)
    shutil.copyfile(host.picture(trained, _node(training, "TriLoRATrainAdapter")), output / "loss.png")
    file = max((output / "loras").glob("demo_*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    shutil.copyfile(file, output / "adapter.safetensors")

    rows: dict[str, list] = {"before": [], "after": []}
    for prompt in prompts:
        applying = host.prompt("apply_trilora.json")
        _choose(applying, checkpoint, prompt, seed)
        _set(applying, "TriLoRALoader", lora_name=file.name)
        done = host.execute(applying)
        for label, title in (("before", "Without the adapter"), ("after", "With the adapter")):
            with Image.open(host.picture(done, _node(applying, "SaveImage", title))) as picture:
                rows[label].append(np.asarray(picture.convert("RGB")))
    images = {label: to_tensor(pictures) for label, pictures in rows.items()}
    lessons = to_tensor([picture for picture, _ in draw_set(len(prompts), seed + 100, style)])
    demo.draw_before_after(output / "before_after.png", lessons, images, prompts, style)

    state = read_adapter(file)
    result = json.loads(state.metadata["trilora.result"])
    report = {"host": host.version, "checkpoint": checkpoint or "the small world", "method": state.metadata["trilora.method"],
              "style": style, "pictures": demo.PICTURES, "trigger": demo.TRIGGER, "steps": int(state.metadata["trilora.steps"]),
              "loss_on_fixed_noise": {"before": result["loss_before"], "after": result["loss_after"]},
              "adapter": str(file), "adapter_bytes": file.stat().st_size, "seconds": round(time.perf_counter() - started, 1)}
    if checkpoint is None:
        wanted = to_tensor([draw(scene, style, image_size=64) for scene in demo.HELD_OUT])
        report["distance_to_the_style"] = {label: demo.distance(pictures, wanted) for label, pictures in images.items()}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


class Host:
    """A ComfyUI imported into this process, with its own executor and without its server listening."""

    def __init__(self, path: Path, output: Path):
        arguments = [] if torch.cuda.is_available() else ["--cpu"]
        try:
            self.version = installation.import_host(path, arguments).version
        except installation.HostUnavailable as error:
            raise TriLoRAError(f"comfyui={str(path)!r}: {error}") from error
        import execution
        import folder_paths
        import nodes
        import server

        for folder, setter in (("", folder_paths.set_output_directory), ("input", folder_paths.set_input_directory),
                               ("temp", folder_paths.set_temp_directory)):
            (output / folder).mkdir(parents=True, exist_ok=True)
            setter(str(output / folder))
        folder_paths.add_model_folder_path("loras", str(output / "loras"), is_default=True)
        self._folders, self._nodes, self._execution = folder_paths, nodes, execution
        self._loop = asyncio.new_event_loop()  # the server queues messages on it, so it must stay open
        self._loop.run_until_complete(self._start(server))
        from .comfy_world import WorldLoader

        nodes.NODE_CLASS_MAPPINGS[WorldLoader.NODE_ID] = WorldLoader

    async def _start(self, server) -> None:
        # some of the host's nodes ask for the server's instance while being imported; nothing listens
        self._server = server.PromptServer(self._loop)
        await self._nodes.init_public_apis()
        await self._nodes.init_builtin_extra_nodes()
        if not await self._nodes.load_custom_node(str(ROOT)):
            raise TriLoRAError("comfyui: it could not load the pack; the reason stands in the log above")
        self._executor = self._execution.PromptExecutor(self._server, **installation.cache_arguments(self._execution.PromptExecutor))

    def checkpoints(self) -> list[str]:
        """Names in models/checkpoints."""
        return self._folders.get_filename_list("checkpoints")

    def prompt(self, workflow: str) -> dict:
        """A bundled workflow in the form that the executor takes."""
        saved = json.loads((ROOT / "workflows" / workflow).read_text(encoding="utf-8"))
        kinds = {node["type"] for node in saved["nodes"]} & set(self._nodes.NODE_CLASS_MAPPINGS)
        return to_prompt(saved, {kind: _inputs(self._nodes.NODE_CLASS_MAPPINGS[kind]) for kind in kinds})

    def execute(self, prompt: dict) -> dict:
        """Run a prompt as the server does; returns what its output nodes show. Raises TriLoRAError with the node's message."""
        valid, error, outputs, node_errors = self._loop.run_until_complete(self._execution.validate_prompt("demo", prompt, None))
        if not valid:
            raise TriLoRAError(f"workflow: {error['message']}: {json.dumps(node_errors, default=str)[:500]}")
        self._executor.execute(prompt, "demo", {}, outputs)
        for event, data in self._executor.status_messages:
            if event in ("execution_error", "execution_interrupted"):
                raise TriLoRAError(f"{data['node_type']}: {data.get('exception_message', 'interrupted').strip()}")
        return self._executor.history_result["outputs"]

    def picture(self, outputs: dict, node: str) -> Path:
        """The first picture that a node shows."""
        shown = outputs[node]["images"][0]
        return Path(self._folders.get_directory_by_type(shown["type"])) / shown["subfolder"] / shown["filename"]


def _write_lessons(folder: Path, style: str, seed: int, scale: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i, (picture, scene) in enumerate(draw_set(demo.PICTURES, seed + 100, style)):
        size = (picture.shape[1] * scale, picture.shape[0] * scale)
        Image.fromarray(picture).resize(size, Image.Resampling.NEAREST).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(caption(scene, demo.TRIGGER), encoding="utf-8")


def _choose(prompt: dict, checkpoint: str | None, text: str, seed: int) -> None:
    """Checkpoint, prompt, picture size and sampler, in either workflow."""
    for node in prompt.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            if checkpoint is None:
                from .comfy_world import WorldLoader

                node.update(class_type=WorldLoader.NODE_ID, inputs={})
            else:
                node["inputs"]["ckpt_name"] = checkpoint
        elif node["_meta"]["title"] == "Prompt":
            node["inputs"] |= {name: text for name in ("text", "value") if isinstance(node["inputs"].get(name), str)}
        elif "egative" in node["_meta"]["title"]:
            node["inputs"] |= {name: "" for name in ("text", "value") if isinstance(node["inputs"].get(name), str)}
        elif node["class_type"] == "PrimitiveInt":
            node["inputs"]["value"] = seed + 7
    side = 128 if checkpoint is None else 256
    _set(prompt, "EmptyLatentImage", width=side, height=side)
    if checkpoint is None:
        _set(prompt, "KSampler", steps=20, cfg=2.0, sampler_name="euler", scheduler="normal")


def _set(prompt: dict, kind: str, **values) -> None:
    for node in prompt.values():
        if node["class_type"] == kind:
            node["inputs"].update(values)


def _node(prompt: dict, kind: str, title: str | None = None) -> str:
    return next(name for name, node in prompt.items() if node["class_type"] == kind and title in (None, node["_meta"]["title"]))


def _inputs(kind) -> dict:
    inputs = kind.INPUT_TYPES()
    return {"input": inputs, "input_order": {section: list(names) for section, names in inputs.items()}}
