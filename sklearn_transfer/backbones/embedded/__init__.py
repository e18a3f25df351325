"""The image network that ships with the package."""

PIXELS = 64  # short side of the images it was trained on
