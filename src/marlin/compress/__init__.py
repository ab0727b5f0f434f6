"""Choosing masks, codes and scales: recipes, solvers, and the walk through a model."""

from marlin.compress import auto, sensitivity
from marlin.compress.block import CalibrationWarning
from marlin.compress.calibration import calibration_windows
from marlin.compress.hessian import DampingWarning
from marlin.compress.options import Options
from marlin.compress.recipe import METHODS, PRESETS, LayerRecipe, Recipe, preset
from marlin.compress.recovery import Recovered, generate_text, recover
from marlin.compress.recovery_settings import Recovery, RecoveryEvent, RecoveryWarning
from marlin.compress.report import BlockReport, Compressed, Event, LayerReport
from marlin.compress.walk import Keeper, compress_model

__all__ = [
    "METHODS",
    "PRESETS",
    "BlockReport",
    "CalibrationWarning",
    "Compressed",
    "DampingWarning",
    "Event",
    "Keeper",
    "LayerRecipe",
    "LayerReport",
    "Options",
    "Recipe",
    "Recovered",
    "Recovery",
    "RecoveryEvent",
    "RecoveryWarning",
    "auto",
    "calibration_windows",
    "compress_model",
    "generate_text",
    "preset",
    "recover",
    "sensitivity",
]
