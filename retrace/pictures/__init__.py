"""All that draws or reads image files: fonts, labels, plots, contact sheets."""
