"""Stands in for packages that need CUDA, so that SGLang can be imported on a CPU; for tests only.

Lies in the site-packages of SGLang's own environment, where Python imports it at each start. What stands in are
kernels; what parses, schedules, streams, aborts, pauses and answers is SGLang's own.
"""

import importlib.abc
import importlib.machinery
import sys
import types

ABSENT = frozenset(
    [
        "triton",
        "sgl_kernel",
        "flashinfer",
        "torchvision",
        "torchaudio",
        "decord",
        "cuda",
        "flash_attn",
        "deep_gemm",
        "tvm_ffi",
        "torch_memory_saver",
        "outlines",
        "modelscope",
        "timm",
        "kernels",
        "tilelang",
        "quack",
        "humming",
        "mooncake",
        "pynvml",
        "nvshmem",
        "deep_ep",
        "flash_mla",
        "datasets",
        "blobfile",
    ]
)


def is_special(name):
    return name.startswith("__") and name.endswith("__")


class AnyClass(type):
    """The type of classes that stand in; each attribute is its own name."""

    def __getattr__(cls, name):
        if is_special(name):
            raise AttributeError(name)
        return name


class Base(metaclass=AnyClass):
    def __init_subclass__(cls, **_):
        super().__init_subclass__()

    def __init__(self, *_, **__):
        pass


class StandIn(types.ModuleType):
    """A module that has everything: classes where a name begins with a capital, else modules that can be called."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__file__ = __file__
        self.__version__ = "99.0.0"

    def __getattr__(self, name):
        if is_special(name):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if full in sys.modules:
            return sys.modules[full]
        if name[:1].isupper():
            value = AnyClass(name, (Base,), {"__module__": self.__name__})
        else:
            value = sys.modules[full] = StandIn(full)
            value.__spec__ = importlib.machinery.ModuleSpec(full, LOADER, is_package=True)
        self.__dict__[name] = value
        return value

    def __call__(self, *args, **kwargs):
        """A decorator, with or without arguments."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __getitem__(self, _):
        return self

    def __bool__(self):
        return False


class Loader(importlib.abc.Loader):
    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


LOADER = Loader()


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, LOADER, is_package=True)
        return None


sys.meta_path.append(Finder())
