"""Rows of chat, completion and pretokenised data: read, checked, counted, and stored with the runs that are trained."""
