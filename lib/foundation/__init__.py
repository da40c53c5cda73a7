"""Foundation models: SAM and CLIP, their checkpoints, their small kin, segment everything."""
