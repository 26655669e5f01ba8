"""How good are the features of an encoder? k-NN, linear probe, fine-tuning, pictures, results."""
