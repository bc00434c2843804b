"""Files of peft whose start or pruning needs more than a configuration: data, gradients, a first copy, steps."""

from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from comfyui_trilora.tests.host.compatibility.outcomes import NotWritten, Row
from comfyui_trilora.tests.host.compatibility.peft_rows import CONV, LINEAR, WRITER, change, moved, save, twin
from peft.tuners.lora.config import CordaConfig, LoraGAConfig


def rows() -> Iterator[Row]:
    """One for each of the functions below."""
    for name, write in _WRITERS.items():
        kind, _, options = name.partition(", ")
        yield Row(WRITER, kind, options, _row(write))


def _row(write: Callable) -> Callable[[Path], tuple]:
    def run(folder: Path) -> tuple:
        try:
            model, options = write(folder)
        except ValueError as why:  # LoftQ needs bitsandbytes
            raise NotWritten(str(why)) from why
        path = save(model, folder, **options)
        if options:  # what is saved is another adapter than the one in memory
            model = peft.PeftModel.from_pretrained(twin().fresh(), folder)
        return path, twin().patcher, change(model.merge_and_unload())

    return run


def _config(**fields) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(LINEAR), **fields})


def _loss(unet) -> torch.Tensor:
    """The size of what the U-Net predicts for fixed noise."""
    noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    return unet(noise, torch.tensor([500]), torch.randn((1, 7, 64), generator=torch.Generator().manual_seed(2))).sample.square().mean()


def _eva(folder: Path):
    """Directions of the inputs, as many for each layer as its data ask for, here 2, 3 and 5 with alphas in proportion."""
    model = peft.get_peft_model(twin().fresh(), _config(init_lora_weights="eva", eva_config=peft.EvaConfig()))
    sizes = dict(zip(LINEAR, (2, 3, 5), strict=True))
    directions = {f"base_model.model.{name}": torch.linalg.qr(torch.randn(twin().state[f"{name}.weight"].shape[1], rank))[0].T for name, rank in sizes.items()}
    peft.initialize_lora_eva_weights(model, eva_state_dict=directions)
    return moved(model), {}


def _corda(folder: Path):
    from peft.tuners.lora.corda import preprocess_corda

    unet, config = twin().fresh(), _config(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    preprocess_corda(unet, config, run_model=lambda: _loss(unet))
    return moved(peft.get_peft_model(unet, config)), {}


def _lora_ga(folder: Path):
    from peft.tuners.lora.loraga import preprocess_loraga

    unet, config = twin().fresh(), _config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(unet, config, lambda: _loss(unet).backward())
    return moved(peft.get_peft_model(unet, config)), {}


def _loftq(folder: Path):
    config = _config(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    return moved(peft.get_peft_model(twin().fresh(), config)), {}


def _converted(start: str, **fields):
    def write(folder: Path):
        """Saved with the first state beside it, which peft then takes out again: twice the rank, and plain LoRA."""
        model = peft.get_peft_model(twin().fresh(), _config(init_lora_weights=start, **fields))
        first = folder / "first"
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(first)
        model.peft_config["default"].init_lora_weights = start
        return moved(model), {"path_initial_model_for_weight_conversion": str(first)}

    return write


def _pruned(folder: Path):
    """AdaLoRA after its budget has fallen: layers of different ranks, all with the scale of the first."""
    config = peft.AdaLoraConfig(init_r=6, target_r=2, tinit=1, tfinal=1, total_step=6, lora_alpha=5, target_modules=[*LINEAR, *CONV[2:]])
    model = moved(peft.get_peft_model(twin().fresh(), config))
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    for step in range(6):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        model.base_model.update_and_allocate(step)
    ranks = {sum(kept) for kept in model.peft_config["default"].rank_pattern.values()}
    assert len(ranks) > 1 and max(ranks) < 6
    return model, {}


_WRITERS = {
    "LORA, init_lora_weights=eva": _eva, "LORA, init_lora_weights=corda": _corda, "LORA, init_lora_weights=lora_ga": _lora_ga,
    "LORA, init_lora_weights=loftq": _loftq, "LORA, pissa converted to plain LoRA": _converted("pissa"),
    "LORA, olora converted to plain LoRA, use_rslora": _converted("olora", use_rslora=True), "ADALORA, pruned": _pruned,
}  # fmt: skip
