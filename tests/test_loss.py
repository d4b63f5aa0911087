"""Eq. 1 to 3 beside plain sums over every index, and two processes beside one."""

import re
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_two
from torch.nn.parallel import DistributedDataParallel

from loss import double_sum, info_nce, soft_info_nce
from support.processes import rank, setup

OBJECTIVES = {name: partial(soft_info_nce, affinity=name) for name in ("none", "clip", "view")}
OBJECTIVES["batch"] = double_sum


def batch(N=5, K=2):
    g = torch.Generator().manual_seed(0)
    normal = lambda width: torch.randn(N, K, width, generator=g, dtype=torch.float64)
    y_a, y_v, z_a, z_v = (normal(width) for width in (6, 6, 4, 4))
    return y_a.relu() * 2, y_v.relu() * 2, F.normalize(z_a, dim=2), F.normalize(z_v, dim=2)


def eq1(z_a, z_v, i, p, j, q, eta):
    """-log of Eq. 1 for audio view p of clip i and video view q of clip j."""
    e = lambda n, r: np.exp(z_a[i, p] @ z_v[n, r] / eta)
    others = sum(e(n, r) for n in range(len(z_v)) if n != i for r in range(z_v.shape[1]))
    return -np.log(e(j, q) / (e(j, q) + others))


def eq3(y_a, y_v, z_a, z_v, eta, affinity, temperature, normalize):
    """Eq. 3, audio -> video, one term at a time."""
    N, K, _ = z_a.shape
    unit = (lambda y: y / np.linalg.norm(y)) if normalize else (lambda y: y)
    w = lambda i, p, j, q: np.exp(unit(y_a[i, p]) @ unit(y_v[j, q]) / temperature)
    total = 0
    for i, p in product(range(N), range(K)):
        clips = range(N) if affinity == "batch" else [i]
        views = range(K) if affinity == "clip" else [p]
        total_w = sum(w(i, o, j, q) for o, j, q in product(views, clips, range(K)))
        for j, q in product(clips, range(K)):
            lam = 1 / K if affinity == "none" else w(i, p, j, q) / total_w
            total += lam * len(views) / K * eq1(z_a, z_v, i, p, j, q, eta) / N
    return total


def test_info_nce_is_eq_1():
    _, _, z_a, z_v = batch(K=3)
    own = torch.tensor([3, 1])        # positions of this process's clips in the global batch
    L = info_nce(z_a[own], z_v, own, 0.07)
    for b, p, q in product(range(2), range(3), range(3)):
        i = int(own[b])
        assert abs(L[b, p, q] - eq1(z_a.numpy(), z_v.numpy(), i, p, i, q, 0.07)) < 1e-10


