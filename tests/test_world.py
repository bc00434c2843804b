"""The small world: drawings, text, autoencoder, U-Net layout, bundled weights, sampling."""

import re

import numpy as np
import pytest
import torch
from comfyui_trilora.benchmarks.world import autoencoder, diffusion, scenes, text
from comfyui_trilora.benchmarks.world.unet import WORLD_UNET, UNet
from comfyui_trilora.benchmarks.world.world import UNET_PREFIX, WEIGHTS, World, picture_grid, to_tensor

SCENE = scenes.Scene("circle", "red", "striped", "green", "top left")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The model is too small to share among threads, which only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world():
    return World.load()


@pytest.fixture(scope="module")
def drawn():
    pairs = scenes.draw_set(24, seed=11)
    return to_tensor([picture for picture, _ in pairs]), [scene for _, scene in pairs]


def test_scenes_and_captions_are_a_function_of_the_seed():
    first, again = scenes.draw_set(8, seed=3), scenes.draw_set(8, seed=3)
    other = scenes.draw_set(8, seed=4)
    assert [s for _, s in first] == [s for _, s in again] != [s for _, s in other]
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(first, again, strict=True))
    assert all(p.shape == (32, 32, 3) and p.dtype == np.uint8 for p, _ in first)


def test_drawings_do_not_drift():
    # The weights were trained on exactly this picture: its colours, its stripes, its place.
    picture = scenes.draw(SCENE)
    green, red, dark_red = (25.5, 165.75, 51), (229.5, 25.5, 30.6), (91.8, 10.2, 12.24)
    for row, column in ((0, 0), (31, 31), (16, 24)):
        assert np.abs(picture[row, column] - green).max() <= 0.5
    for stripe in (red, dark_red):
        assert np.abs(picture[4:16, 10] - stripe).max(axis=1).min() <= 0.5
    coverage = np.abs(picture - green).max(axis=2) > 1
    rows, columns = np.nonzero(coverage)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 17, 1, 17)


def test_caption_grammar():
    assert scenes.caption(SCENE) == "a striped red circle on a green background, top left"
    plain = scenes.Scene("star", "orange", "solid", "sky", "centre")
    assert scenes.caption(plain) == "an orange star on a sky background, centre"
    assert scenes.caption(plain, "neon", position=False) == ("an orange star on a sky background, in neon style")


@pytest.mark.parametrize("style", scenes.STYLES)
def test_a_style_changes_the_picture_plainly(style, drawn):
    for scene in drawn[1][:6]:
        difference = scenes.draw(scene, style).astype(float) - scenes.draw(scene)
        assert np.abs(difference).mean() / 255 > 0.05


def test_scene_errors_name_the_field():
    with pytest.raises(ValueError, match="scene shape 'blob'"):
        scenes.Scene("blob", "red", "solid", "green", "centre")
    with pytest.raises(ValueError, match="scene background 'red'"):
        scenes.Scene("ring", "red", "solid", "red", "centre")
    with pytest.raises(ValueError, match="style 'pop'"):
        scenes.draw(SCENE, "pop")


def test_larger_pictures_show_the_same_scene():
    small, large = scenes.draw(SCENE), scenes.draw(SCENE, image_size=64)
    shrunk = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 4


def test_tokenizer_knows_every_caption_word_and_spares_the_others():
    rng = np.random.default_rng(0)
    for _ in range(50):
        words = re.findall(r"\w+", scenes.caption(scenes.random_scene(rng), style="red"))
        assert all(text.word_id(word) <= len(text.WORDS) for word in words)
        assert len(words) <= text.CONTEXT_LENGTH
    spare = {text.word_id(word) for word in scenes.STYLES}
    assert len(spare) == len(scenes.STYLES) and min(spare) > len(text.WORDS)
    assert text.word_id("neon") == 58  # the same on every machine
    assert text.tokenize(["", "Red, CENTER"]).shape == (2, 16)
    assert torch.equal(text.tokenize(["Red, CENTER"]), text.tokenize(["red centre"]))
    with pytest.raises(TypeError, match="list of strings"):
        text.tokenize("red")


def test_autoencoder_is_exact_and_about_unit_variance(drawn):
    images = drawn[0]
    latents = autoencoder.encode(images)
    assert latents.shape == (24, 12, 16, 16)
    assert torch.allclose(autoencoder.decode(latents), images, atol=1e-6)
    noise = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(autoencoder.encode(autoencoder.decode(noise)), noise, atol=1e-5)
    assert 0.8 < latents[:, :3].std() < 1.25
    with pytest.raises(ValueError, match="even"):
        autoencoder.encode(torch.zeros(1, 3, 31, 32))


def test_unet_has_sd15_layout():
    unet = UNet(**WORLD_UNET)
    keys = set(unet.state_dict())
    assert len(unet.input_blocks) == len(unet.output_blocks) == 12
    for key in (
        "time_embed.0.weight",
        "time_embed.2.bias",
        "input_blocks.0.0.weight",
        "input_blocks.1.0.in_layers.2.weight",
        "input_blocks.1.0.emb_layers.1.weight",
        "input_blocks.1.0.out_layers.3.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight",
        "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias",
        "input_blocks.8.1.transformer_blocks.0.ff.net.0.proj.weight",
        "middle_block.1.proj_in.weight",
        "middle_block.2.out_layers.0.weight",
        "output_blocks.0.0.skip_connection.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.proj_out.bias",
        "out.0.weight",
        "out.2.bias",
    ):
        assert key in keys, key
    assert unet.input_blocks[1][1].proj_in.weight.shape == (32, 32, 1, 1)
    with_text = {key.split(".transformer_blocks")[0] for key in keys if "attn2.to_k" in key}
    assert with_text == {f"input_blocks.{i}.1" for i in (1, 2, 4, 5, 7, 8)} | {"middle_block.1"} | {
        f"output_blocks.{i}.1" for i in range(3, 12)
    }
    with pytest.raises(ValueError, match="multiple of 32"):
        UNet(**{**WORLD_UNET, "model_channels": 48})


