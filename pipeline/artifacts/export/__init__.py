"""Exports: an adapter in the additive form, for the programs that serve it beside an unchanged base."""
