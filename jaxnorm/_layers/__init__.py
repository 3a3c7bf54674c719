"""What the layers of Linen and NNX share, and their base classes."""