def test_schedule_is_sds():
    sigmas = diffusion.SIGMAS
    assert sigmas.shape == (1000,)
    assert abs(sigmas[0] - 0.0292) < 1e-4 and abs(sigmas[-1] - 14.6146) < 1e-3
    steps = torch.tensor([0, 17, 500, 999])
    assert torch.equal(diffusion.sigma_to_timestep(sigmas[steps]), steps)
    assert torch.allclose(diffusion.timestep_to_sigma(steps.float()), sigmas[steps])
    assert diffusion.sampling_sigmas(20).shape == (21,)


def test_v_prediction_recovers_x0_from_the_true_v():
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 12, 4, 4, generator=generator)
    sigma = torch.tensor([0.05, 0.5, 2.0, 14.0])
    s = sigma[:, None, None, None]
    v = (noise - s * x0) / (s**2 + 1).sqrt()
    x_t = diffusion.add_noise(x0, noise, sigma)
    assert torch.allclose(diffusion.x0_from_v(x_t, v, sigma), x0, atol=1e-4)


def test_weights_are_small_and_half():
    from safetensors import safe_open

    assert WEIGHTS.stat().st_size <= 4 * 2**20
    with safe_open(WEIGHTS, framework="pt") as file:
        keys = list(file.keys())
        assert all(file.get_slice(key).get_dtype() == "F16" for key in keys)
    assert {key.removeprefix(UNET_PREFIX) for key in keys if key.startswith(UNET_PREFIX)} == set(
        UNet(**WORLD_UNET).state_dict()
    )


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        World.load(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not this model's"):
        World.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("sigma, share", [(0.3, 0.5), (1.0, 0.3), (4.0, 0.1)])
def test_denoise_removes_most_of_the_noise(world, drawn, sigma, share):
    images, drawn_scenes = drawn
    x0 = autoencoder.encode(images)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    x_t = diffusion.add_noise(x0, noise, torch.full((len(x0),), sigma))
    with torch.no_grad():
        context = world.encode_text([scenes.caption(scene) for scene in drawn_scenes])
        error = (world.denoise(x_t, sigma, context) - x0).square().mean().sqrt()
    assert error < share * sigma


def test_the_caption_helps(world, drawn):
    images, drawn_scenes = drawn
    x0 = autoencoder.encode(images)
    sigma = torch.full((len(x0),), 5.0)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    captions = [scenes.caption(scene) for scene in drawn_scenes]
    with torch.no_grad():
        right, wrong = (
            (world.denoise(diffusion.add_noise(x0, noise, sigma), sigma, world.encode_text(c)) - x0).square().mean()
            for c in (captions, captions[1:] + captions[:1])
        )
    assert right < 0.6 * wrong


def test_samples_follow_the_seed_and_the_prompt(world):
    prompts = ["a red circle on a blue background, centre", "a green square on a white background"]
    first = world.sample(prompts, seed=5, steps=3)
    assert first.shape == (2, 3, 32, 32) and 0 <= first.min() and first.max() <= 1
    assert torch.equal(first, world.sample(prompts, seed=5, steps=3))
    assert not torch.allclose(first, world.sample(prompts, seed=6, steps=3), atol=0.05)
    swapped = world.sample(prompts[::-1], seed=5, steps=3)
    assert (first - swapped).abs().mean() > 0.1
    # A picture's noise is its own, whatever the batch.
    alone = world.sample(prompts[1:], seed=6, steps=3)
    assert torch.allclose(alone[0], first[1], atol=1e-3)
    with pytest.raises(ValueError, match="size = 31"):
        world.sample(prompts, size=31)


def test_samples_have_the_colours_asked_for(world):
    prompts = ["a red circle on a blue background, centre", "a yellow square on a black background, centre"]
    images = world.sample(prompts, seed=1, steps=8)
    middle, corner = images[:, :, 13:19, 13:19].mean((2, 3)), images[:, :, :3, :3].mean((2, 3))
    for got, name in zip(middle, ("red", "yellow"), strict=True):
        assert (got - torch.tensor(scenes.COLOURS[name])).abs().max() < 0.25
    for got, name in zip(corner, ("blue", "black"), strict=True):
        assert (got - torch.tensor(scenes.BACKGROUNDS[name][0])).abs().max() < 0.25


def test_picture_grid_places_pictures_row_by_row():
    images = torch.stack([torch.full((3, 4, 4), v) for v in (0.0, 0.2, 0.4)])
    grid = picture_grid(images, columns=2, scale=1, gap=1)
    assert grid.shape == (9, 9, 3)
    assert grid[0, 0, 0] == 0 and grid[0, 5, 0] == 51 and grid[5, 0, 0] == 102
