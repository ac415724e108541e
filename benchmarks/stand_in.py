"""A stand-in for torchvision, which peers import for data sets that nothing here uses.

Its builds fit one build of torch each, and a wrong pair cannot be imported: the benchmark environments have none.
"""

import importlib.machinery
import importlib.util
import sys
import types

__all__ = ["stand_in_for_torchvision"]

_MODULES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets")


def stand_in_for_torchvision() -> None:
    """Lets peers be imported without torchvision; does nothing where it is installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    for name in _MODULES:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["torchvision.datasets"].__dict__.update(CIFAR10=object, CIFAR100=object, STL10=object)
    sys.modules["torchvision.datasets"].__dict__.update(VisionDataset=object)
    sys.modules["torchvision.transforms.functional"].__dict__.update(to_tensor=None)
