"""Adapters that peft, diffusers, LyCORIS and the host's own trainer make for a tiny U-Net, with the deltas they mean.

diffusers' U-Net stands beside the host's with the same weights: what a library merges into the one is what the other's
weights must get. Knows nothing of pytest. Import it only where the host is already imported.
"""

import inspect
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here asks the network for anything

import comfy.lora  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

PLAIN = (nn.Linear, nn.Conv2d)


class Twin:
    """diffusers' U-Net with the weights of the host's tiny one. `targets`: its module -> the host's target key."""

    def __init__(self, patcher):
        self.patcher = patcher
        names = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
        weights = patcher.model.diffusion_model.state_dict()
        self.state = {theirs: weights[ours].float().clone() for theirs, ours in names.items() if ours in weights}
        fresh = self.fresh()
        self.targets = {name: f"diffusion_model.{names[name + '.weight']}" for name, module in fresh.named_modules() if isinstance(module, PLAIN)}

    def fresh(self):
        """The U-Net, without any adapter."""
        from diffusers import UNet2DConditionModel

        with torch.inference_mode(False):
            unet = UNet2DConditionModel(
                in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128), cross_attention_dim=64, attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2, use_linear_projection=True,
            )  # fmt: skip
            unet.load_state_dict(self.state)
        return unet

    def pipe(self, unet):
        """diffusers' pipeline with nothing in it but the U-Net."""
        from diffusers import StableDiffusionPipeline

        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
        return StableDiffusionPipeline(unet=unet, requires_safety_checker=False, **parts)

    def change(self, unet) -> dict[str, Tensor]:
        """Target key -> what has been merged into a U-Net's weight, of the weight's shape, where anything has."""
        found = {self.targets[name]: module.weight.detach() - self.state[f"{name}.weight"] for name, module in unet.named_modules() if name in self.targets}
        return {key: delta for key, delta in found.items() if delta.any()}

    def fused(self, path: Path) -> dict[str, Tensor]:
        """The same for a file that diffusers has loaded with its own loader and fused."""
        with torch.inference_mode(False):
            pipe = self.pipe(self.fresh())
            pipe.load_lora_weights(path.parent, weight_name=path.name)
            pipe.fuse_lora(components=["unet"])
            pipe.unload_lora_weights()
            return self.change(pipe.unet)

    def trained_by_peft(self, modules: list[str], rank: int, alpha: float, **options):
        """(a U-Net in peft's wrapper with a random adapter on these modules, what peft merges)."""
        import peft

        def wrapped():
            return peft.get_peft_model(self.fresh(), peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, **options))

        with torch.inference_mode(False):
            model, copy = wrapped(), wrapped()
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            peft.set_peft_model_state_dict(copy, peft.get_peft_model_state_dict(model))
            return model, self.change(copy.merge_and_unload())


def write_peft(twin: Twin, folder: Path, rank: int, alpha: float, **options) -> tuple[Path, dict[str, Tensor]]:
    """peft's own save_pretrained, every layer adapted: (its file, the delta of each target)."""
    model, found = twin.trained_by_peft(list(twin.targets), rank, alpha, **options)
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors", found


def write_diffusers(twin: Twin, folder: Path, rank: int, alpha: float) -> tuple[Path, dict[str, Tensor]]:
    """diffusers' save_lora_weights with its configuration, every layer adapted: (its file, the delta of each target)."""
    model, _ = twin.trained_by_peft(list(twin.targets), rank, alpha)
    twin.pipe(twin.fresh()).save_lora_weights(folder, _unwrapped(model), unet_lora_adapter_metadata=model.peft_config["default"].to_dict())
    path = folder / "pytorch_lora_weights.safetensors"
    return path, twin.fused(path)


def write_scripts(twin: Twin, folder: Path, rank: int) -> tuple[Path, dict[str, Tensor]]:
    """What diffusers' training scripts save: attention layers, under `to_q.lora.up.weight`, and no configuration."""
    from diffusers.utils import convert_state_dict_to_diffusers

    model, _ = twin.trained_by_peft([name for name in twin.targets if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))], rank, rank)
    twin.pipe(twin.fresh()).save_lora_weights(folder, convert_state_dict_to_diffusers(_unwrapped(model)))
    path = folder / "pytorch_lora_weights.safetensors"
    return path, twin.fused(path)


