"""Running statistics: updates, accumulation, recalibration, validation, folding, and trees."""
