"""The training engine: plain PyTorch, handed a `Host`; knows no ComfyUI."""
