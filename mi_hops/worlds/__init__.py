"""Made-up worlds with known ground truth, and the training of small models on them."""
