"""The lists of weights' names that tests without a host use (tests/fuzz/model_names.py), against the host's own models."""

import pytest
from comfyui_trilora.tests.fuzz.model_names import flux, sdxl
from comfyui_trilora.tests.host.meta_models import NETWORKS, build


@pytest.mark.parametrize(("name", "listed"), [("SDXL", sdxl), ("Flux.1", flux)])
def test_the_names_are_those_of_the_model(name, listed):
    """Older hosts call the weight of a norm its scale."""
    keys = build(NETWORKS[name]).diffusion_model.state_dict()
    assert listed() == sorted({f"diffusion_model.{key}".removesuffix(".weight").removesuffix(".bias").removesuffix(".scale") for key in keys})
