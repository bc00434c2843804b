"""What a run leaves to read: the smoothed loss, its picture, the text, and the file's metadata."""

import json
import re

import numpy as np
import pytest
import torch
from comfyui_trilora.training.config import TrainingConfig
from comfyui_trilora.training.report import describe_run, moving_average, plot_loss
from comfyui_trilora.trilora_ops.metadata import describe, fingerprint

LOSSES = [1.0 / (1 + i / 10) + 0.1 * (i % 3) for i in range(60)]


def test_the_moving_average_is_the_mean_of_a_window():
    """Against numpy, for every window that fits; none before a window is full, and none at all where it never is."""
    for span in (1, 2, 7, 30, 60):
        expected = [np.mean(LOSSES[end - span:end]) for end in range(span, 61)]
        assert moving_average(LOSSES, span) == pytest.approx(expected)
    assert moving_average(LOSSES, 61) == [] == moving_average([], 10)


def colours(picture):
    return {tuple(color) for color in np.asarray(picture).reshape(-1, 3)}


@pytest.mark.parametrize("losses", [LOSSES, [0.5], [0.0, 0.0], [1e-9, 1e6]], ids=["many", "one", "zeros", "wide"])
def test_the_plot(losses):
    """960 x 540 RGB on white; the moving average's blue is in it where the run is long enough for one."""
    picture = plot_loss(losses, "a title")
    assert picture.size == (960, 540) and picture.mode == "RGB"
    pixels = np.asarray(picture)
    assert (pixels == 255).all(-1).mean() > 0.5 and (pixels != 255).any(-1).mean() > 0.005
    assert ((0x1F, 0x4E, 0x8C) in colours(picture)) == (len(losses) >= 20)


def test_the_loss_on_fixed_noise_is_drawn_where_given():
    orange = (0xD0, 0x66, 0x1F)
    assert orange in colours(plot_loss(LOSSES, fixed=(0.9, 0.4))) and orange not in colours(plot_loss(LOSSES))


def test_no_line_joins_the_two_losses_on_fixed_noise():
    """Two measurements are no trend: between the first and the last step nothing is drawn in their colour."""
    pixels = np.asarray(plot_loss([0.0] * 60, fixed=(0.9, 0.4)))
    orange = (pixels == (0xD0, 0x66, 0x1F)).all(-1)
    assert orange.any() and not orange[:, 400:560].any()


def test_the_loss_of_a_regularisation_set_is_drawn_where_there_is_one():
    green = (0x3A, 0x8F, 0x5C)
    assert green in colours(plot_loss(LOSSES, prior=LOSSES[::-1])) and green not in colours(plot_loss(LOSSES))


def test_the_text():
    assert describe_run({"method": "trilora", "skipped steps": 0}) == "method         trilora\nskipped steps  0"


def metadata(**changes):
    facts = {"method": "trilora", "form": "svd", "options": {"rank": 4, "alpha": 0.0}, "plan": {"a": 4, "b": 4}, "family": "sd1", "prediction": "eps", "base": "abc",
             "training": TrainingConfig().as_dict(), "trigger": "sks", "tag_frequency": {"cat": 2},
             "folders": {"3_cats": {"n_repeats": 3, "img_count": 2}, "dogs": {"n_repeats": 1, "img_count": 3}}, "steps_done": 7}
    return describe(**{**facts, **changes})


REQUIRED = ("modelspec.sai_model_spec", "modelspec.implementation", "modelspec.date", "modelspec.architecture", "modelspec.trigger_phrase",
            "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_base_model_version", "ss_learning_rate", "ss_steps", "ss_max_train_steps",
            "ss_seed", "ss_num_train_images", "ss_tag_frequency", "ss_optimizer", "ss_lr_scheduler", "trilora.format", "trilora.version",
            "trilora.form", "trilora.method", "trilora.plan", "trilora.options", "trilora.training", "trilora.trigger", "trilora.base_fingerprint")  # fmt: skip


def test_metadata():
    """All values are strings, as safetensors demands; what managers look for is there; JSON comes back as it went in."""
    found = metadata()
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in found.items())
    assert [key for key in REQUIRED if not found.get(key)] == []
    assert json.loads(found["trilora.plan"]) == {"a": 4, "b": 4} and json.loads(found["trilora.options"]) == {"rank": 4, "alpha": 0.0}
    assert TrainingConfig(**json.loads(found["trilora.training"])) == TrainingConfig()
    assert json.loads(found["ss_tag_frequency"]) == {"train": {"cat": 2}}
    assert found["ss_network_dim"] == "4" and found["ss_steps"] == "7" and found["ss_max_train_steps"] == "500" and found["ss_num_train_images"] == "9"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora" and found["modelspec.trigger_phrase"] == found["trilora.trigger"] == "sks"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["modelspec.date"])


def test_metadata_of_a_regularisation_set():
    """Images are counted with their repeats, as kohya's tools count them; without a set the same keys say so."""
    with_set = metadata(regularisation={"1_cat": {"n_repeats": 2, "img_count": 50}}, training=TrainingConfig(prior_weight=0.5).as_dict())
    assert (with_set["ss_num_reg_images"], with_set["ss_prior_loss_weight"]) == ("100", "0.5")
    assert json.loads(with_set["ss_reg_dataset_dirs"]) == {"1_cat": {"n_repeats": 2, "img_count": 50}}
    assert json.loads(with_set["ss_dataset_dirs"]) == {"3_cats": {"n_repeats": 3, "img_count": 2}, "dogs": {"n_repeats": 1, "img_count": 3}}
    assert json.loads(with_set["trilora.data"])["regularisation"] == {"1_cat": {"n_repeats": 2, "img_count": 50}}
    without = metadata()
    assert without["ss_num_reg_images"] == "0" and json.loads(without["ss_reg_dataset_dirs"]) == {} and without["ss_num_train_images"] == "9"


def test_metadata_of_mixed_ranks_and_other_families():
    found = metadata(plan={"a": 4, "b": 2}, family="generic")
    assert found["ss_network_dim"] == "Dynamic" and "modelspec.architecture" not in found and "ss_base_model_version" not in found
    assert metadata(family="sdxl")["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"


def weights():
    draw = torch.Generator().manual_seed(0)
    return {"b.weight": torch.randn(5, 7, generator=draw), "a.weight": torch.randn(3, 2, 2, generator=draw), "c.bias": torch.randn(4, generator=draw)}


def test_the_fingerprint_is_stable():
    """The same for the same weights, whatever their order, memory layout or kind of tensor; known for a known model."""
    base = fingerprint(weights())
    assert re.fullmatch("[0-9a-f]{64}", base) and fingerprint(dict(reversed(weights().items()))) == base
    strided = {key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in weights().items()}
    assert fingerprint({key: torch.nn.Parameter(value) for key, value in strided.items()}) == base
    assert fingerprint({"a": torch.arange(20.0).view(4, 5)}).startswith("f18bf17ef283e084")


@pytest.mark.parametrize("change", ["value", "shape", "name", "missing"])
def test_the_fingerprint_is_sensitive(change):
    other = weights()
    if change == "value":
        other["a.weight"].view(-1)[3] += 1e-6
    elif change == "shape":
        other["b.weight"] = other["b.weight"].reshape(7, 5)
    elif change == "name":
        other["d.bias"] = other.pop("c.bias")
    else:
        del other["c.bias"]
    assert fingerprint(other) != fingerprint(weights())
