"""A run that is of no use says so on the node and in the report, in words and with what to change; one that cannot be, at once."""

import dataclasses

import comfy.hooks
import pytest
import torch
from comfyui_trilora.tests.host import tiny_models
from comfyui_trilora.tests.host.tiny_run import random_dataset, run_node

NAN = float("nan")


@pytest.fixture(scope="module")
def model(host_nodes):
    return tiny_models.flow_model()


@pytest.fixture
def train(host_nodes, pack_module, model):
    """Function: settings and other inputs -> the report of Train Adapter."""

    def run(dataset=None, patcher=None, plan=None, target="attention", **settings) -> str:
        inputs = {} if plan is None else {"plan": plan}
        return run_node(
            host_nodes, "TriLoRATrainAdapter", model=patcher or model.patcher,
            dataset=dataset or random_dataset(pack_module("nodes.types"), model), target=target, **inputs,
            method=run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0],
            settings=run_node(host_nodes, "TriLoRATrainingSettings", **{"steps": 3, "schedule": "constant", "warmup": 0.0, **settings})[0],
        )[3]  # fmt: skip

    return run


def both(texts, report: str, words: str) -> str:
    """The one sentence that holds `words` and stands on the node when all is done, and in the report."""
    (line,) = [line for line in texts[-1].splitlines() if words in line]
    assert f"notice: {line}" in report.splitlines()
    return line


def test_a_run_without_doubts_says_nothing(train, texts):
    report = train(learning_rate=1e-4)
    assert "notice" not in report and "\n" not in texts[-1] and "loss on fixed noise" in texts[-1]


def test_a_run_that_made_it_worse_says_so(train, texts, pack_module, monkeypatch):
    """Each step goes uphill."""
    loop = pack_module("training.loop")
    real = loop.x0_loss
    monkeypatch.setattr(loop, "x0_loss", lambda *args: -losses if (losses := real(*args)).requires_grad else losses)
    line = both(texts, train(steps=12, learning_rate=0.01), "made it worse")
    assert "before" in line and "lower learning_rate (it was 0.01)" in line


def test_a_run_that_changed_next_to_nothing_says_so(train, texts):
    line = both(texts, train(learning_rate=1e-8, precision="model"), "next to nothing")
    assert "raise learning_rate (it was 1e-08)" in line


def test_an_adapter_that_did_not_move_says_so(train, texts, pack_module, monkeypatch):
    """Every gradient is zero, as below a kernel that loses it."""
    monkeypatch.setattr(pack_module("training.loop"), "x0_loss", lambda estimate, x0, weight: 0.0 * (estimate - x0).flatten(1).mean(1))
    line = both(texts, train(), "did not move")
    assert "none of its 7 layers changed" in line and "raise learning_rate" in line


def test_layers_that_never_moved_are_named_by_their_blocks(train, texts, model):
    """One block's output is cut off from the graph."""
    block = model.patcher.model.diffusion_model.joint_blocks[0].x_block.attn
    handle = block.register_forward_pre_hook(lambda module, args: tuple(a.detach() for a in args))
    forward = block.qkv.register_forward_hook(lambda module, args, output: output.detach())
    try:
        line = both(texts, train(), "never moved")
    finally:
        handle.remove()
        forward.remove()
    assert line.startswith("1 of 7 layers never moved: J00 (1)") and "Block Plan" in line


def test_many_skipped_steps_are_said(train, texts, pack_module, monkeypatch):
    """Every second step has no finite loss: never twenty in a row, and half of the run is lost."""
    loop, calls = pack_module("training.loop"), []
    real = loop.x0_loss

    def broken(*args):
        calls.append(1)
        losses = real(*args)
        return losses * NAN if losses.requires_grad and len(calls) % 2 else losses

    monkeypatch.setattr(loop, "x0_loss", broken)
    line = both(texts, train(steps=10), "were skipped")
    assert line.startswith("5 of 10 steps were skipped") and "lower learning_rate" in line


def test_a_plan_that_asks_for_what_is_not_there_says_so_on_the_node(train, texts, host_nodes):
    plan = run_node(host_nodes, "TriLoRABlockPlan", rank="J=2, TE1=2, EMB=4")[0]
    report = train(plan=plan)
    assert "text encoders are not trained" in both(texts, report, "text encoders")
    assert "has no layer in" in both(texts, report, "has no layer in")


def test_checkpointing_without_blocks_is_said_on_the_node(train, texts, pack_module, monkeypatch):
    monkeypatch.setattr(pack_module("nodes.comfy_host").ComfyHost, "blocks", lambda self: [])
    both(texts, train(checkpointing=True), "no blocks known to be recomputable")


def test_a_curve_that_cannot_be_drawn_is_said_on_the_node(train, texts, pack_module, monkeypatch):
    monkeypatch.setattr(pack_module("nodes.training_report"), "plot_loss", lambda *args: (_ for _ in ()).throw(ImportError("no numpy")))
    train()
    assert "the loss curve could not be drawn (no numpy)" in texts[-1]


