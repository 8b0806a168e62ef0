"""What the lessons and the main job share: arms, trials, statistics, timing, tables."""
from .arm import Arm, Recipe
from .stats import difference, interval_text, range_text, spread_text
from .timing import images_per_second, machine
from .trial import Trial, kept_on_object

__all__ = ["Arm", "Recipe", "Trial", "difference", "images_per_second", "interval_text", "kept_on_object",
           "machine", "range_text", "spread_text"]
