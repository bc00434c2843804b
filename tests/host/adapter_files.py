"""Adapter files of every kind that people have, for one linear layer and one convolution of the tiny U-Net.

LyCORIS' kinds are written by LyCORIS itself, around a copy of the model's own layers. Knows nothing of pytest.
"""

import comfy.utils
import torch
from torch import nn

LINEAR = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
CONV = "diffusion_model.middle_block.0.in_layers.2"
KEYS = (f"{LINEAR}.weight", f"{CONV}.weight")
# kind -> what LyCORIS calls it, and its options; LoKr with a Tucker core is missing, because core fails to merge it
LYCORIS = {
    "locon": ("lora", {}), "tucker": ("lora", {"use_tucker": True}), "dora": ("lora", {"dora_wd": True}), "loha": ("loha", {}),
    "loha-tucker": ("loha", {"use_tucker": True}), "lokr": ("lokr", {"factor": 8}), "oft": ("diag-oft", {}), "boft": ("boft", {}),
    "glora": ("glora", {}), "full": ("full", {}),
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low_rank(name: str, out: int, inp: int, rank: int = 3, kernel: tuple[int, ...] = (), seed: int = 0) -> dict[str, torch.Tensor]:
    """One plain layer under kohya's endings, alpha = rank / 2."""
    return {f"{name}.lora_up.weight": 0.1 * normal(out, rank, *(1 for _ in kernel), seed=seed),
            f"{name}.lora_down.weight": 0.1 * normal(rank, inp, *kernel, seed=seed + 1), f"{name}.alpha": torch.tensor(rank / 2)}  # fmt: skip


def layer_of(patcher, name: str) -> nn.Module:
    """A linear layer or a 3 x 3 convolution with the shape and the weight of the model's layer of this name, in fp32."""
    weight = comfy.utils.get_attr(patcher.model, f"{name}.weight").detach().float()
    out, inp, *kernel = weight.shape
    module = nn.Conv2d(inp, out, tuple(kernel), padding=1) if kernel else nn.Linear(inp, out)
    with torch.no_grad():
        module.weight.copy_(weight)
    return module


def lycoris(patcher, kind: str, seed: int = 0, names: tuple[str, ...] = (LINEAR, CONV), **more) -> dict[str, torch.Tensor]:
    """A file of LyCORIS for some layers, every tensor moved away from its start. more: options beside those of the kind."""
    import lycoris as library

    layers = nn.Module()
    for number, name in enumerate(names):
        layers.add_module(f"layer{number}", layer_of(patcher, name))
    algorithm, options = LYCORIS[kind]
    library.LycorisNetwork.apply_preset({"target_name": ["layer.*"], "target_module": []})
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = library.create_lycoris(layers, 1.0, linear_dim=4, linear_alpha=2.0, conv_dim=4, conv_alpha=2.0, algo=algorithm, **options, **more)
    finally:
        library.LycorisNetwork.apply_preset({})
    network.apply_to()
    size = 0.3 if kind.startswith(("loha", "lokr")) else 0.02 if kind == "full" else 0.1
    state = network.state_dict()
    moved = {k: v.detach() + size * normal(*v.shape, seed=seed) if v.ndim else v.detach() for k, v in state.items()}
    heads = {f"lycoris_layer{number}": name for number, name in enumerate(names)}
    return {heads[head] + dot + end: v.float().contiguous() for k, v in moved.items() for head, dot, end in [k.partition(".")]}


def transform(patcher, registry, seed: int = 0, names: tuple[str, ...] = (LINEAR, CONV)) -> dict[str, torch.Tensor]:
    """A TLoRA of this pack (tensor rings for T and R) on some layers, every core moved."""
    method, tensors = registry.Method(registry.RESIDUALS["tensor_ring"](rank=2), registry.TRANSFORMS["tensor_ring"](2)), {}
    for name in names:
        module = layer_of(patcher, name)
        adapter = method.build(module, module.weight.detach().clone(), torch.Generator().manual_seed(seed))
        for parameter in adapter.parameters():
            parameter.data += 0.05 * normal(*parameter.shape, seed=seed)
        for part in ("transform", "residual"):
            tensors |= {f"{name}.{part}.{key}": tensor.detach().clone() for key, tensor in getattr(adapter, part).tensors().items()}
    return tensors


def every_kind(patcher, registry, checkpoint) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, str] | None]]:
    """Kind -> (tensors, metadata): LoRA, TriLoRA, TLoRA, norms and biases, and LyCORIS' kinds."""
    plain = low_rank(LINEAR, 128, 128, seed=1) | low_rank(CONV, 128, 128, rank=2, kernel=(3, 3), seed=1)
    trilora = checkpoint.canonical_state(checkpoint.AdapterState(low_rank(LINEAR, 128, 128, seed=2) | low_rank(CONV, 128, 128, kernel=(3, 3), seed=2)))
    files = {
        "lora": ({key: tensor.half() for key, tensor in plain.items()}, None),
        "trilora": (dict(trilora), trilora.metadata),
        "tlora": (transform(patcher, registry), None),
        "norms and biases": ({f"{LINEAR.rsplit('.', 2)[0]}.norm1.diff": 0.1 * normal(128), f"{CONV}.diff_b": 0.1 * normal(128, seed=1)}, None),
    }
    return files | {kind: (lycoris(patcher, kind, seed), None) for seed, kind in enumerate(LYCORIS)}
