"""Prints the lowest versions that pyproject.toml allows, as constraints for pip: what `make test-lowest` installs."""

import tomllib

from packaging.requirements import Requirement
from support.paths import ROOT


def lowest_versions() -> list[str]:
    """`name==version` of each dependency, those of extras too, that has a lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = sum(project["optional-dependencies"].values(), project["dependencies"])
    bounds = {
        requirement.name: bound.version
        for requirement in map(Requirement, listed)
        for bound in requirement.specifier
        if bound.operator == ">="
    }
    return [f"{name}=={version}" for name, version in sorted(bounds.items())]


if __name__ == "__main__":
    print("\n".join(lowest_versions()))
