"""A ComfyUI model as the training engine's Host."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from comfy.ldm.modules.attention import SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor, nn

from ..training.frozen import can_freeze
from ..training.host import Sample
from ..trilora_ops.errors import TriLoRAError
from ..trilora_ops.metadata import fingerprint
from .compat import frozen_weight, is_readable, multiplies_bf16, normal_copy, training_clone, training_kernels
from .encoding import check_finite
from .sampling_patches import model_alone
from .types import EncodedImage

_BLOCK_LISTS = {"blocks", "double_blocks", "single_blocks", "layers", "transformer_blocks", "joint_blocks",
                "double_layers", "single_layers", "double_stream_blocks", "single_stream_blocks"}
_SESSION = threading.RLock()
# guidance-distilled models are trained at 1 (the host's default of 3.5 is for sampling)
_TRAINING_GUIDANCE = 1.0


class ComfyHost:
    """Wraps a ModelPatcher; the engine's calls become `apply_model` and the model's own noise schedule."""

    def __init__(self, patcher, precision: str = "model"):
        """precision: see `TrainingConfig`."""
        self.patcher = training_clone(patcher)
        self._options, self.left_out = model_alone(self.patcher)  # left_out: sentences for the page
        self.model = self.patcher.model
        self.device = self.patcher.load_device
        self.sampling = self.patcher.get_model_object("model_sampling")
        self.prediction = prediction_of(self.sampling)
        self.sigma_data = float(getattr(self.sampling, "sigma_data", 1.0))
        self.compute_dtype = self._computes_in(precision)
        self._layers = layers_of(self.model)
        for key, module in self._layers.items():
            if not is_readable(module):
                raise TriLoRAError(f"model: {key} is kept as {module.weight.dtype} by a {type(module).__name__} of another extension, which "
                                   "cannot be trained through; load the model in fp16, bf16, fp8 or GGUF")

    def _computes_in(self, precision: str) -> torch.dtype:
        # the unpatched object: until another clone is loaded, the model itself still holds what an earlier run has set
        own, bf16 = self.patcher.get_model_object("manual_cast_dtype") or self.model.get_dtype(), torch.bfloat16
        faster = own == torch.float32 and bf16 in self.model.model_config.supported_inference_dtypes and multiplies_bf16(self.device)
        if own == bf16 or precision == "model" or (precision == "auto" and not faster):
            return own
        self.patcher.set_model_compute_dtype(bf16)  # of this clone; the weights stay as they are stored
        return bf16

    def layers(self) -> Mapping[str, nn.Module]:
        """Target key -> linear layer or convolution of the denoiser."""
        return self._layers

    def weight(self, key: str) -> Tensor:
        """Effective W0 in fp32."""
        module = self._layers[key]
        with torch.no_grad(), frozen_weight(module, torch.empty(0, device=self.device)) as weight:
            return weight if weight is module.weight else weight.clone()

    def frozen_weight(self, module: nn.Module, like: Tensor) -> AbstractContextManager[Tensor]:
        """See `compat.frozen_weight`."""
        return frozen_weight(module, like)

    def blocks(self) -> Sequence[nn.Module]:
        """Residual blocks and transformers of a U-Net; members of the numbered block lists of a DiT."""
        return list(_blocks(self.model.diffusion_model, ""))

    def sigma(self, u: Tensor) -> Tensor:
        """(B,) noise levels, u = 1 being pure noise."""
        return torch.tensor([float(self.sampling.percent_to_sigma(1.0 - float(place))) for place in u])

    def add_noise(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The model's own forward process; (B, C, *space)."""
        # noise_scaling writes into the noise it is given, and takes a sigma of one element for a scalar
        return self.sampling.noise_scaling(sigma, noise.clone(), x0, False)

    def prepare(self, image: EncodedImage, conditioning: list) -> Sample:
        """A sample in the model's own scale, with the conditions computed for its own size."""
        check_finite(image.name, image.latent, conditioning)
        latent = image.latent.detach().clone().float()
        channels = self.model.latent_format.latent_channels
        if latent.shape[1] != channels:
            raise TriLoRAError(f"dataset: its latents have {latent.shape[1]} channels and this model's have {channels}; "
                               "encode the dataset with this model's own VAE")
        x0 = self.model.process_latent_in(latent.to(self.device))
        entry = [conditioning[0][0], dict(conditioning[0][1])]
        entry[1].setdefault("guidance", _TRAINING_GUIDANCE)
        conditions = comfy.sampler_helpers.convert_cond([_cloned(entry)])
        with torch.no_grad():
            done = comfy.samplers.process_conds(self.model, torch.zeros_like(x0), {"positive": conditions}, self.device,
                                                latent_image=x0, seed=0)
        # processed for one sample: area and batch size are this image's own
        conds = {name: cond.process_cond(batch_size=1, area=None) for name, cond in done["positive"][0]["model_conds"].items()}
        for cond in conds.values():
            cond.cond = _cloned(cond.cond, "cpu")
        signature = (tuple(x0.shape), tuple(sorted((name, _signature(cond.cond)) for name, cond in conds.items())))
        return Sample(image.name, x0.float().cpu(), conds, signature, image.repeats)

    def collate(self, samples: Sequence[Sample]) -> dict:
        """Conditions of one batch; equal signatures make `concat` a plain concatenation (no repeated tokens)."""
        first, *rest = [sample.conditions for sample in samples]
        return {name: _cloned(cond.concat([other[name] for other in rest]), self.device) for name, cond in first.items()}

    def denoise(self, x: Tensor, sigma: Tensor, conditions: dict) -> Tensor:
        """The model's x0, fp32."""
        options = self._options | {"cond_or_uncond": [0], "uuids": [self.patcher.patches_uuid], "sigmas": sigma,
                                   "optimized_attention_override": _fused_attention}
        return self.model.apply_model(x, sigma, transformer_options=options, **conditions)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Weights loaded, inference mode left, kernels with gradients; everything as before afterwards. One at a time: others wait."""
        with self._alone(), torch.inference_mode(False), torch.enable_grad(), training_kernels():
            comfy.model_management.load_models_gpu([self.patcher], memory_required=1e20, force_full_load=True)
            self.patcher.pre_run()
            try:
                with _normal_tensors(self.model, set(map(id, self._layers.values()))):
                    yield
            finally:
                self.patcher.cleanup()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # every clone of a model has the same layers, and the host's switch for training is one for the whole program
        while not _SESSION.acquire(timeout=0.2):
            self.check_interrupt()
        try:
            yield
        finally:
            _SESSION.release()

    def check_interrupt(self) -> None:
        """Raises the host's InterruptProcessingException."""
        comfy.model_management.throw_exception_if_processing_interrupted()

    def family(self) -> str:
        """See `family_of`."""
        return family_of(self.model)

    def fingerprint(self) -> str:
        """Identity of the base model's weights; quantised ones, whose values are packed, are left out."""
        plain = (nn.Parameter, Tensor)
        return fingerprint({key: module.weight for key, module in self._layers.items() if type(module.weight) in plain})


