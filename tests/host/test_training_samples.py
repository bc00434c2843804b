"""What one image becomes before the loop sees it, and that a batch of images is worth its images one by one."""

import comfy.conds
import comfy.model_base
import comfy.supported_models
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import distance, random_dataset

ADM = 1280 + 6 * 256  # SDXL's pooled text and six embedded sizes


def sdxl_model() -> tiny_models.TinyModel:
    """An SDXL-like U-Net of 64 and 128 channels, which is told the image's size."""
    unet_config = {
        "image_size": 32, "use_checkpoint": False, "use_spatial_transformer": True, "legacy": False, "num_classes": "sequential",
        "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2], "num_res_blocks": [1, 1],
        "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1], "transformer_depth_middle": 1,
        "context_dim": 64, "use_linear_in_transformer": True, "adm_in_channels": ADM, "use_temporal_attention": False,
    }  # fmt: skip
    with torch.inference_mode():
        config = comfy.supported_models.SDXL(unet_config)
        config.unet_config["num_head_channels"] = 32
        config.set_inference_dtype(torch.float32, None)
        model = comfy.model_base.SDXL(config, device=torch.device("cpu"))
        tiny_models.initialise(model.diffusion_model, 4)
        pooled = torch.randn((1, 1280), generator=torch.Generator().manual_seed(4))
        return tiny_models.TinyModel(
            tiny_models.as_patcher(model), (1, 4, 16, 16), tiny_models.random_conditioning((1, 77, 64), 4, pooled_output=pooled)
        )


MODELS = {"v": tiny_models.v_prediction_model, "flow": tiny_models.flow_model, "flux": tiny_models.flux_model, "sdxl": sdxl_model}


@pytest.fixture(scope="module", params=MODELS)
def tiny(request):
    return MODELS[request.param]()


@pytest.fixture
def types(pack_module):
    return pack_module("nodes.types")


@pytest.fixture
def trainee(pack_module, tiny):
    return pack_module("nodes.comfy_host").ComfyHost(tiny.patcher)


def prepared(host, dataset) -> list:
    return [host.prepare(image, image.conditioning) for image in dataset.images]


def test_latents_are_in_the_models_own_scale(trainee, tiny, types):
    """x0 = process_latent_in(latent); without it the loss sees latents several times too large."""
    dataset = random_dataset(types, tiny)
    with trainee.session():
        for image, sample in zip(dataset.images, prepared(trainee, dataset), strict=True):
            expected = tiny.patcher.model.process_latent_in(image.latent)
            assert torch.equal(sample.x0, expected) and sample.x0.dtype == torch.float32
            assert distance(sample.x0, image.latent) > 0.05
            assert not sample.x0.is_inference()


