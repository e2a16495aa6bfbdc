"""Amounts of money on the command line."""

from __future__ import annotations

import typer


def cost_of(text: str) -> dict[str, str]:
    """An amount with its currency, such as '100 EUR'; raises `typer.BadParameter`."""
    amount, _, currency = text.partition(" ")
    if not amount or not currency.strip():
        raise typer.BadParameter(f"{text!r} is no amount of money: write it with its currency, such as '100 EUR'")
    return {"amount": amount, "currency": currency.strip()}