def write_text_encoder(twin: Twin, folder: Path, rank: int, alpha: float) -> tuple[Path, dict[str, Tensor]]:
    """diffusers' save_lora_weights for one layer as wide as CLIP-L's: (its file, the delta of "mlp.fc1.weight" and the others)."""
    import peft
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.inference_mode(False):
        encoder = CLIPTextModel(CLIPTextConfig(vocab_size=20, num_hidden_layers=1, hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        before = {name: module.weight.detach().clone() for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
        model = peft.get_peft_model(encoder, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(before), init_lora_weights=False))
        twin.pipe(twin.fresh()).save_lora_weights(folder, text_encoder_lora_layers=_unwrapped(model))
        after = dict(model.merge_and_unload().named_modules())
        found = {name.split("layers.0.")[1] + ".weight": after[name].weight.detach() - weight for name, weight in before.items()}
    return folder / "pytorch_lora_weights.safetensors", found


def _unwrapped(model) -> dict[str, Tensor]:
    from peft.utils import get_peft_model_state_dict

    return {key.removeprefix("base_model.model."): tensor for key, tensor in get_peft_model_state_dict(model).items()}


def train(node_class, build, **options):
    """The LORA_MODEL of the host's Train LoRA node after two steps on the TinyModel that `build` makes."""
    tiny = build()
    patcher, latents, positive = tiny.patcher, torch.randn(tiny.latent_shape, generator=torch.Generator().manual_seed(9)), tiny.conditioning
    # as the loaders of 0.33.0 leave it: its node trains on a second model, made like the first
    patcher.cached_patcher_init = (lambda disable_dynamic: _plain(build().patcher), ())
    values = {
        "model": patcher, "latents": {"samples": latents}, "positive": positive, "batch_size": 1, "steps": 2, "grad_accumulation_steps": 1,
        "learning_rate": 0.01, "rank": 3, "optimizer": "AdamW", "loss_function": "MSE", "seed": 5, "training_dtype": "fp32", "lora_dtype": "fp32",
        "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1, "offloading": False,
        "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False, **options,
    }  # fmt: skip
    call = node_class.execute if hasattr(node_class, "execute") else node_class().train
    values = {name: value for name, value in values.items() if name in inspect.signature(call).parameters}
    if getattr(node_class, "INPUT_IS_LIST", False):
        values = {name: [value] for name, value in values.items()}
    with torch.inference_mode():  # as the executor calls it
        outputs = call(**values)
    return getattr(outputs, "result", outputs)[node_class.RETURN_TYPES.index("LORA_MODEL")]


def _plain(patcher):
    return comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)


def weight_of(patcher, key: str) -> Tensor:
    """A weight of a MODEL with all of its patches, in fp32."""
    weight = comfy.utils.get_attr(patcher.model, key).detach().float().clone()
    return comfy.lora.calculate_weight(patcher.patches.get(key, []), weight, key)


def dora(patcher, tensors) -> dict[str, Tensor]:
    """Target key -> m (W + A) / ||W + A|| - W (arXiv:2402.09353), the norms of rows, for the host's own names with kohya's
    endings: what PEFT, diffusers and LyCORIS mean by magnitudes of the outputs, and core does not."""
    found = {}
    for name in (key.removesuffix(".dora_scale") for key in tensors if key.endswith(".dora_scale")):
        up, down = (tensors[f"{name}.lora_{half}.weight"].double().flatten(1) for half in ("up", "down"))
        weight = weight_of(patcher, f"{name}.weight").double()
        scale = float(tensors[f"{name}.alpha"]) / len(down) if f"{name}.alpha" in tensors else 1.0
        changed = weight.flatten(1) + scale * up @ down
        changed *= tensors[f"{name}.dora_scale"].double().reshape(-1, 1) / changed.norm(dim=1, keepdim=True)
        found[f"{name}.weight"] = changed.view(weight.shape) - weight
    return found


def deltas(patched, patcher) -> dict[str, Tensor]:
    """Target key -> what a patched MODEL's patches add to the weight."""
    with torch.inference_mode():
        return {key: weight_of(patched, key) - weight_of(patcher, key) for key in patched.patches}
