"""Foundation models: SAM and CLIP, their checkpoints, training of the small ones, mask generation."""
