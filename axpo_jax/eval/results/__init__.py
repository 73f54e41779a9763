"""From the runs of a sweep to the tables and figures of a results page; docs/results.md is one.

`store` packs finished runs into small files, `counts` measures what a policy's answers say of its
habits, `statistics` compares runs over seeds, `tables` and `figures` show them.
"""
