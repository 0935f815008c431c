"""What the ops take on a GPU, against torch's own: run by ``python -m fastprune gpu-check``."""
