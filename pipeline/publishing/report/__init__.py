"""A run's report: one page that stands alone, with its pictures beside it, made of what the run's folder tells."""
