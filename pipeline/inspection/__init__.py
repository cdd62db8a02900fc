"""Reading an adapter: what it looks for, what it writes, how strongly, and where in a text.

`spectrum` needs the adapter alone, `tokens` the head of its base model, `firing` the whole base model and a `passages.Text`.
`reading.read` brings them together as an `Inspection`; `terminal` and `page` show it.
"""