def test_noise_follows_the_models_own_schedule(trainee, tiny, types):
    """add_noise = noise_scaling of the trainee for each level of a batch, and writes to none of its arguments."""
    sampling = tiny.patcher.model.model_sampling
    x0, noise = torch.randn(3, *tiny.latent_shape[1:]), torch.randn(3, *tiny.latent_shape[1:])
    kept = x0.clone(), noise.clone()
    sigma = trainee.sigma(torch.tensor([0.02, 0.5, 0.98]))
    assert torch.all(sigma[1:] > sigma[:-1])
    assert [float(s) for s in sigma] == pytest.approx([float(sampling.percent_to_sigma(p)) for p in (0.98, 0.5, 0.02)])
    noisy = trainee.add_noise(x0, noise, sigma)
    for i in range(3):
        alone = sampling.noise_scaling(sigma[i : i + 1], noise[i : i + 1].clone(), x0[i : i + 1].clone(), False)
        torch.testing.assert_close(noisy[i : i + 1], alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(x0, kept[0]) and torch.equal(noise, kept[1])


def test_a_batch_denoises_as_its_members_do(trainee, tiny, types):
    """Four images with captions and noise levels of their own, in one pass and one by one."""
    with trainee.session(), torch.no_grad():
        samples = prepared(trainee, random_dataset(types, tiny, count=4))
        assert len({sample.signature for sample in samples}) == 1
        x = torch.cat([sample.x0 for sample in samples]) + torch.randn(4, *tiny.latent_shape[1:])
        sigma = trainee.sigma(torch.tensor([0.2, 0.4, 0.6, 0.9]))
        together = trainee.denoise(x, sigma, trainee.collate(samples))
        for i, sample in enumerate(samples):
            alone = trainee.denoise(x[i : i + 1], sigma[i : i + 1], trainee.collate([sample]))
            assert distance(together[i : i + 1], alone) <= 1e-5
            other = trainee.denoise(x[i : i + 1], sigma[i : i + 1], trainee.collate([samples[i - 1]]))
            assert distance(other, alone) > 1e-3, "the captions make no difference: the test would miss a mixed-up batch"


def test_the_loss_of_a_step_is_the_mean_over_its_images(trainee, tiny, types, pack_module):
    """Sizes, caption lengths and dropped captions mixed: loss and gradient = the mean of the single ones."""
    loop, objective = pack_module("training.loop"), pack_module("training.objective")
    lora = pack_module("trilora_ops.residuals.lora").LoraConfig(rank=2)
    method = pack_module("trilora_ops.registry").Method(lora)
    _, _, height, width = tiny.latent_shape
    dataset = random_dataset(types, tiny, 6, sizes=((height, width), (height, width), (height, width // 2)), tokens=(77, 77, 154))
    config = pack_module("training.config").TrainingConfig(
        steps=1, batch_size=2, accumulation=3, learning_rate=1e-9, caption_dropout=0.4, grad_clip=0.0
    )
    seen, collate, denoise = [], trainee.collate, trainee.denoise
    with trainee.session():
        adapters = pack_module("training.plan").build_adapters(trainee, method, "attention", seed=6)
        for adapter in adapters.values():
            adapter.residual.up.data.normal_(0.0, 0.05)
        samples, empty = prepared(trainee, dataset), [trainee.prepare(image, dataset.empty) for image in dataset.images]
        start = [p.detach().clone() for a in adapters.values() for p in a.parameters()]
        trainee.collate = lambda members: (seen.append([members]), collate(members))[1]
        trainee.denoise = lambda x, sigma, conditions: (seen[-1].extend((x, sigma)), denoise(x, sigma, conditions))[1]
        progress = loop.train(trainee, adapters, samples, empty, config)
        for parameter, value in zip([p for a in adapters.values() for p in a.parameters()], start, strict=True):
            parameter.data.copy_(value)
        # the last six: Flux begins anew with copies of its activations
        singles = [(m, x[i : i + 1], sigma[i : i + 1]) for members, x, sigma in seen for i, m in enumerate(members)][-6:]
        total = torch.zeros(())
        with pack_module("training.inject").injected(trainee, adapters, clone_saved=progress.cloning):
            for sample, x, sigma in singles:
                weight = objective.loss_weight(trainee.prediction, sigma, trainee.sigma_data, config.min_snr_gamma)
                total = total + objective.x0_loss(denoise(x, sigma, collate([sample])), sample.x0, weight).sum() / 6
            total.backward()
    assert len({sample.signature for sample, _, _ in singles}) >= 2 and any(len(members) == 2 for members, _, _ in seen)
    assert progress.losses[0] == pytest.approx(float(total.detach()), rel=1e-5)
    norm = torch.cat([p.grad.flatten() for a in adapters.values() for p in a.parameters()]).norm()
    assert progress.grad_norm == pytest.approx(float(norm), rel=1e-4)


def test_sdxl_is_told_each_images_own_size(pack_module, types):
    """The size conditions are those of this image, not of the first or the largest."""
    tiny = sdxl_model()
    host = pack_module("nodes.comfy_host").ComfyHost(tiny.patcher)
    dataset = random_dataset(types, tiny, 2, sizes=((16, 16), (8, 24)))
    pooled = tiny.conditioning[0][1]["pooled_output"]
    with host.session():
        samples = prepared(host, dataset)
    for sample, (height, width) in zip(samples, ((128, 128), (64, 192)), strict=True):
        with torch.inference_mode():
            expected = tiny.patcher.model.encode_adm(height=height, width=width, pooled_output=pooled, device="cpu")
        assert torch.allclose(sample.conditions["y"].cond, expected)
    assert not torch.equal(samples[0].conditions["y"].cond, samples[1].conditions["y"].cond)


def test_guidance_is_one_unless_the_dataset_says_otherwise(pack_module, types):
    """Guidance-distilled models are trained at 1; a FluxGuidance in the dataset's conditioning is respected."""
    tiny = tiny_models.flux_model()
    host = pack_module("nodes.comfy_host").ComfyHost(tiny.patcher)
    (image,) = random_dataset(types, tiny, 1).images
    with host.session():
        plain = host.prepare(image, image.conditioning)
        own = host.prepare(image, [[image.conditioning[0][0], {**image.conditioning[0][1], "guidance": 4.0}]])
    assert isinstance(plain.conditions["guidance"], comfy.conds.CONDRegular)
    assert float(plain.conditions["guidance"].cond) == 1.0 and float(own.conditions["guidance"].cond) == 4.0
    assert "guidance" not in image.conditioning[0][1], "the dataset's own conditioning was written to"
