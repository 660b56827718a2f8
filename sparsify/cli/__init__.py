"""The command `sparsify`: words become calls of the public functions. Imports anything but `experiments`."""