def broken_latent(image):
    return dataclasses.replace(image, latent=torch.full_like(image.latent, NAN))


def broken_caption(image):
    text, options = image.conditioning[0]
    return dataclasses.replace(image, conditioning=[[torch.full_like(text, NAN), options]])


@pytest.mark.parametrize("break_image", [broken_latent, broken_caption])
@pytest.mark.parametrize("broken", [0, 11])
def test_values_that_are_not_finite_stop_the_run_at_once_and_name_the_image(train, texts, pack_module, model, error, break_image, broken):
    """Also an image that the first measurement, of eight draws, does not look at."""
    dataset = random_dataset(pack_module("nodes.types"), model, count=12)
    images = [break_image(image) if place == broken else image for place, image in enumerate(dataset.images)]
    with pytest.raises(error) as said:
        train(dataclasses.replace(dataset, images=tuple(images)))
    assert f"{broken}.png" in str(said.value) and "fp32" in str(said.value)
    assert not any(text.startswith("step") for text in texts)


def test_a_model_whose_first_loss_is_not_finite_stops_the_run_at_once(train, texts, pack_module, error, monkeypatch):
    monkeypatch.setattr(pack_module("training.loop"), "x0_loss", lambda estimate, x0, weight: (estimate - x0).flatten(1).mean(1) * NAN)
    with pytest.raises(error, match="not finite before the first step.*precision to bf16"):
        train()
    assert not any(text.startswith("step") for text in texts)


def without_images(dataset):
    return dataclasses.replace(dataset, images=())


def test_a_dataset_without_images_is_refused(train, pack_module, model, error):
    """A loop that draws from it would never end."""
    with pytest.raises(error, match="^dataset: it holds no images"):
        train(without_images(random_dataset(pack_module("nodes.types"), model)))


def test_a_regularisation_set_without_images_is_refused(host_nodes, pack_module, model, error):
    dataset = random_dataset(pack_module("nodes.types"), model)
    settings, method = run_node(host_nodes, "TriLoRATrainingSettings", steps=1)[0], run_node(host_nodes, "TriLoRAMethodLoRA", rank=2)[0]
    with pytest.raises(error, match="^regularisation: it holds no images"):
        run_node(host_nodes, "TriLoRATrainAdapter", model=model.patcher, dataset=dataset, regularisation=without_images(dataset), method=method,
                 settings=settings, target="attention")


def of_another_encoder(image):
    text, options = image.conditioning[0]
    return dataclasses.replace(image, conditioning=[[torch.cat([text, text], 2), options]])


def without_pooled(image):
    return dataclasses.replace(image, conditioning=[[image.conditioning[0][0], {}]])


def of_a_video(image):
    return dataclasses.replace(image, latent=image.latent[:, :, None])


def as_a_pair(image):
    return dataclasses.replace(image, latent=torch.cat([image.latent] * 2))


@pytest.mark.parametrize("change", [of_another_encoder, without_pooled, of_a_video, as_a_pair])
def test_a_dataset_encoded_for_another_model_says_so(train, pack_module, model, error, change):
    dataset = random_dataset(pack_module("nodes.types"), model)
    with pytest.raises(error, match="^dataset: this model cannot compute with its images and captions .* own VAE and text encoder"):
        train(dataclasses.replace(dataset, images=tuple(map(change, dataset.images))))


def test_what_of_the_captions_is_not_followed_is_said(train, texts, pack_module, model):
    """Hooks of a text encoder, and the several entries that its schedule makes."""
    dataset = random_dataset(pack_module("nodes.types"), model)

    def scheduled(image):
        text, options = image.conditioning[0]
        return dataclasses.replace(image, conditioning=[[text, {**options, "hooks": comfy.hooks.HookGroup()}], [text, dict(options)]])

    report = train(dataclasses.replace(dataset, images=tuple(map(scheduled, dataset.images))))
    both(texts, report, "carry hooks")
    both(texts, report, "the first of each is trained")


@pytest.mark.parametrize(("rate", "steps"), [(1e3, 12), (1e30, 25), (1e38, 1)])
def test_a_run_that_has_diverged_says_so_and_nothing_of_a_broken_file(train, texts, pack_module, monkeypatch, error, rate, steps):
    """The widget ends at 1; a schedule or a model that overflows gives the same values."""
    config = pack_module("training.config").TrainingConfig(steps=steps, learning_rate=rate, schedule="constant", warmup=0.0, grad_clip=0.0)
    monkeypatch.setattr(pack_module("nodes.train"), "TrainingConfig", lambda **others: config)
    with pytest.raises(error) as said:
        train()
    assert str(said.value).count("the training has diverged") == 1 and f"lower learning_rate (it was {rate:g})" in str(said.value)
    assert "file is broken" not in str(said.value) and "linalg" not in str(said.value) and "integer" not in str(said.value)
