"""What a model computes on calibration data: where its units are read, and streamed sums of them."""
