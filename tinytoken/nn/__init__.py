"""Modules: parameters with names, the layers of a transformer, starting weights, flat storage."""
from .conv import BatchNorm2d, Conv2d, Sequential
from .cross import CrossAttention
from .flat import Flat, flatten
from .images import both_sides, checked_images
from .init import he, initialise, normal, sincos_positions, sinusoids, start_positions, xavier
from .layers import (GELU, MLP, Attention, Block, LayerNorm, LayerScale, Linear, PatchEmbed, Projection,
                     attention_branch, column, mlp_branch, scaled)
from .module import Buffer, Module, Note, Parameter, at_most, follow_all, noted, zeros
from .tubelet import TubeletEmbed

__all__ = ["Attention", "BatchNorm2d", "Block", "Buffer", "Conv2d", "CrossAttention", "Flat", "GELU",
           "LayerNorm", "LayerScale", "Linear", "MLP", "Module", "Note", "Parameter", "PatchEmbed",
           "Projection", "Sequential", "TubeletEmbed",
           "at_most", "attention_branch", "both_sides", "checked_images", "column", "flatten", "follow_all",
           "he", "initialise", "mlp_branch", "normal", "noted", "scaled", "sincos_positions",
           "sinusoids", "start_positions", "xavier", "zeros"]
