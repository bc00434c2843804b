"""Print the requirements of the extras ``demo`` and ``test``, one a line, without torch.

Run by the interpreter into which the project was installed: the list comes from the installed metadata, so it cannot
differ from pyproject.toml. torch is left out because a ComfyUI environment keeps the torch it has.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

PROJECT = "trilora"
EXTRAS = ("", "demo", "test")


def wanted(requirement: Requirement) -> bool:
    """True for a requirement that one of EXTRAS switches on and that is neither the project itself nor torch."""
    if requirement.name in (PROJECT, "torch"):
        return False
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in EXTRAS)


for line in requires(PROJECT) or []:
    requirement = Requirement(line)
    if wanted(requirement):
        print(f"{requirement.name}{requirement.specifier}")
