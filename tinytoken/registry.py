"""Registries: what is offered under a name. Every list of models, tasks or data sets is read from one."""
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from .errors import expect

Entry = TypeVar("Entry")


class Registry(dict[str, Any]):
    """{name: entry}, in the order of registration.

        model = Registry("model")

        @model("vit")
        class ViT: ...

        model.pick("vit")        # the class; InputError names the choices for a name that nobody registered
    """

    def __init__(self, noun: str):
        super().__init__()
        self.noun = noun

    def __call__(self, name: str) -> Callable[[Entry], Entry]:
        """Decorator: register a class or function under `name`."""
        def register(entry):
            self[name] = entry
            return entry
        return register

    def pick(self, name: str) -> Any:
        """The entry of this name."""
        expect(name in self, self.noun, lambda: f"{name!r}, expected one of {', '.join(self)}")
        return self[name]


def import_files(package: str, path: Iterable[str]) -> None:
    """Import every file of a package (its __name__ and __path__), so that each registers what it has."""
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