@pytest.mark.parametrize("affinity", OBJECTIVES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("K", [1, 3])
def test_soft_info_nce_is_eq_3(affinity, normalize, K):
    """z may have any length, and plain InfoNCE needs no encoder outputs."""
    y_a, y_v, z_a, z_v = batch(K=K)
    a_to_v, v_to_a = (eq3(*(x.numpy() for x in tensors), 0.07, affinity, 0.5, normalize)
                      for tensors in ((y_a, y_v, z_a, z_v), (y_v, y_a, z_v, z_a)))
    loss = partial(OBJECTIVES[affinity], affinity_temperature=0.5, raw_affinity=not normalize)
    long = torch.rand(5, K, 1, dtype=torch.float64) * 40 + 0.1
    assert abs(loss(y_a, y_v, long * z_a, 7 * z_v, one_way=True) - a_to_v) < 1e-10
    assert abs(loss(y_a, y_v, z_a, z_v) - (a_to_v + v_to_a) / 2) < 1e-10
    if affinity == "none":
        assert abs(loss(None, None, z_a, z_v, one_way=True) - a_to_v) < 1e-10


def test_precision():
    """The highest of the inputs counts, and half precision becomes float32."""
    y_a, y_v, z_a, z_v = batch()
    exact, mixed = (soft_info_nce(y, y_v, z_a, z_v) for y in (y_a, y_a.float()))
    assert exact.dtype == mixed.dtype == torch.float64 and abs(exact - mixed) < 1e-5
    half = [x.half() for x in batch()]
    found, exact = soft_info_nce(*half), soft_info_nce(*(x.float() for x in half))
    assert found.dtype == torch.float32 and found == exact
    with torch.autocast("cpu", torch.bfloat16):   # must not round the similarities
        assert soft_info_nce(*half) == exact


def test_extreme_similarities():
    z = F.normalize(torch.eye(4)[:, None].expand(4, 2, 4), dim=2).requires_grad_()
    y = torch.rand(4, 2, 8)
    for sign in (1, -1):              # the best and the worst z; their logits are 1000 apart
        loss = soft_info_nce(y, y, z, sign * z, eta=0.001)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all()
    assert loss > 900
    z = torch.eye(2, dtype=torch.float64)[:, None]
    L = info_nce(z[:1], z.flip(0), torch.tensor([0]), 1 / 21)
    assert abs(L.item() - np.log1p(np.exp(21))) < 1e-10     # torch's own softplus gives 21


@pytest.mark.parametrize("loss", [soft_info_nce, double_sum])
def test_detach_stops_the_gradient_through_lam(loss):
    for detach in (False, True):
        y_a, y_v, z_a, z_v = (t.requires_grad_() for t in batch())
        loss(y_a, y_v, z_a, z_v, detach_affinity=detach).backward()
        assert (y_a.grad is None and y_v.grad is None) if detach else y_a.grad.abs().max() > 1e-6
        assert z_a.grad.abs().max() > 1e-6


@pytest.mark.parametrize("loss", [soft_info_nce, double_sum])
def test_bad_input(loss):
    nan, infinite = batch(), batch()
    nan[3][1, 1, 1], infinite[0][1, 1, 1] = torch.nan, torch.inf
    assert not any(loss(*x, check=False).isfinite() for x in (nan, infinite))
    for tensors, flags, sentence in (
            (batch(N=1), {"check": False}, "the global batch has 1: give it 2 or more"),
            (batch(), {"eta": 0}, "temperatures must be above 0"),
            (batch(), {"affinity_temperature": -1}, "temperatures must be above 0"),
            (nan, {}, "^z_v holds NaN or infinity"),
            (infinite, {}, "^ly_a holds NaN or infinity")):
        with pytest.raises(ValueError, match=sentence):
            loss(*tensors, **flags)
    Z, Y = (5, 2, 4), (5, 2, 6)             # shapes that fit
    for shapes in ([(5, 4)] * 4, [(5, 2, 3), Z, Y, Y], [Z, Z, Y, (5, 2, 5)],
                   [Z, Z, (5, 1, 6), (5, 1, 6)], [Z, Z, None, None]):
        z_a, z_v, y_a, y_v = (shape and torch.ones(shape) for shape in shapes)
        given = ", ".join(f"{name} torch.float32 {shape}" if shape else f"{name} NoneType"
                          for name, shape in zip(("z_a", "z_v", "ly_a", "ly_v"), shapes))
        with pytest.raises(ValueError, match=re.escape(f"{given}: give z_a and z_v in one shape")):
            loss(y_a, y_v, z_a, z_v)
    for z, given in ((torch.ones(Z, dtype=torch.long), "torch.int64 .5, 2, 4."),
                     (np.ones(Z), "ndarray"), ([1.0], "list"),
                     (torch.ones(5, 0, 4), "torch.float32 .5, 0, 4.")):
        with pytest.raises(ValueError, match=f"^z_a {given}, .* float tensors with the same "):
            loss(torch.ones(Y), torch.ones(Y), z, z)
    with pytest.raises(ValueError, match="'batch': choose .* 'none'; double_sum sums "):
        soft_info_nce(*batch(), affinity="batch")


def gradients(rank, world):
    """That of each objective for eight clips, of which each process has its share."""
    torch.manual_seed(0)
    net = torch.nn.Linear(7, 10).double()
    x = torch.randn(2, 8, 2, 7, dtype=torch.float64)[:, rank::world]
    net = DistributedDataParallel(net) if world > 1 else net
    for objective in OBJECTIVES.values():
        net.zero_grad()
        y, z = net(x).split([6, 4], -1)
        objective(*y.relu(), *z).backward()
        yield torch.cat([weight.grad.flatten() for weight in net.parameters()])


def compare_two_processes_with_one():
    """In each of two processes."""
    setup()
    for z, sentence in (
            (torch.randn(4 + rank(), 2, 4), "have .4, 5. clips of .2, 2. views, z of .4, 4"),
            (torch.randn(4, 2 + rank(), 4), "have .4, 4. clips of .2, 3. views, z of .4, 4"),
            (torch.randn(4, 2, 4 + rank()), "have .4, 4. clips of .2, 2. views, z of .4, 5"),
            (torch.randn(4, 2, 4, dtype=torch.float64 if rank() else torch.float32), "64: .0, 1."),
            (torch.full((4, 2, 4), torch.nan if rank() else 1.0),
             f"^{'z_a, z_v' if rank() else 'a tensor of another process'} holds NaN")):
        with pytest.raises(ValueError, match=sentence):     # on both, so neither waits
            soft_info_nce(None, None, z, z, affinity="none")
    y, z = torch.randn(4, 2, 6 + rank()), torch.randn(4, 2, 4)
    with pytest.raises(ValueError, match="z of .4, 4. numbers and ly of .6, 7."):
        double_sum(y, y, z, z)
    found = list(gradients(rank(), 2))
    dist.barrier()                    # a process that leaves early can abort the other one
    dist.destroy_process_group()      # one process needs no group
    for two, one in zip(found, gradients(0, 1), strict=True):
        assert (two - one).norm() / one.norm() < 1e-10
    print("equal")


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    script = "import test_loss\ntest_loss.compare_two_processes_with_one()"
    assert run_two(tmp_path, script) == ["equal", "equal"]
