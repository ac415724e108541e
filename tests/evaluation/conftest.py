"""The oracle of features and metrics."""

import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import pytest

_STUBS = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets")


@pytest.fixture(scope="session")
def torch_fidelity() -> Any:
    """The oracle. It imports torchvision for data sets that are not used here, so a stub will do."""
    before = {name: sys.modules.get(name) for name in _STUBS}
    try:
        if importlib.util.find_spec("torchvision") is None:
            for name in _STUBS:
                _install_stub(name)
            sys.modules["torchvision.datasets"].__dict__.update(CIFAR10=object, CIFAR100=object, STL10=object)
        return pytest.importorskip("torch_fidelity", reason="the oracle torch-fidelity is not installed")
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)


def _install_stub(name: str) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
