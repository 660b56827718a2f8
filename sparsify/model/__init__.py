"""A user's model and optimizer: named, traced, wrapped, hooked, and left as they were. Imports only `errors`."""