def _fused_attention(attention, *args, **kwargs) -> Tensor:
    # torch's own has a gradient on every device and keeps no score matrix for it; the host, or a node, may have chosen one
    # that has none (Sage), or that keeps all scores (the host's default on the CPU)
    return attention_pytorch(*args, **kwargs)


def layers_of(model) -> dict[str, nn.Module]:
    """Target key -> linear layer or convolution of a host model's denoiser."""
    return {f"diffusion_model.{name}.weight": module for name, module in model.diffusion_model.named_modules() if _is_layer(module)}


def family_of(model) -> str:
    """Which names files of this host model carry; see `trilora_ops.naming`."""
    if isinstance(model, comfy.model_base.SDXL):
        return "sdxl"
    known = {"sd2": comfy.supported_models.SD20, "sd1": comfy.supported_models.SD15}
    return next((name for name, config in known.items() if isinstance(model.model_config, config)), "generic")


def prediction_of(sampling) -> str:
    """"eps", "v" or "flow", from the host's model sampling. Raises TriLoRAError for other kinds."""
    # the order matters: the host's classes inherit from each other
    for kind, prediction in (("IMG_TO_IMG_FLOW", ""), ("IMG_TO_IMG", ""), ("COSMOS_RFLOW", ""), ("V_PREDICTION_DDPM", ""),
                             ("X0", ""), ("V_PREDICTION", "v"), ("CONST", "flow"), ("EPS", "eps")):
        if isinstance(sampling, getattr(comfy.model_sampling, kind, ())):
            if prediction:
                return prediction
            raise TriLoRAError(f"model: its prediction type {kind} cannot be trained yet; use an eps, v or flow model")
    raise TriLoRAError(f"model: its sampling {type(sampling).__name__} is of no known prediction type; use an eps, v or flow model")


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return True
    if getattr(module, "pre_quant_scale", None) is not None:  # it scales its input too, which a backward pass would need
        return False
    return hasattr(module, "in_features") and hasattr(module, "out_features") and getattr(module, "weight", None) is not None


def _blocks(module: nn.Module, name: str) -> Iterator[nn.Module]:
    for child_name, child in module.named_children():
        member = isinstance(module, nn.ModuleList) and name in _BLOCK_LISTS
        if member or isinstance(child, (ResBlock, SpatialTransformer)):
            yield child
        else:
            yield from _blocks(child, child_name)


def _cloned(value, device=None):
    """Tensors anywhere in `value` as normal ones (the encoders' are inference tensors), on `device` where given."""
    if isinstance(value, Tensor):
        return value.detach().clone().to(device or value.device)
    if isinstance(value, dict):
        return {k: _cloned(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cloned(v, device) for v in value)
    return value


def _signature(value) -> Hashable:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(_signature(v) for v in value)
    return repr(value)


@contextmanager
def _normal_tensors(model: nn.Module, layers: set[int]) -> Iterator[None]:
    """Stand-ins for parameters and buffers made in inference mode, which autograd refuses to keep; no base weight asks for a gradient.

    Linear layers and convolutions are left out: their backward pass keeps no weight (`training.frozen`), and a copy
    of theirs would be a second model.
    """
    replaced = []
    asking = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        for module in model.modules():
            if id(module) in layers and can_freeze(module):
                continue
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None and tensor.is_inference() and (copy := normal_copy(tensor)) is not None:
                        replaced.append((store, name, tensor))
                        store[name] = nn.Parameter(copy, requires_grad=False) if store is module._parameters else copy
        yield
    finally:
        for store, name, tensor in replaced:
            store[name] = tensor
        with torch.inference_mode():  # 0.3.64's weights ask for gradients and are inference tensors: only here may they do so
            for parameter in asking:
                parameter.requires_grad_(True)

