"""The small world: captioned drawings and a small SD1.x-shaped diffusion model of them.

* ``scenes``: what is drawn, and its caption; the styles and the character held out from pretraining.
* ``text``: tokenizer and text encoder.
* ``autoencoder``: the fixed, lossless image <-> latent map.
* ``unet``: Stable Diffusion 1.x's U-Net, parameter name for parameter name, on ``attention``.
* ``diffusion``: noise schedule, v-prediction, Euler sampler.
* ``world``: the pretrained model, ``World.load()``.
* ``pretrain``: the script that made ``world.safetensors``.
* ``prior``: what an adapter makes the world forget, by the weight of a regularisation set.
* ``blockwise``: a character and a style, combined: which blocks the style is trained, or applied, in.
"""
