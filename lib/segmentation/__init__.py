"""Lung and lesion segmentation, one file per method."""
