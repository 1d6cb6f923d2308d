"""Plans of an exchange, against rows that are placed one by one."""

import plan_cases
import pytest


@pytest.mark.parametrize(
    ("n_ranks", "n_slots", "n_tokens", "top_k"),
    [(1, 3, 5, 2), (2, 5, 33, 8), (3, 1, 17, 1), (8, 4, 9, 32), (5, 40, 40, 6)],
)
def test_the_plan(rng, n_ranks, n_slots, n_tokens, top_k):
    for _ in range(3):
        case = plan_cases.random_case(rng, n_ranks, n_slots, n_tokens, top_k)
        plan_cases.check(case.run(), case)
