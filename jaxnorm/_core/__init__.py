"""The arithmetic of the norms, and the checks of arguments."""
