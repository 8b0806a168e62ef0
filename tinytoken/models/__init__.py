"""One file per paper. Every file here is imported, so @model registers a new model without a line here."""
import importlib
import pkgutil

from . import base
from .base import Model, Output, Sizes, create, model, names
from .dynamicvit import DynamicOutput, DynamicViT, Predictor, dynamicvit_loss
from .lookupvit import LookupBlock, LookupOutput, LookupViT, lookupvit_loss
from .vit import Tokens, ViT

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _class in model.values():
    globals().setdefault(_class.__name__, _class)  # tt.models.ToMe, as tt.models.create("tome")
