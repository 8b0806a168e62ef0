"""Modules: parameters with names, the layers of a transformer, starting weights, flat storage."""
from .flat import Flat, flatten
from .init import initialise, normal, sincos_positions, start_positions, xavier
from .layers import (GELU, MLP, Attention, Block, LayerNorm, LayerScale, Linear, PatchEmbed, Projection,
                     attention_branch, both_sides, column, mlp_branch, scaled)
from .module import Buffer, Module, Parameter, at_most, zeros

__all__ = ["Attention", "Block", "Buffer", "Flat", "GELU", "LayerNorm", "LayerScale", "Linear", "MLP",
           "Module", "Parameter", "PatchEmbed", "Projection", "at_most", "attention_branch", "both_sides",
           "column", "flatten", "initialise", "mlp_branch", "normal", "scaled", "sincos_positions",
           "start_positions", "xavier", "zeros"]
