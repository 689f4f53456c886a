"""What must hold before a tensor is read: configs, vocabularies, tensors, places. One module each."""
