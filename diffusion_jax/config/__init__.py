"""The fields of a run: their defaults, the file and the flags that set them, and comparisons."""
