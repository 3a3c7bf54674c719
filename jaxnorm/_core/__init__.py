"""The arithmetic of the norms: moments, the normalize step, and the checks of their arguments."""
