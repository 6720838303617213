"""Who shares what."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.cluster.config import ClusterConfig
from framework.cluster.placement import Pool, check_fit, pools
from framework.core.errors import UsageError


def test_each_role_has_its_own_pool_unless_colocated() -> None:
    worlds = {"actor": 4, "critic": 2}
    apart = pools(ClusterConfig(threads=2), worlds, gpus=1)
    assert apart == [Pool(("actor",), 4, 2, 1), Pool(("critic",), 2, 2, 1)]
    assert apart[0].share == (2.0, 1.0)
    assert apart[1].bundles == [{"CPU": 2, "GPU": 1}] * 2

    (together,) = pools(ClusterConfig(threads=2, colocate=True), worlds, gpus=1)
    assert together == Pool(("actor", "critic"), 4, 2, 1)
    assert together.share == (1.0, 0.5)


def test_without_gpus_none_are_asked_for() -> None:
    (pool,) = pools(ClusterConfig(), {"actor": 1}, gpus=0)
    assert pool.bundles == [{"CPU": 1}]


@given(st.integers(1, 12), st.integers(1, 16))
def test_the_shares_of_a_pool_always_fit(roles: int, threads: int) -> None:
    pool = Pool(tuple(map(str, range(roles))), 1, threads, 1.0)
    cpus, gpus = pool.share
    assert cpus * roles <= threads + 1e-9
    assert 0 < gpus * roles <= 1 + 1e-9


def test_roles_that_do_not_fit_are_refused_with_the_ways_out() -> None:
    needed = pools(ClusterConfig(), {"actor": 2, "critic": 2}, gpus=1)
    check_fit(needed, {"CPU": 4.0, "GPU": 4.0})
    with pytest.raises(UsageError, match=r"need 4 GPUs, the cluster has 1; choose fewer cluster.workers"):
        check_fit(needed, {"CPU": 4.0, "GPU": 1.0})
    with pytest.raises(UsageError, match="need 4 CPUs"):
        check_fit(needed, {"CPU": 3.0})
