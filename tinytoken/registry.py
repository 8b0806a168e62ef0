"""Registries: what is offered under a name. Whatever lists models, tasks or data sets reads it from one of
these."""
from .errors import expect


class Registry(dict):
    """{name: entry}, in the order of registration.

        model = Registry("model")

        @model("vit")
        class ViT: ...

        model.pick("vit")        # the class; InputError names the choices for a name that nobody registered
    """

    def __init__(self, noun):
        super().__init__()
        self.noun = noun

    def __call__(self, name):
        """Decorator: register a class or function under `name`."""
        def register(entry):
            self[name] = entry
            return entry
        return register

    def pick(self, name):
        """The entry of this name."""
        expect(name in self, self.noun, lambda: f"{name!r}, expected one of {', '.join(self)}")
        return self[name]
