"""Running statistics: updates, accumulation, recalibration, validation and folding."""
