"""The command `sparsify`: its arguments become calls of the public functions. Imports anything but `experiments`."""
