"""Image-text models for scores and guidance."""
