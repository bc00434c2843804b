"""Tests against a real ComfyUI, imported into this process: the fixtures, and skipping where there is none.

The host is COMFYUI_PATH, else the ComfyUI in whose custom_nodes/ this repository lies, else ~/comfy/ComfyUI, provided
that the interpreter running pytest can import it. TRILORA_REQUIRE_HOST=1 turns its absence into a failure.
TRILORA_TEST_DEVICE=cuda lets it use its GPU; by default it runs on the processor.

The host loads the pack under a module name of its own, so its classes are not those of ``comfyui_trilora``: host tests
take modules from the fixtures ``pack`` and ``pack_module``.
"""

import asyncio
import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from comfyui_trilora.benchmarks import installation
from comfyui_trilora.benchmarks.installation import ROOT
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
# The host reads its base directory while it is being imported, long before a fixture could make one.
BASE = Path(tempfile.mkdtemp(prefix="trilora-host-tests-"))
BASE_FOLDERS = ("models/checkpoints", "models/vae_approx", "models/loras", "input", "output", "temp", "user", "custom_nodes")

HOST, WHY_NOT = None, ""
try:
    found = installation.find_host()
    for folder in BASE_FOLDERS:
        (BASE / folder).mkdir(parents=True, exist_ok=True)
    device = [] if os.environ.get("TRILORA_TEST_DEVICE") == "cuda" else ["--cpu"]
    HOST = installation.import_host(found, [*device, "--base-directory", str(BASE)])
except installation.HostUnavailable as error:
    WHY_NOT = str(error)
    if os.environ.get("TRILORA_REQUIRE_HOST") == "1":
        shutil.rmtree(BASE, ignore_errors=True)
        raise pytest.UsageError(f"TRILORA_REQUIRE_HOST is 1, but {WHY_NOT}") from error


class SkippedModule(pytest.Module):
    """Stands for a test file that cannot be imported, because it imports the host."""

    def collect(self):
        raise pytest.skip.Exception(f"no usable ComfyUI: {WHY_NOT}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return None if HOST else SkippedModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.host)


def pytest_terminal_summary(terminalreporter):
    if HOST:
        terminalreporter.write_line(f"host tests ran in ComfyUI {HOST.version} at {HOST.path}")
    else:
        terminalreporter.write_line(
            f"!!!! NO HOST TEST RAN: {WHY_NOT}. To run them: COMFYUI_PATH=<ComfyUI> <its python> -m pytest !!!!",
            red=True, bold=True,
        )  # fmt: skip


def pytest_unconfigure():
    shutil.rmtree(BASE, ignore_errors=True)


@pytest.fixture(scope="session")
def host() -> installation.Host:
    """The imported ComfyUI: path and version."""
    return HOST


@pytest.fixture(scope="session")
def host_version(host) -> tuple[int, ...]:
    """The host's version as numbers, e.g. (0, 3, 64)."""
    return tuple(int(part) for part in host.version.split(".")[:3])


@pytest.fixture(scope="session")
def stock_nodes(host):
    """The host's ``nodes`` module with all of its own extra nodes loaded, and without the pack."""
    import nodes
    import server

    async def load() -> list[str]:
        # Some of the host's nodes ask for the server's instance while being imported; nothing listens.
        server.PromptServer(asyncio.get_running_loop())
        await nodes.init_public_apis()
        return await nodes.init_builtin_extra_nodes()

    assert asyncio.run(load()) == [], "the host could not load its own nodes"
    return nodes


@pytest.fixture(scope="session")
def host_nodes(stock_nodes):
    """The host's ``nodes`` module after it has loaded the pack the way it does at start-up."""
    assert asyncio.run(stock_nodes.load_custom_node(str(ROOT))) is True, "see the captured log for the import error"
    return stock_nodes


@pytest.fixture(scope="session")
def pack(host_nodes):
    """The pack as the host loaded it (a package module)."""
    return sys.modules[str(ROOT).replace(".", "_x_")]


@pytest.fixture(scope="session")
def pack_module(pack):
    """Function: dotted name below the pack -> that module as the host sees it, e.g. ``pack_module("nodes.load")``."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="session")
def error(pack_module):
    """TriLoRAError as the host sees it."""
    return pack_module("trilora_ops.errors").TriLoRAError


@pytest.fixture(scope="module")
def tiny(host_nodes):
    """An eps model for the tests of one file; see tiny_models.TinyModel."""
    from comfyui_trilora.tests.host import tiny_models

    return tiny_models.eps_prediction_model()


@pytest.fixture
def hook(host_nodes):
    """Function: inputs of Adapter Hook -> its HOOKS."""
    from comfyui_trilora.tests.host.tiny_run import run_node

    return lambda lora_name, **inputs: run_node(host_nodes, "TriLoRAAdapterHook", lora_name=lora_name, **inputs)[0]


@pytest.fixture
def texts(pack_module, monkeypatch):
    """What the node shows, in order."""
    shown = []
    monkeypatch.setattr(pack_module("nodes.compat"), "show_text", lambda text, node_id: shown.append(text))
    return shown


@pytest.fixture(scope="session")
def read(pack_module):
    """Function: patcher, tensors -> ({target: (up, down)} as a loader reads them, the notices)."""
    patches, notices = pack_module("nodes.comfy_patches"), pack_module("nodes.notices")
    state = pack_module("trilora_ops.checkpoint").AdapterState

    def read(patcher, tensors, clip=None):
        with notices.collected() as said:
            found = patches.patches_from_state(state(tensors), patcher, clip, "a.safetensors")
        return {target: (patch.weights[0], patch.weights[1]) for target, patch in found.items()}, said

    return read


@pytest.fixture(scope="session")
def base_dir(host) -> Path:
    """The base directory that keeps the tests out of the installation's own models, outputs and user data."""
    return BASE


@pytest.fixture(scope="session")
def models_dir(base_dir) -> Path:
    """The host's models folder, holding checkpoints/tiny_sd15.safetensors and the TAESD pair in vae_approx/."""
    from comfyui_trilora.tests.host import tiny_checkpoint

    models = base_dir / "models"
    tiny_checkpoint.write_sd15(models / "checkpoints" / "tiny_sd15.safetensors")
    tiny_checkpoint.write_taesd(models / "vae_approx")
    return models


@pytest.fixture(scope="session")
def started_host(host, models_dir, tmp_path_factory):
    """A ComfyUI server of its own process with the pack installed and the tiny models; see server.StartedHost."""
    from comfyui_trilora.tests.host.server import StartedHost

    base = tmp_path_factory.mktemp("started-host")
    with StartedHost(host.path, base, pack=ROOT, models=models_dir) as started:
        yield started


@pytest.fixture(scope="module")
def saved(host):
    """Function: tensors and metadata -> the name under which the loaders list the file."""
    from comfyui_trilora.tests.host.tiny_run import list_saved_adapters

    folder, written = list_saved_adapters(), []

    def save(tensors, metadata: dict[str, str] | None = None) -> str:
        file = folder / f"saved_{len(written)}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)
        written.append(file)
        return file.name

    yield save
    for file in written:
        file.unlink()
