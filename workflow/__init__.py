"""The papers' tables: what they need (plan), the work (jobs), and the run (Snakefile)."""
