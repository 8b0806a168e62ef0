"""What the lessons and the main job share: arms, trials, statistics, timing, tables."""
from .arm import Arm, Recipe
from .damage import Damage, corruption_error, mean_error
from .stats import (difference, interval_text, over_chance, packed, range_text, spread_text, told_apart,
                    unpacked)
from .tables import arms_text
from .timing import images_per_second, machine
from .trial import Trial, kept_in_training, kept_on_object, read_alike

__all__ = ["Arm", "Damage", "Recipe", "Trial", "arms_text", "corruption_error", "difference",
           "images_per_second", "interval_text", "kept_in_training", "kept_on_object", "machine",
           "mean_error", "over_chance", "packed", "range_text", "read_alike", "spread_text", "told_apart",
           "unpacked"]
