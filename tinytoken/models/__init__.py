"""One file per paper."""
from .dynamicvit import DynamicOutput, DynamicViT, Predictor, dynamicvit_loss
from .lookupvit import LookupBlock, LookupOutput, LookupViT, lookupvit_loss
from .vit import Trace, ViT

BY_NAME = {model.__name__: model for model in (ViT, DynamicViT, LookupViT)}  # what a checkpoint may ask for
