"""The engine's slots without an engine: the real slot writer over plain tensors, and a server's experts around it."""
