"""The losses: public functions and modules, checks, autograd and registered operators, above the `backends`."""
