"""Choosing masks, codes and scales: recipes, solvers, and the walk through a model."""

from marlin.compress import sensitivity
from marlin.compress.calibration import calibration_windows
from marlin.compress.hessian import DampingWarning
from marlin.compress.recipe import METHODS, PRESETS, LayerRecipe, Recipe, preset
from marlin.compress.report import Compressed, Event, LayerReport
from marlin.compress.walk import CalibrationWarning, Options, compress_model

__all__ = [
    "METHODS",
    "PRESETS",
    "CalibrationWarning",
    "Compressed",
    "DampingWarning",
    "Event",
    "LayerRecipe",
    "LayerReport",
    "Options",
    "Recipe",
    "calibration_windows",
    "compress_model",
    "preset",
    "sensitivity",
]
