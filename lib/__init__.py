"""COVID-19 detection in 3-D chest CT: data, segmentation, classification, evaluation, reporting."""
