"""U-Net files as PEFT and diffusers write them today, for every loader of the host: its own reads them in part only."""

from __future__ import annotations

from comfy.weight_adapter import LoRAAdapter

from ..trilora_ops.naming import peft_spellings


class DiffusersLoRA(LoRAAdapter):
    """Finds a low-rank layer under the names of `peft_spellings` where the host looks for `unet.X.attn1.processor.to_q`.

    Without it the host loads such a file's other layers and leaves the attention out. What it finds is the host's own
    LoRAAdapter.
    """

    name = "trilora_diffusers"

    @classmethod
    def load(cls, x, lora, alpha, dora_scale, loaded_keys=None):
        """The layer that the host calls `x`, or None where the file has none under another spelling."""
        for name in peft_spellings(x):
            value = lora.get(f"{name}.alpha")
            found = LoRAAdapter.load(name, lora, None if value is None else value.item(), lora.get(f"{name}.dora_scale"), loaded_keys)
            if found is not None:
                found.loaded_keys.update(key for key in (f"{name}.alpha", f"{name}.dora_scale") if key in lora)
                return found
        return None
