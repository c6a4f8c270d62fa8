"""Variational likelihoods q(z_i | lambda_i), one kind of value a file."""
