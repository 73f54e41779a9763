"""From the runs of a sweep to the tables and figures of a results page.

plan.md says what is compared and how it is judged. `store` packs finished runs into small files, `counts`
measures what a policy's answers say of its habits, `tables` and `figures` show the comparison of 40
steps, `horizon` the planned one of 120. configs/sweeps/ has the points of both.
"""
