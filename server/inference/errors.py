"""Errors of inference at its start. Apart from what raises them, since that loads vLLM."""


class HandlersRefused(ValueError):
    """An option of the handlers cannot be kept; the message names it."""
