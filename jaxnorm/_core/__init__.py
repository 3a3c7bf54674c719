"""The arithmetic of the norms: moments, the normalize step, and checks of arguments."""
