"""One file per paper. Every file here is imported, so @model registers a new model without a line here."""
from ..registry import import_files
from . import base
from .base import Model, Output, Sizes, create, model, names
from .captioner import Captioner
from .describer import Describer
from .dynamicvit import DynamicOutput, DynamicViT
from .formats import clean_names, options_of, read_weights
from .lookupvit import LookupBlock, LookupOutput, LookupViT, lookupvit_loss
from .pruning import Predictor, dynamicvit_loss
from .vit import Tokens, ViT
from .weights import load_weights

import_files(__name__, __path__)
for _class in model.values():
    globals().setdefault(_class.__name__, _class)  # tt.models.ToMe, as tt.models.create("tome")
