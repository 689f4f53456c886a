"""TSV-M, Iso-C and Iso-CTS do to singular spaces what they say."""

import pytest
import torch

from alloy.merging import merge


def merged_delta(method, deltas, **options):
    base = {"w": torch.ones_like(deltas[0])}
    models = [{"w": base["w"] + d} for d in deltas]
    return merge(method, models, base=base, skip=(), **options)["w"] - base["w"]


def draw(*shape, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)
    return draw(shape[0], rank, seed=seed) @ draw(rank, shape[1], seed=seed + 100)


def orthogonal_tasks():
    """Two task matrices [8, 6] of rank 3 in orthogonal row and column spaces."""
    left, right = torch.linalg.qr(draw(8, 8)).Q, torch.linalg.qr(draw(6, 6, seed=1)).Q
    values = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    return [left[:, 3 * i : 3 * i + 3] @ values @ right[:, 3 * i : 3 * i + 3].T for i in (0, 1)]


def test_tsv_m_adds_tasks_that_do_not_interfere():
    """Orthogonal singular spaces of rank 1/n are already as TSV-M wants them: the result is the
    sum.
    """
    tasks = orthogonal_tasks()
    torch.testing.assert_close(merged_delta("tsv_m", tasks), tasks[0] + tasks[1])
    scaled = merged_delta("tsv_m", tasks, coefficients=[0.5, 2.0])
    torch.testing.assert_close(scaled, 0.5 * tasks[0] + 2 * tasks[1])


def test_tsv_m_keeps_the_singular_values_of_the_cut_tasks():
    tasks = [draw(9, 6, seed=s) for s in (1, 2, 3)]
    expected = torch.cat([torch.linalg.svdvals(t)[:2] for t in tasks]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merged_delta("tsv_m", tasks)), expected)


def test_tsv_m_of_one_task_is_the_task():
    task = draw(5, 7)
    torch.testing.assert_close(merged_delta("tsv_m", [task]), task)


def test_iso_c_keeps_the_directions_of_the_sum_and_levels_its_singular_values():
    tasks = [draw(9, 6, seed=s) for s in (1, 2, 3)]
    merged, total = merged_delta("iso_c", tasks), sum(tasks)
    values = torch.linalg.svdvals(merged)
    torch.testing.assert_close(values, torch.linalg.svdvals(total).mean().expand(6))
    u, _, vt = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(merged, values[0] * u @ vt)


def test_iso_cts_with_only_the_common_space_is_iso_c():
    tasks = [draw(9, 6, seed=s) for s in (1, 2, 3)]
    torch.testing.assert_close(
        merged_delta("iso_cts", tasks, common=1.0),
        merged_delta("iso_c", tasks),
        atol=1e-9,
        rtol=1e-9,
    )


@pytest.mark.parametrize("common", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (5, 5), (2, 7)])
def test_iso_cts_has_equal_singular_values_in_the_full_rank(common, shape):
    tasks = [draw(*shape, seed=s) for s in (1, 2, 3)]
    values = torch.linalg.svdvals(merged_delta("iso_cts", tasks, common=common))
    torch.testing.assert_close(values, values[0].expand_as(values))
    assert len(values) == min(shape)


def test_iso_cts_gives_room_to_a_task_that_the_sum_drowns():
    """A weak task outside the sum's leading space is in the merged space, equal in size to the
    strong ones.
    """
    strong, weak = orthogonal_tasks()
    weak = weak * 1e-3
    merged = merged_delta("iso_cts", [strong, strong, weak], common=0.5)
    u, _, vt = torch.linalg.svd(weak, full_matrices=False)
    assert (u[:, 0] @ merged @ vt[0]) / torch.linalg.svdvals(merged)[0] > 0.9
